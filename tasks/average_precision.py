"""Average precision of objects that were found, as COCO defines it: pycocotools computes it."""

import contextlib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

NAMES = (
    "ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large",
    "ar1", "ar10", "ar100", "ar_small", "ar_medium", "ar_large",
)  # fmt: skip
"""COCO's twelve numbers, in its order."""
KINDS = {"bbox": "box", "segm": "mask"}
"""What COCO calls that which is compared, and what it is called here."""
Result = dict[str, Any]
"""An object that was found, as COCO's files of results have it."""


def read_truth(path: Path) -> COCO:
    """Read the objects that there are; what COCO's own files have besides and others may leave out is filled in.

    Those of no width or height are left out, as of an index.
    """
    content = json.loads(path.read_bytes())
    content["annotations"] = [one for one in content["annotations"] if min(one["bbox"][2:]) > 0]
    for number, one in enumerate(content["annotations"], start=1):
        left, top, width, height = one["bbox"]
        one["id"] = number  # an id of 0 counts as none
        one["iscrowd"] = int(bool(one.get("iscrowd")))
        if one.get("area") is None:
            one["area"] = width * height
        if not one.get("segmentation"):  # of a crowd, say, the whole box
            right, bottom = left + width, top + height
            one["segmentation"] = [[left, top, right, top, right, bottom, left, bottom]]
    truth = COCO()
    truth.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def to_results(
    image_id: int, found: dict[str, Tensor], category_ids: Sequence[int], masks: Tensor | None
) -> list[Result]:
    """Put the objects that were found in an image into COCO's form, the highest score first.

    Args:
        found: ``boxes`` ``(N, 4)`` as left, top, right, bottom in pixels of the file, ``labels`` and ``scores``.
        category_ids: of the classes.
        masks: ``(N, H, W)`` bool.
    """
    corners = found["boxes"].double().cpu()
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1).tolist()
    labels, scores = found["labels"].tolist(), found["scores"].double().cpu().tolist()
    results: list[Result] = [
        {"image_id": image_id, "category_id": int(category_ids[label]), "bbox": box, "score": score}
        for box, label, score in zip(boxes, labels, scores, strict=True)
    ]
    if masks is not None:
        for result, mask in zip(results, masks.byte().cpu().numpy(), strict=True):
            encoded = rle.encode(np.asfortranarray(mask))
            result["segmentation"] = {"size": encoded["size"], "counts": encoded["counts"].decode()}
    return results


def evaluate_results(truth: COCO, results: list[Result], image_ids: Iterable[int], kind: str) -> COCOeval:
    """Compare what was found with what there is.

    Args:
        image_ids: of the images that were looked at.
        kind: ``bbox`` or ``segm``.
    """
    if kind == "segm":  # or pycocotools takes the area, and so small, medium and large, of the box
        results = [{key: value for key, value in result.items() if key != "bbox"} for result in results]
    with contextlib.redirect_stdout(io.StringIO()):
        found = truth.loadRes([dict(result) for result in results]) if results else COCO()
        done = COCOeval(truth, found, kind)
        done.params.imgIds = sorted(image_ids)
        if not results:
            done.cocoDt.dataset = {"images": truth.dataset["images"], "annotations": []}
        done.evaluate()
        done.accumulate()
        done.summarize()
    return done


def twelve(done: COCOeval, kind: str) -> dict[str, float]:
    """Name COCO's numbers, in percent; one without any object to find is left out."""
    named = zip(NAMES, done.stats.tolist(), strict=True)
    return {f"{KINDS[kind]}_{name}": 100 * value for name, value in named if value >= 0}


def of_each_class(done: COCOeval) -> dict[int, float]:
    """Give the average precision of each category by its id, NaN without an object: over all overlaps and sizes."""
    precision = done.eval["precision"][:, :, :, 0, -1]  # overlap, recall, category
    means = {}
    for place, category in enumerate(done.params.catIds):
        known = precision[:, :, place]
        known = known[known > -1]
        means[category] = float(known.mean()) if known.size else float("nan")
    return means
