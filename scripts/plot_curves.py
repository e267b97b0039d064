"""Draw the loss, accuracy and learning rate of a run: ``python scripts/plot_curves.py RESULTS_FOLDER``."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.command import Parser, run_command
from utils.drawing import drawable, pyplot
from utils.errors import UserError
from utils.surroundings import a_path

METRICS = {
    "top1": "top-1", "top5": "top-5", "miou": "mIoU", "mean_accuracy": "mean accuracy",
    "pixel_accuracy": "pixel accuracy", "box_ap": "box AP", "box_ap50": "box AP50", "mask_ap": "mask AP",
}  # fmt: skip
"""In percent, of an evaluation; the first one that it has decides which weights are the best."""


def read_events(metrics: Path) -> tuple[list[dict], list[dict]]:
    """The training and the evaluation lines of a ``metrics.jsonl``."""
    events = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    train = [e for e in events if e["event"] == "train"]
    evaluations = [e for e in events if e["event"] == "eval" and "checkpoint" not in e]
    return train, evaluations


def draw(plt, train: list[dict], evaluations: list[dict], title: str, path: Path) -> None:
    """Three panels over the step, as a PNG."""
    figure, (loss, accuracy, rate) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    figure.suptitle(drawable(title))
    steps = [e["step"] for e in train]
    loss.plot(steps, [e["loss"] for e in train], linewidth=1, label="training")
    for weights, name, style in (("model", "", "o-"), ("ema", " (EMA)", "s--")):
        mine = [e for e in evaluations if e["weights"] == weights]
        if mine:
            at = [e["step"] for e in mine]
            if "loss" in mine[0]:
                loss.plot(at, [e["loss"] for e in mine], style, markersize=3, label=f"validation{name}")
            for number, metric in enumerate(metric for metric in METRICS if metric in mine[0]):
                label, values = f"{METRICS[metric]}{name}", [e[metric] for e in mine]
                accuracy.plot(at, values, style, markersize=3, alpha=0.5 if number else 1, label=label)
    measured = "accuracy (%)"
    if evaluations:
        first = next(metric for metric in METRICS if metric in evaluations[0])
        measured = "average precision (%)" if first == "box_ap" else measured
        best = max(e[first] for e in evaluations)
        accuracy.set_title(f"best {METRICS[first]} {best:.2f} %", fontsize="medium")
        accuracy.legend()
    rate.plot(steps, [e["lr"] for e in train], linewidth=1)
    loss.legend()
    for axis, label in ((loss, "loss"), (accuracy, measured), (rate, "learning rate")):
        axis.set(xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def plot(arguments: list[str]) -> None:
    parser = Parser(prog="scripts/plot_curves.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=a_path, help="results folder of a run, with metrics.jsonl")
    folder = parser.parse_args(arguments).folder
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise UserError(f"{metrics} is not there; give the results folder of a run (OUTPUT/MODEL.NAME/TAG)")
    train, evaluations = read_events(metrics)
    if not train:
        raise UserError(f"{metrics} has no line about training yet")
    with pyplot() as plt:
        draw(plt, train, evaluations, f"{folder.parent.name}, run {folder.name}", folder / "curves.png")
    print(f"curves in {folder / 'curves.png'}")


if __name__ == "__main__":
    sys.exit(run_command(plot, sys.argv[1:]))
