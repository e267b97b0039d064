"""The networks against an implementation that is written for clarity, models/reference.py."""

import pytest
import timm
import torch
from conftest import quick
from test_crossformer import fill, images
from test_stochastic_depth import factors_of
from torch import nn

from models.crossformer import VARIANTS, block
from models.crossformer.stochastic_depth import Branches, draw_branches
from models.reference import plain

AT_224 = ("crossformer_small", "crossformerpp_small")


def both(name: str, **overrides) -> tuple[nn.Module, nn.Module]:
    """The network and the plain one, with the same weights that are neither zero nor one."""
    model, reference = timm.create_model(name, **overrides), plain(name, **overrides)
    fill(model)
    reference.load_state_dict(model.state_dict())
    return model, reference


@pytest.mark.parametrize("name", quick(VARIANTS, ("crossformer_micro", *AT_224)))
def test_same_logits(name):
    """96 x 160 makes maps of 24 x 40 down to 3 x 5: padded groups, and a whole map that is no square."""
    size = (224, 224) if name in AT_224 else (96, 160)
    model, reference = both(name)
    x = images(1, 2, 3, *size)
    with torch.no_grad():
        expected = reference.eval()(x)
        assert expected.std() > 0.1  # a constant would hide a fault
        torch.testing.assert_close(model.eval()(x), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("overrides", [{}, dict(group_size=(7, 7, 7, 7), interval=(8, 4, 2, 1))])
def test_same_gradients(overrides):
    """With groups of 7 at interval 8, most groups of a 24 x 40 map hold padding, and some nothing else."""
    gradients = []
    for model in both("crossformer_micro", num_classes=10, **overrides):
        model(images(2, 2, 3, 96, 160)).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[1].items():
        scale = expected.abs().max().item()  # that of pos3.2.bias is rounding: a softmax ignores a constant
        assert scale > 0 or name.endswith("pos3.2.bias"), name
        assert torch.allclose(gradients[0][name], expected, rtol=0, atol=1e-4 * scale + 1e-6), name


@pytest.mark.parametrize("batch", [1, 8])
def test_same_stochastic_depth(batch, monkeypatch):
    """The same where the same branches are dropped: what is drawn for a stage at once goes to the plain blocks."""
    model, reference = both("crossformer_micro", num_classes=10, drop_path_rate=0.5)
    drawn = []

    def draw(*arguments) -> list[Branches]:
        drawn.extend(branches := draw_branches(*arguments))
        return branches

    monkeypatch.setattr(block, "draw_branches", draw)
    x = images(3, batch, 3, 64, 64)
    out = model.train()(x)
    plain_blocks = [b for stage in reference.layers for b in stage.blocks]
    for plain_block, branches in zip(plain_blocks, drawn, strict=True):
        plain_block.drop_path = Scale(branches, batch)
    torch.testing.assert_close(out, reference(x), rtol=0, atol=1e-4)
    assert not torch.allclose(out, both("crossformer_micro", num_classes=10)[0](x), atol=1e-2)


class Scale(nn.Module):
    """Multiplies first with the factors of attention, then with those of the MLP."""

    def __init__(self, branches: Branches, batch: int):
        super().__init__()
        self.factors = (factors_of(drawn, batch) for drawn in branches)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * next(self.factors)


@pytest.mark.parametrize("fault", [dict(interval=(1, 1, 1, 1)), dict(group_size=(4, 4, 4, 8))])
def test_a_fault_shows(fault):
    """Tokens grouped otherwise in one stage are far outside the tolerance."""
    model = both("crossformer_micro")[0].eval()
    other = plain("crossformer_micro", **fault).eval()
    other.load_state_dict(model.state_dict())
    x = images(1, 2, 3, 160, 256)
    with torch.no_grad():
        assert (model(x) - other(x)).abs().max() > 1e-2
