"""The engine knows no classes: a task that it has never heard of trains, evaluates and is carried on."""

import json
from pathlib import Path

import pytest
import torch
from commands import start
from conftest import ROOT, TINY_RUN, assert_same_tensors

RANK_0_READS = """
import os
import runpy

from utils import checkpoint

if os.environ["RANK"] != "0":
    checkpoint.read = None
runpy.run_path("tests/mean_colour.py", run_name="__main__")
"""


def run(output: Path, digits: Path, tag: str, *arguments, script="tests/mean_colour.py", nproc=1) -> tuple[str, list]:
    """What the task's run says, and the lines of its metrics."""
    flags = (*TINY_RUN, "TRAIN.EMA_DECAY", "0.9", "MODEL.DROP_PATH_RATE", "0.2", "--data-path", digits)
    done = start(
        script, *flags, "--tag", tag, "--output", output, *arguments, nproc=nproc, PYTHONPATH=str(ROOT)
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (output / "crossformer_micro" / tag / "metrics.jsonl").read_text().splitlines()
    return done.stdout, [json.loads(line) for line in lines]


def checkpoint(output: Path, tag: str, name: str) -> dict:
    return torch.load(output / "crossformer_micro" / tag / "checkpoints" / name, weights_only=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits) -> tuple[Path, str, list[dict]]:
    output = tmp_path_factory.mktemp("tasks")
    return output, *run(output, digits, "whole", "--batch-size", "12")


def test_it_trains_and_keeps_its_best(trained):
    output, said, lines = trained
    best = max(line["minus_error"] for line in lines if line["event"] == "eval")
    assert best == checkpoint(output, "whole", "best.pth")["minus_error"]
    assert best == checkpoint(output, "whole", "last.pth")["best"]
    steps = [line for line in lines if line["event"] == "train"]
    assert all(line["squared"] == line["loss"] for line in steps)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert f"done: best negative error {best:.2f}" in said


def test_it_is_carried_on_exactly(trained, digits):
    output, *_ = trained
    previous = output / "crossformer_micro" / "whole" / "checkpoints" / "previous.pth"
    run(output, digits, "again", "--batch-size", "12", "--resume", previous)
    a, b = (checkpoint(output, tag, "last.pth") for tag in ("whole", "again"))
    assert_same_tensors(*({k: v for k, v in content.items() if k != "config"} for content in (a, b)))


def test_rank_0_alone_reads_a_checkpoint(trained, digits, tmp_path):
    """512 processes that read half a gigabyte each would be more than a file system gives."""
    output, *_ = trained
    script = tmp_path / "alone.py"
    script.write_text(RANK_0_READS)
    previous = output / "crossformer_micro" / "whole" / "checkpoints" / "previous.pth"
    said, _ = run(output, digits, "two", "--batch-size", "6", "--resume", previous, script=script, nproc=2)
    assert f"carrying on from {previous} after step 6" in said
    assert "done: best" in said


def test_its_evaluation_is_the_same_on_two_processes(trained, digits):
    """37 images over two processes, other batches: the answers round otherwise, and every image counts once."""
    output, *_ = trained
    best = output / "crossformer_micro" / "whole" / "checkpoints" / "best.pth"
    flags = ("--eval", "--resume", best, "--batch-size", "8")
    one, two = (run(output, digits, f"on_{nproc}", *flags, nproc=nproc)[1] for nproc in (1, 2))
    assert [line["images"] for line in (*one, *two)] == [37, 37]
    assert one[0]["minus_error"] == pytest.approx(two[0]["minus_error"], rel=1e-6)
    assert one[0]["minus_error"] == pytest.approx(checkpoint(output, "whole", "best.pth")["minus_error"], rel=1e-6)
