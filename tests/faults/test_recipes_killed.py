"""kill -9 with each ingredient of a recipe: the run that carries on has the same bits as one that was never killed."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY_RUN, assert_same_tensors, quick

from engine.checkpoints import Checkpoints
from utils.averaging import average, newest_epochs

SMALL = "MODEL.CROSSFORMER.EMBED_DIM", "16", "MODEL.CROSSFORMER.DEPTHS", "[1, 1, 1, 1]"
SIZES = "[{UNTIL: 1, DATA.IMG_SIZE: 32}, {FROM: 1, UNTIL: 2, DATA.IMG_SIZE: 48}]"
INGREDIENTS = {
    "muon": ("TRAIN.OPTIMIZER.NAME", "muon"),
    "lion": ("TRAIN.OPTIMIZER.NAME", "lion"),
    "lamb": ("TRAIN.OPTIMIZER.NAME", "lamb"),
    "schedule-free": ("TRAIN.OPTIMIZER.NAME", "schedule_free_adamw", "TRAIN.LR_SCHEDULER.NAME", "constant"),
    "distillation": ("TRAIN.TEACHER.AT_LEAST", "0.1", "TRAIN.TEACHER.FROM"),
    "sizes": ("DATA.IMG_SIZE", "64", "TRAIN.CURRICULUM", SIZES, "DATA.NUM_WORKERS", "1"),
    "repeated augmentation": ("AUG.REPEATS", "3", "AUG.AUTO_AUGMENT", "rand-m9-mstd0.5-inc1"),
    "averaging": ("TRAIN.KEEP_EVERY_EPOCHS", "1"),
}
BORDER = 6
"""72 images, 12 a step: the step with which the second epoch begins."""


@pytest.mark.parametrize("ingredient", quick(INGREDIENTS, ("sizes",)))
def test_killed_and_carried_on(run_main, digits, ingredient):
    opts = INGREDIENTS[ingredient]
    flags = (
        *TINY_RUN, *SMALL, "TRAIN.EPOCHS", "3", "MODEL.DROP_PATH_RATE", "0.2", "AUG.MIXUP", "0.8",
        "TRAIN.SAVE_EVERY_STEPS", "1", "--data-path", digits, "--batch-size", "12",
    )  # fmt: skip
    if ingredient == "distillation":
        teacher = run_main(*flags, "--tag", "teacher", tag="teacher")
        opts = *opts, teacher.results
    flags = *flags, "--opts", *opts
    whole = run_main(*flags, "--tag", "whole", tag="whole")
    output = whole.results.parent.parent
    process = subprocess.Popen(
        [sys.executable, "main.py", *map(str, flags), "--output", output],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    for line in process.stdout:
        if f"step {BORDER}/18" in line:
            process.send_signal(signal.SIGKILL)
            break
    process.communicate()
    newest, _ = Checkpoints(whole.results.parent / "run" / "checkpoints").newest()
    stopped_at = torch.load(newest, weights_only=True)["step"]
    assert BORDER - 3 <= stopped_at <= BORDER + 3  # the save under way is lost with the process
    resumed = run_main(*flags)
    assert [event["step"] for event in resumed.events("start")] == [0, stopped_at]
    a, b = whole.checkpoint(), resumed.checkpoint()
    for part in ("model", "ema", "optimizer"):
        assert (a[part] is None) == (b[part] is None)
        if a[part] is not None:
            assert_same_tensors(a[part], b[part])
    if ingredient == "averaging":
        averages = [average(newest_epochs(run.results / "checkpoints", 3))["model"] for run in (whole, resumed)]
        assert_same_tensors(*averages)
