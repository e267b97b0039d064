"""The picture of a model benchmark."""

import statistics
from pathlib import Path

from scripts.benchmarks.common import show
from scripts.benchmarks.contenders import PLAIN

FAMILIES = ("crossformer_", "crossformerpp_", "swin_", "convnext_", "vit_")
"""Each has a colour, and a plain implementation that of its variant."""

LABEL_WIDTH, LABEL_HEIGHT = 0.27, 0.03
"""As shares of the axis: labels nearer than this in both are moved apart."""


def draw_models(report: dict, path: Path) -> None:
    """Images/s over GMAC, and over the batch size, as a PNG. Full marks are inference, empty ones training."""
    try:
        import matplotlib
    except ImportError:
        show("no picture: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import ScalarFormatter

    figure, (over_gmac, over_batch) = plt.subplots(
        1, 2, figsize=(14, 6.5), width_ratios=(1.25, 1), layout="constrained"
    )
    settings, device = report["settings"], report["machine"]["device"]
    device = report["machine"]["cpu"] if device == "no GPU" else device
    figure.suptitle(
        f"{device}, torch {report['machine']['torch']}, {report['precision']}, "
        f"{settings['image_size']} x {settings['image_size']}, compile {settings['compile']}",
        fontsize="medium",
    )
    labels = []
    for model in report["models"]:
        style = dict(color=colour_of(model["name"]), linestyle="--" if model["name"].startswith(PLAIN) else "-")
        for kind, face in (("inference", style["color"]), ("training", "white")):
            measured = [b for b in model["batches"] if b[kind]["images_per_second"]]
            if not measured:
                continue
            speeds = [statistics.median(b[kind]["images_per_second"]) for b in measured]
            mark = dict(marker=marker_of(model["name"]), markerfacecolor=face, markersize=6, color=style["color"])
            over_batch.plot([b["batch_size"] for b in measured], speeds, linewidth=1, **{**mark, **style})
            if measured[-1] is model["batches"][-1]:
                over_gmac.plot(model["gmac"], speeds[-1], **mark)
                if kind == "inference":
                    labels.append((model["gmac"], speeds[-1], model["name"], style["color"]))
    for axis in (over_gmac, over_batch):
        axis.set(xscale="log", yscale="log", ylabel="images/s")
        axis.grid(alpha=0.3, which="both", linewidth=0.5)
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_formatter(ScalarFormatter())
            side.set_minor_formatter(ScalarFormatter())
            side.set_tick_params(which="both", labelsize="small")
    over_gmac.set(xlabel="GMAC of an image", title=f"batch {settings['batch_sizes'][-1]:,}")
    over_batch.set(xlabel="batch size", title="over the batch size")
    over_batch.set_xticks(settings["batch_sizes"], [f"{n:,}" for n in settings["batch_sizes"]])
    over_batch.xaxis.minorticks_off()
    over_gmac.margins(x=0.18, y=0.15)
    legend = [Line2D([], [], color="grey", marker="o", linestyle="", label="inference")]
    legend.append(Line2D([], [], color="grey", marker="o", linestyle="", markerfacecolor="white", label="training"))
    legend.append(Line2D([], [], color="grey", linestyle="--", marker="X", label="plain implementation"))
    over_batch.legend(handles=legend, fontsize="small")
    figure.canvas.draw()  # fixes the limits, which labels depend on
    write_labels(over_gmac, labels)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_labels(axis, labels: list[tuple[float, float, str, str]]) -> None:
    """Beside their points, towards the middle; pushed up where they would cover each other."""
    to_axis = axis.transData + axis.transAxes.inverted()
    placed: list[tuple[float, float]] = []
    for gmac, speed, name, colour in sorted(labels, key=lambda label: label[1]):
        x, y = to_axis.transform((gmac, speed))
        for other_x, other_y in sorted(placed, key=lambda place: place[1]):
            if abs(other_x - x) < LABEL_WIDTH and abs(other_y - y) < LABEL_HEIGHT:
                y = other_y + LABEL_HEIGHT
        placed.append((x, y))
        left = x > 1 - LABEL_WIDTH
        axis.annotate(
            name, (gmac, speed), (x - 0.02 if left else x + 0.02, y), textcoords=axis.transAxes,
            va="center", ha="right" if left else "left", color=colour, fontsize="small",
            arrowprops=dict(arrowstyle="-", color=colour, linewidth=0.4, shrinkA=0, shrinkB=3),
        )  # fmt: skip


def colour_of(name: str) -> str:
    """One for each family, from matplotlib's ten."""
    name = name.removeprefix(PLAIN)
    return next((f"C{i}" for i, family in enumerate(FAMILIES) if name.startswith(family)), f"C{len(FAMILIES)}")


def marker_of(name: str) -> str:
    return "X" if name.startswith(PLAIN) else "o"
