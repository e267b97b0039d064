"""The quick start, as a user starts it."""

import os
import re
import shutil
import subprocess
import sys

from conftest import ROOT


def test_quickstart(tmp_path):
    """In a copy of the project, twice: the second time there is nothing left to train."""
    leave_out = shutil.ignore_patterns(".git", ".venv*", "output", "quickstart", "__pycache__")
    project = shutil.copytree(ROOT, tmp_path / "project", ignore=leave_out)
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "VIRTUAL_ENV": sys.prefix, "PATH": path}
    for _ in range(2):
        done = subprocess.run(
            ["bash", "scripts/quickstart.sh"], cwd=project, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
        top1 = re.search(r"Top-1 on the digits: ([\d.]+) %", done.stdout)
        assert float(top1[1]) >= 97
        assert (project / "quickstart/crossformer_micro/digits/curves.png").stat().st_size > 10_000
        assert "torchrun --nproc_per_node 8 main.py --cfg configs/small.yaml --data-path /imagenet" in done.stdout
    assert "carrying on from" in done.stdout
