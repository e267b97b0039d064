"""The networks against an implementation that is written for clarity (plain_crossformer.py)."""

import pytest
import timm
import torch
from plain_crossformer import plain
from test_crossformer import fill, images
from torch import nn

from models.crossformer import VARIANTS

AT_224 = ("crossformer_small", "crossformerpp_small")


def both(name: str, **overrides) -> tuple[nn.Module, nn.Module]:
    """The network and the plain one, with the same weights that are neither zero nor one."""
    model, reference = timm.create_model(name, **overrides), plain(name, **overrides)
    fill(model)
    reference.load_state_dict(model.state_dict())
    return model, reference


@pytest.mark.parametrize("name", VARIANTS)
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
        assert scale > 0, name
        assert torch.allclose(gradients[0][name], expected, rtol=0, atol=1e-4 * scale + 1e-6), name


def test_same_stochastic_depth():
    """The same branches are dropped by the same draws."""
    outputs = []
    for model in both("crossformer_micro", num_classes=10, drop_path_rate=0.5):
        torch.manual_seed(3)
        outputs.append(model.train()(images(3, 4, 3, 64, 64)))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-4)
    assert not torch.allclose(outputs[0], model.eval()(images(3, 4, 3, 64, 64)), atol=1e-2)


@pytest.mark.parametrize("fault", [dict(interval=(1, 1, 1, 1)), dict(group_size=(4, 4, 4, 8))])
def test_a_fault_shows(fault):
    """Tokens grouped otherwise in one stage are far outside the tolerance."""
    model = both("crossformer_micro")[0].eval()
    other = plain("crossformer_micro", **fault).eval()
    other.load_state_dict(model.state_dict())
    x = images(1, 2, 3, 160, 256)
    with torch.no_grad():
        assert (model(x) - other(x)).abs().max() > 1e-2
