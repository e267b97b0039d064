"""What training and evaluation make of images with objects, and the batches that they come in."""

import io
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from make_coco import COLOURS
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from config import build_config
from data.augmentation import DeviceStage, Plan
from data.augmentation.objects import (
    ObjectTransform,
    build_object_eval_transform,
    build_object_transform,
    draw_crop,
    packed_masks,
)
from data.build import build_eval_loader, build_train_loader, open_objects, orientations, wants_masks
from data.dataset import HostBatch, ImageDataset
from data.decoding import ORIENTATION, BadImage, Decoding, build_decoding
from data.objects import DecodeObjects, DecodeWhole, decode_checked
from data.sampling import GroupedTrainBatches
from utils.errors import UserError
from utils.randomness import seed_cpu

JITTER = ObjectTransform((96, 64), (0.4, 1.6), (40, 48), 0.5)
PLAIN = ObjectTransform((96, 64), (1.0, 1.0), None, 0.5)


def config_of(root: Path, *opts: str):
    return build_config(opts=["TASK", "detection", "DATA.DATA_PATH", str(root), *opts])


# ---- the transform


def painted(height: int, width: int, boxes: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An image that shows its own masks, each a filled box."""
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = 1
    image = masks.sum(dim=0).clamp(max=1).mul(200).byte().expand(3, -1, -1).contiguous()
    return image, torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), masks


def applied(
    transform: ObjectTransform, image: torch.Tensor, boxes: torch.Tensor, masks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Image, boxes and masks ``(n, h, w)`` of what is still there, and which that is."""
    image, boxes, stay, rows, columns = transform(image, boxes)
    packed = packed_masks(masks[stay].numpy(), rows, columns)
    assert packed.shape == (int(stay.sum()), image.shape[1], (image.shape[2] + 7) // 8)
    return image, boxes, torch.from_numpy(np.unpackbits(packed, axis=-1, count=image.shape[2])), stay


def test_resizing_and_flipping_exactly():
    """Of 20 x 40 within (60, 30) the half more is 30 x 60; a flip takes x to 60 - x."""
    transform = ObjectTransform((60, 30), (1.0, 1.0), None, 1.0)
    image, boxes, masks, stay = applied(transform, *painted(20, 40, [[4, 2, 14, 12], [30, 0, 40, 20]]))
    assert (image.shape, image.dtype, masks.shape, masks.dtype) == ((3, 30, 60), torch.uint8, (2, 30, 60), torch.uint8)
    assert boxes.tolist() == [[39, 3, 54, 18], [0, 0, 15, 30]]
    expected = torch.zeros(2, 30, 60, dtype=torch.uint8)
    expected[0, 3:18, 39:54] = expected[1, :, 0:15] = 1
    assert torch.equal(masks, expected)
    assert stay.tolist() == [True, True]


def test_masks_take_the_pixel_before_and_images_the_neighbours_without_antialiasing():
    """Of 8 columns 5: mask column i is floor(8 i / 5); an image's at 1.6 (i + 0.5) - 0.5 lies between two."""
    masks = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0], dtype=torch.uint8).expand(1, 8, 8).contiguous()
    image = (torch.arange(8) * 10).byte().expand(3, 8, 8).contiguous()
    found, _, resized, _ = applied(ObjectTransform((5, 5)), image, torch.tensor([[0.0, 0, 7, 8]]), masks)
    assert resized[0, 0].tolist() == [1, 0, 1, 0, 1]
    assert found[0, 0].tolist() == [3, 19, 35, 51, 67]


@pytest.mark.parametrize(
    ("size", "expected"), [((480, 640), (800, 1067)), ((427, 640), (800, 1199)), ((200, 1000), (267, 1333))]
)
def test_the_published_sizes(size, expected):
    """scale = min(1333 / longest, 800 / shortest), rounded as int(x * scale + 0.5)."""
    image, *_ = applied(ObjectTransform((1333, 800)), *painted(*size, []))
    assert image.shape[1:] == expected


def test_a_crop_clips_boxes_and_drops_what_is_outside():
    """The image shows its columns, so where 10 of its 20 were cut out."""
    transform, lefts = ObjectTransform((20, 10), crop=(10, 10)), set()
    _, boxes, masks = painted(10, 20, [[0, 0, 2, 10], [9, 3, 11, 5], [18, 0, 20, 10]])
    columns = torch.arange(20, dtype=torch.uint8).expand(3, 10, 20)
    for seed in range(60):
        seed_cpu(seed)
        image, found, parts, stay = applied(transform, columns, boxes, masks)
        left = int(image[0, 0, 0])
        assert torch.equal(image, columns[:, :, left : left + 10])
        moved = [[max(x1 - left, 0), y1, min(x2 - left, 10), y2] for x1, y1, x2, y2 in boxes.tolist()]
        assert found.tolist() == [box for box in moved if box[2] > box[0]]
        assert torch.equal(parts, masks[stay][:, :, left : left + 10])
        lefts.add(left)
    assert lefts == set(range(11))


@pytest.mark.parametrize("transform", [PLAIN, JITTER, ObjectTransform((30, 20)), ObjectTransform((300, 200))])
def test_boxes_enclose_their_masks_and_masks_fit_the_image(transform):
    """To the pixel that resizing to whole pixels may take in."""
    for seed in range(30):
        seed_cpu(seed)
        image, boxes, masks, _ = applied(
            transform, *painted(50, 70, [[3, 4, 40, 30], [49, 20, 70, 50], [10, 35, 18, 44]])
        )
        assert masks.shape[1:] == image.shape[1:]
        assert (boxes >= 0).all()
        assert (boxes[:, 2] <= image.shape[2]).all()
        assert (boxes[:, 3] <= image.shape[1]).all()
        for (x1, y1, x2, y2), mask in zip(boxes.tolist(), masks, strict=True):
            ys, xs = torch.nonzero(mask, as_tuple=True)
            if len(xs):
                assert xs.min() > x1 - 1
                assert xs.max() < x2 + 1
                assert ys.min() > y1 - 1
                assert ys.max() < y2 + 1
        if len(masks) == 3:
            shown = image[0] > 100
            assert (shown != masks.amax(dim=0).bool()).float().mean() < 0.12


def test_a_box_of_a_whole_image_stays_within_it():
    """Whatever is rounded: in 32 bits 76 times 101 / 76 is more than 101."""
    for width in range(60, 100):
        image, boxes, _, _ = applied(ObjectTransform((101, 101)), *painted(40, width, [[0, 0, width, 40]]))
        assert boxes[0, 2] <= image.shape[2]
        assert boxes[0, 3] <= image.shape[1]


@pytest.mark.parametrize("seed", range(12))
def test_masks_are_as_resized_cropped_and_flipped_one_after_the_other(seed):
    """With the draws of the transform in their order."""
    image, boxes, _ = painted(53, 71, [[0, 0, 71, 53], [1, 1, 70, 50]])
    masks = torch.from_numpy(np.random.RandomState(seed).randint(0, 2, (2, 53, 71)).astype(np.uint8))
    seed_cpu(seed)
    _, _, found, _ = applied(JITTER, image, boxes, masks)
    seed_cpu(seed)
    size = JITTER.draw_size(53, 71)
    expected = F.crop(F.resize(masks, list(size), InterpolationMode.NEAREST), *draw_crop(size, JITTER.crop))
    assert torch.equal(found, F.horizontal_flip(expected) if torch.rand(()) < 0.5 else expected)


def test_jitter_draws_sizes_and_keeps_within_the_crop():
    sizes = set()
    for seed in range(30):
        seed_cpu(seed)
        image, *_ = applied(JITTER, *painted(50, 70, []))
        sizes.add(tuple(image.shape[1:]))
        assert image.shape[1] <= 40
        assert image.shape[2] <= 48
    assert len(sizes) > 3


def test_the_settings(tmp_path):
    config = config_of(tmp_path, *"AUG.RESIZE [1333,800] AUG.RESIZE_RATIO [1,1] TEST.RESIZE [1000,600]".split())
    assert build_object_transform(config) == ObjectTransform((1333, 800), (1.0, 1.0), None, 0.5)
    assert build_object_eval_transform(config) == ObjectTransform((1000, 600), (1.0, 1.0), None, 0.0)
    config = config_of(tmp_path, *"AUG.RESIZE_RATIO [0.1,2] DATA.IMG_SIZE 1024".split())
    assert (build_object_transform(config).ratio, build_object_transform(config).crop) == ((0.1, 2), None)
    config = config_of(tmp_path, *"AUG.CROP True DATA.IMG_SIZE [800,1344]".split())
    assert build_object_transform(config).crop == (800, 1344)


@pytest.mark.parametrize("crop", [(20, 30), (30, 20)])
def test_the_longer_side_of_a_crop_goes_along_the_image(crop):
    transform = ObjectTransform((60, 40), crop=crop)
    for size, expected in (((40, 60), (20, 30)), ((60, 40), (30, 20))):
        image, *_ = applied(transform, *painted(*size, []))
        assert image.shape[1:] == expected


# ---- samples


@pytest.mark.parametrize("transform", [PLAIN, ObjectTransform((96, 64), (1.5, 2.0), (40, 48), 0.5)])
def test_samples_have_the_objects_that_the_image_shows(coco, transform):
    train, _, _ = open_objects(config_of(coco), training=True)
    sample, dropped = ImageDataset(train, DecodeObjects(Decoding(), transform, masks=True), 0, replace_bad=False), 0
    for i in range(len(train)):
        item = sample[3, i].sample
        target, image = item.target, item.image
        assert (target["boxes"].dtype, target["labels"].dtype) == (np.float32, np.int64)
        assert target["size"].tolist() == list(image.shape[1:])
        height, width = image.shape[1:]
        count = len(target["boxes"])
        assert target["masks"].shape == (count, height, (width + 7) // 8)
        dropped += train.counts[i] - count
        masks = np.unpackbits(target["masks"], axis=-1, count=width)
        covered = masks.sum(axis=0)
        for label, mask in zip(target["labels"], masks, strict=True):
            alone = torch.from_numpy((mask > 0) & (covered == 1))
            if alone.sum() < 20:
                continue
            colour = image[:, alone].float().median(dim=1).values
            nearest = min(COLOURS, key=lambda c: float((colour - torch.tensor(COLOURS[c]).float()).abs().sum()))
            assert {3: 0, 7: 1}[nearest] == label
    assert (dropped > 0) == (transform.crop is not None)
    without = DecodeObjects(Decoding(), PLAIN, masks=False)(train[0], False)
    assert sorted(without.target) == ["boxes", "labels", "size"]


def test_an_image_of_another_size_is_bad(coco):
    train, _, _ = open_objects(config_of(coco), training=True)
    raw = train.read(1), train.objects(0)
    item = ImageDataset([raw], DecodeObjects(Decoding(), PLAIN, masks=True), 0, replace_bad=False)
    item.index = type("One", (list,), {"name": lambda self, i: "0.png"})([raw])
    assert "its annotations say" in item[0, 0].bad[0]


@pytest.mark.parametrize(("upright", "labelled"), [(True, (30, 20)), (False, (20, 30))])
def test_an_image_that_exif_turns(coco, upright, labelled):
    """It has 20 x 30 pixels, and lies on its side; what its annotations see decides over DATA.UPRIGHT."""
    exif, out = Image.Exif(), io.BytesIO()
    exif[ORIENTATION] = 6
    Image.new("RGB", (30, 20), "white").save(out, "JPEG", exif=exif)
    objects = open_objects(config_of(coco), training=True)[0].objects(0)._replace(size=labelled)
    raw = out.getvalue(), objects
    good, bad = (build_decoding(config_of(coco, "DATA.UPRIGHT", str(value))) for value in (upright, not upright))
    assert decode_checked(raw, good, look=False)[0].shape[1:] == labelled
    seen = "upright" if upright else "unturned"
    with pytest.raises(BadImage, match=f"EXIF turns it, and they are of it {seen}: set DATA.UPRIGHT {upright}"):
        decode_checked(raw, bad, look=False)
    Image.new("RGB", (30, 20)).save(out := io.BytesIO(), "PNG")
    with pytest.raises(BadImage, match="its annotations say 30 x 20$"):
        decode_checked((out.getvalue(), objects._replace(size=(30, 20))), good, look=False)


def loaders(config, device: str = "cpu"):
    train, val, _ = open_objects(config, training=True)
    sample = DecodeObjects(Decoding(), build_object_transform(config), masks=wants_masks(config))
    stage = DeviceStage(torch.device(device), config.DATA.MEAN, config.DATA.STD)
    whole = DecodeWhole(Decoding(), build_object_eval_transform(config))
    return (
        build_train_loader(config, train, sample, None, stage, orientations(config, train)),
        build_eval_loader(config, val, whole, None, stage),
    )


SMALL = "DATA.BATCH_SIZE 2 AUG.RESIZE [96,64] TEST.RESIZE [96,64]".split()
SMALL += "DATA.IMG_SIZE 48 AUG.RESIZE_RATIO [0.5,1.5] AUG.CROP True".split()


@pytest.mark.parametrize("workers", [1, 3])
def test_the_same_batches_whatever_the_workers_and_wherever_resumed(coco, workers):
    first, _ = loaders(config_of(coco, *SMALL, "DATA.NUM_WORKERS", "0"))
    other, _ = loaders(config_of(coco, *SMALL, "DATA.NUM_WORKERS", str(workers)))
    expected = list(first.micro_batches(0, 7))[3:]
    for a, b in zip(expected, other.micro_batches(3, 7), strict=True):
        assert a.numbers.tolist() == b.numbers.tolist()
        assert all(torch.equal(x, y) for x, y in zip(a.images, b.images, strict=True))
        for x, y in zip(a.targets, b.targets, strict=True):
            assert sorted(x) == sorted(y) == ["boxes", "labels", "masks", "size"]
            assert all(isinstance(x[key], torch.Tensor) and torch.equal(x[key], y[key]) for key in x)


def test_batches_have_one_orientation_and_evaluation_takes_each_image_once(coco):
    config = config_of(coco, *SMALL, "DATA.NUM_WORKERS", "1", "AUG.CROP", "False")
    train, val = loaders(config)
    for batch in train.micro_batches(0, 8):
        assert len({bool(image.shape[2] > image.shape[1]) for image in batch.images}) == 1
    seen = []
    for batch in val:
        seen += batch.numbers.tolist()
        for number, target in zip(batch.numbers.tolist(), batch.targets, strict=True):
            assert target["original_size"].tolist() == val.dataset.index.sizes[number].tolist()
            assert int(target["image_id"]) == val.dataset.index.image_ids[number]
    assert sorted(seen) == list(range(7))


def test_too_few_images_of_each_orientation(coco):
    with pytest.raises(UserError, match=r"11 training images, but among its wide .* DATA.BY_ORIENTATION False"):
        loaders(config_of(coco, *SMALL, "DATA.BATCH_SIZE", "10"))
    loaders(config_of(coco, *SMALL, "DATA.BATCH_SIZE", "10", "DATA.BY_ORIENTATION", "False"))
    with pytest.raises(UserError, match="11 training images, fewer than one step takes"):
        loaders(config_of(coco, *SMALL, "DATA.BATCH_SIZE", "12"))


def test_all_of_a_batch_is_pinned(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    targets = [{"boxes": np.zeros((2, 4), np.float32), "size": np.array([3, 5])}]
    batch = HostBatch([np.zeros((3, 3, 5), np.uint8)], targets, [Plan()], [0], [0], [], "").pin_memory()
    assert [tuple(tensor.shape) for tensor in pinned] == [(3, 3, 5), (2, 4), (2,)]
    assert all(isinstance(tensor, torch.Tensor) for tensor in (*batch.images, *batch.targets[0].values()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_arrive_on_a_gpu(coco):
    config = config_of(coco, *SMALL, "DATA.NUM_WORKERS", "1")
    here, there = (loaders(config, name)[0].micro_batches(0, 5) for name in ("cpu", "cuda:0"))
    for a, b in zip(here, there, strict=True):
        assert all(image.is_cuda for image in b.images)
        for x, y in zip(a.targets, b.targets, strict=True):
            assert all(y[key].is_cuda and torch.equal(x[key], y[key].cpu()) for key in x)


# ---- which images make up which batch

GROUPS = np.random.RandomState(0).rand(101) < 0.7


@pytest.mark.parametrize(("batch_size", "accumulation", "world_size"), [(4, 1, 1), (4, 2, 3), (3, 2, 2), (1, 1, 4)])
def test_micro_batches_of_one_group(batch_size, accumulation, world_size):
    taken: list[Counter] = [Counter(), Counter()]
    per_rank = []
    for rank in range(world_size):
        batches = GroupedTrainBatches(GROUPS, batch_size, accumulation, rank, world_size, seed=5)
        whole = sum(int(count) // batch_size for count in (GROUPS.sum(), (~GROUPS).sum()))
        assert batches.steps_per_epoch == whole // (accumulation * world_size)
        batches.first_step, batches.last_step = 0, 2 * batches.steps_per_epoch
        mine = list(batches)
        assert len(mine) == len(batches) == 2 * batches.steps_per_epoch * accumulation
        for micro_batch in mine:
            assert len(micro_batch) == batch_size
            assert len({bool(GROUPS[i]) for _, i in micro_batch}) == 1
            for epoch, i in micro_batch:
                taken[epoch][i] += 1
        batches.first_step = batches.steps_per_epoch + 1
        assert list(batches) == mine[batches.first_step * accumulation :]
        per_rank.append(mine)
    assert max(taken[0].values()) == max(taken[1].values()) == 1
    assert taken[0] != taken[1] or batch_size == 1
    step = [key for mine in per_rank for micro_batch in mine[:accumulation] for key in micro_batch]
    assert step == batches.global_batch_of(0)


def test_groups_come_mixed_and_in_another_order_each_epoch():
    batches = GroupedTrainBatches(GROUPS, 2, 1, 0, 1, seed=0)
    kinds = [bool(GROUPS[batch[0]]) for batch in batches.order(0).reshape(-1, 2)]
    changes = sum(a != b for a, b in pairwise(kinds))
    assert changes > 10
    assert batches.order(0).tolist() != batches.order(1).tolist()
    assert batches.order(1).tolist() == GroupedTrainBatches(GROUPS, 2, 1, 0, 1, seed=0).order(1).tolist()
