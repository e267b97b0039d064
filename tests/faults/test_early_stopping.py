"""Early stopping, balanced drawing and class weights, killed in the middle and carried on."""

import json

import pytest
from conftest import TINY_RUN
from runs import RANDOM, Run, assert_same_run, checkpoint, undisturbed_run

STILL = ("TRAIN.BASE_LR", "0", "TRAIN.WARMUP_LR", "0", "TRAIN.MIN_LR", "0", "TRAIN.EMA_DECAY", "0")
"""The weights stay as they are, so that no evaluation is better than the first."""


def test_a_run_that_has_stalled_ends_at_the_same_step(tmp_path, digits):
    flags = (*TINY_RUN, *RANDOM, *STILL, "TRAIN.EPOCHS", "9", "--data-path", digits, "--batch-size", "12", "--opts")
    flags += ("TRAIN.PATIENCE", "3", "DATA.SAMPLER", "balanced", "TRAIN.CLASS_WEIGHTS", "balanced")
    said = undisturbed_run(tmp_path, *flags, "--tag", "whole")
    assert "stopped early after step 24: 3 evaluations have brought no better top-1 than" in said
    run = Run(tmp_path, *flags)
    assert run.wait_for("step 21/")
    run.kill()
    assert "stopped early after step 24: 3 evaluations" in undisturbed_run(tmp_path, *flags)
    assert_same_run(checkpoint(tmp_path, "whole"), checkpoint(tmp_path, "run"))


@pytest.mark.slow
def test_a_run_that_has_stalled_goes_on_with_more_patience(tmp_path, digits):
    flags = (*TINY_RUN, *STILL, "TRAIN.EPOCHS", "9", "TRAIN.PATIENCE", "3", "--data-path", digits, "--batch-size", "12")
    assert "stopped early after step 24" in undisturbed_run(tmp_path, *flags)
    again = undisturbed_run(tmp_path, *flags)
    assert "stopped early after step 24" in again
    assert "epoch 5" not in again, "nothing more is trained"
    metrics = tmp_path / "output" / "crossformer_micro" / "run" / "metrics.jsonl"
    steps = [line["step"] for line in map(json.loads, metrics.read_text().splitlines()) if line["event"] == "train"]
    assert steps == list(range(1, 25))
    more = undisturbed_run(tmp_path, *flags, "--opts", "TRAIN.PATIENCE", "5")
    assert "stopped early after step 36: 5 evaluations" in more


@pytest.mark.slow  # the run above draws and weighs so too
def test_balanced_drawing_and_weights_carry_on_exactly(tmp_path, digits):
    flags = (*TINY_RUN, *RANDOM, "TRAIN.EPOCHS", "4", "--data-path", digits, "--batch-size", "12", "--opts")
    flags += ("DATA.SAMPLER", "balanced", "TRAIN.CLASS_WEIGHTS", "balanced", "DATA.NUM_WORKERS", "1")
    undisturbed_run(tmp_path, *flags, "--tag", "whole")
    run = Run(tmp_path, *flags)
    assert run.wait_for("step 9/")
    run.kill()
    assert "carrying on from" in undisturbed_run(tmp_path, *flags)
    assert_same_run(checkpoint(tmp_path, "whole"), checkpoint(tmp_path, "run"))
    shuffled = undisturbed_run(tmp_path, *flags, "DATA.SAMPLER", "shuffle", "--tag", "shuffled")
    assert "done" in shuffled
    assert not (
        checkpoint(tmp_path, "shuffled")["model"]["head.weight"] == checkpoint(tmp_path, "run")["model"]["head.weight"]
    ).all()
