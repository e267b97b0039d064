"""Pictures of what a detector finds: of the first images, and of those that it gets wrong most."""

import heapq
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou

from data.coco import ObjectIndex, Objects
from data.decoding import tensor_to_pil
from tasks.object_overlay import draw_objects
from tasks.objects import Found
from utils.contact_sheet import draw_rows
from utils.distributed import gathered

SHOWN, CELL = 8, 384
"""Images in a sheet, and the pixels of the longest side of each."""
COLUMNS = ["truth", "found"]
SURE = 0.5
"""What is found with a lower score is neither drawn nor counted as a false alarm."""
OVERLAP = 0.5


class Seen(NamedTuple):
    """An image that was evaluated.

    Attributes:
        errors: objects that are missed, and false alarms.
        number: its place in the index.
        words: about the errors.
        pictures: with the objects that there are, and with those that were found.
    """

    errors: int
    number: int
    words: str
    pictures: list[Image.Image]


class ObjectAlbum:
    """Keeps pictures of the first images of this rank, and of those with the most errors.

    Args:
        index: of the images.
        mean, std: with which they were normalised.
        classes: their names.
        worst: whether those with the most errors are wanted.
    """

    def __init__(self, index: ObjectIndex, mean: list[float], std: list[float], classes: list[str], worst: bool):
        self.index, self.classes, self.keep_worst = index, classes, worst
        self.mean, self.std = (torch.tensor(x)[:, None, None] for x in (mean, std))
        self.first: list[Seen] = []
        self.worst: list[tuple[int, int, Seen]] = []

    def add(self, number: int, image: Tensor, found: Found) -> None:
        """Take an image ``(3, h, w)`` as the model has seen it, and what was found in its own pixels."""
        is_first = len(self.first) < SHOWN // 2
        if not (is_first or self.keep_worst):
            return
        objects, sure = self.index.objects(number), found.above(SURE)
        missed, false = count_errors(objects, sure)
        errors = missed + false
        is_bad = self.keep_worst and (len(self.worst) < SHOWN or errors > self.worst[0][0])
        if not (is_first or is_bad):
            return
        seen = Seen(errors, number, f"{missed} missed, {false} false", self._draw(image, objects, sure))
        if is_first:
            self.first.append(seen)
        if is_bad:
            heapq.heappush(self.worst, (errors, -number, seen))
            if len(self.worst) > SHOWN:
                heapq.heappop(self.worst)

    def _draw(self, image: Tensor, objects: Objects, found: Found) -> list[Image.Image]:
        pixels = ((image.cpu() * self.std + self.mean) * 255).round().clamp(0, 255).byte()
        photograph = tensor_to_pil(pixels).resize((objects.size[1], objects.size[0]))
        there = np.flatnonzero(~objects.crowd)
        masks = objects.masks(there.tolist()) > 0 if found.masks is not None else None
        truth = draw_objects(photograph, objects.boxes[there], objects.labels[there], self.classes, None, masks)
        parts = [None if part is None else part.cpu().numpy() for part in found]
        answer = draw_objects(photograph, parts[0], parts[1], self.classes, parts[2], parts[3])  # type: ignore[arg-type]
        for picture in (truth, answer):
            picture.thumbnail((CELL, CELL))
        return [truth, answer]

    def sheet(self) -> bytes:
        """Draw the first images."""
        rows = {f"{seen.number}: {seen.words}": seen.pictures for seen in self.first}
        heading = f"validation images, by their numbers; what is found with a score of {100 * SURE:.0f} % or more"
        return draw_rows(rows, COLUMNS, heading, len(COLUMNS), CELL)

    def worst_of_all(self) -> list[Seen]:
        """The images with the most errors of all ranks. A collective."""
        everyones = gathered([seen for _, _, seen in self.worst])
        return heapq.nsmallest(
            SHOWN, (seen for mine in everyones for seen in mine), key=lambda seen: (-seen.errors, seen.number)
        )


def count_errors(objects: Objects, found: Found) -> tuple[int, int]:
    """Count the objects that are missed and what was found where there is none; crowds are neither."""
    boxes, labels = torch.from_numpy(objects.boxes), torch.from_numpy(objects.labels)
    there = torch.from_numpy(~objects.crowd)
    overlap = box_iou(found.boxes.float().cpu(), boxes) * (found.labels.cpu()[:, None] == labels)
    excused = on_crowd(found.boxes.float().cpu(), found.labels.cpu(), objects)
    left, false = there.clone(), 0
    for row, is_excused in zip(overlap, excused.tolist(), strict=True):  # the highest score first, each object once
        candidates = torch.where(left, row, torch.zeros(()))
        best = int(candidates.argmax()) if len(candidates) else 0
        if len(candidates) and candidates[best] >= OVERLAP:
            left[best] = False
        elif not is_excused:
            false += 1
    return int(left.sum()), false


def on_crowd(boxes: Tensor, labels: Tensor, objects: Objects) -> Tensor:
    """Tell which boxes ``(n, 4)`` of classes ``(n,)`` touch a crowd of their class, so are no false alarms; bool."""
    crowd = objects.crowd
    touching = box_iou(boxes, torch.from_numpy(objects.boxes[crowd])) > 0
    return (touching & (labels[:, None] == torch.from_numpy(objects.labels[crowd]))).any(dim=1)
