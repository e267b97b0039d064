"""Predict the classes of images.

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
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from data.augmentation import DeviceStage, Plan, build_eval_transform
from data.decoding import build_decoding, decode, read_file, tensor_to_pil
from data.files import check_is_file, describe_kinds
from data.files import find_images as images_below
from engine.model import check_image_size
from engine.precision import choose_precision
from tasks.classification import build_views, mean_of_probabilities
from tasks.trained import TrainedModel, load_trained
from utils.errors import Parser, UserError, say_error
from utils.files import temporary_name, write_whole
from utils.names import drawable, font_file, harmless, printable
from utils.processes import CTRL_C_STATUS
from utils.surroundings import a_path, expanded, settle

KEYS = ("class_index", "class", "probability")
ON_SHEET, COLUMNS, BARS = 60, 8, 5
SIDE, PAD, LINE = 224, 12, 22  # pixels of an image on the sheet, of the space around it, of a line of text or a bar


def find_images(paths: list[Path]) -> tuple[list[Path], Counter[str]]:
    """The files among ``paths``; of each folder the images at any depth, sorted, and how many others of each type.

    Raises:
        UserError: there is no such file or no image in a folder, or something is no file (see :mod:`data.files`).
    """
    images, left_out = [], Counter()
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


def predict(trained: TrainedModel, paths: list[Path], given: Namespace) -> Iterator[tuple[dict, torch.Tensor | None]]:
    """What ``--format json`` says of each image, in order, and the pixels that the model saw."""
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
                    yield {"file": file, "predictions": [dict(zip(KEYS, x, strict=True)) for x in ranked]}, image


def show(records: list[dict], form: str, out: io.TextIOBase) -> None:
    """Write them; a table is fitted to the width of a terminal, and elsewhere has tabs between its cells."""
    sound = [(record["file"], record["predictions"]) for record in records if "predictions" in record]
    table = Table("file", "class", "other classes", box=None, padding=(0, 2, 0, 0))
    if form == "json":
        print(json.dumps(records, indent=1, ensure_ascii=False), file=out)
    elif form == "csv":
        lines = csv.writer(out, lineterminator="\n")
        lines.writerow(["file", "rank", *KEYS])
        for file, named in sound:
            lines.writerows([*map(harmless, (file, rank, *p.values()))] for rank, p in enumerate(named, start=1))
    else:
        for file, named in sound:
            cells = [printable(x) for x in (file, *(f"{p['class']} {100 * p['probability']:.1f} %" for p in named))]
            table.add_row(Text(cells[0], overflow="fold"), Text(cells[1], "green"), Text("   ".join(cells[2:]), "dim"))
            if not out.isatty():
                print(*cells, sep="\t", file=out)
        if out.isatty():
            Console(file=out).print(table)


def draw_sheet(drawn: list[tuple[dict, torch.Tensor]], title: str) -> bytes:
    """A PNG with a card for each image: the file, what the model saw, and a bar for each of the first classes."""
    rows = max(-(-len(drawn) // COLUMNS), round((len(drawn) / 2) ** 0.5))
    columns = -(-len(drawn) // rows)
    width, height = SIDE + 2 * PAD, SIDE + (1 + len(drawn[0][0]["predictions"][:BARS])) * LINE + 5 * PAD // 2
    size = columns * (width + PAD) + PAD, rows * (height + PAD) + LINE + 2 * PAD
    draw, font = ImageDraw.Draw(sheet := Image.new("RGB", size, "#eef1f5")), ImageFont.truetype(font_file(), 12)

    def write(x: float, y: int, text: str, room: float, cut: slice = slice(-1)) -> None:
        shown = text = drawable(text)
        while draw.textlength(shown, font) > room:
            text = text[cut]
            shown = f"{text}…" if cut.stop else f"…{text}"
        draw.text((x, y + LINE / 2 - 2), shown, "#1f2937", font, anchor="lm")

    write(PAD, PAD, title, size[0] - 2 * PAD)
    for number, (record, image) in enumerate(drawn):
        x, y = number % columns * (width + PAD) + 2 * PAD, number // columns * (height + PAD) + LINE + 3 * PAD
        draw.rounded_rectangle((x - PAD, y - PAD, x - PAD + width, y - PAD + height), 8, "white")
        write(x, y - 2, "/".join(Path(record["file"]).parts[-2:]), SIDE, cut=slice(1, None))
        picture, larger = tensor_to_pil(image), max(image.shape[1:])
        scaling = Image.Resampling.NEAREST if larger <= SIDE else Image.Resampling.LANCZOS
        shown = [round(side * (SIDE // larger or SIDE / larger)) for side in picture.size]
        sheet.paste(picture.resize(shown, scaling), (x + (SIDE - shown[0]) // 2, y + LINE))
        y += LINE + SIDE + PAD // 2
        for top, p in zip(range(y, y + BARS * LINE, LINE), record["predictions"], strict=False):
            for share, colour in ((1, "#f1f4f8"), (p["probability"], "#8ec5f4" if top == y else "#d3e6f8")):
                draw.rounded_rectangle((x, top, x + share * SIDE, top + LINE - 4), 4, colour)
            percent = f"{100 * p['probability']:.1f} %"
            left = x + SIDE - 6 - draw.textlength(percent, font)
            write(left, top, percent, SIDE)
            write(x + 6, top, p["class"], left - x - 12)
    sheet.save(out := io.BytesIO(), "PNG", optimize=True)
    return out.getvalue()


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """What to say of a file that cannot be written."""
    try:
        if path.exists() and not path.is_file():
            raise OSError(0, "it is not a file")
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; choose another place") from error


def check_writable(path: Path) -> None:
    """Find out whether a file can be written, and leave everything as it is."""
    with naming(path):
        temporary = temporary_name(path)
        temporary.touch()
        temporary.unlink()


def write_file(path: Path, data: bytes) -> None:
    """Replace the file in one step."""
    with naming(path):
        if not path.parent.is_dir():
            raise OSError(0, "there is no such folder")
        write_whole(path, data)


def parse(arguments: list[str]) -> Namespace:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    parser = Parser(prog="predict.py", description=__doc__, allow_abbrev=False)
    flag = parser.add_argument
    flag("images", metavar="IMAGE-OR-FOLDER", nargs="+", type=a_path, help="images, or folders with them at any depth")
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
    given = parser.parse_args(arguments)
    if min(given.top, given.batch_size) < 1:
        raise UserError("--top and --batch-size must be at least 1")
    return given


def run(given: Namespace) -> int:
    (paths, left_out), device = find_images(given.images), torch.device(given.device)
    records, drawn, screen = [], [], Console(stderr=True)
    for path in filter(None, (given.to, given.sheet)):
        check_writable(path)  # after an hour it would be late to find out
    trained = load_trained(given.checkpoint, device, given.model, given.image_size, given.weights)
    for line in trained.notes:
        screen.print(Text(printable(line)), soft_wrap=True)
    name = trained.config.MODEL.NAME
    check_image_size(trained.model, trained.config.DATA.IMG_SIZE, device)
    answers = predict(trained, paths, given)
    for record, image in track(answers, "images", len(paths), console=screen, disable=not sys.stderr.isatty()):
        records.append(record)
        if image is None:
            screen.print(Text(printable(f"skipped image {record['file']}: {record['error']}")), soft_wrap=True)
        elif given.sheet and len(drawn) < ON_SHEET:
            drawn.append((record, image))
    if left_out:
        screen.print(Text(f"left out, being no images: {describe_kinds(left_out)}"), soft_wrap=True)
    sound = sum("predictions" in record for record in records)
    if drawn:
        left_out = f" ({sound - len(drawn):,} more are left out)" if sound > len(drawn) else ""
        write_file(given.sheet, draw_sheet(drawn, f"{name}, {len(drawn)} images{left_out}"))
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    show(records, given.format, out := io.StringIO() if given.to else sys.stdout)
    if given.to:
        write_file(given.to, out.getvalue().encode("utf-8", "backslashreplace"))
    return 0 if sound == len(records) else 1


def main(arguments: list[str]) -> int:
    """Run the command line; returns the exit status."""
    settle()
    try:
        return run(parse(arguments))
    except (UserError, torch.OutOfMemoryError) as error:
        say_error(error)
        return 2
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return CTRL_C_STATUS


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # "| head" ends it
    sys.exit(main(sys.argv[1:]))
