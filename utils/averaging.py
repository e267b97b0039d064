"""The average of the weights in several checkpoints of a run (stochastic weight averaging, arXiv 1803.05407)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils import checkpoint
from utils.errors import UserError

KEPT = "config", "classes", "category_ids", "epoch", "step"
"""What the average has of the newest of them, to be used as they are."""


def average(paths: Sequence[str], which: str = "model") -> dict[str, Any]:
    """Average the weights of checkpoints, each with the same share; counters are those of the newest.

    Args:
        paths: at least two files of the same network.
        which: ``model``, or ``ema`` for the moving averages in them.

    Returns:
        the content of a checkpoint to evaluate, to predict with or to start from; no run carries on from it.

    Raises:
        UserError: a file cannot be read, or holds another network.
    """
    if len(paths) < 2:
        raise UserError(f"an average takes two checkpoints at least, {len(paths)} was given")
    sums: dict[str, Tensor] = {}
    newest: dict[str, Any] = {}
    for path in paths:
        content = checkpoint.read(path)
        _, weights = checkpoint.choose(checkpoint.weights_in(content, path), which, path)
        shapes = {name: tuple(value.shape) for name, value in weights.items()}
        if sums and shapes != {name: tuple(value.shape) for name, value in sums.items()}:
            raise UserError(f"{path} holds another network than {paths[0]}; average saves of one run")
        newer = content.get("step", 0) >= newest.get("step", 0)
        newest = content if newer else newest
        for name, value in weights.items():
            if value.is_floating_point():
                # Sums of many in single precision would lose what they differ in
                sums[name] = value.double() if name not in sums else sums[name] + value
            elif newer:
                sums[name] = value
    kinds = {name: value.dtype for name, value in weights.items()}
    averaged = {
        name: (value / len(paths)).to(kinds[name]) if value.dtype == torch.float64 else value
        for name, value in sums.items()
    }
    return {"model": averaged, **{key: newest[key] for key in KEPT if key in newest}}


def newest_epochs(folder: Path, count: int) -> list[str]:
    """List the last ``count`` checkpoints that TRAIN.KEEP_EVERY_EPOCHS has kept in a folder.

    Raises:
        UserError: there are not so many.
    """
    found = sorted(folder.glob("epoch_*.pth"))
    if count < 2:
        raise UserError(f"--last {count}: an average takes two checkpoints at least")
    if len(found) < count:
        raise UserError(
            f"{folder} has {len(found)} checkpoints of epochs, not {count}: train with TRAIN.KEEP_EVERY_EPOCHS 1, or "
            "name files"
        )
    return [str(path) for path in found[-count:]]
