"""Segmentation by the command line: trained, evaluated alike on any number of processes, carried on bit-identically."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import start
from conftest import Result
from make_pairs import CLASSES
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tasks.miou import confusion_matrix, scores
from tasks.overlay import LEGEND_WIDTH

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


def test_report(trained, pairs, tmp_path):
    """Of all ranks: the classes, the confusion matrix, and the images with the lowest IoU, the lowest first."""
    path = trained.results / "checkpoints/last.pth"
    result = run(tmp_path, *RUN, "--data-path", pairs, "--eval", "--resume", path, "--report", nproc=2)
    folder = result.results / "report_model"
    rows = list(csv.DictReader((folder / "per_class.csv").open()))
    assert [row["class"] for row in rows] == CLASSES
    labels = [np.array(Image.open(path)) for path in sorted((pairs / "masks/val").iterdir())]
    assert [int(row["pixels"]) for row in rows] == [sum(int((x == i).sum()) for x in labels) for i in range(3)]
    miou = sum(float(row["iou"]) for row in rows if row["iou"]) / sum(row["iou"] != "" for row in rows)
    assert 100 * miou == pytest.approx(result.events("eval")[0]["miou"])
    matrix = [[int(x) for x in row[1:]] for row in list(csv.reader((folder / "confusion_matrix.csv").open()))[1:]]
    assert [sum(row) for row in matrix] == [int(row["pixels"]) for row in rows]
    assert Image.open(folder / "lowest.png").height > 7 * 200
    assert (folder / "report.png").stat().st_size > 10_000


def test_pictures_in_tensorboard(trained):
    events = EventAccumulator(str(trained.results / "tensorboard")).Reload()
    assert [event.step for event in events.Images("model/images")] == [3, 6]


def test_prediction(trained, pairs, tmp_path):
    """Label maps as in evaluation, the shares of the classes, and pictures to look at."""
    checkpoint, folder = trained.results / "checkpoints/last.pth", tmp_path / "out"
    words = ("--checkpoint", checkpoint, pairs / "images/val", "--format", "json", "--weights", "model")
    done = start("predict.py", *words, "--overlay", folder, "--sheet", tmp_path / "sheet.png")
    assert done.returncode == 0, done.stderr
    records = json.loads(done.stdout)
    total = torch.zeros(3, 3, dtype=torch.long)
    for record in records:
        name = Path(record["file"]).name
        answer, truth = (np.array(Image.open(root / name)) for root in (folder / "labels", pairs / "masks/val"))
        total += confusion_matrix(torch.tensor(answer), torch.tensor(truth), 3)
        for told in record["predictions"]:
            assert told["share"] == pytest.approx((answer == told["class_index"]).mean(), abs=1e-5)
        assert Image.open(folder / "overlays" / name).width == answer.shape[1] + LEGEND_WIDTH
    assert 100 * scores(total.numpy()).miou == pytest.approx(trained.events("eval")[-1]["miou"])
    assert Image.open(tmp_path / "sheet.png").width > 224


def test_what_prediction_refuses(trained, pairs, tmp_path):
    words = ("--checkpoint", trained.results / "checkpoints/last.pth")
    done = start("predict.py", *words, pairs / "images/val", "--image-size", "64")
    line = "--image-size is for classification; TEST.RESIZE of its training says how others see an image"
    assert (done.returncode, done.stderr) == (2, f"error: {line}\n")
    image = next((pairs / "images/val").iterdir())
    one, other = (Path(shutil.copy(image, tmp_path / name)) for name in ("a.PNG", "a.png"))
    done = start("predict.py", *words, tmp_path, "--overlay", tmp_path / "out")
    line = f"{one} and {other} would both be drawn as a.png; rename one of them"
    assert (done.returncode, done.stderr, (tmp_path / "out").exists()) == (2, f"error: {line}\n", False)


@pytest.mark.parametrize(
    ("form", "more"),
    [
        ("safetensors", []),
        pytest.param("onnx", ["--dynamic-batch"], marks=pytest.mark.slow),
        pytest.param("torch_export", ["--dynamic-batch"], marks=pytest.mark.slow),
    ],
)
def test_export(trained, tmp_path, form, more):
    """Written, loaded again and compared: logits at the size of the image."""
    checkpoint = trained.results / "checkpoints/last.pth"
    words = ("--checkpoint", checkpoint, "--format", form, "--to", tmp_path / "out", "--image-size", "64", "96", *more)
    done = start("scripts/export.py", *words, fresh=form == "torch_export")
    assert (done.returncode, done.stderr) == (0, "")
    assert "largest difference of a logit to the model's own: " in done.stdout
    assert "it takes one size: evaluation brings images within 160 x 64 pixels" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["resnet18", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_other_backbones_train_two_steps_and_export(pairs, tmp_path, backbone):
    flags = ("--batch-size", "2", "--opts", "MODEL.NAME", backbone, "MODEL.DROP_PATH_RATE", "0")
    if backbone.startswith("swin"):
        flags += ("MODEL.KWARGS", "{strict_img_size: False}")
    flags += ("DATA.NUM_WORKERS", "0")
    flags += ("DATA.IMG_SIZE", "64", "AUG.RESIZE", "[160, 64]", "TEST.RESIZE", "[160, 64]", "TRAIN.STEPS", "2")
    flags += ("TRAIN.WARMUP_STEPS", "1", "TRAIN.EVAL_EVERY_STEPS", "2", "PRINT_FREQ", "1", "--data-path", pairs)
    done = start("main.py", *RUN[:4], *flags, "--output", tmp_path, fresh=True)
    assert done.returncode == 0, done.stderr
    (checkpoint,) = tmp_path.glob("*/run/checkpoints/last.pth")
    lines = [json.loads(line) for line in (checkpoint.parents[1] / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "train"] == [1, 2]
    for form in ("onnx", "torch_export"):
        words = ("--checkpoint", checkpoint, "--format", form, "--to", tmp_path / form, "--image-size", "64", "96")
        done = start("scripts/export.py", *words, fresh=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert "largest difference of a logit to the model's own: " in done.stdout


@pytest.mark.slow
def test_export_for_many_sizes(trained, tmp_path):
    """One graph gives the model's logits at the size of each image."""
    checkpoint, to = trained.results / "checkpoints/last.pth", tmp_path / "model.onnx"
    words = ("--checkpoint", checkpoint, "--format", "onnx", "--to", to, "--dynamic-size", "--image-size", "160")
    done = start("scripts/export.py", *words)
    assert done.returncode == 0, done.stderr
    assert (
        "one image with sides of 160 and more pixels, multiples of 32; compared at 192 x 384, 160 x 416" in done.stdout
    )
    said = "\nevaluation brings images within 128 x 64 pixels" if done.stdout[0] != "e" else "evaluation brings images"
    assert said in done.stdout
    done = start("scripts/export.py", *words, "--int8")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--int8 is for classifiers" in done.stderr


def test_export_for_timm_is_refused(trained, tmp_path):
    words = ("--checkpoint", trained.results / "checkpoints/last.pth", "--format", "hf", "--to", tmp_path / "out")
    done = start("scripts/export.py", *words)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --format hf is for classifiers")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_throughput(tmp_path):
    result = run(tmp_path, *RUN, "--throughput")
    assert "crossformer_micro" in result.stdout
