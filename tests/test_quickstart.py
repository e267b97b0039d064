"""The quick start, as a user starts it."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

SHORT = ["--opts", "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0"], 20, 1
FULL = pytest.param([], 97, 2, marks=pytest.mark.slow)


@pytest.mark.parametrize(("more", "least", "times"), [SHORT, FULL], ids=["short", "full"])
def test_quickstart(tmp_path, more, least, times):
    """In a copy of the project; the second time there is nothing left to train."""
    leave_out = shutil.ignore_patterns(".git", ".venv*", "output", "quickstart", "__pycache__")
    project = shutil.copytree(ROOT, tmp_path / "project", ignore=leave_out)
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix, "PATH": path}
    command, how = ["bash", "scripts/quickstart.sh", *more], dict(capture_output=True, text=True, timeout=600)
    for _ in range(times):
        done = subprocess.run(command, cwd=project, env=environment, **how)
        assert done.returncode == 0, done.stdout + done.stderr
        top1 = re.search(r"Top-1 on the digits: ([\d.]+) %", done.stdout)
        assert float(top1[1]) >= least
        assert (project / "quickstart/crossformer_micro/digits/curves.png").stat().st_size > 10_000
        assert "torchrun --nproc_per_node 8 main.py --cfg configs/small.yaml --data-path /imagenet" in done.stdout
    assert ("carrying on from" in done.stdout) == (times > 1)
