"""Exporting a trained model."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import yaml
from commands import start
from conftest import ROOT
from PIL import Image
from safetensors import safe_open

import engine.export
import predict
from config import build_config
from engine.model_card import run_settings
from models import build_model
from models.crossformer import VARIANTS
from scripts import export
from tasks.trained import load_trained

NARROW = {
    "MODEL.NAME": "crossformerpp_small", "MODEL.CROSSFORMER.EMBED_DIM": 32,
    "MODEL.CROSSFORMER.DEPTHS": [1, 2, 4, 1], "MODEL.CROSSFORMER.GROUP_SIZE": [4, 4, [4, 4, 14, 14], 7],
}  # fmt: skip
"""With padding masks, progressive group sizes and an amplitude cooling layer."""
FACTS = {"top1": 87.654321, "top5": 99.0, "loss": 0.5, "images": 360, "step": 220, "epoch": 5, "weights": "ema"}
CPU = torch.device("cpu")


def save_checkpoint(path, classes=3, **settings):
    """As a run leaves it, with weights that give logits as large as a trained network's."""
    flags = [(k, v, "") for k, v in {"DATA.IMG_SIZE": 64, "DATA.MEAN": [0.1, 0.2, 0.3], **settings}.items()]
    config = build_config(str(ROOT / "configs/micro.yaml"), flags=flags)
    torch.manual_seed(0)
    model = build_model(config, classes)
    for layer in (module for module in model.modules() if isinstance(module, torch.nn.Linear)):
        torch.nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    content = {"config": config.dump(), "classes": [f"Möwe {i}" for i in range(classes)], **FACTS}
    torch.save(content | {"model": model.state_dict()}, path)
    return str(path)


@torch.no_grad()
def same(model, other, *shape):
    images = torch.randn(shape)
    return torch.allclose(model(images), other(images), atol=1e-4, rtol=0)


def load_graph(path):
    if path.suffix == ".pt2":
        return torch.export.load(path).module()
    run = onnxruntime.InferenceSession(path).run
    return lambda images: torch.from_numpy(run(None, {"images": images.numpy()})[0])


OTHER_GRAPHS = ("torch_export", "pt2", 5), ("onnx", "onnx", 1)


@pytest.mark.parametrize(
    ("form", "suffix", "batch"),
    [("onnx", "onnx", 5), *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHER_GRAPHS)],
)
def test_a_graph_computes_the_same_logits(tmp_path, form, suffix, batch):
    """By the real command line, whose output is these four lines and nothing of the exporters'."""
    file, to = save_checkpoint(tmp_path / "best.pth", **NARROW), tmp_path / f"best.{suffix}"
    flags = ["--checkpoint", file, "--format", form, "--image-size", "96", "64", *["--dynamic-batch"] * (batch > 1)]
    done = start("scripts/export.py", *flags, fresh=form == "torch_export")
    assert (done.returncode, done.stderr) == (0, "")
    takes, timed = ("batches of any size", 8) if batch > 1 else ("one image", 1)
    assert re.sub(r"\d+\.\d+(e[-+]\d+)?", "N", done.stdout) == (
        f"crossformerpp_small as {form} takes {takes} of 96 x 64 pixels\n"
        "largest difference of a logit to the model's own: N (allowed: 1e-04)\n"
        f"images/s, {timed} at a time: N, the model N, ratio N\nin {to}\n"
    )
    assert sorted(os.listdir(tmp_path)) == sorted(["best.pth", to.name])
    assert same(load_trained(file, CPU).model, load_graph(to), batch, 3, 96, 64)


def test_packages_that_do_not_fit_torch_are_named(tmp_path):
    """torch looks for parts of onnxscript by name, and an older onnxscript, here an empty one, does not have them."""
    file = save_checkpoint(tmp_path / "best.pth", **NARROW)
    (tmp_path / "site" / "onnxscript").mkdir(parents=True)
    (tmp_path / "site" / "onnxscript" / "__init__.py").touch()
    done = start("scripts/export.py", "--checkpoint", file, "--format", "onnx", PYTHONPATH=str(tmp_path / "site"))
    assert done.returncode == 2
    said = r"error: --format onnx: its packages do not fit torch \S+ \(.*'onnxscript.*\); pip install --upgrade .*\n"
    assert re.fullmatch(said, done.stderr)
    assert sorted(os.listdir(tmp_path)) == ["best.pth", "site"]


def test_safetensors(tmp_path):
    file = save_checkpoint(tmp_path / "best.pth", **NARROW)
    assert export.main(["--checkpoint", file, "--format", "safetensors"]) == 0
    with safe_open(tmp_path / "best.safetensors", "pt") as written:
        said = {key: json.loads(value) for key, value in written.metadata().items()}
        weights = {key: written.get_tensor(key) for key in written.keys()}  # noqa: SIM118
    assert (said["classes"], said["mean"], said["top1"]) == (["Möwe 0", "Möwe 1", "Möwe 2"], [0.1, 0.2, 0.3], 87.654321)
    model = timm.create_model(said["architecture"], num_classes=3, **said["model_args"]).eval()
    model.load_state_dict(weights)
    assert same(model, load_trained(file, CPU).model, 2, 3, 64, 64)


def test_a_folder_for_timm_and_the_hub(tmp_path):
    file, folder = save_checkpoint(tmp_path / "best.pth", **NARROW), tmp_path / "best-hf"
    folder.mkdir()
    for _ in ("into an empty folder", "over a model's"):
        assert export.main(["--checkpoint", file, "--format", "hf"]) == 0
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "model.safetensors"]
    trained, again = load_trained(file, CPU), load_trained(str(folder), CPU)
    by_timm = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert same(trained.model, again.model, 2, 3, 64, 64)
    assert same(trained.model, by_timm, 2, 3, 64, 64)
    assert again.classes == trained.classes == by_timm.pretrained_cfg["label_names"]
    data = timm.data.resolve_model_data_config(by_timm)
    assert (data["input_size"], list(data["mean"]), data["crop_mode"]) == ((3, 64, 64), [0.1, 0.2, 0.3], "squash")
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\npipeline_tag: image-classification\ntags: [image-")
    assert "Its author has not said under which licence it may be used." in card
    assert "license" not in (folder / "config.json").read_text()
    assert "num_classes" not in json.loads((folder / "config.json").read_text())["model_args"]
    assert "- top1: 87.6543\n" in card
    (tmp_path / "run.yaml").write_text(card.partition("```yaml\n")[2].partition("```")[0])
    assert build_config(str(tmp_path / "run.yaml")).dump() == torch.load(file)["config"]
    Image.fromarray(np.zeros((50, 70, 3), np.uint8)).save(folder / "image.png")
    snippet, paths = card.partition("```python\n")[2].partition("```")[0], {"PYTHONPATH": str(ROOT / "models")}
    done = subprocess.run([sys.executable, "-c", snippet], cwd=folder, env=os.environ | paths, stdout=subprocess.PIPE)
    assert done.stdout.decode().strip() in trained.classes


def test_the_card_names_no_path_of_the_run(tmp_path):
    settings = run_settings(save_checkpoint(tmp_path / "best.pth", **{"DATA.DATA_PATH": "/home/me/secret"}))
    assert "secret" not in settings
    assert "crossformer_micro" in settings


def test_a_licence_is_the_one_that_was_chosen(tmp_path):
    file, folder = save_checkpoint(tmp_path / "best.pth"), tmp_path / "new" / "folder"
    chosen = ["--license", "apache-2.0", "--to", str(folder)]
    assert export.main(["--checkpoint", file, "--format", "hf", *chosen]) == 0
    card = (folder / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0"
    assert "has not said" not in card
    assert json.loads((folder / "config.json").read_text())["pretrained_cfg"]["license"] == "apache-2.0"


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_who_may_read_an_export_is_decided_by_the_mask(tmp_path, mask):
    file, before = save_checkpoint(tmp_path / "best.pth"), os.umask(mask)
    try:
        for form in ("hf", "safetensors"):
            assert export.main(["--checkpoint", file, "--format", form]) == 0
    finally:
        os.umask(before)
    written = [tmp_path / "best.safetensors", *(tmp_path / "best-hf").iterdir()]
    assert len(written) == 4
    assert {path.stat().st_mode & 0o777 for path in written} == {0o666 & ~mask}


@pytest.mark.slow
def test_transformers_loads_the_folder(tmp_path):
    """As a classifier, as a backbone and in a pipeline."""
    transformers = pytest.importorskip("transformers")
    file, folder, images = (
        save_checkpoint(tmp_path / "best.pth", **NARROW),
        tmp_path / "best-hf",
        torch.randn(2, 3, 64, 96),
    )
    assert export.main(["--checkpoint", file, "--format", "hf"]) == 0
    model = load_trained(file, CPU).model
    classifier = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    backbone = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(classifier(images).logits, model(images))
        torch.testing.assert_close(backbone(images).last_hidden_state, model.forward_features(images))
    assert list(classifier.config.id2label.values()) == ["Möwe 0", "Möwe 1", "Möwe 2"]
    Image.fromarray(np.zeros((50, 70, 3), np.uint8)).save(tmp_path / "image.png")
    best = transformers.pipeline("image-classification", model=str(folder))(str(tmp_path / "image.png"))[0]
    found = tmp_path / "found.json"
    assert (
        predict.main(["--checkpoint", file, str(tmp_path / "image.png"), "--format", "json", "--to", str(found)]) == 0
    )
    expected = json.loads(found.read_text())[0]["predictions"][0]
    assert (best["label"], best["score"]) == (expected["class"], pytest.approx(expected["probability"], abs=0.02))


def lines_of(page: str, word: str) -> str:
    """The Python lines of a page that have a word in them."""
    return next(piece for piece in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S) if word in piece)


OF_ALL = """
files = sorted(__import__("glob").glob("*.png"))
batch = np.stack([prepare(file) for file in files])
answers = [session.run(["logits"], {"images": batch})[0]]
"""
BOTH = """
answers.append(model(torch.from_numpy(batch)).detach().numpy())
print(json.dumps([said["classes"], said["class_ids"], files, [x.tolist() for x in answers]]))
"""


@pytest.mark.slow  # test_predict_exported.py has one that answers as its model
@pytest.mark.parametrize(
    "preparation",
    [
        {"TEST.CROP": False},
        {"TEST.CROP": True, "TEST.CROP_PCT": 0.8, "DATA.IMG_SIZE": [32, 48], "DATA.INTERPOLATION": "bilinear"},
    ],
)
def test_the_file_alone_is_enough(tmp_path, preparation):
    """Images of all shapes, prepared by the lines in docs/export.md, get the answers of an evaluation."""
    shallow = {"MODEL.CROSSFORMER.DEPTHS": [1, 1, 1, 1], "DATA.IMG_SIZE": 32, "DATA.STD": [0.3] * 3}
    checkpoint = save_checkpoint(tmp_path / "best.pth", **{**shallow, **preparation})
    generator = np.random.default_rng(0)
    for i, size in enumerate(((40, 30), (31, 77), (20, 20), (64, 33), (128, 96), (33, 64))):
        clouds = Image.fromarray(generator.integers(0, 255, (6, 5, 3)).astype(np.uint8))
        clouds = clouds.resize(size, Image.Resampling.BICUBIC)
        clouds.save(tmp_path / f"{i}.png")
    clouds.convert("LA").save(tmp_path / "image.png")
    files, found = sorted(map(str, tmp_path.glob("*.png"))), tmp_path / "found.json"
    assert predict.main(["--checkpoint", checkpoint, *files, "--format", "json", "--to", str(found)]) == 0
    expected = json.loads(found.read_text())
    for form in ("onnx", "torch_export"):
        assert export.main(["--checkpoint", checkpoint, "--format", form, "--dynamic-batch"]) == 0
    page = (ROOT / "docs" / "export.md").read_text()
    with_onnx, with_torch = (lines_of(page, word) for word in ("def prepare", "best.pt2"))
    code = f"{with_onnx}{OF_ALL}{with_torch}{BOTH}"
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, *_, last = done.stdout.splitlines()
    classes, ids, names, answers = json.loads(last)
    assert classes == ids == [f"Möwe {i}" for i in range(3)]
    assert names == [os.path.basename(record["file"]) for record in expected]
    for probabilities in torch.tensor(answers).softmax(2).tolist():
        for record, of_image in zip(expected, probabilities, strict=True):
            for answer in record["predictions"]:
                assert abs(of_image[answer["class_index"]] - answer["probability"]) < 0.02
    assert first == next(r["predictions"][0]["class"] for r in expected if r["file"].endswith("image.png"))


MISTAKES = {
    "nowhere.pth --format hf": "nowhere.pth is not a file",
    "{tmp}/text.pth --format onnx": "text.pth is damaged or not a checkpoint",
    "{tmp}/plain.pth --format hf --model crossformer_smal": "did you mean crossformer_small?",
    "{tmp}/best.pth --format hf --dynamic-batch": "hf takes any batch as it is",
    "{tmp}/best.pth --format onnx --image-size 31": "--image-size takes one number or two, each at least 32",
    "{tmp}/best.pth --format onnx --to {tmp}/text.pth/x.onnx": "x.onnx cannot be written: Not a directory",
    "{tmp}/best.pth --format hf --dynamic-size": "hf takes any size as it is",
    "{tmp}/best.pth --format onnx --dynamic-size": "choose --image-size among them, not 64 x 64",
    "{tmp}/best.pth --format torch_export --int8": "--int8 is for --format onnx",
    "{tmp}/best.pth --format onnx --data-path x": "--data-path is for --int8",
    "{tmp}/best.pth --format onnx --license mit": "--license is for --format hf",
    "{tmp}/best.pth --format hf --license odd:text": "--license 'odd:text': give it as the hub does",
    "{tmp}/best.pth --format torch_export --to {tmp}": "is there and not to be replaced",
    "{tmp}/best.pth --format hf --to {tmp}": "is there and not to be replaced",
    "{tmp}/best.pth --format safetensors --to {tmp}/best.pth": "is there and not to be replaced",
}


def test_a_mistake_is_named_and_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    save_checkpoint(tmp_path / "best.pth")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "plain.pth")
    (tmp_path / "text.pth").write_text("no checkpoint")

    def fails(arguments, message):
        assert export.main(["--checkpoint", *arguments.format(tmp=tmp_path).split()]) == 2
        assert re.fullmatch(f"error: .*{re.escape(message)}.*\n", capsys.readouterr().err)
        assert sorted(os.listdir(tmp_path)) == ["best.pth", "plain.pth", "text.pth"]

    for arguments, message in MISTAKES.items():
        fails(arguments, message)
    monkeypatch.setattr(engine.export, "TOLERANCE", -1)
    fails("{tmp}/best.pth --format torch_export", "torch_export gives other logits than the model")
    monkeypatch.setattr(engine.export, "save_for_hf", lambda *_, **__: 1 / 0)
    fails("{tmp}/best.pth --format hf", "best.pth cannot be exported as hf: division by zero")
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    fails("{tmp}/best.pth --format onnx", "pip install onnx onnxscript onnxruntime")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["torch_export", "onnx"])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant(tmp_path, name, form):
    file = save_checkpoint(tmp_path / "best.pth", 1000, **{"MODEL.NAME": name})
    size = "32" if name == "crossformer_micro" else "224"
    assert export.main(["--checkpoint", file, "--format", form, "--dynamic-batch", "--image-size", size]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("form", ["torch_export", "onnx"])
@pytest.mark.parametrize("name", ["crossformer_tiny", "crossformerpp_small"])
def test_a_size_that_pads_the_groups(tmp_path, name, form):
    """One of each family: the others have the same blocks, only more and wider ones."""
    file = save_checkpoint(tmp_path / "best.pth", 1000, **{"MODEL.NAME": name})
    assert export.main(["--checkpoint", file, "--format", form, "--dynamic-batch", "--image-size", "256", "448"]) == 0
