"""What a run consists of besides its config and data, and the files that hold it."""

import os
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

from config import differing_settings
from models import load_weights
from utils import checkpoint
from utils.distributed import broadcast_from_main
from utils.errors import UserError

RESUMABLE = ("model", "optimizer", "scaler", "step", "best_top1", "evaluated_step", "images", "global_batch", "config")
"""What a checkpoint needs to carry on a run; others hold weights only."""


@dataclass
class TrainState:
    """Weights, optimizer, moving average, loss scale, steps done, best score: all that a run changes.

    There is no state of random generators, data loader or schedule: they are derived from the step.
    """

    model: nn.Module
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    step: int = 0
    best_top1: float = -1.0
    evaluated_step: int = 0

    def content(self) -> dict[str, Any]:
        """What :meth:`restore` needs."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "step": self.step,
            "best_top1": self.best_top1,
            "evaluated_step": self.evaluated_step,
        }

    def restore(self, content: dict[str, Any], path: Path) -> None:
        """Be as when ``content`` was saved."""
        load_weights(self.model, content["model"], str(path), allow_new_head=False)
        if self.ema:
            if not content.get("ema"):
                raise UserError(
                    f"{path} holds no moving average, but TRAIN.EMA_DECAY is set; keep it at 0 or start anew"
                )
            load_weights(self.ema.module, content["ema"], str(path), allow_new_head=False)
        configured = [{k: v for k, v in g.items() if k not in ("params", "step")} for g in self.optimizer.param_groups]
        self.optimizer.load_state_dict(content["optimizer"])
        for group, settings in zip(self.optimizer.param_groups, configured, strict=True):
            group.update(settings)  # weight decay and the like come from the config, not from the file
        self.scaler.load_state_dict(content["scaler"] or self.scaler.state_dict())
        self.step, self.best_top1 = content["step"], content["best_top1"]
        self.evaluated_step = content["evaluated_step"]

    def weights_are_finite(self) -> bool:
        """Whether the run can go on. Waits for the device."""
        return bool(torch.isfinite(torch.nn.utils.get_total_norm(self.model.parameters())))

    def share_buffers(self) -> None:
        """Give every rank rank 0's buffers, such as BatchNorm's statistics, so that all evaluate the same model."""
        models = [self.model, *([self.ema.module] if self.ema else [])]
        for buffer in chain(*(model.buffers() for model in models)):
            broadcast_from_main(buffer)


class Checkpoints:
    """``last.pth``, the one before it, and ``best.pth`` in a folder."""

    def __init__(self, folder: Path):
        self.last, self.previous, self.best = (folder / f"{name}.pth" for name in ("last", "previous", "best"))

    def save_last(self, content: dict[str, Any]) -> None:
        """Save what a run needs to carry on; keep the file before it in case this one gets damaged."""
        checkpoint.save_atomically(content, self.last, keep=self.previous)

    def save_best(self, content: dict[str, Any]) -> None:
        """Save weights to use elsewhere."""
        checkpoint.save_atomically(content, self.best)

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest whole checkpoint of this folder, if any, and a line for each damaged one, which is renamed.

        Raises:
            UserError: there are some, and all are damaged.
        """
        damaged = []
        for path in (self.last, self.previous):
            if path.exists():
                try:
                    checkpoint.read(path)
                    return path, damaged
                except (checkpoint.DamagedFile, checkpoint.RefusedFile) as error:
                    os.replace(path, path.with_suffix(".pth.corrupt"))  # out of the way of the next save
                    damaged.append(f"{error} (now {path.name}.corrupt)")
        if damaged:
            raise UserError(f"{'; '.join(damaged)}; the same command again starts anew")
        return None, []


def check_resumable(content: dict[str, Any], path: Path, config, global_batch: int, images: int) -> list[str]:
    """Refuse a checkpoint from which this run cannot carry on exactly.

    Returns:
        a line for each setting that may change the result and differs from the run so far.
    """
    missing = [key for key in RESUMABLE if key not in content]
    if missing:
        raise UserError(
            f"{path} holds no {missing[0]}, so a run cannot carry on from it: "
            "to start a run from its weights use --pretrained instead of --resume"
        )
    if content["global_batch"] != global_batch:
        raise UserError(
            f"{path} was trained with a global batch of {content['global_batch']}, this run has {global_batch}: choose "
            "DATA.BATCH_SIZE x TRAIN.ACCUMULATION_STEPS x processes so that it is the same, or start anew with --tag"
        )
    if content["images"] != images:
        raise UserError(
            f"{path} was trained on {content['images']:,} images, DATA.DATA_PATH has {images:,}, which changes their "
            "order: use the same data (DATA.ON_BAD_IMAGE skip for bad images), or start anew with another --tag"
        )
    differing = differing_settings(content["config"], config)
    for key, before, now in differing:
        if key == "TRAIN.OPTIMIZER.NAME":
            raise UserError(f"{path} was trained with {key} {before}, this run has {now}: keep it, or use --pretrained")
    return [f"{key} was {before}, is now {now}" for key, before, now in differing]
