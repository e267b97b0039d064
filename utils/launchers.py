"""Who has started the processes of a run, and what it says of their group.

torchrun, Kubeflow and PyTorch's own launchers say it in RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. What
Slurm's ``srun`` and MPI's ``mpirun`` say in variables of their own is written into these; nothing else knows of it.
"""

import os
import re
import socket
import zlib
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from utils.errors import UserError

PORTS = range(12_000, 32_000)
"""Below those that systems give to connections which ask for any."""
DEFAULT_PORT = 29_500
"""As torchrun has it."""

MPI = {
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "MPI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),  # MPICH's and Intel's
}
"""Where each says a process's rank, how many there are, and its rank on its host."""


def understand_launcher(env: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables of torchrun where Slurm or MPI has started this process as one of several.

    Raises:
        UserError: several processes were started which cannot form one group.
    """
    if "RANK" in env or "WORLD_SIZE" in env:
        check_complete(env)
        return
    # mpirun starts its daemons by srun, whose variables are of these
    by_mpirun = any(env.get(local_rank) for _, _, local_rank in MPI.values())
    env.update(of_mpi(env) if by_mpirun else of_slurm(env) or of_mpi(env))


def check_complete(env: MutableMapping[str, str]) -> None:
    """Refuse a part of torchrun's variables, with which each process would train on its own.

    Raises:
        UserError: one is missing or no number.
    """
    numbers = {name: env[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if name in env}
    for name, value in numbers.items():
        if not value.isdecimal():
            for each in numbers:
                del env[each]  # whoever tells of the error asks for the rank
            raise UserError(f"the environment has {name}={value!r}, which is no number; start with torchrun or srun")
    if env.get("WORLD_SIZE", "1") == "1" and env.get("RANK", "0") == "0":
        return
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not env.get(name)]
    if missing:
        raise UserError(
            f"the environment has {'RANK' if 'RANK' in env else 'WORLD_SIZE'} but not {', '.join(missing)}: start with "
            "torchrun or srun, or unset it"
        )
    if int(env["RANK"]) >= int(env["WORLD_SIZE"]):
        raise UserError(f"the environment has RANK={env['RANK']} of WORLD_SIZE={env['WORLD_SIZE']}; ranks begin at 0")


def of_slurm(env: Mapping[str, str]) -> dict[str, str]:
    """Translate what ``srun`` says; nothing where it has not started this process, or it alone.

    Raises:
        UserError: something is missing.
    """
    if "SLURM_STEP_ID" not in env or int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or 1) == 1:
        return {}
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "")
    missing = [name for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID") if not env.get(name)]
    if missing or not nodes:
        raise UserError(
            f"srun has started {env.get('SLURM_NTASKS')} tasks but {(missing or ['SLURM_STEP_NODELIST'])[0]} is not "
            "set: they cannot form one group; let the container keep Slurm's variables or let a node's task be torchrun"
        )
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": env.get("SLURM_STEP_NUM_TASKS") or env["SLURM_NTASKS"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "MASTER_ADDR": env.get("MASTER_ADDR") or first_host(nodes),
        "MASTER_PORT": env.get("MASTER_PORT") or str(port_of(f"{env['SLURM_JOB_ID']}.{env['SLURM_STEP_ID']}")),
    }


def of_mpi(env: Mapping[str, str]) -> dict[str, str]:
    """Translate what ``mpirun`` says; nothing where it has not started this process, or it alone.

    Raises:
        UserError: the processes are on several hosts, and none of them knows where rank 0 is.
    """
    for launcher, (rank, size, local_rank) in MPI.items():
        if int(env.get(size) or 1) == 1:
            continue
        if not env.get(rank) or not env.get(local_rank):
            raise UserError(f"{launcher} has started {env[size]} processes but {local_rank} is not set; use torchrun")
        on_this_host = env.get("OMPI_COMM_WORLD_LOCAL_SIZE") or env.get("MPI_LOCALNRANKS")
        address = env.get("MASTER_ADDR") or ("localhost" if on_this_host == env[size] else "")
        if not address:
            raise UserError(
                f"{launcher} has started {env[size]} processes on several hosts, and MASTER_ADDR is not set: give all "
                "of them the name of rank 0's host, as with mpirun -x MASTER_ADDR=HOST"
            )
        job = env.get("PMIX_NAMESPACE") or env.get("PMI_ID")
        port = env.get("MASTER_PORT") or str(port_of(job) if job else DEFAULT_PORT)
        ranks = {"RANK": env[rank], "WORLD_SIZE": env[size], "LOCAL_RANK": env[local_rank]}
        return {**ranks, "MASTER_ADDR": address, "MASTER_PORT": port}
    return {}


def first_host(nodes: str) -> str:
    """Give the first host of a list as Slurm writes it: ``node[007-012,020],other3`` begins with ``node007``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0]) if first else nodes


def port_of(job: str) -> int:
    """Choose a port that all processes of a job, and hardly ever those of another, find by its name alone."""
    return PORTS[zlib.crc32(job.encode()) % len(PORTS)]


def gpu_of_this_process(local_rank: int, visible: int) -> int:
    """Choose a GPU by its number among the visible ones.

    Slurm shows a task only its own where it is asked to (``--gpus-per-task``, ``--gpu-bind``); torchrun shows all.

    Raises:
        UserError: there is none left for it.
    """
    if visible == 1 and "SLURM_PROCID" in os.environ and not is_torchrun():
        return 0  # that no other has it is seen when all have joined
    if local_rank >= visible:
        raise UserError(
            f"process {local_rank} of host {socket.gethostname()} has no GPU: there are {visible}; "
            "start no more processes (--nproc_per_node, --ntasks-per-node) than that"
        )
    return local_rank


def is_torchrun() -> bool:
    """Tell whether torchrun has started this process, and waits for its exit status."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def may_start_elsewhere() -> bool:
    """Tell whether torchrun may start this run again by itself, with rank 0 on another host."""
    if not is_torchrun():
        return False
    words = _words_of_parent()
    nodes = os.environ.get("PET_NNODES", "")
    for word, after in zip(words, [*words[1:], ""], strict=True):
        match = re.fullmatch(r"--nnodes(?:=(.*))?", word)
        nodes = (match[1] or after) if match else nodes
    return ":" in nodes or int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0


def _words_of_parent() -> list[str]:
    """The command line of torchrun, which tells its ranks nothing of the number of hosts it may have."""
    try:
        return Path(f"/proc/{os.getppid()}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return []
