"""Runs that are killed, stopped, or cannot write: nothing is lost, and the weights are those of an undisturbed run."""

import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY_RUN, assert_same_tensors
from runs import RANDOM, Run, assert_same_run, checkpoint, undisturbed_run
from torch.distributed import TCPStore

from engine.step import StepResult, TrainStep
from main import main
from tasks.classification import Classification


@pytest.mark.slow  # test_sweep.py has a few kills that take less time
@pytest.mark.parametrize("kills", [3, 30])
def test_killed_again_and_again(tmp_path, digits, kills):
    """kill -9 of everything at random moments, in the middle of saving too, one after another in a single run."""
    epochs = max(8, kills)
    flags = (
        *TINY_RUN, *RANDOM, "TRAIN.EPOCHS", epochs, "DATA.NUM_WORKERS", "1", "TRAIN.EVAL_EVERY_EPOCHS", "4",
        "--data-path", digits, "--batch-size", "12",
    )  # fmt: skip
    undisturbed_run(tmp_path, *flags, "--tag", "whole")
    rng = random.Random(kills)
    saved = []
    for _ in range(kills):
        run = Run(tmp_path, *flags)
        assert run.wait_for("epoch ", times=rng.randint(1, 6))  # each step says so
        time.sleep(rng.uniform(0, 0.1))
        run.kill()
        folder = tmp_path / "output" / "crossformer_micro" / "run" / "checkpoints"
        saved.append(max((torch.load(p, weights_only=True)["step"] for p in folder.glob("[lp]*.pth")), default=0))
    assert saved == sorted(saved)
    assert saved[-1] < 6 * epochs, "it was killed while it ran"
    assert saved[-1] > 0
    assert f"after step {saved[-1]}" in undisturbed_run(tmp_path, *flags)
    assert_same_run(checkpoint(tmp_path, "whole"), checkpoint(tmp_path, "run"))
    assert_same_run(checkpoint(tmp_path, "whole", "best"), checkpoint(tmp_path, "run", "best"))
    print(f"{kills} kills after steps {saved} of {6 * epochs}")


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
TWO = (*TINY_RUN, *RANDOM, "TRAIN.EPOCHS", "12", "TRAIN.EVAL_EVERY_EPOCHS", "12", "--batch-size", "6")
RARELY_SAVED = ("--opts", "TRAIN.SAVE_EVERY_STEPS", "0")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, digits) -> dict:
    """What a whole run of TWO ends with."""
    folder = tmp_path_factory.mktemp("undisturbed")
    undisturbed_run(folder, *TWO, *RARELY_SAVED, "--data-path", digits, nproc=2)
    return checkpoint(folder, "run")


@pytest.mark.slow  # test_ranks_that_start_again_ignore_what_the_lost_ones_left takes less time
def test_torchrun_restarts_a_run_that_lost_a_rank(tmp_path, digits, undisturbed):
    run = Run(tmp_path, *TWO, "--data-path", digits, launcher=(*TORCHRUN, "--max-restarts", "2"))
    assert run.wait_for("step 20/72")
    os.kill(run.pid_of_rank(1), signal.SIGKILL)
    assert "carrying on from" in run.finish()
    assert_same_run(undisturbed, checkpoint(tmp_path, "run"))


def test_ranks_that_start_again_ignore_what_the_lost_ones_left(tmp_path):
    """torchrun keeps its key-value store: here it names the lost attempt, and says where its ranks listened."""
    left = {"attempt": "lost", "lost/1": "gone", "lost/all": "gone"}
    left |= {f"{prefix}default_pg/0//cpu//0/{rank}": "nowhere" for prefix in ("", "lost/") for rank in (0, 1)}
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for key, value in left.items():
        store.set(key, value)
    script = "from utils.distributed import start, stop, sum_over_ranks; import torch; start();"
    script += "assert sum_over_ranks(torch.ones(1)) == 2; stop()"
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
    environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env={**environment, "RANK": str(rank)})
        for rank in (1, 0)
    ]
    try:
        assert [process.wait(60) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(tmp_path, digits, number, undisturbed):
    flags = (*TWO, *RARELY_SAVED, "--data-path", digits)
    run = Run(tmp_path, *flags, launcher=TORCHRUN)
    assert run.wait_for("step 20/72")
    os.kill(run.pid_of_rank(1), number)
    asked = time.monotonic()
    said = run.finish(status=0)
    assert time.monotonic() - asked < 10
    step = checkpoint(tmp_path, "run")["step"]
    assert 20 <= step < 40
    assert f"stopped by {number.name} after step {step}; the same command carries on" in said
    assert f"after step {step}" in Run(tmp_path, *flags, launcher=TORCHRUN).finish()
    assert_same_run(undisturbed, checkpoint(tmp_path, "run"))


@pytest.mark.slow
def test_a_signal_to_torchrun_reaches_the_ranks(tmp_path, digits):
    run = Run(tmp_path, *TWO, *RARELY_SAVED, "--data-path", digits, launcher=TORCHRUN)
    assert run.wait_for("step 20/72")
    run.process.terminate()
    said = run.finish(status=1)  # torchrun says that it was stopped
    assert f"stopped by SIGTERM after step {checkpoint(tmp_path, 'run')['step']}; the same command" in said


@pytest.mark.slow
def test_ctrl_c_once_saves_and_twice_quits(tmp_path, digits):
    flags = (*TINY_RUN, "TRAIN.EPOCHS", "200", "TRAIN.EVAL_EVERY_EPOCHS", "200", "--data-path", digits)
    flags = (*flags, "--batch-size", "6")
    interruptible = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    run = Run(tmp_path, *flags, **interruptible)
    assert run.wait_for("step 20/")
    os.kill(run.process.pid, signal.SIGINT)
    said = run.finish(status=130)
    step = checkpoint(tmp_path, "run")["step"]
    assert f"stopped by Ctrl-C after step {step}; the same command carries on" in said

    run = Run(tmp_path, *flags, **interruptible)
    assert run.wait_for(f"step {step + 2}/")
    os.kill(run.process.pid, signal.SIGSTOP)  # so that it cannot end in between
    os.kill(run.process.pid, signal.SIGINT)
    os.kill(run.process.pid, signal.SIGCONT)
    assert "after step" in run.finish(status=130)


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while(tmp_path, digits):
    """Files cannot grow beyond 1 MB from step 8 on, and can again from step 20 on."""
    flags = (*TINY_RUN, *RANDOM, "TRAIN.EPOCHS", "6", "TRAIN.SAVE_EVERY_STEPS", "3", "--data-path", digits)
    flags = (*flags, "--batch-size", "12")
    undisturbed_run(tmp_path, *flags, "--tag", "whole")
    run = Run(tmp_path, *flags)
    folder = tmp_path / "output" / "crossformer_micro" / "run" / "checkpoints"
    unlimited = resource.RLIM_INFINITY
    assert run.wait_for("step 8/36")
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (1_000_000, unlimited))
    assert run.wait_for("cannot be written")
    assert run.wait_for("step 20/36")
    for path in folder.glob("[lp]*.pth"):
        assert torch.load(path, weights_only=True)["step"] <= 9, "the older files are whole"
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (unlimited, unlimited))
    said = run.finish()
    assert "last.pth cannot be written: File too large; the file before it is whole; free some space" in said
    assert "cannot be written" in (folder.parent / "log.txt").read_text()
    assert sorted(path.name for path in folder.iterdir()) == ["best.pth", "last.pth", "previous.pth"]
    assert_same_run(checkpoint(tmp_path, "whole"), checkpoint(tmp_path, "run"))


@pytest.mark.slow
def test_a_disk_that_stays_full(tmp_path, digits):
    """Training goes on to its end; that its result could not be saved is in the exit status."""
    flags = (*TINY_RUN, "TRAIN.EPOCHS", "3", "--data-path", digits, "--batch-size", "12")
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))}
    said = Run(tmp_path, *flags, **limit).finish(status=2)
    assert "step 18/18" in said
    assert said.rstrip().splitlines()[-1].startswith("error: ")
    assert not list((tmp_path / "output").rglob("*.pth*"))


@pytest.fixture
def train_badly(monkeypatch, tmp_path):
    """Train in this process; in some steps the loss is NaN, or they are left out."""

    def run(kind: str, steps: set[int], *arguments) -> int:
        calls = 0
        loss_of, update_of = Classification.loss, TrainStep.update

        def loss(self, model, batch):
            nonlocal calls
            calls += 1
            value, terms = loss_of(self, model, batch)
            return value * float("nan") if calls in steps and kind == "nan" else value, terms

        def update(self, value, terms):
            if kind == "left out" and calls in steps:
                self.optimizer.zero_grad()
                return StepResult(value, terms, value * 0, value * 0)
            return update_of(self, value, terms)

        with monkeypatch.context() as patch:
            patch.setattr(Classification, "loss", loss)
            patch.setattr(TrainStep, "update", update)
            return main([*map(str, arguments), "--output", str(tmp_path / "output")])

    return run


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("sgd", marks=pytest.mark.slow)])
def test_a_bad_batch_is_as_if_it_had_not_been(train_badly, tmp_path, digits, optimizer, capsys):
    """NaN in the first step, in one in the middle and in two in a row: weights, optimizer and EMA stay clean."""
    flags = (*TINY_RUN, *RANDOM, "TRAIN.OPTIMIZER.NAME", optimizer, "--data-path", digits, "--batch-size", "12")
    for kind in ("nan", "left out"):
        assert train_badly(kind, {1, 5, 9, 10}, *flags, "--tag", kind.replace(" ", "_")) == 0
        assert "4 steps skipped" in capsys.readouterr().out
    a, b = checkpoint(tmp_path, "nan"), checkpoint(tmp_path, "left_out")
    assert all(torch.isfinite(value).all() for value in a["model"].values())
    a, b = ({k: v for k, v in content.items() if k != "config"} for content in (a, b))
    assert_same_tensors(a, b)


def test_bad_batches_in_a_row_stop_the_run(train_badly, tmp_path, digits, capsys):
    flags = (*TINY_RUN, "TRAIN.EPOCHS", "6", "--data-path", digits)
    assert train_badly("nan", {3, *range(8, 40)}, *flags, "--batch-size", "12") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    results = tmp_path / "output" / "crossformer_micro" / "run"
    assert "20 steps in a row had gradients that are not finite, the last of them step 27 (loss nan)" in line
    assert str(results / "checkpoints" / "last.pth") in line
    bad = json.loads((results / "bad_batch.json").read_text())
    assert bad["step"] == 27
    assert len(bad["images"]) == 12
    assert all(Path(entry["image"]).exists() and entry["epoch"] == 5 for entry in bad["images"])
    assert checkpoint(tmp_path, "run")["step"] == 24


@pytest.mark.slow
def test_a_rank_that_does_not_answer_is_named(tmp_path, digits):
    """Rank 1 is stopped, as a host that hangs; rank 0 must not wait for it for ever, and says where it was."""
    run = Run(tmp_path, *TWO, "--data-path", digits, "--opts", "TRAIN.HANG_MINUTES", "0.1", launcher=TORCHRUN)
    assert run.wait_for("step 20/72")
    os.kill(run.pid_of_rank(1), signal.SIGSTOP)
    try:
        assert run.wait_for("error (rank 0): nothing has happened for 0.1 minutes", seconds=60)
        assert run.wait_for(f"rank 1 on {socket.gethostname()} gives no sign of life", seconds=30)
        stacks = tmp_path / "output" / "crossformer_micro" / "run" / "stacks_rank_0.txt"
        assert str(stacks) in run.said()
        assert "in take_steps" in stacks.read_text()
    finally:
        run.kill()


def state_of(pid: int) -> str:
    """As /proc has it: R, S, T (stopped), Z (it has ended) ..."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.slow
def test_a_rank_that_is_cut_off_ends_all_the_same(tmp_path, digits):
    """Neither the other rank nor the launcher, which keeps the store, answers: as when the network has gone."""
    run = Run(tmp_path, *TWO, "--data-path", digits, "--opts", "TRAIN.HANG_MINUTES", "0.1", launcher=TORCHRUN)
    assert run.wait_for("step 20/72")
    alone = run.pid_of_rank(0)
    for pid in (run.process.pid, run.pid_of_rank(1)):
        os.kill(pid, signal.SIGSTOP)
    try:
        deadline = time.monotonic() + 60
        while state_of(alone) != "Z":
            assert time.monotonic() < deadline, run.said()
            time.sleep(0.1)
        assert "error (rank 0): nothing has happened for 0.1 minutes" in run.said()
    finally:
        run.kill()


@pytest.mark.slow
def test_a_run_that_was_paused_goes_on(tmp_path, digits):
    """Time in which nothing of it ran, as in a suspended machine, is no hang."""
    flags = (*TINY_RUN, "TRAIN.EPOCHS", "6", "TRAIN.HANG_MINUTES", "0.05", "--data-path", digits)
    run = Run(tmp_path, *flags, "--batch-size", "6")
    assert run.wait_for("step 20/72")
    os.kill(run.process.pid, signal.SIGSTOP)
    time.sleep(5)
    os.kill(run.process.pid, signal.SIGCONT)
    assert "step 72/72" in run.finish()


def test_a_loader_process_that_dies_is_named(tmp_path, digits):
    flags = (*TINY_RUN, "TRAIN.EPOCHS", "400", "DATA.NUM_WORKERS", "2", "TRAIN.EVAL_EVERY_EPOCHS", "400")
    run = Run(tmp_path, *flags, "--data-path", digits, "--batch-size", "6")
    assert run.wait_for("step 20/")
    worker = next(pid for pid in run.processes() if pid != run.process.pid)
    os.kill(worker, signal.SIGKILL)
    killed = time.monotonic()
    said = run.finish(status=2)
    assert time.monotonic() - killed < 10
    assert f"error: a loader process has died (process {worker}, SIGKILL)" in said
    assert "use a smaller DATA.NUM_WORKERS" in said
    assert "Traceback" not in said


MANY_DEATHS = """
import os
import signal
import sys
import time
from pathlib import Path

import torch

import engine.train
from main import main_of_a_process

rounds, output, arguments = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
statuses = []
for number in range(rounds):
    said = output / f"{number}.txt"
    run = os.fork()
    if not run:
        os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY), 1)
        os.dup2(1, 2)
        main_of_a_process([*arguments, "--output", str(output / str(number))])
    while "step 5/" not in (said.read_text() if said.exists() else ""):
        assert os.waitpid(run, os.WNOHANG) == (0, 0), said.read_text()
        time.sleep(0.01)
    children = Path(f"/proc/{run}/task/{run}/children").read_text().split()
    os.kill(int(children[number % len(children)]), signal.SIGKILL if number % 2 else signal.SIGSEGV)
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(run, 0)[1]))
    assert "a loader process has died" in said.read_text(), said.read_text()
print(*sorted(set(statuses)))
"""


@pytest.mark.slow  # test_a_loader_process_that_dies_is_named is one of them
@pytest.mark.parametrize("rounds", [3, 100])
def test_a_run_that_lost_a_loader_process_ends_as_it_should(tmp_path, digits, rounds):
    """Again and again: a process that crashes on its way out does so now and then only."""
    flags = (*TINY_RUN, "TRAIN.EPOCHS", "400", "DATA.NUM_WORKERS", "2", "TRAIN.EVAL_EVERY_EPOCHS", "400")
    flags = (*flags, "--data-path", digits, "--batch-size", "6")
    done = subprocess.run(
        [sys.executable, "-c", MANY_DEATHS, str(rounds), str(tmp_path), *map(str, flags)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.stdout.split() == ["2"], done.stdout + done.stderr
