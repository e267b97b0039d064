"""Models whose weights, gradients and optimizer state are divided among processes (FSDP2)."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from commands import start
from conftest import TINY_RUN, quick
from torch import nn

import models  # noqa: F401
from utils.parallel import sharding_units

FLAGS = (
    *TINY_RUN, "TRAIN.EMA_DECAY", "0.9", "TRAIN.ACCUMULATION_STEPS", "2", "DATA.BATCH_SIZE", "6", "TRAIN.EPOCHS", "7",
    "AUG.MIXUP", "0", "AUG.CUTMIX", "0",
)  # fmt: skip
CROSSFORMER = "MODEL.CROSSFORMER.EMBED_DIM", "16", "MODEL.CROSSFORMER.DEPTHS", "[1, 1, 1, 1]"
VIT = (
    "MODEL.NAME", "vit_tiny_patch16_224", "DATA.IMG_SIZE", "32",
    "MODEL.KWARGS", "{img_size: 32, patch_size: 8, depth: 3, embed_dim: 24, num_heads: 3}",
)  # fmt: skip


MICRO = "crossformer_micro"
SEGMENTATION = (
    "--cfg", "configs/segmentation/upernet_micro.yaml", "--tag", "run", "--batch-size", "2", "--opts",
    "TRAIN.STEPS", "3", "TRAIN.WARMUP_STEPS", "0", "TRAIN.EVAL_EVERY_STEPS", "3", "DATA.NUM_WORKERS", "0",
    "DATA.IMG_SIZE", "64", "AUG.RESIZE", "[128, 64]", "TEST.RESIZE", "[128, 64]", "MODEL.HEAD_CHANNELS", "16",
    "PRINT_FREQ", "1",
)  # fmt: skip


def run(folder, digits, *more, nproc: int = 2, script: str = "main.py"):
    words = (script, *FLAGS, *more, "--data-path", digits, "--output", folder)
    done = start(*words, nproc=nproc)
    assert done.returncode == 0, done.stderr
    return done.stdout


def steps(folder, name: str = "crossformer_micro") -> list[dict]:
    lines = (folder / name / "run" / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == "train"]


def losses(folder, name: str = "crossformer_micro") -> list[float]:
    return [step["loss"] for step in steps(folder, name)]


def saved(folder, name: str = "crossformer_micro", which: str = "last") -> dict:
    return torch.load(folder / name / "run" / "checkpoints" / f"{which}.pth", weights_only=True)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, digits):
    """A run of two processes with half of the model each."""
    folder = tmp_path_factory.mktemp("sharded")
    run(folder, digits, *CROSSFORMER, "TRAIN.SHARD", "full")
    return folder


@pytest.mark.parametrize(
    ("model", "epochs"), quick([(MICRO, 2), (MICRO, 7), ("vit_tiny_patch16_224", 7)], [(MICRO, 2)])
)
def test_shards_compute_what_the_whole_does(tmp_path, digits, model, epochs):
    """Three steps an epoch; if there are enough of them, the eleventh finds no number for a loss."""
    more = (*(CROSSFORMER if model == MICRO else VIT), "TRAIN.EPOCHS", epochs)
    sharded = tmp_path / "sharded"
    for folder, shard in ((tmp_path / "whole", "none"), (sharded, "full")):
        run(folder, digits, *more, "TRAIN.SHARD", shard, script="tests/main_with_nan_step.py")
    assert len(losses(sharded, model)) == 3 * epochs
    assert losses(sharded, model) == pytest.approx(losses(tmp_path / "whole", model), abs=1e-5)
    assert [step["skipped_steps"] for step in steps(sharded, model)] == [int(n > 10) for n in range(1, 3 * epochs + 1)]
    a, b = saved(tmp_path / "whole", model), saved(sharded, model)
    assert a.keys() == b.keys()
    assert a["optimizer"]["param_groups"] == b["optimizer"]["param_groups"]
    for one, other in [(a["model"], b["model"]), (a["ema"], b["ema"]), *states(a, b)]:
        assert one.keys() == other.keys()
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], rtol=0, atol=1e-4)


def states(a: dict, b: dict) -> list[tuple[dict, dict]]:
    """What two optimizers know of each parameter."""
    return [(state, b["optimizer"]["state"][number]) for number, state in a["optimizer"]["state"].items()]


@pytest.mark.slow
def test_a_segmenter_begins_with_a_backbone(tmp_path, pairs):
    """In mixed precision; its BatchNorms keep theirs."""
    torch.save({"model": timm.create_model(MICRO).state_dict()}, tmp_path / "backbone.pth")
    words = ("main.py", *SEGMENTATION, "--data-path", pairs, "--pretrained", tmp_path / "backbone.pth")
    for shard in ("full", "none"):
        done = start(*words, "--opts", "TRAIN.SHARD", shard, "AMP", "bf16", "--output", tmp_path / shard, nproc=2)
        assert done.returncode == 0, done.stderr
        assert "backbone.pth" in done.stdout
    name = "upernet_crossformer_micro"
    assert losses(tmp_path / "full", name) == pytest.approx(losses(tmp_path / "none", name), abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 4])
def test_a_checkpoint_knows_nothing_of_the_number_of_processes(tmp_path, digits, sharded, nproc):
    """Saved by two, carried on by one or four, for which the global batch stays the same."""
    shutil.copytree(sharded, tmp_path / "output")
    batch = {1: "12", 4: "3"}[nproc]
    more = (*CROSSFORMER, "TRAIN.SHARD", "full", "DATA.BATCH_SIZE", batch, "TRAIN.EPOCHS", "8")
    said = run(tmp_path / "output", digits, *more, nproc=nproc)
    assert f"after step {saved(sharded)['step']}" in said


def test_a_step_that_is_not_finite_changes_nothing():
    """Told in tests/test_train.py of whole models; here of shares."""
    script = """
import torch
from torch import nn
from utils import distributed, parallel
device = distributed.start()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))
sharding = parallel.choose_sharding("full", device, None)
wrapped = parallel.wrap(model, device, sharding=sharding)
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
from utils.compat import tell_found_inf
before = None
for step in range(3):
    scale = float("nan") if step == 1 and distributed.rank() == 1 else 1.0
    (wrapped(torch.ones(2, 4)).sum() * scale).backward()
    norm = parallel.clip_grad_norm(model.parameters(), 1.0)
    assert torch.isfinite(norm) == (step != 1), norm
    before = [parallel.local(p).clone() for p in model.parameters()]
    tell_found_inf(optimizer, ~torch.isfinite(norm))
    optimizer.step()
    optimizer.zero_grad()
    changed = any(not torch.equal(parallel.local(p), b) for p, b in zip(model.parameters(), before))
    assert changed == (step != 1), step
distributed.stop()
"""

    from commands import environments_of_ranks
    from conftest import ROOT

    environments, store = environments_of_ranks(2, {**os.environ, "OMP_NUM_THREADS": "1"})
    ranks = [subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=each) for each in environments]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    del store


UNITS = {
    "crossformer_micro": 4, "vit_tiny_patch16_224": 12, "swin_tiny_patch4_window7_224": 12, "resnet18": 8,
    "convnext_atto": 12,
}  # fmt: skip


@pytest.mark.parametrize("name", UNITS)
def test_units_are_blocks(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    units = sharding_units(model)
    assert len(units) == UNITS[name]
    within = sum(p.numel() for unit in units for p in unit.parameters())
    assert within > 0.7 * sum(p.numel() for p in model.parameters())
    assert all(isinstance(unit, nn.Module) for unit in units)
