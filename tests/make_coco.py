"""A small data set in COCO's format: coloured rectangles and ellipses on noise, wide and tall, masks of all kinds."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as rle

CATEGORIES = [{"id": 7, "name": "ellipse"}, {"id": 3, "name": "rectangle"}]
"""By their ids the rectangle comes first."""
CLASSES = ["rectangle", "ellipse"]
COLOURS = {3: (200, 60, 40), 7: (40, 160, 210)}


def draw_objects(number: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """An image ``(H, W, 3)`` uint8, and its objects with their ``mask`` ``(H, W)``; every fifth image has none."""
    random = np.random.RandomState(number)
    height, width = random.permutation([random.randint(36, 50), random.randint(52, 80)]).tolist()
    image = random.randint(0, 60, (height, width, 3)).astype(np.uint8)
    objects = []
    for _ in range(random.randint(1, 5) if number % 5 != 4 else 0):
        w, h = random.randint(8, 20, 2).tolist()
        x, y = random.randint(0, width - w), random.randint(0, height - h)
        category, mask = [3, 7][random.randint(2)], np.zeros((height, width), np.uint8)
        if category == 3:
            mask[y : y + h, x : x + w] = 1
            kind = random.randint(3)
        else:
            ys, xs = np.mgrid[:height, :width]
            mask[((2 * xs + 1 - 2 * x - w) / w) ** 2 + ((2 * ys + 1 - 2 * y - h) / h) ** 2 <= 1] = 1
            kind = random.randint(1, 3)
        image[mask > 0] = COLOURS[category]
        objects.append(
            {"category_id": category, "bbox": [x, y, w, h], "mask": mask, "segmentation": as_kind(mask, kind)}
        )
    return image, objects


def as_kind(mask: np.ndarray, kind: int) -> Any:
    """Write a mask as a polygon (of its box), or as run lengths, compressed or not."""
    if kind == 0:
        (top, bottom), (left, right) = ((int(i.min()), int(i.max()) + 1) for i in np.nonzero(mask))
        return [[left, top, right, top, right, bottom, left, bottom]]
    if kind == 1:
        return {"size": list(mask.shape), "counts": rle.encode(np.asfortranarray(mask))["counts"].decode()}
    values = np.concatenate([[0], mask.ravel(order="F"), [2]])
    starts = np.flatnonzero(np.diff(values))
    return {"size": list(mask.shape), "counts": np.diff([0, *starts]).tolist()}


def annotations_of(numbers: range) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The content of a json, and its images by their names; the last object of an image with several is a crowd."""
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": CATEGORIES}
    pictures = {}
    for number in numbers:
        image, objects = draw_objects(number)
        name, image_id = f"{number:04d}.png", 100 + 3 * number
        pictures[name] = image
        content["images"].append({"id": image_id, "file_name": name, "height": image.shape[0], "width": image.shape[1]})
        for i, one in enumerate(objects):
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1, "image_id": image_id, "category_id": one["category_id"],
                    "bbox": one["bbox"], "area": int(one["mask"].sum()), "segmentation": one["segmentation"],
                    "iscrowd": int(i == len(objects) - 1 and i > 1),
                }
            )  # fmt: skip
    return content, pictures


def write_coco(root: Path, train: int = 13, val: int = 7) -> Path:
    """Write ``annotations/{train,val}.json`` and ``images/{train,val}``."""
    for split, numbers in (("train", range(train)), ("val", range(1000, 1000 + val))):
        content, pictures = annotations_of(numbers)
        (root / "images" / split).mkdir(parents=True)
        (root / "annotations").mkdir(exist_ok=True)
        for name, pixels in pictures.items():
            Image.fromarray(pixels).save(root / "images" / split / name)
        (root / "annotations" / f"{split}.json").write_text(json.dumps(content))
    return root
