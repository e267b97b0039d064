"""Training on a part of the data, and averaging the weights of a run."""

import numpy as np
import pytest
import torch
from conftest import TINY_RUN

from config import build_config
from data.folder import FolderLayout
from data.index import open_index
from data.parts import only_classes, subset
from utils.averaging import average
from utils.errors import UserError


@pytest.fixture(scope="module")
def images(digits, tmp_path_factory):
    return open_index(FolderLayout(digits, "train"), str(tmp_path_factory.mktemp("cache")))


def names(index) -> set[str]:
    return {index.name(i) for i in range(len(index))}


def test_a_share_of_each_class(images):
    """Rounded, one at least; by the seed; and a larger share has what a smaller one has."""
    counts = np.bincount(images.labels)
    for share in (0.01, 0.3, 0.5, 1.0):
        part = subset(images, share, seed=0)
        assert np.bincount(part.labels).tolist() == [max(round(share * count), 1) for count in counts.tolist()]
        assert part.classes == images.classes
        assert all(part.read(i) for i in (0, len(part) - 1))
    assert names(subset(images, 0.3, 0)) < names(subset(images, 0.5, 0))
    assert names(subset(images, 0.3, 0)) == names(subset(images, 0.3, 0)) != names(subset(images, 0.3, 1))
    assert names(subset(images, 1.0, 0)) == names(images)


def test_some_classes(images):
    part = only_classes(images, ["3", "7"])
    assert part.classes == ["3", "7"]
    assert {part.name(i).split("/")[-2] for i in np.flatnonzero(part.labels == 1)} == {"7"}
    assert len(part) == int((images.labels == 3).sum() + (images.labels == 7).sum())


def test_a_run_on_a_part(run_main, digits):
    flags = (
        *TINY_RUN,
        "DATA.SUBSET",
        "0.5",
        "DATA.ONLY_CLASSES",
        "[2, 5, 8]",
        "--data-path",
        digits,
        "--batch-size",
        "4",
    )
    result = run_main(*flags)
    assert "of 3 classes" in result.stdout
    assert "DATA.SUBSET 0.5" in result.stdout
    assert result.checkpoint("best")["classes"] == ["2", "5", "8"]
    evaluated = run_main(*flags, "--eval", "--resume", result.results / "checkpoints" / "best.pth")
    assert evaluated.events("eval")[-1]["images"] == result.events("eval")[-1]["images"] < 37


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["DATA.ONLY_CLASSES", "[2, nine]"], "DATA.ONLY_CLASSES: the data has no class 'nine'"),
        (["DATA.FORMAT", "hfds/x", "DATA.SUBSET", "0.5"], "DATA.SUBSET .*is for folders and archives"),
        (["DATA.SUBSET", "0"], "DATA.SUBSET .*must be"),
    ],
)
def test_parts_that_there_are_not(opts, message, digits):
    from data.splits import open_images

    with pytest.raises(UserError, match=message):
        open_images(build_config(opts=[*opts, "DATA.DATA_PATH", str(digits)]), training=True)


def save(path, step: int, **weights) -> str:
    torch.save({"model": weights, "step": step, "classes": ["a"]}, path)
    return str(path)


def test_an_average_by_hand(tmp_path):
    """Counters, as BatchNorm's, are those of the newest, in whatever order the files are named."""
    files = [
        save(tmp_path / f"{step}.pth", step, weight=torch.full((2,), float(step)), count=torch.tensor(step))
        for step in (3, 9, 6)
    ]
    found = average(files)
    assert torch.equal(found["model"]["weight"], torch.tensor([6.0, 6.0]))
    assert (found["model"]["weight"].dtype, int(found["model"]["count"]), found["step"]) == (torch.float32, 9, 9)
    other = save(tmp_path / "other.pth", 1, weight=torch.zeros(3), count=torch.tensor(1))
    with pytest.raises(UserError, match="other.pth holds another network"):
        average([*files, other])
    with pytest.raises(UserError, match="takes two checkpoints at least"):
        average(files[:1])


def test_the_average_of_the_last_epochs(run_main, digits, tmp_path):
    """A run that was stopped and carried on gives the same average, bit for bit; and it is evaluated like any other."""
    from commands import start

    flags = (
        *TINY_RUN, "TRAIN.EPOCHS", "3", "TRAIN.KEEP_EVERY_EPOCHS", "1", "TRAIN.SAVE_EVERY_STEPS", "4",
        "TRAIN.KEEP_LAST", "9", "--data-path", digits, "--batch-size", "12",
    )  # fmt: skip
    whole = run_main(*flags, "--tag", "whole", tag="whole")
    done = start("scripts/average.py", whole.results, "--last", "2")
    assert done.returncode == 0, done.stderr
    averaged = whole.results / "checkpoints" / "average.pth"
    assert done.stdout.strip() == f"the average of 2 checkpoints is in {averaged}"
    first, second = (whole.checkpoint(f"epoch_{epoch:04d}")["model"] for epoch in (2, 3))
    content = torch.load(averaged, weights_only=True)
    for name, value in content["model"].items():
        torch.testing.assert_close(value, (first[name] + second[name]) / 2)
    evaluated = run_main(*flags, "--eval", "--resume", averaged)
    assert evaluated.events("eval")[-1]["images"] == 37

    saves = {torch.load(path, weights_only=True)["step"]: path for path in whole.results.rglob("[lp]*.pth")}
    resumed = run_main(*flags, "--resume", saves[8], "--tag", "resumed", tag="resumed")
    done = start("scripts/average.py", resumed.results, "--last", "2", "--to", tmp_path / "x.pth")
    assert done.returncode == 0, done.stderr
    again = torch.load(tmp_path / "x.pth", weights_only=True)["model"]
    assert all(torch.equal(again[name], value) for name, value in content["model"].items())
    refused = start("scripts/average.py", whole.results, "--last", "7")
    assert (refused.returncode, "has 3 checkpoints of epochs, not 7" in refused.stderr) == (2, True)
