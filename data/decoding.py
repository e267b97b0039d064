"""From the bytes of an image file to its pixels."""

import io
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from data.files import IMAGE_TYPES, MAX_IMAGE_BYTES

try:
    import simplejpeg
except ImportError:  # no build for this Python: torchvision's decoder gives the same pixels, as long as it has one
    from torchvision.io import ImageReadMode, decode_jpeg

    simplejpeg = None
    warnings.filterwarnings("ignore", message="The given buffer is not writable|The image decoding and encoding")

MAX_PIXELS = 178_956_970
"""What Pillow allows unless told otherwise."""

RASTER_FORMATS = (*IMAGE_TYPES, "HEIF")
"""All that is ever opened, by Pillow's names: formats of pixels. It would start Ghostscript for an EPS file.

HEIF under another type's name is decoded where a plug-in for it has been loaded.
"""

START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
STANDALONE = frozenset(range(0xD0, 0xD8)) | {0x01, 0xFF}
"""JPEG markers without a length (and the fill byte)."""
APP1, END_OF_IMAGE, START_OF_SCAN = 0xE1, 0xD9, 0xDA
"""The first holds EXIF or XMP."""

ORIENTATION, BITS_PER_SAMPLE, PHOTOMETRIC = 0x0112, 258, 262
"""Tags of TIFF and EXIF."""
WHITE_IS_ZERO = 0
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""What undoes an orientation; Pillow counts degrees against the clock."""

# What is too large is refused below; that something is large is no news to anybody
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class BadImage(ValueError):
    """The bytes are no image that can be decoded; the message says why."""


class Decoding(NamedTuple):
    """How pixels are made of a file, besides what the file says.

    Attributes:
        upright: turn and mirror the image as its EXIF orientation asks for.
        max_pixels: an image with more is an error.
        white: the value that is white in a grey image of more than 8 bits; 0 for the largest one that 16 bits (or
            the fewer that its header tells of) can hold, and to refuse 32-bit and float images, which tell of none.
    """

    upright: bool = False
    max_pixels: int = MAX_PIXELS
    white: float = 0.0


AS_PUBLISHED = Decoding()


def build_decoding(config) -> Decoding:
    """Take from the settings how pixels are made of a file."""
    return Decoding(config.DATA.UPRIGHT, config.DATA.MAX_PIXELS, config.DATA.WHITE)


def decode(data: bytes | Image.Image, how: Decoding = AS_PUBLISHED) -> Tensor:
    """Decode an image as RGB, ``(3, H, W)`` uint8 with channels last in memory.

    What the bytes are decides, not the file's name: libjpeg-turbo decodes JPEGs; Pillow everything else that it can
    and what the other refuses. On a JPEG they give the same pixels. Of an animation or of several pages it is the
    first.

    Raises:
        BadImage: they are no image, a damaged one, or one that is not to be decoded.
        OSError: an image that Pillow has not read yet (``data``) cannot be read.
    """
    return decode_with_orientation(data, how)[0]


def decode_with_orientation(
    data: bytes | Image.Image, how: Decoding = AS_PUBLISHED, look: bool = True
) -> tuple[Tensor, int]:
    """Decode as :func:`decode` does, and tell the orientation that EXIF gives: 1 to 8, and 1 where it gives none.

    Without ``look`` it is only looked for when it is needed, and else 0. A TIFF is upright either way: its orientation
    is part of the format, and Pillow has always honoured it.
    """
    try:
        return _decode(data, how, look or how.upright)
    except Exception as error:  # decoders fail in arbitrary ways on arbitrary bytes
        if getattr(error, "errno", None):  # it is not the image that is bad
            raise
        raise BadImage(str(error) or type(error).__name__) from error


def _decode(data: bytes | Image.Image, how: Decoding, look: bool) -> tuple[Tensor, int]:
    pixels, orientation = None, int(look)
    header = jpeg_header(data) if isinstance(data, bytes) else None
    if header and header.components in (1, 3) and 0 < header.width * header.height <= how.max_pixels:
        try:
            pixels = decode_fast(cast(bytes, data))
        except (RuntimeError, ValueError):
            pass  # Pillow forgives more, and its message is the better one
        else:
            if look and header.has_metadata:
                with suppress(Exception), open_picture(data) as picture:
                    orientation = orientation_of(picture)
    if pixels is None:
        with open_picture(data, how.max_pixels) as picture:
            pixels = pil_to_tensor(to_rgb(picture, how.white))
            if look:
                orientation = orientation_of(picture)  # known only now: in a PNG it may stand behind the pixels
    return (turn(pixels, orientation) if how.upright else pixels), orientation


def decode_fast(data: bytes) -> Tensor:
    """Decode a JPEG in colour or grey to the pixels of :func:`decode`, whose faster way it is.

    Raises:
        RuntimeError, ValueError: it is damaged, or no JPEG.
    """
    if simplejpeg is None:
        return decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), ImageReadMode.RGB)
    return torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)).permute(2, 0, 1)


class open_picture:
    """Opens an image with Pillow, its pixels not decoded yet; to be used with ``with``.

    Raises:
        ValueError: it is no image of RASTER_FORMATS, or has more than ``max_pixels``.
    """

    def __init__(self, data: bytes | Image.Image, max_pixels: int = MAX_PIXELS):
        self.is_ours = isinstance(data, bytes)
        if isinstance(data, bytes):
            if not data:
                raise ValueError("the file is empty")
            # Pillow warns from here on, and refuses twice of it
            Image.MAX_IMAGE_PIXELS = max_pixels / 2  # type: ignore[assignment]
            try:
                self.picture: Image.Image = Image.open(io.BytesIO(data), formats=known_formats())
            except UnidentifiedImageError:  # its own message names an object in memory
                raise ValueError(what_it_is(data)) from None
            except Image.DecompressionBombError:
                raise ValueError(f"it has more pixels than DATA.MAX_PIXELS {max_pixels:,} allows") from None
        elif data.format not in (None, "MPO", *known_formats()):
            raise ValueError(f"{data.format} is no format of pixels; save it as PNG")
        elif data.width * data.height > max_pixels:
            raise ValueError(f"it has more pixels than DATA.MAX_PIXELS {max_pixels:,} allows")
        else:
            self.picture = data

    def __enter__(self) -> Image.Image:
        return self.picture

    def __exit__(self, *error) -> None:
        if self.is_ours:
            self.picture.close()


@cache
def known_formats() -> tuple[str, ...]:
    """List those of RASTER_FORMATS that this Pillow can read, with what plug-ins add to it."""
    Image.init()
    return tuple(name for name in RASTER_FORMATS if name in Image.OPEN)


def what_it_is(data: bytes) -> str:
    """Say why Pillow does not know an image."""
    header = jpeg_header(data)
    if header and header.bits != 8:
        return f"a JPEG with {header.bits} bits a channel cannot be decoded; save it as PNG"
    if data.startswith((b"%!PS", b"\xc5\xd0\xd3\xc6", b"%PDF")):
        return "cannot identify image file: it is PostScript or PDF, which is never run; save it as PNG"
    return "cannot identify image file"


def to_rgb(image: Image.Image, white: float = 0.0) -> Image.Image:
    """Convert any image of Pillow's to RGB, 8 bits a channel; grey ones with more bits as :func:`to_8_bits` does."""
    return Image.fromarray(to_8_bits(image, white)).convert("RGB") if is_deep_grey(image.mode) else image.convert("RGB")


def is_deep_grey(mode: str) -> bool:
    """Tell whether an image of this mode has one channel of more than 8 bits; colours Pillow has already cut to 8."""
    return mode == "F" or mode.startswith("I")


def to_8_bits(image: Image.Image, white: float) -> np.ndarray:
    """Scale a grey image with 16 or 32 bits to uint8.

    The scale depends on the kind of image, never on its pixels: 16 bits lose the lower 8, as they do in colour images
    by Pillow. With ``white`` the scale is 255 / white, and values outside 0 to white are cut.

    Raises:
        ValueError: it is not known what is white, or there are values that are no numbers.
    """
    bits, inverted = depth_of(image)
    values = np.asarray(image)
    if white:
        if not np.isfinite(values).all():
            raise ValueError("it has values that are no numbers (NaN or infinite)")
        grey = np.clip(values * (255 / white) + 0.5, 0, 255).astype(np.uint8)
    elif bits:
        grey = (np.clip(values, 0, 2**bits - 1) >> (bits - 8)).astype(np.uint8)
    else:
        kind = "float numbers" if image.mode == "F" else "whole numbers of 32 bits or with a sign"
        raise ValueError(
            f"its pixels are {kind}, of which it is not known which one is white: "
            "say so for all such images with DATA.WHITE, for example 1.0, or save it with 8 or 16 bits"
        )
    return 255 - grey if inverted else grey


def depth_of(image: Image.Image) -> tuple[int, bool]:
    """Tell how many bits the pixels of a deep grey image have without a sign, and whether white is 0.

    It is 0 bits where their number says nothing of the range.
    """
    tags = getattr(image, "tag_v2", {})
    if image.mode.startswith("I;16"):
        bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
        return (bits if 8 < bits <= 16 else 16), tags.get(PHOTOMETRIC) == WHITE_IS_ZERO
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # their 16 bits; older versions of Pillow have no I;16
        return 16, False
    return 0, tags.get(PHOTOMETRIC) == WHITE_IS_ZERO


def orientation_of(picture: Image.Image) -> int:
    """Look for the orientation of EXIF (or XMP), 1 to 8; 1 where there is none, or it is damaged."""
    with suppress(Exception):
        # A PNG's own getexif would decode it, to find what may stand behind the pixels
        value = Image.Image.getexif(picture).get(ORIENTATION, 1)
        return value if value in range(1, 9) else 1
    return 1


def turn(pixels: Tensor, orientation: int) -> Tensor:
    """Turn pixels ``(3, H, W)`` with an EXIF orientation upright. Source: Exif 2.32, section 4.6.4 A."""
    if orientation not in TURNS:
        return pixels
    return pil_to_tensor(tensor_to_pil(pixels).transpose(TURNS[orientation]))


def pil_to_tensor(image: Image.Image) -> Tensor:
    """Convert an RGB image to ``(3, H, W)``, a view of channels-last memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def tensor_to_pil(image: Tensor) -> Image.Image:
    """Convert ``(3, H, W)`` uint8 to an RGB image."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def pictures_of(images: Iterable[Tensor], mean: Sequence[float], std: Sequence[float]) -> list[Image.Image]:
    """Undo the normalising of images, ``(3, H, W)`` each."""
    centre, scale = (torch.tensor(x)[:, None, None] for x in (mean, std))
    return [
        tensor_to_pil((255 * (image.float().cpu() * scale + centre)).round().clamp(0, 255).to(torch.uint8))
        for image in images
    ]


class JpegHeader(NamedTuple):
    """What the frame header of a JPEG says, and whether EXIF or XMP comes before it."""

    width: int
    height: int
    components: int
    bits: int
    has_metadata: bool


def jpeg_header(data: bytes) -> JpegHeader | None:
    """Read the frame header of a JPEG; None of other files and of damaged ones. Source: ITU T.81, B.2.2."""
    if not data.startswith(b"\xff\xd8"):
        return None
    has_metadata = False
    for marker, i in _segments(data):
        has_metadata |= marker == APP1
        if marker in START_OF_FRAME and i + 10 <= len(data):
            height, width = (int.from_bytes(data[j : j + 2]) for j in (i + 5, i + 7))
            return JpegHeader(width, height, data[i + 9], data[i + 4], has_metadata)
    return None


def jpeg_size(data: bytes) -> tuple[int, int, int] | None:
    """Read width, height and number of colour components of a JPEG with 8 bits from its frame header; else None."""
    header = jpeg_header(data)
    return header[:3] if header and header.bits == 8 else None


def _segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield the markers of a JPEG up to its first scan, and where they stand."""
    i = 2
    while i + 9 < len(data):
        marker = data[i + 1]
        if data[i] != 0xFF or marker in (START_OF_SCAN, END_OF_IMAGE):
            return
        if marker in STANDALONE:
            i += 1 if marker == 0xFF else 2
            continue
        yield marker, i
        i += 2 + int.from_bytes(data[i + 2 : i + 4])


def read_file(path: str | Path) -> bytes:
    """Read the bytes of an image file, MAX_IMAGE_BYTES at most.

    Raises:
        OSError: it cannot be opened or read.
        ValueError: it has more bytes, or does not end.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(size + 1) if size <= MAX_IMAGE_BYTES else b""
        while size < len(data) <= MAX_IMAGE_BYTES and (more := file.read(2**24)):  # it grows, or has no size
            data += more
    if max(size, len(data)) > MAX_IMAGE_BYTES:
        raise ValueError(f"it has more than {MAX_IMAGE_BYTES:,} bytes, too many for an image; remove it")
    return data
