"""Curves of runs: one SVG for each quantity, to stand in a page, and a picture of all."""

import io
import re
from typing import NamedTuple

import numpy as np

from reports.results import METRICS, WEIGHTS, Results, number
from utils.drawing import drawable, pyplot

COLOURS = (
    "#3b82f6", "#f97316", "#10b981", "#ef4444", "#8b5cf6", "#a16207", "#ec4899", "#64748b", "#84cc16", "#06b6d4",
)  # fmt: skip
"""Of the runs, to be seen on white and on black."""
INK = "#010203"
"""Stands for the colour of the page's text until the page is known."""
MOST_POINTS, FEW_POINTS = 400, 60
TRAINING = {
    "loss": "training loss", "lr": "learning rate", "images_per_second": "images per second",
    "data_wait": "data wait (share of the time)",
    "grad_norm": "gradient norm",
}  # fmt: skip
AXES = {"step": "step", "hours": "hours of training"}


class Curve(NamedTuple):
    """Points of a run, ``(N,)`` each; NaN is a gap. ``weights`` are those that were evaluated, none for training."""

    run: int
    weights: str
    x: np.ndarray
    y: np.ndarray


def curves_of(runs: list[Results], axis: str) -> dict[str, list[Curve]]:
    """The curves of all runs over ``step`` or ``hours``, by the title of their chart; no chart is without one.

    Besides the loss and the metrics with a name in :data:`METRICS` these are all fractions that the lines have: what a
    loss is made of, and other metrics.
    """
    evaluated = {"loss": "validation loss", **{name: f"{title} (%)" for name, title in METRICS.items()}}
    evaluated |= {name: name.replace("_", " ") for run in runs for name in fractions(run.evaluations, evaluated)}
    trained = TRAINING | {name: f"training {name}" for run in runs for name in fractions(run.train, TRAINING)}
    charts: dict[str, list[Curve]] = {trained["loss"]: []}
    for name, title in evaluated.items():
        for place, run in enumerate(runs):
            for weights in WEIGHTS:
                charts.setdefault(title, []).extend(curve(place, weights, run.of(weights), axis, name))
    for name, title in trained.items():
        for place, run in enumerate(runs):
            charts.setdefault(title, []).extend(curve(place, "", run.train, axis, name))
    return {title: curves for title, curves in charts.items() if curves}


def fractions(events: list[dict], known: dict[str, str]) -> list[str]:
    """What else the lines have that is a fraction, as counts are not."""
    names = {name for event in events for name, value in event.items() if isinstance(value, float)}
    return sorted(names - known.keys() - {"hours"})


def curve(run: int, weights: str, events: list[dict], axis: str, name: str) -> list[Curve]:
    """The curve of these lines, if any of them has a point of it; of evaluations every point counts."""
    points = [(e[axis], number(e[name])) for e in events if axis in e and name in e]
    if all(y is None for _, y in points):
        return []
    x, y = np.array(points, dtype=float).T
    return [Curve(run, weights, *((x, y) if weights else thinned(x, y)))]


def thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most so many points as can be told apart, each the mean of its neighbours."""
    if len(x) <= MOST_POINTS:
        return x, y
    parts = list(zip(np.array_split(x, MOST_POINTS), np.array_split(y, MOST_POINTS), strict=True))
    means = [np.nan if np.isnan(values).all() else np.nanmean(values) for _, values in parts]
    return np.array([places.mean() for places, _ in parts]), np.array(means)


def draw_svg(title: str, curves: list[Curve], axis: str) -> str:
    """Draw one chart, whose text and frame take the colour of what it stands in."""
    with pyplot() as plt, plt.rc_context(style(title, axis)):
        figure, axes = plt.subplots(figsize=(5.2, 3.0), layout="constrained")
        plot(axes, curves)
        axes.set(xlabel=AXES[axis])
        return svg_of(plt, figure)


def draw_calibration(bins: list[tuple[float, float, float]]) -> str:
    """Draw accuracy over confidence, both from 0 to 1; the third of each is how many images it is of."""
    with pyplot() as plt, plt.rc_context(style("calibration", "")):
        figure, axes = plt.subplots(figsize=(5.2, 3.4), layout="constrained")
        axes.plot([0, 100], [0, 100], "--", color=INK, linewidth=1, alpha=0.5)
        confidence, accuracy, count = np.array(bins, dtype=float).T
        sizes = 15 + 300 * count / count.sum()
        axes.scatter(100 * confidence, 100 * accuracy, s=sizes, color=COLOURS[0], alpha=0.8)
        axes.set(xlabel="confidence (%)", ylabel="accuracy (%)", xlim=(-2, 102), ylim=(-2, 102))
        axes.grid(alpha=0.25)
        return svg_of(plt, figure)


def plot(axes, curves: list[Curve]) -> None:
    """Draw curves; those of the moving average are dashed, and few points have marks."""
    for each in curves:
        mark = "." if len(each.x) <= FEW_POINTS else ""
        line = "--" if each.weights == "ema" else "-"
        axes.plot(each.x, each.y, line, marker=mark, color=COLOURS[each.run % len(COLOURS)], linewidth=1.5)
    axes.grid(alpha=0.25)
    axes.margins(x=0.02)


def style(*names: str) -> dict:
    ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
    clear = {"figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none"}
    return {
        **dict.fromkeys(ink, INK), **clear, "svg.fonttype": "none", "svg.hashsalt": "/".join(names),
        "axes.spines.top": False, "axes.spines.right": False, "font.size": 9,
    }  # fmt: skip


def svg_of(plt, figure) -> str:
    figure.savefig(out := io.StringIO(), format="svg", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return re.sub(
        r"<metadata>.*?</metadata>\s*", "", re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2), flags=re.S
    )


def draw_png(runs: list[Results]) -> bytes:
    """Draw the curves of one run or several: loss, metrics and learning rate over the step."""
    charts = curves_of(runs, "step")
    with pyplot() as plt:
        figure, (loss, measured, rate) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
        several = len(runs) > 1
        figure.suptitle("" if several else drawable(runs[0].name))
        panels = {
            loss: ("loss", ["training loss", "validation loss"]),
            measured: ("%", [f"{title} (%)" for title in METRICS.values()]),
            rate: ("learning rate", ["learning rate"]),
        }
        for axes, (label, titles) in panels.items():
            drawn = [(title, each) for title in titles for each in charts.get(title, [])]
            if several and axes is measured:  # the decisive one alone
                drawn = [(title, each) for title, each in drawn if title == drawn[0][0]]
                label = drawn[0][0] if drawn else label
            for place, (title, each) in enumerate(drawn):
                title = title.removesuffix(" (%)") + WEIGHTS.get(each.weights, "")
                axes.plot(
                    each.x,
                    each.y,
                    "--" if each.weights == "ema" else "-",
                    marker="." if each.weights else "",
                    color=COLOURS[(each.run if several else place) % len(COLOURS)],
                    label=drawable(runs[each.run].name) if several else title,
                    alpha=0.6 if title.startswith("training") else 1,
                )
            axes.set(xlabel="step", ylabel=label)
            axes.grid(alpha=0.3)
            if drawn and axes is not rate:
                labelled = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
                axes.legend(labelled.values(), labelled.keys(), fontsize="small")
        figure.savefig(out := io.BytesIO(), format="png", dpi=120)
        plt.close(figure)
        return out.getvalue()
