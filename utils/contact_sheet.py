"""Contact sheets, as PNG: cards with an image's predictions, and rows of images with a title each."""

import io
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from utils.drawing import drawable, font_file

PER_ROW = 8
INK, PALE, STRONG, SOFT, PAPER = "#1f2937", "#f1f4f8", "#8ec5f4", "#d3e6f8", "#eef1f5"
RIGHT, WRONG = "#2e9e5b", "#d03b3b"
SIDE, PAD, BAR, BARS = 224, 12, 22, 5
"""Of a card, in pixels: its image, the space around it, and the height of a line or bar; and the most bars."""
CELL, GAP, LINE = 128, 4, 20
"""Of rows, in pixels: an image, the space between two, and a line of text."""


class Card(NamedTuple):
    """An image, the path of its file, and its classes with their probabilities, the likeliest first.

    Where its own class is known: ``truth``, and whether the first answer is ``right``.
    """

    path: str
    image: Image.Image
    answers: list[tuple[str, float]]
    truth: str = ""
    right: bool | None = None


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """The font of all sheets, with letters of so many pixels."""
    return ImageFont.truetype(font_file(), size)


def write(draw, x: float, y: float, text: str, room: float, size: int = 12, colour=INK, keep=slice(-1)) -> None:
    """Write a line around the height ``y``; as long as it is wider than ``room``, ``keep`` of it is kept."""
    shown = text = drawable(text)
    while draw.textlength(shown, font(size)) > room:
        text = text[keep]
        shown = f"{text}…" if keep.stop else f"…{text}"
    draw.text((x, y), shown, colour, font(size), anchor="lm")


def paste(sheet: Image.Image, image: Image.Image, x: int, y: int, side: int) -> None:
    """Paste an image into a square of ``side`` pixels: made smaller, or a whole number of times larger."""
    larger = max(image.size)
    scaling = Image.Resampling.NEAREST if larger <= side else Image.Resampling.LANCZOS
    size = [max(1, round(length * (side // larger or side / larger))) for length in image.size]
    sheet.paste(image.resize(size, scaling), (x + (side - size[0]) // 2, y))


def to_png(sheet: Image.Image) -> bytes:
    """The picture as the bytes of a file."""
    sheet.save(out := io.BytesIO(), "PNG", optimize=True)
    return out.getvalue()


def draw_cards(cards: list[Card], title: str) -> bytes:
    """Draw a card for each image: the end of its path, the image, and a bar for each of the first classes."""
    rows = max(-(-len(cards) // PER_ROW), round((len(cards) / 2) ** 0.5))
    columns = -(-len(cards) // rows)
    width, height = (
        SIDE + 2 * PAD,
        SIDE + (1 + min(BARS, max(len(card.answers) for card in cards))) * BAR + 5 * PAD // 2,
    )
    size = columns * (width + PAD) + PAD, rows * (height + PAD) + BAR + 2 * PAD
    draw = ImageDraw.Draw(sheet := Image.new("RGB", size, PAPER))
    middle = BAR / 2 - 2
    write(draw, PAD, PAD + middle, title, size[0] - 2 * PAD)
    for number, card in enumerate(cards):
        x, y = number % columns * (width + PAD) + 2 * PAD, number // columns * (height + PAD) + BAR + 3 * PAD
        edge = None if card.right is None else RIGHT if card.right else WRONG
        draw.rounded_rectangle((x - PAD, y - PAD, x - PAD + width, y - PAD + height), 8, "white", edge, 3)
        title = "/".join(Path(card.path).parts[-2:]) + f"  is {card.truth}" * (card.right is False)
        write(draw, x, y - 2 + middle, title, SIDE, colour=WRONG if card.right is False else INK, keep=slice(1, None))
        paste(sheet, card.image, x, y + BAR, SIDE)
        y += BAR + SIDE + PAD // 2
        for top, (name, probability) in zip(range(y, y + BARS * BAR, BAR), card.answers, strict=False):
            for share, colour in ((1, PALE), (probability, STRONG if top == y else SOFT)):
                draw.rounded_rectangle((x, top, x + share * SIDE, top + BAR - 4), 4, colour)
            percent = f"{100 * probability:.1f} %"
            left = x + SIDE - 6 - draw.textlength(percent, font(12))
            write(draw, left, top + middle, percent, SIDE)
            write(draw, x + 6, top + middle, name, left - x - 12)
    return to_png(sheet)


def draw_rows(
    rows: dict[str, list[Image.Image]], names: list[str], heading: str, columns: int = PER_ROW, cell: int = CELL
) -> bytes:
    """Draw rows of so many images, each below its title; above them a heading and the names of the columns."""
    step = cell + GAP
    sheet = Image.new("RGB", (columns * step + GAP, 2 * LINE + len(rows) * (LINE + step)), "white")
    draw, room = ImageDraw.Draw(sheet), sheet.width - 2 * GAP
    write(draw, GAP, LINE / 2, heading, room, 14, "black")
    for column, name in enumerate(names):
        write(draw, GAP + column * step, 3 * LINE / 2, name, cell, 12, "grey")
    for row, (title, images) in enumerate(rows.items()):
        top = 2 * LINE + row * (LINE + step)
        write(draw, GAP, top + LINE / 2, title, room, 14, "black")
        for column, image in enumerate(images):
            paste(sheet, image, GAP + column * step, top + LINE, cell)
    return to_png(sheet)
