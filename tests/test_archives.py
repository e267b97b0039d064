"""Archives: a sample is one image and one label; what else is in them is named, never chosen silently."""

import io
import re
import tarfile
import zipfile
from pathlib import Path

import pytest
from test_files import error_of, opened, write_zip

from data.zip import read_map
from utils.errors import UserError


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
