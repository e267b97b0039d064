"""The quick start, as a user starts it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image

SHORT = ["--opts", "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0"], 20, 1
FULL = pytest.param([], 97, 2, marks=pytest.mark.slow)


@pytest.fixture
def quickstart(tmp_path):
    """Runs it in a copy of the project."""
    leave_out = shutil.ignore_patterns(".git", ".venv*", "output", "quickstart", "__pycache__")
    project = shutil.copytree(ROOT, tmp_path / "project", ignore=leave_out)
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix, "PATH": path}

    def run(*words: str) -> tuple[subprocess.CompletedProcess, Path]:
        command, how = ["bash", "scripts/quickstart.sh", *words], dict(capture_output=True, text=True, timeout=900)
        return subprocess.run(command, cwd=project, env=environment, **how), project

    return run


@pytest.mark.parametrize(("more", "least", "times"), [SHORT, FULL], ids=["short", "full"])
def test_quickstart(quickstart, more, least, times):
    """The second time there is nothing left to train."""
    for _ in range(times):
        done, project = quickstart(*more)
        assert done.returncode == 0, done.stdout + done.stderr
        top1 = re.search(r"Top-1 on the digits: ([\d.]+) %", done.stdout)
        assert float(top1[1]) >= least
        page = (project / "quickstart/crossformer_micro/digits/report.html").read_text(encoding="utf-8")
        assert "Images that it gets wrong" in page
        assert "The first batch" in page
        assert "torchrun --nproc_per_node 8 main.py --cfg configs/small.yaml --data-path /imagenet" in done.stdout
    assert ("carrying on from" in done.stdout) == (times > 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "result", "cfg"),
    [
        ("segmentation", r"mIoU of the nuclei: ([\d.]+) %", "segmentation/upernet_small.yaml --data-path /ade20k"),
        ("detection", r"Box AP of the nuclei: ([\d.]+) %", "detection/mask_rcnn_small.yaml --data-path /coco"),
    ],
    ids=["segmentation", "detection"],
)
def test_other_tasks(quickstart, task, result, cfg):
    """Two steps; the second time there is nothing left to train, and what it finds is drawn anew."""
    for _ in range(2):
        done, project = quickstart(task, "--opts", "TRAIN.STEPS", "2", "TRAIN.WARMUP_STEPS", "1")
        assert done.returncode == 0, done.stdout + done.stderr
        assert float(re.search(result, done.stdout)[1]) >= 0
        images = [path.stem for path in (project / "examples/nuclei/images/val").iterdir()]
        assert {path.stem for path in (project / "quickstart/found/overlays").iterdir()} == {*images}
        assert Image.open(project / "quickstart/found.png").width > 224
        (page,) = (project / "quickstart").glob("*/nuclei/report.html")
        assert "Images with the" in page.read_text(encoding="utf-8")
        assert f"torchrun --nproc_per_node 8 main.py --cfg configs/{cfg} --pretrained crossformer-s.pth" in done.stdout
    assert "carrying on from" in done.stdout


def test_a_wrong_word_is_one_line():
    done = subprocess.run(["bash", "scripts/quickstart.sh", "detect"], cwd=ROOT, capture_output=True, text=True)
    expected = "error: there is no quick start detect; say nothing (for digits), segmentation or detection\n"
    assert (done.returncode, done.stderr) == (2, expected)
