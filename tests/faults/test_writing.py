"""Files that cannot be written: training goes on, nothing is lost without a word, and the same command mends it."""

import json
import math
import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress

import pytest
import torch
from conftest import TINY_RUN, assert_same_tensors
from killing import curves, files_of
from runs import RANDOM, Run, undisturbed_run

from engine.checkpoints import Checkpoints
from utils.calendar import Calendar, Span
from utils.checkpoint import read
from utils.errors import UserError
from utils.files import MOST_BYTES_WAITING, Appender, Unwritten, remove_temporaries, write_whole

FLAGS = (
    *TINY_RUN, *RANDOM, "TRAIN.EPOCHS", "3", "TRAIN.KEEP_EVERY_EPOCHS", "1", "--batch-size", "12",
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory, digits):
    """All files of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    undisturbed_run(folder, *FLAGS, "--data-path", digits)
    return files_of(folder / "output" / "crossformer_micro" / "run")


def assert_same_files(found: dict, whole: dict) -> None:
    """But for where they are, and for what older saves could say of best.pth when it could not be written."""
    assert found.keys() == whole.keys()
    for name in whole:
        if name.endswith(".pth"):
            but = {"config"} if name.endswith(("last.pth", "best.pth")) else {"config", "best", "owed_best", "owed"}
            a, b = ({k: v for k, v in files[name].items() if k not in but} for files in (found, whole))
            assert_same_tensors(a, b)
        elif name != "config.yaml":
            assert found[name] == whole[name], name


def pause_at(run: Run, text: str) -> None:
    assert run.wait_for(text)
    os.kill(run.process.pid, signal.SIGSTOP)
    time.sleep(0.1)


def test_files_that_cannot_be_written(tmp_path, digits, whole):
    """From step 2 of 18 on folders are in the place of all but last.pth, best.pth at each improvement among them."""
    flags = (*FLAGS, "--data-path", digits)
    run = Run(tmp_path, *flags)
    folder = tmp_path / "output" / "crossformer_micro" / "run"
    names = ("log.txt", "metrics.jsonl", "checkpoints/best.pth", "checkpoints/epoch_0002.pth", "tensorboard")
    pause_at(run, "step 2/18")
    for name in names:
        with suppress(FileNotFoundError):
            os.rename(folder / name, tmp_path / os.path.basename(name))
        if name == "tensorboard":
            (folder / name).touch()
        else:
            (folder / name / "in the way").mkdir(parents=True)
    os.kill(run.process.pid, signal.SIGCONT)
    said = run.finish(status=2)
    assert "step 18/18" in said
    last_line = said.rstrip().splitlines()[-1]
    assert last_line.startswith("error: cannot be written: ")
    for name in names:
        assert str(folder / name) in last_line
        assert said.count(f"error: {folder / name}") == 1, "said once, not at each step"
    saved = torch.load(folder / "checkpoints" / "last.pth", weights_only=True)
    assert saved["best"] == -math.inf, "there is no best.pth of which it could speak"
    assert "done: best" not in said

    for name in names:
        shutil.rmtree(folder / name) if name != "tensorboard" else os.unlink(folder / name)
        with suppress(FileNotFoundError):
            os.rename(tmp_path / os.path.basename(name), folder / name)
    assert "done: best top-1" in undisturbed_run(tmp_path, *flags)
    assert_same_files(files_of(folder), whole)
    assert "step 18/18" in (folder / "log.txt").read_text()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 100 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(folder)], capture_output=True)
    if mount.returncode:
        pytest.skip(f"no file system can be mounted here: {mount.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_disk_without_a_byte_for_three_seconds(tmp_path, small_disk, digits, whole):
    """Every write meets it: lines, curves and checkpoints. What comes out is what would have."""
    flags = (*FLAGS, "--data-path", digits)
    run = Run(small_disk, *flags)
    folder = small_disk / "output" / "crossformer_micro" / "run"
    pause_at(run, "step 3/18")
    with open(small_disk / "filler", "wb", buffering=0) as filler, suppress(OSError):
        while True:
            filler.write(bytes(4096))
    os.kill(run.process.pid, signal.SIGCONT)
    assert run.wait_for("No space left on device")
    os.kill(run.process.pid, signal.SIGSTOP)  # else it might be done before the three seconds are over
    time.sleep(3)
    os.unlink(small_disk / "filler")
    os.kill(run.process.pid, signal.SIGCONT)
    said = run.finish()
    assert "error: " in said
    found = files_of(folder)
    missing = [name for name in whole if name not in found]
    assert missing == [], "an epoch's file that could not be written is made later"
    assert_same_files(found, whole)


@pytest.mark.slow
def test_a_folder_that_is_removed_while_it_trains(tmp_path, digits):
    """It is made again, with the best weights, of which no later epoch is better: they stay as they are."""
    still = ("--opts", "TRAIN.EMA_DECAY", "0", "TRAIN.BASE_LR", "0", "TRAIN.WARMUP_LR", "0", "TRAIN.MIN_LR", "0")
    flags = (*FLAGS, *still, "--data-path", digits)
    run = Run(tmp_path, *flags)
    folder = tmp_path / "output" / "crossformer_micro" / "run"
    pause_at(run, "step 8/18")
    shutil.rmtree(tmp_path / "output")
    os.kill(run.process.pid, signal.SIGCONT)
    said = run.finish()
    assert "metrics.jsonl was removed; it is made again" in said
    best, last = (read(folder / "checkpoints" / f"{name}.pth", sealed=True) for name in ("best", "last"))
    assert (best["step"], last["step"], last["best"]) == (6, 18, best["top1"])
    assert (folder / "config.yaml").exists()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["event"] == "train"][-10:] == list(range(9, 19))
    assert curves(folder / "tensorboard")["train/loss"][-1][0] == 18


def test_lines_that_wait_are_bounded(tmp_path):
    """A record is never written by half or twice; what is too much for the memory is given up with a word."""
    told, path = [], tmp_path / "folder" / "log.txt"
    unwritten = Unwritten(told.append)
    appender = Appender(path, unwritten)
    appender.add(b"first\n")
    path.unlink()
    path.mkdir()
    for number in range(3):
        appender.add(b"%d\n" % number)
    assert appender.waiting() == b"0\n1\n2\n"
    with pytest.raises(UserError, match=r"log.txt \(Is a directory\).*the same command"):
        unwritten.check()
    path.rmdir()
    appender.flush()
    unwritten.check()
    assert path.read_bytes() == b"0\n1\n2\n"
    assert len(told) == 2, "that it could not be written, and that it was removed"
    path.unlink()
    path.mkdir()
    for _ in range(5):
        appender.add(bytes(MOST_BYTES_WAITING // 3))
    assert len(appender.waiting()) <= MOST_BYTES_WAITING
    path.rmdir()
    appender.flush()
    with pytest.raises(UserError, match="records could not be written"):
        unwritten.check()


def test_an_epoch_is_kept_although_its_name_is_taken(tmp_path):
    """Three saves later, when no other file holds it any more, its name is free again."""
    checkpoints = Checkpoints(tmp_path)
    (tmp_path / "epoch_0001.pth" / "in the way").mkdir(parents=True)
    for step in (1, 2, 3, 4):
        checkpoints.save_last({"step": step}, epoch_to_keep=1 if step == 1 else None)
    with pytest.raises(UserError, match=r"epoch_0001.pth \(Is a directory\)"):
        checkpoints.finish()
    shutil.rmtree(tmp_path / "epoch_0001.pth")
    checkpoints.save_last({"step": 5})
    checkpoints.finish()
    assert read(tmp_path / "epoch_0001.pth", sealed=True)["step"] == 1
    assert [read(path)["step"] for path in checkpoints.latest] == [5, 4]


def test_an_epoch_that_is_missing_is_made_of_a_save(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (10, 20, 25):
        checkpoints.save_last({"step": step})
    checkpoints.finish()
    fresh = Checkpoints(tmp_path)
    fresh.newest()
    fresh.keep_missing(every=2, calendar=Calendar(Span(0, 10, 8)))
    assert read(tmp_path / "epoch_0002.pth", sealed=True)["step"] == 20
    assert not (tmp_path / "epoch_0001.pth").exists()


def test_saves_of_one_step_take_one_place(tmp_path):
    """The save before an evaluation and that after it are of the same step: the one before stays an earlier one."""
    checkpoints = Checkpoints(tmp_path)
    for step in (3, 6, 6):
        checkpoints.save_last({"step": step})
    checkpoints.finish()
    assert [read(path)["step"] for path in checkpoints.latest] == [6, 3]
    again = Checkpoints(tmp_path)
    again.newest()
    again.save_last({"step": 6})
    again.finish()
    assert [read(path)["step"] for path in checkpoints.latest] == [6, 3]


def test_what_killed_processes_left_is_removed(tmp_path):
    (tmp_path / ".last.pth.some-host.123.abcdef.writing").touch()
    write_whole(tmp_path / "config.yaml", b"whole")
    remove_temporaries(tmp_path, tmp_path / "not there")
    assert os.listdir(tmp_path) == ["config.yaml"]


def test_a_folder_that_became_anothers_is_left_alone(tmp_path):
    """Taken over by another host while this process was stopped in the middle of a save."""
    checks = iter([None, None, None, UserError("was taken over")])

    def may_write() -> None:
        if error := next(checks):
            raise error

    checkpoints = Checkpoints(tmp_path, may_write=may_write)
    checkpoints.save_last({"step": 1})
    checkpoints.save_last({"step": 2})
    with pytest.raises(UserError, match="was taken over"):
        checkpoints.finish()
    assert read(checkpoints.last)["step"] == 1
    assert os.listdir(tmp_path) == ["last.pth"]
