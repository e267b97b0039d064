"""What eight processes of a host ask of the file system when they start: one of them looks, the others are told."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import environments_of_ranks
from conftest import ROOT, TINY_RUN
from PIL import Image

RANKS, CLASSES = 8, 1000
FLAGS = (*TINY_RUN, "DATA.BATCH_SIZE", "1", "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0", "TRAIN.STEPS", "2")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace (apt-get install strace)"),
]


@pytest.fixture(scope="module")
def many_classes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("many")
    for split in ("train", "val"):
        for number in range(CLASSES):
            folder = root / split / f"c{number:04d}"
            folder.mkdir(parents=True)
            Image.new("RGB", (8, 8), (number % 256, 0, 0)).save(folder / "0.png")
    return root


def run(folder: Path, data: Path, *more: str) -> list[list[str]]:
    """The calls of each rank that name a file, as strace writes them down."""
    environments, store = environments_of_ranks(RANKS, {**os.environ, "OMP_NUM_THREADS": "1"})
    words = ("main.py", *FLAGS, *more, "--data-path", data, "--output", folder / "output")
    ranks = []
    for number, environment in enumerate(environments):
        traced = ("strace", "-f", "-qq", "-e", "trace=%file", "-o", folder / f"calls-{number}", sys.executable)
        ranks.append(subprocess.Popen([str(word) for word in (*traced, *words)], cwd=ROOT, env=environment))
    assert [rank.wait(600) for rank in ranks] == [0] * RANKS
    del store
    return [(folder / f"calls-{number}").read_text(errors="replace").splitlines() for number in range(RANKS)]


def test_one_looks_at_the_data_and_one_reads_the_checkpoint(tmp_path, many_classes):
    def of_data(calls: list[str]) -> int:
        return sum(str(many_classes) in call and "/0.png" not in call for call in calls)

    first = [of_data(calls) for calls in run(tmp_path, many_classes)]
    again = run(tmp_path, many_classes, "TRAIN.STEPS", "4")
    second = [of_data(calls) for calls in again]
    reads = [sum(bool(re.search(r"open(at)?\(.*checkpoints/last\.pth\"", call)) for call in calls) for calls in again]
    print(f"calls for the data: {first} at first, {second} with its index; openings of last.pth: {reads}")
    assert first[0] > 2 * CLASSES
    assert max(first[1:]) < 50
    assert max(second[1:]) < 50
    assert reads[0] >= 1
    assert not any(reads[1:])
