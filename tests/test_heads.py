"""The heads against the outputs of the published ones (tests/data/dense_heads), and on backbones of others."""

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT, quick
from dense_reference import GROUPS, check, images, read
from torch import Tensor, nn

from config import build_config
from data import Batch
from models import build_segmenter, create_segmenter, load_segmenter
from tasks.segmentation import Segmentation
from utils.errors import UserError

PARAMETERS = {
    "semantic_fpn_small": 34_260_000, "semantic_fpn_pp_small": 27_061_578, "semantic_fpn_base": 55_574_160,
    "semantic_fpn_pp_base": 55_597_200, "semantic_fpn_large": 95_440_158, "upernet_small": 62_308_022,
    "upernet_pp_small": 53_118_944, "upernet_base": 83_622_182, "upernet_pp_base": 83_645_222,
    "upernet_large": 125_478_836,
}  # fmt: skip
CASES = [
    (variant, head) if variant == "micro" else pytest.param(variant, head, marks=pytest.mark.slow)
    for variant in ("micro", "small")
    for head in ("semantic_fpn", "upernet")
]
OTHERS = [("micro", "upernet"), ("small", "semantic_fpn"), ("small", "upernet")]


def reference(variant: str, head: str) -> tuple[dict, dict, nn.Module]:
    """What was measured, and the network with the reference's weights."""
    told, measured, weights = read(variant, head)
    model = create_segmenter(head, f"crossformer_{variant}", 150, 0.0, **GROUPS if variant == "small" else {})
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == told["state_dict"]
    model.load_state_dict(weights)
    return told, measured, model


def labels() -> Tensor:
    drawn = np.random.RandomState(7).randint(0, 160, (2, 10, 14))
    drawn[drawn >= 150] = 255
    return torch.from_numpy(drawn.repeat(16, 1).repeat(16, 2)).to(torch.uint8)


@pytest.mark.parametrize(("variant", "head"), CASES)
def test_evaluation(variant, head):
    _, measured, model = reference(variant, head)
    inside = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda _, __, out, name=name: inside.setdefault(name, out))
    x = images(1, 1)
    with torch.no_grad():
        logits = model.eval()(x)
        maps = model.maps(x)
        for i, each in enumerate(maps, start=1):
            check(measured, f"eval_stage{i}", each)
        check(measured, "eval_logits", logits)
        if head == "semantic_fpn":
            for i, level in enumerate(inside["neck"], start=2):
                check(measured, f"eval_fpn{i}", level)
        else:
            check(measured, "eval_aux_logits", model.auxiliary_head(maps[2]))
        named = [
            key.removeprefix("eval_").removesuffix("_shape")
            for key in measured
            if "decode_head" in key and "shape" in key
        ]
        assert named
        for name in named:
            check(measured, f"eval_{name}", inside[name])
        resized = F.interpolate(logits, (160, 224), mode="bilinear")
        check(measured, "eval_logits_resized", resized)
        clear = measured["eval_margin"] > 1e-3
        assert torch.equal(resized[0].argmax(0)[clear], measured["eval_labels"].long()[clear])


@pytest.mark.parametrize(("variant", "head"), quick([("micro", "semantic_fpn"), *OTHERS], [("micro", "semantic_fpn")]))
def test_training_step(variant, head):
    """In float64: losses and the norm of each gradient; the statistics that BatchNorm keeps."""
    told, measured, model = reference(variant, head)
    expected = told["float64"]
    model.double().train().register_forward_hook(
        lambda _, __, logits: check(measured, "train_logits", logits["decode"])
    )
    config = build_config(opts=["TASK", "segmentation", "MODEL.HEAD", head])
    task = Segmentation(config, torch.device("cpu"))
    loss, terms = task.loss(model, Batch(images(2, 2).double(), labels(), torch.arange(2)))
    for name, term in terms.items():
        assert term.item() == pytest.approx(expected["train_losses"][f"{name}.loss_ce"], rel=1e-9)
    assert loss.item() == pytest.approx(expected["train_loss_total"], rel=1e-9)
    loss.backward()
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    assert norms.keys() == expected["grad_norm"].keys()
    total = expected["grad_norm_groups"]["total"]
    for name, norm in expected["grad_norm"].items():
        assert norms[name] == pytest.approx(norm, rel=1e-7, abs=1e-10 * total), name
    for name, (mean, deviation) in expected["bn_after_one_step"].items():
        value = model.state_dict()[name]
        assert (value.mean().item(), value.std(correction=0).item()) == pytest.approx(
            (mean, deviation), rel=1e-6, abs=1e-7
        ), name


def test_parameters_as_published():
    counts = {}
    for name in PARAMETERS:
        config = build_config(str(ROOT / f"configs/segmentation/{name}.yaml"))
        with torch.device("meta"):
            counts[name] = sum(p.numel() for p in build_segmenter(config, 150).parameters())
    assert counts == PARAMETERS


@pytest.mark.parametrize("head", ["semantic_fpn", "upernet"])
@pytest.mark.parametrize("backbone", ["resnet18", "convnext_atto", "vit_tiny_patch16_224"])
def test_other_backbones(backbone, head):
    """Every parameter gets a gradient, for which DDP would wait, and a classifier's weights fit the backbone."""
    extra = {"dynamic_img_size": True} if backbone.startswith("vit") else {}
    model = create_segmenter(head, backbone, 5, **extra)
    logits = model(torch.randn(2, 3, 64, 96))
    torch.stack([each.square().mean() for each in logits.values()]).sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 3, 64, 96)).shape[:2] == (1, 5)
    classifier = timm.create_model(backbone)
    line, *_ = load_segmenter(model, classifier.state_dict(), "a file")
    assert "weights of the backbone matched, the head is new" in line
    kept = model.backbone.state_dict()
    for key, value in classifier.state_dict().items():
        assert key not in kept or torch.equal(kept[key], value)


def test_published_files_load():
    model, other = (create_segmenter("upernet", "crossformer_micro", count) for count in (5, 7))
    saved = {f"module.{key}": value for key, value in model.state_dict().items()}
    twin = create_segmenter("upernet", "crossformer_micro", 5)
    line, *notes = load_segmenter(twin, saved, "a file")
    assert line == f"{len(saved)} weights matched, the head too"
    assert notes == ["the prefix module. was taken off"]
    assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), model.state_dict().values(), strict=True))
    line, *_ = load_segmenter(other, saved, "a file")
    assert line == f"{len(saved) - 4} weights matched, the last layer is new (5 classes in the file)"
    assert torch.equal(other.decode_head.bottleneck.conv.weight, model.decode_head.bottleneck.conv.weight)


@pytest.mark.parametrize("keep", ["decode_head.", "backbone.layers.0"])
def test_a_file_that_matches_little_is_refused(keep):
    model = create_segmenter("upernet", "crossformer_micro", 5)
    part = {key: value for key, value in model.state_dict().items() if key.startswith(keep)}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError, match="does not fit the model: it lacks"):
        load_segmenter(model, part, "a file")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_what_gives_no_maps_is_refused():
    with pytest.raises(ValueError, match="head 'fcn' is not one of semantic_fpn, upernet"):
        create_segmenter("fcn", "crossformer_micro", 5)
    config = build_config(opts=["TASK", "segmentation", "MODEL.NAME", "levit_128"])
    with pytest.raises(UserError, match="MODEL.NAME levit_128 takes no head for segmentation"):
        build_segmenter(config, 5)


@pytest.mark.parametrize(("head", "wide"), [("semantic_fpn", 256), ("upernet", 512)])
def test_a_narrower_head(head, wide):
    config = build_config(opts=["TASK", "segmentation", "MODEL.NAME", "crossformer_micro", "MODEL.HEAD", head])
    model = build_segmenter(config, 3)
    same = create_segmenter(head, "crossformer_micro", 3, head_channels=wide)
    assert [p.shape for p in model.parameters()] == [p.shape for p in same.parameters()]
    narrow = create_segmenter(head, "crossformer_micro", 3, head_channels=32)
    assert narrow.decode_head.conv_seg.in_channels == (16 if head == "semantic_fpn" else 32)
    assert narrow.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    ("opts", "rate"), [([], 0.1), (["MODEL.DROP_RATE", "0"], 0.0), (["MODEL.DROP_RATE", "0.3"], 0.3)]
)
@pytest.mark.parametrize("backbone", ["crossformer_micro", "vit_tiny_patch16_224"])
def test_dropout_is_the_heads(backbone, opts, rate):
    config = build_config(opts=["TASK", "segmentation", "MODEL.NAME", backbone, *opts])
    model = build_segmenter(config, 3)
    assert model.decode_head.dropout.p == model.auxiliary_head.dropout.p == rate
    assert not [m for m in model.backbone.modules() if isinstance(m, nn.Dropout) and m.p]
