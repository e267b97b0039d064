"""What Slurm, MPI and others say of a group of processes, and what is made of it."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
from commands import environments_of_ranks, start
from conftest import ROOT, TINY_RUN

from utils import distributed
from utils.errors import UserError
from utils.launchers import PORTS, first_host, gpu_of_this_process, port_of, understand_launcher

SLURM = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NTASKS": "16",
    "SLURM_STEP_NODELIST": "gpu[007-008,011]", "SLURM_NODELIST": "gpu[001-064]",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}  # fmt: skip
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1", "MASTER_ADDR": "node1"}


def understood(environment: dict[str, str]) -> dict[str, str]:
    after = dict(environment)
    understand_launcher(after)
    return {key: value for key, value in after.items() if environment.get(key) != value}


def test_what_each_launcher_says():
    port = str(port_of("4711.0"))
    assert understood(SLURM) == {
        "RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu007", "MASTER_PORT": port,
    }  # fmt: skip
    assert understood(OPEN_MPI) == {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500",
    }  # fmt: skip
    assert understood(MPICH) == {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "29500"}
    by_mpirun = {**SLURM, **OPEN_MPI}  # whose daemon srun has started
    assert understood(by_mpirun)["RANK"] == "3"
    job = understood({**SLURM, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"})
    assert "MASTER_ADDR" not in job
    assert "MASTER_PORT" not in job


def test_a_process_that_is_alone():
    """Alone in a job, in the script of one, within torchrun in a job, or of a Kubernetes job of one."""
    batch_script = {key: value for key, value in SLURM.items() if key != "SLURM_STEP_ID"}
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    alone = {**SLURM, "SLURM_NTASKS": "1"}
    for environment in ({}, batch_script, {**SLURM, **torchrun}, alone, {"RANK": "0", "WORLD_SIZE": "1"}):
        assert understood(environment) == {}


PLACES = {"aabb": 2, "aab": None, "abab": None, "aaab": None, "abb": None, "ab": 1, "aa": 2, "": None}


@pytest.mark.parametrize("places", PLACES)
def test_hosts_with_as_many_processes(monkeypatch, places):
    monkeypatch.setattr(distributed, "_places", [*places])
    assert distributed.processes_of_each_host() == PLACES[places]


INCOMPLETE = {
    "srun has started 16 tasks but SLURM_LOCALID is not set": {**SLURM, "SLURM_LOCALID": ""},
    "srun has started 16 tasks but SLURM_STEP_NODELIST is not set": {**SLURM, "SLURM_STEP_NODELIST": ""},
    "Open MPI has started 4 processes on several hosts, and MASTER_ADDR is not set": {
        **OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    },
    "the environment has RANK but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT": {"RANK": "1"},
    "the environment has RANK but not MASTER_PORT": {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a"},
    "the environment has RANK=2 of WORLD_SIZE=2": {
        "RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1",
    },
    "the environment has WORLD_SIZE='two', which is no number": {"WORLD_SIZE": "two"},
}  # fmt: skip


@pytest.mark.parametrize("message", INCOMPLETE)
def test_a_group_that_cannot_be(message):
    with pytest.raises(UserError) as error:
        understand_launcher({**INCOMPLETE[message]})
    assert message in str(error.value)


def test_it_ends_in_one_line():
    done = start("main.py", "--throughput", WORLD_SIZE="2", RANK="two")
    assert done.returncode == 2
    assert done.stderr.startswith("error")
    assert len(done.stderr.splitlines()) == 1
    assert "RANK='two', which is no number" in done.stderr


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("hosta", "hosta"), ("hosta,hostb", "hosta"), ("node[003-012]", "node003"), ("node[9,11-12],x1", "node9"),
        ("rack[1-2]n[07,09]-ib,z", "rack1n07-ib"), ("n-1.cluster,n-2.cluster", "n-1.cluster"),
    ],
)  # fmt: skip
def test_first_host(nodes, first):
    assert first_host(nodes) == first


def test_jobs_have_ports_of_their_own():
    ports = {port_of(f"{job}.{step}") for job in range(100) for step in range(3)}
    assert len(ports) > 290
    assert all(port in PORTS for port in ports)


def test_which_gpu(monkeypatch):
    """All GPUs of a host, or as Slurm binds them its own alone."""
    assert [gpu_of_this_process(local, 8) for local in range(8)] == [*range(8)]
    with pytest.raises(UserError, match="process 1 of host .* has no GPU: there are 1"):
        gpu_of_this_process(1, 1)
    monkeypatch.setenv("SLURM_PROCID", "1")
    assert gpu_of_this_process(1, 1) == 0
    with pytest.raises(UserError, match="process 4 of host .* has no GPU: there are 4"):
        gpu_of_this_process(4, 4)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    with pytest.raises(UserError, match="has no GPU"):
        gpu_of_this_process(1, 1)


def test_what_is_an_error_of_the_network():
    assert distributed.is_of_the_network(torch.distributed.DistNetworkError("x"))
    assert distributed.is_of_the_network(RuntimeError("[../gloo/transport/tcp/pair.cc:538] Connection closed by peer"))
    assert not distributed.is_of_the_network(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not distributed.is_of_the_network(UserError("connection closed"))


@pytest.mark.slow
def test_all_ranks_end_with_the_error_that_one_of_them_has_met(tmp_path, digits):
    """Whoever starts runs again goes by the highest status of all, and that one would come again."""
    data = shutil.copytree(digits, tmp_path / "data")
    bad = min((data / "train").rglob("*.png"))
    bad.write_bytes(bad.read_bytes()[:60])
    environments, store = environments_of_ranks(2, {**os.environ, "OMP_NUM_THREADS": "1"})
    words = (sys.executable, "main.py", *TINY_RUN, "DATA.BATCH_SIZE", "12", "--data-path", data, "--output", tmp_path)
    how = {"cwd": ROOT, "stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    ranks = [subprocess.Popen([str(word) for word in words], env=each, **how) for each in environments]
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    del store
    assert [rank.returncode for rank in ranks] == [2, 2], said
    assert str(bad) in "".join(said)
    assert "Traceback" not in "".join(said)
