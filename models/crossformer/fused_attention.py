"""Attention within groups on a GPU as one Triton kernel each way, which reads and writes tokens where they lie.

A group of up to 64 tokens and its scores fit into the registers of one program. So nothing but queries, keys and
values is read, and nothing else is kept for the backward pass: no copies into groups and back, no scores in memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .grouping import Grouping, on_device_of, power_of_two

LARGEST_GROUP = 64
HEAD_CHANNELS = 16, 32, 64
PROGRAMS = 1056
"""About 8 for each multiprocessor. Each takes one head of many groups and reads its bias once. A constant, so that the
gradient of the bias is summed in the same order on any card."""

WARPS, STAGES = 4, 3
"""Of a program, and how many groups ahead it loads: the fastest of six choices on an H100."""


NUMBERS = "stride_head stride_query groups programs height width down across interval heads".split()
"""Arguments of the kernels that Triton need not compile anew for: one kernel each way serves all stages."""


@triton.jit
def tokens_of(group, height, width, down, across, interval, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
              BLOCK: tl.constexpr):  # fmt: skip
    """Say where in the map a group's tokens lie, ``(BLOCK,)``, and which of them there are."""
    rest = group // (interval * interval)
    token = tl.arange(0, BLOCK)
    y = (rest // across % down * ROWS + token // COLUMNS) * interval + group // interval % interval
    x = (rest % across * COLUMNS + token % COLUMNS) * interval + group % interval
    there = (token < ROWS * COLUMNS) & (y < height) & (x < width)
    return ((rest // (across * down)).to(tl.int64) * height + y) * width + x, there


@triton.jit
def bias_of(bias, head, stride_head, stride_query, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """Load that of one head, ``(BLOCK, BLOCK)``."""
    at = tl.arange(0, BLOCK)
    there = (at[:, None] < TOKENS) & (at[None, :] < TOKENS)
    where = bias + head * stride_head + at[:, None] * stride_query + at[None, :]
    return tl.load(where, mask=there, other=0.0).to(tl.float32)


@triton.jit
def softmax_of(q, k, bias, there, scale):
    """Compute attention's weights, ``(BLOCK, BLOCK)``; 0 where there is no query or no key."""
    pair = there[:, None] & there[None, :]
    scores = tl.where(pair, tl.dot(q, tl.trans(k)) * scale + bias, -1e30)
    weights = tl.where(pair, tl.exp(scores - tl.max(scores, 1)[:, None]), 0.0)
    total = tl.sum(weights, 1)
    return weights / tl.where(total > 0, total, 1.0)[:, None]


@triton.jit(do_not_specialize=NUMBERS)
def forward_kernel(
    qkv, bias, out, stride_head, stride_query, groups, programs, height, width, down, across, interval, heads, scale,
    DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    of_head = bias_of(bias, head, stride_head, stride_query, ROWS * COLUMNS, BLOCK)
    channel = head * DIM + tl.arange(0, DIM)[None, :]
    for group in tl.range(tl.program_id(0) // heads, groups, programs, num_stages=STAGES):
        token, there = tokens_of(group, height, width, down, across, interval, ROWS, COLUMNS, BLOCK)
        at = qkv + token[:, None] * (3 * heads * DIM) + channel
        q = tl.load(at, mask=there[:, None], other=0.0)
        k = tl.load(at + heads * DIM, mask=there[:, None], other=0.0)
        v = tl.load(at + 2 * heads * DIM, mask=there[:, None], other=0.0)
        weights = softmax_of(q, k, of_head, there, scale)
        tokens = tl.dot(weights.to(v.dtype), v)
        tl.store(out + token[:, None] * (heads * DIM) + channel, tokens.to(v.dtype), mask=there[:, None])


@triton.jit(do_not_specialize=NUMBERS)
def backward_kernel(
    qkv, bias, grad, grad_qkv, grad_bias, stride_head, stride_query, groups, programs, height, width, down, across,
    interval, heads, scale,
    DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    of_head = bias_of(bias, head, stride_head, stride_query, ROWS * COLUMNS, BLOCK)
    channel = head * DIM + tl.arange(0, DIM)[None, :]
    grad_of_head = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for group in tl.range(tl.program_id(0) // heads, groups, programs, num_stages=STAGES):
        token, there = tokens_of(group, height, width, down, across, interval, ROWS, COLUMNS, BLOCK)
        at = token[:, None] * (3 * heads * DIM) + channel
        q = tl.load(qkv + at, mask=there[:, None], other=0.0)
        k = tl.load(qkv + at + heads * DIM, mask=there[:, None], other=0.0)
        v = tl.load(qkv + at + 2 * heads * DIM, mask=there[:, None], other=0.0)
        g = tl.load(grad + token[:, None] * (heads * DIM) + channel, mask=there[:, None], other=0.0)
        weights = softmax_of(q, k, of_head, there, scale)
        grad_v = tl.dot(tl.trans(weights.to(g.dtype)), g)
        tl.store(grad_qkv + at + 2 * heads * DIM, grad_v.to(q.dtype), mask=there[:, None])
        of_weights = weights * tl.dot(g, tl.trans(v))
        of_scores = of_weights - weights * tl.sum(of_weights, 1)[:, None]
        grad_of_head += of_scores
        of_scores = of_scores.to(q.dtype)
        tl.store(grad_qkv + at, (tl.dot(of_scores, k) * scale).to(q.dtype), mask=there[:, None])
        grad_k = tl.dot(tl.trans(of_scores), q) * scale
        tl.store(grad_qkv + at + heads * DIM, grad_k.to(q.dtype), mask=there[:, None])
    pair = tl.arange(0, BLOCK)
    inside = (pair[:, None] < ROWS * COLUMNS) & (pair[None, :] < ROWS * COLUMNS)
    where = tl.program_id(0) * (ROWS * COLUMNS) * (ROWS * COLUMNS) + pair[:, None] * (ROWS * COLUMNS) + pair[None, :]
    tl.store(grad_bias + where, grad_of_head, mask=inside)


def launch(kernel, tensors: list[Tensor], bias: Tensor, shape: torch.Size, grouping: tuple[int, int, int]) -> None:
    """Start a kernel for a map of ``shape``; the programs for a head share the groups."""
    batch, height, width, channels = shape
    rows, columns, interval = grouping
    heads = bias.shape[0]
    down, across = -(-height // (rows * interval)), -(-width // (columns * interval))
    kernel[(programs_for(heads) * heads,)](
        *tensors, bias.stride(0), bias.stride(1), batch * down * across * interval**2, programs_for(heads),
        height, width, down, across, interval, heads, (channels // heads) ** -0.5,
        DIM=channels // heads, ROWS=rows, COLUMNS=columns, BLOCK=max(16, power_of_two(rows * columns)), STAGES=STAGES,
        num_warps=WARPS,
    )  # fmt: skip


def programs_for(heads: int) -> int:
    """How many programs each head has."""
    return -(-PROGRAMS // heads)


class Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, bias, rows, columns, interval):
        qkv, bias = qkv.contiguous(), bias if bias.stride(-1) == 1 else bias.contiguous()
        out = qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)
        launch(forward_kernel, [qkv, bias, out], bias, out.shape, (rows, columns, interval))
        ctx.save_for_backward(qkv, bias)
        ctx.grouping = rows, columns, interval
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        qkv, bias = ctx.saved_tensors
        grad, grad_qkv, heads = grad.contiguous(), torch.empty_like(qkv), bias.shape[0]
        # Sums of programs, added in a fixed order: with atomic additions a run would depend on chance
        sums = torch.empty((programs_for(heads), *bias.shape), dtype=torch.float32, device=qkv.device)
        launch(backward_kernel, [qkv, bias, grad, grad_qkv, sums], bias, grad.shape, ctx.grouping)
        return grad_qkv, sums.sum(0).to(bias.dtype), None, None, None


def fits(grouping: Grouping, channels: int) -> bool:
    """Whether a group with so many channels for each head is one of those that the kernels take."""
    return grouping.rows * grouping.columns <= LARGEST_GROUP and channels in HEAD_CHANNELS


def attend(qkv: Tensor, bias: Tensor, grouping: Grouping) -> Tensor:
    """Attend within the groups of a map.

    Args:
        qkv: queries, keys and values, ``(B, H, W, 3 * C)`` in half precision.
        bias: ``(heads, N, N)``.

    Returns:
        ``(B, H, W, C)``
    """
    with on_device_of(qkv):
        return Attend.apply(qkv, bias, grouping.rows, grouping.columns, grouping.interval)
