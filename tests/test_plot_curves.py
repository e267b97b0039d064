"""Drawing a run's curves."""

import json

from commands import start


def plot(folder, **how):
    return start("scripts/plot_curves.py", folder, **how)


def test_curves_of_a_run_with_gaps(tmp_path):
    """An evaluation of another checkpoint does not belong to the curves; a value that was not finite is a gap."""
    train = {"event": "train", "epoch": 1, "lr": 0.1, "grad_norm": None}
    evaluation = {"event": "eval", "epoch": 1, "step": 2, "top1": 50.0, "top5": 90.0, "loss": 1.0, "images": 4}
    events = [
        *({**train, "step": step, "loss": loss} for step, loss in ((1, 2.0), (2, None), (3, 1.5))),
        {**evaluation, "weights": "model"},
        {**evaluation, "weights": "ema"},
        {**evaluation, "weights": "model", "step": None, "checkpoint": "other.pth"},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    done = plot(tmp_path, fresh=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_curves_of_a_detector(tmp_path):
    events = [
        {"event": "train", "epoch": 1, "step": 1, "lr": 0.1, "loss": 2.0},
        {"event": "eval", "epoch": 1, "step": 1, "weights": "model", "box_ap": 10.0, "box_ap50": 20.0, "mask_ap": 9.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    done = plot(tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_bad_folders(tmp_path):
    done = plot(tmp_path)
    assert done.returncode == 2
    assert f"error: {tmp_path / 'metrics.jsonl'} is not there; give the results folder" in done.stderr
    (tmp_path / "metrics.jsonl").write_text("")
    assert "has no line about training yet" in plot(tmp_path).stderr
