"""Predictions by exported files, and marks where the folders are called like the classes."""

import csv
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from commands import start
from PIL import Image

import predict
from config import build_config
from scripts import export

RED, GREEN = (208, 59, 59), (46, 158, 91)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    model = timm.create_model("crossformer_micro", num_classes=10, depths=(1, 1, 1, 1))
    torch.nn.init.normal_(model.head.weight, std=0.3)
    path = tmp_path_factory.mktemp("checkpoint") / "best.pth"
    shallow = [("MODEL.CROSSFORMER.DEPTHS", [1, 1, 1, 1], "")]
    config = build_config("configs/micro.yaml", flags=[("MODEL.DROP_PATH_RATE", 0.0, ""), *shallow]).dump()
    torch.save({"model": model.state_dict(), "config": config, "classes": list("0123456789")}, path)
    return path


@pytest.fixture(scope="module")
def exported(checkpoint) -> Path:
    assert export.main(["--checkpoint", str(checkpoint), "--format", "onnx"]) == 0
    return checkpoint.with_name("best.onnx")


def answers(tmp_path: Path, file: Path, *arguments) -> list[dict]:
    to = tmp_path / f"{file.suffix[1:]}.json"
    words = ["--device", "cpu", "--checkpoint", str(file), "--format", "json", "--to", str(to), "--top", "10"]
    assert predict.main([*words, *map(str, arguments)]) == 0
    return json.loads(to.read_text())


def test_an_export_answers_as_its_model(checkpoint, exported, digits, tmp_path):
    there, here = (answers(tmp_path, file, digits / "val") for file in (checkpoint, exported))
    assert len(there) == len(here) > 20
    for one, other in zip(there, here, strict=True):
        assert (one["file"], one["truth"]) == (other["file"], other["truth"])
        of_model = {p["class"]: p["probability"] for p in one["predictions"]}
        assert {p["class"]: p["probability"] for p in other["predictions"]} == pytest.approx(of_model, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--dynamic-batch"]])
def test_so_does_one_of_torch(checkpoint, digits, tmp_path, flags):
    words = ["--checkpoint", str(checkpoint), "--format", "torch_export", "--to", str(tmp_path / "best.pt2"), *flags]
    assert export.main(words) == 0
    there, here = (answers(tmp_path, file, digits / "val") for file in (checkpoint, tmp_path / "best.pt2"))
    for one, other in zip(there, here, strict=True):
        of_model = {p["class"]: p["probability"] for p in one["predictions"]}
        assert {p["class"]: p["probability"] for p in other["predictions"]} == pytest.approx(of_model, abs=1e-4)


@pytest.mark.slow
def test_marks(checkpoint, digits, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "unknown.png").write_bytes(next((digits / "val" / "3").iterdir()).read_bytes())
    where = digits / "val", tmp_path / "elsewhere"
    records = answers(tmp_path, checkpoint, *where)
    marked = [record for record in records if "truth" in record]
    assert len(marked) == len(records) - 1
    for record in marked:
        assert record["truth"] == Path(record["file"]).parent.name
        assert record["right"] == (record["predictions"][0]["class"] == record["truth"])
    right = sum(record["right"] for record in marked)
    assert 0 < right < len(marked)
    words = ("predict.py", "--device", "cpu", "--checkpoint", checkpoint, *where)
    table = start(*words, "--sheet", tmp_path / "sheet.png", "--top", 1)
    percent = f"{100 * right / len(marked):.2f} %"
    said = (
        f"{right} of {len(marked)} are right ({percent}), as their folders are called; 1 are in folders that name no "
    )
    assert table.stderr == f"{said}class\n"
    assert [line.split("\t")[-1] for line in table.stdout.splitlines()] == [r.get("truth", "") for r in records]
    rows = list(csv.DictReader(start(*words, "--format", "csv", "--top", 1).stdout.splitlines()))
    assert [row["truth"] for row in rows] == [record.get("truth", "") for record in records]
    colours = {tuple(colour) for colour in np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).reshape(-1, 3)}
    assert {RED, GREEN} <= colours


def test_files_that_are_no_exports(exported, digits, tmp_path, capsys):
    def problem(*words) -> str:
        assert predict.main(["--device", "cpu", str(digits / "val"), "--checkpoint", *map(str, words)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "x.onnx is not a file" in problem(tmp_path / "x.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    assert "bad.onnx is damaged or not ONNX" in problem(tmp_path / "bad.onnx")
    (tmp_path / "bad.pt2").write_bytes(b"no program")
    assert "bad.pt2 is damaged or not of torch.export" in problem(tmp_path / "bad.pt2")
    graph = onnx.load(exported)
    for key, value in {"classes": "no JSON", "settings": json.dumps("TASK: segmentation")}.items():
        changed = onnx.load(exported)
        next(prop for prop in changed.metadata_props if prop.key == key).value = value
        onnx.save(changed, tmp_path / f"{key}.onnx")
    del graph.metadata_props[:]
    onnx.save(graph, tmp_path / "silent.onnx")
    for name in ("silent", "classes"):
        assert "does not say how it is to be used; write it with scripts/export.py" in problem(
            tmp_path / f"{name}.onnx"
        )
    assert "settings.onnx is for segmentation and takes one size" in problem(tmp_path / "settings.onnx")
    assert "leave out --image-size" in problem(exported, "--image-size", 64)
