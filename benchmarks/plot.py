"""The picture of a model benchmark."""

import statistics
from pathlib import Path

from benchmarks.contenders import PLAIN
from utils.image_size import height_and_width

COLOURS = {
    "crossformer_": "tab:blue", "crossformerpp_": "tab:purple", "swin_": "tab:green", "convnext_": "tab:red",
    "vit_": "tab:orange",
}  # fmt: skip
"""Of each family of networks."""

CENTRE, SIMILAR = "crossformer_small", 0.25
"""Networks are drawn whose GMAC differ from those of this one (the first where it is not there) by a smaller share."""

LABEL_HEIGHT = 0.055
"""Of the axis: names at the ends of lines keep this distance."""


def draw_models(report: dict, path: Path) -> bool:
    """Draw images per second over the batch size, in inference and in training, as a PNG.

    A line with its name at its end for each network of about one size; others would ask for a scale of their own.

    Returns:
        False where nothing was drawn: there is but one batch size, no GMAC is known, or matplotlib is not installed.
    """
    sizes = report["batch_sizes"]
    try:
        import matplotlib
    except ImportError:
        return False
    if len(sizes) == 1:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    models = report["models"]
    size = next((model for model in models if model["name"] == CENTRE), models[0])["gmac"]
    drawn = [model for model in models if size and model["gmac"] and abs(model["gmac"] / size - 1) < SIMILAR]
    if not drawn:
        return False
    figure, axes = plt.subplots(1, 2, figsize=(13, 5))
    for axis, kind in zip(axes, ("inference", "training"), strict=True):
        ends = []
        for model in drawn:
            measured = [batch for batch in model["batches"] if batch[kind]["images_per_second"]]
            if not measured:
                continue
            speeds = [statistics.median(batch[kind]["images_per_second"]) for batch in measured]
            style = dict(color=colour_of(model["name"]), linestyle="--" if model["name"].startswith(PLAIN) else "-")
            axis.plot([batch["batch_size"] for batch in measured], speeds, marker="o", markersize=4, **style)
            ends.append((measured[-1]["batch_size"], speeds[-1], model["name"], style["color"]))
        axis.set(xlabel="batch size", xscale="log", ylim=(0, 1.06 * max((end[1] for end in ends), default=1)))
        axis.set_title(f"{kind.capitalize()}, images per second", loc="left")
        axis.set_xticks(sizes, [f"{n:,}" for n in sizes])
        axis.xaxis.minorticks_off()
        axis.grid(axis="y", alpha=0.3, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        name_lines(axis, ends)
    of, (height, width) = report["machine"], height_and_width(report["settings"]["image_size"])
    figure.text(
        0.01, 0.015,
        f"{of['cpu'] if of['device'] == 'no GPU' else of['device']}, {report['precision']}, {height} x "
        f"{width}, torch {of['torch']}; dashed: models/reference.py",
        fontsize="small", color="dimgrey",
    )  # fmt: skip
    figure.subplots_adjust(left=0.04, right=0.84, top=0.92, bottom=0.17, wspace=0.58)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def name_lines(axis, ends: list[tuple[float, float, str, str]]) -> None:
    """Write each name beside the last point (x, y, name, colour) of its line, pushed up where two would overlap."""
    below = -1.0
    for x, y, name, colour in sorted(ends, key=lambda end: end[1]):
        below = max(y / axis.get_ylim()[1], below + LABEL_HEIGHT)
        axis.annotate(
            name, (x, y), (1.03, below), textcoords="axes fraction", va="center", color=colour, annotation_clip=False,
            arrowprops=dict(arrowstyle="-", color=colour, linewidth=0.5, shrinkA=0, shrinkB=2),
        )  # fmt: skip


def colour_of(name: str) -> str:
    """That of the family; a plain implementation has that of its variant."""
    name = name.removeprefix(PLAIN)
    return next((colour for family, colour in COLOURS.items() if name.startswith(family)), "dimgrey")
