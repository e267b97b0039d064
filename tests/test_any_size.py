"""One exported graph for images of many sizes."""

import json
import re

import onnx
import onnxruntime
import pytest
import timm
import torch
from conftest import quick
from test_export import load_graph, save_checkpoint

from engine.any_size import OfMultiples, SizeRange, check_in_onnx, range_around, ranges_of
from scripts import export
from tasks.trained import load_trained
from utils.errors import UserError

SHALLOW = {"MODEL.NAME": "crossformer_micro", "MODEL.CROSSFORMER.DEPTHS": [1, 2, 1, 1], "DATA.IMG_SIZE": 160}


@pytest.mark.parametrize(
    ("name", "ranges"),
    [
        ("crossformer_micro", [(32, 32), (64, 64), (96, 128), (160, None)]),
        ("crossformer_small", [(32, 32), (64, 96), (128, 224), (256, None)]),
        ("crossformerpp_small", [(32, 32), (64, 224), (256, None)]),
        ("test_resnet", [(64, None)]),
    ],
)
def test_a_range_begins_where_a_map_outgrows_a_group(name, ranges):
    assert ranges_of(timm.create_model(name)) == [SizeRange(*one) for one in ranges]


def test_sizes_to_trace_and_to_compare():
    assert SizeRange(128, 224).examples() == [(160, 192), (128, 224), (224, 128), (128, 128), (224, 224)]
    assert SizeRange(64, 96).examples() == [(64, 96), (96, 64), (64, 64), (96, 96)]
    assert SizeRange(160).examples()[:3] == [(192, 384), (160, 416), (416, 160)]
    for one in (SizeRange(128, 224), SizeRange(64, 96), SizeRange(160)):
        assert all(map(one.holds, one.examples()))


@pytest.mark.parametrize("size", [(32, 32), (160, 128), (200, 200), (64, 64)])
def test_a_size_without_a_range_is_refused(size):
    with pytest.raises(UserError) as refused:
        range_around(timm.create_model("crossformer_micro"), "crossformer_micro", size)
    assert "multiples of 32 from the same one of these: 96 to 128; 160 and more; choose --image-size" in str(
        refused.value
    )
    assert f"{size[0]} x {size[1]}" in str(refused.value)


OTHERS_OF_96_TO_160 = (64, 96), (96, 192), (96, 112), (192, 160), (97, 128)


def test_check_in_onnx(tmp_path):
    """Before a graph that does nothing: both limits and the step."""
    path, sizes = tmp_path / "nothing.onnx", SizeRange(96, 160)
    kind = "float[batch, 3, height, width]"
    head = '<ir_version: 10, opset_import: ["": 20]>'
    onnx.save(
        onnx.parser.parse_model(f"{head} nothing ({kind} images) => ({kind} same) {{ same = Identity (images) }}"), path
    )
    check_in_onnx(path, sizes)
    graph = load_graph(path)
    images = torch.randn(2, 3, 96, 160)
    assert torch.equal(graph(images), images)
    for shape in OTHERS_OF_96_TO_160:
        with pytest.raises(Exception, match="height_and_width_must_be_multiples_of_32_from_96_to_160"):
            graph(torch.randn(1, 3, *shape))


def test_check_in_torch_export():
    """The same; torch alone takes multiples on trust."""
    shapes = ({0: torch.export.Dim("batch"), **SizeRange(96, 160).dynamic_shape()},)
    program = torch.export.export(OfMultiples(torch.nn.ReLU()), (torch.randn(2, 3, 96, 128),), dynamic_shapes=shapes)
    graph, images = program.module(), torch.randn(2, 3, 96, 160)
    assert torch.equal(graph(images), images.relu())
    for shape in OTHERS_OF_96_TO_160:
        with pytest.raises(Exception, match="Guard failed|is invalid for input"):
            graph(torch.randn(1, 3, *shape))


SIZES = {
    "crossformer_micro": [(160, 160), (192, 512), (512, 160), (256, 256), (416, 288)],
    "crossformer_small": [(256, 256), (256, 480), (512, 320), (288, 288), (320, 256)],
    "crossformerpp_small": [(256, 256), (256, 480), (512, 320), (288, 288), (320, 256)],
}
OTHERS = (128, 160), (161, 192), (192, 176)
FORMS = {"onnx": "onnx", "torch_export": "pt2"}


def check(folder, file: str, form: str, sizes: list, others: tuple = OTHERS) -> str:
    """Export it and ask the file alone; returns the file."""
    to = folder / "deep" / f"model.{FORMS[form]}"
    size = str(sizes[0][0])
    flags = ["--dynamic-size", "--dynamic-batch", "--image-size", size, "--to", str(to)]
    assert export.main(["--checkpoint", file, "--format", form, *flags]) == 0
    graph, model = load_graph(to), load_trained(file, torch.device("cpu")).model
    with torch.no_grad():
        for batch, shape in enumerate(sizes, start=1):
            images = torch.randn(batch, 3, *shape)
            torch.testing.assert_close(graph(images), model(images), atol=1e-4, rtol=0)
    for shape in others:
        with pytest.raises(Exception, match="multiples_of_32|Guard failed") as refused:
            graph(torch.randn(1, 3, *shape))
        assert re.search("height_and_width_must_be_multiples_of_32_from_|size", str(refused.value))
    return str(to)


@pytest.mark.parametrize("form", quick(["onnx", "torch_export"], ["onnx"]))
def test_one_file_for_many_sizes(tmp_path, form):
    """It gives the model's logits, says which sizes it takes, and answers no other."""
    to = check(tmp_path, save_checkpoint(tmp_path / "best.pth", **SHALLOW), form, SIZES["crossformer_micro"])
    if form == "onnx":
        session = onnxruntime.InferenceSession(to)
        said = session.get_modelmeta().custom_metadata_map
        assert json.loads(said["sizes"]) == {"multiple_of": 32, "least": 160, "most": None}
        assert session.get_inputs()[0].shape == ["batch", 3, "height", "width"]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SIZES)
def test_one_file_for_many_sizes_of_the_variants(tmp_path, name, form):
    file = save_checkpoint(tmp_path / "best.pth", **{"MODEL.NAME": name, "DATA.IMG_SIZE": 256})
    check(tmp_path, file, form, SIZES[name])


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_one_file_for_sizes_between_two_borders(tmp_path, form):
    file = save_checkpoint(tmp_path / "best.pth", **{"MODEL.NAME": "crossformer_small", "DATA.IMG_SIZE": 224})
    sizes = [(224, 224), (128, 160), (192, 128), (224, 128), (160, 160)]
    check(tmp_path, file, form, sizes, others=((96, 128), (256, 224), (160, 200)))


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_one_file_for_many_sizes_of_a_model_of_others(tmp_path, form):
    file = save_checkpoint(tmp_path / "best.pth", **{"MODEL.NAME": "resnet10t", "DATA.IMG_SIZE": 64})
    check(tmp_path, file, form, [(64, 64), (96, 320), (320, 64), (256, 256), (128, 224)], ((32, 64), (65, 96)))
