"""Draw what a trained model looks at: ``python scripts/attention.py --checkpoint FILE IMAGE ...``.

Into the folder --to go: for each image the groups that tokens attend in and their attention (CrossFormers); and for all
the position bias of each head (position_bias.png) and Grad-CAM of the likeliest classes (grad_cam.png; of classifiers).
"""

import argparse
import re
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from config import CLASSES
from engine.looking import Seen, explain, see
from engine.model import check_image_size
from engine.photographs import check_pictures, names_below
from models.crossformer.attention_maps import AttentionMap, attention_maps, blocks_of, position_bias_maps
from models.crossformer.embedding import PATCH_STRIDE, REDUCTION_STRIDE
from reports.looking import Group, draw_attention, draw_biases, draw_evidence
from tasks.trained import TrainedModel, load_trained
from utils.command import Parser, run_command
from utils.errors import UserError, did_you_mean
from utils.files import write_whole, writing
from utils.names import printable
from utils.surroundings import a_path, expanded

TOP, MOST = 3, 20
"""Classes of Grad-CAM where none is asked for; and images that are drawn at most."""
MIDDLE = (0.5, 0.5)


def a_point(text: str) -> tuple[float, float]:
    y, x = map(float, text.split(","))
    if not (0 <= y <= 1 and 0 <= x <= 1):
        raise ValueError
    return y, x


a_point.__name__ = "point: two numbers from 0 to 1, as 0.5,0.25"  # which is how argparse names what is wrong


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="scripts/attention.py", description=__doc__, allow_abbrev=False)
    flag = parser.add_argument
    flag("images", metavar="IMAGE", nargs="+", type=a_path, help=f"image files, at most {MOST}")
    flag("--checkpoint", metavar="FILE", type=expanded, required=True, help="this project's, a published one or timm's")
    flag("--at", metavar="Y,X", type=a_point, action="append", help="a token, by shares of height and width (0.5,0.5)")
    flag("--class", dest="classes", metavar="NAME", action="append", help=f"for Grad-CAM, not the likeliest {TOP}")
    flag("--to", metavar="DIR", type=a_path, default=Path("attention"), help="where the pictures go (%(default)s)")
    flag("--model", metavar="NAME", default="", help="the timm name, for weights that do not tell")
    flag("--image-size", metavar="N", type=int, default=0, help="in pixels; 0 is that of the training")
    flag("--weights", choices=["auto", "model", "ema"], default="auto", help="auto: the moving average if there is one")
    given = parser.parse_args(arguments)
    given.images = list(dict.fromkeys(given.images))
    if len(given.images) > MOST:
        raise UserError(f"{len(given.images)} images are more than the {MOST} that are drawn at a time")
    return given


def number_of(name: str, trained: TrainedModel) -> int:
    for names in (trained.classes, trained.class_ids):
        if name in names:
            return names.index(name)
    raise UserError(f"--class {name}: the model has no such class{did_you_mean(name, trained.classes)}")


def stages_of(maps: list[AttentionMap]) -> dict[int, list[AttentionMap]]:
    """The blocks of each stage, counted from 0."""
    stages: dict[int, list[AttentionMap]] = {}
    for one in maps:
        found = re.search(r"layers\.(\d+)\.blocks", one.block)
        assert found, one.block
        stages.setdefault(int(found[1]), []).append(one)
    return stages


def pair_of(blocks: list) -> list:
    """The last block of a stage with short distance, and the last with long; None where there is none."""
    return [next(reversed(blocks[parity::2]), None) for parity in (0, 1)]


def to_group(stage: int, is_long: bool, one: AttentionMap | None) -> Group | None:
    if one is None:
        return None
    number = int(one.block.rpartition(".")[2]) + 1
    distance = "long distance" if is_long else "short distance"
    apart = f", interval {one.interval}" if one.interval > 1 else ""
    whole = " (the whole map)" if one.group.all() else ""
    title = f"stage {stage + 1}, block {number}: {distance}\n{one.rows} x {one.columns} tokens{apart}{whole}"
    return Group(title, one.token, one.group.numpy(), one.weights.mean(0).numpy())


def attention_of(trained: TrainedModel, seen: Seen, points: list[tuple[float, float]], name: str) -> bytes:
    rows, strides = [], []
    for maps in attention_maps(trained.model, seen.image, points):
        for stage, blocks in stages_of(maps).items():
            rows.append([to_group(stage, bool(place), one) for place, one in enumerate(pair_of(blocks))])
            strides.append(PATCH_STRIDE * REDUCTION_STRIDE**stage)
    return draw_attention(seen.picture, rows, strides, f"{name}: what a token (red) attends to, mean of all heads")


def biases_of(trained: TrainedModel) -> bytes:
    stages: dict[str, list] = {}
    for name, block in blocks_of(trained.model).items():
        stages.setdefault(name.partition("layers.")[2].partition(".")[0], []).append(block)
    rows = {}
    for stage, blocks in stages.items():
        for is_long, block in enumerate(pair_of(blocks)):
            if block is not None:
                steps = f"long distance, interval {block.interval}" if is_long else "short distance"
                rows[f"stage {int(stage) + 1}, {steps}"] = position_bias_maps(block).numpy()
    return draw_biases(rows, f"{trained.config.MODEL.NAME}: position bias of each head by offset, (0, 0) in the middle")


def draw(arguments: list[str]) -> None:
    given = parse(arguments)
    check_pictures(given.images)
    trained = load_trained(given.checkpoint, torch.device("cpu"), given.model, given.image_size, given.weights)
    classifies, attends = trained.config.TASK == CLASSES, bool(blocks_of(trained.model))
    name = trained.config.MODEL.NAME
    if given.image_size and not classifies:
        raise UserError("--image-size is for classification; TEST.RESIZE of its training says how others see an image")
    check_image_size(trained.model, trained.config.DATA.IMG_SIZE, torch.device("cpu"))
    if not (classifies or attends):
        raise UserError(f"MODEL.NAME {name} is no classifier and no CrossFormer: there is nothing to draw of it here")
    numbers = [number_of(wanted, trained) for wanted in given.classes or []]
    seen = {path: see(trained, path) for path in given.images}

    def keep(picture: str, content: bytes) -> None:
        with writing(given.to / picture, "choose another --to"):
            (given.to / picture).parent.mkdir(parents=True, exist_ok=True)
            write_whole(given.to / picture, content)
        print(printable(str(given.to / picture)))

    for line in trained.notes:
        print(printable(line))
    if attends:
        for below, (path, image) in zip(names_below(given.images), seen.items(), strict=True):
            content = attention_of(trained, image, given.at or [MIDDLE], path.name)
            keep(str(below.with_name(f"{below.stem}_attention.png")), content)
        keep("position_bias.png", biases_of(trained))
    else:
        print(f"{name} is no CrossFormer: its attention is not drawn")
    if classifies:
        rows = []
        for path, image in seen.items():
            found = explain(trained, image, numbers, TOP)
            answers = [(f"{one.name} {100 * one.probability:.1f} %", one.places.numpy()) for one in found]
            rows.append((path.name, image.picture, answers))
        keep("grad_cam.png", draw_evidence(rows))
    else:
        print("Grad-CAM is for classifiers: it is not drawn")


main = partial(run_command, draw)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
