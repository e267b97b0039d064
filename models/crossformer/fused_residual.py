"""What lies between a residual stream and its branches on a GPU, as one Triton kernel each way.

Layer norm of the images that a branch is computed for, in the precision of its matrix products; and the sum with what
the branch returns, scaled for each image. Torch takes a kernel for each of: pick the images, norm, cast, pick again,
scale, add; and in the backward pass sums up by index what has one summand only.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .grouping import on_device_of, power_of_two

ELEMENTS = 4096
"""Of a program's tile: 32 for each thread."""

PROGRAMS = 1056
"""Of the backward pass of a norm, each with sums of its own. A constant: any card adds in the same order."""


NUMBERS = ["rows", "area", "size"]
"""Arguments of the kernels that Triton need not compile anew for."""


@triton.jit(do_not_specialize=NUMBERS)
def norm_kernel(x, weight, bias, y, images, rows, area, eps, INDEXED: tl.constexpr, WIDTH: tl.constexpr,
                BLOCK: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    source = row.to(tl.int64)
    if INDEXED:
        source = tl.load(images + row // area, mask=row < rows, other=0) * area + row % area
    values = tl.load(x + source[:, None] * WIDTH + column[None, :], mask=inside, other=0.0).to(tl.float32)
    values = tl.where(inside, values - tl.sum(values, 1)[:, None] / WIDTH, 0.0)
    normed = values * tl.rsqrt(tl.sum(values * values, 1) / WIDTH + eps)[:, None]
    w = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    to = y + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(to, (normed * w[None, :] + b[None, :]).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=NUMBERS)
def norm_backward_kernel(x, weight, grad, grad_x, sums, images, places, rows, area, eps, PROGRAMS: tl.constexpr,
                         INDEXED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
                         TILE: tl.constexpr):  # fmt: skip
    column = tl.arange(0, BLOCK)
    w = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    of_weight = tl.zeros((BLOCK,), dtype=tl.float32)
    of_bias = tl.zeros((BLOCK,), dtype=tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, TILE), PROGRAMS):
        row = tile * TILE + tl.arange(0, TILE)
        there = row < rows
        at = row.to(tl.int64)
        is_computed = there
        if INDEXED:  # this image is the one at its place, or it was not computed
            image = row // area
            place = tl.load(places + image, mask=there, other=0)
            is_computed = there & (tl.load(images + place, mask=there, other=-1) == image)
            at = place * area + row % area
        inside = there[:, None] & (column < WIDTH)[None, :]
        mine = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
        computed = inside & is_computed[:, None]
        values = tl.load(x + mine, mask=computed, other=0.0).to(tl.float32)
        values = tl.where(inside, values - tl.sum(values, 1)[:, None] / WIDTH, 0.0)
        scale = tl.rsqrt(tl.sum(values * values, 1) / WIDTH + eps)[:, None]
        normed = values * scale
        g = tl.load(grad + at[:, None] * WIDTH + column[None, :], mask=computed, other=0.0).to(tl.float32)
        of_weight += tl.sum(g * normed, 0)
        of_bias += tl.sum(g, 0)
        g = g * w[None, :]
        g = g - tl.sum(g, 1)[:, None] / WIDTH - normed * (tl.sum(g * normed, 1)[:, None] / WIDTH)
        tl.store(grad_x + mine, (g * scale).to(grad_x.dtype.element_ty), mask=inside)
    of_program = sums + tl.program_id(0) * WIDTH + column
    tl.store(of_program, of_weight, mask=column < WIDTH)
    tl.store(of_program + PROGRAMS * WIDTH, of_bias, mask=column < WIDTH)


@triton.jit(do_not_specialize=NUMBERS)
def add_kernel(x, branch, out, scale, places, size, BLOCK: tl.constexpr, INDEXED: tl.constexpr):
    image = tl.program_id(0)
    place = tl.load(places + image) if INDEXED else image
    of_image = tl.load(scale + image).to(tl.float32)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mine = image.to(tl.int64) * size + at
    kept = tl.where(of_image != 0, size, 0)  # not even a NaN reaches an image that loses the branch
    added = tl.load(branch + place.to(tl.int64) * size + at, mask=at < kept, other=0.0).to(tl.float32) * of_image
    total = tl.load(x + mine, mask=at < size).to(tl.float32) + added
    tl.store(out + mine, total.to(out.dtype.element_ty), mask=at < size)


@triton.jit(do_not_specialize=NUMBERS)
def add_backward_kernel(grad, grad_branch, scale, images, size, BLOCK: tl.constexpr, INDEXED: tl.constexpr):
    place = tl.program_id(0)
    image = tl.load(images + place) if INDEXED else place
    of_image = tl.load(scale + image).to(tl.float32)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(grad + image.to(tl.int64) * size + at, mask=at < size).to(tl.float32) * of_image
    to = grad_branch + place.to(tl.int64) * size + at
    tl.store(to, g.to(grad_branch.dtype.element_ty), mask=at < size)


def tiling(width: int) -> dict[str, int]:
    """Of rows of this width."""
    block = power_of_two(width)
    return dict(WIDTH=width, BLOCK=block, TILE=max(1, ELEMENTS // block), num_warps=4)


class LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, images, places, eps, dtype):
        x = x.contiguous()
        count = x.shape[0] if images is None else images.shape[0]
        y = torch.empty((count, *x.shape[1:]), dtype=dtype, device=x.device)
        rows, tile = y.numel() // y.shape[-1], tiling(y.shape[-1])
        indexes = weight if images is None else images
        norm_kernel[(-(-rows // tile["TILE"]),)](
            x, weight, bias, y, indexes, rows, rows // count, eps, images is not None, **tile
        )
        ctx.save_for_backward(x, weight, images, places)
        ctx.eps = eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, images, places = ctx.saved_tensors
        grad, grad_x, width = grad.contiguous(), torch.empty_like(x), x.shape[-1]
        sums = torch.empty((2, PROGRAMS, width), dtype=torch.float32, device=x.device)
        indexes = (weight, weight) if images is None else (images, places)
        norm_backward_kernel[(PROGRAMS,)](
            x, weight, grad, grad_x, sums, *indexes, x.numel() // width, x.numel() // width // x.shape[0], ctx.eps,
            PROGRAMS, images is not None, **tiling(width),
        )  # fmt: skip
        of_weight, of_bias = sums.sum(1).to(weight.dtype).unbind()
        return grad_x, of_weight, of_bias, None, None, None, None


class AddBranch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, scale, images, places):
        x, branch = x.contiguous(), branch.contiguous()
        out, size = torch.empty_like(x), x.numel() // x.shape[0]
        add_kernel[(x.shape[0], -(-size // ELEMENTS))](
            x, branch, out, scale, scale if images is None else places, size, BLOCK=ELEMENTS,
            INDEXED=images is not None, num_warps=4,
        )  # fmt: skip
        ctx.save_for_backward(scale, images)
        ctx.count, ctx.dtype = branch.shape[0], branch.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        scale, images = ctx.saved_tensors
        grad, size = grad.contiguous(), grad.numel() // grad.shape[0]
        grad_branch = torch.empty((ctx.count, *grad.shape[1:]), dtype=ctx.dtype, device=grad.device)
        add_backward_kernel[(ctx.count, -(-size // ELEMENTS))](
            grad, grad_branch, scale, scale if images is None else images, size, BLOCK=ELEMENTS,
            INDEXED=images is not None, num_warps=4,
        )  # fmt: skip
        return grad, grad_branch, None, None, None


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype,
    images: Tensor | None = None, places: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Norm the last axis of the given images, computing in single precision.

    Args:
        x: ``(B, ..., C)``.
        dtype: of what is returned.
        images: which ones, each once, ``(computed,)``; None for all.
        places: where among them each image is, ``(B,)``, and any place for one that is not there.

    Returns:
        ``(computed, ..., C)``
    """
    with on_device_of(x):
        return LayerNorm.apply(x, weight, bias, images, places, eps, dtype)


def add_branch(
    x: Tensor, branch: Tensor, scale: Tensor, images: Tensor | None = None, places: Tensor | None = None
) -> Tensor:
    """Add to each image its branch times its scale; nothing where that is 0.

    Args:
        x: ``(B, ..., C)``.
        branch: of ``images``, ``(computed, ..., C)``; the other arguments are as for :func:`layer_norm`.
        scale: ``B`` numbers.
    """
    with on_device_of(x):
        return AddBranch.apply(x, branch, scale, images, places)
