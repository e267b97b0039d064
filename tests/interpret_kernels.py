"""The Triton kernels beside torch's operations on a CPU, in Triton's interpreter; run by test_kernels.py.

The interpreter has to be switched on before Triton is imported, so this is a process of its own.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from models.crossformer import fused_attention, fused_residual
from models.crossformer.block import CrossScaleAttention
from models.crossformer.fusion import LayerNorm, add_branch
from models.crossformer.grouping import Grouping
from models.crossformer.stochastic_depth import computed_images, draw_branches

MAPS = ((14, 14, 7, 1, 2, 32), (14, 14, 7, 2, 1, 32), (17, 9, 7, 2, 1, 16), (5, 9, 7, 1, 1, 64), (16, 16, 4, 4, 1, 32))
"""Height, width, group size, interval, heads and channels of a head; the third with padding and empty groups."""

fused_attention.PROGRAMS = fused_residual.PROGRAMS = 3
"""Fewer than groups and tiles, so that each program has several."""


def compare(what: str, got, expected) -> None:
    """Within single precision's rounding, or half precision's."""
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        error = ((a.double() - b.double()).norm() / b.double().norm()).item()
        allowed = 2e-3 if torch.float16 in (a.dtype, b.dtype) else 1e-5
        assert error < allowed, f"{what}, output {i}: off by {error:.1e}"


def with_gradients(outputs, inputs, gradient):
    return outputs, *torch.autograd.grad(outputs, inputs, gradient)


def check_attention() -> None:
    for height, width, size, interval, heads, channels in MAPS:
        grouping = Grouping.of(height, width, size, interval)
        n = grouping.rows * grouping.columns
        qkv = torch.randn(2, height, width, 3 * heads * channels).half().requires_grad_()
        bias = torch.randn(heads, n, n + 7)[..., :n].requires_grad_()  # as align_rows leaves it
        gradient = torch.randn(2, heads * channels, height, width).half().float().permute(0, 2, 3, 1)
        fused = with_gradients(fused_attention.attend(qkv, bias, grouping), (qkv, bias), gradient.half())
        attention = CrossScaleAttention(heads * channels, heads)
        attention.proj = torch.nn.Identity()
        plain = attention.attend(grouping.group(qkv.float()), grouping, bias[None], qkv.shape[0])
        compare(f"attention, {grouping}", fused, with_gradients(plain, (qkv, bias), gradient))


def check_residual(rate: float, width: int) -> None:
    batch = 6
    drawn = draw_branches((rate,), batch, torch.device("cpu"))[0][0]
    assert drawn is None or (drawn.images is None) == (computed_images(rate, batch) == batch)
    x = torch.randn(batch, 3, 5, width, requires_grad=True)
    norm = LayerNorm(width)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    inputs = (x, norm.weight, norm.bias)
    indexes = (None, None) if drawn is None else drawn[1:]
    fused = fused_residual.layer_norm(*inputs, norm.eps, torch.float32, *indexes)
    gradient = torch.randn_like(fused)
    compare(f"norm, {rate}", with_gradients(fused, inputs, gradient), with_gradients(norm(x, drawn), inputs, gradient))
    if drawn is not None:
        branch, gradient = torch.randn_like(fused).half().requires_grad_(), torch.randn_like(x)
        assert not fused_residual.add_branch(x, branch * torch.inf, drawn.scale * 0, *drawn[1:]).isnan().any()
        fused = fused_residual.add_branch(x, branch, *drawn)
        plain = add_branch(x, branch.float(), drawn)
        inputs = (x, branch)
        compare(f"sum, {rate}", with_gradients(fused, inputs, gradient), with_gradients(plain, inputs, gradient))


if __name__ == "__main__":
    torch.manual_seed(0)
    check_attention()
    for each in (0.0, 0.1, 0.5):
        check_residual(each, width=48)
    print("all kernels agree")
