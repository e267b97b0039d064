"""From the bytes of unusual files to their pixels: the same in training, evaluation, prediction and shards."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from config import build_config
from data import decoding
from data.dataset import DecodeAndTransform, ImageDataset
from data.decoding import Decoding, decode, decode_with_orientation, pil_to_tensor, read_file, to_rgb
from data.folder import FolderLayout
from data.index import open_index
from data.loading import describe_turned
from data.splits import open_images
from scripts import check_dataset, prepare_imagenet
from tasks.classification import Classification
from utils.errors import UserError

CPU = torch.device("cpu")
VALUES = np.array([[0, 127, 255, 256, 2000, 20000, 60000, 65279, 65280, 65535]], np.uint16)


def encoded(image: Image.Image, form: str, **options) -> bytes:
    image.save(file := io.BytesIO(), form, **options)
    return file.getvalue()


def png_of_16_bits(pixels: np.ndarray, colour_type: int) -> bytes:
    """``(H, W, channels)`` uint16; Pillow itself writes such files for one channel only."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(data: bytes, width: int, bits: int, photometric: int, order: str = "<") -> bytes:
    """One uncompressed grey row."""
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 1, 279: len(data)}
    start = 8 + len(data) + len(data) % 2
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, start)
    return head + data.ljust(start - 8, b"\0") + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


def photograph(seed: int = 0, size: tuple[int, int] = (60, 40)) -> Image.Image:
    pixels = np.random.RandomState(seed).randint(0, 256, (5, 7, 3), np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def turned(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


# ---- More than 8 bits


def test_grey_of_16_bits_is_scaled_as_colours_are():
    """Once all of these above 255 were white. The scale is that of Pillow for 16-bit colours, in any type of file."""
    expected = VALUES >> 8
    colours = np.repeat(VALUES[..., None], 3, axis=2)
    files = {
        "png": encoded(Image.fromarray(VALUES), "PNG"),
        "png in colour": png_of_16_bits(colours, 2),
        "png with alpha": png_of_16_bits(np.dstack([VALUES, VALUES]), 4),
        "tiff": encoded(Image.fromarray(VALUES), "TIFF"),
        "big-endian tiff": tiff(VALUES.astype(">u2").tobytes(), 10, 16, 1, ">"),
        "tiff where white is 0": tiff((65535 - VALUES).astype("<u2").tobytes(), 10, 16, 0),
        "pgm": b"P5 10 1 65535\n" + VALUES.astype(">u2").tobytes(),
        "jpeg 2000": encoded(Image.fromarray(np.repeat(VALUES, 8, 0)), "JPEG2000", irreversible=False),
    }
    for name, data in files.items():
        assert np.array_equal(decode(data)[:, :1].numpy(), np.repeat(expected[None], 3, 0)), name


def test_fewer_bits_than_16_take_their_own_white():
    twelve = np.array([0, 15, 16, 4095], np.uint16)
    packed = bytes([0, 0, 15, 1, 15, 255])  # 0, 15, 16, 4095 with 12 bits each: 000 00F 010 FFF
    assert bytes.fromhex("00000f010fff") == packed
    assert decode(tiff(packed, 4, 12, 1))[0].tolist() == [(twelve >> 4).tolist()]
    assert decode(b"P5 2 1 1023\n" + np.array([0, 1023], ">u2").tobytes())[0].tolist() == [[0, 255]]


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_what_has_no_white_is_an_error_until_it_is_said(kind, tmp_path):
    """A scale from the pixels themselves would make an image's brightness a matter of its own darkest pixel."""
    image = Image.fromarray(np.array([[-5, 0, 1, 2, 3000, 4000]], kind))
    data = encoded(image, "TIFF")
    for picture in (data, image):
        with pytest.raises(ValueError, match=r"not known which one is white.*DATA\.WHITE"):
            decode(picture)
    assert decode(data, Decoding(white=4.0))[0].tolist() == [[0, 0, 64, 128, 255, 255]]
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "0.tif").write_bytes(data)
    index = open_index(FolderLayout(tmp_path, "train"), "")
    item = ImageDataset(index, DecodeAndTransform(None), 0, replace_bad=False)[0, 0]  # goes the way of any bad image
    assert "0.tif: its pixels are" in item.bad[0]


def test_white_is_for_deep_grey_images_alone():
    how = Decoding(white=4095.0)
    assert decode(encoded(Image.fromarray(np.array([[0, 4095, 5000]], np.uint16)), "PNG"), how)[0].tolist() == [
        [0, 255, 255]
    ]
    for image in (photograph(), photograph().convert("L")):
        assert torch.equal(decode(encoded(image, "PNG"), how), decode(encoded(image, "PNG")))
    not_numbers = Image.fromarray(np.array([[0.5, np.nan]], np.float32))
    with pytest.raises(ValueError, match="no numbers"):
        decode(not_numbers, Decoding(white=1.0))


def test_all_other_kinds_stay_what_they_were():
    for mode in ("1", "L", "LA", "PA", "P", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV"):
        image = Image.new(mode, (4, 4), 1)
        assert to_rgb(image).tobytes() == image.convert("RGB").tobytes(), mode


def test_a_jpeg_of_12_bits_is_named():
    data = bytearray(encoded(photograph(), "JPEG"))
    data[data.index(b"\xff\xc0") + 4] = 12
    with pytest.raises(ValueError, match="12 bits a channel"):
        decode(bytes(data))


def test_the_first_of_several():
    frames = [photograph(seed) for seed in range(3)]
    for form, options in (("GIF", {}), ("TIFF", {}), ("PNG", {}), ("WEBP", {"lossless": True})):
        data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
        assert torch.equal(decode(data), decode(encoded(frames[0], form, **options))), form


# ---- Orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
def test_images_are_turned_when_asked_to_and_once(form, orientation):
    """Pillow itself turns a TIFF, always; the others only when asked to."""
    data = encoded(photograph(), form, exif=turned(orientation))
    upright = pil_to_tensor(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    got, told = decode_with_orientation(data, Decoding(upright=True))
    assert torch.equal(got, upright)
    assert got.permute(1, 2, 0).is_contiguous()
    assert told == (1 if form == "TIFF" else orientation)
    as_it_lies = pil_to_tensor(Image.open(io.BytesIO(data)).convert("RGB"))
    assert torch.equal(decode(data), as_it_lies)
    assert decode_with_orientation(data, look=False)[1] == 0


def test_damaged_exif_is_no_error():
    for tags in (b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0nonsense", turned(99).tobytes()):
        data = encoded(photograph(), "JPEG", exif=tags)
        assert decode_with_orientation(data, Decoding(upright=True))[1] == 1


@pytest.fixture(scope="module")
def turned_data(tmp_path_factory) -> Path:
    """12 and 6 JPEGs of 60 x 40, a third of them with an orientation; of 2 classes."""
    root = tmp_path_factory.mktemp("turned")
    for split, count in (("train", 12), ("val", 6)):
        for i in range(count):
            path = root / split / "ab"[i % 2] / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            photograph(i).save(path, exif=turned(6 if i % 3 == 0 else 1), quality=95)
    return root


def settings(root: Path, *opts: str):
    plain = ("DATA.NUM_WORKERS", "0", "DATA.IMG_SIZE", "32", "DATA.BATCH_SIZE", "4")
    return build_config("configs/micro.yaml", [*plain, "DATA.DATA_PATH", str(root), *opts])


@pytest.mark.parametrize(("upright", "said"), [("False", "they were not: DATA.UPRIGHT True"), ("True", "they were")])
def test_the_first_epoch_tells_how_many_are_turned(turned_data, upright, said):
    config = settings(turned_data, "DATA.UPRIGHT", upright)
    loaders = Classification(config, CPU).train_loaders()
    list(loaders.train.micro_batches(0, 9))  # three epochs
    line = describe_turned(loaders.train, config.DATA.UPRIGHT)
    assert line.startswith("EXIF says of 4 of 12 images that they are to be turned")
    assert said in line
    index = loaders.val.dataset.index
    images = {int(n): image for batch, _, numbers in loaders.val for n, image in zip(numbers, batch, strict=True)}
    for i, image in images.items():
        pixels, _ = loaders.val.dataset.sample.transform(decode(index.read(i), Decoding(upright=upright == "True")))
        assert torch.equal(loaders.val.stage.normalise(pixels[None])[0], image)


def test_the_command_says_it_too(run_main, turned_data):
    done = run_main(
        "--cfg", "configs/micro.yaml", "--tag", "run", "--data-path", turned_data, "--batch-size", "4", "--opts",
        "DATA.NUM_WORKERS", "1", "TRAIN.EPOCHS", "2", "TRAIN.WARMUP_EPOCHS", "1",
    )  # fmt: skip
    assert done.stdout.count("EXIF says of 4 of 12 images") == 1


def test_check_dataset_counts_them(turned_data, tmp_path, capsys):
    command = ["--data-path", str(turned_data), "--workers", "1", "--output", str(tmp_path)]
    assert check_dataset.main([*command, "--opts", "DATA.IMG_SIZE", "32"]) == 1  # val leaks, as the seeds are the same
    assert "rotated (6): EXIF says" in " ".join(capsys.readouterr().out.split())


def decoded(root: Path, upright: bool) -> list[list[torch.Tensor]]:
    images = open_images(settings(root), True)[:2]
    return [[decode(of[i][0], Decoding(upright=upright)) for i in range(len(of))] for of in images]


@pytest.mark.parametrize("small", [[], ["--short-side", "20"]])
def test_shards_mean_the_same_as_their_source(turned_data, tmp_path, small):
    """Written anew, an image keeps its orientation; turned while it is written, it has none left."""
    kept, baked = tmp_path / "kept", tmp_path / "baked"
    common = [str(turned_data), "--workers", "1", "--quality", "100", *small]
    assert prepare_imagenet.main([*common[:1], str(kept), *common[1:]]) == 0
    assert prepare_imagenet.main([*common[:1], str(baked), *common[1:], "--opts", "DATA.UPRIGHT", "True"]) == 0
    for upright in (False, True):
        for ours, theirs in zip(decoded(kept, upright), decoded(turned_data, upright), strict=True):
            assert [image.shape[1] > image.shape[2] for image in ours] == [x.shape[1] > x.shape[2] for x in theirs]
    for once, never, twice in zip(
        decoded(kept, True)[0], decoded(baked, False)[0], decoded(baked, True)[0], strict=True
    ):
        assert torch.equal(never, twice)
        assert never.shape == once.shape
        assert (never.float() - once.float()).abs().mean() < 8
    assert prepare_imagenet.main([str(turned_data), str(tmp_path / "x"), "--opts", "AUG.MIXUP", "0"]) == 2
    assert prepare_imagenet.main([str(turned_data), str(kept), *common[1:], "--opts", "DATA.UPRIGHT", "True"]) == 2


# ---- What is not opened, and limits


def test_no_image_starts_a_program(tmp_path, monkeypatch):
    """Pillow starts Ghostscript for an EPS, whatever the file is called."""
    mark, fake = tmp_path / "started", tmp_path / "gs"
    fake.write_text(f"#!/bin/sh\ntouch {mark}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    with pytest.raises(OSError, match="."), Image.open(io.BytesIO(eps)) as picture:
        picture.load()
    assert mark.exists()  # so it would have
    mark.unlink()
    with pytest.raises(ValueError, match="PostScript"):
        decode(eps)
    with pytest.raises(ValueError, match="EPS is no format of pixels"), Image.open(io.BytesIO(eps)) as picture:
        decode(picture)
    with pytest.raises(ValueError, match="PostScript"), decoding.open_picture(eps):
        pass
    assert not mark.exists()


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_more_pixels_than_allowed(form):
    data = encoded(photograph(), form)
    assert decode(data, Decoding(max_pixels=60 * 40)).shape == (3, 40, 60)
    with pytest.raises(ValueError, match=r"more pixels than DATA\.MAX_PIXELS 2,399 allows"):
        decode(data, Decoding(max_pixels=60 * 40 - 1))
    with pytest.raises(ValueError, match=r"DATA\.MAX_PIXELS"):
        decode(photograph(), Decoding(max_pixels=100))


def test_the_limit_of_pixels_is_a_setting(turned_data):
    with pytest.raises(UserError, match=r"more pixels than DATA\.MAX_PIXELS 2,000"):
        list(
            Classification(settings(turned_data, "DATA.MAX_PIXELS", "2000"), CPU)
            .train_loaders()
            .train.micro_batches(0, 1)
        )


def test_a_file_is_read_to_a_limit(tmp_path, monkeypatch):
    (tmp_path / "train" / "a").mkdir(parents=True)
    path = tmp_path / "train" / "a" / "0.png"
    path.write_bytes(b"x" * 1000)
    assert read_file(path) == b"x" * 1000
    index = open_index(FolderLayout(tmp_path, "train"), "")
    os.truncate(path, 50 * 2**30)  # a hole: it takes no place
    item = ImageDataset(index, DecodeAndTransform(None), 0, replace_bad=False)[0, 0]
    assert "0.png: it has more than 1,073,741,824 bytes, too many for an image" in item.bad[0]
    monkeypatch.setattr(decoding, "MAX_IMAGE_BYTES", 2**20)
    with pytest.raises(ValueError, match="more than 1,048,576 bytes"):
        read_file("/dev/zero")  # says that it has none, and never ends
