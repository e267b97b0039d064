"""Exports that compute in int8."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import write_digits
from test_export import save_checkpoint

import engine.int8
import predict
from engine.exported import open_onnx
from engine.int8 import PRODUCTS, Sampled
from scripts import export
from tasks.trained import load_trained


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Of a network for digits that has learned nothing, but gives logits as large as if it had."""
    path = tmp_path_factory.mktemp("checkpoint") / "best.pth"
    save_checkpoint(path, 10, **{"MODEL.CROSSFORMER.DEPTHS": [1, 2, 1, 1], "DATA.IMG_SIZE": 32})
    torch.save(torch.load(path) | {"classes": [*map(str, range(10))]}, path)
    return path


def test_int8(checkpoint, digits, tmp_path, capsys, monkeypatch):
    """The command says what it costs; products with weights are in int8, all others in float; predict.py takes it."""
    monkeypatch.setattr(engine.int8, "MOST_POINTS_LOST", 20.0)
    to = tmp_path / "int8.onnx"
    words = ["--checkpoint", str(checkpoint), "--format", "onnx", "--dynamic-batch", "--int8"]
    assert export.main([*words, "--data-path", str(digits), "--to", str(to)]) == 0
    said = capsys.readouterr().out
    found = re.search(r"top-1 on 37 images: int8 (\S+), float (\S+) \(calibrated on 37 of them\)\n", said)
    sizes = re.search(r"the file has (\S+) MiB, in float (\S+) MiB\n", said)
    assert found
    assert sizes
    assert "in float" in said.splitlines()[-2]
    assert abs(float(found[1]) - float(found[2])) <= 20
    assert float(sizes[1]) < 0.4 * float(sizes[2])
    graph = onnx.load(to).graph
    scaled = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    products = [node for node in graph.node if node.op_type in PRODUCTS]
    in_float = [node for node in products if not set(node.input[:2]) <= scaled]
    assert len(in_float) == 2 * 5  # queries with keys, and with values, of each block
    assert all(not set(node.input) & scaled for node in in_float)
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    small = [w for name, w in weights.items() if w.dtype == np.int8 and name.endswith("_quantized")]
    assert len(small) == len(products) - len(in_float)
    assert max(np.abs(w.astype(int)).max() for w in small) <= 64  # 7 bits
    convolutions = {
        node.input[1].replace("_DequantizeLinear_Output", "") for node in products if node.op_type == "Conv"
    }
    scales = {name: len(weights[f"{name}_scale"]) for name in convolutions}
    assert scales == {name: len(weights[f"{name}_quantized"]) for name in convolutions}  # one for each output channel
    assert json.loads(open_onnx(str(to)).texts["quantisation"]) == "int8"
    images = torch.randn(64, 3, 32, 32)
    with torch.no_grad():
        expected = load_trained(str(checkpoint), torch.device("cpu")).model(images)
    assert 0 < (open_onnx(str(to)).run(images) - expected).std() < 0.3 * expected.std()
    assert predict.main(["--checkpoint", str(to), str(digits / "val" / "0")]) == 0


def test_samples_are_spread_over_all_batches():
    for count, steps in ((1000, {3, 4}), (360, {1, 2}), (100, {1})):
        numbers = torch.arange(float(count))[:, None, None, None].expand(-1, 3, 1, 1)
        sampled = Sampled(lambda images: images[:, :, 0, 0], None, len(numbers))
        for part in numbers.split(7):
            sampled(part)
        kept = [int(image[0, 0, 0]) for image in sampled.kept]
        assert (sampled.asked, len(kept), kept[0]) == (count, min(count, 256), 0)
        assert {after - before for before, after in itertools.pairwise([*kept, count])} <= steps


@pytest.mark.slow
def test_int8_that_answers_otherwise_leaves_no_file(checkpoint, digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engine.int8, "MOST_POINTS_LOST", -101.0)
    words = ["--checkpoint", str(checkpoint), "--format", "onnx", "--int8", "--to", str(tmp_path / "x.onnx")]
    assert export.main([*words, "--data-path", str(digits)]) == 2
    said = r"error: top-1 on .*: int8 \S+, float \S+; .* points are lost, so nothing is written.*\n"
    assert re.fullmatch(said, capsys.readouterr().err)
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_int8_for_many_sizes(checkpoint, digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(engine.int8, "MOST_POINTS_LOST", 100.0)
    words = ["--checkpoint", str(checkpoint), "--format", "onnx", "--int8", "--dynamic-size", "--image-size", "160"]
    assert export.main([*words, "--data-path", str(digits), "--to", str(tmp_path / "x.onnx")]) == 0, capsys.readouterr()
    run = open_onnx(str(tmp_path / "x.onnx")).run
    assert run(torch.randn(1, 3, 192, 256)).shape == (1, 10)
    with pytest.raises(Exception, match="height_and_width_must_be_multiples_of_32_from_160"):
        run(torch.randn(1, 3, 128, 256))


def test_int8_with_images_of_other_classes(checkpoint, tmp_path, capsys):
    write_digits(tmp_path / "data" / "val", 3)
    words = ["--checkpoint", str(checkpoint), "--format", "onnx", "--int8", "--to", str(tmp_path / "x.onnx")]
    (tmp_path / "data" / "val" / "0").rename(tmp_path / "data" / "val" / "cat")
    assert export.main([*words, "--data-path", str(tmp_path / "data")]) == 2
    assert "3 in the data" in capsys.readouterr().err


def test_int8_without_images(tmp_path, capsys):
    file = save_checkpoint(tmp_path / "best.pth")
    for more, said in (([], "DATA.DATA_PATH"), (["--data-path", str(tmp_path / "none")], "none")):
        assert export.main(["--checkpoint", file, "--format", "onnx", "--image-size", "32", "--int8", *more]) == 2
        assert said in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["best.pth"]
