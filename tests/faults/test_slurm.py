"""Runs on a real Slurm of two hosts: started by srun itself, warned, queued again."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT
from runs import PAIR as FLAGS
from runs import Run, assert_same_run, checkpoint, end_of_a_pair
from slurm import Slurm, can_have_slurm

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(can_have_slurm()), reason=can_have_slurm())]
SRUN = ("srun", "-N2", "--ntasks-per-node", "1")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with Slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, digits) -> dict:
    """What two processes on one host end with."""
    return end_of_a_pair(tmp_path_factory.mktemp("undisturbed"), digits)


def wait_for(true, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def submit(slurm, tmp_path, *flags) -> str:
    """The number of a job on both hosts."""
    words = ("--nodes", "2", "--time", "10", "--sbatch", f"--output={tmp_path}/job.log", "--", *flags)
    said = slurm.on("hosta", "bash", "scripts/slurm.sh", *words, "--output", tmp_path / "output", cwd=ROOT)
    return re.search(r"Submitted batch job (\d+)", said)[1]


def test_srun_starts_one_run(slurm, tmp_path, digits, undisturbed):
    said = Run(tmp_path, *FLAGS, "--data-path", digits, inside=(*slurm.enter("hosta"), *SRUN)).finish()
    assert "2 x CPU" in said
    assert_same_run(undisturbed, checkpoint(tmp_path, "run"))


def test_a_warning_saves_and_the_same_command_carries_on(slurm, tmp_path, digits, undisturbed):
    run = Run(tmp_path, *FLAGS, "--data-path", digits, inside=(*slurm.enter("hosta"), *SRUN))
    assert run.wait_for("step 20/72")
    number = slurm.on("hosta", "squeue", "-h", "-o", "%i").split()[0]
    slurm.on("hosta", "scancel", "--signal=USR1", f"{number}.0")
    assert "stopped by SIGUSR1 after step" in run.finish()
    said = Run(tmp_path, *FLAGS, "--data-path", digits, inside=(*slurm.enter("hosta"), *SRUN)).finish()
    assert "carrying on from" in said
    assert_same_run(undisturbed, checkpoint(tmp_path, "run"))


def test_a_job_that_queues_itself_again(slurm, tmp_path, digits, undisturbed):
    """Warned by hand, as Slurm warns it before its time is up."""
    number = submit(slurm, tmp_path, *FLAGS, "--data-path", digits)
    log = tmp_path / "job.log"
    wait_for(lambda: log.exists() and "step 20/72" in log.read_text(), 120)
    slurm.on("hosta", "scancel", "--batch", "--signal=USR1", number)
    wait_for(lambda: slurm.job(number)["JobState"] == "COMPLETED", 400)
    assert slurm.job(number)["Restarts"] == "1"
    assert "stopped by SIGUSR1 after step" in log.read_text()
    assert "carrying on from" in log.read_text()
    assert_same_run(undisturbed, checkpoint(tmp_path, "run"))


def test_a_job_whose_process_is_killed_is_queued_again_and_one_with_a_mistake_is_not(slurm, tmp_path, digits):
    number = submit(slurm, tmp_path, *FLAGS, "--data-path", digits, "--opts", "TRAIN.EPOCHS", "100")
    log = tmp_path / "job.log"
    wait_for(lambda: log.exists() and "step 20/" in log.read_text(), 120)
    ranks = [process for process in Path("/proc").glob("[0-9]*") if is_rank(process, "1", number)]
    assert len(ranks) == 1
    os.kill(int(ranks[0].name), signal.SIGKILL)
    wait_for(lambda: slurm.job(number)["Restarts"] == "1", 60)
    slurm.on("hosta", "scancel", number)
    number = submit(slurm, tmp_path, *FLAGS, "--data-path", tmp_path / "nowhere")
    wait_for(lambda: slurm.job(number)["JobState"] == "FAILED", 120)
    assert slurm.job(number)["ExitCode"] == "2:0"
    assert slurm.job(number)["Restarts"] == "0"


def is_rank(process: Path, rank: str, job: str) -> bool:
    """Whether it is the task of that number."""
    try:
        environment = (process / "environ").read_text(errors="replace").split("\0")
        words = (process / "cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return False
    return (
        {f"SLURM_PROCID={rank}", f"SLURM_JOB_ID={job}"} <= {*environment}
        and "main.py" in words
        and "python" in words[0]
    )


def test_what_srun_lacks_is_said(slurm):
    """As where a container does not keep Slurm's variables."""
    command = [*slurm.enter("hosta"), *SRUN, "env", "-u", "SLURM_LOCALID", "python", "main.py", "--throughput"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "srun has started 2 tasks but SLURM_LOCALID is not set: they cannot form one group" in done.stderr
