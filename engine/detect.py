"""The objects in image files, as pictures and as files for programs."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pycocotools import mask as rle

from data.augmentation import DeviceStage, Plan
from data.augmentation.objects import build_object_eval_transform
from data.decoding import build_decoding, tensor_to_pil
from engine.photographs import check_pictures, names_below, read_images, save
from engine.precision import choose_precision
from tasks.average_precision import Result, to_results
from tasks.object_overlay import draw_objects
from tasks.objects import Found, find_objects
from tasks.trained import TrainedModel
from utils.files import write_whole, writing

KEYS = ("class_index", "class", "score", "left", "top", "right", "bottom")
"""What is told of an object."""


def detect(
    trained: TrainedModel, paths: list[Path], device: torch.device, score: float, folder: Path | None, pictures: int
) -> Iterator[tuple[dict, Image.Image | None]]:
    """Yield the objects of each image, in order, and the image with them drawn over it if that is wanted.

    Args:
        trained: a detector.
        paths: image files.
        device: where the model is.
        score: what has a lower one is left out.
        folder: for ``overlays/``, with the paths of the images below their common folder, and ``results.json``, which
            is as COCO has it: ``images``, ``categories``, and ``annotations`` with a ``score``. All are drawn then.
        pictures: so many of the first images are drawn without a folder too.

    Raises:
        UserError: two images would become one file, or a file cannot be written.
    """
    config, classes = trained.config, trained.classes
    precision, transform = choose_precision(config, device), build_object_eval_transform(config)
    stage = DeviceStage(device, config.DATA.MEAN, config.DATA.STD)
    category_ids = trained.facts.get("category_ids") or [*range(1, len(classes) + 1)]
    names = names_below(paths)
    images: list[dict[str, Any]] = []
    annotations: list[Result] = []
    if folder:
        check_pictures(paths)
    for number, (path, image) in enumerate(read_images(paths, build_decoding(config)), start=1):
        if isinstance(image, str):
            yield {"file": str(path), "error": image}, None
            continue
        size = image.shape[1], image.shape[2]
        is_drawn = folder is not None or len(images) < pictures
        resized = transform(image, torch.zeros(0, 4)).image
        with torch.inference_mode(), precision.autocast():
            seen = stage(resized[None], [Plan()])[0]
            found = find_objects(trained.model, seen, size, config.TEST.MULTIPLE, masks=is_drawn, score=score)
        name, drawn = names[number - 1], draw(image, found, classes) if is_drawn else None
        images.append({"id": number, "file_name": str(name), "height": size[0], "width": size[1]})
        if folder and drawn:
            save(drawn, folder / "overlays" / name.with_suffix(".png"))
            results = to_results(number, found._asdict(), category_ids, found.masks)
            annotations += as_annotations(results, first=len(annotations) + 1)
        yield {"file": str(path), "predictions": told(found, classes)}, drawn
    if folder:
        categories = [{"id": i, "name": name} for i, name in zip(category_ids, classes, strict=True)]
        content = {"images": images, "categories": categories, "annotations": annotations}
        with writing(folder / "results.json", "choose another --overlay"):
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / "results.json", json.dumps(content).encode())


def draw(image: torch.Tensor, found: Found, classes: list[str]) -> Image.Image:
    """Draw objects over an image ``(3, H, W)`` uint8."""
    boxes, labels, scores = (part.cpu().numpy() for part in (found.boxes, found.labels, found.scores))
    masks = None if found.masks is None else found.masks.cpu().numpy()
    return draw_objects(tensor_to_pil(image), boxes, labels, classes, scores, masks)


def as_annotations(results: list[Result], first: int) -> list[Result]:
    """Give results what annotations have besides, so that pycocotools loads them: ids from ``first`` on, and areas."""
    annotations = []
    for number, one in enumerate(results, start=first):
        area = int(rle.area(one["segmentation"])) if "segmentation" in one else one["bbox"][2] * one["bbox"][3]
        annotations.append({"id": number, **one, "area": area, "iscrowd": 0})
    return annotations


def told(found: Found, classes: list[str]) -> list[dict[str, Any]]:
    """Put objects into the words of a table, the highest score first."""
    parts = zip(found.labels.tolist(), found.scores.tolist(), found.boxes.tolist(), strict=True)
    return [
        dict(zip(KEYS, (label, classes[label], float(f"{score:.6g}"), *(round(x, 2) for x in box)), strict=True))
        for label, score, box in parts
    ]
