"""Predict the classes of images or of their pixels, or find the objects in them; or serve a page that does so.

Exit status 0: all are predicted; 1: some could not be decoded and were skipped; 2: see the error.
"""

import csv
import io
import json
import os
import signal
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TextIO, cast

import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from config import CLASSES, OBJECTS, PIXELS
from data.augmentation import DeviceStage, Plan, build_eval_transform
from data.decoding import build_decoding, decode, read_file, tensor_to_pil
from data.files import check_is_file, describe_kinds
from data.files import find_images as images_below
from engine.detect import KEYS as KEYS_OF_OBJECTS
from engine.detect import detect
from engine.exported import is_exported, load_exported
from engine.model import check_image_size
from engine.precision import choose_precision
from engine.segment import KEYS as KEYS_OF_PIXELS
from engine.segment import segment
from engine.serving import serve
from tasks.classification import build_views, mean_of_probabilities
from tasks.trained import TrainedModel, load_trained
from utils.command import Parser, run_command
from utils.contact_sheet import Card, draw_cards
from utils.errors import UserError
from utils.files import write_whole, writing
from utils.names import harmless, printable
from utils.surroundings import a_path, expanded

KEYS = ("class_index", "class", "probability")
COLUMNS = {CLASSES: KEYS, PIXELS: KEYS_OF_PIXELS, OBJECTS: KEYS_OF_OBJECTS}
ON_SHEET = 60
REMEDY = "choose another place"
PORT = 8000


def find_images(paths: list[Path]) -> tuple[list[Path], Counter[str]]:
    """The files among ``paths``; of each folder the images at any depth, sorted, and how many others of each type.

    Raises:
        UserError: there is no such file or no image in a folder, or something is no file (see :mod:`data.files`).
    """
    images: list[Path] = []
    left_out: Counter[str] = Counter()
    for path in paths:
        if not os.path.lexists(path):
            raise UserError(f"{path} is no file and no folder of images; give images or their folders")
        if not os.path.isdir(path):
            check_is_file(path)
            images.append(path)
            continue
        found = images_below(path)
        if not found.images:
            but = f" but {describe_kinds(found.left_out)}" if found.left_out else ""
            raise UserError(f"{path} is a folder without an image{but}; give images or their folders")
        images += sorted(path / name for name in found.images)
        left_out += found.left_out
    return images, left_out


def predict(trained: TrainedModel, paths: list[Path], given: Namespace) -> Iterator[tuple[dict, Image.Image | None]]:
    """What ``--format json`` says of each image, in order, and what the model saw of it."""
    config, classes, device = trained.config, trained.classes, torch.device(given.device)
    precision, transform, views = choose_precision(config, device), build_eval_transform(config), build_views(config)
    decoding, stage = build_decoding(config), DeviceStage(device, config.DATA.MEAN, config.DATA.STD)

    def prepare(path: Path) -> torch.Tensor | str:
        """As in evaluation; or why that cannot be done."""
        try:
            return transform(decode(read_file(path), decoding))[0]
        except Exception as error:  # decoders fail in arbitrary ways on arbitrary bytes
            return getattr(error, "strerror", None) or str(error) or type(error).__name__

    batches = [paths[start : start + given.batch_size] for start in range(0, len(paths), given.batch_size)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        ready = pool.map(prepare, batches[0])
        for files, following in zip(batches, [*batches[1:], []], strict=True):
            images, ready = list(ready), pool.map(prepare, following)  # while the model is at work
            if sound := [image for image in images if not isinstance(image, str)]:
                with torch.inference_mode(), precision.autocast():
                    seen = views(stage(torch.stack(sound), [Plan()] * len(sound)))
                    logits = mean_of_probabilities([trained.model(view).float() for view in seen])
                best = logits.softmax(1).topk(min(given.top, len(classes)))
                answers = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            for file, image in zip(map(str, files), images, strict=True):
                if isinstance(image, str):
                    yield {"file": file, "error": image}, None
                else:
                    ranked = ((i, classes[i], float(f"{p:.6g}")) for i, p in zip(*next(answers), strict=True))
                    yield (
                        {"file": file, "predictions": [dict(zip(KEYS, x, strict=True)) for x in ranked]},
                        tensor_to_pil(image),
                    )


def named_part(prediction: dict[str, Any]) -> tuple[str, float]:
    """The name of the class, and its probability, score or share of the pixels."""
    _, name, part, *_ = prediction.values()
    return name, part


def show(records: list[dict], task: str, form: str, out: TextIO) -> None:
    """Write them; a table is fitted to the width of a terminal, and elsewhere has tabs between its cells."""
    sound = [record for record in records if "predictions" in record]
    marked = any("right" in record for record in sound)
    table = Table("file", "class", *["is"] * marked, "other classes", box=None, padding=(0, 2, 0, 0))
    if form == "json":
        print(json.dumps(records, indent=1, ensure_ascii=False), file=out)
    elif form == "csv":
        lines = csv.writer(out, lineterminator="\n")
        lines.writerow(["file", "rank", *COLUMNS[task], *["truth"] * marked])
        for record in sound:
            file, truth = record["file"], [record.get("truth", "")] * marked
            for rank, prediction in enumerate(record["predictions"], start=1):
                lines.writerow([*map(harmless, (file, rank, *prediction.values(), *truth))])
    else:
        for record in sound:
            named = [f"{name} {100 * part:.1f} %" for name, part in map(named_part, record["predictions"])]
            cells = [*map(printable, (record["file"], *(named or ["nothing"])))]
            truth = [printable(record.get("truth", ""))] * marked
            colour = "green" if record.get("right", True) else "red"
            first = Text(cells[0], overflow="fold"), Text(cells[1], colour), *(Text(name, colour) for name in truth)
            table.add_row(*first, Text("   ".join(cells[2:]), "dim"))
            if not out.isatty():
                print(*cells, *truth, sep="\t", file=out)
        if out.isatty():
            Console(file=out).print(table)


def check_writable(path: Path) -> None:
    """Find out whether a file can be written, and leave everything as it is."""
    with writing(path, REMEDY):
        if path.exists() and not path.is_file():
            raise OSError(0, "it is not a file")
        TemporaryFile(dir=path.parent).close()


def parse(arguments: list[str]) -> Namespace:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser = Parser(prog="predict.py", description=__doc__, allow_abbrev=False)
    flag = parser.add_argument
    flag("images", metavar="IMAGE-OR-FOLDER", nargs="*", type=a_path, help="images, or folders with them at any depth")
    flag("--checkpoint", metavar="FILE", type=expanded, required=True, help="this project's, a published one or timm's")
    flag("--format", choices=["table", "csv", "json"], default="table", help="of the output (%(default)s)")
    flag("--to", metavar="FILE", type=a_path, help="write the output there")
    flag("--top", metavar="N", type=int, default=5, help="classes of each image (%(default)s)")
    flag("--batch-size", metavar="N", type=int, default=32, help="images at a time (%(default)s)")
    flag("--image-size", metavar="N", type=int, default=0, help="in pixels; 0 is that of the training")
    flag("--model", metavar="NAME", default="", help="the timm name, for weights that do not tell")
    flag("--weights", choices=["auto", "model", "ema"], default="auto", help="auto: the moving average if there is one")
    flag("--device", choices=devices, default=devices[-1], help="of this machine's (%(default)s)")
    flag("--sheet", metavar="FILE.png", type=a_path, help="draw the images with their predictions")
    flag(
        "--overlay",
        metavar="DIR",
        type=a_path,
        help="segmentation: paint the classes over images, write label maps; detection: draw and list the objects",
    )
    flag("--serve", metavar="PORT", nargs="?", type=int, const=PORT, help=f"a page to drop images on, here ({PORT})")
    flag("--score", metavar="P", type=float, default=0.5, help="detection: leave out less sure objects (%(default)s)")
    given = parser.parse_args(arguments)
    if min(given.top, given.batch_size) < 1:
        raise UserError("--top and --batch-size must be at least 1")
    if given.serve is None and not given.images:
        parser.error("the following arguments are required: IMAGE-OR-FOLDER (or --serve)")
    if given.serve is not None:
        own: dict[str, Any] = {"images": [], "to": None, "sheet": None, "overlay": None, "format": "table"}
        if others := [name for name, nothing in own.items() if getattr(given, name) != nothing]:
            raise UserError(f"--serve shows what comes to its page: leave out {', '.join(others)}")
    if not 0 <= given.score <= 1:
        raise UserError(f"--score {given.score}: must be from 0 to 1")
    return given


def load(given: Namespace, device: torch.device) -> TrainedModel:
    """The model that the command line names, exported or not."""
    if not is_exported(given.checkpoint):
        return load_trained(given.checkpoint, device, given.model, given.image_size, given.weights)
    if given.image_size or given.model or given.weights != "auto":
        raise UserError(f"{given.checkpoint} is one network of one size: leave out --image-size, --model and --weights")
    given.device = "cpu"
    return load_exported(given.checkpoint)


def true_class(path: str, trained: TrainedModel) -> str | None:
    """The class that an image's folder names, in words; None where it names none."""
    folder = Path(path).resolve().parent.name
    for names in (trained.class_ids, trained.classes):
        if folder in names:
            return trained.classes[names.index(folder)]
    return None


def mark(record: dict[str, Any], trained: TrainedModel) -> None:
    """Note in a record whether its first class is the one that the image's folder names."""
    truth = true_class(record["file"], trained) if record.get("predictions") else None
    if truth is not None:
        record |= {"truth": truth, "right": record["predictions"][0]["class"] == truth}


def describe_marks(records: list[dict[str, Any]]) -> str:
    """How many are right; empty where no folder names a class."""
    marks = [record["right"] for record in records if "right" in record]
    others = len(records) - len(marks)
    but = f"; {others:,} are in folders that name no class" if others else ""
    right = f"{sum(marks):,} of {len(marks):,} are right ({100 * sum(marks) / max(len(marks), 1):.2f} %)"
    return f"{right}, as their folders are called{but}" if marks else ""


def load_checked(given: Namespace, device: torch.device, screen: Console) -> TrainedModel:
    """The same, fit for what is asked of it."""
    trained = load(given, device)
    for line in trained.notes:
        screen.print(Text(printable(line)), soft_wrap=True)
    if given.image_size and trained.config.TASK != CLASSES:
        raise UserError("--image-size is for classification; TEST.RESIZE of its training says how others see an image")
    if not is_exported(given.checkpoint):
        check_image_size(trained.model, trained.config.DATA.IMG_SIZE, device)
    return trained


def answer(
    trained: TrainedModel, paths: list[Path], given: Namespace, device: torch.device, pictures: int
) -> Iterator[tuple[dict, Image.Image | None]]:
    """What ``--format json`` says of each image, in order, and a picture; of objects for so many images."""
    if trained.config.TASK == OBJECTS:
        return detect(trained, paths, device, given.score, given.overlay, pictures)
    if trained.config.TASK == PIXELS:
        return segment(trained, paths, device, given.top, given.overlay)
    return predict(trained, paths, given)


def serve_page(given: Namespace) -> int:
    """Answer what is dropped on a page, until Ctrl-C."""
    device = torch.device(given.device)
    trained = load_checked(given, device, Console(stderr=True))

    def of_file(path: Path) -> tuple[dict, Image.Image | None]:
        ((record, picture),) = answer(trained, [path], given, device, pictures=1)
        if "predictions" in record:
            record["predictions"] = [*map(named_part, record["predictions"])]
        return record, None if trained.config.TASK == CLASSES else picture

    serve(of_file, f"{trained.config.MODEL.NAME} of {given.checkpoint}", given.serve)
    return 0


def predict_images(arguments: list[str]) -> int:
    """Do what the command line asks for; returns the exit status."""
    given = parse(arguments)
    if given.serve is not None:
        return serve_page(given)
    (paths, left_out), device = find_images(given.images), torch.device(given.device)
    records, screen = [], Console(stderr=True)
    drawn: list[Card] = []
    for path in filter(None, (given.to, given.sheet)):
        check_writable(path)  # after an hour it would be late to find out
    trained = load_checked(given, device, screen)
    name, task = trained.config.MODEL.NAME, trained.config.TASK
    if given.overlay and task == CLASSES:
        raise UserError(
            f"--overlay is for segmentation and detection, and {given.checkpoint} tells the classes of whole images"
        )
    answers = answer(trained, paths, given, device, pictures=ON_SHEET if given.sheet else 0)
    for record, image in track(answers, "images", len(paths), console=screen, disable=not sys.stderr.isatty()):
        records.append(record)
        if task == CLASSES:
            mark(record, trained)
        if "error" in record:
            screen.print(Text(printable(f"skipped image {record['file']}: {record['error']}")), soft_wrap=True)
        elif given.sheet and image and len(drawn) < ON_SHEET:
            named = [*map(named_part, record["predictions"])]
            drawn.append(Card(record["file"], image, named, record.get("truth", ""), record.get("right")))
    if left_out:
        screen.print(Text(f"left out, being no images: {describe_kinds(left_out)}"), soft_wrap=True)
    if marks := describe_marks(records):
        screen.print(Text(printable(marks)), soft_wrap=True)
    sound = sum("predictions" in record for record in records)
    if drawn:
        more = f" ({sound - len(drawn):,} more are left out)" if sound > len(drawn) else ""
        with writing(given.sheet, REMEDY):
            write_whole(given.sheet, draw_cards(drawn, f"{name}, {len(drawn)} images{more}"))
    cast(io.TextIOWrapper, sys.stdout).reconfigure(encoding="utf-8", errors="backslashreplace")
    out: Any = io.StringIO() if given.to else sys.stdout
    show(records, task, given.format, out)
    if given.to:
        with writing(given.to, REMEDY):
            write_whole(given.to, out.getvalue().encode("utf-8", "backslashreplace"))
    return 0 if sound == len(records) else 1


main = partial(run_command, predict_images)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # "| head" ends it
    sys.exit(main(sys.argv[1:]))
