"""The search for a learning rate: the search itself on known losses, and the command."""

import csv
import math
import re
import shutil

import pytest
import torch
from conftest import TINY_RUN
from PIL import Image

from config import build_config
from engine.find_lr import Trials, search, valley
from main import main, parse
from optimizer import set_learning_rate
from utils.distributed import AgreedError

START = 2.3


def bowl(best: float, calls: list[float] | None = None):
    """A loss that is a parabola over the logarithm of the rate, and infinite far above the best rate."""

    def loss(rate: float) -> float:
        if calls is not None:
            calls.append(rate)
        apart = math.log10(rate / best)
        return math.inf if apart > 2 else START - max(0, 1 - 0.2 * apart**2)

    return loss


@pytest.mark.parametrize("best", [3e-6, 4.7e-4, 2e-2])
@pytest.mark.parametrize("given", [1e-9, 1e-5, 1e-3, 1.0, 100.0])
def test_the_best_rate_is_found_from_anywhere(best, given):
    found = search(bowl(best), given, START)
    assert found.rate == pytest.approx(best, rel=0.05)


def test_near_the_best_it_takes_five_trials():
    calls: list[float] = []
    search(bowl(1e-3, calls), 8e-4, START)
    assert len(calls) == len(set(calls)) == 5


def test_no_rate_helps():
    with pytest.raises(AgreedError, match=r"no rate from 1\.0e-10 to 1\.0e-01 lowers the loss of 2\.3000"):
        search(lambda rate: START + rate, 1e-3, START)
    with pytest.raises(AgreedError, match="lowers the loss of nan"):
        search(lambda rate: math.nan, 1e-3, math.nan)


def test_the_bottom_of_a_parabola():
    root = math.sqrt(10)
    losses = {1e-3 * root**i: 1 + (i - 0.3) ** 2 for i in (-2, -1, 0, 1, 2)}
    assert valley(losses, 1e-3, 100.0) == pytest.approx(1e-3 * root**0.3)
    assert valley({1e-3: 1.0, 1e-3 * root: 2.0}, 1e-3, 100.0) == 1e-3, "nothing is known below"
    losses[1e-3 * root] = math.inf
    assert 1e-3 / root < valley(losses, 1e-3, 3.0) < 1e-3, "what diverges counts as no better than the start"


FLAGS = (*TINY_RUN, "TRAIN.EPOCHS", "20", "AUG.MIXUP", "0.8", "MODEL.DROP_PATH_RATE", "0.2")


def trials_on(digits, *opts) -> Trials:
    config, _ = parse([*FLAGS, *opts, "--data-path", str(digits), "--batch-size", "12"])
    return Trials(config, torch.device("cpu"))


def test_trials_start_alike_and_differ_by_their_rate_alone(digits):
    trials = trials_on(digits)
    before = {name: value.clone() for name, value in trials.model.state_dict().items()}
    losses = [trials.loss_after(2, rate, evaluated=2) for rate in (1e-3, 1e-2, 1e-3)]
    assert losses[0] == losses[2] != losses[1]
    start = trials.loss_after(0, 0.0, evaluated=2)
    assert start == trials.loss_after(2, 0.0, evaluated=2), "no step is a step of rate 0"
    assert all(torch.equal(value, before[name]) for name, value in trials.model.state_dict().items())


def test_the_rate_rises_within_a_trial(digits):
    trials = trials_on(digits)
    step, batches = trials.step(0.0), trials.loader.micro_batches(0, 3)
    for number, share in enumerate((0.5, 1.0)):
        set_learning_rate(step.optimizer, 1e-2 * share)
        step(number, batches)
    assert float(step.accumulate(2, batches)[0]) == trials.loss_after(2, 1e-2, evaluated=2)


def test_layers_keep_their_share_of_the_rate(digits):
    decayed = trials_on(digits, "TRAIN.LAYER_DECAY", "0.1").loss_after(2, 1e-2, evaluated=2)
    assert decayed != trials_on(digits).loss_after(2, 1e-2, evaluated=2)


def test_the_command(run_main, digits, tmp_path):
    """It suggests, draws, leaves the run alone; two processes come to the same as one, and so does another time."""
    words = (*FLAGS, "AUG.MIXUP", "0", "MODEL.DROP_PATH_RATE", "0", "--data-path", digits)
    once = run_main(*words, "--batch-size", "12", "--find-lr")
    folder = once.results
    assert sorted(path.name for path in folder.iterdir()) == [
        "config_find_lr.yaml",
        "find_lr.csv",
        "find_lr.png",
        "log.txt",
    ]
    rows = list(csv.DictReader((folder / "find_lr.csv").read_text().splitlines()))
    losses = {float(row["learning_rate"]): float(row["loss"]) for row in rows}
    assert [float(row["base_lr"]) for row in rows] == pytest.approx([rate * 64 / 12 for rate in losses], rel=1e-4)
    assert Image.open(folder / "find_lr.png").size == (770, 440)
    said = once.stdout
    share = float(re.search(r"that took \d+ steps, (\S+) % of the run's", said)[1])
    assert share == pytest.approx(100 * (1 + 3 * len(losses)) / 120, abs=0.06)
    suggested = float(re.search(r"suggested: TRAIN.BASE_LR (\S+): the loss has fallen most", said)[1])
    best = min(losses, key=losses.__getitem__)
    assert best / 4 < suggested * 12 / 64 < best * 4
    command = re.search(r"to go on: python main.py (.*)", said)[1]
    assert "--find-lr" not in command
    assert command.endswith(
        f"--opts TRAIN.BASE_LR {suggested:g} TRAIN.WARMUP_LR {suggested / 100:g} TRAIN.MIN_LR {suggested / 100:g}"
    )
    two = run_main(*words, "--batch-size", "6", "--find-lr", "--tag", "two", nproc=2, tag="two")
    of_two = list(csv.DictReader((two.results / "find_lr.csv").read_text().splitlines()))
    assert [float(row["loss"]) for row in of_two] == pytest.approx([*losses.values()], rel=1e-3)


def test_from_weights(run_main, digits, tmp_path):
    trained = run_main(*TINY_RUN, "--data-path", digits, "--batch-size", "12")
    files = {path: path.read_bytes() for path in trained.results.rglob("*") if path.is_file()}
    said = files.pop(trained.results / "log.txt")
    weights = trained.results / "checkpoints" / "best.pth"
    done = run_main(*TINY_RUN, "--data-path", digits, "--batch-size", "12", "--find-lr", "--pretrained", weights)
    assert f"from the weights of {weights}" in done.stdout
    assert {path: path.read_bytes() for path in files} == files, "the run is as it was"
    assert (trained.results / "log.txt").read_bytes().startswith(said)
    added = {path.name for path in trained.results.rglob("*") if path.is_file() and path not in files}
    assert added == {"log.txt", "find_lr.csv", "find_lr.png", "config_find_lr.yaml"}


def test_what_training_refuses_is_refused(digits, tmp_path, capsys):
    for settings, said in {
        ("MODEL.NAME", "resnet10t", "MODEL.DROP_PATH_RATE", "0", "DATA.BATCH_SIZE", "1"): "normalises over the batch",
        ("MODEL.NAME", "vit_tiny_patch16_224", "MODEL.DROP_PATH_RATE", "0"): "the model does not take it",
        ("TRAIN.WARMUP_STEPS", "100", "TRAIN.WARMUP_EPOCHS", "0"): "the warm-up takes",
    }.items():
        words = [*TINY_RUN, *settings, "--data-path", str(digits), "--output", str(tmp_path), "--find-lr"]
        assert main(words) == 2
        assert said in capsys.readouterr().err


def test_bad_images_are_left_out(run_main, digits, tmp_path):
    data = shutil.copytree(digits, tmp_path / "data")
    for path in sorted((data / "train").rglob("*.png"))[::3]:
        path.write_bytes(b"no image")
    words = (*FLAGS, "--data-path", data, "--batch-size", "12", "--find-lr")
    assert "cannot identify image file" in run_main(*words, ok=False).stderr
    assert "suggested: " in run_main(*words, "--opts", "DATA.ON_BAD_IMAGE", "skip").stdout


def test_mistakes(digits, tmp_path, capsys):
    for flags, said in {
        ("--find-lr", "--resume", "x.pth"): "leave out --resume",
        ("--find-lr", "--opts", "TRAIN.BASE_LR", "0"): "--find-lr begins at TRAIN.BASE_LR 0: give another",
        ("--find-lr", "--eval"): "not allowed with",
    }.items():
        assert main([*TINY_RUN, "--data-path", str(digits), "--output", str(tmp_path), *flags]) == 2
        assert said in capsys.readouterr().err
    assert build_config().TRAIN.BASE_LR > 0
