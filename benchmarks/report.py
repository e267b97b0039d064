"""From the figures of scripts/gpu_report.sh to the tables of a page."""

import json
import re
import statistics
from argparse import Namespace
from pathlib import Path

from benchmarks import checkpoint, data, model
from benchmarks.common import rounded
from utils.errors import UserError

BEGIN, END = "<!-- gpu:begin -->", "<!-- gpu:end -->"
PARTS = {
    "the networks": ("benchmark_model.json", model.tables),
    "the networks, compiled": ("compiled/benchmark_model.json", model.tables),
    "the training step": ("benchmark_step.json", model.tables),
    "saving": ("benchmark_checkpoint.json", checkpoint.tables),
    "the input pipeline": ("benchmark_data.json", data.tables),
}


def write_report(arguments: Namespace) -> None:
    """Write OUTPUT/report.md, and put the same between the two comments ``gpu:begin`` and ``gpu:end`` of a page.

    Raises:
        UserError: there are no figures, or there is no place to put them.
    """
    text = report_of(arguments.output)
    (arguments.output / "report.md").write_text(text, encoding="utf-8")
    put_into(arguments.page, text)
    print(f"{arguments.output / 'report.md'} is in {arguments.page}")


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


def report_of(folder: Path) -> str:
    """Write all tables as Markdown; what was not measured is left out, and said.

    Raises:
        UserError: there are no figures at all.
    """
    there = {what: folder / file for what, (file, _) in PARTS.items() if (folder / file).exists()}
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
    texts += [table.markdown() for what, report in found.items() for table in PARTS[what][1](report)]
    texts += [text for text in (tests_part(folder), training_part(folder)) if text]
    missing = [what for what in PARTS if what not in found]
    if missing:
        texts.append(f"Not measured: {'; '.join(missing)}.")
    return "\n\n".join(texts) + "\n"


def tests_part(folder: Path) -> str:
    """Quote what pytest says at its end."""
    log = folder / "tests.log"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    said = [line.strip("= ") for line in lines if re.search(r"\d+ (passed|failed|error)", line)]
    return f"The tests marked `gpu`: {said[-1]}." if said else ""


def training_part(folder: Path) -> str:
    """Read images per second of the real command on real images, after its first lines, from its log."""
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
