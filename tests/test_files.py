"""Every file of a data set is used, counted or refused by name; and the kept index is what was written."""

import io
import os
import pickle
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
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from config import build_config
from data.build import open_images
from data.files import (
    IMAGE_TYPES,
    describe_kinds,
    describe_left_out,
    fewer_kinds,
    find_images,
    is_companion,
    is_image,
    type_of,
)
from data.index import open_index
from data.layouts import find_layout
from data.zip import read_map
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


# ---- Archives


def write_tar(path: Path, *members: tuple[str, bytes], **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def labels_of(root: Path) -> dict[str, int]:
    """The class of each image by its content."""
    val = opened(root, training=False)[1]
    return {val[i][0].decode(): val[i][1] for i in range(len(val))}


def test_a_label_belongs_to_the_image_of_its_key(tmp_path):
    """A key ends before the first dot for WebDataset and before the last for others; folders may have dots as well."""
    names = ["photo.000", "photo.001", "photo", "v1.2/a.b", "v1.2/a", "x"]
    members = [(f"{name}.{ending}", content) for i, name in enumerate(names)
               for ending, content in (("cls", b"%d\n" % i), ("jpg", str(i).encode()))]  # fmt: skip
    members += [("left.img.png", b"6"), ("left.CLS", b"6"), ("left.json", b"{}")]
    write_tar(tmp_path / "val" / "0.tar", *members)
    write_tar(tmp_path / "val" / "1.tar", ("x.jpg", b"7"), ("x.cls", b"7"))  # the same name in another shard
    assert labels_of(tmp_path) == {str(i): i for i in range(8)}
    assert opened(tmp_path, training=False)[1].left_out == {".json": 1}


JPG, CLS = b"pixels", b"1"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (["a.jpg", "a.cls", "a.png"], "two images of the one label a.cls, a.jpg and a.png"),
        (["p.0.jpg", "p.1.jpg", "p.cls"], "two images of the one label p.cls, p.0.jpg and p.1.jpg"),
        (["a.jpg", "a.cls", "a.CLS"], "two labels of one image, a.cls and a.CLS"),
        (["a.jpg", "a.cls", "b.cls"], "a label without an image, b.cls"),
        (["a.000.jpg", "a.001.cls"], "a label without an image, a.001.cls"),
        (["a.heic", "a.cls"], "a label without an image, a.cls"),
        (["a.jpg", "a.cls", "b.jpg"], "0.tar:b.jpg has no class"),
        (["a.jpg", "a.cls", "1/b.jpg"], "0.tar:a.jpg has a .cls file beside it, but .*0.tar:1/b.jpg has none"),
        (["cat/a.jpg", "cat/b.jpg", "cat/a.jpg"], r"holds cat/a.jpg twice, at bytes 0 and 2,048"),
        (["cat/a.jpg", "./cat/a.jpg"], "holds cat/a.jpg twice"),
        (["a.jpg", "a.cls", "a.cls"], "holds a.cls twice"),
    ],
)
def test_a_shard_that_is_not_one_image_and_one_label_a_sample(tmp_path, members, message):
    write_tar(tmp_path / "val" / "0.tar", *((name, CLS if name.lower().endswith("cls") else JPG) for name in members))
    assert re.search(message, error_of(tmp_path, training=False))


@pytest.mark.parametrize("content", [b"", b"one", b"1" + b" " * 64 + b"2", b"-1", b"1234567", "\u0663".encode()])
def test_a_label_that_is_no_number(tmp_path, content):
    write_tar(tmp_path / "val" / "0.tar", ("a.jpg", JPG), ("a.cls", content))
    assert "0.tar:a.cls must hold the number of a class" in error_of(tmp_path, training=False)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_joined_with_cat(tmp_path, form):
    """Long names need headers of their own, and a tar without images lies between."""
    parts = [[(f"c{part}/{'n' * 150}{i}.jpg", b"%d%d" % (part, i)) for i in range(3)] for part in range(3)]
    parts[1] = [("readme.txt", b"")]
    whole = b"".join(write_tar(tmp_path / "part", *part, format=form).read_bytes() for part in parts)
    (tmp_path / "val.tar").write_bytes(whole)
    assert labels_of(tmp_path) == {f"{part}{i}": part // 2 for part in (0, 2) for i in range(3)}
    for end, position in {
        b"garbage": len(whole), b"x" * 512: len(whole), bytes(700) + b"x": len(whole) + 512,
        write_tar(tmp_path / "part", ("c/cut.jpg", b"x" * 2000)).read_bytes()[:1500]: len(whole),
    }.items():  # fmt: skip
        (tmp_path / "val.tar").write_bytes(whole + end)
        assert f"val.tar is damaged or cut short at byte {position:,}" in error_of(tmp_path, training=False)
    (tmp_path / "val.tar").write_bytes(whole + bytes(10**6 + 7))
    assert len(labels_of(tmp_path)) == 6
    (tmp_path / "val.tar").write_bytes(whole + whole)
    assert "jpg twice, at bytes" in error_of(tmp_path, training=False)


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        (tarfile.FIFOTYPE, "c/a.jpg", "is a FIFO"),
        (tarfile.CHRTYPE, "c/null", "is a device"),
        (tarfile.SYMTYPE, "d", "is a link; make the tar with --dereference"),
        (tarfile.LNKTYPE, "c/a.cls", "is a link; make the tar with --dereference"),
        (b"Z", "c/a.jpg", "is something unknown"),
        (b"V", "name of the tar", None),
        (tarfile.SYMTYPE, "__MACOSX/c/a.jpg", None),
        (tarfile.REGTYPE, "c/@eaDir/a.jpg", None),
        (tarfile.REGTYPE, ".x/c/a.jpg", None),
    ],
)
def test_members_of_a_tar_that_are_no_files(tmp_path, kind, name, message):
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        info = tarfile.TarInfo("c/image.jpg")
        tar.addfile(info)
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "c/image.jpg"
        tar.addfile(info)
    if message:
        assert f"{tmp_path}/val.tar:{name} {message}" in error_of(tmp_path, training=False)
    else:
        val = opened(tmp_path, training=False)[1]
        assert (len(val), val.left_out) == (1, {})


def test_what_archives_leave_out_is_counted(tmp_path):
    write_tar(tmp_path / "tar" / "val" / "0.tar", ("c/a.jpg", b""), ("c/a.txt", b""), ("README", b""), ("c/.x", b""))
    (tmp_path / "tar" / "val" / "index.json").touch()
    (tmp_path / "tar" / "val" / "1.tar.gz").touch()
    assert opened(tmp_path / "tar", training=False)[1].left_out == {
        ".gz": 1, ".json": 1, ".txt": 1, "without a type": 1
    }  # fmt: skip
    (tmp_path / "zip").mkdir()
    with zipfile.ZipFile(tmp_path / "zip" / "val.zip", "w") as archive:
        for name in ("c/", "c/a.jpg", "c/b.jpg", "c/notes.txt", "__MACOSX/c/._a.jpg", "c/Thumbs.db"):
            archive.writestr(name, b"")
    (tmp_path / "zip" / "val_map.txt").write_text("c/a.jpg\t0\n")
    assert opened(tmp_path / "zip", training=False)[1].left_out == {".jpg outside of val_map.txt": 1, ".txt": 1}


def write_zip(root: Path, names: list[str], lines: bytes) -> None:
    with zipfile.ZipFile(root / "val.zip", "w") as archive:
        for name in names:
            archive.writestr(name, name)
    (root / "val_map.txt").write_bytes(lines)


def test_lines_of_a_map_file(tmp_path):
    """Only what editors call a new line ends one: str.splitlines would cut four of these names in two."""
    names = ["c/a.jpg", "c/b\u2028.jpg", "c/c\x0c.jpg", "c/d\x85.jpg", "c/e\r.jpg", "c/f .jpg", "c/g\t.jpg"]
    for end in ("\n", "\r\n"):
        text = end.join(["", *(f"{name}\t0" for name in names), "", " \t", ""])
        write_zip(tmp_path, names, b"\xef\xbb\xbf" + text.encode())
        assert labels_of(tmp_path) == dict.fromkeys(names, 0)
    (tmp_path / "val_map.txt").write_bytes(b"\n\nc/a.jpg\t0\nc/a.jpg 0\n")
    with pytest.raises(UserError, match=r"val_map.txt, line 4: expected PATH<tab>NUMBER"):
        read_map(tmp_path / "val_map.txt")


@pytest.mark.parametrize(
    ("names", "lines", "message"),
    [
        (["c/a.jpg"], "c/a.jpg\t0\n\n./c/a.jpg\t0\n", "val_map.txt: lines 1 and 3 name the same image c/a.jpg"),
        (["val/a.jpg"], "a.jpg\t0\nval/a.jpg\t1\n", "val_map.txt: lines 1 and 2 name the same image val/a.jpg"),
        (["c/a.jpg", "c/b.jpg", "c/a.jpg"], "c/a.jpg\t0", r"val.zip holds c/a.jpg twice, at bytes 0 and \d+"),
        (["c/a.jpg", "c/"], "c/a.jpg\t0\nc/\t0\n", "val.zip:c/ is a folder and not a file"),
        (["c/a.jpg"], "c/a.jpg\t\u0661", "line 1: expected PATH<tab>NUMBER"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_zip_that_is_not_one_image_a_line(tmp_path, names, lines, message):
    write_zip(tmp_path, names, lines.encode())
    assert re.search(message, error_of(tmp_path, training=False))


def test_a_link_in_a_zip(tmp_path):
    write_zip(tmp_path, ["c/b.jpg"], b"c/a.jpg\t0\n")
    with zipfile.ZipFile(tmp_path / "val.zip", "a") as archive:
        info = zipfile.ZipInfo("c/a.jpg")
        info.create_system, info.external_attr = 3, 0o120777 << 16
        archive.writestr(info, "b.jpg")
    assert "val.zip:c/a.jpg is a link and not a file" in error_of(tmp_path, training=False)


def test_a_member_of_a_zip_that_unfolds_to_more_than_an_image_has(tmp_path, monkeypatch):
    """It is refused at a limit: neither cut at it without a word nor unfolded to its end."""
    monkeypatch.setattr("data.zip.MAX_IMAGE_BYTES", 5000)
    with zipfile.ZipFile(tmp_path / "val.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("c/a.jpg", bytes(5000))
        archive.writestr("c/b.jpg", bytes(5001))
    (tmp_path / "val_map.txt").write_text("c/a.jpg\t0\nc/b.jpg\t0\n")
    images = opened(tmp_path, training=False)[1]
    assert len(images.read(0)) == 5000
    with pytest.raises(ValueError, match="unfolds to more than 5,000 bytes"):
        images.read(1)


# ---- The kept index


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
