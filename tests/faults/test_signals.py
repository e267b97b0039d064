"""Signals to a process, its group and its launcher, whatever the run is at: saved, and carried on bit-identically."""

import itertools
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY_RUN
from runs import RANDOM, Run, assert_same_run, checkpoint, undisturbed_run

HANGING = """
import os
import subprocess
import sys

sys.path.insert(0, {root!r})

import time

import data.folder
import data.index
from main import main_of_a_process

at, mark = os.environ["HANGS_AT"], os.environ["MARK"]


def say():
    os.close(os.open(mark, os.O_CREAT))


def read(self, i, before=data.folder.FileIndex.read):
    if at == "training" and i < 3:
        time.sleep(0.5)  # or the run might be done before the signal is sent
    which = "evaluation" if "val" in self.name(i) else "waiting"
    if at == which and i == 30 and (at == "evaluation" or os.path.exists(mark + ".epoch")):
        say()
        open(os.environ["FIFO"], "rb").read()  # as a file on a disk that does not answer
    return before(self, i)


def scan(self, before=data.folder.FolderLayout.scan):
    if at == "index":
        say()
        time.sleep(600)
    return before(self)


data.folder.FileIndex.read, data.folder.FolderLayout.scan = read, scan
if __name__ == "__main__":
    main_of_a_process(sys.argv[1:])
"""
"""``main.py``, which at one point waits for ever, and says so by a file."""

PHASES = ("training", "evaluation", "index", "waiting")
TARGETS = ("process", "group", "torchrun", "launch.py")
NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
FLAGS = (
    *TINY_RUN, *RANDOM, "TRAIN.EPOCHS", "4", "TRAIN.EVAL_EVERY_EPOCHS", "2", "TRAIN.SAVE_EVERY_STEPS", "0",
)  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, digits) -> dict:
    """What a whole run ends with, on one process and on two."""
    ends = {}
    for nproc in (1, 2):
        folder = tmp_path_factory.mktemp("undisturbed")
        undisturbed_run(folder, *FLAGS, "--data-path", digits, "--batch-size", 12 // nproc, nproc=nproc)
        ends[nproc] = checkpoint(folder, "run")
    return ends


def launcher_of(target: str) -> tuple[str, ...]:
    flags = ("--standalone", "--nproc_per_node", "2")
    return {
        "torchrun": ("-m", "torch.distributed.run", *flags),
        "launch.py": ("scripts/launch.py", *flags),
    }.get(target, ())


def interruptible() -> None:
    """A shell may have started the tests in the background, where Ctrl-C and SIGHUP are ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def expected_status(target: str, number: int) -> int:
    """torchrun calls it a failure when it gets a signal, and SIGUSR1 ends it on the spot."""
    if target == "torchrun":
        return -number if number == signal.SIGUSR1 else 1
    return 130 if number == signal.SIGINT else 0


def start_hanging(tmp_path, flags, target: str, phase: str) -> tuple[Run, Path]:
    """A run that will hang at ``phase``, in the second epoch or later; and the file that says that it does."""
    script, mark = tmp_path / "hanging.py", tmp_path / "mark"
    script.write_text(HANGING.format(root=str(ROOT)))
    os.mkfifo(tmp_path / "fifo")
    run = Run(
        tmp_path, *flags, launcher=launcher_of(target), script=script, preexec_fn=interruptible,
        HANGS_AT=phase, MARK=mark, FIFO=tmp_path / "fifo",
    )  # fmt: skip
    if phase in ("waiting", "training"):
        assert run.wait_for("step 8/24")
        Path(f"{mark}.epoch").touch()
    return run, mark


def wait_until_stuck(run: Run, mark: Path) -> None:
    deadline = time.monotonic() + 120
    while not mark.exists():
        assert run.process.poll() is None, run.said()
        assert time.monotonic() < deadline, run.said()
        time.sleep(0.02)
    time.sleep(0.5)  # the batches before it are used up


def wait_for_all(run: Run, seconds: float) -> None:
    """torchrun may be gone before its ranks are."""
    deadline = time.monotonic() + seconds
    while run.processes():
        assert time.monotonic() < deadline, run.processes().keys()
        time.sleep(0.05)


def stop_and_carry_on(tmp_path, digits, undisturbed, number, target, phase, workers) -> None:
    nproc = 2 if target in ("torchrun", "launch.py") else 1
    data = tmp_path / "data"  # of its own, so that it has to be indexed
    data.mkdir()
    for split in ("train", "val"):
        (data / split).symlink_to(digits / split)
    flags = (*FLAGS, "DATA.NUM_WORKERS", workers, "--data-path", data, "--batch-size", 12 // nproc)
    run, mark = start_hanging(tmp_path, flags, target, phase)
    if phase != "training":
        wait_until_stuck(run, mark)
    asked = time.monotonic()
    if target == "group":
        os.killpg(run.process.pid, number)
    else:
        run.process.send_signal(number)
    said = run.finish(status=expected_status(target, number), seconds=60)
    wait_for_all(run, 30)
    assert time.monotonic() - asked < 20, "ten seconds, on a machine that may be busy"
    if target != "torchrun":
        assert "Traceback" not in said
    by_death = (target, number) == ("torchrun", signal.SIGUSR1)  # it ends torchrun, and that ends the ranks
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM" if by_death else number.name
    if phase == "index":
        assert f"stopped by {name} before training began" in run.said()
    else:
        step = checkpoint(tmp_path, "run")["step"]
        assert f"stopped by {name} after step {step}; the same command carries on" in run.said()
        assert step == 12 if phase == "evaluation" else step >= 8
    said = undisturbed_run(tmp_path, *flags, nproc=nproc)
    assert phase == "index" or f"after step {step}" in said
    assert_same_run(undisturbed[nproc], checkpoint(tmp_path, "run"))


QUICK = [
    (signal.SIGTERM, "group", "training", 2),
    (signal.SIGINT, "process", "waiting", 0),
]
"""A few; of SIGHUP test_a_terminal_that_is_closed tells."""

ALL = [case for case in itertools.product(NUMBERS, TARGETS, PHASES, (0, 2)) if case not in QUICK]


@pytest.mark.parametrize(
    ("number", "target", "phase", "workers"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL)],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else str(value),
)
def test_a_signal_saves_and_ends_the_run(tmp_path, digits, undisturbed, number, target, phase, workers):
    stop_and_carry_on(tmp_path, digits, undisturbed, number, target, phase, workers)


@pytest.mark.slow
def test_a_second_ctrl_c_ends_a_run_that_waits_at_once(tmp_path, digits):
    """The main thread is stuck in a read and answers to nothing."""
    flags = (*FLAGS, "--data-path", digits, "--batch-size", "12")
    run, mark = start_hanging(tmp_path, flags, "process", "waiting")
    wait_until_stuck(run, mark)
    run.process.send_signal(signal.SIGINT)
    time.sleep(2.5)  # a launcher may send the first one twice
    run.process.send_signal(signal.SIGINT)
    asked = time.monotonic()
    said = run.finish(status=130, seconds=20)
    assert time.monotonic() - asked < 2
    assert "stopped at once by a second Ctrl-C" in said


@pytest.mark.slow
def test_ranks_end_with_a_launcher_that_was_killed(tmp_path, digits):
    """kill -9 of torchrun: nobody trains on unseen, and what was trained is saved."""
    run = Run(tmp_path, *FLAGS, "--data-path", digits, "--batch-size", "6", launcher=launcher_of("torchrun"))
    assert run.wait_for("step 8/24")
    run.process.kill()
    run.process.wait()
    wait_for_all(run, 30)
    assert f"stopped by SIGTERM after step {checkpoint(tmp_path, 'run')['step']}" in run.said()


def test_a_terminal_that_is_closed(tmp_path, digits):
    """It sends SIGHUP to what runs in it, and whatever is written to it fails from then on."""
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(ROOT)
        flags = (*FLAGS, "TRAIN.EPOCHS", "99", "--data-path", digits, "--batch-size", "12")
        flags = (*flags, "--output", tmp_path / "output")
        os.execve(sys.executable, [sys.executable, "main.py", *map(str, flags)], {**os.environ, "OMP_NUM_THREADS": "1"})
    log = tmp_path / "output" / "crossformer_micro" / "run" / "log.txt"
    deadline = time.monotonic() + 120
    while not log.exists() or "step 8/" not in log.read_text():
        assert time.monotonic() < deadline
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 65536)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert f"stopped by SIGHUP after step {checkpoint(tmp_path, 'run')['step']}" in log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_model_is_compiled(tmp_path, digits, number):
    """It takes minutes, of which most are spent where no signal is looked for."""
    flags = (*FLAGS, "TRAIN.COMPILE", "default", "--data-path", digits, "--batch-size", "12")
    run = Run(tmp_path, *flags, preexec_fn=interruptible)
    assert run.wait_for("starting from random weights")
    time.sleep(8)
    assert "epoch" not in run.said(), "it has been compiled already"
    os.killpg(run.process.pid, number)
    asked = time.monotonic()
    said = run.finish(status=expected_status("group", number), seconds=60)
    assert time.monotonic() - asked < 20
    assert "after step 0; the same command carries on" in said
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["evaluation", "waiting"])
def test_a_signal_to_one_rank_ends_all_whatever_they_are_at(tmp_path, digits, phase):
    """The others do not hear of it in a step, for there is none."""
    flags = (*FLAGS, "--data-path", digits, "--batch-size", "6")
    run, mark = start_hanging(tmp_path, flags, "torchrun", phase)
    wait_until_stuck(run, mark)
    os.kill(run.pid_of_rank(1), signal.SIGTERM)
    said = run.finish(status=0, seconds=60)
    assert "Traceback" not in said
    assert f"stopped by SIGTERM after step {checkpoint(tmp_path, 'run')['step']}" in said


SLOW_RESCUE = """
import signal
import time

from engine.stopping import StopRequest


def rescue():
    print("saving", flush=True)
    time.sleep(60)


signal.signal(signal.SIGINT, signal.default_int_handler)
with StopRequest() as stop:
    stop.rescue = rescue
    stop.defer()
    print("stuck", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_a_second_ctrl_c_ends_a_save_that_takes_for_ever(tmp_path):
    run = subprocess.Popen([sys.executable, "-c", SLOW_RESCUE], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "stuck\n"
    run.send_signal(signal.SIGINT)
    assert run.stdout.readline() == "saving\n"
    run.send_signal(signal.SIGINT)
    assert run.wait(5) == 130


@pytest.mark.slow
def test_a_launcher_without_ranks_ends_at_once(tmp_path):
    """It waits for another host, which never comes."""
    flags = ("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--nproc_per_node", "1")
    run = Run(tmp_path, launcher=("scripts/launch.py", *flags), preexec_fn=interruptible)
    time.sleep(15)
    run.process.send_signal(signal.SIGINT)
    run.finish(status=130, seconds=15)


ANSWERED = """
import signal

from engine.stopping import StopRequest

with StopRequest() as stop:
    stop.defer()
    stop.rescue = lambda: "saved alone"
    signal.raise_signal(signal.SIGTERM)
    stop.answer()
    stop.outlast(RuntimeError("Connection closed by peer"))
"""


@pytest.mark.slow
def test_a_last_save_that_another_rank_did_not_wait_for(tmp_path):
    """All ranks have agreed to stop and one has lost its patience: what was to be saved together is saved alone."""
    done = subprocess.run([sys.executable, "-c", ANSWERED], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "saved alone (after RuntimeError: Connection closed by peer)\n")


IN_A_FORK = """
import os
import signal
import time

sent = []
os.register_at_fork(before=lambda: sent or sent.append(signal.raise_signal(signal.SIGTERM)))

from engine.stopping import Stopped, StopRequest

with StopRequest():
    try:
        os.waitpid(os.fork() or os._exit(0), 0)
        time.sleep(5)
        print("lost")
    except Stopped:
        print("stopped")
        os._exit(0)
"""


@pytest.mark.slow
def test_a_signal_that_waits_for_a_fork_is_taken_after_it():
    """Hooks registered first run last before a fork, when signals are held already."""
    done = subprocess.run([sys.executable, "-c", IN_A_FORK], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("stopped\n", "")
