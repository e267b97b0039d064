"""A small data set of images with label maps: bright discs and squares of mixed sizes on noise."""

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ["background", "disc", "square"]


def draw_pair(number: int) -> tuple[np.ndarray, np.ndarray]:
    """An image ``(H, W, 3)`` and its label map ``(H, W)``, both uint8; a column is void (255)."""
    random = np.random.RandomState(number)
    height, width = random.randint(40, 72, 2)
    y, x = np.mgrid[:height, :width]
    labels = np.zeros((height, width), np.uint8)
    labels[(y - random.randint(10, 30)) ** 2 + (x - random.randint(10, 30)) ** 2 < 81] = 1
    labels[height - 16 : height - 2, width - 18 : width - 4] = 2
    image = random.randint(0, 60, (height, width, 3)) + np.array([[20, 20, 20], [150, 20, 20], [20, 150, 90]])[labels]
    labels[:, -2:] = 255
    return image.astype(np.uint8), labels


def write_pairs(root: Path, train: int = 13, val: int = 7, void: int = 255) -> Path:
    """Write ``images/{train,val}``, ``masks/{train,val}``, where no class is ``void``, and ``classes.txt``."""
    for split, count, first in (("train", train, 0), ("val", val, 1000)):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            image, labels = draw_pair(first + i)
            Image.fromarray(image).save(root / "images" / split / f"{i:03d}.png")
            labels[labels == 255] = void
            Image.fromarray(labels).save(root / "masks" / split / f"{i:03d}.png")
    (root / "classes.txt").write_text("\n".join(CLASSES))
    return root
