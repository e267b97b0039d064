"""The report on a detector: each class and size, what is taken for what, and the worst images."""

import json
from pathlib import Path

import numpy as np
import torch
from pycocotools.cocoeval import COCOeval
from torchvision.ops import box_iou

from data.coco import ObjectIndex
from tasks.average_precision import KINDS, Result, evaluate_results, of_each_class, read_truth
from tasks.object_album import CELL, COLUMNS, OVERLAP, SURE, ObjectAlbum, on_crowd
from tasks.report import LOWEST_NAMED, shortened
from utils.contact_sheet import draw_rows
from utils.distributed import from_main, is_main
from utils.drawing import pyplot
from utils.errors import UserError
from utils.files import reason_of
from utils.tables import write_csv

SIZES = {"small": 1, "medium": 2, "large": 3}
"""Names of sizes, and their places among pycocotools' areas."""
NOTHING = "nothing"


def write_report(
    folder: Path, index: ObjectIndex, found: list[Result], kinds: list[str], image_ids: list[int], album: ObjectAlbum
) -> str:
    """Write ``per_class.csv``, ``confusion_matrix.csv``, ``report.png``, ``worst.png``, ``results.json``.

    Args:
        folder: it is made.
        index: of the images.
        found: what was found in all of them; rank 0 has it.
        kinds: ``bbox``, and perhaps ``segm``.
        image_ids: of the images that were looked at.
        album: has the pictures of the worst.

    Returns:
        a line about it. A collective.

    Raises:
        UserError: the folder cannot be written.
    """
    worst, line = album.worst_of_all(), ""
    if is_main():
        truth = read_truth(index.annotation_file)
        done = {kind: evaluate_results(truth, found, image_ids, kind) for kind in kinds}
        classes, category_ids = index.classes, index.category_ids.tolist()
        of_classes = {kind: of_each_class(one) for kind, one in done.items()}
        lowest = sorted((ap, name) for name, ap in zip(classes, of_classes["bbox"].values(), strict=True) if ap == ap)
        line = "lowest AP: " + ", ".join(f"{name} {100 * ap:.1f}" for ap, name in lowest[:3])
        try:
            folder.mkdir(parents=True, exist_ok=True)
            header, rows = per_class(classes, category_ids, done, index)
            write_csv(folder / "per_class.csv", header, rows)
            matrix = confusion(index, found, set(image_ids), category_ids)
            named = [*classes, NOTHING]
            lines = ([name, *row] for name, row in zip(named, matrix.tolist(), strict=True))
            write_csv(folder / "confusion_matrix.csv", ["true class", *named], lines)
            draw(folder / "report.png", done, lowest)
            pictures = {f"{seen.words}  {index.name(seen.number)}": seen.pictures for seen in worst}
            title = "the images with the most errors: objects that are missed, and false alarms"
            (folder / "worst.png").write_bytes(draw_rows(pictures, COLUMNS, title, len(COLUMNS), CELL))
            (folder / "results.json").write_text(json.dumps(found))
        except OSError as problem:
            raise UserError(f"{folder} cannot be written: {reason_of(problem)}; choose another --output") from problem
    return f"{from_main(line)}  -> {folder}"


def per_class(
    classes: list[str], category_ids: list[int], done: dict[str, COCOeval], index: ObjectIndex
) -> tuple[list[str], list[list]]:
    """Make the table of average precision of each class, over all sizes and for each, and its number of objects."""
    counts = np.zeros(len(classes), np.int64)
    for i in range(len(index)):
        objects = index.objects(i)
        counts += np.bincount(objects.labels[~objects.crowd], minlength=len(classes))
    header = ["class", "objects"]
    columns = []
    for kind, one in done.items():
        precision = one.eval["precision"]  # overlap, recall, class, size, most detections
        for name, values in {
            "ap": precision[:, :, :, 0, -1],
            "ap50": precision[:1, :, :, 0, -1],
            **{f"ap_{size}": precision[:, :, :, place, -1] for size, place in SIZES.items()},
        }.items():
            header.append(f"{KINDS[kind]}_{name}")
            columns.append([mean_of_known(values[:, :, i]) for i in range(len(category_ids))])
    return header, [[name, int(count), *row] for name, count, *row in zip(classes, counts, *columns, strict=True)]


def mean_of_known(values: np.ndarray) -> float | str:
    """The mean without what pycocotools marks as unknown; an empty cell where nothing is known."""
    known = values[values > -1]
    return float(known.mean()) if known.size else ""


def confusion(index: ObjectIndex, found: list[Result], image_ids: set[int], category_ids: list[int]) -> np.ndarray:
    """Count what is taken for what, rows true classes, the last row and column nothing, ``(1 + classes,) * 2``.

    A box with a score of at least SURE is compared with the object that it overlaps with the most, by OVERLAP or more.
    What is found on a crowd and is no such object does not count.
    """
    place = {category: i for i, category in enumerate(category_ids)}
    nothing = len(category_ids)
    matrix = np.zeros((nothing + 1, nothing + 1), np.int64)
    of_image: dict[int, list[Result]] = {}
    for one in found:
        if one["score"] >= SURE:
            of_image.setdefault(one["image_id"], []).append(one)
    for i in range(len(index)):
        objects = index.objects(i)
        if objects.image_id not in image_ids:
            continue
        there = ~objects.crowd
        labels, seen = objects.labels[there], np.zeros(int(there.sum()), bool)
        answers = of_image.get(objects.image_id, [])
        boxes = torch.tensor([one["bbox"] for one in answers]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        overlaps = box_iou(boxes, torch.from_numpy(objects.boxes[there])).numpy()
        told = np.array([place[one["category_id"]] for one in answers], np.int64)
        excused = on_crowd(boxes, torch.from_numpy(told), objects).tolist()
        for label, overlap, is_excused in zip(told, overlaps, excused, strict=True):
            free = np.where(seen, 0, overlap)
            best = int(free.argmax()) if len(free) else -1
            hit = best >= 0 and free[best] >= OVERLAP
            if hit:
                seen[best] = True
            if hit or not is_excused:
                matrix[labels[best] if hit else nothing, label] += 1
        np.add.at(matrix, (labels[~seen], nothing), 1)
    return matrix


def draw(path: Path, done: dict[str, COCOeval], lowest: list[tuple[float, str]]) -> None:
    """Draw precision over recall at three overlaps, and the classes with the lowest average precision."""
    with pyplot() as plt:
        figure, axes = plt.subplots(1, 1 + len(done), figsize=(6 * (1 + len(done)), 5.2), layout="constrained")
        for axis, (kind, one) in zip(axes, done.items(), strict=False):
            for place, overlap in ((0, "0.50"), (5, "0.75"), (8, "0.90")):
                precision = np.where(one.eval["precision"] > -1, one.eval["precision"], np.nan)[place, :, :, 0, -1]
                known = precision[:, ~np.isnan(precision).all(axis=0)]
                mean = known.mean(axis=1) if known.size else np.zeros(len(precision))
                axis.plot(one.params.recThrs, mean, label=f"IoU {overlap}: AP {100 * mean.mean():.1f}")
            axis.set(xlabel="recall", ylabel="precision, mean of classes", xlim=(0, 1), ylim=(0, 1.02))
            axis.set_title(f"{'boxes' if kind == 'bbox' else 'masks'}: AP {100 * one.stats[0]:.2f}")
            axis.legend(loc="lower left")
            axis.grid(alpha=0.3)
        shown = lowest[:LOWEST_NAMED][::-1]
        axes[-1].barh(range(len(shown)), [100 * ap for ap, _ in shown], color="#8ec5f4")
        axes[-1].set_yticks(range(len(shown)), [shortened(name) for _, name in shown])
        axes[-1].set(title=f"the {len(shown)} classes with the lowest AP of boxes", xlabel="AP", xlim=(0, 100))
        axes[-1].grid(alpha=0.3)
        figure.savefig(path, dpi=110)
        plt.close(figure)
