"""Two runs in one results folder: exactly one trains, whatever the other has left there."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, TINY_RUN

import utils.lock
from utils.errors import UserError
from utils.lock import Lock


@pytest.fixture
def quick(monkeypatch):
    """Do not look for seconds for signs of life that come in hundredths."""
    monkeypatch.setattr(utils.lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(utils.lock, "WATCH_SECONDS", 1.0)
    monkeypatch.setattr(utils.lock, "DYING_SECONDS", 0.2)


def taken_elsewhere(folder, monkeypatch) -> Lock:
    """A lock as a process on another host holds it."""
    lock = Lock(folder)
    with monkeypatch.context() as patch:
        patch.setattr(utils.lock, "place", lambda: "another boot, another container")
        patch.setattr("socket.gethostname", lambda: "another-host")
        lock.take()
    return lock


def left_by_a_killed_process(folder) -> int:
    script = f"import os; from pathlib import Path; from utils.lock import Lock; Lock(Path({str(folder)!r})).take();"
    process = subprocess.Popen([sys.executable, "-c", script + "os.kill(os.getpid(), 9)"], cwd=ROOT)
    assert process.wait() == -signal.SIGKILL
    return process.pid


def test_one_holds_it_and_the_next_after_that(tmp_path, quick):
    folder = tmp_path / "a" / "b"
    first = Lock(folder)
    first.take()
    with pytest.raises(UserError, match=rf"b is in use by process {os.getpid()} on \S+ \(since 20.*another --tag"):
        Lock(folder).take()
    assert os.listdir(folder) == [".lock"]
    first.check()
    first.release()
    assert not os.listdir(tmp_path), "what was made for nothing is removed"
    second = Lock(folder)
    second.take()
    assert not second.note
    second.release()


def test_a_killed_process_does_not_hold_it(tmp_path):
    pid = left_by_a_killed_process(tmp_path)
    assert str(pid) in (tmp_path / ".lock").read_text()
    lock = Lock(tmp_path)
    began = time.monotonic()
    lock.take()
    assert time.monotonic() - began < 1
    assert f"taken over from process {pid} on" in lock.note
    lock.release()


def test_a_process_id_that_is_used_again_is_another_process(tmp_path):
    left_by_a_killed_process(tmp_path)
    content = json.loads((tmp_path / ".lock").read_text())
    (tmp_path / ".lock").write_text(json.dumps({**content, "pid": os.getpid()}))
    lock = Lock(tmp_path)
    lock.take()
    lock.release()


RACE = """
import os, signal, sys, time
from pathlib import Path
import utils.lock
from utils.errors import UserError

utils.lock.DYING_SECONDS = 1.0
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
start, racing = time.time() + 1, set()
for _ in range(8):
    pid = os.fork()
    if pid == 0:
        lock = utils.lock.Lock(Path(sys.argv[1]))
        while time.time() < start:
            pass
        try:
            lock.take()
        except UserError:
            os._exit(2)
        signal.sigwait({signal.SIGUSR1})
        lock.check()
        lock.release()
        os._exit(0)
    racing.add(pid)
while len(racing) > 1:
    pid, status = os.wait()
    assert os.waitstatus_to_exitcode(status) == 2
    racing.remove(pid)
pid, = racing
os.kill(pid, signal.SIGUSR1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.slow
def test_one_of_many_takes_it_over(tmp_path):
    """Eight processes find the lock of a killed one at once, whose takeover another was killed in the middle of."""
    left_by_a_killed_process(tmp_path)
    content = json.loads((tmp_path / ".lock").read_text())
    (tmp_path / f".lock.{content['id']}").write_text(json.dumps({**content, "id": "successor"}))
    subprocess.run([sys.executable, "-c", RACE, str(tmp_path)], cwd=ROOT, timeout=120, check=True)
    assert not os.listdir(tmp_path)


def test_a_lock_of_another_host(tmp_path, quick, monkeypatch):
    """While it beats it holds; when it does not it is taken over, and its holder writes nothing when it wakes up."""
    held = taken_elsewhere(tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"in use by process \d+ on another-host"):
        Lock(tmp_path).take()
    held._done.set()  # as a host that has lost its power
    held._thread.join()
    lock = Lock(tmp_path)
    lock.take()
    assert "another-host" in lock.note
    held._done.clear()
    with pytest.raises(UserError, match="was taken over by process"):
        held.check()
    held.release()
    lock.check()
    lock.release()


def test_a_lock_that_was_cut_short(tmp_path, quick):
    (tmp_path / ".lock").touch()
    lock = Lock(tmp_path)
    lock.take()
    lock.release()
    assert not os.listdir(tmp_path)


def test_a_folder_that_is_removed_stays_ours(tmp_path, quick):
    folder = tmp_path / "results"
    lock = Lock(folder)
    lock.take()
    (folder / ".lock").unlink()
    folder.rmdir()
    lock.check()
    with pytest.raises(UserError, match="in use by"):
        Lock(folder).take()
    lock.release()


def test_a_beat_that_hangs_through_the_release(tmp_path, quick, monkeypatch):
    """As on a drive that does not answer: nobody waits for it, and when it comes back it ends in silence."""
    hangs, answers, errors, write = threading.Event(), threading.Event(), [], os.pwrite

    def hang(*arguments) -> int:
        if threading.current_thread().name == "lock":
            hangs.set()
            answers.wait(30)
        return write(*arguments)

    monkeypatch.setattr(os, "pwrite", hang)
    monkeypatch.setattr(threading, "excepthook", errors.append)
    lock = Lock(tmp_path)
    lock.take()
    assert hangs.wait(30)
    lock.release()
    answers.set()
    lock._thread.join(30)
    assert not lock._thread.is_alive()
    assert not errors


def test_two_runs_in_one_folder(tmp_path, digits, run_main):
    """The second is refused and touches nothing, an evaluation may come, and the first ends as if it were alone."""
    flags = (*TINY_RUN, "TRAIN.EPOCHS", "3", "TRAIN.SAVE_EVERY_STEPS", "3", "--data-path", digits, "--batch-size", "12")
    output = tmp_path / "output"
    folder = output / "crossformer_micro" / "run"
    first = subprocess.Popen(
        [sys.executable, "main.py", *map(str, flags), "--output", str(output)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert any("step 7/18" in line for line in first.stdout)
        first.send_signal(signal.SIGSTOP)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        second = run_main(*flags, ok=False)
        assert second.status == 2
        assert f"{folder} is in use by process {first.pid} on " in second.error
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        run_main(*flags, "--eval", "--resume", folder / "checkpoints" / "best.pth")
        first.send_signal(signal.SIGCONT)
        assert "done: best top-1" in first.stdout.read()
        assert first.wait(60) == 0
    finally:
        first.kill()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["event"] == "train"] == list(range(1, 19))
    assert [row["step"] for row in rows if row["event"] == "eval" and "checkpoint" not in row] == list(range(6, 19, 6))
    assert sum("checkpoint" in row for row in rows) == 1
    assert not (folder / ".lock").exists()


@pytest.mark.slow
def test_a_run_after_one_that_another_host_has_lost(tmp_path, digits, run_main):
    """The command waits for a sign of life, takes the folder over and says so; it tells no two clocks' times apart."""
    folder = tmp_path / "output" / "crossformer_micro" / "run"
    left_by_a_killed_process(folder)
    content = json.loads((folder / ".lock").read_text())
    elsewhere = {**content, "place": "", "host": "another-host", "pid": os.getpid(), "since": "2999-01-01 00:00:00"}
    (folder / ".lock").write_text(json.dumps(elsewhere))
    said = run_main(*TINY_RUN, "--data-path", digits, "--batch-size", "36").stdout
    assert "taken over from process" in said
    assert "another-host" in (folder / "log.txt").read_text()
