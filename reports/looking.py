"""Pictures of what a network looks at: groups and attention over a photograph, position biases, Grad-CAM."""

import io
from typing import NamedTuple

import numpy as np
from PIL import Image

from utils.drawing import drawable, pyplot

CELL = 2.6
"""Inches of a picture's side."""
SHADE = 0.72
"""How dark what is outside a group becomes."""
TOKEN, HEAT, BIAS = "#ff2d55", "inferno", "RdBu_r"


class Group(NamedTuple):
    """What a token attends to in one block: a title, its place, the tokens of its group and their share, ``(H, W)``."""

    title: str
    token: tuple[int, int]
    group: np.ndarray
    shares: np.ndarray


def draw_attention(picture: Image.Image, rows: list[list[Group | None]], stride: list[int], title: str) -> bytes:
    """Draw a row for each stage: for each block the group over the photograph, and the attention over it.

    Args:
        picture: as the model sees it.
        rows: of each stage and point, the block with short and that with long distance; None leaves a place empty.
        stride: pixels of a token in each row.

    Returns:
        a PNG.
    """
    photograph = np.asarray(picture.convert("RGB"))
    with pyplot() as plt:
        figure, grid = _grid(plt, len(rows), 4, photograph.shape[0] / photograph.shape[1], title)
        for axes, groups, pixels in zip(grid, rows, stride, strict=True):
            for place, group in enumerate(groups):
                left, right = axes[2 * place : 2 * place + 2]
                for axis in (left, right):
                    axis.set_axis_off()
                if group is None:
                    continue
                height, width = group.group.shape
                where = (0, width * pixels, height * pixels, 0)
                for axis in (left, right):
                    axis.imshow(photograph, extent=(0, photograph.shape[1], photograph.shape[0], 0))
                shade = np.zeros((height, width, 4))
                shade[..., 3] = np.where(group.group, 0, SHADE)
                left.imshow(shade, extent=where, interpolation="nearest")
                heat = plt.get_cmap(HEAT)(group.shares / max(group.shares.max(), 1e-12))
                heat[..., 3] = np.where(group.group, 0.75, SHADE)
                heat[~group.group, :3] = 0
                right.imshow(heat, extent=where, interpolation="nearest")
                for axis in (left, right):
                    y, x = group.token
                    axis.add_patch(
                        plt.Rectangle((x * pixels, y * pixels), pixels, pixels, fill=False, color=TOKEN, lw=1.6)
                    )
                left.set_title(group.title, fontsize=8)
                right.set_title(f"attention, at most {100 * group.shares.max():.0f} %", fontsize=8)
        return _png(plt, figure)


def draw_biases(rows: dict[str, np.ndarray], title: str) -> bytes:
    """Draw the position bias of each head, ``(heads, 2 G - 1, 2 G - 1)``, in a row for each block; returns a PNG.

    Each is drawn less its mean, which attention does not depend on.
    """
    rows = {name: heads - heads.mean((1, 2), keepdims=True) for name, heads in rows.items()}
    most = max(len(heads) for heads in rows.values())
    size = max(0.75 * most, 7), 1.1 * len(rows) + 0.5
    with pyplot() as plt:
        figure, grid = plt.subplots(len(rows), most, figsize=size, squeeze=False)
        figure.subplots_adjust(0.01, 0.01, 0.99, 1 - 0.6 / size[1], 0.08, 0.45)
        figure.suptitle(drawable(title), fontsize=11)
        for axes, (name, heads) in zip(grid, rows.items(), strict=True):
            largest = max(float(np.abs(heads).max()), 1e-12)
            for axis, bias in zip(axes, heads, strict=False):
                axis.imshow(bias, cmap=BIAS, vmin=-largest, vmax=largest)
            for axis in axes:
                axis.set_axis_off()
            axes[0].set_title(f"{name}: -{largest:.2g} (blue) to {largest:.2g} (red)", fontsize=8, loc="left")
        return _png(plt, figure)


def draw_evidence(rows: list[tuple[str, Image.Image, list[tuple[str, np.ndarray]]]]) -> bytes:
    """Draw a row for each image: itself, and how much each place speaks for a class, ``(h, w)``; returns a PNG."""
    columns = 1 + max(len(answers) for *_, answers in rows)
    with pyplot() as plt:
        largest = max(picture.height / picture.width for _, picture, _ in rows)
        figure, grid = _grid(plt, len(rows), columns, largest, "")
        for axes, (name, picture, answers) in zip(grid, rows, strict=True):
            for axis in axes:
                axis.set_axis_off()
            axes[0].imshow(picture)
            axes[0].set_title(drawable(name), fontsize=8)
            for axis, (title, places) in zip(axes[1:], answers, strict=False):
                shown = Image.fromarray(places.astype(np.float32)).resize(picture.size, Image.Resampling.BILINEAR)
                axis.imshow(picture.convert("L"), cmap="gray", vmin=0, vmax=255)
                axis.imshow(np.asarray(shown), cmap=HEAT, alpha=0.6, vmin=0, vmax=1)
                axis.set_title(drawable(title), fontsize=8)
        return _png(plt, figure)


def _grid(plt, rows: int, columns: int, shape: float, title: str):
    """A figure with room for pictures of that height over width, each with two lines above it, below a title."""
    side, above = CELL * min(shape, 2.0), 0.4
    size = columns * CELL, rows * (side + above) + 0.3 * bool(title)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False)
    top = 1 - (above + 0.3 * bool(title)) / size[1]
    figure.subplots_adjust(0.005, 0.005, 0.995, top, 0.02, above / side)
    if title:
        figure.suptitle(drawable(title), fontsize=11, y=1 - 0.1 / size[1], va="top")
    return figure, grid


def _png(plt, figure) -> bytes:
    figure.savefig(out := io.BytesIO(), format="png", dpi=110)
    plt.close(figure)
    return out.getvalue()
