"""Runs in processes of their own, to be killed, stopped and looked at."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
from commands import start
from conftest import ROOT, TINY_RUN, assert_same_tensors

RANDOM = (
    "MODEL.CROSSFORMER.EMBED_DIM", "16", "MODEL.CROSSFORMER.DEPTHS", "[1, 1, 1, 1]",
    "MODEL.DROP_PATH_RATE", "0.2", "AUG.MIXUP", "0.8", "AUG.CUTMIX", "1.0", "AUG.REPROB", "0.25",
    "TRAIN.EMA_DECAY", "0.9", "TRAIN.SAVE_EVERY_STEPS", "1",
)  # fmt: skip
"""A small network, everything that is random, and each step is saved."""
PAIR = (*TINY_RUN, *RANDOM, "TRAIN.EPOCHS", "12", "TRAIN.EVAL_EVERY_EPOCHS", "12", "--batch-size", "6")
"""For two processes: 72 steps."""


class Run:
    """``main.py`` (or torchrun around it) in a session of its own, its output in a file; ``inside`` of a host, say."""

    def __init__(
        self,
        tmp_path: Path,
        *arguments,
        launcher: tuple = (),
        inside: tuple = (),
        script="main.py",
        preexec_fn=None,
        **environment,
    ):
        self.output = tmp_path / f"stdout-{time.monotonic_ns()}"
        self.mark = f"TEST_RUN={self.output.name}"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TEST_RUN": self.output.name, **environment}
        words = (*inside, sys.executable, *launcher, script, *arguments, "--output", tmp_path / "output")
        with open(self.output, "wb") as file:
            self.process = subprocess.Popen(
                [str(word) for word in words],
                cwd=ROOT, env={key: str(value) for key, value in environment.items()}, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=preexec_fn,
            )  # fmt: skip

    def said(self) -> str:
        return self.output.read_text(errors="replace")

    def wait_for(self, text: str, seconds: float = 120, times: int = 1) -> bool:
        """Whether it says so (so many times) before it ends."""
        deadline = time.monotonic() + seconds
        while self.said().count(text) < times:
            if self.process.poll() is not None:
                return self.said().count(text) >= times
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(self.said())
            time.sleep(0.005)
        return True

    def processes(self) -> dict[int, list[str]]:
        """All that belong to it (torchrun gives each rank a session of its own), with their environments."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                environment = (entry / "environ").read_text(errors="replace").split("\0")
                if self.mark in environment:
                    found[int(entry.name)] = environment
        return found

    def kill(self) -> None:
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def finish(self, status: int = 0, seconds: float = 240) -> str:
        try:
            assert self.process.wait(seconds) == status, self.said()
        finally:
            if self.process.poll() is None:
                self.kill()
        return self.said()

    def pid_of_rank(self, rank: int) -> int:
        """The process that torchrun has started as that rank."""
        return next(pid for pid, environment in self.processes().items() if f"RANK={rank}" in environment)


def undisturbed_run(tmp_path: Path, *arguments, nproc: int = 1) -> str:
    """What a run says that nobody kills or stops; it may carry on one that somebody has."""
    done = start("main.py", *arguments, "--output", tmp_path / "output", nproc=nproc)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def checkpoint(tmp_path: Path, tag: str, name: str = "last") -> dict:
    path = tmp_path / "output" / "crossformer_micro" / tag / "checkpoints" / f"{name}.pth"
    return torch.load(path, weights_only=True)


def assert_same_run(a: dict, b: dict) -> None:
    """Weights, moving average, optimizer, step, best score: all but the name of the run."""
    assert_same_tensors(*({k: v for k, v in content.items() if k != "config"} for content in (a, b)))


def end_of_a_pair(tmp_path: Path, digits: Path) -> dict:
    """What two processes on one host end with."""
    undisturbed_run(tmp_path, *PAIR, "--data-path", digits, nproc=2)
    return checkpoint(tmp_path, "run")
