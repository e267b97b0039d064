"""CrossFormer and CrossFormer++: vision transformers whose attention crosses scales.

Sources: CrossFormer, arXiv 2108.00154 (ICLR 2022); CrossFormer++, arXiv 2303.06908 (TPAMI 2023).

Token maps are ``(B, H, W, C)`` throughout. State-dict keys are those of the published checkpoints.
The table of variants is at the end of the file; every variant is registered with timm.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import SelectAdaptivePool2d, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from .block import Blocks, CrossFormerBlock, Stage
from .embedding import MIN_IMAGE_SIZE, PATCH_KERNELS, PATCH_STRIDE, REDUCTION_STRIDE, PatchEmbed, PatchMerging

ACL_PERIOD = 3
WITH_THE_PREVIOUS = (99999,)
"""By this number timm knows parameters that belong to the layer before them (the ``group_matcher`` of its models)."""

OUTPUT_STRIDES = (8, 16, 32)

POOLS = ("avg", "max", "avgmax", "catavgmax", "")
"""From the token map to one vector, by timm's names."""

PerBlock = int | Sequence[int]
"""A setting of one stage: a number for all its blocks, or one number for each block."""


class CrossFormer(nn.Module):
    """CrossFormer and CrossFormer++ for classification and dense features, on any image of at least 32 x 32.

    Args:
        in_chans: channels of the image.
        num_classes: classes of the head; 0 for none.
        global_pool: ``avg``, ``max``, ``avgmax`` (their mean), ``catavgmax`` (both), or an empty string to leave the
            token map as it is.
        embed_dim: channels of the first stage, a multiple of 16; each stage doubles them.
        depths: blocks of each stage.
        num_heads: attention heads of each stage; each divides its stage's channels.
        group_size: G of each stage, or for a stage a sequence with the G of each block (progressive group size).
        interval: I of each stage, likewise; it is used by every second block (long-distance attention).
        mlp_ratio: hidden channels of the MLP over its channels.
        amplitude_cooling: end every third block but a stage's last with an amplitude cooling layer (CrossFormer++).
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 at the first.
        output_stride: 32, or 16 or 8: pixels between the tokens of the last maps. Stages that would shrink the map
            further keep its size, and let their kernels, groups and intervals reach so much further: every second (or
            fourth) token is what it is with 32, for images whose sides are multiples of 32.
        device: where the parameters are made; on ``meta`` they have no memory, and after ``to_empty()`` come from
            :meth:`init_weights` or a checkpoint.
        dtype: of the parameters.

    Raises:
        ValueError: an argument does not describe a network; the message starts with the argument's name.
    """

    output_fmt = "NHWC"

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        group_size: Sequence[PerBlock] = (7, 7, 7, 7),
        interval: Sequence[PerBlock] = (8, 4, 2, 1),
        mlp_ratio: float = 4.0,
        amplitude_cooling: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        output_stride: int = 32,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd: Any = dict(device=device, dtype=dtype)
        _check_architecture(embed_dim, depths, num_heads)
        group_sizes = _for_each_block("group_size", group_size, depths)
        intervals = _for_each_block("interval", interval, depths)
        drop_path_rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").split(list(depths))
        dims = [embed_dim * 2**i for i in range(len(depths))]
        if output_stride not in OUTPUT_STRIDES:
            raise ValueError(f"output_stride {output_stride} is not one of {', '.join(map(str, OUTPUT_STRIDES))}")
        reductions = [PATCH_STRIDE * REDUCTION_STRIDE**i for i in range(len(depths))]
        dilations = [max(1, reduction // output_stride) for reduction in reductions]

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = dims[-1]
        self.feature_info = [
            dict(num_chs=dim, reduction=min(reduction, output_stride), module=f"layers.{i}.blocks")
            for i, (dim, reduction) in enumerate(zip(dims, reductions, strict=True))
        ]

        self.patch_embed = PatchEmbed(in_chans, embed_dim, **dd)
        self.layers: Any = nn.ModuleList()
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            blocks = [
                CrossFormerBlock(
                    dim=dim,
                    num_heads=num_heads[i],
                    group_size=group_sizes[i][j],
                    interval=1 if j % 2 == 0 else intervals[i][j],  # short-distance, then long-distance attention
                    mlp_ratio=mlp_ratio,
                    drop_path_rate=drop_path_rates[i][j].item(),
                    amplitude_cooling=amplitude_cooling and (j + 1) % ACL_PERIOD == 0 and j < depth - 1,
                    dilation=dilations[i],
                    **dd,
                )
                for j in range(depth)
            ]
            downsample: nn.Module = nn.Identity()
            if i < len(depths) - 1:
                stride = REDUCTION_STRIDE if reductions[i + 1] <= output_stride else 1
                downsample = PatchMerging(dim, stride, dilations[i], **dd)
            self.layers.append(Stage(Blocks(blocks), downsample))
        self.norm: nn.Module = nn.LayerNorm(self.num_features, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self._set_head(num_classes, global_pool, **dd)
        self.init_weights(needs_reset=False)

    def _set_head(self, num_classes: int, global_pool: str, **dd: Any) -> None:
        if global_pool not in POOLS:
            raise ValueError(f"global_pool {global_pool!r} is not one of {', '.join(map(repr, POOLS))}")
        self.num_classes, self.global_pool = num_classes, global_pool
        self.pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=bool(global_pool), input_fmt=self.output_fmt)
        self.head_hidden_size = self.num_features * self.pool.feat_mult()
        self.head = nn.Linear(self.head_hidden_size, num_classes, **dd) if num_classes > 0 else nn.Identity()

    @torch.jit.ignore
    def init_weights(self, needs_reset: bool = True) -> None:
        """Draw the weights: linear layers as in the paper, the others as torch does.

        Args:
            needs_reset: also those that torch has drawn where a module was made, as after ``to_empty()``.
        """
        for module in self.modules() if needs_reset else ():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm):
                module.reset_parameters()
        self.apply(_init_weights)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters to exempt from weight decay besides biases and 1-d ones: none."""
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """How parameters fall into layers, from the image to the head (timm's layer-wise learning rates).

        What follows the last block of a stage belongs to that block.
        """
        blocks = [
            (r"^layers\.(\d+)\.blocks\.(\d+)", None),
            (r"^layers\.(\d+)\.downsample", WITH_THE_PREVIOUS),
            (r"^norm", WITH_THE_PREVIOUS),
        ]
        return dict(stem=r"^patch_embed", blocks=r"^layers\.(\d+)" if coarse else blocks)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True, selective: bool = False) -> None:
        """Recompute each block in the backward pass instead of keeping what it computed.

        ``selective`` keeps the results of most matrix products and recomputes the rest: norms, attention, activations.
        """
        for stage in self.layers:
            for block in stage.blocks:
                block.recompute = ("selective" if selective else "full") if enable else "none"

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one for ``num_classes`` (0 for none)."""
        weight = self.norm.weight if isinstance(self.norm, nn.LayerNorm) else self.patch_embed.norm.weight
        pool = self.global_pool if global_pool is None else global_pool
        self._set_head(num_classes, pool, device=weight.device, dtype=weight.dtype)
        self.head.train(self.training).apply(_init_weights)
        self.pool.train(self.training)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The map after each stage, before its down-sampling, at reductions 4, 8, 16 and 32.

        Args:
            x: images ``(B, 3, H, W)``.
            indices: which stages; the last n for a number, all for None.
            norm: apply the final norm to the last stage's map.
            stop_early: skip the stages after the last wanted one.
            output_fmt: ``NCHW`` or ``NHWC``.
            intermediates_only: leave out the final features.

        Returns:
            the maps, or the final features (as :meth:`forward_features`) and the maps.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt {output_fmt!r} is not one of NCHW, NHWC")
        taken = _choose(len(self.layers), indices)
        intermediates = []
        x = self.patch_embed(x)
        for i, stage in enumerate(self.layers[: max(taken) + 1] if stop_early else self.layers):
            features, x = stage(x, with_map=True)
            last = i == len(self.layers) - 1
            if i in taken:
                output = self.norm(features) if norm and last else features
                intermediates.append(output.permute(0, 3, 1, 2) if output_fmt == "NCHW" else output)
            x = self.norm(x) if last else x
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the maps of ``indices`` do not need; returns the indices, counted from the front.

        With stages the head goes too, as its width is that of the last; :meth:`reset_classifier` makes one that fits.
        """
        taken = _choose(len(self.layers), indices)
        cut = max(taken) < len(self.layers) - 1
        self.layers = self.layers[: max(taken) + 1]
        self.layers[-1].downsample = nn.Identity()
        if prune_norm or cut:
            self.norm = nn.Identity()
        self.num_features = self.feature_info[max(taken)]["num_chs"]
        if prune_head or cut:
            self.reset_classifier(0, "")
        return taken

    def forward_features(self, x: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)`` to normalised tokens ``(B, H // 32, W // 32, C)``."""
        x = self.patch_embed(x)
        for stage in self.layers:
            x = stage(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens ``(B, H, W, C)`` to logits ``(B, classes)``, or to what the head sees when ``pre_logits``."""
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, 3, H, W)`` to logits ``(B, classes)``."""
        return self.forward_head(self.forward_features(x))


def _choose(stages: int, indices: int | list[int] | None) -> list[int]:
    """Of so many stages those of ``indices``: the last n for a number, all for None; some may count from the end."""
    if indices is None:
        return list(range(stages))
    if isinstance(indices, int):
        if not 0 < indices <= stages:
            raise ValueError(f"the last {indices} of {stages} stages cannot be taken")
        return list(range(stages - indices, stages))
    return [range(stages)[i] for i in indices]


def _init_weights(module: nn.Module) -> None:
    """Linear layers as in the paper; convolutions and norms keep torch's default."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def _check_architecture(embed_dim: int, depths: Sequence[int], num_heads: Sequence[int]) -> None:
    if embed_dim < 16 or embed_dim % 16:
        nearest = max(16, round(embed_dim / 16) * 16)
        raise ValueError(f"embed_dim {embed_dim} is not a multiple of 16; the nearest is {nearest}")
    if not depths or min(depths) < 1:
        raise ValueError(f"depths {list(depths)} must give each stage at least 1 block")
    if len(num_heads) != len(depths):
        raise ValueError(f"num_heads {list(num_heads)} has {len(num_heads)} entries for {len(depths)} stages")
    for i, heads in enumerate(num_heads):
        dim = embed_dim * 2**i
        if heads < 1 or dim % heads:
            nearest = min((h for h in range(1, dim + 1) if dim % h == 0), key=lambda h: abs(h - heads))
            raise ValueError(
                f"num_heads {list(num_heads)}: {heads} heads do not divide the width {dim} of stage {i + 1}; "
                f"the nearest number that does is {nearest}"
            )


def _for_each_block(name: str, values: Sequence[PerBlock], depths: Sequence[int]) -> list[list[int]]:
    if len(values) != len(depths):
        raise ValueError(f"{name} {list(values)} has {len(values)} entries for {len(depths)} stages")
    expanded = [[v] * depth if isinstance(v, int) else list(v) for v, depth in zip(values, depths, strict=True)]
    for stage, (stage_values, depth) in enumerate(zip(expanded, depths, strict=True), start=1):
        if len(stage_values) != depth:
            raise ValueError(f"{name} gives stage {stage} {len(stage_values)} numbers for its {depth} blocks")
        if any(not isinstance(v, int) or v < 1 for v in stage_values):
            raise ValueError(f"{name} {list(values)}: every number must be at least 1 (stage {stage})")
    return expanded


WRAPPERS = re.compile(r"((module|backbone|model|_orig_mod|net|encoder|network)\.)*")
"""What wrappers put before the keys of a model: DDP, torch.compile, Lightning and the like, also inside each other."""


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module | None = None) -> dict[str, Tensor]:
    """A published state dict with this module's keys.

    Takes off the prefixes in :data:`WRAPPERS`, and drops the buffers of older files that are computed here.
    """
    computed_here = "attn.biases", "attn.relative_position_index"
    return {
        WRAPPERS.sub("", key, count=1): value for key, value in state_dict.items() if not key.endswith(computed_here)
    }


VARIANTS: dict[str, dict[str, Any]] = {
    "crossformer_micro": dict(
        embed_dim=32, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), group_size=(4, 4, 4, 4), interval=(2, 1, 1, 1)
    ),
    "crossformer_tiny": dict(embed_dim=64, depths=(1, 1, 8, 6), num_heads=(2, 4, 8, 16)),
    "crossformer_small": dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "crossformer_base": dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    "crossformer_large": dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    "crossformerpp_small": dict(embed_dim=64, depths=(2, 2, 18, 2), num_heads=(2, 4, 8, 16)),
    "crossformerpp_base": dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    "crossformerpp_large": dict(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    "crossformerpp_huge": dict(embed_dim=128, depths=(6, 6, 18, 2), num_heads=(4, 8, 16, 32)),
}
"""The table of variants: what differs from the defaults of :class:`CrossFormer`."""

CROSSFORMERPP = dict(group_size=(4, 4, 14, 7), interval=(4, 2, 1, 1), amplitude_cooling=True)
"""What every CrossFormer++ variant has besides (progressive group size and amplitude cooling)."""


def _default_cfg(image_size: int = 224) -> dict:
    return dict(
        url="",
        num_classes=1000,
        input_size=(3, image_size, image_size),
        min_input_size=(3, MIN_IMAGE_SIZE, MIN_IMAGE_SIZE),
        pool_size=(image_size // 32, image_size // 32),
        crop_pct=0.875,
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv=tuple(f"patch_embed.projs.{i}" for i in range(len(PATCH_KERNELS))),
        classifier="head",
        license="mit",
    )


default_cfgs = generate_default_cfgs(
    {name: _default_cfg(image_size=32 if name == "crossformer_micro" else 224) for name in VARIANTS}
)


def _register(name: str, architecture: dict) -> None:
    if name.startswith("crossformerpp"):
        architecture = {**architecture, **CROSSFORMERPP}

    def create(pretrained: bool = False, **kwargs) -> CrossFormer:
        return build_model_with_cfg(
            CrossFormer,
            name,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls="getter"),
            **{**architecture, **kwargs},
        )

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{name}: {architecture}."
    globals()[name] = register_model(create)


for _name, _architecture in VARIANTS.items():
    _register(_name, _architecture)
