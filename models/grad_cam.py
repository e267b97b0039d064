"""Grad-CAM: which places of an image speak for a class. Source: arXiv 1610.02391, equations 1 and 2."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FEWEST_CELLS = 16
"""A map of fewer says too little of where; then one before it is taken."""
NO_MAP = "the model has no map that the score of a class depends on place by place"


def grad_cam(model: Any, images: Tensor, classes: Sequence[int]) -> Tensor:
    """Compute for each image how much each place speaks for a class.

    It goes by the last map that the class's score depends on place by place: the features before the head; or where the
    head reads a class token alone, or the map has fewer than 16 cells, what an earlier module of ``feature_info``
    gives.

    Args:
        model: a classifier with timm's ``forward_features`` and ``forward_head``, in evaluation mode.
        images: as the model takes them, ``(B, 3, H, W)``.
        classes: of each image.

    Returns:
        ``(B, h, w)``, 0 to 1; all 0 where no place speaks for the class.

    Raises:
        ValueError: the model has no such map.
    """
    modules = dict(model.named_modules())
    infos = [info for info in getattr(model, "feature_info", None) or [] if info.get("module") in modules]
    kept: list[tuple[Any, int]] = []

    def keep(number_of_channels: int):
        return lambda module, arguments, output: kept.append((output, number_of_channels))

    hooks = [modules[info["module"]].register_forward_hook(keep(info["num_chs"])) for info in infos]
    try:
        with torch.enable_grad():
            features = model.forward_features(images.requires_grad_())
            logits = model.forward_head(features)
    finally:
        for hook in hooks:
            hook.remove()
    maps = [(features, model.num_features), *reversed(kept)]
    maps = [(x, channels) for x, channels in maps if isinstance(x, Tensor) and x.dim() in (3, 4) and x.requires_grad]
    if not maps:
        raise ValueError(NO_MAP)
    score = logits[torch.arange(len(images)), list(classes)].sum()
    gradients = torch.autograd.grad(score, [x for x, _ in maps], allow_unused=True)
    best: Tensor | None = None
    for (x, channels), gradient in zip(maps, gradients, strict=True):
        if gradient is None:
            continue
        values, slopes = (_as_map(part.detach().float(), channels, model) for part in (x, gradient))
        if slopes.any() and (best is None or values[0, 0].numel() > best[0].numel()):
            best = (slopes.mean((2, 3), keepdim=True) * values).sum(1).relu()
            if best[0].numel() >= FEWEST_CELLS:
                break
    if best is None:
        raise ValueError(NO_MAP)
    return best / best.amax((1, 2), keepdim=True).clamp(min=torch.finfo(best.dtype).tiny)


def _as_map(x: Tensor, channels: int, model: Any) -> Tensor:
    """``(B, C, H, W)`` of that, of ``(B, H, W, C)``, or of tokens ``(B, N, C)`` with others in front."""
    if x.dim() == 3:
        height, width = getattr(getattr(model, "patch_embed", None), "grid_size", None) or (0, 0)
        if height * width != x.shape[1] - getattr(model, "num_prefix_tokens", 0):  # that of another image size
            height = width = math.isqrt(x.shape[1])
        x = x[:, x.shape[1] - height * width :].unflatten(1, (height, width))
        return x.permute(0, 3, 1, 2)
    is_last = x.shape[-1] == channels and (x.shape[1] != channels or getattr(model, "output_fmt", "NCHW") == "NHWC")
    return x.permute(0, 3, 1, 2) if is_last else x
