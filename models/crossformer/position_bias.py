"""What attention adds to its scores: dynamic position bias, and -inf where a key is padding."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .grouping import Grouping, may_cache

ALIGNED_KEYS = 8
"""CUDA's attention kernels copy a bias whose rows do not begin at multiples of this."""


class DynamicPositionBias(nn.Module):
    """An MLP from the offset between two tokens to one attention bias for each head.

    Because it is a function of the offset, group size and image size are free. Source: CrossFormer, section 3.3.
    A stage does not call it: it evaluates those of all its blocks at once, with :func:`evaluate_together`. Where that
    could not be seen or would be wrong (:func:`is_plain`) each block calls its own.
    """

    def __init__(self, dim: int, num_heads: int, device=None, dtype=None):
        super().__init__()
        dd: Any = dict(device=device, dtype=dtype)
        self.pos_proj = nn.Linear(2, dim, **dd)
        self.pos1 = self._layer(dim, dim, **dd)
        self.pos2 = self._layer(dim, dim, **dd)
        self.pos3 = self._layer(dim, num_heads, **dd)

    @staticmethod
    def _layer(dim: int, out_dim: int, **dd: Any) -> nn.Sequential:
        return nn.Sequential(nn.LayerNorm(dim, **dd), nn.ReLU(), nn.Linear(dim, out_dim, **dd))

    def forward(self, offsets: Tensor) -> Tensor:
        """``(offsets, 2)`` to ``(offsets, heads)``."""
        x = self.pos_proj(offsets)
        for layer in (self.pos1, self.pos2, self.pos3):
            x = layer(x)
        return x

    @property
    def layers(self) -> list[Any]:
        """Those with parameters, in order: a linear one, and three times a norm and a linear one."""
        return [self.pos_proj, *(part[i] for part in (self.pos1, self.pos2, self.pos3) for i in (0, 2))]


def evaluate_together(mlps: Sequence[DynamicPositionBias], offsets: Tensor) -> Tensor:
    """Several MLPs of one size on the same offsets, ``(offsets, 2)`` to ``(mlps, offsets, heads)``.

    One after the other they would take as many kernels each, and all of these are too small to keep a GPU busy.
    """
    of_each = [parameters_of(mlp) for mlp in mlps]
    flat = torch.cat([t.flatten() for tensors in of_each for t in tensors])
    # Split and not sliced: the gradient is then put together in one go
    parts = flat.view(len(mlps), -1).split([t.numel() for t in of_each[0]], dim=1)
    stacked = iter(part.unflatten(1, t.shape) for part, t in zip(parts, of_each[0], strict=True))

    def linear(x: Tensor) -> Tensor:
        weight, bias = next(stacked), next(stacked)
        return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))

    def norm_and_relu(x: Tensor, eps: float) -> Tensor:
        weight, bias = next(stacked), next(stacked)
        x = rearrange(x, "mlps offsets dim -> offsets (mlps dim)")
        # A group norm whose groups are the MLPs is the layer norm of each
        x = torch.group_norm(x, len(mlps), weight.flatten(), bias.flatten(), eps).relu_()
        return rearrange(x, "offsets (mlps dim) -> mlps offsets dim", mlps=len(mlps))

    x = linear(offsets.expand(len(mlps), -1, -1))
    for layer in mlps[0].layers[1::2]:
        x = linear(norm_and_relu(x, layer.eps))
    return x


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling a module does no more than it computes: it is of this very class, and nobody has a hook on it.

    Not so where others have replaced, parametrised, sharded or offloaded it.
    """
    hooks = (
        module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    )  # fmt: skip
    return type(module) is kind and not hooks and "forward" not in vars(module)


def may_be_read(mlps: Sequence[DynamicPositionBias]) -> bool:
    """Whether the MLPs can be evaluated together from their parameters, without calling them and their parts."""
    for mlp in mlps:
        if not is_plain(mlp, DynamicPositionBias) or not is_plain(mlp.pos_proj, nn.Linear):
            return False
        for part in (mlp.pos1, mlp.pos2, mlp.pos3):
            kinds = nn.LayerNorm, nn.ReLU, nn.Linear
            if not is_plain(part, nn.Sequential) or not all(map(is_plain, part, kinds)):
                return False
    if torch.jit.is_tracing():
        return False  # what is read here would be recorded
    tensors = [parameters_of(mlp) for mlp in mlps]
    if any(hasattr(tensor, "__tensor_flatten__") for of_one in tensors for tensor in of_one):
        return False  # as sharded and quantised ones have
    shapes = [[tensor.shape for tensor in of_one] for of_one in tensors]
    dtypes = {tensor.dtype for of_one in tensors for tensor in of_one}
    return len(dtypes) == 1 and all(of_one == shapes[0] for of_one in shapes)


def parameters_of(mlp: DynamicPositionBias) -> list[Tensor]:
    """The weight and the bias of each layer, in order.

    As attributes, which is how replicas and reparametrised modules have them; the dict of parameters may be empty.
    """
    return [tensor for layer in mlp.layers for tensor in (layer.weight, layer.bias)]


def position_bias(mlp: nn.Module, grouping: Grouping, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Call one MLP for the position bias of a block, ``(1, heads, N, N)``, where the map ``x`` is."""
    table = mlp(grouping.offsets(x.device).to(x.dtype))
    return align_rows(grouping.for_each_pair(table.transpose(0, 1)).to(dtype))[None]


def position_biases(
    mlps: Sequence[DynamicPositionBias], groupings: Sequence[Grouping], dtype: torch.dtype
) -> list[Tensor]:
    """The position bias of each block of a stage, ``(1, heads, N, N)``.

    Blocks whose groups have the same shape are evaluated together, at whatever interval.
    """
    weight = mlps[0].pos_proj.weight
    biases: dict[int, Tensor] = {}
    for first, grouping in enumerate(groupings):
        if first in biases:
            continue
        of_shape = [i for i, other in enumerate(groupings) if other.shape == grouping.shape]
        table = evaluate_together([mlps[i] for i in of_shape], grouping.offsets(weight.device).to(weight.dtype))
        pairs = align_rows(grouping.for_each_pair(table.transpose(1, 2)).to(dtype))
        biases |= zip(of_shape, pairs[:, None].unbind(), strict=True)
    return [biases[i] for i in range(len(mlps))]


def mask_keys(bias: Tensor, grouping: Grouping) -> Tensor:
    """The bias, and -inf where the key is padding: ``(1 or groups, heads, N, N)``."""
    mask = grouping.key_mask(bias.device)
    return bias if mask is None else bias + mask.to(bias.dtype)


def align_rows(bias: Tensor) -> Tensor:
    """The same values, on CUDA with room behind each row."""
    n = bias.shape[-1]
    return F.pad(bias, (0, -n % ALIGNED_KEYS))[..., :n] if bias.is_cuda and n % ALIGNED_KEYS else bias


class BiasCache:
    """Keeps the last position biases of a stage that were computed in evaluation without gradients.

    They are computed anew when the shapes of the groups, the precision or the weights change. A write through
    ``parameter.data`` or an array of numpy's that keeps the storage cannot be seen, nor a fused optimizer's step on
    gradients from before the last ``model.eval()``: call that, which empties the cache, after it.
    """

    def __init__(self) -> None:
        self.entry: tuple[tuple, list[Tensor], list[Tensor]] | None = None
        """What it was computed of, the biases, and the weights, whose memory thus is nobody else's: one object, since
        replicas of a model share a cache."""
        self.trains = False
        """Whether gradients were asked for since the model's mode was set last."""

    def __reduce__(self):
        return BiasCache, ()  # a copy of a model has nothing yet

    def clear(self) -> None:
        self.entry, self.trains = None, False

    def biases(
        self, mlps: Sequence[DynamicPositionBias], groupings: Sequence[Grouping], dtype: torch.dtype
    ) -> list[Tensor]:
        """As :func:`position_biases`."""
        if not may_cache() or mlps[0].training or mlps[0].pos_proj.weight.is_inference():
            return position_biases(mlps, groupings, dtype)
        if torch.is_grad_enabled():
            self.entry, self.trains = None, True
            return position_biases(mlps, groupings, dtype)
        weights = [t for mlp in mlps for t in parameters_of(mlp)]
        if self.trains and any(t.grad is not None for t in weights):
            # An optimizer's step may follow, and a fused one leaves the count of writes as it is
            return position_biases(mlps, groupings, dtype)
        # torch's count of the writes to a tensor has no public name
        versions = tuple((t.data_ptr(), t._version) for t in weights)
        key = (tuple(grouping.shape for grouping in groupings), dtype, weights[0].device, versions)
        entry = self.entry
        if entry is None or entry[0] != key:
            biases = position_biases(mlps, groupings, dtype)
            entry = self.entry = key, biases, [t.detach() for t in weights]
        return entry[1]
