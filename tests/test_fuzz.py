"""Damaged images and archives: whatever the bytes, an image is decoded or its path is reported; no crash, no hang."""

import io
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from conftest import quick
from make_layouts import as_official, as_shards, as_webdataset, as_zip
from PIL import Image

from config import build_config
from data.augmentation import Plan
from data.dataset import DecodeAndTransform, ImageDataset, Item
from data.folder import FolderLayout
from data.index import open_index
from data.splits import open_images
from utils.errors import UserError

SECONDS = 20
FAULTS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "cut short": lambda data, rng: data[: rng.randrange(len(data))],
    "a bit flipped": lambda data, rng: flip(data, rng, 1, len(data)),
    "bits flipped in the header": lambda data, rng: flip(data, rng, 4, min(len(data), 700)),
    "many bits flipped": lambda data, rng: flip(data, rng, 50, len(data)),
    "bytes missing": lambda data, rng: data[: (i := rng.randrange(len(data)))] + data[i + rng.randrange(1, 600) :],
    "bytes repeated": lambda data, rng: data[: (i := rng.randrange(len(data)))] + data[max(0, i - 512) :],
    "a stretch of one byte": lambda data, rng: stretch(data, rng, rng.choice((0, 255, 0x80))),
    "nothing": lambda data, rng: b"",
    "something else": lambda data, rng: rng.randbytes(len(data)),
}
IMAGE_CASES, ARCHIVE_CASES = 1800, 120  # of the latter for each kind


def flip(data: bytes, rng: random.Random, count: int, within: int) -> bytes:
    changed = bytearray(data)
    for _ in range(count):
        changed[rng.randrange(within)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def stretch(data: bytes, rng: random.Random, value: int) -> bytes:
    start = rng.randrange(len(data))
    length = min(rng.randrange(1, 600), len(data) - start)
    return data[:start] + bytes([value]) * length + data[start + length :]


class Hang(BaseException):
    """Not an Exception, which the code under test may catch."""


@contextmanager
def no_hang() -> Iterator[None]:
    def fail(*_):
        raise Hang(f"not done after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def pictures() -> dict[str, bytes]:
    """Every kind of image that the decoders tell apart, by the name's extension."""
    rng = np.random.RandomState(0)
    picture = Image.fromarray(rng.randint(0, 256, (6, 7, 3), np.uint8)).resize((70, 60))
    kinds = [
        ("JPEG", "RGB", {}), ("JPEG", "RGB", {"progressive": True}), ("JPEG", "L", {}), ("JPEG", "CMYK", {}),
        ("JPEG", "RGB", {"restart_marker_blocks": 2}), ("PNG", "RGB", {}), ("PNG", "P", {}), ("WEBP", "RGB", {}),
        ("GIF", "P", {}), ("BMP", "RGB", {}), ("TIFF", "RGB", {}),
    ]  # fmt: skip
    found = {}
    for number, (kind, mode, options) in enumerate(kinds):
        buffer = io.BytesIO()
        picture.convert(mode).save(buffer, kind, **options)
        found[f"{number}.jpg"] = buffer.getvalue()  # the name never tells
    return found


def as_it_is(image):
    return image, Plan()


def check(item: Item, name: str) -> bool:
    """Whether it was decoded; if not, its path must be reported."""
    if item.sample is not None:
        assert item.sample.image.shape[0] == 3
        assert min(item.sample.image.shape) > 0
        return True
    assert name in "".join(item.bad) + item.failure
    assert "\n" not in "".join(item.bad) + item.failure
    return False


@pytest.mark.filterwarnings("ignore")  # Pillow warns of odd files
def test_damaged_images(tmp_path):
    rng = random.Random(0)
    whole = pictures()
    (tmp_path / "train" / "a").mkdir(parents=True)
    for name, content in whole.items():
        (tmp_path / "train" / "a" / name).write_bytes(content)
    index = open_index(FolderLayout(tmp_path, "train"), "")
    dataset = ImageDataset(index, DecodeAndTransform(as_it_is), seed=0, replace_bad=False)
    decoded = 0
    for case in range(IMAGE_CASES):
        i = rng.randrange(len(index))
        path = index.path(i)
        path.write_bytes(list(FAULTS.values())[case % len(FAULTS)](whole[path.name], rng))
        with no_hang():
            decoded += check(dataset[0, i], str(path))
    assert 0.1 * IMAGE_CASES < decoded < 0.7 * IMAGE_CASES, "both outcomes must be met"


def small_source(root: Path) -> Path:
    for split in ("train", "val"):
        for i, (name, content) in enumerate(pictures().items()):
            path = root / split / f"n0000000{i % 2}" / f"ILSVRC2012_val_{i + 1:08d}{Path(name).suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return root


ARCHIVES = {
    "shards": (as_shards, "train/train-00001.tar"),
    "webdataset": (as_webdataset, "digits-train-0001.tar"),
    "nested tar": (as_official, "ILSVRC2012_img_train.tar"),
    "devkit": (as_official, "ILSVRC2012_devkit_t12.tar.gz"),
    "zip": (as_zip, "train.zip"),
    "map file": (as_zip, "train_map.txt"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", quick(ARCHIVES, list(ARCHIVES)[:1]))
def test_damaged_archives(tmp_path, kind):
    make, name = ARCHIVES[kind]
    make(small_source(tmp_path / "source"), tmp_path / "data")
    damaged = tmp_path / "data" / name
    whole, rng = damaged.read_bytes(), random.Random(kind)
    config = build_config(opts=["DATA.DATA_PATH", str(tmp_path / "data")])
    refused = read = bad = 0
    for case in range(ARCHIVE_CASES):
        damaged.write_bytes(list(FAULTS.values())[case % len(FAULTS)](whole, rng))
        with no_hang():
            try:
                indices, problem = open_images(config, training=True)[:2], None
            except UserError as error:
                indices, problem = (), str(error)
            refused += problem is not None
            assert problem is None or ("\n" not in problem and str(tmp_path / "data") in problem), problem
            for index in indices:
                dataset = ImageDataset(index, DecodeAndTransform(as_it_is), seed=0, replace_bad=False)
                for i in range(len(dataset)):
                    sound = check(dataset[0, i], index.archives[index.arrays["archive"][i]])
                    read, bad = read + sound, bad + (not sound)
    assert refused
    assert read
    print(f"{kind}: {ARCHIVE_CASES} cases, {refused} refused; {read} images decoded, {bad} reported")
