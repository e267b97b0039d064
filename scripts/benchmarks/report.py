"""From the figures of scripts/gpu_report.sh to the tables of a page: ``report.py FOLDER PAGE``.

Writes FOLDER/report.md, and puts the same between the two comments ``gpu:begin`` and ``gpu:end`` of PAGE.
"""

import json
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from scripts.benchmarks.common import ratio, rounded
from scripts.benchmarks.contenders import PLAIN
from scripts.benchmarks.model import KINDS, floors, tflops
from scripts.benchmarks.step import PARTS, compared_with
from utils.command import Parser, run_command
from utils.errors import UserError
from utils.surroundings import a_path

BEGIN, END = "<!-- gpu:begin -->", "<!-- gpu:end -->"
NO_MEMORY = "out of memory"


def main() -> int:
    return run_command(write_and_put, sys.argv[1:])


def write_and_put(given: list[str]) -> None:
    parser = Parser(prog="scripts/benchmarks/report.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=a_path, metavar="FOLDER", help="where gpu_report.sh has written its figures")
    parser.add_argument("page", type=a_path, metavar="PAGE", help="a Markdown file with the two comments")
    arguments = parser.parse_args(given)
    report = write_report(arguments.folder)
    (arguments.folder / "report.md").write_text(report, encoding="utf-8")
    put_into(arguments.page, report)
    print(f"{arguments.folder / 'report.md'} is in {arguments.page}")


def put_into(page: Path, report: str) -> None:
    """Replace what is between the two comments.

    Raises:
        UserError: the page is not there or has not each of them once, in order.
    """
    if not page.is_file():
        raise UserError(f"{page} is not there")
    text = page.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise UserError(f"{page} must have {BEGIN} and after it {END}, each once")
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n\n{report}\n{END}{after}", encoding="utf-8")


def write_report(folder: Path) -> str:
    """All tables, as Markdown; what was not measured is left out, and said.

    Raises:
        UserError: there are no figures at all.
    """
    parts = {
        "the networks": ("benchmark_model.json", models_part),
        "the networks, compiled": ("compiled/benchmark_model.json", models_part),
        "the training step": ("benchmark_step.json", step_part),
        "saving": ("benchmark_checkpoint.json", checkpoint_part),
        "the input pipeline": ("benchmark_data.json", data_part),
    }
    there = {what: folder / file for what, (file, _) in parts.items() if (folder / file).exists()}
    found = {what: json.loads(path.read_text(encoding="utf-8")) for what, path in there.items()}
    if not found:
        raise UserError(f"{folder} has no figures; scripts/gpu_report.sh writes them")
    first = next(iter(found.values()))
    of = first["machine"]
    device = f"one {of['device']} and" if of["device"] != "no GPU" else "no GPU but"
    texts = [
        f"Measured on {first['date']} on {device} {of['cores']} cores of {of['cpu']}, with torch {of['torch']}, "
        f"torchvision {of['torchvision']}, timm {of['timm']}, Python {of['python']}."
    ]
    texts += [parts[what][1](report) for what, report in found.items()]
    texts += [text for text in (tests_part(folder), training_part(folder)) if text]
    missing = [what for what in parts if what not in found]
    if missing:
        texts.append(f"Not measured: {'; '.join(missing)}.")
    return "\n\n".join(texts) + "\n"


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table whose first column is text."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def setting_of(report: dict) -> str:
    settings = report["settings"]
    compiled = "eager" if settings["compile"] == "none" else f"`torch.compile` {settings['compile']}"
    size = settings["image_size"]
    return (
        f"{report['precision']}, {size} x {size}, channels last, {compiled}, medians of {settings['repeats']} in turn"
    )


def memory_of(report: dict) -> str:
    """What the column GB is."""
    if report["machine"]["device"] != "no GPU":
        return "GB: the most that training takes."
    return "GB: activations kept for the backward pass; weights, gradients and optimizer are not in it."


def models_part(report: dict) -> str:
    """Images per second of every model at every batch size."""
    by_name = {model["name"]: model for model in report["models"]}
    rate = statistics.median(report["matmul_tflops"])
    rows = []
    for i, batch_size in enumerate(report["settings"]["batch_sizes"]):
        for model in report["models"]:
            batch, plain = model["batches"][i], by_name.get(PLAIN + model["name"])
            row = [model["name"], f"{model['gmac']:.3g}", f"{batch_size:,}"]
            for kind in KINDS:
                values = batch[kind]["images_per_second"]
                if values is None:
                    row += [NO_MEMORY, "", ""]
                    continue
                against = plain["batches"][i][kind]["images_per_second"] if plain else None
                row += [
                    rounded(statistics.median(values)),
                    f"{ratio(values, against):.2f}" if against else "",
                    f"{100 * tflops(model, kind, batch) / rate:.1f} %",
                ]
            taken = batch["training"]["memory_bytes"]
            row += [f"{taken / 1e9:.2f}" if taken else "", *(f"{model['kernels'].get(kind, '')}" for kind in KINDS)]
            rows.append(row)
    columns = ["model", "GMAC", "batch", "inference, images/s", "x plain", "share", "training, images/s", "x plain"]
    columns += ["share", "GB", "kernels", "in training"]
    return (
        f"Networks: {setting_of(report)}. Training is the forward and the backward pass. Share: of the {rate:.3g} "
        f"TFLOP/s of a large matrix product in the same run. Kernels: for one image. {memory_of(report)}\n\n"
        f"{markdown(columns, rows)}{floors_part(report)}"
    )


def floors_part(report: dict) -> str:
    """What the products and the bytes of a batch take; empty where nothing was counted."""
    rows = []
    for model in report["models"]:
        batch = model["batches"][-1]
        if all(batch[kind]["images_per_second"] and kind in model["moved_bytes"] for kind in KINDS):
            rows.append([model["name"], *(rounded(ms) for kind in KINDS for ms in floors(report, model, kind))])
    if not rows:
        return ""
    bandwidth, n = statistics.median(report["copy_gb_per_second"]), report["settings"]["batch_sizes"][-1]
    columns = ["ms", *["products", "bytes", "inference"], *["products", "bytes", "training"]]
    return (
        f"\n\nHow near to the limit, for a batch of {n:,}. Products: the matrix products at the rate of a large one. "
        f"Bytes: all that the model's own eager kernels read and write, at the {rounded(bandwidth)} GB/s of a copy, "
        f"caches left out. Beside them the time measured.\n\n{markdown(columns, rows)}"
    )


def step_part(report: dict) -> str:
    """The training step and its parts."""
    figures = {step["name"]: step["images_per_second"] for step in report["steps"]}
    rows = []
    for step in report["steps"]:
        values = step["images_per_second"]
        if values is None:
            rows.append([step["name"], NO_MEMORY, *[""] * (len(PARTS) + 2)])
            continue
        plain = figures.get(compared_with(step["name"]))
        rows.append(
            [
                step["name"],
                rounded(statistics.median(values)),
                f"{ratio(values, plain):.2f}" if plain else "",
                *(rounded(statistics.median(step["parts_milliseconds"][part])) for part in PARTS),
                f"{step['memory_bytes'] / 1e9:.2f}" if step["memory_bytes"] else "",
            ]
        )
    columns = ["training step", "images/s", "x plain", *(f"{part}, ms" for part in PARTS), "GB"]
    batch_size = report["settings"]["batch_size"]
    said = setting_of({**report, "settings": {**report["settings"], "compile": "none"}}).replace("eager, ", "")
    return f"The whole training step: batch {batch_size:,}, {said}.\n\n{markdown(columns, rows)}"


def checkpoint_part(report: dict) -> str:
    blocking = statistics.median(report["seconds"]["blocking save"])
    return (
        f"A save of {report['megabytes']} MB costs the loop {100 * report['share_of_blocking']:.1f} % of the "
        f"{blocking:.2f} s that it would take if the loop waited for it."
    )


def data_part(report: dict) -> str:
    """Images per second of each loader."""
    figures = report["images_per_second"]
    timms = next(values for name, values in figures.items() if name.startswith("timm"))
    rows = [
        [name, rounded(statistics.median(values)), f"{ratio(values, timms):.2f}"] for name, values in figures.items()
    ]
    return (
        f"The input pipeline with {report['settings']['workers']} workers:\n\n"
        f"{markdown(['loader', 'images/s', 'x timm'], rows)}"
    )


def tests_part(folder: Path) -> str:
    """What pytest says at its end."""
    log = folder / "tests.log"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    said = [line.strip("= ") for line in lines if re.search(r"\d+ (passed|failed|error)", line)]
    return f"The tests marked `gpu`: {said[-1]}." if said else ""


def training_part(folder: Path) -> str:
    """Images per second of the real command on real images, after its first lines."""
    logs = sorted(folder.glob("*/end_to_end/metrics.jsonl"))
    if not logs:
        return ""
    events = [json.loads(line) for line in logs[0].read_text(encoding="utf-8").splitlines()]
    trained = [event for event in events if event["event"] == "train"]
    counted = trained[len(trained) // 4 :]
    if not counted:
        return ""
    speed = statistics.median(event["images_per_second"] for event in counted)
    wait = statistics.median(event["data_wait"] for event in counted)
    return (
        f"`main.py` on JPEGs from shards, everything included: {rounded(speed)} images/s, of whose time "
        f"{100 * wait:.1f} % is waiting for data (step {trained[-1]['step']:,}; {logs[0].parts[-3]})."
    )


if __name__ == "__main__":
    sys.exit(main())
