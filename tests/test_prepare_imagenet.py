"""Shards and zip files of any data set, by the command line that a user types."""

import fcntl
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from commands import start
from conftest import ROOT, Result
from make_layouts import LAYOUTS, add, images_of
from PIL import Image

from config import build_config
from data.splits import open_images


def command(*arguments) -> list[str]:
    return ["scripts/prepare_imagenet.py", *map(str, arguments), "--workers", "2"]


def prepare(*arguments, status: int = 0) -> Result:
    done = start(*command(*arguments))
    assert done.returncode == status, done.stderr
    return Result(done.returncode, done.stdout, done.stderr, ROOT)


def content(root: Path) -> tuple:
    """Classes, and the bytes and class of every image in order, as a training run reads them."""
    train, val, classes = open_images(build_config(opts=["DATA.DATA_PATH", str(root)]), True)
    return classes, [[images[i] for i in range(len(images))] for images in (train, val)]


def files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in images_of(out) if not path.name.startswith(".")}


def photograph(size: tuple[int, int], seed: int) -> Image.Image:
    coarse = Image.fromarray(np.random.RandomState(seed).randint(0, 256, (12, 16, 3), np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """30 and 12 images of 3 classes and several sizes, some with names that are not plain."""
    root = tmp_path_factory.mktemp("source")
    for split, count in (("train", 30), ("val", 12)):
        for i in range(count):
            name = {3: "ü.JPEG", 6: "deep/er.JPEG", 9: "long" * 40 + ".JPEG"}.get(i, f"{i}.JPEG")
            path = root / split / f"n0000000{i % 3}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            picture = photograph((40 + 4 * i, 100), i)
            picture = picture.convert("CMYK") if i == 20 else picture
            picture.save(path, format="PNG" if i == 22 else "JPEG")
    return root


@pytest.fixture(scope="session")
def shards(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("made") / "shards"
    done = prepare(source, out, "--images-per-shard", 8)
    assert f"--data-path {out}" in done.stdout
    return out


def test_shards_hold_the_same_bytes_in_mixed_order(source, shards):
    assert content(shards) == content(source)
    names = [path.name for path in sorted((shards / "train").iterdir())]
    assert names == [f"train-0000{i}.tar" for i in range(4)]
    with tarfile.open(shards / "train" / "train-00000.tar") as tar:
        classes = {member.name.split("/")[1] for member in tar}
    assert len(classes) == 3


@pytest.mark.parametrize("layout", ["shards", "webdataset", "zip", "official"])
def test_every_layout_is_a_source(source, layout, tmp_path):
    plain = tmp_path / "plain"  # with names as the official archives have them
    for split in ("train", "val"):
        for i, path in enumerate(images_of(source / split), 1):
            target = plain / split / path.relative_to(source / split).parts[0] / f"ILSVRC2012_val_{i:08d}.JPEG"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    LAYOUTS[layout](plain, tmp_path / "source")
    prepare(tmp_path / "source", tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "source")


def test_zip_files_and_their_maps(source, tmp_path):
    prepare(source, tmp_path / "out", "--zip")
    assert content(tmp_path / "out") == content(source)
    with zipfile.ZipFile(tmp_path / "out" / "train.zip") as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        lines = (tmp_path / "out" / "train_map.txt").read_text().splitlines()
        assert [line.partition("\t")[0] for line in lines] == archive.namelist()
        assert lines[-1].endswith("\t2")


def test_larger_images_are_resized(source, tmp_path):
    prepare(source, tmp_path / "out", "--short-side", 80, "--quality", 95)
    resized = 0
    for before, after in zip(*(content(root)[1] for root in (source, tmp_path / "out")), strict=True):
        for (old, label), (new, new_label) in zip(before, after, strict=True):
            assert label == new_label
            was, now = (Image.open(io.BytesIO(data)) for data in (old, new))
            if min(was.size) <= 80:
                assert old == new
                continue
            resized += 1
            assert (now.format, now.mode, min(now.size)) == ("JPEG", "RGB", 80)
            assert now.size[0] / now.size[1] == pytest.approx(was.size[0] / was.size[1], abs=0.02)
            expected = was.convert("RGB").resize(now.size, Image.Resampling.BICUBIC)
            assert np.abs(np.asarray(now, int) - np.asarray(expected, int)).mean() < 6
    assert resized == 20


def test_a_kill_loses_only_the_shards_that_were_not_finished(source, shards, tmp_path):
    out = tmp_path / "out"
    begin = [sys.executable, *command(source, out, "--images-per-shard", "8")]
    running = subprocess.Popen(begin, cwd=ROOT, start_new_session=True)
    while not list(out.rglob("*.tar")):
        assert running.poll() is None
        time.sleep(0.002)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    kept = {path: path.stat().st_ino for path in out.rglob("*.tar")}
    prepare(source, out, "--images-per-shard", 8)
    assert files(out) == files(shards) | {"prepare.json": files(out)["prepare.json"]}
    assert all(path.stat().st_ino == number for path, number in kept.items()), "finished shards are not written again"
    again = prepare(source, out, "--images-per-shard", 8)
    assert "0 images written now" in again.stdout


def test_bad_images_and_bad_commands(source, tmp_path):
    data = shutil.copytree(source, tmp_path / "data", ignore=shutil.ignore_patterns(".*"))
    bad = data / "train" / "n00000001" / "4.JPEG"
    bad.write_bytes(bad.read_bytes()[:300])
    out = tmp_path / "out"
    resize = ("--short-side", 30)
    error = prepare(data, out, *resize, status=2).error
    assert re.search(rf"image {bad}: .*; mend or remove it, or go on without it: --on-bad-image skip", error)
    done = prepare(data, out, *resize, "--on-bad-image", "skip")
    assert f"left out: {bad}" in done.stdout
    assert "train: 29 images written now" in done.stdout
    assert len(content(out)[1][0]) == 29
    for arguments, message in {
        (data, out, "--short-side", 31): f"{out} was begun with short_side 30, not 31; choose another OUT",
        (data, data / "out"): "lies in SOURCE",
        (data, "https://host/shards"): "a web server is only read from",
        (data, source): "is not empty and was not begun by this script",
        (data, tmp_path / "new", "--quality", 0): "--quality must lie between 1 and 100",
        (data, tmp_path / "new", "--short", 3): "unrecognized arguments: --short",
        (tmp_path / "nothing", out): "is not a folder",
        (data, "/proc/out"): "cannot be used",
    }.items():
        assert message in prepare(*arguments, status=2).error
    assert json.loads((out / "prepare.json").read_text())["short_side"] == 30


def test_names_stay_apart(tmp_path):
    """Names that are cut off or replaced in a tar's header, or the same in two shards, must not become one."""
    names = ("same.jpg", "x" * 150 + ".jpg", "x" * 150 + "y.jpg", "è1.jpg", "é1.jpg", "deep/train/er/z.jpg")
    for split in ("train", "val"):
        (tmp_path / "source" / split).mkdir(parents=True)
        for number in range(2):
            with tarfile.open(tmp_path / "source" / split / f"{number}.tar", "w") as tar:
                for name in names:
                    add(tar, f"n1/{name}", f"{number} {name}".encode())
    for option in ((), ("--zip",)):
        out = tmp_path / f"out{len(option)}"
        prepare(tmp_path / "source", out, *option)
        assert content(out)[0] == ["n1"]
        before, after = (sorted(data for data, _ in content(root)[1][0]) for root in (tmp_path / "source", out))
        assert before == after
        assert len(set(after)) == 12


def test_odd_names_and_folders_of_files(tmp_path):
    """Names that are no text, or hold a line's end; a map with other classes and a hidden file."""
    for split in ("train", "val"):
        for name in (b"\xff.jpg", b"\xfe.jpg", b"a\nb.jpg"):
            path = Path(os.fsdecode(os.fsencode(tmp_path / "source" / split) + b"/n1\xe9\n/" + name))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(name)
    prepare(tmp_path / "source", tmp_path / "zipped", "--zip")
    assert sorted(content(tmp_path / "zipped")[1][0]) == sorted(content(tmp_path / "source")[1][0])
    (tmp_path / "map").mkdir()
    for split in ("train", "val"):
        with zipfile.ZipFile(tmp_path / "map" / f"{split}.zip", "w") as archive:
            for name in ("a/1.jpg", "b/1.jpg", "a/2.jpg", "a/.3.jpg"):
                archive.writestr(name, name)
        (tmp_path / "map" / f"{split}_map.txt").write_text("a/1.jpg\t0\nb/1.jpg\t0\na/2.jpg\t1\na/.3.jpg\t0")
    for option in ((), ("--zip",)):
        out = tmp_path / f"of_map{len(option)}"
        prepare(tmp_path / "map", out, *option)
        assert sorted(content(out)[1][0]) == [
            (b"a/.3.jpg", 0), (b"a/1.jpg", 0), (b"a/2.jpg", 1), (b"b/1.jpg", 0)
        ]  # fmt: skip


def test_a_class_called_train(tmp_path):
    for split in ("train", "val"):
        for name in ("bus", "train/cam1", "val"):
            path = tmp_path / "source" / split / name / "x.jpg"
            path.parent.mkdir(parents=True)
            path.write_bytes(f"{split} {name}".encode())
    prepare(tmp_path / "source", tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "source")


@pytest.mark.slow
def test_two_commands_do_not_share_a_folder(source, tmp_path):
    prepare(source, tmp_path / "out")
    handle = os.open(tmp_path / "out" / ".lock", os.O_RDWR)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert "another command writes to" in prepare(source, tmp_path / "out", status=2).error
    os.close(handle)
