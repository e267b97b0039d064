"""What a CrossFormer looks at: a token's group, how much it takes of each token in it, and the position bias."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from .block import CrossFormerBlock
from .grouping import Grouping
from .position_bias import mask_keys


class AttentionMap(NamedTuple):
    """The attention of one token in one block.

    Attributes:
        block: the name of its module, such as ``layers.0.blocks.1``.
        token: its row and column in the map.
        rows, columns, interval: of its group.
        group: ``(H, W)``, True for the tokens that it attends to, itself among them.
        weights: ``(heads, H, W)``; those of a head add up to 1, and are 0 outside the group.
    """

    block: str
    token: tuple[int, int]
    rows: int
    columns: int
    interval: int
    group: Tensor
    weights: Tensor


def blocks_of(model: nn.Module) -> dict[str, CrossFormerBlock]:
    """List the blocks of a network by the names of their modules, in order; none where it is no CrossFormer."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CrossFormerBlock)}


@torch.no_grad()
def attention_maps(model: nn.Module, image: Tensor, points: Sequence[tuple[float, float]]) -> list[list[AttentionMap]]:
    """Compute what the tokens at some points of an image attend to, in each block.

    Args:
        model: a CrossFormer, or one with a head for dense tasks (its ``backbone`` is run), in evaluation mode.
        image: prepared as for the model, ``(3, H, W)``.
        points: y and x of each, as shares of height and width, from 0 to 1.

    Returns:
        for each point the maps of all blocks, from the first to the last.
    """
    found: list[list[AttentionMap]] = [[] for _ in points]
    names = {block: name for name, block in blocks_of(model).items()}

    def look(block: CrossFormerBlock, arguments) -> None:
        x, grouping, bias, _ = arguments
        tokens = grouping.group(block.norm1(x))
        q, k, _ = rearrange(block.attn.qkv(tokens), "b n (three h d) -> three b h n d", three=3, h=block.attn.num_heads)
        bias = block.attn.position_bias(x, grouping) if bias is None else bias
        bias = mask_keys(bias, grouping)
        numbers = _numbers(grouping, x.device)
        for of_point, (y, x_) in zip(found, points, strict=True):
            token = (
                min(int(y * grouping.height), grouping.height - 1),
                min(int(x_ * grouping.width), grouping.width - 1),
            )
            group, place = (numbers == 1 + token[0] * grouping.width + token[1]).nonzero()[0].tolist()
            scores = k[group] @ q[group, :, place, :, None] * q.shape[-1] ** -0.5
            weights = (scores[..., 0] + bias[min(group, len(bias) - 1), :, place]).float().softmax(-1)
            whole = weights.new_zeros(len(weights), 1 + grouping.height * grouping.width)
            whole[:, numbers[group]] = weights  # what is padding goes to place 0
            whole = whole[:, 1:].unflatten(1, (grouping.height, grouping.width))
            members = torch.zeros(1 + grouping.height * grouping.width, dtype=torch.bool, device=x.device)
            members[numbers[group]] = True
            inside = members[1:].view(grouping.height, grouping.width)
            shape = grouping.rows, grouping.columns, grouping.interval
            of_point.append(AttentionMap(names[block], token, *shape, inside, whole))

    hooks = [block.register_forward_pre_hook(look) for block in names]
    try:
        backbone = getattr(model, "backbone", model)
        backbone(image[None])
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _numbers(grouping: Grouping, device: torch.device) -> Tensor:
    """The place of each token of each group in the map, ``(groups, N)``, counted from 1; 0 is padding."""
    places = 1 + torch.arange(grouping.height * grouping.width, device=device)
    return grouping.group(places.view(1, grouping.height, grouping.width, 1))[..., 0]


@torch.no_grad()
def position_bias_maps(block: CrossFormerBlock) -> Tensor:
    """Compute the dynamic position bias for each offset within a group of the block's size.

    Returns:
        ``(heads, 2 * G - 1, 2 * G - 1)``, query minus key in steps of the interval; the middle is a token's own.
    """
    size = block.group_size
    weight = block.attn.pos.pos_proj.weight
    offsets = Grouping(size, size, size, size, 1).offsets(weight.device).to(weight.dtype)
    return block.attn.pos(offsets).T.unflatten(1, (2 * size - 1, 2 * size - 1))
