"""Boxes of Pascal VOC and YOLO made into COCO's."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import start
from PIL import Image

from config import build_config
from data.build import open_objects
from data.convert import as_coco, read_source
from data.decoding import ORIENTATION
from data.parts import falls_to_val
from utils.errors import UserError

XML = (
    "<annotation><size><width>{w}</width><height>{h}</height></size><object><name>cat</name><difficult>0</difficult>"
    "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>{w}</xmax><ymax>{h}</ymax></bndbox></object><object><name>ant</name>"
    "<difficult>1</difficult><bndbox><xmin>3</xmin><ymin>4</ymin><xmax>10.5</xmax><ymax>9</ymax></bndbox></object>"
    "</annotation>"
)


def picture(path: Path, width: int = 30, height: int = 20) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(path)


def text(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def voc(root: Path) -> Path:
    for name in ("a", "b", "c"):
        picture(root / "JPEGImages" / f"{name}.png")
        text(root / "Annotations" / f"{name}.xml", XML.format(w=30, h=20))
    text(root / "ImageSets/Main/train.txt", "a\nb  1\n")
    text(root / "ImageSets/Main/val.txt", "c\n")
    return root


def beside(root: Path) -> Path:
    for i in range(40):
        picture(root / "sub" / f"{i}.png")
        text(root / "sub" / f"{i}.xml", XML.format(w=30, h=20))
    return root


def yolo(root: Path) -> Path:
    for split in ("train", "val"):
        picture(root / "images" / split / "a.png", 100, 50)
        picture(root / "images" / split / "empty.png")
        text(root / "labels" / split / "a.txt", "1 0.5 0.5 0.2 0.4\n0 0.1 0.2 0.3 0.2 0.2 0.6\n\n")
    text(root / "data.yaml", "names: {0: ant, 1: cat}\n")
    return root


def opened(root: Path):
    opts = ["TASK", "detection", "DATA.DATA_PATH", str(root), "DATA.MASKS", "none"]
    return open_objects(build_config(opts=opts), training=True)


def convert(root: Path, *flags: str):
    return start("scripts/voc_to_coco.py", root, *flags)


def test_voc(tmp_path):
    """Corners are pixels counted from 1; what is difficult does not count."""
    done = convert(voc(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "train.json: 2 images, 4 objects" in done.stdout
    train, val, classes = opened(tmp_path)
    assert (len(train), len(val), classes) == (2, 1, ["ant", "cat"])
    objects = train[0][1]
    assert objects.boxes.tolist() == [[0, 0, 30, 20], [2, 3, 10.5, 9]]
    assert (objects.labels.tolist(), objects.crowd.tolist()) == ([1, 0], [False, True])
    assert train.name(1) == str(tmp_path / "JPEGImages/b.png")
    assert not train.has_masks
    again = convert(tmp_path)
    assert again.returncode == 2
    assert "train.json is there already; remove it" in again.stderr


def in_val(name: str, share: float) -> bool:
    return falls_to_val(share, Path(name).stem.encode())


def test_images_beside_xml_are_shared_out_by_their_names(tmp_path):
    source = read_source(beside(tmp_path), val_share=0.3)
    names = {split: [image.name for image in images] for split, images in source.splits.items()}
    assert sorted(names["train"] + names["val"]) == sorted(f"sub/{i}.png" for i in range(40))
    assert 5 < len(names["val"]) < 20
    assert names["val"] == [name for name in (f"sub/{i}.png" for i in sorted(map(str, range(40)))) if in_val(name, 0.3)]
    assert [i for i in range(40) if in_val(f"{i}.jpg", 0.1)] == [
        i for i in range(40) if in_val(f"elsewhere/{i}.png", 0.1) and in_val(f"{i}.png", 0.3)
    ]
    assert convert(tmp_path, "--val-share", "0.3").returncode == 0
    assert len(opened(tmp_path)[1]) == len(names["val"])


@pytest.mark.parametrize("val", ["val", "valid"])
@pytest.mark.parametrize("names", ["data.yaml", "classes.txt"])
def test_yolo(tmp_path, val, names):
    root = yolo(tmp_path)
    for folder in ("images", "labels"):
        (root / folder / "val").rename(root / folder / val)
    if names == "classes.txt":
        (root / "data.yaml").unlink()
        text(root / "classes.txt", "ant\ncat\n")
    source = read_source(root)
    assert [image.name for image in source.splits["train"]] == ["images/train/a.png", "images/train/empty.png"]
    content = as_coco(source.splits["val"], source.classes)
    assert [one["name"] for one in content["categories"]] == ["ant", "cat"]
    box, outline = content["annotations"]
    assert (box["category_id"], outline["category_id"]) == (2, 1)
    assert np.allclose(box["bbox"], [40, 15, 20, 20])
    assert "segmentation" not in box
    assert np.allclose(outline["segmentation"], [[10, 10, 30, 10, 20, 30]])
    assert np.allclose(outline["bbox"], [10, 10, 20, 20])
    assert np.allclose([box["area"], outline["area"]], [400, 200])


@pytest.mark.parametrize("val", ["val", "valid"])
def test_yolo_with_images_and_labels_in_each_part(tmp_path, val):
    for split, folder in (("train", "train"), ("val", val)):
        for kind in ("images", "labels"):
            (tmp_path / folder).mkdir(exist_ok=True)
            (yolo(tmp_path / "other") / kind / split).rename(tmp_path / folder / kind)
            shutil.rmtree(tmp_path / "other")
    text(tmp_path / "data.yaml", "names: [ant, cat]")
    assert convert(tmp_path).returncode == 0
    train, there, _ = opened(tmp_path)
    assert [train.name(0), there.name(0)] == [str(tmp_path / part / "images/a.png") for part in ("train", val)]


def sideways(path: Path) -> None:
    """A picture of 20 x 30 pixels, which people see as 30 x 20."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.new("RGB", (30, 20)).save(path, exif=exif)


@pytest.mark.parametrize("form", ["png", "jpg", "tiff"])
def test_yolo_of_images_that_exif_turns(tmp_path, form):
    """A TIFF turns itself, whatever DATA.UPRIGHT says."""
    (yolo(tmp_path) / "images/train/a.png").unlink()
    sideways(tmp_path / f"images/train/a.{form}")
    done = convert(tmp_path)
    line = "EXIF turns 1 images, whose labels are of the upright ones: train with --opts DATA.UPRIGHT True"
    assert (line in done.stdout) == (form != "tiff")
    train, *_ = opened(tmp_path)
    assert train.objects(0).size == (30, 20)
    assert np.allclose(train.objects(0).boxes[0], [8, 9, 12, 21])


@pytest.mark.parametrize(("size", "turned"), [((20, 30), 1), ((30, 20), 0)])
def test_voc_of_images_that_exif_turns(tmp_path, size, turned):
    """The xml says which of the two sizes it has seen."""
    sideways(voc(tmp_path) / "JPEGImages/a.png")
    text(tmp_path / "Annotations/a.xml", XML.format(w=size[0], h=size[1]))
    source = read_source(tmp_path)
    assert source.turned == turned
    (image,) = [image for image in source.splits["train"] if image.name == "JPEGImages/a.png"]
    assert (image.width, image.height) == size


def test_yolo_without_parts(tmp_path):
    for i in range(20):
        picture(tmp_path / "images" / f"{i}.png")
        text(tmp_path / "labels" / f"{i}.txt", "0 0.5 0.5 0.2 0.4")
    text(tmp_path / "labels/classes.txt", "ant")
    splits = read_source(tmp_path, val_share=0.4).splits
    assert [len(splits[name]) for name in ("train", "val")] == [20 - len(splits["val"]), len(splits["val"])]
    assert 2 < len(splits["val"]) < 16


MISTAKES = {
    "has no labels that are known": (voc, lambda r: shutil.rmtree(r / "Annotations")),
    "cannot be read as xml": (voc, lambda r: text(r / "Annotations/a.xml", "<annotation>")),
    "a.xml is of an image of 9 x 30, JPEGImages/a.png is 20 x 30": (
        voc, lambda r: text(r / "Annotations/a.xml", XML.format(w=30, h=9))),
    "has 'x' for bndbox/xmin, which is no number": (
        voc, lambda r: text(r / "Annotations/a.xml", XML.replace("<xmin>3", "<xmin>x").format(w=30, h=20))),
    "object 'ant' has no extent within the image of 30 x 20": (
        voc, lambda r: text(r / "Annotations/a.xml", XML.replace("<xmin>3", "<xmin>50").format(w=30, h=20))),
    "has an object without a name": (
        voc, lambda r: text(r / "Annotations/a.xml", XML.replace("cat", "").format(w=30, h=20))),
    "train.txt lists 'z', of which there is no image with xml": (
        voc, lambda r: text(r / "ImageSets/Main/train.txt", "z")),
    "val.txt cannot be read": (voc, lambda r: (r / "ImageSets/Main/val.txt").unlink()),
    "no JPEGImages": (voc, lambda r: (r / "JPEGImages").rename(r / "other")),
    "image": (voc, lambda r: (r / "JPEGImages/a.png").write_bytes(b"no image")),
    "a.txt, line 1: '0 1 2' is not a class with x, y": (yolo, lambda r: text(r / "labels/train/a.txt", "0 1 2")),
    "line 2: class 2 is not one of 0 to 1": (yolo, lambda r: text(r / "labels/train/a.txt", "\n2 0.1 0.1 0.1 0.1")),
    "'1 50 50 20 20' is not in shares of the image": (yolo, lambda r: text(r / "labels/train/a.txt", "1 50 50 20 20")),
    "has no extent within": (yolo, lambda r: text(r / "labels/train/a.txt", "1 0.5 0.5 0 0.1")),
    "has neither data.yaml nor classes.txt": (yolo, lambda r: (r / "data.yaml").unlink()),
    "data.yaml has no list of names": (yolo, lambda r: text(r / "data.yaml", "names: 3")),
    "data.yaml is not YAML": (yolo, lambda r: text(r / "data.yaml", "names: [")),
    "data.yaml has a class twice": (yolo, lambda r: text(r / "data.yaml", "names: [a, a]")),
    "has no images with labels for val; add images/val and labels/val": (
        yolo, lambda r: (r / "images/val").rename(r / "images/other")),
    "has no objects for val": (yolo, lambda r: (r / "labels/val/a.txt").unlink()),
}  # fmt: skip


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_one_line(tmp_path, message):
    make, spoil = MISTAKES[message]
    spoil(make(tmp_path))
    with pytest.raises(UserError) as raised:
        read_source(tmp_path)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_share_where_there_are_parts_already(tmp_path):
    for make in (voc, yolo):
        with pytest.raises(UserError, match="--val-share is for data without parts"):
            read_source(make(tmp_path / make.__name__), val_share=0.5)
    done = convert(tmp_path / "voc", "--val-share", "1.5")
    assert (done.returncode, "must lie between 0 and 1" in done.stderr) == (2, True)


def test_what_is_left_out_is_told(tmp_path):
    picture(voc(tmp_path) / "JPEGImages/extra.png")
    text(tmp_path / "Annotations/gone.xml", XML.format(w=30, h=20))
    done = convert(tmp_path)
    assert "left out: 1 images without xml, 1 xml without image" in done.stdout
    assert [len(json.loads((tmp_path / f"annotations/{s}.json").read_text())["images"]) for s in ("train", "val")] == [
        2,
        1,
    ]
