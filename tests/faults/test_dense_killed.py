"""Training of a segmenter or a detector, killed in the middle and carried on, is the one that nobody has killed."""

import json

import pytest
import test_detection as detection
import test_segmentation as segmentation
import torch
from runs import Run, assert_same_run, undisturbed_run

TASKS = {
    "semantic_fpn_crossformer_micro": (segmentation.RUN, "pairs"),
    "mask_rcnn_crossformer_micro": (detection.RUN, "objects"),
}
"""Networks, their flags and the fixture of their data."""


@pytest.mark.slow  # the loop is that of every task, and how a sample is drawn test_pairs.py and test_objects.py tell
@pytest.mark.parametrize("network", TASKS)
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_and_carried_on(request, tmp_path, workers, network):
    words, data = TASKS[network]
    flags = (*words, "DATA.NUM_WORKERS", workers, "TRAIN.EMA_DECAY", "0.9")
    flags += ("--data-path", request.getfixturevalue(data))
    (tmp_path / "killed").mkdir()
    run = Run(tmp_path / "killed", *flags)
    assert run.wait_for("step 3/6")
    run.kill()
    assert "carrying on from" in undisturbed_run(tmp_path / "killed", *flags)
    undisturbed_run(tmp_path / "whole", *flags)
    paths = [tmp_path / name / "output" / network / "run" for name in ("killed", "whole")]
    assert_same_run(*(torch.load(path / "checkpoints/last.pth", weights_only=True) for path in paths))
    lines = [[json.loads(line) for line in open(path / "metrics.jsonl")] for path in paths]
    first, second = ([(e["event"], e["step"]) for e in of if e["event"] != "start"] for of in lines)
    assert first == second
