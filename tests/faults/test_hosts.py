"""Runs over two hosts, which lose each other, a process, or the folder that they share."""

import json
import os
import re
import signal
import time

import pytest
from hosts import Hosts, can_have_hosts
from runs import PAIR as FLAGS
from runs import Run, assert_same_run, checkpoint, end_of_a_pair, undisturbed_run

from utils.processes import PEER_LOST_STATUS, USER_ERROR_STATUS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(can_have_hosts()), reason=can_have_hosts()),
]
ENOUGH_TIME = ("--opts", "TRAIN.EPOCHS", "1000")
PORTS = iter(range(31_000, 32_000))


@pytest.fixture
def hosts(tmp_path):
    with Hosts(tmp_path) as both:
        yield both


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, digits) -> dict:
    """What two processes on one host end with."""
    return end_of_a_pair(tmp_path_factory.mktemp("undisturbed"), digits)


def torchrun(nodes: str, port: int, *more: str) -> tuple[str, ...]:
    rendezvous = "--rdzv-backend", "c10d", "--rdzv-endpoint", f"hosta:{port}", "--rdzv-id", str(port)
    return ("scripts/launch.py", "--nproc_per_node", "1", "--nnodes", nodes, *rendezvous, *more)


def pair(hosts: Hosts, folder, digits, *more, launcher: tuple = (), nodes: str = "2", **environment) -> list[Run]:
    """The same command on each host."""
    launcher = torchrun(nodes, next(PORTS), *launcher)
    flags = (*FLAGS, "--data-path", digits, *more)
    return [
        Run(folder, *flags, launcher=launcher, inside=hosts.enter(host), **environment) for host in ("hosta", "hostb")
    ]


def rank_on(runs: list[Run], host: int) -> int:
    """The process that computes there."""
    return next(
        pid for pid, environment in runs[host].processes().items() if any(e.startswith("RANK=") for e in environment)
    )


def errors(run: Run) -> list[str]:
    """Lines of the ranks themselves, and not of torchrun."""
    return [line for line in run.said().splitlines() if re.match(r"(\[\w+\]:)?error", line)]


def losses(folder) -> list[float]:
    lines = (folder / "output" / "crossformer_micro" / "run" / "metrics.jsonl").read_text().splitlines()
    return [event["loss"] for event in map(json.loads, lines) if event["event"] == "train"]


def test_two_hosts_compute_what_one_does(hosts, tmp_path, digits, undisturbed):
    for run in pair(hosts, tmp_path, digits):
        run.finish()
    assert_same_run(undisturbed, checkpoint(tmp_path, "run"))


def test_shards_within_each_host(hosts, tmp_path, digits):
    """Two processes of each host share the model, and the hosts have copies of it."""
    few = (
        "--batch-size",
        "3",
        "--opts",
        "TRAIN.EPOCHS",
        "4",
        "TRAIN.EVAL_EVERY_EPOCHS",
        "4",
        "AUG.MIXUP",
        "0",
        "AUG.CUTMIX",
        "0",
    )
    for run in pair(hosts, tmp_path, digits, *few, "TRAIN.SHARD", "hybrid", launcher=("--nproc_per_node", "2")):
        run.finish()
    undisturbed_run(tmp_path / "whole", *FLAGS, "--data-path", digits, *few, nproc=4)
    sharded, whole = losses(tmp_path), losses(tmp_path / "whole")
    assert len(whole) >= 20
    assert sharded == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_host_that_is_gone_is_named_within_a_minute(hosts, tmp_path, digits, lost):
    runs = pair(hosts, tmp_path, digits, *ENOUGH_TIME)
    assert runs[0].wait_for("step 20/") or runs[1].wait_for("step 20/")
    began = time.monotonic()
    runs[lost].kill()  # torchrun and its rank
    survivor = runs[1 - lost]
    survivor.process.wait(60)
    print(f"{time.monotonic() - began:.1f} s: {errors(survivor)}")
    (line,) = errors(survivor)
    if lost:
        assert re.search(r"rank \d on hostb is gone, or the network to it \(.{,100}\); look at", line)
    else:  # with the rendezvous goes what torchrun itself needs
        assert re.search(r"hosta:\d+ gives no answer any more \(.{,100}\); look at that host", line)
    assert survivor.process.returncode == 3
    assert "Traceback" not in survivor.said()


def test_a_cable_that_is_out_for_twenty_seconds(hosts, tmp_path, digits, undisturbed):
    runs = pair(hosts, tmp_path, digits)
    assert runs[0].wait_for("step 20/")
    hosts.pull_the_cable()
    time.sleep(20)
    hosts.pull_the_cable(False)
    for run in runs:
        run.finish()
    assert_same_run(undisturbed, checkpoint(tmp_path, "run"))


def test_a_cable_that_stays_out(hosts, tmp_path, digits):
    runs = pair(hosts, tmp_path, digits, *ENOUGH_TIME, "TRAIN.HANG_MINUTES", "0.25")
    assert runs[0].wait_for("step 20/")
    hosts.pull_the_cable()
    began = time.monotonic()
    for run in runs:
        assert run.process.wait(120) == PEER_LOST_STATUS
        print(f"{time.monotonic() - began:.1f} s: {errors(run)}")
        assert "nothing has happened for 0.25 minutes (TRAIN.HANG_MINUTES)" in run.said()


def test_a_folder_that_is_not_shared(hosts, tmp_path, digits, undisturbed):
    """Without new starts rank 0 alone needs it; with them the run would begin anew on the other host."""
    private = tmp_path / "local"
    said = [run.finish() for run in pair(hosts, private, digits)]
    assert any(re.search("hostb does not see .* of hosta: only rank 0 needs it", text) for text in said)
    assert_same_run(undisturbed, checkpoint(tmp_path / "local-hosta", "run"))
    for launcher, nodes in ((("--max-restarts", "1"), "2"), ((), "1:2")):
        runs = pair(hosts, private, digits, "--tag", "other", launcher=launcher, nodes=nodes)
        said = "".join(run.finish(status=2) for run in runs)
        assert re.search(r"error: hostb does not see .* of hosta: a run that torchrun may start again", said)


def test_an_interface_that_reaches_nobody(hosts, tmp_path, digits):
    """One of them meets it first and tells the other, so that both hosts have the line that names the remedy."""
    launcher = torchrun("2", next(PORTS))
    flags = (*FLAGS, "--data-path", digits)
    runs = [
        Run(tmp_path, *flags, launcher=launcher, inside=(*hosts.enter(host), "GLOO_SOCKET_IFNAME=lo"))
        for host in ("hosta", "hostb")
    ]
    statuses = {run.process.wait(120) for run in runs}
    said = [line for run in runs for line in errors(run)]
    print(said)
    remedy = r"in GLOO_SOCKET_IFNAME \(now GLOO_SOCKET_IFNAME=lo\); \1 has lo, fab0"
    assert any(re.match(rf"error.*: rank \d on (host[ab]) cannot connect .* {remedy}", line) for line in said)
    assert statuses <= {USER_ERROR_STATUS, PEER_LOST_STATUS}
    assert "Traceback" not in "".join(run.said() for run in runs)


def test_hosts_that_come_and_go(hosts, tmp_path, digits, undisturbed):
    """Two hosts, one of them, two again: the run carries on each time."""
    elastic = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    more = "--opts", "TRAIN.EPOCHS", "60", "DATA.BATCH_SIZE", "6"
    launcher = torchrun("1:2", port := next(PORTS), "--max-restarts", "10")
    flags = (*FLAGS, "--data-path", digits, *more)

    def begin(host: str) -> Run:
        return Run(tmp_path, *flags, launcher=launcher, inside=hosts.enter(host), **elastic)

    assert port
    a = begin("hosta")
    b = begin("hostb")
    assert a.wait_for("step 20/")
    os.kill(b.process.pid, signal.SIGKILL)
    b.kill()
    assert a.wait_for("carrying on from")
    b = begin("hostb")
    assert a.wait_for("carrying on from", times=2) or b.wait_for("carrying on from")
    a.finish()
    b.finish()
