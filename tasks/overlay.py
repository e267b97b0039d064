"""Label maps as pictures: over a photograph with a legend, beside the truth, and as files that programs read."""

import colorsys
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from data.augmentation.pairs import VOID
from utils.contact_sheet import INK, PAPER, write

STRENGTH = 0.55
"""Of the colours over the photograph."""
BACKGROUND = "background"
GOLDEN = 0.618033988749895
LEGEND_WIDTH, LINE, SWATCH, MARGIN = 220, 22, 14, 10
"""In pixels: of the legend, a line of it, the square of colour in it, and the space around."""


class Share(NamedTuple):
    """A class in a label map: its number, its name, and its share of the pixels."""

    number: int
    name: str
    share: float


@cache
def colours(count: int) -> np.ndarray:
    """Choose colours that are easy to tell apart for so many classes, ``(count, 3)`` uint8; black would be void."""
    chosen = [
        colorsys.hsv_to_rgb(0.02 + i * GOLDEN % 1, (0.85, 0.6, 0.95)[i // 5 % 3], (0.95, 0.8, 0.6)[i // 3 % 3])
        for i in range(count)
    ]
    return np.round(255 * np.array(chosen)).astype(np.uint8)


def shares(labels: np.ndarray, classes: list[str]) -> list[Share]:
    """List the classes of a label map ``(H, W)``, those with the most pixels first."""
    counts = np.bincount(labels.ravel(), minlength=VOID + 1)[: len(classes)]
    order = np.argsort(-counts, kind="stable")
    return [Share(int(i), classes[i], float(counts[i] / labels.size)) for i in order if counts[i]]


def painted(image: Image.Image, labels: np.ndarray, classes: list[str]) -> Image.Image:
    """Paint a label map ``(H, W)`` over its photograph. Void gets darker; a class called background stays as it is."""
    table, strength = np.zeros((VOID + 1, 3), np.float32), np.full((VOID + 1, 1), STRENGTH, np.float32)
    table[: len(classes)] = colours(len(classes))
    strength[[i for i, name in enumerate(classes) if name.lower() == BACKGROUND]] = 0
    photograph, share = np.asarray(image.convert("RGB"), np.float32), strength[labels]
    return Image.fromarray(((1 - share) * photograph + share * table[labels] + 0.5).astype(np.uint8))


def overlay(image: Image.Image, labels: np.ndarray, classes: list[str]) -> Image.Image:
    """Paint a label map over its photograph, and a legend of the classes that are there beside it."""
    picture, there = painted(image, labels, classes), shares(labels, classes)
    height = max(picture.height, 2 * MARGIN + min(len(there), 40) * LINE)
    sheet = Image.new("RGB", (picture.width + LEGEND_WIDTH, height), PAPER)
    sheet.paste(picture, (0, 0))
    draw, left = ImageDraw.Draw(sheet), picture.width + MARGIN
    for number, share in enumerate(there[: (height - 2 * MARGIN) // LINE]):
        middle = MARGIN + number * LINE + LINE / 2
        colour = tuple(colours(len(classes))[share.number].tolist())
        draw.rectangle((left, middle - SWATCH / 2, left + SWATCH, middle + SWATCH / 2), colour, INK)
        percent = f"{100 * share.share:.1f} %"
        room = LEGEND_WIDTH - 2 * MARGIN - SWATCH - 8
        right = draw.textlength(percent)
        write(draw, left + SWATCH + 8, middle, share.name, room - right - 16)
        write(draw, left + SWATCH + 8 + room - right - 12, middle, percent, right + 14)
    return sheet


def label_file(labels: np.ndarray, first: int, count: int) -> Image.Image:
    """Make a picture whose pixels are the numbers of classes, the first of them ``first``, with colours to look at."""
    table = np.zeros((VOID + 1, 3), np.uint8)
    table[first : first + count] = colours(count)
    picture = Image.fromarray(np.where(labels == VOID, VOID, labels + first).astype(np.uint8), mode="P")
    picture.putpalette(table.tobytes())
    return picture
