"""Checkpoint files, meters and logs."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from yacs.config import CfgNode

from engine.checkpoints import Checkpoints
from utils import checkpoint
from utils.errors import UserError
from utils.logger import forget_after
from utils.meters import DeviceMeters, SpikeDetector, Stopwatch
from utils.sync_batch_norm import HostSyncBatchNorm, synchronise_batch_norm

ROOT = Path(__file__).parent.parent


def test_a_save_that_fails_loses_nothing(tmp_path):
    """Fault 6: the file-size limit, like a full disk, ends the second save in the middle."""
    path = tmp_path / "last.pth"
    checkpoint.save_atomically({"step": 1, "x": torch.zeros(1000)}, path)
    code = (
        "import torch; from pathlib import Path; from utils import checkpoint\n"
        f"checkpoint.save_atomically({{'step': 2, 'x': torch.zeros(1000000)}}, Path({str(path)!r}))"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert killed.returncode != 0
    assert "last.pth cannot be written" in killed.stderr
    assert checkpoint.read(path)["step"] == 1
    assert os.listdir(tmp_path) == ["last.pth"]  # what was begun does not fill the disk


def test_a_kill_while_saving_loses_nothing(tmp_path):
    """Fault 6: killed in the middle of the second save, by what is being saved."""
    path = tmp_path / "last.pth"
    checkpoint.save_atomically({"step": 1}, path)
    code = (
        "import os, torch; from pathlib import Path; from utils import checkpoint\n"
        "class Killer:\n"
        "    def __reduce__(self): os.kill(os.getpid(), 9)\n"
        f"checkpoint.save_atomically({{'step': 2, 'x': Killer()}}, Path({str(path)!r}))"
    )
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert killed.returncode == -9
    assert checkpoint.read(path)["step"] == 1


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path):
    """Fault 6: a file that is newer but cut short."""
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.newest() == (None, [])
    for step in (1, 2, 3):
        checkpoints.save_last({"step": step, "x": torch.arange(1000)})
    checkpoints.finish()
    assert checkpoints.newest() == (checkpoints.last, [])
    whole = checkpoints.last.read_bytes()
    cut_short = [whole[:length] for length in (0, 1, len(whole) // 2, len(whole) - 1)]
    for content in (*cut_short, b"cut off", b"\x80\x02cut\noff\n."):
        checkpoints.last.write_bytes(content)
        path, damaged = checkpoints.newest()
        assert (path, len(damaged)) == (checkpoints.latest[1], 1)
        assert checkpoint.read(path)["step"] == 2
        assert not checkpoints.last.exists()  # also as after a kill between the two renames
        assert (tmp_path / "last.pth.corrupt").read_bytes() == content
    checkpoints.save_last({"step": 4})
    checkpoints.finish()
    assert checkpoint.read(checkpoints.latest[1])["step"] == 2  # a damaged file did not take its place
    checkpoints.last.write_bytes(b"")
    checkpoints.latest[1].write_bytes(b"")
    with pytest.raises(UserError, match="last.pth is damaged.*previous.pth is damaged.*starts anew"):
        checkpoints.newest()


def test_a_file_that_cannot_be_read_now_is_not_called_damaged(tmp_path, monkeypatch):
    """Out of memory or a network drive's hiccup must not push a whole checkpoint aside."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save_last({"step": 1})
    checkpoints.finish()
    for error in (MemoryError(), OSError(5, "Input/output error")):
        monkeypatch.setattr(torch, "load", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        with pytest.raises(UserError, match="last.pth cannot be read"):
            checkpoints.newest()
        assert checkpoints.last.exists()


def published_format(state_dict: dict) -> dict:
    """A checkpoint as published: with a pickled yacs config, older buffers, and prefixes on the keys."""
    config = CfgNode({"MODEL": CfgNode({"NAME": "cross-scale", "DROP": None}), "EPOCHS": 300, "AMP": ("O1", 0.5)})
    config.freeze()
    model = {f"module.{key}": value for key, value in state_dict.items()}
    model["module.layers.0.blocks.0.attn.biases"] = torch.zeros(169, 2)
    model["module.layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.int64)
    scheduler = {"base_values": [1e-3], "metric": None, "noise_seed": 42}
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    return {
        "model": model,
        "optimizer": optimizer,
        "lr_scheduler": scheduler,
        "max_accuracy": 82.5,
        "epoch": 299,
        "config": config,
    }


def test_published_checkpoints_are_read_with_every_weight_matched(tmp_path):
    import timm

    from models import load_weights

    source = timm.create_model("crossformer_micro", num_classes=10)
    own = source.state_dict()
    variants = {
        "published": published_format(own),
        "bare": own,
        "backbone": {"state_dict": {f"backbone.{key}": value for key, value in own.items()}},
    }
    for name, content in variants.items():
        torch.save(content, tmp_path / name)
        model = timm.create_model("crossformer_micro", num_classes=10)
        state_dict = checkpoint.state_dict_of(checkpoint.read(tmp_path / name), name)
        loaded = load_weights(model, state_dict, name, allow_new_head=False)
        assert (loaded.matched, loaded.new_head) == (len(own), False)
        assert all(torch.equal(value, own[key]) for key, value in model.state_dict().items())
    other_head = timm.create_model("crossformer_micro", num_classes=3)
    head = other_head.head.weight.clone()
    loaded = load_weights(other_head, own, "file", allow_new_head=True)
    assert (loaded.matched, loaded.new_head, loaded.classes_in_file) == (len(own) - 2, True, 10)
    assert torch.equal(other_head.head.weight, head)
    assert torch.equal(other_head.norm.weight, own["norm.weight"])


def test_safetensors_are_read(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    assert checkpoint.read(tmp_path / "x.safetensors")["a"].tolist() == [1, 1]


def test_meters_average_over_steps_and_start_afresh():
    meters = DeviceMeters()
    for value in (1.0, 2.0, 6.0):
        meters.add(torch.tensor(1.0), loss=torch.tensor(value), grad_norm=torch.tensor(2 * value))
    meters.add(torch.tensor(0.0), loss=torch.tensor(float("nan")), grad_norm=torch.tensor(float("inf")))  # was skipped
    assert meters.read() == {"grad_norm": 6.0, "loss": 3.0}
    meters.add(torch.tensor(1.0), loss=torch.tensor(5.0))
    assert meters.read() == {"loss": 5.0}


def test_a_loss_that_jumps_is_told_from_one_that_wavers():
    spikes = SpikeDetector()
    assert not any(spikes.is_spike(3 + 0.1 * (i % 3) - 0.01 * i) for i in range(40))
    assert not spikes.is_spike(float("nan"))
    assert spikes.is_spike(4.5)
    assert not spikes.is_spike(2.7)
    fresh = SpikeDetector()
    assert not any(fresh.is_spike(loss) for loss in (3.0, 3.0, 9.0)), "too little is known"


def test_stopwatch_counts_images_and_waiting():
    stopwatch = Stopwatch()
    stopwatch.images(10)
    stopwatch.waited(1e9)
    values = stopwatch.read()
    assert values["images_per_second"] > 0
    assert values["data_wait"] > 1
    assert stopwatch.read() == {"images_per_second": 0.0, "data_wait": 0.0}


def test_a_restart_forgets_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"event": "train", "step": step}) for step in (1, 2, 3)]
    lines += [json.dumps({"event": "eval", "step": step}) for step in (1, 2)]
    lines.append(json.dumps({"event": "eval", "step": 9, "checkpoint": "other.pth"}))
    path.write_text("\n".join(lines) + '\n{"event": "tra')
    forget_after(path, 2, evaluated_step=1)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 1, 9]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_means_are_carried_on():
    """What was not logged before a save counts in the first line after it."""
    one = torch.ones(())
    before, after = DeviceMeters(), DeviceMeters()
    before.add(one, loss=2 * one)
    after.restore(before.content(), torch.device("cpu"))
    after.add(one, loss=6 * one)
    assert after.read() == {"loss": 4.0}


def test_who_can_normalise_over_processes():
    """Plain BatchNorm becomes the one of all processes; what cannot is named and nothing is silently left out."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    keys = list(model.state_dict())
    synchronise_batch_norm(model, torch.device("cpu"))
    assert isinstance(model[1], HostSyncBatchNorm)
    assert list(model.state_dict()) == keys
    with pytest.raises(UserError, match=r"on a CPU BatchNormAct2d \(0\) cannot normalise"):
        synchronise_batch_norm(nn.Sequential(BatchNormAct2d(4)), torch.device("cpu"))
