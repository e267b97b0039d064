"""Slurm on two hosts of one machine: the real daemons, started by a test as root and stopped after it.

It takes Debian's packages: ``apt-get install --no-install-recommends slurm-wlm munge iproute2``.
"""

import os
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from hosts import Hosts, can_have_hosts

PROGRAMS = "slurmctld", "slurmd", "munged", "srun"
SECONDS_TO_START = 60
CONFIG = """
ClusterName=test
SlurmctldHost=hosta(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
KillWait=30
SchedulerParameters=batch_sched_delay=0,sched_interval=5,requeue_delay=0
JobRequeue=1
NodeName=hosta NodeAddr=10.77.0.1 CPUs=2 RealMemory=8000 State=UNKNOWN
NodeName=hostb NodeAddr=10.77.0.2 CPUs=2 RealMemory=8000 State=UNKNOWN
PartitionName=main Nodes=hosta,hostb Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
"""
"""Without cgroups and accounting, which a test has none of."""


def can_have_slurm() -> str:
    """Say what is missing for a cluster; empty where nothing is."""
    missing = [name for name in PROGRAMS if not shutil.which(name)]
    return can_have_hosts() or ("needs slurm-wlm and munge (apt-get install slurm-wlm munge)" if missing else "")


class Slurm(Hosts):
    """Two hosts with Slurm on them."""

    def __enter__(self) -> "Slurm":
        super().__enter__()
        for name in ("munge", "state", "spool-hosta", "spool-hostb"):
            (self.folder / name).mkdir()
        (self.folder / "slurm.conf").write_text(CONFIG.format(folder=self.folder))
        munge = self.folder / "munge"
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o600)
        munge.chmod(0o711)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        words = [f"--{flag}={munge / name}" for flag, name in files.items()]
        subprocess.run(["munged", *words, "--force"], check=True)
        self.on("hosta", "slurmctld", "-c")
        for host in ("hosta", "hostb"):
            self.on(host, "slurmd", "-N", host)
        deadline = time.monotonic() + SECONDS_TO_START
        while self.on("hosta", "sinfo", "-h", "-t", "idle", "-o", "%D").strip() != "2":
            assert time.monotonic() < deadline, (self.folder / "slurmctld.log").read_text()
            time.sleep(0.5)
        return self

    def __exit__(self, *error) -> None:
        for file in [*self.folder.glob("slurm*.pid"), self.folder / "munge" / "pid"]:
            with suppress(OSError, ValueError):
                os.kill(int(file.read_text()), 15)
        time.sleep(1)
        super().__exit__(*error)

    def enter(self, host: str) -> tuple[str, ...]:
        return (*super().enter(host), f"SLURM_CONF={self.folder / 'slurm.conf'}", "OMP_NUM_THREADS=1")

    def on(self, host: str, *words: object, cwd: Path | None = None) -> str:
        """Run a command on a host to its end; returns what it has said."""
        done = subprocess.run(
            [*self.enter(host), *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says of a job."""
        said = self.on("hosta", "scontrol", "show", "job", number)
        return dict(word.split("=", 1) for word in said.split() if "=" in word)
