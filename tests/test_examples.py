"""Each example runs as its text says, with the installed package, and learns what it is shown."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "examples").glob("*.py")))
def test_example(name):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "models"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, f"examples/{name}.py"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    overlap = re.search(r": (\d\.\d\d)\n$", done.stdout)
    assert overlap, done.stdout
    assert float(overlap[1]) > 0.5
