"""Predictions for images, by the real command line."""

import csv
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from commands import start
from PIL import Image

from config import build_config
from data.augmentation import DeviceStage, Plan, build_eval_transform
from data.decoding import decode
from predict import main

CLASSES = [f"digit [{i}]\té" for i in range(10)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Random weights that spread their answers over the classes, as a run of ours keeps them, and alone."""
    torch.manual_seed(0)
    model = timm.create_model("crossformer_micro", num_classes=10)
    torch.nn.init.normal_(model.head.weight, std=0.3)
    path = tmp_path_factory.mktemp("checkpoint") / "best.pth"
    config = build_config("configs/micro.yaml").dump()
    torch.save({"model": model.state_dict(), "config": config, "classes": CLASSES}, path)
    torch.save(model.state_dict(), path.with_name("plain.pth"))
    return path


def run(*arguments, fresh: bool = False) -> subprocess.CompletedProcess:
    done = start("predict.py", "--device", "cpu", *arguments, fresh=fresh)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def exact(checkpoint: Path, paths: list[Path]) -> torch.Tensor:
    """Probabilities, image by image, as evaluation prepares them."""
    model = timm.create_model("crossformer_micro", num_classes=10).eval()
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
    config = build_config("configs/micro.yaml")
    transform, stage = build_eval_transform(config), DeviceStage(torch.device("cpu"), config.DATA.MEAN, config.DATA.STD)
    with torch.inference_mode():
        images = [stage(transform(decode(path.read_bytes()))[0][None], [Plan()]) for path in paths]
        return torch.cat([model(image).softmax(1) for image in images])


def test_predictions_are_those_of_evaluation_whatever_the_batch(checkpoint, digits):
    paths = sorted((digits / "val").rglob("*.png"))
    expected = exact(checkpoint, paths)
    for batch_size in (1, 8, 64):  # 37 images
        arguments = ("--format", "json", "--top", 12, "--batch-size", batch_size)
        done = run("--checkpoint", checkpoint, digits / "val", *arguments)
        assert (done.returncode, done.stderr) == (0, "")
        records = json.loads(done.stdout)
        assert [record["file"] for record in records] == [str(path) for path in paths]
        for record, probabilities in zip(records, expected, strict=True):
            found = {p["class_index"]: p["probability"] for p in record["predictions"]}
            assert list(found.values()) == sorted(found.values(), reverse=True)
            assert [found[i] for i in range(10)] == pytest.approx(probabilities.tolist(), abs=1e-5)
            assert all(p["class"] == CLASSES[p["class_index"]] for p in record["predictions"])


def test_bad_images_are_skipped_and_named(checkpoint, digits, tmp_path):
    folder = tmp_path / "images"
    names = ("b/c/2.png", "b/1.PNG", ".hidden/4.png", "a 0.png", "b/._1.png")
    for name, source in zip(names, sorted((digits / "val").rglob("*.png")), strict=False):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(source.read_bytes())
    for name in ("b/bad.jpg", "notes.txt"):
        (folder / name).write_bytes(b"no image")
    last, out = folder / "a 0.png", tmp_path / "out.csv"
    images = [str(folder / name) for name in ("a 0.png", "b/1.PNG", "b/c/2.png")] + [str(last)]
    done = run("--checkpoint", checkpoint, folder, last, "--format", "csv", "--to", out, "--batch-size", 2)
    line = f"skipped image {folder / 'b/bad.jpg'}: cannot identify image file"
    said = [line, "left out, being no images: 1 .txt"]
    assert (done.returncode, done.stdout, done.stderr.splitlines()) == (1, "", said)
    rows = list(csv.DictReader(out.read_text(encoding="utf-8").splitlines()))
    assert [(row["file"], row["rank"]) for row in rows] == [(i, str(rank)) for i in images for rank in range(1, 6)]
    table = run("--checkpoint", checkpoint, folder, "--top", 2)
    lines = [line.split("\t") for line in table.stdout.splitlines()]
    named = [f"{row['class']} {100 * float(row['probability']):.1f} %".replace("\t", r"\t") for row in rows]
    assert lines == [[image, *named[5 * i : 5 * i + 2]] for i, image in enumerate(images[:3])]
    all_bad = run("--checkpoint", checkpoint, folder / "b/bad.jpg", "--format", "json", "--sheet", tmp_path / "x.png")
    bad = {"file": str(folder / "b/bad.jpg"), "error": line.split(": ")[1]}
    assert (all_bad.returncode, json.loads(all_bad.stdout)) == (1, [bad])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "out.csv"]


def test_sheet(checkpoint, digits, tmp_path):
    done = run("--checkpoint", checkpoint, digits / "train", "--sheet", tmp_path / "sheet.png")
    assert (done.returncode, done.stderr) == (0, "")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (8 * (224 + 6 * 22 + 30 + 12) + 22 + 24, 8 * (224 + 24 + 12) + 12, 3)  # 60 of 72 images
    top, left = 24 + 22 + 34, 24
    transform = build_eval_transform(build_config("configs/micro.yaml"))
    pixels = transform(decode(min((digits / "train").rglob("*.png")).read_bytes()))[0].permute(1, 2, 0).numpy()
    assert np.array_equal(sheet[top : top + 224, left : left + 224], pixels.repeat(7, 0).repeat(7, 1))
    bars = sheet[top + 224 + 6 :][: 5 * 22, left : left + 224]
    assert len(np.unique(bars.reshape(-1, 3), axis=0)) > 20  # colours


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "missing.pth", "{images}"], "missing.pth is not a file"),
        (["--checkpoint", "README.md", "{images}"], "README.md is damaged or not a checkpoint"),
        (["--checkpoint", "{plain}", "{images}", "--model", "crossformer_tiny"], "{plain} does not fit the model"),
        (["--checkpoint", "{plain}", "{images}", "--model", "crossformer_tinny"], "did you mean crossformer_tiny?"),
        (["--checkpoint", "{best}", "{images}", "--model", "resnet18"], "it holds crossformer_micro; leave out"),
        (["--checkpoint", "{best}", "{images}", "--image-size", "20"], "needs at least 32 x 32"),
        (["--checkpoint", "{best}", "{images}", "--top", "0"], "--top and --batch-size must be at least 1"),
        (["--checkpoint", "{best}", "{images}", "nowhere"], "nowhere is no file and no folder of images"),
        (["--checkpoint", "{best}", "{tmp}"], "{tmp} is a folder without an image; give images or their folders"),
        (["--checkpoint", "{best}", "{images}", "--to", "{tmp}/no/x"], "{tmp}/no/x cannot be written: No such file"),
        (["--checkpoint", "{best}", "{images}", "--to", "{tmp}"], "{tmp} cannot be written: it is not a file"),
        (["--checkpoint", "{best}", "{images}", "--sheet", "{tmp}/no/x.png"], "{tmp}/no/x.png cannot be written"),
    ],
)
def test_errors(checkpoint, digits, tmp_path, capsys, arguments, message):
    names = {"best": checkpoint, "plain": checkpoint.with_name("plain.pth"), "images": digits / "val", "tmp": tmp_path}
    more = ["--sheet" if "--to" in arguments else "--to", str(tmp_path / "more.png")]
    assert main([argument.format(**names) for argument in [*more, *arguments]]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert message.format(**names) in said.err
    assert list(tmp_path.iterdir()) == []
