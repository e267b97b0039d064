"""A run that is killed at every call that moves a file, and inside of writes, leaves the files of one that was not."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("every", [25, 1])
def test_killed_at_every_call(tmp_path, digits, every):
    """Before and after each replace, link, unlink and fsync, and in the middle of lines and checkpoints."""
    done = subprocess.run(
        [sys.executable, "tests/faults/killing.py", digits, tmp_path, str(every)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
