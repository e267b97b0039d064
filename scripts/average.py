"""Average the weights of several checkpoints of a run.

    python scripts/average.py output/crossformer_small/default --last 5     the last 5 that TRAIN.KEEP_EVERY_EPOCHS kept
    python scripts/average.py a.pth b.pth c.pth --to average.pth            these files

The average is evaluated, exported and started from like any checkpoint.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import checkpoint
from utils.averaging import average, newest_epochs
from utils.command import Parser, run_command
from utils.errors import UserError
from utils.surroundings import a_path


def main(arguments: list[str]) -> None:
    parser = Parser(prog="scripts/average.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("files", type=a_path, nargs="+", metavar="FILE", help="checkpoints, or a run's results folder")
    parser.add_argument("--last", type=int, metavar="N", help="of a results folder, the last N kept epochs")
    parser.add_argument("--weights", choices=["model", "ema"], default="model", help="ema: their moving averages")
    parser.add_argument("--to", type=a_path, metavar="FILE", help="average.pth beside them")
    given = parser.parse_args(arguments)
    files = [str(path) for path in given.files]
    if given.last is not None:
        if len(files) > 1 or not given.files[0].is_dir():
            raise UserError("--last is for one results folder; leave it out for files")
        files = newest_epochs(given.files[0] / "checkpoints", given.last)
    elif any(path.is_dir() for path in given.files):
        raise UserError(f"{given.files[0]} is a folder; say --last N for the last N of its kept epochs")
    to = given.to or Path(files[-1]).parent / "average.pth"
    content = average(files, given.weights)
    checkpoint.save_atomically(content, to)
    print(f"the average of {len(files)} checkpoints is in {to}")
    if any(name.endswith("running_mean") for name in content["model"]):
        print("the statistics of its BatchNorm are averages too, of those that each had for its own weights")


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
