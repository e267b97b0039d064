"""Data sets of images with label maps: their layouts, and what training makes of a pair."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import start
from make_pairs import draw_pair
from PIL import Image

from config import build_config
from data.augmentation.pairs import VOID, PairTransform, brought_within, build_pair_transform
from data.build import open_pairs
from data.decoding import Decoding, build_decoding
from data.pairs import CITYSCAPES, VOC, decode_labels
from tasks.segmentation import DecodePair, label_table
from utils.randomness import seed_cpu


def write(root: Path, image: str, labels: str, number: int, change=lambda labels: labels) -> None:
    pixels, numbers = draw_pair(number)
    for path, array in ((root / image, pixels), (root / labels, change(numbers))):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)


def ade20k(root: Path) -> list[str]:
    for folder, name in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        paths = f"images/{folder}/{name}.jpg", f"annotations/{folder}/{name}.png"
        write(root, *paths, 0, lambda labels: np.where(labels == 255, 0, labels + 1).astype(np.uint8))
    rows = ["Idx\tRatio\tTrain\tVal\tName", "1\t0.1\t1\t1\twall", "2\t0.1\t1\t1\tbuilding, edifice", "3\t0\t1\t1\tsky"]
    (root / "objectInfo150.txt").write_text("\n".join(rows))
    return ["wall", "building", "sky"]


def cityscapes(root: Path) -> list[str]:
    ids = np.full(256, 3, np.uint8)
    ids[:3] = list(CITYSCAPES)[:3]
    for split in ("train", "val"):
        stem = f"{split}/aachen/aachen_000000_000019"
        write(root, f"leftImg8bit/{stem}_leftImg8bit.png", f"gtFine/{stem}_gtFine_labelIds.png", 0, lambda x: ids[x])
        write(root, f"leftImg8bit/{stem}_leftImg8bit.png", f"gtFine/{stem}_gtFine_instanceIds.png", 1)
        write(root, f"leftImg8bit/{stem}_leftImg8bit.png", f"gtFine/{stem}_gtFine_labelIds.png", 0, lambda x: ids[x])
    return [*CITYSCAPES.values()]


def voc(root: Path) -> list[str]:
    base = root / "VOCdevkit" / "VOC2012"
    (base / "ImageSets" / "Segmentation").mkdir(parents=True)
    for number, split in enumerate(("train", "val", "other")):
        write(base, f"JPEGImages/2007_{number}.jpg", f"SegmentationClass/2007_{number}.png", 0)
        if split != "other":
            (base / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(f"2007_{number}\n")
        path = base / f"SegmentationClass/2007_{number}.png"
        picture = Image.open(path).convert("L")
        coloured = Image.fromarray(np.array(picture), mode="P")
        coloured.putpalette([i * 7 % 256 for i in range(768)])
        coloured.save(path)
    return VOC


def beside(root: Path) -> list[str]:
    """The images not in images/."""
    for split in ("train", "val"):
        write(root, f"{split}/sub/a.png", f"masks/{split}/sub/a.png", 0)
    (root / "classes.txt").write_text("background\ndisc\nsquare\n")
    return ["background", "disc", "square"]


def config_of(root: Path, *opts: str):
    return build_config(opts=["TASK", "segmentation", "DATA.DATA_PATH", str(root), *opts])


@pytest.mark.parametrize(("make", "zero"), [(ade20k, "True"), (cityscapes, "False"), (voc, "False"), (beside, "False")])
def test_layouts_give_the_same_classes(tmp_path, make, zero):
    classes = make(tmp_path)
    config = config_of(tmp_path, "DATA.ZERO_IS_VOID", zero)
    train, val, found = open_pairs(config, training=True)
    assert (found, len(train), len(val)) == (classes, 1, 1)
    for index in (train, val):
        sample = DecodePair(label_table(config, index, len(found)), decoding=build_decoding(config))(index[0], False)
        assert np.array_equal(sample.target.numpy(), draw_pair(0)[1])
        assert sample.image.shape[1:] == sample.target.shape


def test_a_mended_label_map_is_read_again(pairs, tmp_path):
    """Its folder has the same date; what is in the file decides."""
    shutil.copytree(pairs, tmp_path / "data")
    path, now = tmp_path / "data/masks/train/000.png", time.time()
    config = config_of(tmp_path / "data")
    before = np.array(Image.open(path))
    Image.fromarray(np.where(before == 1, 77, before).astype(np.uint8)).save(path)
    for old in (tmp_path / "data").rglob("*"):  # what has just been written is looked at again in any case
        os.utime(old, (now - 3600, now - 3600))
    assert open_pairs(config, training=True)[0].occurring()[77]
    Image.fromarray(before).save(path)
    os.utime(path, (now - 1800, now - 1800))
    assert not open_pairs(config, training=True)[0].occurring()[77]


def test_what_has_no_partner_is_left_out_and_counted(pairs, tmp_path):
    shutil.copytree(pairs, tmp_path / "data")
    (tmp_path / "data/masks/train/000.png").unlink()
    (tmp_path / "data/images/val/001.png").unlink()
    train, val, _ = open_pairs(config_of(tmp_path / "data"), training=True)
    assert (len(train), train.left_out) == (12, {".png without a label map": 1})
    assert (len(val), val.left_out) == (6, {".png without an image": 1})


def test_damaged_label_maps_are_named(pairs):
    data = (pairs / "masks/train/000.png").read_bytes()
    with pytest.raises(ValueError, match="it cannot be decoded"):
        decode_labels(data[: len(data) // 2])


# ---- the transform


def pair(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An image that shows its own label map, so that both can be compared after the transform."""
    labels = torch.zeros(height, width, dtype=torch.uint8)
    labels[: height // 2, width // 3 :] = 1
    labels[height // 2 :, : width // 2] = 2
    return (labels[None] * 100).expand(3, -1, -1).contiguous(), labels


def transform(**changes) -> PairTransform:
    settings = dict(size=(48, 64), bounds=(256, 64), ratio=(0.5, 2.0), most_of_one_class=0.75, hflip=0.5, distort=0.0)
    return PairTransform(**settings | changes)


@pytest.mark.parametrize("seed", range(8))
def test_image_and_label_map_stay_together(seed):
    seed_cpu(seed)
    image, labels, plan = transform()(*pair(70, 90))
    assert (image.shape, labels.shape) == ((3, 48, 64), (48, 64))
    there = labels != VOID
    off = (image[0].float() / 100 - labels.float()).abs()[there] > 0.3
    assert off.float().mean() < 0.08  # the edges, which bilinear resizing softens
    blank = torch.zeros(48, 64, dtype=torch.bool)
    for patch in plan.patches:
        blank[patch.top : patch.top + patch.height, patch.left : patch.left + patch.width] = True
    assert torch.equal(blank, ~there)


def test_the_same_seed_gives_the_same_sample_and_others_differ():
    samples = []
    for seed in (1, 1, 2):
        seed_cpu(seed)
        samples.append(transform(distort=0.5)(*pair(70, 90))[0])
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


def test_crops_of_one_class_are_drawn_again():
    """Left three quarters of one class: 90 % of the crops would have more than three quarters of it."""
    labels = torch.zeros(64, 400, dtype=torch.uint8)
    labels[:, 330:] = 1
    drawn = {True: 0, False: 0}
    for again in drawn:
        for seed in range(40):
            seed_cpu(seed)
            top, left = transform(size=(64, 64), most_of_one_class=0.75 if again else 1.0).draw_crop(labels)
            crop = labels[top : top + 64, left : left + 64]
            drawn[again] += int(0.25 < crop.float().mean() < 0.75)
    assert drawn[True] > 2 * drawn[False]


@pytest.mark.parametrize(
    ("size", "bounds", "expected"),
    [
        ((512, 683), (2048, 512), (512, 683)),
        ((256, 256), (2048, 512), (512, 512)),
        ((100, 1000), (2048, 512), (205, 2048)),
        ((1000, 100), (2048, 512), (2048, 205)),
    ],
)
def test_brought_within(size, bounds, expected):
    assert brought_within(*size, *bounds) == expected


def test_the_recipe(tmp_path):
    built = build_pair_transform(config_of(tmp_path, "DATA.IMG_SIZE", "512"))
    assert built == PairTransform((512, 512), (2048, 512), (0.5, 2.0), 0.75, 0.5, 0.5)


# ---- shards


@pytest.mark.parametrize("short_side", [0, 32])
def test_shards_hold_the_same_pairs(pairs, tmp_path, short_side):
    """As they are, or both resized; the numbers of the label maps and their order stay."""
    words = ("--task", "segmentation", "--images-per-shard", "5", "--workers", "1", "--short-side", short_side)
    done = start("scripts/prepare_imagenet.py", pairs, tmp_path / "out", *words)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out/train").glob("*.tar")) == [
        f"train-0000{i}.tar" for i in range(3)
    ]
    plain, packed = (open_pairs(config_of(root), training=True) for root in (pairs, tmp_path / "out"))
    assert plain[2] == packed[2]
    for there, here in zip(plain[:2], packed[:2], strict=True):
        table = label_table(config_of(pairs), here, 3)
        samples = [
            [DecodePair(table, Decoding())(index[i], False) for i in range(len(index))] for index in (there, here)
        ]
        assert len(samples[0]) == len(samples[1])
        if not short_side:
            found = [{(s.image.numpy().tobytes(), s.target.numpy().tobytes()) for s in some} for some in samples]
            assert found[0] == found[1]
        for sample in samples[1]:
            assert sample.image.shape[1:] == sample.target.shape
            assert min(sample.target.shape) <= (short_side or 72)
            assert set(sample.target.unique().tolist()) <= {0, 1, 2, 255}
