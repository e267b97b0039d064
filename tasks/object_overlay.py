"""Objects over their photograph: boxes, pixels, names and scores, readable whatever the image's size."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from tasks.overlay import colours
from utils.contact_sheet import font
from utils.drawing import drawable

LEAST_SIDE = 640
"""A smaller image is drawn a whole number of times larger, so that there is room for words."""
STRENGTH = 0.45
"""Of the colours over an object's pixels."""


def draw_objects(
    image: Image.Image,
    boxes: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    scores: np.ndarray | None = None,
    masks: np.ndarray | None = None,
) -> Image.Image:
    """Draw objects; those of low scores first, so that the others lie above them.

    Args:
        boxes: ``(N, 4)``, left, top, right, bottom in pixels of the image.
        labels: ``(N,)``, numbers of ``classes``, whose names are written unless there is one only.
        scores: ``(N,)``.
        masks: ``(N, H, W)`` bool; with them each object has a colour of its own, without them each class.
    """
    scale = max(1, LEAST_SIDE // max(image.size))
    picture = image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    order = range(len(boxes)) if scores is None else np.argsort(scores, kind="stable").tolist()
    many = colours(max(len(classes), 1) if masks is None else max(len(boxes), 1))
    chosen = {i: many[labels[i] if masks is None else i] for i in order}
    if masks is not None and len(masks):
        picture = painted(picture, masks, chosen, scale)
    draw = ImageDraw.Draw(picture)
    line = max(1, round(min(picture.size) / 300))
    size = max(11, round(min(picture.size) / 45))
    for i in order:
        colour = tuple(chosen[i].tolist())
        left, top, right, bottom = (float(x) * scale for x in boxes[i])
        draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=line)
        words = [classes[labels[i]]] if len(classes) > 1 else []
        words += [] if scores is None else [f"{100 * scores[i]:.0f} %"]
        if words:
            tell(draw, drawable(" ".join(words)), left, top, colour, size, picture.size)
    return picture


def painted(picture: Image.Image, masks: np.ndarray, chosen: dict[int, np.ndarray], scale: int) -> Image.Image:
    """Paint the pixels of objects over a picture that is so many times larger than their masks."""
    pixels = np.asarray(picture, np.float32).copy()
    for i, colour in chosen.items():
        there = masks[i].repeat(scale, 0).repeat(scale, 1)
        pixels[there] = (1 - STRENGTH) * pixels[there] + STRENGTH * colour
    return Image.fromarray((pixels + 0.5).astype(np.uint8))


def tell(
    draw: ImageDraw.ImageDraw,
    words: str,
    left: float,
    top: float,
    colour: tuple[int, ...],
    size: int,
    room: tuple[int, int],
) -> None:
    """Write words above a box, or inside of it where the image ends."""
    width, height = draw.textlength(words, font(size)) + 4, size + 3
    left = max(0, min(left, room[0] - width))
    top = top - height if top >= height else top
    draw.rectangle((left, top, left + width, top + height), colour)
    ink = "black" if sum(colour) > 3 * 110 else "white"
    draw.text((left + 2, top + height / 2), words, ink, font(size), anchor="lm")
