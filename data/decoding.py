"""From the bytes of an image file to its pixels."""

import io
import warnings

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

try:
    import simplejpeg
except ImportError:  # no build for this Python: torchvision's decoder gives the same pixels, as long as it has one
    from torchvision.io import ImageReadMode, decode_jpeg

    simplejpeg = None
    warnings.filterwarnings("ignore", message="The given buffer is not writable|The image decoding and encoding")

START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
STANDALONE = frozenset(range(0xD0, 0xD8)) | {0x01, 0xFF}
"""JPEG markers without a length (and the fill byte)."""


def decode(data: bytes | Image.Image) -> Tensor:
    """The image as RGB, ``(3, H, W)`` uint8 with channels last in memory.

    What the bytes are decides, not the file's name: libjpeg-turbo decodes JPEGs; Pillow everything else that it can
    and what the other refuses. On a JPEG they give the same pixels.

    Raises:
        Exception: the bytes are no image. Its type is Pillow's choice.
    """
    if isinstance(data, bytes) and _is_plain_jpeg(data):
        try:
            return decode_fast(data)
        except (RuntimeError, ValueError):
            pass  # Pillow forgives more, and its message is the better one
    return pil_to_tensor(decode_with_pillow(data))


def decode_fast(data: bytes) -> Tensor:
    """A JPEG in colour or grey as :func:`decode` gives it."""
    if simplejpeg is None:
        return decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), ImageReadMode.RGB)
    return torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)).permute(2, 0, 1)


def decode_with_pillow(data: bytes | Image.Image) -> Image.Image:
    """The image as RGB."""
    if isinstance(data, Image.Image):
        return data.convert("RGB")
    if not data:
        raise ValueError("the file is empty")
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except UnidentifiedImageError:  # its own message names an object in memory
        raise ValueError("cannot identify image file") from None


def pil_to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as ``(3, H, W)``, a view of channels-last memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def tensor_to_pil(image: Tensor) -> Image.Image:
    """The reverse of :func:`pil_to_tensor`."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether this is a JPEG in colour or grey, of a size that Pillow takes for sane."""
    size = jpeg_size(data)
    if size is None:
        return False
    width, height, components = size
    return components in (1, 3) and 0 < width * height <= 2 * Image.MAX_IMAGE_PIXELS


def jpeg_size(data: bytes) -> tuple[int, int, int] | None:
    """Width, height and number of colour components of a JPEG with 8 bits, from its frame header (ITU T.81, B.2.2)."""
    if not data.startswith(b"\xff\xd8"):
        return None
    i = 2
    while i + 9 < len(data):
        marker = data[i + 1]
        if data[i] != 0xFF:
            return None
        if marker in STANDALONE:
            i += 1 if marker == 0xFF else 2
            continue
        if marker in START_OF_FRAME:
            precision, height, width = data[i + 4], *(int.from_bytes(data[j : j + 2]) for j in (i + 5, i + 7))
            return (width, height, data[i + 9]) if precision == 8 else None
        i += 2 + int.from_bytes(data[i + 2 : i + 4])
    return None
