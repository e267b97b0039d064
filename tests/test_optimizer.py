"""Parameter groups and optimizers."""

import importlib.util
import json
from pathlib import Path

import pytest
import timm
import torch

from config import build_config
from engine.step import TrainStep
from models import create_segmenter
from models.crossformer import VARIANTS
from optimizer import build_optimizer, parameter_groups, set_learning_rate
from utils.errors import UserError

CLASSIFICATION = json.loads((Path(__file__).parent / "data" / "classification.json").read_text())


@pytest.mark.parametrize("variant", CLASSIFICATION)
def test_weight_decay_as_published(variant):
    name = f"crossformerpp_{variant[3:]}" if variant.startswith("pp_") else f"crossformer_{variant}"
    with torch.device("meta"):
        model = timm.create_model(name)
    decayed, undecayed = parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], undecayed["weight_decay"]) == (0.05, 0.0)
    assert len(decayed["params"]) == CLASSIFICATION[variant]["weight_decay_parameters"]
    assert len(undecayed["params"]) == CLASSIFICATION[variant]["no_weight_decay_parameters"]


@pytest.mark.parametrize("name", VARIANTS)
def test_learning_rates_decay_with_the_depth(name):
    """Counted here from the head down, block by block; what follows the last block of a stage belongs to that block."""
    with torch.device("meta"):
        model = timm.create_model(name)
    layers = [[model.patch_embed]]
    for stage in model.layers:
        layers += [[block] for block in stage.blocks]
        layers[-1].append(stage.downsample)
    layers[-1].append(model.norm)
    layers.append([model.head])
    expected = {
        id(p): 0.8**depth
        for depth, modules in enumerate(reversed(layers))
        for module in modules
        for p in module.parameters()
    }
    groups = parameter_groups(model, 0.05, layer_decay=0.8)
    rates = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert rates == pytest.approx(expected)
    assert len(rates) == len(list(model.parameters()))
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(p) for p in parameter_groups(model, 0.05)[0]["params"]}
    optimizer = torch.optim.SGD(groups, lr=1.0)
    set_learning_rate(optimizer, 0.01)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.01 * g["lr_scale"] for g in groups])


def test_a_model_may_exempt_more():
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=2)
    exempt = {id(p) for n, p in model.named_parameters() if n in model.no_weight_decay()}
    assert exempt
    assert not exempt & {id(p) for p in parameter_groups(model, 0.05)[0]["params"]}


def test_frozen_parameters_are_left_out():
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    assert [len(group["params"]) for group in parameter_groups(model, 0.1)] == [1, 0]


def test_settings_reach_the_optimizer():
    model = torch.nn.Linear(2, 2)
    opts = ["TRAIN.OPTIMIZER.BETAS", "[0.8,0.9]", "TRAIN.OPTIMIZER.EPS", "1e-6", "TRAIN.WEIGHT_DECAY", "0.3"]
    adamw = build_optimizer(build_config(opts=opts), model)
    assert isinstance(adamw, torch.optim.AdamW)
    assert (adamw.defaults["betas"], adamw.defaults["eps"], adamw.defaults["fused"]) == ((0.8, 0.9), 1e-6, True)
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.3, 0.0]
    sgd = build_optimizer(build_config(opts=["TRAIN.OPTIMIZER.NAME", "sgd"]), model)
    assert (sgd.defaults["momentum"], sgd.defaults["nesterov"], sgd.defaults["fused"]) == (0.9, True, True)


@pytest.mark.skipif(importlib.util.find_spec("apex") is not None, reason="apex is installed")
@pytest.mark.parametrize("name", ["fused_adam", "fused_lamb"])
def test_the_absence_of_apex_is_explained(name):
    config = build_config(opts=["TRAIN.OPTIMIZER.NAME", name])
    with pytest.raises(UserError, match="needs NVIDIA apex, which is built from source .* use .* adamw"):
        build_optimizer(config, torch.nn.Linear(2, 2))


def step_of(model, optimizer, scaler) -> TrainStep:
    """Of which nothing but the update is asked."""
    return TrainStep(None, model, optimizer, scaler, None, max_norm=5.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["fused_adam", "fused_lamb"])
def test_apex_takes_a_step(name):
    pytest.importorskip("apex.optimizers")
    model = torch.nn.Linear(2, 2).cuda()
    optimizer = build_optimizer(build_config(opts=["TRAIN.OPTIMIZER.NAME", name]), model)
    before = model.weight.clone()
    model(torch.ones(1, 2, device="cuda")).sum().backward()
    step_of(model, optimizer, torch.amp.GradScaler("cuda", enabled=False)).update(torch.zeros(()), {})
    assert not torch.equal(model.weight, before)
    assert model.weight.grad is None


def test_momentum_is_defined_when_the_first_step_is_skipped():
    """As by fp16's loss scaling, whose first scale overflows; torch's fused kernel would use memory as it finds it."""
    model = torch.nn.Linear(64, 64)
    optimizer = build_optimizer(build_config(opts=["TRAIN.OPTIMIZER.NAME", "sgd"]), model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(model(torch.full((1, 64), torch.inf)).sum()).backward()
    step_of(model, optimizer, scaler).update(torch.zeros(()), {})
    assert scaler.get_scale() == 2.0**15
    assert all((state["momentum_buffer"] == 0).all() for state in optimizer.state.values())


@pytest.mark.parametrize(
    ("without", "exempt"), [("none", []), ("norm", ["backbone.norm1.weight", "backbone.norm1.bias"]), ("1d", None)]
)
def test_who_has_no_weight_decay(without, exempt):
    """As segmentation's published recipes have it; without a word it is biases and what has one axis."""
    model = torch.nn.ModuleDict({"backbone": torch.nn.ModuleDict({"norm1": torch.nn.LayerNorm(4)})})
    model["bn"], model["conv"] = torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 4, 1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    _, undecayed = parameter_groups(model, 0.05, without=without)
    expected = exempt if exempt is not None else [name for name in names.values() if name != "conv.weight"]
    assert sorted(names[id(p)] for p in undecayed["params"]) == sorted(expected)


def test_layer_decay_of_a_segmenter():
    """The heads learn at the full rate, the backbone's first layers least."""
    model = create_segmenter("upernet", "crossformer_micro", 3)
    groups = parameter_groups(model, 0.05, 0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    scales = {name: scale[id(p)] for name, p in model.named_parameters()}
    assert scales["decode_head.conv_seg.weight"] == scales["auxiliary_head.convs.0.conv.weight"] == 1
    assert scales["backbone.layers.3.blocks.1.norm1.weight"] == 0.5
    assert scales["backbone.patch_embed.norm.weight"] == min(scales.values()) < 0.01
