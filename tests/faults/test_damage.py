"""Checkpoint files that are cut short or changed: found out, renamed, and the one before is used."""

import json
import os
import random
import shutil
import signal
import time

import pytest
import torch
from conftest import TINY_RUN

from config import build_config
from engine.checkpoints import Checkpoints
from engine.memory import fewest_parts, naming_out_of_memory
from utils.checkpoint import DamagedFile, is_sealed, read, save_atomically
from utils.errors import UserError
from utils.files import Unwritten


def two_saves(folder) -> Checkpoints:
    checkpoints = Checkpoints(folder)
    for step in (1, 2):
        checkpoints.save_last({"model": {"w": torch.full((20,), float(step))}, "step": step})
    checkpoints.finish()
    return checkpoints


def expect_the_one_before(checkpoints: Checkpoints, damaged: bytes) -> None:
    checkpoints.last.write_bytes(damaged)
    path, lines = checkpoints.newest()
    assert path == checkpoints.latest[1]
    assert len(lines) == 1
    corrupt = checkpoints.last.with_suffix(".pth.corrupt")
    assert corrupt.read_bytes() == damaged
    assert not checkpoints.last.exists()
    corrupt.unlink()


@pytest.mark.parametrize("every", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_every_truncation_and_every_kind_of_flip(tmp_path, every):
    """Each length of a small file, and each bit of some hundred of its bytes; or every so many of them."""
    checkpoints = two_saves(tmp_path)
    whole = checkpoints.last.read_bytes()
    assert read(checkpoints.last, sealed=True)["step"] == 2
    for length in range(0, len(whole), every):
        expect_the_one_before(checkpoints, whole[:length])
    rng = random.Random(0)
    for place in [*rng.sample(range(len(whole)), 200), *range(len(whole) - 70, len(whole))][::every]:
        changed = bytearray(whole)
        changed[place] ^= 1 << rng.randrange(8)
        expect_the_one_before(checkpoints, bytes(changed))
    expect_the_one_before(checkpoints, whole + b"\0")
    checkpoints.last.write_bytes(whole)
    assert checkpoints.newest() == (checkpoints.last, [])


@pytest.mark.slow
def test_flips_in_the_checkpoint_of_a_run(run_main, digits):
    flags = (*TINY_RUN, "--data-path", digits, "--batch-size", "24")
    result = run_main(*flags)
    checkpoints = Checkpoints(result.results / "checkpoints")
    whole = checkpoints.last.read_bytes()
    rng = random.Random(0)
    for _ in range(200):
        changed = bytearray(whole)
        changed[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        checkpoints.last.write_bytes(changed)
        assert not is_sealed(checkpoints.last)
    expect_the_one_before(checkpoints, bytes(changed))
    checkpoints.last.write_bytes(changed)
    resumed = run_main(*flags)
    assert "last.pth is damaged: its checksum is wrong or missing (now last.pth.corrupt)" in resumed.stdout
    assert "previous.pth after step 3" in resumed.stdout


def test_the_seal_is_no_hindrance_to_others(tmp_path):
    """Plain torch reads our files, and we read those of others, which have no seal."""
    save_atomically({"a": torch.ones(3)}, tmp_path / "ours.pth")
    assert torch.load(tmp_path / "ours.pth", weights_only=True)["a"].sum() == 3
    torch.save({"a": torch.ones(3)}, tmp_path / "theirs.pth")
    assert read(tmp_path / "theirs.pth")["a"].sum() == 3
    with pytest.raises(DamagedFile, match="checksum is wrong or missing"):
        read(tmp_path / "theirs.pth", sealed=True)


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_the_last_saves_are_kept(tmp_path, keep):
    checkpoints = Checkpoints(tmp_path, keep_last=keep)
    for step in range(1, 7):
        checkpoints.save_last({"model": {}, "step": step}, epoch_to_keep=step if step % 3 == 0 else None)
    checkpoints.finish()
    assert [read(path)["step"] for path in checkpoints.latest] == [6, 5, 4, 3][:keep]
    names = {path.name for path in tmp_path.iterdir()} - {path.name for path in checkpoints.latest}
    assert names == {"epoch_0003.pth", "epoch_0006.pth"}
    assert read(tmp_path / "epoch_0003.pth", sealed=True)["step"] == 3


def test_what_is_saved_is_the_moment_of_saving(tmp_path):
    """The thread writes a copy: training changes the weights meanwhile."""
    checkpoints, weights = Checkpoints(tmp_path), torch.zeros(2_000_000)
    for step in range(5):
        weights.fill_(step)
        checkpoints.save_last({"model": {"w": weights}, "step": step})
        weights.fill_(-1)
    checkpoints.finish()
    assert (read(checkpoints.last)["model"]["w"] == 4).all()
    assert (read(checkpoints.latest[1])["model"]["w"] == 3).all()


def test_a_save_is_waited_for_although_a_signal_interrupts_the_waiting(tmp_path, monkeypatch):
    """The signal raises in the main thread, which then sees to it that everything is written."""
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *names: (time.sleep(1), replace(*names)))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save_last({"model": {}, "step": 1})

    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            checkpoints.finish()
    finally:
        signal.signal(signal.SIGALRM, before)
    checkpoints.finish()
    assert read(checkpoints.last, sealed=True)["step"] == 1


def test_a_save_that_fails_is_told_and_tried_again(tmp_path):
    folder, told = tmp_path / "checkpoints", []
    checkpoints = Checkpoints(folder)
    checkpoints.unwritten = Unwritten(told.append)
    folder.write_bytes(b"a file is in its place")
    for step in (1, 2):
        checkpoints.save_last({"step": step})
    with pytest.raises(UserError, match=r"cannot be written: .*last.pth .*the same command again"):
        checkpoints.finish()
    folder.unlink()
    checkpoints.finish()
    assert len(told) == 1, "each problem is said once"
    assert read(checkpoints.last)["step"] == 2
    shutil.rmtree(folder)
    checkpoints.save_last({"step": 3})
    checkpoints.finish()
    assert read(checkpoints.last)["step"] == 3, "a folder that was removed is made again"


def test_parts_of_a_batch_are_halved_until_they_fit():
    tried = []

    def try_parts(parts: int) -> None:
        tried.append(parts)
        if parts < 3:
            raise torch.OutOfMemoryError

    assert fewest_parts(try_parts, 12) == 4
    assert tried == [1, 2, 4]
    with pytest.raises(torch.OutOfMemoryError):
        fewest_parts(lambda parts: (_ for _ in ()).throw(torch.OutOfMemoryError()), 4)
    with pytest.raises(UserError, match="AUTO_MICRO_BATCH True cuts it into parts"), naming_out_of_memory():
        raise torch.OutOfMemoryError


def test_parts_give_the_result_of_the_whole(digits, tmp_path, monkeypatch):
    """Batches of 12 in 5 parts, of which two have 3 images: the same loss, with every draw in place."""
    import engine.train as train

    losses = []
    for parts in (1, 5):
        monkeypatch.setattr(train, "parts_that_fit", lambda *_, parts=parts: parts)
        opts = [*TINY_RUN[TINY_RUN.index("--opts") + 1 :], "DATA.DATA_PATH", str(digits), "DATA.BATCH_SIZE", "12"]
        opts += [
            "TRAIN.AUTO_MICRO_BATCH",
            "True",
            "MODEL.DROP_PATH_RATE",
            "0",
            "AUG.MIXUP",
            "0.8",
            "OUTPUT",
            str(tmp_path / f"out{parts}"),
        ]
        train.train(build_config("configs/micro.yaml", opts), torch.device("cpu"))
        lines = (tmp_path / f"out{parts}" / "crossformer_micro" / "default" / "metrics.jsonl").read_text().splitlines()
        losses.append([event["loss"] for event in map(json.loads, lines) if event["event"] == "train"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
