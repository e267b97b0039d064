"""What an evaluation tells besides top-1: views, tables, several labels an image, parts of ImageNet's classes."""

import csv
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import TINY_RUN
from PIL import Image
from timm.data import ImageNetInfo, RealLabelsImagenet
from torch.nn.functional import cross_entropy
from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_confusion_matrix
from torchvision.transforms.v2.functional import five_crop

from config import build_config
from data.augmentation import DeviceStage, Plan, build_eval_transform
from data.decoding import decode
from data.splits import open_images
from main import main
from tasks.report import Report

WORDNET_IDS = ImageNetInfo("imagenet-1k").label_names()
MICRO = ("--cfg", "configs/micro.yaml", "--tag", "run", "--batch-size", "64", "--opts", "DATA.NUM_WORKERS", "0")


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory) -> Path:
    """One image for each class of ImageNet, under the names of its first thousand validation images."""
    root = tmp_path_factory.mktemp("imagenet")
    pixels = np.random.default_rng(0).integers(0, 256, (1000, 8, 8, 3), dtype=np.uint8)
    for i, name in enumerate(WORDNET_IDS):
        (root / "val" / name).mkdir(parents=True)
        Image.fromarray(pixels[i]).save(root / "val" / name / f"ILSVRC2012_val_{i + 1:08d}.JPEG", "PNG")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Random weights as published checkpoints are: without the names of the classes."""
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save({"model": model_of(1000).state_dict()}, path)
    return path


def model_of(classes: int) -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("crossformer_micro", num_classes=classes).eval()
    torch.nn.init.normal_(model.head.weight, std=0.3)
    return model


def logits_of(model, root: Path, *opts: str, views=lambda images: [images]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every validation image, one by one, averaged over its views; and the classes."""
    config = build_config("configs/micro.yaml", [*opts, "DATA.DATA_PATH", str(root)])
    index = open_images(config, training=False)[1]
    transform, stage = build_eval_transform(config), DeviceStage(torch.device("cpu"), config.DATA.MEAN, config.DATA.STD)
    rows = []
    with torch.inference_mode():
        for i in range(len(index)):
            images = stage(transform(decode(index[i][0]))[0][None], [Plan()])
            rows.append(torch.stack([model(view).softmax(1) for view in views(images)]).mean(0).log())
    return torch.cat(rows), torch.from_numpy(index.labels).long()


def evaluate(tmp_path: Path, root: Path, weights: Path, *opts: str) -> dict:
    """The line that ``main.py --eval`` adds to metrics.jsonl."""
    flags = (*MICRO, *opts, "--data-path", str(root), "--eval", "--resume", str(weights), "--output", str(tmp_path))
    assert main(list(flags)) == 0
    return json.loads((tmp_path / "crossformer_micro" / "run" / "metrics.jsonl").read_text().splitlines()[-1])


def top(logits: torch.Tensor, targets: torch.Tensor, k: int) -> float:
    return 100 * (logits.topk(k).indices == targets[:, None]).any(1).double().mean().item()


@pytest.mark.parametrize(
    ("opts", "views"),
    [
        (("TEST.VIEWS", "flip"), lambda images: [images, images.flip(3)]),
        (("TEST.VIEWS", "five_crop", "TEST.CROP", "True"), lambda images: five_crop(images, [32, 32])),
    ],
)
def test_probabilities_are_averaged_over_the_views(tmp_path, digits, opts, views):
    torch.save({"model": model_of(10).state_dict()}, tmp_path / "weights.pth")
    logits, targets = logits_of(model_of(10), digits, *opts, views=views)
    found = evaluate(tmp_path, digits, tmp_path / "weights.pth", *opts)
    assert found["images"] == 37
    assert (found["top1"], found["top5"]) == (top(logits, targets, 1), top(logits, targets, 5))
    assert found["loss"] == pytest.approx(cross_entropy(logits, targets).item(), rel=1e-5)
    plain = evaluate(tmp_path, digits, tmp_path / "weights.pth")
    assert plain["loss"] != pytest.approx(found["loss"], rel=1e-4)


def test_five_crops_need_a_margin(tmp_path, digits, capsys):
    assert main([*MICRO, "TEST.VIEWS", "five_crop", "--data-path", str(digits), "--eval"]) == 2
    assert "there is nothing to crop; set TEST.CROP True" in capsys.readouterr().err


def rows_of(path: Path) -> list[list[str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("nproc", [1, 2])
def test_the_report_is_of_all_ranks(run_main, tmp_path, digits, nproc):
    """37 images do not divide by two ranks; what torchmetrics says of all answers at once is what is written."""
    torch.save({"model": model_of(10).state_dict()}, tmp_path / "weights.pth")
    logits, targets = logits_of(model_of(10), digits)
    flags = ("--data-path", digits, "--eval", "--resume", tmp_path / "weights.pth", "--batch-size", "8", "--report")
    done = run_main(*TINY_RUN, *flags, nproc=nproc)
    folder = done.results / "report_model"
    matrix = multiclass_confusion_matrix(logits, targets, num_classes=10)
    written = rows_of(folder / "confusion_matrix.csv")
    assert written[0] == ["true class", *"0123456789"]
    assert [[int(n) for n in row[1:]] for row in written[1:]] == matrix.tolist()
    for row, counts, i in zip(rows_of(folder / "per_class.csv")[1:], matrix, range(10), strict=True):
        assert row[:3] == [str(i), str(int(counts.sum())), str(int(counts[i]))]
        assert float(row[3]) == pytest.approx(counts[i].item() / counts.sum().item())
    error = multiclass_calibration_error(logits.exp(), targets, num_classes=10, n_bins=15).item()
    assert f"expected calibration error {100 * error:.2f} %" in done.stdout
    assert sum(int(row[2]) for row in rows_of(folder / "calibration.csv")[1:]) == 37
    certainty, answers = logits.softmax(1).max(1)
    wrong = (answers != targets).nonzero()[:, 0]
    surest = wrong[certainty[wrong].argsort(descending=True)].tolist()
    rows = rows_of(folder / "mistakes.csv")[1:]
    assert [(row[1], row[2]) for row in rows] == [(str(int(targets[i])), str(int(answers[i]))) for i in surest]
    assert [float(row[3]) for row in rows] == pytest.approx(certainty[surest].tolist(), abs=1e-5)
    assert all(Path(row[0]).parent.name == row[1] for row in rows)
    assert len(list((folder / "mistakes").iterdir())) == len(rows) > 10
    with Image.open(folder / "report.png") as picture:
        assert picture.width > 1000
        assert len(picture.convert("RGB").getcolors(10**6)) > 50


def test_classes_without_an_image_are_left_out(tmp_path):
    report = Report(["a", "b", "c"], torch.device("cpu"))
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 1.0, 3.0], [0.0, -1.0, 3.0]])
    for name in ("first", "again"):  # it starts afresh
        report.add(logits, torch.tensor([0, 2, 0]), torch.arange(3))
        said = report.write(tmp_path / name)
        assert said.startswith("mean accuracy of the classes 75.00 %")
        assert rows_of(tmp_path / name / "per_class.csv")[1:] == [["a", "2", "1", "0.5"], ["c", "1", "1", "1.0"]]


def test_a_report_that_cannot_be_written_is_one_line(tmp_path, digits, capsys):
    torch.save({"model": model_of(10).state_dict()}, tmp_path / "weights.pth")
    results = tmp_path / "crossformer_micro" / "run"
    results.mkdir(parents=True)
    (results / "report_model").write_text("a file where the folder is to be")
    flags = ("--data-path", str(digits), "--eval", "--resume", str(tmp_path / "weights.pth"), "--report")
    assert main([*MICRO, *flags, "--output", str(tmp_path)]) == 2
    assert "report_model cannot be written: File exists; choose another --output" in capsys.readouterr().err


@pytest.mark.slow
def test_several_labels_for_an_image(tmp_path, imagenet, weights):
    labels = RealLabelsImagenet(range(50_000)).real_labels
    logits, _ = logits_of(model_of(1000), imagenet)
    index = open_images(build_config(opts=["DATA.DATA_PATH", str(imagenet)]), training=False)[1]
    fitting = [labels[Path(index.name(i)).name] for i in range(len(index))]
    assert any(len(names) > 1 for names in fitting)
    assert not all(fitting)
    right = [
        [best in names for best in row] for row, names in zip(logits.topk(5).indices.tolist(), fitting, strict=True)
    ]
    right = np.array([row for row, names in zip(right, fitting, strict=True) if names])
    found = evaluate(tmp_path, imagenet, weights, "TEST.REAL_LABELS", "True")
    assert found["real_images"] == len(right) < found["images"] == 1000
    assert found["real_top1"] == pytest.approx(100 * right[:, 0].mean(), abs=1e-9)
    assert found["real_top5"] == pytest.approx(100 * right.any(1).mean(), abs=1e-9)
    assert right.any()


def test_several_labels_are_for_imagenet_alone(tmp_path, digits, imagenet, weights, capsys):
    torch.save({"model": model_of(10).state_dict()}, tmp_path / "ten.pth")
    other = shutil.copytree(imagenet, tmp_path / "data")
    (next((other / "val" / WORDNET_IDS[3]).iterdir())).rename(other / "val" / WORDNET_IDS[3] / "mine.JPEG")
    for root, file, message in (
        (digits, tmp_path / "ten.pth", "is for the 1,000 classes of ImageNet; the model has 10"),
        (other, weights, "mine.JPEG is not a validation image of ImageNet"),
    ):
        flags = ("TEST.REAL_LABELS", "True", "--data-path", str(root), "--eval", "--resume", str(file))
        assert main([*MICRO, *flags, "--output", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err


def test_part_of_the_classes(tmp_path, imagenet, weights, capsys):
    """As ImageNet-A and -R have them: the others are no answers. Every fifth class, so that no number stays."""
    part = tmp_path / "part"
    for name in WORDNET_IDS[4::5]:
        shutil.copytree(imagenet / "val" / name, part / "val" / name)
    logits, targets = logits_of(model_of(1000), part)
    assert targets.tolist() == list(range(200))
    among = logits[:, 4::5]
    found = evaluate(tmp_path, part, weights)
    assert "only the 200 of the model's 1000 classes that the data has are answers" in capsys.readouterr().out
    assert (found["top1"], found["top5"]) == (top(among, targets, 1), top(among, targets, 5))
    assert found["top5"] > 0
    assert found["loss"] == pytest.approx(cross_entropy(among, targets).item(), rel=1e-5)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_classes_named_by_their_numbers(tmp_path, imagenet, weights, workers):
    """As ImageNet-V2 has them; sorted as texts, 10 comes before 2."""
    numbered = tmp_path / "numbered"
    for i, name in enumerate(WORDNET_IDS):
        shutil.copytree(imagenet / "val" / name, numbered / "val" / str(i))
    a, b = (evaluate(tmp_path, root, weights, "DATA.NUM_WORKERS", workers) for root in (imagenet, numbered))
    assert {k: b[k] for k in ("images", "top1", "top5")} == {k: a[k] for k in ("images", "top1", "top5")}
    assert b["loss"] == pytest.approx(a["loss"])
    assert a["top5"] > 0


def test_a_run_on_weights_and_biases(tmp_path, digits, monkeypatch):
    """With the real package, offline; a run that carries on is the same run there."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where it leaves folders as it is imported
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    kept, summaries, init = [], [], wandb.init

    def init_and_keep(**how):
        run = init(**how)
        finish = run.finish
        run.finish = lambda: (summaries.append(dict(run.summary)), finish())
        kept.append(run)
        return run

    monkeypatch.setattr(wandb, "init", init_and_keep)
    for epochs in ("1", "2"):
        flags = (*TINY_RUN, "LOG.WANDB", "mine", "TRAIN.EPOCHS", epochs, "TRAIN.WARMUP_EPOCHS", "0")
        assert main([*flags, "--data-path", str(digits), "--output", str(tmp_path), "--batch-size", "36"]) == 0
    first, second = kept
    assert first.id == second.id
    assert (first.project, first.config["TRAIN"]["EPOCHS"], second.config["TRAIN"]["EPOCHS"]) == ("mine", 1, 2)
    events = (tmp_path / "crossformer_micro" / "run" / "metrics.jsonl").read_text().splitlines()
    last = [event for event in map(json.loads, events) if event["event"] == "train"][-1]
    assert [summary["step"] for summary in summaries] == [2, 4] == [last["step"] - 2, last["step"]]
    assert summaries[-1]["train/loss"] == pytest.approx(last["loss"])
    assert "val/top1" in summaries[-1]


def test_wandb_is_imported_only_when_asked_for(run_main, digits, tmp_path):
    (tmp_path / "wandb.py").write_text("raise ImportError('this is not the package')")
    flags = (*TINY_RUN, "--data-path", digits, "--batch-size", "36", "--opts")
    run_main(*flags, "TRAIN.EPOCHS", "2", PYTHONPATH=str(tmp_path))
    refused = run_main(*flags, "LOG.WANDB", "mine", ok=False, fresh=True, PYTHONPATH=str(tmp_path))
    assert refused.status == 2
    assert "LOG.WANDB needs wandb: pip install wandb" in refused.error
