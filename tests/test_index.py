"""The index of a data set: kept, checked, made again when the data changes, and small for 14 million images."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from make_layouts import as_tar, as_zip, images_of
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_files import jpeg, make_folders, opened
from test_layouts import config_of

import data.index
from data import fingerprint
from data.index import open_index
from data.layouts import find_layout
from data.splits import open_images
from utils.errors import UserError


def test_the_index_is_kept_and_made_again_when_the_data_changes(source, tmp_path, monkeypatch):
    root = tmp_path / "data"
    shutil.copytree(source, root)
    scans = []
    build = data.index._build
    monkeypatch.setattr(data.index, "_build", lambda *arguments: scans.append(1) or build(*arguments))
    age(root)
    config = config_of(root)
    for _ in range(3):
        assert len(open_images(config, True)[0]) == 60
    assert len(scans) == 2  # train and val
    first = images_of(root / "train")[0]
    shutil.copy(first, first.with_name("another.JPEG"))
    assert len(open_images(config, True)[0]) == 61
    first.with_name("another.JPEG").unlink()
    age(root)
    assert len(open_images(config, True)[0]) == 60
    (root / ".index-train-folder.safetensors").write_bytes(b"damaged")
    assert len(open_images(config, True)[0]) == 60
    kept = len(scans)
    shutil.move(root, tmp_path / "moved")
    assert len(open_images(config_of(tmp_path / "moved"), True)[0]) == 60
    assert len(scans) == kept, "the index moves along with the data"


def test_a_date_in_the_future_and_a_map_that_appears(source, tmp_path):
    """Neither is to make every run index again, nor to leave an index that no longer fits."""
    as_zip(source, tmp_path / "data")
    age(tmp_path / "data")
    train_map, train_zip = tmp_path / "data" / "train_map.txt", tmp_path / "data" / "train.zip"
    os.utime(tmp_path / "data" / "val.zip", (4e9, 4e9))
    content = train_map.read_bytes()
    train_zip.unlink()
    train_map.unlink()
    assert open_images(config_of(tmp_path / "data"), training=False)[2] == list("01234")
    train_map.write_bytes(content)
    age(tmp_path / "data")
    os.utime(tmp_path / "data" / "val.zip", (4e9, 4e9))
    kept = tmp_path / "data" / ".index-val-zip.safetensors"
    made = set()
    for _ in range(3):
        names = open_images(config_of(tmp_path / "data"), training=False)[2]
        assert names == sorted(path.name for path in (source / "train").iterdir())
        made.add(kept.stat().st_ino)
    assert len(made) == 1


def test_ranks_with_other_data_are_told_apart(layouts, monkeypatch):
    import engine.train as train

    index = open_images(config_of(layouts["folder"]), True)[0]
    assert fingerprint(index) == fingerprint(open_images(config_of(layouts["zip"]), True)[0])
    train.check_same_data(index)
    other = open_images(config_of(layouts["folder"]), True)[1]
    monkeypatch.setattr(train, "from_main", lambda value: fingerprint(other))
    with pytest.raises(UserError, match=r"rank 0 has other data than rank 0: 60 images .* there, 23 images"):
        train.check_same_data(index)


def test_an_archive_that_was_replaced_is_indexed_again(source, tmp_path):
    as_tar(source, tmp_path / "data")
    age(tmp_path / "data")
    assert len(open_images(config_of(tmp_path / "data"), True)[0]) == 60
    with tarfile.open(tmp_path / "data" / "train.tar", "w") as tar:
        tar.add(source / "val", arcname="train")
    assert len(open_images(config_of(tmp_path / "data"), True)[0]) == 23


def age(root: Path) -> None:
    """As if the data had lain there for a while."""
    for path in [root, *root.rglob("*")]:
        os.utime(path, (1e9, 1e9))


def test_data_that_cannot_be_written_to_is_indexed_in_the_cache_folder(source, tmp_path, monkeypatch):
    root = tmp_path / "data"
    shutil.copytree(source, root)
    age(root)
    save = data.index.save_file

    def read_only(arrays, path, metadata):
        if path.parent == root:
            raise OSError(30, "Read-only file system")
        save(arrays, path, metadata)

    monkeypatch.setattr(data.index, "save_file", read_only)
    for opts, cache in ((["DATA.CACHE_DIR", tmp_path / "mine"], tmp_path / "mine"), ([], tmp_path / "xdg")):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        for _ in range(2):
            train = open_images(config_of(root, *opts), True)[0]
        assert train.file.parent == cache / "crossformer-trainer"
        assert len(list(train.file.parent.iterdir())) == 2
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"the index cannot be kept .*Read-only.*DATA.CACHE_DIR"):
        open_images(config_of(root, "DATA.CACHE_DIR", tmp_path / "file"), True)


SCALE = """
import json, os, sys, time
import numpy as np
from data.folder import FileIndex
from data.index import Scan, _save, load_index
from data.tar import TarIndex
from pathlib import Path
from types import SimpleNamespace

def memory(kind):
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.split(":")[0] in kind)

root, index_class, n = Path(sys.argv[1]), {"files": FileIndex, "tar": TarIndex}[sys.argv[2]], int(sys.argv[3])
rng = np.random.default_rng(0)
if not (root / "index").exists():
    arrays = {"labels": np.sort(rng.integers(0, 21841, n, dtype=np.int32))}
    arrays |= {
        "names": rng.integers(33, 127, 20 * n, dtype=np.uint8),  # n01440764_10026.JPEG
        "ends": np.arange(1, n + 1) * 20,
    } if index_class is FileIndex else {
        "archive": rng.integers(0, 5000, n, dtype=np.int32),
        "offset": rng.integers(0, 2**40, n, dtype=np.int64),
        "length": rng.integers(0, 2**18, n, dtype=np.int32),
    }
    scan = Scan([f"n{i:08d}" for i in range(21841)], arrays, [f"{i}.tar" for i in range(5000)], [], {})
    _save(SimpleNamespace(index_class=index_class, root=root), scan, 0.0, root / "index")
    with open(root / "index", "rb") as file:
        os.fsync(file.fileno())
    sys.exit()
before, start, cpu = memory(("Rss",)), time.perf_counter(), time.process_time()
index = load_index(index_class, root, root / "index")[0]
seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
size = sum(array.nbytes for array in index.arrays.values())
private = ("Private_Clean", "Private_Dirty")
def walk():
    total = 0
    for i in range(0, n, 40):  # every page of every array
        total += sum(int(array[i * len(array) // n]) for array in index.arrays.values())
    return total
walk()
resident = memory(("Rss",)) - before
pipes = []
for worker in range(8):
    receive, send = os.pipe()
    go_in, go_out = os.pipe()
    if os.fork() == 0:
        before = memory(private)
        walk()
        os.write(send, str(memory(private) - before).encode())
        os._exit(0)
    pipes.append(receive)
grown = sum(max(0, int(os.read(pipe, 100))) for pipe in pipes)
print(json.dumps({"images": len(index), "seconds": seconds, "cpu_seconds": cpu_seconds, "bytes": size,
                  "resident": resident, "workers": grown}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
@pytest.mark.parametrize("images", [1_420_000, 14_200_000])
@pytest.mark.parametrize("kind", ["files", "tar"])
def test_fourteen_million_images(tmp_path, kind, images):
    """Fault 13: one mapped copy of at most 600 MB for a host, verified in no time, and none in a loader worker.

    A tenth of the images may take a tenth of that.
    """
    for _ in range(2):  # the first writes it
        done = subprocess.run(
            [sys.executable, "-c", SCALE, str(tmp_path), kind, str(images)],
            cwd=ROOT, check=True, capture_output=True, text=True,
        )  # fmt: skip
    figures = json.loads(done.stdout)
    print(kind, figures)
    assert figures["images"] == images
    assert figures["bytes"] <= images * 600 / 14.2
    assert figures["resident"] <= images * 600 / 14.2 + 10e6  # for the names of the classes
    assert figures["cpu_seconds"] < 5
    assert figures["workers"] < 0.1 * figures["bytes"] + 10e6  # for all of Python that a worker touches


@pytest.fixture
def kept(tmp_path) -> Path:
    """An index that is kept, of 12 images."""
    root = make_folders(tmp_path / "data")
    (root / "train" / "cat" / "notes.txt").touch()
    age(root)
    opened(root)
    return root / ".index-train-folder.safetensors"


def facts(index) -> tuple:
    arrays = {key: array.tolist() for key, array in index.arrays.items()}
    return index.classes, arrays, index.archives, index.left_out


def reopened(file: Path):
    return open_index(find_layout(file.parent, "train", "folder"), "")


def test_every_flipped_bit_of_a_kept_index_is_noticed_and_mended(kept, capfd):
    """And every length: each time the index is what it was, and one line says that it was made anew."""
    whole, expected = kept.read_bytes(), facts(reopened(kept))
    assert capfd.readouterr().err == ""
    changes = [whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :] for i in range(0, len(whole), 7)]
    changes += [whole[:i] for i in range(0, len(whole), 97)] + [whole + b"x", b"\xff" * 8 + whole[8:]]
    for changed in changes:
        kept.write_bytes(changed)
        assert facts(reopened(kept)) == expected
        said = capfd.readouterr().err
        assert re.fullmatch(
            rf"the index {kept} is (damaged \(.*\)|of another version); the data is indexed anew\n", said
        )
        reopened(kept)
        assert capfd.readouterr().err == "", "it was mended"


def test_shifted_labels_are_not_trained_on(kept, capfd):
    """Labels that a tool has written anew, with all that safetensors itself looks at in order."""
    arrays = load_file(kept)
    with safe_open(kept, "np") as content:
        metadata = content.metadata()
    arrays["labels"] = np.roll(arrays["labels"], 1)
    save_file(arrays, kept, metadata=metadata)
    assert reopened(kept).labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert capfd.readouterr().err == f"the index {kept} is damaged (its checksum is wrong); the data is indexed anew\n"


def test_an_index_that_is_no_file_is_not_opened(kept):
    expected = facts(reopened(kept))
    kept.unlink()
    os.mkfifo(kept)
    assert facts(reopened(kept)) == expected


def test_a_worker_does_not_take_another_index_than_its_run(kept):
    index = reopened(kept)
    sent = pickle.dumps(index)
    assert facts(pickle.loads(sent)) == facts(index)
    (kept.parent / "train" / "cat" / "99.jpg").write_bytes(jpeg(9))
    assert len(reopened(kept)) == 13
    with pytest.raises(UserError, match="was changed during the run; start again"):
        pickle.loads(sent)
