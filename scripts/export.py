"""Export a trained model: ``python scripts/export.py --checkpoint FILE --format onnx``.

What was written is loaded again and must give the same logits as the model; only then does it get its name.
"""

import argparse
import re
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.export import FORMATS, GRAPHS, SUFFIXES, Wanted, export
from models.crossformer.embedding import MIN_IMAGE_SIZE
from models.pretrained import locate
from tasks.trained import load_trained
from utils.command import Parser, run_command
from utils.errors import UserError
from utils.image_size import height_and_width
from utils.surroundings import a_path, expanded


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="scripts/export.py", description=__doc__.partition(":")[0], allow_abbrev=False)
    parser.add_argument("--checkpoint", metavar="FILE", type=expanded, required=True, help="the trained model")
    parser.add_argument("--format", choices=FORMATS, required=True, help="what to write")
    parser.add_argument("--to", metavar="PATH", type=a_path, help="a file, or for hf a folder; beside the checkpoint")
    parser.add_argument("--image-size", metavar="N", type=int, nargs="+", help="or height and width; that of the run")
    parser.add_argument("--dynamic-batch", action="store_true", help="take batches of any size, not of 1 alone")
    parser.add_argument("--dynamic-size", action="store_true", help="take images of other sizes too")
    parser.add_argument("--int8", action="store_true", help="compute in int8, calibrated on validation images")
    parser.add_argument("--data-path", metavar="DIR", type=a_path, help="for --int8; where the run had its data")
    parser.add_argument("--license", metavar="ID", default="", help="that of the weights, for the card of hf")
    parser.add_argument("--model", metavar="NAME", default="", help="timm name, for weights that do not say theirs")
    which = ["auto", "model", "ema"]
    parser.add_argument("--weights", choices=which, default="auto", help="auto: the moving average if there is one")
    given = parser.parse_args(arguments)
    if given.image_size and (len(given.image_size) > 2 or min(given.image_size) < MIN_IMAGE_SIZE):
        parser.error(f"--image-size takes one number or two, each at least {MIN_IMAGE_SIZE}")
    for flag, of in (("dynamic_batch", "any batch"), ("dynamic_size", "any size")):
        if getattr(given, flag) and given.format not in GRAPHS:
            name = f"--{flag.replace('_', '-')}"
            parser.error(f"{name} is for {' and '.join(GRAPHS)}; {given.format} takes {of} as it is")
    if given.int8 and given.format != "onnx":
        parser.error("--int8 is for --format onnx")
    if given.data_path and not given.int8:
        parser.error("--data-path is for --int8, which looks at validation images")
    if given.license and given.format != "hf":
        parser.error("--license is for --format hf, which writes a card")
    if not re.fullmatch(r"([a-z0-9][a-z0-9.+-]*)?", given.license):
        parser.error(f"--license {given.license!r}: give it as the hub does, for example apache-2.0 or cc-by-nc-4.0")
    if given.format == "onnx" and not all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))):
        raise UserError("--format onnx needs packages that are missing: pip install onnx onnxscript onnxruntime")
    return given


def load_and_export(arguments: list[str]) -> None:
    given = parse(arguments)
    file = Path(locate(given.checkpoint, given.model))
    trained = load_trained(str(file), torch.device("cpu"), given.model, weights=given.weights)
    print(*trained.notes, sep="\n", end="\n" * bool(trained.notes))
    size = (given.image_size * 2)[:2] if given.image_size else height_and_width(trained.config.DATA.IMG_SIZE)
    beside = file if file == Path(given.checkpoint) else Path(Path(given.checkpoint).name)  # not beside what is cached
    target = given.to or beside.with_name((beside.name if file.is_dir() else beside.stem) + SUFFIXES[given.format])
    any_batch, data_path = given.dynamic_batch or given.format not in GRAPHS, str(given.data_path or "")
    how = (given.dynamic_size, given.license, given.int8, data_path)
    export(trained, str(file), Wanted(given.format, size, any_batch, *how), target)
    print(f"in {target}")


main = partial(run_command, load_and_export)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
