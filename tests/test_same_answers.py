"""predict.py, --eval and what is exported: the same images, prepared the same, with classes in the same order."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import ImageNetInfo

import main
import predict
from config import build_config
from scripts import export
from tasks.class_names import as_ids
from tasks.trained import load_trained
from utils.errors import UserError

CLASSES = ["1", "10", "2"]  # in the order of their folders, which is not that of a person
COLOURS = {"1": (200, 40, 40), "2": (40, 200, 40), "10": (40, 40, 200)}
TEST_SETTINGS = {
    "as published": "TEST.CROP True",
    "squashed": "TEST.CROP False",
    "a small crop": "TEST.CROP True TEST.CROP_PCT 0.5",
    "flipped": "TEST.CROP False TEST.VIEWS flip",
    "five crops": "TEST.CROP True TEST.CROP_PCT 0.5 TEST.VIEWS five_crop",
    "upright": "TEST.CROP True DATA.UPRIGHT True",
    "bilinear": "TEST.CROP True DATA.INTERPOLATION bilinear DATA.MEAN [0.2,0.5,0.8]",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """20 noisy images a class, wider than high, half of them turned by EXIF, one of 16 bits."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.RandomState(0)
    tags = Image.Exif()
    for name in CLASSES:
        (root / "val" / name).mkdir(parents=True)
        for i in range(20):
            tags[0x0112] = 6 if i % 2 else 1
            pixels = rng.randint(0, 256, (4, 7, 3), np.uint8)
            image = Image.fromarray(pixels).resize((70, 44), Image.Resampling.BICUBIC)
            image.save(root / "val" / name / f"{i:02d}.png", exif=tags)
        Image.fromarray(rng.randint(0, 65536, (40, 60), np.uint16)).save(root / "val" / name / "deep.png")
    return root


def network() -> torch.nn.Module:
    """Random weights that spread their answers."""
    torch.manual_seed(0)
    model = timm.create_model("crossformer_micro", num_classes=3)
    torch.nn.init.normal_(model.head.weight)
    return model.eval()


def checkpoint(path: Path, settings: str = "") -> Path:
    config = build_config("configs/micro.yaml", settings.split())
    torch.save({"model": network().state_dict(), "config": config.dump(), "classes": CLASSES}, path)
    return path


def evaluated(output: Path, data: Path, file: Path, *opts: str) -> dict:
    """What --eval writes."""
    command = ["--cfg", "configs/micro.yaml", "--data-path", str(data), "--output", str(output), "--eval"]
    opts = ("DATA.NUM_WORKERS", "0", "TAG", file.name, *opts)
    assert main.main([*command, "--resume", str(file), "--opts", *opts]) == 0
    metrics = output / "crossformer_micro" / file.name / "metrics.jsonl"
    return json.loads(metrics.read_text().splitlines()[-1])


def predicted(output: Path, data: Path, file: Path) -> list[dict]:
    to = output / "predictions.json"
    command = ["--checkpoint", str(file), str(data / "val"), "--format", "json", "--to", str(to), "--device", "cpu"]
    assert predict.main(command) == 0
    return json.loads(to.read_text())


def accuracy(records: list[dict]) -> tuple[float, float]:
    """Top-1 in percent, and the mean cross entropy."""
    named = [(Path(record["file"]).parent.name, record["predictions"]) for record in records]
    right = sum(predictions[0]["class"] == name for name, predictions in named)
    probabilities = [p["probability"] for name, predictions in named for p in predictions if p["class"] == name]
    return 100 * right / len(named), float(-np.log(probabilities).mean())


@pytest.mark.parametrize("name", TEST_SETTINGS)
def test_prediction_sees_what_evaluation_sees(data, tmp_path, name):
    settings = TEST_SETTINGS[name]
    file = checkpoint(tmp_path / "best.pth", settings)
    result = evaluated(tmp_path, data, file, *settings.split())
    top1, loss = accuracy(predicted(tmp_path, data, file))
    assert result["images"] == 63
    assert result["top1"] == top1
    assert result["loss"] == pytest.approx(loss, rel=1e-4)
    if name != "as published":  # or the settings would be none
        published = TEST_SETTINGS["as published"]
        plain = evaluated(tmp_path, data, checkpoint(tmp_path / "plain.pth", published), *published.split())
        assert plain["loss"] != pytest.approx(result["loss"], rel=1e-4)


def test_another_preparation_than_in_training_is_said(data, tmp_path, capsys):
    file = checkpoint(tmp_path / "best.pth", "DATA.UPRIGHT True TEST.VIEWS flip")
    evaluated(tmp_path, data, file, "DATA.UPRIGHT", "False")
    out = capsys.readouterr().out
    assert "prepared otherwise than" in out
    assert "; as was asked for: " in out
    assert "DATA.UPRIGHT False (there True), TEST.VIEWS none (there flip)" in out
    assert "EXIF says of 30 of 63 images" in out
    evaluated(tmp_path, data, file, "TEST.VIEWS", "flip")
    out = capsys.readouterr().out
    assert "otherwise" not in out
    assert "DATA.UPRIGHT True" in out, "as the checkpoint says"


# ---- The order of the classes


def folder_of_timm(folder: Path, names, **config) -> Path:
    """The same network as timm keeps it, its classes in the order of ``names``."""
    folder.mkdir()
    weights = network().state_dict()
    if sorted(names, key=str) == CLASSES:
        order = [CLASSES.index(name) for name in names]
        weights = {key: value[order] if key.startswith("head.") else value for key, value in weights.items()}
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / "model.safetensors")
    said = {"architecture": "crossformer_micro", "num_classes": 3, "label_names": names, **config}
    said["pretrained_cfg"] = {"input_size": [3, 32, 32], "crop_pct": 1.0, "crop_mode": "squash"}
    (folder / "config.json").write_text(json.dumps(said))
    return folder


def test_label_names_decide_the_order_in_evaluation_too(data, tmp_path, capsys):
    """Sorted as a person would, the classes once came in another order than the folders', and nobody said a word."""
    ours = evaluated(tmp_path, data, checkpoint(tmp_path / "best.pth"))
    for i, names in enumerate((["1", "2", "10"], [1, 2, 10], {"0": "1", "1": "2", "2": "10"})):
        folder = folder_of_timm(tmp_path / f"hub{i}", ["1", "2", "10"])
        said = json.loads((folder / "config.json").read_text()) | {"label_names": names}
        (folder / "config.json").write_text(json.dumps(said))
        result = evaluated(tmp_path, data, folder)
        assert (result["top1"], result["loss"]) == (ours["top1"], pytest.approx(ours["loss"], rel=1e-5))
        assert accuracy(predicted(tmp_path, data, folder))[0] == ours["top1"]
        out = capsys.readouterr().out
        assert f"the classes are numbered as in {folder}" in out
        assert "prepared otherwise" not in out  # the size may be said by two numbers, or by one


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["1", "2", "11"], "was trained on other classes: its class 1 is '2', the data's '10'"),
        (["1", "2"], "has the names of 2 classes, but its head has 3"),
        ([["1"], "2", "3"], "label_names must be a list of names"),
        ("1 2", "label_names must be a list of names"),
    ],
)
def test_label_names_that_do_not_fit(data, tmp_path, capsys, names, message):
    folder = folder_of_timm(tmp_path / "hub", names)
    command = ["--cfg", "configs/micro.yaml", "--data-path", str(data), "--output", str(tmp_path), "--eval"]
    assert main.main([*command, "--resume", str(folder), "--opts", "DATA.NUM_WORKERS", "0"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    if "trained on" not in message:
        with pytest.raises(UserError, match=message):
            load_trained(str(folder), torch.device("cpu"))


def test_words_and_ids_of_imagenet_are_the_same_classes(tmp_path):
    """An export has the words of WordNet ids, and the folders of the data are called by the ids."""
    info = ImageNetInfo("imagenet-1k")
    ids, words = info.label_names(), [info.index_to_description(i) for i in range(1000)]
    assert as_ids(words) == as_ids(ids) == ids
    assert as_ids(["cat"]) is None
    chosen = [7, 3, 5]  # not sorted, so that a mix-up shows
    folder = folder_of_timm(tmp_path / "hub", [words[i] for i in chosen])
    rng = np.random.RandomState(0)
    for i in chosen:
        (tmp_path / "data" / "val" / ids[i]).mkdir(parents=True)
        for j in range(8):
            image = Image.fromarray(rng.randint(0, 256, (40, 40, 3), np.uint8))
            image.save(tmp_path / "data" / "val" / ids[i] / f"{j}.png")
    result = evaluated(tmp_path, tmp_path / "data", folder)
    records = predicted(tmp_path, tmp_path / "data", folder)
    right = [words[ids.index(Path(r["file"]).parent.name)] == r["predictions"][0]["class"] for r in records]
    assert result["top1"] == 100 * sum(right) / len(right)


# ---- Exports


@pytest.mark.parametrize("settings", ["TEST.CROP False TEST.VIEWS flip DATA.UPRIGHT True", "TEST.CROP_PCT 0.5"])
def test_an_export_prepares_images_as_its_model(data, tmp_path, capsys, settings):
    settings = settings if "False" in settings else f"{settings} TEST.CROP True TEST.VIEWS five_crop DATA.WHITE 60000"
    file = checkpoint(tmp_path / "best.pth", settings)
    assert export.main(["--checkpoint", str(file), "--format", "hf"]) == 0
    out = capsys.readouterr().out
    ours, theirs = (load_trained(str(path), torch.device("cpu")).config for path in (file, tmp_path / "best-hf"))
    assert ours.TEST.VIEWS in ("flip", "five_crop")
    card = (tmp_path / "best-hf" / "README.md").read_text()
    for section, key in (
        *(("DATA", key) for key in ("IMG_SIZE", "INTERPOLATION", "MEAN", "STD", "UPRIGHT", "WHITE")),
        ("TEST", "CROP"), ("TEST", "VIEWS"), *([("TEST", "CROP_PCT")] if ours.TEST.CROP else []),
    ):  # fmt: skip
        assert ours[section][key] == theirs[section][key], key
    for said in (out, card):
        assert f"TEST.VIEWS {ours.TEST.VIEWS} is not in it: average the probabilities" in said
        assert ("exif_transpose" in said) == ours.DATA.UPRIGHT
        assert ("DATA.WHITE is not in it" in said) == bool(ours.DATA.WHITE)
    before, after = (predicted(tmp_path, data, path) for path in (file, tmp_path / "best-hf"))
    for a, b in zip(before, after, strict=True):
        assert [p["class"] for p in a["predictions"]] == [p["class"] for p in b["predictions"]]


def test_a_preparation_that_is_not_known_is_an_error(tmp_path):
    folder = folder_of_timm(tmp_path / "hub", CLASSES)
    said = json.loads((folder / "config.json").read_text())
    said["pretrained_cfg"]["crop_mode"] = "border"
    (folder / "config.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match="crop_mode border"):
        load_trained(str(folder), torch.device("cpu"))
