"""Every file of a data set is used, counted or refused by name; and the kept index is what was written."""

import io
import os
import re
import shutil
import socket
import subprocess
import tarfile
import tempfile
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import TINY_RUN
from PIL import Image

from config import build_config
from data.files import (
    IMAGE_TYPES,
    NO_EXTENT,
    describe_kinds,
    describe_left_out,
    fewer_kinds,
    find_images,
    is_companion,
    is_image,
    type_of,
)
from data.splits import open_images
from predict import find_images as find_for_prediction
from utils.errors import UserError

CLASSES = ("cat", "dog", "ship")


def jpeg(seed: int) -> bytes:
    pixels = np.random.RandomState(seed).randint(0, 256, (4, 4, 3), np.uint8)
    Image.fromarray(pixels).resize((40, 40)).save(file := io.BytesIO(), "JPEG")
    return file.getvalue()


def make_folders(root: Path, train: int = 4, val: int = 2, names=CLASSES) -> Path:
    """``root/SPLIT/CLASS/NN.jpg``, no two images alike."""
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(names):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i:02d}.jpg").write_bytes(jpeg(100 * label + i))
    return root


def opened(root: Path, *opts: str, training: bool = True):
    return open_images(build_config(opts=["DATA.DATA_PATH", str(root), *opts]), training)


def error_of(root: Path, *opts: str, training: bool = True) -> str:
    with pytest.raises(UserError) as caught:
        opened(root, *opts, training=training)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_zip(root: Path, names: list[str], lines: bytes) -> None:
    with zipfile.ZipFile(root / "val.zip", "w") as archive:
        for name in names:
            archive.writestr(name, name)
    (root / "val_map.txt").write_bytes(lines)


def age(root: Path) -> None:
    """As if the data had lain there for a while."""
    for path in [root, *root.rglob("*")]:
        os.utime(path, (1e9, 1e9))


# ---- What is an image, and what is nobody's data


NO_IMAGES = {
    "EPS", "WMF", "MPEG", "FLI", "BUFR", "GRIB", "HDF5", "IPTC", "FITS",
    "BLP", "CUR", "DCX", "FTEX", "GBR", "IM", "PCD", "PIXAR",
}  # fmt: skip


def test_every_type_that_pillow_knows_is_an_image_or_is_left_out_on_purpose():
    """A type that a new Pillow brings shows here."""
    Image.init()
    for ending, kind in Image.registered_extensions().items():
        if kind in Image.OPEN:
            assert (kind in IMAGE_TYPES) != (kind in NO_IMAGES), kind
            assert is_image(f"a{ending.upper()}") == (kind in IMAGE_TYPES), ending
    assert not any(map(is_image, ("a.heic", "a.svg", "a.pdf", "a.ps", "a.jpg~", "jpg", "a.jpg.txt")))


def test_companions_and_types():
    assert all(map(is_companion, ("@eaDir", ".thumbnails", "__MACOSX", "._x.jpg", "Thumbs.db", "DESKTOP.INI", ".x")))
    assert not any(map(is_companion, ("eaDir", "macosx", "x._jpg", "thumbs")))
    assert [type_of(name) for name in ("a.TXT", "b.tar.gz", "a.jpg")] == [".txt", ".gz", ".jpg"]
    assert {type_of(name) for name in ("a", "a.1", "a.\u00fc", "a." + 11 * "x", "a.t\nt", "a.")} == {"without a type"}


def test_the_line_stays_short():
    many = {f".{i}x": 100 - i for i in range(80)}
    assert describe_kinds({".a": 1, ".b": 1200, ".c": 3}) == "1,200 .b, 3 .c, 1 .a"
    assert describe_kinds(many).endswith(f", {sum(range(21, 95)):,} others")
    kept = fewer_kinds(Counter(many))
    assert (len(kept), sum(kept.values())) == (51, sum(many.values()))
    assert describe_left_out({"train": None, "val": SimpleNamespace(left_out={})}) == ""
    train, val = SimpleNamespace(left_out={".txt": 2}), SimpleNamespace(left_out={".heic": 1})
    line = describe_left_out({"train": train, "val": val})
    assert line == "3 files are left out, being no images of a class (train: 2 .txt; val: 1 .heic)"
    train, val = (SimpleNamespace(left_out={NO_EXTENT: count}) for count in (1200, 1))
    assert describe_left_out({"train": train, "val": val}) == (
        "boxes of no width or height are left out (train: 1,200, val: 1)"
    )


# ---- Folders


@pytest.fixture
def littered(tmp_path) -> Path:
    """36 images of odd types in three classes, 7 files that are left out, and what systems put beside them."""
    root = make_folders(tmp_path / "data", 12, 4)
    cat = root / "train" / "cat"
    for i, ending in enumerate((".gif", ".jfif", ".JPE", ".avif", ".Tif")):
        (cat / f"{i:02d}.jpg").rename(cat / f"{i:02d}{ending}")
    for name in ("notes.txt", "more/list.txt", "photo.heic", "README"):
        (cat / name).parent.mkdir(exist_ok=True)
        (cat / name).write_bytes(b"something")
    (root / "train" / "stray.jpg").write_bytes(jpeg(0))
    (root / "train" / "classes.txt").touch()
    (root / "val" / "dog" / "0.npy").touch()
    for folder in ("@eaDir/00.jpg", "__MACOSX", ".thumbnails", "lost+found"):
        for place in (root / "train", cat):
            (place / folder).mkdir(parents=True)
            (place / folder / "SYNOPHOTO_THUMB_M.jpg").write_bytes(jpeg(0))
    for name in ("._05.jpg", "Thumbs.db", "desktop.ini", ".DS_Store", ".hidden.jpg"):
        (cat / name).write_bytes(jpeg(0))
    return root


def test_every_file_of_a_folder_is_used_or_counted(littered):
    train, val, classes = opened(littered)
    assert (len(train), len(val), classes) == (36, 12, list(CLASSES))
    assert train.left_out == {".txt": 3, ".heic": 1, ".jpg outside of the class folders": 1, "without a type": 1}
    assert val.left_out == {".npy": 1}
    assert len(find_for_prediction([littered / "train" / "cat"])[0]) == 12


LEFT_OUT = (
    "7 files are left out, being no images of a class (train: 3 .txt, 1 .heic, 1 .jpg outside of the class folders, "
    "1 without a type; val: 1 .npy)"
)


def test_what_is_not_used_is_said_by_every_run(littered, run_main):
    """Once when it is indexed and again from the kept index, in training and in evaluation."""
    age(littered)
    done = run_main(*TINY_RUN, "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0", "--data-path", littered,
                    "--batch-size", "12")  # fmt: skip
    first, second = done.stdout.splitlines()[:2]
    assert "36 images of 3 classes" in first
    assert second == LEFT_OUT
    assert LEFT_OUT in (done.results / "log.txt").read_text()
    best = done.results / "checkpoints" / "best.pth"
    done = run_main("--eval", "--resume", best, *TINY_RUN, "--data-path", littered)
    assert done.stdout.splitlines()[0] == "1 file is left out, being no images of a class (val: 1 .npy)"


def test_links_are_followed_as_far_as_they_do_not_lead_in_circles(tmp_path):
    root = make_folders(tmp_path / "data")
    shutil.move(root / "train" / "cat", tmp_path / "cats")
    (root / "train" / "cat").symlink_to(tmp_path / "cats")
    (root / "train" / "dog" / "more").symlink_to(root / "train" / "ship")
    (root / "train" / "dog" / "a.jpg").symlink_to(root / "val" / "dog" / "00.jpg")
    train, _, classes = opened(root)
    assert np.bincount(train.labels).tolist() == [4, 9, 4]
    assert classes == list(CLASSES)
    assert train[0][0] == jpeg(0)


@pytest.mark.parametrize("target", ["..", ".", "../..", "/", "{self}", "{outside}"])
def test_a_link_in_a_circle_is_named(tmp_path, target):
    root, outside = make_folders(tmp_path / "data"), tmp_path / "outside"
    outside.mkdir()
    (outside / "back").symlink_to(root / "train" / "cat")
    link = root / "train" / "cat" / "loop"
    link.symlink_to(target.format(self=link, outside=outside))
    named = link / "back" if target == "{outside}" else link
    said = "a link that leads in a circle; mend" if target == "{self}" else "a link to a folder that it lies in; remove"
    assert error_of(root).startswith(f"{named} is {said}")
    with pytest.raises(UserError, match=re.escape(f"{named} is {said}")):
        find_for_prediction([root / "train" / "cat"])


def test_the_command_names_a_link_in_a_circle(tmp_path, run_main):
    root = make_folders(tmp_path / "data")
    (root / "train" / "cat" / "loop").symlink_to("..")
    done = run_main(*TINY_RUN, "--data-path", root, ok=False)
    assert done.status == 2
    assert f"{root}/train/cat/loop is a link to a folder that it lies in; remove it" in done.error


def put_fifo(path: Path) -> None:
    os.mkfifo(path)


def put_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path must be short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def put_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def put_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


ODD = {
    "is a FIFO and not a file; move it": put_fifo,
    "is a socket and not a file; move it": put_socket,
    "is a device and not a file; move it": put_device,
    "is a link that leads nowhere; mend": put_dangling_link,
}


@pytest.mark.parametrize("message", ODD)
@pytest.mark.parametrize(
    "place",
    [
        "val/cat/a.jpg", "val/cat/part", "val/cat/more/a.txt", "val/extra",
        "val/0.tar", "val.tar", "val.zip", "val_map.txt", "ILSVRC2012_img_train.tar", "ILSVRC2012_devkit_t12.tar.gz",
    ],
)  # fmt: skip
def test_what_is_no_file_is_named_and_not_opened(tmp_path, place, message):
    """Whoever opens a FIFO waits for ever, and /dev/zero has no end: the test itself would hang."""
    path = tmp_path / place
    if place.startswith(("val/c", "val/e", "ILSVRC2012_img_train")):
        make_folders(tmp_path)
    if "train" in place:
        shutil.rmtree(tmp_path / "train")
    if "map" in place:
        write_zip(tmp_path, ["a.jpg"], b"")
        path.unlink()
    if place == "val.zip":
        (tmp_path / "val_map.txt").write_text("a.jpg\t0\n")
    if "devkit" in place:
        (tmp_path / "ILSVRC2012_img_val.tar").touch()
    path.parent.mkdir(parents=True, exist_ok=True)
    ODD[message](path)
    assert error_of(tmp_path, training=False).startswith(f"{path} {message}")
    if place == "val/cat/a.jpg":
        for given in (path.parent, path):
            with pytest.raises(UserError, match=message):
                find_for_prediction([given])


def test_a_folder_is_no_archive(tmp_path):
    (tmp_path / "val" / "cat.tar").mkdir(parents=True)
    assert f"class folder {tmp_path}/val/cat.tar holds no image" in error_of(tmp_path, training=False)
    (tmp_path / "val.zip").mkdir()
    (tmp_path / "val_map.txt").write_text("a.jpg\t0\n")
    assert error_of(tmp_path, "DATA.FORMAT", "zip", training=False).startswith(
        f"{tmp_path}/val.zip is a folder and not a file"
    )


def test_a_folder_that_may_not_be_read_is_named():
    """As nobody, since root may read everything; in a folder that nobody may enter."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as temporary:
        os.chmod(temporary, 0o755)
        root = make_folders(Path(temporary) / "data")
        for name in ("dog/more", "dog", ""):
            folder = root / "train" / name
            folder.mkdir(exist_ok=True)
            folder.chmod(0)
            try:
                os.seteuid(user or 65534)
                assert error_of(root) == f"{root / 'train' / name} cannot be read: Permission denied"
            finally:
                os.seteuid(user)
                folder.chmod(0o755)


def test_a_tree_deeper_than_the_stack(tmp_path, monkeypatch):
    """And one so deep that no path to its end can be opened."""

    def deeper(name: str, times: int) -> None:
        for _ in range(times):
            os.mkdir(name)
            os.chdir(name)

    monkeypatch.chdir(tmp_path)
    try:
        deeper("d", 1100)
        Path("a.jpg").touch()
        assert find_images(tmp_path).images == ["d/" * 1100 + "a.jpg"]
        deeper("d" * 200, 20)
        with pytest.raises(UserError, match="cannot be read: File name too long"):
            find_images(tmp_path)
    finally:
        monkeypatch.chdir(tmp_path)
        subprocess.run(["rm", "-rf", "d"], check=True)  # nothing in Python can


def test_a_class_folder_with_other_types_only_says_which(tmp_path):
    root = make_folders(tmp_path / "data")
    (root / "train" / "phone").mkdir()
    for i in range(3):
        (root / "train" / "phone" / f"{i}.HEIC").touch()
    assert f"class folder {root}/train/phone holds no image but 3 .heic" in error_of(root)
    with pytest.raises(UserError, match="is a folder without an image but 3 .heic"):
        find_for_prediction([root / "train" / "phone"])


def test_names_that_are_no_text(tmp_path):
    """Of classes and files; they survive in the index, and from a tar."""
    root = make_folders(tmp_path / "data")
    odd = os.fsdecode(b'caf\xe9 \n$="')
    for split in ("train", "val"):
        os.rename(root / split / "dog", root / split / odd)
        os.rename(root / split / odd / "00.jpg", root / split / odd / os.fsdecode(b"\xff.jpg"))
        with tarfile.open(root / f"{split}.tar", "w") as tar:
            tar.add(root / split, split)
    age(root)
    for layout in ("folder", "tar"):
        for _ in range(2):  # scanned, then kept
            train, val, classes = opened(root, "DATA.FORMAT", layout)
            assert classes == [odd, "cat", "ship"]
            assert [train[i][0] for i in range(4)] == [jpeg(101), jpeg(102), jpeg(103), jpeg(100)]
            assert val[1] == (jpeg(100), 0)
