"""The learning rates of the published schedules."""

import json
from pathlib import Path

import pytest
from conftest import ROOT

from config import build_config
from lr_scheduler import build_scheduler, total_steps
from utils.calendar import Calendar, Span

REFERENCE = json.loads((Path(__file__).parent / "data" / "lr_schedule.json").read_text())


@pytest.mark.parametrize("name", ["cosine", "linear", "step"])
def test_published_learning_rates(name):
    """The recipe's defaults at a global batch of 1,024 give 1e-3 and the rest of the reference."""
    config = build_config(opts=["TRAIN.LR_SCHEDULER.NAME", name])
    schedule = build_scheduler(config, Calendar(Span(0, REFERENCE["steps_per_epoch"], 1024)))
    for step, expected in REFERENCE["lr_after_step_update"][name].items():
        assert schedule(0 if step == "initial" else int(step)) == pytest.approx(expected, rel=1e-9), step


def test_scaling_with_the_batch_can_be_turned_off():
    opts = ["TRAIN.WARMUP_EPOCHS", "0", "TRAIN.LR_REFERENCE_BATCH", "0", "TRAIN.BASE_LR", "0.3"]
    assert build_scheduler(build_config(opts=opts), Calendar(Span(0, 10, 4096)))(0) == 0.3


@pytest.mark.parametrize(
    ("recipe", "name"), [("semantic_fpn_small", "semantic_fpn_80k"), ("upernet_small", "upernet_160k")]
)
def test_schedules_of_segmentation(recipe, name):
    expected = json.loads((ROOT / "tests/data/dense_heads/dense_lr_schedule.json").read_text())[name]
    config = build_config(str(ROOT / f"configs/segmentation/{recipe}.yaml"))
    schedule = build_scheduler(config, Calendar(Span(0, 1263, 16)))
    assert total_steps(config, Calendar(Span(0, 1263, 16))) == expected["iterations"]
    for step, rate in expected["lr"].items():
        assert schedule(int(step)) == pytest.approx(rate, rel=1e-9), step


@pytest.mark.parametrize("name", ["detection_1x", "detection_1x_short_epochs", "detection_1x_100_per_epoch"])
def test_schedules_of_detection(name):
    """The warm-up multiplies, also across a step."""
    expected = json.loads((ROOT / "tests/data/dense_heads/dense_lr_schedule.json").read_text())[name]
    opts = (
        "TRAIN.LR_SCHEDULER.NAME multistep TRAIN.LR_SCHEDULER.DECAY_AT [8,11] TRAIN.BASE_LR 1e-4 TRAIN.WARMUP_LR 1e-7 "
        f"TRAIN.WARMUP_STEPS 500 TRAIN.WARMUP_EPOCHS 0 TRAIN.LR_REFERENCE_BATCH 0 TRAIN.EPOCHS {expected['epochs']}"
    )
    if name == "detection_1x_short_epochs":
        opts += " TRAIN.STEPS 600"  # the warm-up of 500 steps would be longer than its 480
    schedule = build_scheduler(build_config(opts=opts.split()), Calendar(Span(0, expected["iterations_per_epoch"], 16)))
    for step, rate in expected["lr"].items():
        assert schedule(int(step)) == pytest.approx(rate, rel=1e-9), step
