"""The engine knows no classes: a task that it has never heard of trains, evaluates and resumes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_RUN, assert_same_tensors

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def run(output: Path, digits: Path, tag: str, *arguments: str, launcher: tuple = ()) -> tuple[str, list[dict]]:
    """What the task's run says, and the lines of its metrics."""
    flags = (*TINY_RUN, "TRAIN.EMA_DECAY", "0.9", "MODEL.DROP_PATH_RATE", "0.2", "--data-path", digits)
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "tests.mean_colour", *map(str, flags), "--tag", tag, "--output", output,
         *map(str, arguments)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (output / "crossformer_micro" / tag / "metrics.jsonl").read_text().splitlines()
    return done.stdout, [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits) -> tuple[Path, str, list[dict]]:
    output = tmp_path_factory.mktemp("tasks")
    return output, *run(output, digits, "whole", "--batch-size", "12")


def checkpoint(output: Path, tag: str, name: str) -> dict:
    return torch.load(output / "crossformer_micro" / tag / "checkpoints" / name, weights_only=True)


def test_it_trains_and_keeps_its_best(trained):
    output, said, lines = trained
    evaluations = [line for line in lines if line["event"] == "eval"]
    best = max(line["minus_error"] for line in evaluations)
    assert (
        checkpoint(output, "whole", "best.pth")["minus_error"]
        == best
        == checkpoint(output, "whole", "last.pth")["best"]
    )
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


def test_its_evaluation_is_the_same_on_two_processes(trained, digits):
    """37 images over two processes, other batches: the answers round otherwise, and every image counts once."""
    output, *_ = trained
    best = output / "crossformer_micro" / "whole" / "checkpoints" / "best.pth"
    flags = ("--eval", "--resume", best, "--batch-size", "8")
    one, two = (run(output, digits, f"on_{len(how)}", *flags, launcher=how)[1] for how in ((), TORCHRUN))
    assert [line["images"] for line in (*one, *two)] == [37, 37]
    assert one[0]["minus_error"] == pytest.approx(two[0]["minus_error"], rel=1e-6)
    assert one[0]["minus_error"] == pytest.approx(checkpoint(output, "whole", "best.pth")["minus_error"], rel=1e-6)
