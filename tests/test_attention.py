"""What a network looks at, as numbers and as the command draws it."""

import numpy as np
import pytest
import timm
import torch
from einops import rearrange
from PIL import Image
from torch import nn

from config import build_config
from models import build_model, build_segmenter
from models.crossformer.attention_maps import attention_maps, blocks_of, position_bias_maps
from models.grad_cam import grad_cam
from scripts import attention

POINTS = [(0.0, 0.0), (0.5, 0.3), (1.0, 1.0)]
SIZES = {"crossformer_micro": (128, 160), "crossformerpp_small": (96, 224)}


def network(name: str, **how):
    torch.manual_seed(0)
    model = timm.create_model(name, **how).eval()
    for parameter in model.parameters() if "crossformer" in name else ():
        nn.init.normal_(parameter, std=0.1)  # so that biases are more than nothing
    return model


def members(token: tuple[int, int], height: int, width: int, size: int, interval: int) -> set[tuple[int, int]]:
    """Section 3.2 in words: neighbours, or every I-th token of a square of G x I; all of a small map."""
    y, x = token
    if min(height, width) <= size:
        return {(i, j) for i in range(height) for j in range(width)}
    reach = size * interval
    rows, columns = ([*range(at // reach * reach + at % interval, length)] for at, length in ((y, height), (x, width)))
    return {(i, j) for i in rows[::interval][:size] for j in columns[::interval][:size]}


@pytest.mark.parametrize("name", SIZES)
def test_a_heat_map_covers_exactly_the_group_of_its_token(name):
    model = network(name, depths=(2, 2, 2, 2))
    height, width = SIZES[name]
    found = attention_maps(model, torch.randn(3, height, width), POINTS)
    blocks = blocks_of(model)
    kinds = set()
    for (y, x), maps in zip(POINTS, found, strict=True):
        assert [one.block for one in maps] == [*blocks]
        for number, one in enumerate(maps):
            stage, block = divmod(number, 2)
            size = height // 4 // 2**stage, width // 4 // 2**stage
            token = min(int(y * size[0]), size[0] - 1), min(int(x * size[1]), size[1] - 1)
            assert (one.token, tuple(one.group.shape)) == (token, size)
            interval = blocks[one.block].interval if block else 1
            expected = members(token, *size, blocks[one.block].group_size, interval)
            assert {tuple(place) for place in one.group.nonzero().tolist()} == expected
            assert ((one.weights > 0) == one.group).all(), "nothing outside, and something of each inside"
            torch.testing.assert_close(one.weights.sum((1, 2)), torch.ones(len(one.weights)))
            kinds.add((len(expected) < size[0] * size[1], one.interval > 1))
    assert {(True, False), (True, True), (False, False)} <= kinds, "short and long distance, and a whole map"


def test_the_weights_are_those_that_the_block_uses():
    """Values summed by them are what its attention gives for that token."""
    model, image = network("crossformer_micro"), torch.randn(3, 100, 132)
    inputs = {}
    hooks = [
        block.register_forward_pre_hook(lambda block, arguments: inputs.__setitem__(block, arguments))
        for block in blocks_of(model).values()
    ]
    (maps,) = attention_maps(model, image, [(0.9, 0.4)])
    for hook in hooks:
        hook.remove()
    for one in maps:
        block = blocks_of(model)[one.block]
        x, grouping, bias, _ = inputs[block]
        with torch.no_grad():
            normed = block.norm1(x)
            values = rearrange(
                block.attn.qkv(normed), "1 y x (three h d) -> three h y x d", three=3, d=x.shape[-1] // len(one.weights)
            )[2]
            taken = block.attn.proj((one.weights[..., None] * values).sum((1, 2)).flatten())
            expected = block.attn(normed, grouping, bias)[0][one.token]
        torch.testing.assert_close(taken, expected, rtol=1e-4, atol=1e-5)


def test_a_bias_map_is_what_the_offset_adds():
    model = network("crossformer_micro")
    block = next(iter(blocks_of(model).values()))
    given = []
    block.register_forward_pre_hook(lambda block, arguments: given.append(arguments[2]))
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    size, table = block.group_size, position_bias_maps(block)
    assert table.shape == (block.attn.num_heads, 2 * size - 1, 2 * size - 1)
    for query in ((0, 0), (1, 3), (3, 2)):
        for key in ((0, 0), (2, 1), (3, 3)):
            pair = given[0][0, :, query[0] * size + query[1], key[0] * size + key[1]]
            offset = table[:, query[0] - key[0] + size - 1, query[1] - key[1] + size - 1]
            torch.testing.assert_close(pair, offset)


class Known(nn.Module):
    """A classifier whose Grad-CAM can be told by hand: a class for each channel of a map, less the next channel."""

    num_features = 3

    def __init__(self, output_fmt: str):
        super().__init__()
        self.output_fmt = output_fmt

    def forward_features(self, images):
        return images if self.output_fmt == "NCHW" else images.permute(0, 2, 3, 1)

    def forward_head(self, features):
        x = features if self.output_fmt == "NCHW" else features.permute(0, 3, 1, 2)
        return x.mean((2, 3)) - x.roll(-1, 1).mean((2, 3))


@pytest.mark.parametrize("output_fmt", ["NCHW", "NHWC"])
def test_grad_cam_of_a_known_function(output_fmt):
    images = torch.rand(2, 3, 4, 5)
    found = grad_cam(Known(output_fmt), images.clone(), [0, 2])
    for cam, image, (plus, minus) in zip(found, images, ((0, 1), (2, 0)), strict=True):
        expected = (image[plus] - image[minus]).relu()
        torch.testing.assert_close(cam, expected / expected.max())


class Squares(Known):
    """The slope of a score differs from place to place; its mean is what a channel weighs."""

    def forward_head(self, features):
        return (features**2).mean((2, 3))


def test_a_channel_weighs_the_mean_of_its_slopes():
    images = torch.randn(1, 3, 4, 5) - 0.2
    cam = grad_cam(Squares("NCHW"), images.clone(), [1])[0]
    expected = (images[0, 1].mean() * images[0, 1]).relu()
    torch.testing.assert_close(cam, expected / expected.max())


@pytest.mark.parametrize(
    ("name", "size", "cells"),
    [
        ("crossformer_micro", 32, (4, 4)),  # the last map with 16 cells
        ("resnet10t", 128, (4, 4)),
        ("test_vit", 160, (10, 10)),  # whose head reads the class token alone
        ("test_vit", 240, (15, 15)),
        ("test_convnext", 160, (5, 5)),
    ],
)
def test_grad_cam_of_any_model(name, size, cells):
    how = {"dynamic_img_size": True} if name == "test_vit" else {}
    cam = grad_cam(network(name, num_classes=5, **how), torch.randn(2, 3, size, size), [0, 4])
    assert cam.shape == (2, *cells)
    assert cam.min() >= 0
    peaks = cam.amax((1, 2))
    assert set(peaks.tolist()) <= {0.0, 1.0}, "0 where no place speaks for the class"
    assert peaks.any()


def save(path, task: str = "classification", name: str = "crossformer_micro"):
    flags = {"TASK": task, "MODEL.NAME": name, "MODEL.DROP_PATH_RATE": 0.0}
    if task == "segmentation":
        flags |= {"MODEL.HEAD": "semantic_fpn", "MODEL.HEAD_CHANNELS": 16, "TEST.RESIZE": [96, 64]}
    else:
        flags |= {"DATA.IMG_SIZE": 64}
    config = build_config(flags=[(key, value, "") for key, value in flags.items()])
    torch.manual_seed(0)
    model = build_segmenter(config, 3) if task == "segmentation" else build_model(config, 3)
    torch.save({"model": model.state_dict(), "config": config.dump(), "classes": ["cat", "dog", "<b>"]}, path)
    return str(path)


@pytest.fixture
def photographs(tmp_path):
    for i, size in enumerate(((70, 50), (64, 64))):
        pixels = np.random.default_rng(i).integers(0, 255, (6, 5, 3)).astype(np.uint8)
        (tmp_path / f"of {i}").mkdir()
        Image.fromarray(pixels).resize(size).save(tmp_path / f"of {i}" / "x.png")
    return [str(path) for path in sorted(tmp_path.glob("of */x.png"))]


def written(folder) -> dict[str, tuple[int, int]]:
    return {str(path.relative_to(folder)): Image.open(path).size for path in folder.rglob("*.png")}


def test_the_pictures_of_a_classifier(tmp_path, photographs, capsys):
    to = tmp_path / "out"
    words = ["--checkpoint", save(tmp_path / "best.pth"), *photographs, "--to", str(to)]
    assert attention.main([*words, "--at", "0.1,0.9", "--at", "0.5,0.5"]) == 0
    pictures = written(to)
    assert sorted(pictures) == ["grad_cam.png", "of 0/x_attention.png", "of 1/x_attention.png", "position_bias.png"]
    two_points = pictures["of 0/x_attention.png"]
    assert capsys.readouterr().out.splitlines() == [
        str(to / name) for name in ("of 0/x_attention.png", "of 1/x_attention.png", "position_bias.png", "grad_cam.png")
    ]
    assert attention.main([*words[:2], photographs[0], *words[2:], "--class", "dog"]) == 0  # one image twice
    assert written(to)["of 0/x_attention.png"][1] < two_points[1], "a token has half as many rows"
    assert written(to)["grad_cam.png"][0] < pictures["grad_cam.png"][0], "one class and not three"


def test_what_other_models_have(tmp_path, photographs, capsys):
    to = tmp_path / "out"
    assert (
        attention.main(["--checkpoint", save(tmp_path / "a.pth", name="resnet10t"), *photographs, "--to", str(to)]) == 0
    )
    assert [*written(to)] == ["grad_cam.png"]
    assert "resnet10t is no CrossFormer: its attention is not drawn" in capsys.readouterr().out
    file = save(tmp_path / "b.pth", "segmentation")
    assert attention.main(["--checkpoint", file, photographs[0], "--to", str(tmp_path / "dense")]) == 0
    assert sorted(written(tmp_path / "dense")) == ["position_bias.png", "x_attention.png"]
    assert "Grad-CAM is for classifiers: it is not drawn" in capsys.readouterr().out


def test_mistakes_are_named(tmp_path, photographs, capsys):
    file = save(tmp_path / "best.pth")
    (tmp_path / "bad.png").write_bytes(b"no image")
    for words, said in {
        (
            photographs[0],
            "--at",
            "0.5",
        ): "argument --at: invalid point: two numbers from 0 to 1, as 0.5,0.25 value: '0.5'",
        (photographs[0], "--at", "0.5,1.5"): "value: '0.5,1.5'",
        (photographs[0], "--image-size", "20"): "DATA.IMG_SIZE 20",
        (photographs[0], "--class", "dig"): "--class dig: the model has no such class; did you mean dog?",
        (str(tmp_path / "bad.png"),): "bad.png: cannot identify image file",
        (str(tmp_path / "none.png"),): "none.png: No such file or directory; leave it out",
        (photographs[0], "--to", "/proc/x"): "cannot be written",
        tuple(f"{i}.png" for i in range(22)): "22 images are more than the 20 that are drawn at a time",
    }.items():
        assert attention.main(["--checkpoint", file, *words]) == 2, words
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
