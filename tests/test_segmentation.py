"""Segmentation by the command line: trained, evaluated alike on any number of processes, carried on bit-identically."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import start
from conftest import Result
from make_pairs import CLASSES
from PIL import Image

RUN = (
    "--cfg", "configs/segmentation/semantic_fpn_micro.yaml", "--tag", "run", "--batch-size", "4", "--opts",
    "DATA.NUM_WORKERS", "0", "DATA.IMG_SIZE", "64", "AUG.RESIZE", "[160, 64]", "TEST.RESIZE", "[160, 64]",
    "MODEL.CROSSFORMER.EMBED_DIM", "16", "MODEL.CROSSFORMER.DEPTHS", "[1, 1, 1, 1]",
    "TRAIN.STEPS", "6", "TRAIN.WARMUP_STEPS", "1", "TRAIN.EVAL_EVERY_STEPS", "3", "TRAIN.SAVE_EVERY_STEPS", "1",
    "PRINT_FREQ", "1",
)  # fmt: skip


def run(folder: Path, *arguments, ok: bool = True, tag: str = "run", **how) -> Result:
    done = start("main.py", *arguments, "--output", folder, **how)
    result = Result(done.returncode, done.stdout, done.stderr, folder / "semantic_fpn_crossformer_micro" / tag)
    assert not ok or result.status == 0, result.stdout + result.stderr
    return result


@pytest.fixture(scope="session")
def trained(pairs, tmp_path_factory) -> Result:
    return run(tmp_path_factory.mktemp("trained"), *RUN, "--data-path", pairs)


def test_training(trained, pairs):
    assert [event["step"] for event in trained.events("train")] == [1, 2, 3, 4, 5, 6]
    assert [event["step"] for event in trained.events("eval")] == [3, 6]
    assert "13 images of 3 classes" in trained.stdout
    last = trained.events("eval")[-1]
    assert {"miou", "mean_accuracy", "pixel_accuracy", "images"} <= last.keys()
    assert last["images"] == 7
    best = torch.load(trained.results / "checkpoints/best.pth", weights_only=True)
    assert best["classes"] == CLASSES
    assert best["miou"] == max(event["miou"] for event in trained.events("eval"))


@pytest.mark.parametrize(("nproc", "batch"), [(1, 1), (1, 3), (2, 3), (3, 1)])
def test_same_result_on_any_number_of_processes(trained, pairs, tmp_path, nproc, batch):
    """Images of mixed sizes: the confusion matrix is that of the training run's own evaluation, to the pixel."""
    path = trained.results / "checkpoints/last.pth"
    words = [batch if word == "4" else word for word in RUN]
    result = run(tmp_path, *words, "--data-path", pairs, "--eval", "--resume", path, nproc=nproc)
    evaluated, (*_, expected) = result.events("eval")[0], trained.events("eval")
    assert {k: evaluated[k] for k in ("miou", "mean_accuracy", "pixel_accuracy", "images")} == {
        k: expected[k] for k in ("miou", "mean_accuracy", "pixel_accuracy", "images")
    }


def test_two_processes_train_as_one(pairs, tmp_path):
    """2 x 2 images make the step of 1 x 4, BatchNorm over both."""
    losses = []
    for nproc, batch in ((1, 4), (2, 2)):
        words = [batch if word == "4" else word for word in RUN]
        words += ["MODEL.DROP_RATE", "0.0", "MODEL.DROP_PATH_RATE", "0.0", "--data-path", pairs]
        result = run(tmp_path / str(nproc), *words, nproc=nproc)
        losses.append(result.losses())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def broken(root: Path, folder: Path, what: str) -> list[str]:
    """Make a copy of a data set that is wrong; returns more settings."""
    shutil.copytree(root, folder)
    mask, image = folder / "masks/train/003.png", folder / "images/train/003.png"
    pixels = np.array(Image.open(mask))
    match what:
        case "value":
            pixels[0, 0] = 3
        case "void":
            return ["DATA.IGNORE_LABEL", "2"]
        case "size":
            pixels = pixels[:-1]
        case "colour":
            pixels = np.stack([pixels] * 3, axis=2)
        case "deep":
            pixels = pixels.astype(np.uint16) * 300
        case "jpeg":
            mask.unlink()
            mask = mask.with_suffix(".jpg")
        case "damaged":
            mask.write_bytes(mask.read_bytes()[:50])
            return []
        case "classes":
            (folder / "classes.txt").unlink()
            return []
        case "twice":
            (folder / "classes.txt").write_text("a\nb\na\n")
            return []
        case "two":
            Image.open(image).save(image.with_suffix(".jpg"))
            return []
        case "none":
            shutil.rmtree(folder / "masks")
            (folder / "masks/train").mkdir(parents=True)
            (folder / "masks/val").mkdir()
            return []
        case "folder":
            shutil.rmtree(folder / "masks")
            return []
    Image.fromarray(pixels).save(mask)
    return []


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("value", "003.png has the number 3, which is neither one of the 3 classes (0 to 2) nor void"),
        ("void", "DATA.IGNORE_LABEL 2 is the class 'square'"),
        ("size", "make them the same size"),
        ("colour", "003.png: it has colours (RGB), not a number for each pixel"),
        ("deep", "it has the number 10964"),
        ("jpeg", "JPEG changes the numbers of classes; save label maps as PNG"),
        ("damaged", "003.png: it cannot be decoded"),
        ("classes", "classes.txt cannot be read: write the name of each class on a line of its own"),
        ("twice", "has the class 'a' twice"),
        ("two", "have one name"),
        ("none", "has no image whose label map has the same name"),
        ("folder", "has no images with label maps for train; expected images/train with masks/train"),
    ],
)
def test_wrong_data_is_named(pairs, tmp_path, what, message):
    more = broken(pairs, tmp_path / "data", what)
    result = run(tmp_path / "output", *RUN, *more, "--data-path", tmp_path / "data", ok=False)
    assert result.status == 2
    assert message in result.error


def test_classes_that_never_occur_are_named(pairs, tmp_path):
    shutil.copytree(pairs, tmp_path / "data")
    (tmp_path / "data/classes.txt").write_text("\n".join([*CLASSES, "triangle"]))
    result = run(tmp_path / "output", *RUN, "TRAIN.STEPS", "2", "--data-path", tmp_path / "data")
    assert "warning: 1 of them never occur in the training data: triangle\n" in result.stdout.replace("  run", "\n")
    more = ("TRAIN.STEPS", "2", "DATA.ZERO_IS_VOID", "True")
    result = run(tmp_path / "shifted", *RUN, *more, "--data-path", pairs)
    assert "never occur in the training data: square (is 0 void in these label maps" in result.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["AUG.MIXUP", "0.5"], "AUG.MIXUP 0.5 (--opts): is read by classification only"),
        (["TEST.VIEWS", "five_crop"], "TEST.VIEWS five_crop (--opts): is for classification"),
        (["TEST.STRIDE", "9"], "TEST.STRIDE 9 (--opts): leaves gaps"),
        (["AUG.RESIZE", "[64, 128]"], "must be the longest side and then the shortest"),
        (["TRAIN.WARMUP_STEPS", "6"], "the warm-up takes 6 steps"),
    ],
)
def test_wrong_settings_are_named(pairs, tmp_path, words, message):
    result = run(tmp_path, *RUN, *words, "--data-path", pairs, ok=False)
    assert result.status == 2
    assert message in result.error
