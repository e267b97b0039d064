"""Sizes of images: a number for squares, or a height and a width."""

from collections.abc import Sequence


def height_and_width(size: int | Sequence[int]) -> tuple[int, int]:
    """Of images of this ``size``."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def describe_size(size: int | Sequence[int]) -> str:
    """For a person: ``224``, or ``192 x 640``."""
    height, width = height_and_width(size)
    return str(height) if height == width else f"{height} x {width}"
