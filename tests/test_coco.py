"""Data sets in COCO's format: what the index holds, and one line for whatever is wrong in a file."""

import copy
import json
import os
import pickle
import random
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_coco import CLASSES, annotations_of, draw_objects
from pycocotools.coco import COCO

from config import build_config
from data.build import fingerprint, open_objects
from data.coco import ANNOTATIONS, FOLDERS, find_coco_layout
from data.coco_json import AnnotationFile, read_run_lengths
from data.index import open_index
from utils.errors import UserError


def config_of(root: Path, *opts: str):
    return build_config(opts=["TASK", "detection", "DATA.DATA_PATH", str(root), *opts])


def opened(root: Path, *opts: str):
    return open_objects(config_of(root, *opts), training=True)


def test_the_index_holds_what_the_file_says(coco):
    train, val, classes = opened(coco, "DATA.EMPTY_IMAGES", "True")
    assert (len(train), len(val), classes, train.left_out) == (13, 7, CLASSES, {})
    assert (train.category_ids.tolist(), train.image_ids.tolist()) == ([3, 7], [100 + 3 * i for i in range(13)])
    assert train.annotation_file == coco / "annotations/train.json"
    assert train.has_masks
    assert train.labels.tolist() == [0] * 13
    for i in range(13):
        data, objects = train[i]
        image, drawn = draw_objects(i)
        assert data == (coco / f"images/train/{i:04d}.png").read_bytes()
        assert train.name(i) == str(coco / f"images/train/{i:04d}.png")
        assert (objects.size, tuple(train.sizes[i]), objects.image_id) == (
            image.shape[:2],
            image.shape[:2],
            100 + 3 * i,
        )
        assert [[x, y, x + w, y + h] for x, y, w, h in (one["bbox"] for one in drawn)] == objects.boxes.tolist()
        assert [{3: 0, 7: 1}[one["category_id"]] for one in drawn] == objects.labels.tolist()
        assert [i == len(drawn) - 1 and i > 1 for i in range(len(drawn))] == objects.crowd.tolist()
        masks = objects.masks(range(len(drawn)))
        assert all(np.array_equal(one["mask"], mask) for one, mask in zip(drawn, masks, strict=True))
        assert train.counts[i] == (~objects.crowd).sum()


def test_the_order_of_a_file_does_not_matter(coco, tmp_path):
    shutil.copytree(coco, tmp_path / "data", ignore=shutil.ignore_patterns(".index*"))
    path = tmp_path / "data/annotations/train.json"
    content = json.loads(path.read_text())
    content["images"].reverse()
    content["categories"].reverse()
    content["annotations"].sort(key=lambda one: one["id"] % 2)
    path.write_text(json.dumps(content))
    for i in range(11):
        there, here = (opened(root)[0].objects(i) for root in (coco, tmp_path / "data"))
        assert there.image_id == here.image_id
        assert sorted(there.boxes.tolist()) == sorted(here.boxes.tolist())


def test_masks_are_those_of_pycocotools(coco):
    """Polygons with corners between the pixels too."""
    _, val, _ = opened(coco)
    theirs = COCO(str(val.annotation_file))
    for i in range(len(val)):
        objects = val.objects(i)
        entries = theirs.loadAnns(theirs.getAnnIds([objects.image_id]))
        for entry, mask in zip(entries, objects.masks(range(len(entries))), strict=True):
            assert np.array_equal(theirs.annToMask(entry), mask)


def test_images_without_objects_are_left_out_of_training_unless_asked_for(coco):
    train, val, _ = opened(coco)
    assert (len(train), len(val)) == (11, 7)
    assert train.image_ids.tolist() == [100 + 3 * i for i in range(13) if i % 5 != 4]
    assert train.counts.min() == 1
    assert len(train.sizes) == 11
    again = pickle.loads(pickle.dumps(train))  # as a spawned worker gets it
    assert again.name(4) == train.name(4) == str(coco / "images/train/0005.png")
    assert np.array_equal(again.objects(4).boxes, train.objects(4).boxes)
    assert fingerprint(again) == fingerprint(train)


def test_the_arrays_are_views_of_the_mapped_file(coco):
    """A worker must not copy what a million objects are made of."""
    train, _, _ = opened(coco)
    objects = train.objects(0)
    for name, part in (("boxes", objects.boxes), ("crowd", objects.crowd), ("segments", objects.segments)):
        assert np.shares_memory(part, train.arrays[name])


@pytest.mark.parametrize("annotations", ANNOTATIONS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_layouts(coco, tmp_path, annotations, folder):
    for split in ("train", "val"):
        images, file = tmp_path / folder.format(split=split), tmp_path / annotations.format(split=split)
        shutil.copytree(coco / "images" / split, images, dirs_exist_ok=True)
        file.parent.mkdir(exist_ok=True)
        shutil.copy(coco / f"annotations/{split}.json", file)
    assert [len(index) for index in opened(tmp_path)[:2]] == [11, 7]


@pytest.mark.parametrize("val", ["val", "valid"])
def test_annotations_beside_the_images_of_a_split(coco, tmp_path, val):
    for split, folder in (("train", "train"), ("val", val)):
        shutil.copytree(coco / "images" / split, tmp_path / folder)
        shutil.copy(coco / f"annotations/{split}.json", tmp_path / folder / "_annotations.coco.json")
    train, there, _ = opened(tmp_path)
    assert (len(train), there.name(0)) == (11, str(tmp_path / val / "1000.png"))
    (tmp_path / val / "1001.png").unlink()
    with pytest.raises(UserError, match=f"image '1001.png' cannot be found in {tmp_path / val}; copy it there"):
        opened(tmp_path)


def test_a_file_that_has_changed_is_read_again(coco, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(coco, root, ignore=shutil.ignore_patterns(".index*"))
    opened(root)
    path = root / "annotations/train.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"][2] = 3
    path.write_text(json.dumps(content))
    os.utime(path, (time.time() - 600,) * 2)
    assert opened(root)[0].objects(0).boxes[0, 2] == content["annotations"][0]["bbox"][0] + 3


# ---- mistakes


def image(content: dict, **changes: Any) -> None:
    content["images"][1] |= changes


def object_(content: dict, **changes: Any) -> None:
    content["annotations"][1] |= changes


def category(content: dict, **changes: Any) -> None:
    content["categories"][1] |= changes


def polygon(*numbers: Any) -> Any:
    return lambda content: object_(content, segmentation=[[*numbers]])


def run_lengths(**changes: Any) -> Any:
    def change(content: dict) -> None:
        size = next([x["height"], x["width"]] for x in content["images"] if x["id"] == 100)
        object_(content, segmentation={"size": size, "counts": [size[0] * size[1]]} | changes)

    return change


MISTAKES = {
    "category id 7 stands twice; give each": lambda c: category(c, id=7),
    "category 'ellipse' stands twice; keep one": lambda c: category(c, name="ellipse"),
    "category 3 has the name None; give it a name": lambda c: category(c, name=None),
    "category 'rectangle' has id '3'; it must be a whole number": lambda c: category(c, id="3"),
    "image id 100 stands twice; give each": lambda c: image(c, id=100),
    "image '0001.png' has id 1.5; it must be a whole": lambda c: image(c, id=1.5),
    "has no height; it must be": lambda c: c["images"][1].pop("height"),
    "is said to be 0 wide and 36 high": lambda c: image(c, width=0, height=36),
    "image 'gone.png' cannot be found in": lambda c: image(c, file_name="gone.png"),
    "the file_name '../0001.png' of image 103 leaves the folder": lambda c: image(c, file_name="../0001.png"),
    "the file_name '/etc/passwd' of image 103 leaves": lambda c: image(c, file_name="/etc/passwd"),
    "image 103 has the file_name 'a\\x00b'": lambda c: image(c, file_name="a\0b"),
    "image 103 has the file_name '\\ud800'": lambda c: image(c, file_name="\ud800"),
    "image 103 has the file_name None": lambda c: image(c, file_name=None),
    "an annotation of image 100 has no id": lambda c: c["annotations"][1].pop("id"),
    "annotation id 1 stands twice": lambda c: object_(c, id=1),
    "annotation 2 is of image 5, which is not in the file; add": lambda c: object_(c, image_id=5),
    "annotation 2 has image_id [1]; it must be": lambda c: object_(c, image_id=[1]),
    "annotation 2 is of the unknown category 9; add it": lambda c: object_(c, category_id=9),
    "annotation 2 of image 100 has the bbox [1, 2, 3]; it must be four": lambda c: object_(c, bbox=[1, 2, 3]),
    "has the bbox [1, 2, nan, 4]; it must be four": lambda c: object_(c, bbox=[1, 2, float("nan"), 4]),
    "has the bbox [1, 2, '3', 4]; it must be four": lambda c: object_(c, bbox=[1, 2, "3", 4]),
    "has the bbox None": lambda c: object_(c, bbox=None),
    "has the bbox [5, 5, -3, 4] with a negative size": lambda c: object_(c, bbox=[5, 5, -3, 4]),
    "has the bbox [500, 5, 3, 4], wholly outside of the image": lambda c: object_(c, bbox=[500, 5, 3, 4]),
    "has iscrowd 2; it must be 0 or 1": lambda c: object_(c, iscrowd=2),
    "has the area 'large'; it must be": lambda c: object_(c, area="large"),
    "the segmentation of annotation 2 of image 100 has a polygon of 7 numbers": polygon(1, 2, 3, 4, 5, 6, 7),
    "has a polygon of 4 numbers": polygon(1, 2, 3, 4),
    "has a polygon with what is no number, or far outside": polygon(1, 2, 3, 4, 5, 1e9),
    "has a polygon with what is no number": polygon(1, 2, 3, 4, 5, "6"),
    "a polygon with what is no number": polygon(1, 2, 3, 4, 5, [6]),
    "polygon with what is no number": polygon(1, 2, 3, 4, 5, float("nan")),
    "with what is no number": polygon(1, 2, 3, 4, 5, -(2**63)),
    "what is no number": polygon(1, 2, 3, 4, 5, 2**80),
    "the segmentation of annotation 2 of image 100 is 3, neither polygons": lambda c: object_(c, segmentation=3),
    "is of size [1, 2], the image [": run_lengths(size=[1, 2]),
    "has run lengths of another number of pixels than": run_lengths(counts=[5, 5]),
    "has the counts [-5, 5], which are no run lengths": run_lengths(counts=[-5, 5]),
    "has damaged run lengths": run_lengths(counts="oooooooo"),
    "it has no annotations at all": lambda c: c["annotations"].clear(),
    "it has no images at all": lambda c: c["images"].clear(),
    "all of its boxes are of no width": lambda c: [one.update(bbox=[1, 1, 0, 4]) for one in c["annotations"]],
    "images is not a list": lambda c: c.update(images={}),
    "annotations has 3, which is not a dict": lambda c: c["annotations"].append(3),
    "lacks categories; export it as COCO": lambda c: c.pop("categories"),
}


@pytest.fixture
def data(coco, tmp_path) -> Path:
    """A copy to spoil."""
    shutil.copytree(coco, tmp_path / "data", ignore=shutil.ignore_patterns(".index*"))
    return tmp_path / "data"


def error_of(root: Path) -> str:
    with pytest.raises(UserError) as raised:
        opened(root)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_one_line_with_the_remedy(data, message):
    path = data / "annotations/train.json"
    content = json.loads(path.read_text())
    MISTAKES[message](content)
    path.write_text(json.dumps(content))
    error = error_of(data)
    assert error.startswith(f"{path}: ")
    assert message in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [{"id": 1', "it is not whole json"),
        ("", "it is not whole json"),
        ("\x80\x81", "it is not whole json"),
        ("[" * 100_000, "it is not whole json"),
        ("[]", "it is not in COCO's format: it is a list"),
        ("3", "it is not in COCO's format: it is a int"),
        ('{"images": [' + "9" * 5000 + "]}", "it is not whole json"),
    ],
)
def test_a_file_that_is_no_coco_json(data, text, message):
    (data / "annotations/train.json").write_text(text, encoding="latin-1")
    assert message in error_of(data)


def test_what_is_missing_or_does_not_fit(data):
    path = data / "annotations/val.json"
    content = json.loads(path.read_text())
    (data / "renamed.json").write_text(path.read_text())
    content["categories"][0] = {"id": 7, "name": "circle"}
    path.write_text(json.dumps(content))
    assert f"{path} has other categories than {data}/annotations/train.json (only one has 'circle')" in error_of(data)
    path.unlink()
    assert "has no annotations of val; expected annotations/instances_val2017.json" in error_of(data)
    shutil.rmtree(data / "images")
    shutil.copy(data / "renamed.json", path)
    assert "image '0000.png' and 12 others cannot be found in" in error_of(data)


def test_boxes_without_extent_are_left_out_and_counted_and_others_clipped(data):
    path = data / "annotations/train.json"
    content = json.loads(path.read_text())
    image = content["images"][5]
    first, second, third, *_ = (one for one in content["annotations"] if one["image_id"] == image["id"])
    first["bbox"] = [5, 5, 0, 9]
    second["bbox"] = [image["width"], 5, 0, 9]
    third["bbox"] = [-4.5, 5, image["width"] + 30, 9]
    path.write_text(json.dumps(content))
    train = opened(data)[0]
    assert train.left_out == {"boxes of no width or height": 2}
    assert train.objects(5 - 1).boxes[0].tolist() == [0, 5, image["width"], 14]


def test_boxes_without_masks(data):
    """All of them: the index says so. Some of them: an error, unless no masks are wanted."""
    path = data / "annotations/train.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["segmentation"] = []
    path.write_text(json.dumps(content))
    assert "has 1 objects without a segmentation among" in error_of(data)
    for opts in (("DATA.MASKS", "none"), ("MODEL.HEAD", "retinanet")):
        train = opened(data, *opts)[0]
        assert (train.has_masks, train.without_mask) == (False, 1)
    for one in content["annotations"]:
        del one["segmentation"]
    path.write_text(json.dumps(content))
    assert not opened(data)[0].has_masks


@pytest.mark.parametrize("split", ["train", "val"])
def test_only_crowds(data, split):
    path = data / f"annotations/{split}.json"
    content = json.loads(path.read_text())
    for one in content["annotations"]:
        one["iscrowd"] = 1
    path.write_text(json.dumps(content))
    assert f"{split}.json has no objects but crowds; label some" in error_of(data)


@pytest.mark.parametrize("counts", [b"", b"o", b"\xff", b"ooooooooooo0", b"/0"])
def test_damaged_run_lengths_never_reach_pycocotools(counts):
    with pytest.raises(ValueError, match="damaged run lengths"):
        read_run_lengths(counts)


# ---- fuzzing


VALUES = [None, True, -1, 0, 1, 2**70, 1e400, -1e300, float("nan"), "", "x" * 500, "\ud800", "a\nb", [], {}, [[]],
          [1, 2], [[1, 2, 3, 4, 5, 6]], {"size": [1, 1], "counts": "1"}, {"size": None}, [None] * 4]  # fmt: skip


def places(node: Any) -> list[tuple[Any, Any]]:
    """Every place of a tree of lists and dicts, as what it is in and its key there."""
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []
    return [(node, key) for key in keys] + [place for key in keys for place in places(node[key])]


@pytest.mark.slow
def test_mutated_files_load_or_end_in_one_line(data):
    draw, (good, _) = random.Random(0), annotations_of(range(5))
    path, loaded, messages = data / "annotations/train.json", 0, set()
    for _ in range(500):
        content = copy.deepcopy(good)
        for _ in range(draw.choice([1, 1, 1, 3])):
            kinds: dict[str, list] = {}
            for place in places(content):
                kinds.setdefault(str(place[1]) if isinstance(place[0], dict) else "of a list", []).append(place)
            node, key = draw.choice(draw.choice([*kinds.values()]))
            if draw.random() < 0.2:
                del node[key]
            else:
                node[key] = draw.choice(VALUES)
        text = json.dumps(content)
        path.write_text(text[: draw.randrange(len(text))] if draw.random() < 0.05 else text)
        try:
            file = AnnotationFile(path)
            index = open_index(find_coco_layout(data, "train"), "")
            loaded += 1
        except UserError as error:
            messages.add(str(error))
            continue
        assert file.categories()
        for i in range(len(index)):
            objects = index.objects(i)
            assert objects.masks(np.flatnonzero(np.diff(objects.segment_ends))).max(initial=0) <= 1
            assert (objects.boxes[:, 2:] > objects.boxes[:, :2]).all()
    assert loaded > 20
    assert len(messages) > 50
    assert all(message.startswith(f"{path}: ") and "\n" not in message for message in messages)
