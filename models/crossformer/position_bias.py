"""What attention adds to its scores: dynamic position bias, and -inf where a key is padding."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .grouping import Grouping, may_cache

ALIGNED_KEYS = 8
"""CUDA's attention kernels copy a bias whose rows do not begin at a multiple of this."""


class DynamicPositionBias(nn.Module):
    """An MLP from the offset between two tokens to one attention bias for each head.

    Because it is a function of the offset, group size and image size are free. It holds the parameters alone: a stage
    evaluates those of all its blocks at once, with :func:`evaluate_together`. Source: CrossFormer, section 3.3.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.pos_proj = nn.Linear(2, dim)
        self.pos1 = self._layer(dim, dim)
        self.pos2 = self._layer(dim, dim)
        self.pos3 = self._layer(dim, num_heads)

    @staticmethod
    def _layer(dim: int, out_dim: int) -> nn.Sequential:
        return nn.Sequential(nn.LayerNorm(dim), nn.ReLU(inplace=True), nn.Linear(dim, out_dim))


def evaluate_together(layers: Sequence[DynamicPositionBias], offsets: Tensor) -> Tensor:
    """Several MLPs of one size on the same offsets, ``(offsets, 2)`` to ``(layers, offsets, heads)``.

    One after the other they would take as many kernels each, and all of these are too small to keep a GPU busy.
    """
    of_each = [dict(layer.named_parameters()) for layer in layers]
    flat = torch.cat([parameter.flatten() for parameters in of_each for parameter in parameters.values()])
    # Split and not sliced: the gradient is then put together in one go
    parts = flat.view(len(layers), -1).split([parameter.numel() for parameter in of_each[0].values()], dim=1)
    stacked = {
        name: part.unflatten(1, parameter.shape)
        for (name, parameter), part in zip(of_each[0].items(), parts, strict=True)
    }

    def linear(x: Tensor, name: str) -> Tensor:
        return torch.baddbmm(stacked[f"{name}.bias"][:, None], x, stacked[f"{name}.weight"].mT)

    x = linear(offsets.expand(len(layers), -1, -1), "pos_proj")
    for name in ("pos1", "pos2", "pos3"):
        # A group norm whose groups are the layers is the layer norm of each
        weight, bias = (stacked[f"{name}.0.{key}"].flatten() for key in ("weight", "bias"))
        x = rearrange(x, "layers offsets dim -> offsets (layers dim)")
        x = F.group_norm(x, len(layers), weight, bias, getattr(layers[0], name)[0].eps).relu_()
        x = linear(rearrange(x, "offsets (layers dim) -> layers offsets dim", layers=len(layers)), f"{name}.2")
    return x


def attention_biases(layers: Sequence[DynamicPositionBias], groupings: Sequence[Grouping]) -> list[Tensor]:
    """For each block of a stage what it adds to its attention scores, ``(1 or groups, heads, N, N)``.

    Blocks whose groups have the same shape are evaluated together, at whatever interval.
    """
    weight = layers[0].pos_proj.weight
    biases: list[Tensor] = [weight] * len(layers)
    for shape in dict.fromkeys(grouping.shape for grouping in groupings):
        of_shape = [i for i, grouping in enumerate(groupings) if grouping.shape == shape]
        grouping = groupings[of_shape[0]]
        table = evaluate_together([layers[i] for i in of_shape], grouping.offsets(weight.device).to(weight.dtype))
        bias = grouping.for_each_pair(table.mT)
        if bias.is_cuda and bias.shape[-1] % ALIGNED_KEYS:
            bias = F.pad(bias, (0, -bias.shape[-1] % ALIGNED_KEYS))[..., : bias.shape[-1]]
        for i, of_block in zip(of_shape, bias[:, None].unbind(), strict=True):
            mask = groupings[i].key_mask(weight.device)
            biases[i] = of_block if mask is None else of_block + mask.to(of_block.dtype)
    return biases


class BiasCache:
    """Keeps the last biases of a stage that were computed in evaluation without gradients.

    They are computed anew when the groupings, the precision or the weights change. A write through ``parameter.data``
    that keeps the storage cannot be seen: call ``model.eval()``, which empties the cache, after it.
    """

    def __init__(self) -> None:
        self._key: tuple = ()
        self._biases: list[Tensor] = []

    @property
    def is_filled(self) -> bool:
        return bool(self._biases)

    def clear(self) -> None:
        self._key, self._biases = (), []

    def biases(
        self, layers: Sequence[DynamicPositionBias], groupings: Sequence[Grouping], dtype: torch.dtype
    ) -> list[Tensor]:
        """As :func:`attention_biases`; ``dtype`` is what the products are computed in."""
        parameters = [p for layer in layers for p in layer.parameters()]
        if layers[0].training or torch.is_grad_enabled() or not may_cache() or parameters[0].is_inference():
            return attention_biases(layers, groupings)
        weights = tuple((p.data_ptr(), p._version) for p in parameters)
        key = (*groupings, dtype, parameters[0].device, weights)
        if self._key != key:
            self._key, self._biases = key, attention_biases(layers, groupings)
        return self._biases
