"""Measure how fast parts of the trainer are, beside others that do the same, on this machine.

    python scripts/benchmark.py model --models crossformer_small swin_tiny --batch-sizes 1 64 256
    python scripts/benchmark.py step --models crossformer_small --batch-sizes 128
    python scripts/benchmark.py data --data-path /imagenet --workers 8
    python scripts/benchmark.py checkpoint --output /the/disk/of/the/run
    python scripts/benchmark.py all --data-path /imagenet
    python scripts/benchmark.py report --page docs/performance.md

Everything that is compared runs in turn, several times, in one run: a ratio says more than a number, since machines
are shared. A run's table goes to the terminal and its figures to OUTPUT/benchmark_WHAT.json, which ``report`` reads.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.checkpoint import benchmark_checkpoint
from benchmarks.common import make_folder
from benchmarks.data import benchmark_data
from benchmarks.model import benchmark_model, benchmark_step
from benchmarks.report import write_report
from config import SETTINGS
from models.crossformer import VARIANTS
from utils.command import Parser, run_command
from utils.errors import UserError
from utils.surroundings import a_path, expanded

BENCHMARKS = {
    "model": benchmark_model, "step": benchmark_step, "data": benchmark_data, "checkpoint": benchmark_checkpoint,
    "report": write_report,
}  # fmt: skip
PRECISIONS = ("auto", "bf16", "fp16", "tf32", "fp32")
AT_LEAST = {"image_size": 32}
"""The smallest number that an option may have; 1 where nothing is said."""


def main() -> int:
    return run_command(benchmark, sys.argv[1:])


def benchmark(arguments: list[str]) -> None:
    for chosen_one in chosen(parse(arguments)):
        make_folder(chosen_one.output)
        BENCHMARKS[chosen_one.what](chosen_one)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="scripts/benchmark.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    what = parser.add_subparsers(dest="what", required=True, parser_class=Parser)
    network, files, size, common = (Parser(add_help=False) for _ in range(4))
    network.add_argument(
        "--models", nargs="+", metavar="NAME", help="variants, plain_VARIANT, swin_tiny, ... of timm; HEAD/BACKBONE"
    )
    network.add_argument("--batch-sizes", nargs="+", type=int, metavar="N", help="256 at most on a GPU, else 4")
    network.add_argument("--image-size", type=int, nargs="+", default=[224], metavar="N", help="height and width")
    network.add_argument("--precision", choices=PRECISIONS, default="auto", help="auto: bf16 on a GPU, else fp32")
    network.add_argument(
        "--compile", choices=SETTINGS["TRAIN.COMPILE"].choices, default="none", help="torch.compile's mode"
    )
    files.add_argument("--prepared", type=expanded, metavar="DIR", help="the same images from prepare_imagenet.py")
    files.add_argument("--cfg", type=expanded, default="", metavar="FILE", help="recipe and image size")
    files.add_argument("--workers", type=int, default=os.cpu_count(), metavar="N", help="loader processes")
    size.add_argument("--megabytes", type=int, default=300, metavar="N", help="size of the checkpoint")
    common.add_argument("--output", type=a_path, default=Path("output"), metavar="DIR", help="where figures are")

    def add(name: str, about: str, *options: Parser) -> Parser:
        added = what.add_parser(name, help=about, parents=[*options, common], allow_abbrev=False)
        if name != "report":
            added.add_argument("--repeats", type=int, default=5, metavar="N", help="measurements of each")
        return added

    add("model", "inference and training of this project's networks and others", network)
    add("step", "the training step in its parts: recomputing, plain, compiled, Swin", network)
    data = add("data", "the input pipeline: this loader, timm's, torchvision's and DALI's", files)
    data.add_argument("--data-path", type=expanded, required=True, metavar="DIR", help="images, as train/CLASS/*.jpg")
    data.add_argument("--batch-size", type=int, default=64, metavar="N")
    data.add_argument("--batches", type=int, default=40, metavar="N", help="batches of one measurement")
    add("checkpoint", "how long saving a checkpoint keeps training waiting", size)
    every = add("all", "all of them, one after the other", network, files, size)
    every.add_argument("--data-path", type=expanded, metavar="DIR", help="images; without them data is left out")
    report = add("report", "put the figures below --output into a page")
    report.add_argument("--page", type=a_path, required=True, metavar="FILE", help="has gpu:begin and gpu:end")
    parsed = parser.parse_args(arguments)
    for name, value in vars(parsed).items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and number < AT_LEAST.get(name, 1):
                raise UserError(f"--{name.replace('_', '-')} must be at least {AT_LEAST.get(name, 1)}, not {number}")
    if "image_size" in parsed:
        if len(parsed.image_size) > 2:
            raise UserError(f"--image-size takes one number, or a height and a width, not {len(parsed.image_size)}")
        parsed.image_size = parsed.image_size[0], parsed.image_size[-1]
    return parsed


def chosen(parsed: argparse.Namespace) -> list[argparse.Namespace]:
    """Give the arguments of each benchmark to run: of one, or of all of them."""
    if parsed.what != "all":
        return [parsed]
    given = vars(parsed)
    step = {
        "batch_sizes": given["batch_sizes"] and [max(given["batch_sizes"])],
        "models": [name for name in given["models"] or () if name in VARIANTS],
    }
    ours = {"model": {}, "step": step, "checkpoint": {}}
    if parsed.data_path:
        ours["data"] = {"batch_size": 64, "batches": 40}
    else:
        print("data is left out: it needs --data-path")
    return [argparse.Namespace(**{**given, **own, "what": what}) for what, own in ours.items()]


if __name__ == "__main__":
    sys.exit(main())
