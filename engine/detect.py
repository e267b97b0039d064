"""The objects in image files, as pictures and as files for programs."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data.augmentation import DeviceStage, Plan
from data.augmentation.objects import build_object_eval_transform
from data.decoding import build_decoding, tensor_to_pil
from engine.photographs import read_images, save
from engine.precision import choose_precision
from tasks.average_precision import to_results
from tasks.object_overlay import draw_objects
from tasks.objects import find_objects
from tasks.trained import TrainedModel
from utils.files import write_whole, writing


def detect(
    trained: TrainedModel, paths: list[Path], device: torch.device, score: float, folder: Path | None
) -> Iterator[tuple[dict, Image.Image | None]]:
    """Yield the objects of each image, in order, and the image with them drawn over it.

    Args:
        trained: a detector.
        paths: image files.
        device: where the model is.
        score: what has a lower one is left out.
        folder: for ``overlays/``, with the paths of the images below their common folder, and ``results.json``, which
            is as COCO has it: ``images``, ``categories``, and ``annotations`` with a ``score``.

    Raises:
        UserError: a file cannot be written.
    """
    config, classes = trained.config, trained.classes
    precision, transform = choose_precision(config, device), build_object_eval_transform(config)
    stage = DeviceStage(device, config.DATA.MEAN, config.DATA.STD)
    above = Path(os.path.commonpath([path.absolute().parent for path in paths]))
    images, annotations = [], []
    for number, (path, image) in enumerate(read_images(paths, build_decoding(config)), start=1):
        if isinstance(image, str):
            yield {"file": str(path), "error": image}, None
            continue
        size = image.shape[1], image.shape[2]
        resized = transform(image, torch.zeros(0, 4)).image
        with torch.inference_mode(), precision.autocast():
            seen = stage(resized[None], [Plan()])[0]
            found = find_objects(trained.model, seen, size, config.TEST.MULTIPLE).above(score)
        name = path.absolute().relative_to(above)
        boxes, labels, scores, masks = (None if part is None else part.cpu().numpy() for part in found)
        assert boxes is not None
        assert labels is not None
        drawn = draw_objects(tensor_to_pil(image), boxes, labels, classes, scores, masks)
        if folder:
            save(drawn, folder / "overlays" / name.with_suffix(".png"))
            images.append({"id": number, "file_name": str(name), "height": size[0], "width": size[1]})
            annotations += to_results(number, found._asdict(), range(1, len(classes) + 1), found.masks)
        yield {"file": str(path), "predictions": told(boxes, labels, scores, classes)}, drawn
    if folder:
        categories = [{"id": i, "name": name} for i, name in enumerate(classes, start=1)]
        content = {"images": images, "categories": categories, "annotations": annotations}
        with writing(folder / "results.json", "choose another --overlay"):
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / "results.json", json.dumps(content).encode())


def told(boxes: np.ndarray, labels: np.ndarray, scores: Any, classes: list[str]) -> list[dict[str, Any]]:
    """Put objects into the words of a table, the highest score first."""
    sides = ("left", "top", "right", "bottom")
    return [
        dict(class_index=int(label), **{"class": classes[label]}, score=float(f"{score:.6g}"))
        | {side: round(float(x), 2) for side, x in zip(sides, box, strict=True)}
        for box, label, score in zip(boxes, labels, scores, strict=True)
    ]
