"""What tests take for a real start of a command does what one does."""

import re

import pytest
from commands import start
from conftest import TINY_RUN, assert_same_tensors


@pytest.mark.parametrize(
    "command", [("main.py", "--help"), ("main.py", "--epocs"), ("scripts/report.py", "/nowhere")], ids=" ".join
)
def test_a_fork_says_what_a_real_start_says(command):
    fork, real = start(*command), start(*command, fresh=True)
    assert (fork.returncode, fork.stdout, fork.stderr) == (real.returncode, real.stdout, real.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 2])
def test_a_fork_trains_as_a_real_start_does(run_main, digits, nproc):
    """With everything random: the same bits, and the same words but for the times in them."""
    opts = "MODEL.DROP_PATH_RATE 0.2 AUG.MIXUP 0.8 AUG.CUTMIX 1.0 AUG.REPROB 0.25 TRAIN.EMA_DECAY 0.9".split()
    flags = (*TINY_RUN, *opts, "AUG.AUTO_AUGMENT", "rand-m9-mstd0.5-inc1", "DATA.NUM_WORKERS", 1)
    flags = (*flags, "--data-path", digits, "--batch-size", 12 // nproc)
    fork, real = (run_main(*flags, "--tag", tag, tag=tag, nproc=nproc, fresh=tag == "real") for tag in ("fork", "real"))
    for name in ("last", "best"):
        a, b = fork.checkpoint(name), real.checkpoint(name)
        assert a.pop("config") != b.pop("config")  # their tags differ
        assert_same_tensors(a, b)
    timed = r"[\d,.]+( images/s| %| GB| left)|\d+:\d+(:\d+)?|/(fork|real)\b"
    assert re.sub(timed, "", fork.stdout) == re.sub(timed, "", real.stdout)
    assert fork.stderr == ""
