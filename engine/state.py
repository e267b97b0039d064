"""What a run consists of besides its config and data, and the files that hold it."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

from models import load_weights
from utils import checkpoint
from utils.errors import UserError

RESUMABLE = ("model", "optimizer", "scaler", "step", "best_top1", "steps_per_epoch", "global_batch")
"""What a checkpoint needs to carry on a run; others hold weights only."""


@dataclass
class TrainState:
    """Weights, optimizer, moving average, loss scale, the next step and the best score: all that a step changes.

    There is no state of random generators, data loader or schedule: they are derived from the step.
    """

    model: nn.Module
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    step: int = 0
    best_top1: float = -1.0

    def content(self) -> dict[str, Any]:
        """What :meth:`restore` needs."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "step": self.step,
            "best_top1": self.best_top1,
        }

    def restore(self, content: dict[str, Any], path: Path) -> None:
        """Be as when ``content`` was saved."""
        load_weights(self.model, content["model"], str(path), keep_trunk_only=False)
        if self.ema:
            if not content.get("ema"):
                raise UserError(
                    f"{path} holds no moving average, but TRAIN.EMA_DECAY is set; keep it at 0 or start anew"
                )
            load_weights(self.ema.module, content["ema"], str(path), keep_trunk_only=False)
        try:
            self.optimizer.load_state_dict(content["optimizer"])
        except ValueError as error:
            raise UserError(f"{path} is of another TRAIN.OPTIMIZER than the config: {error}") from error
        self.scaler.load_state_dict(content["scaler"] or self.scaler.state_dict())
        self.step, self.best_top1 = content["step"], content["best_top1"]


class Checkpoints:
    """``last.pth``, the one before it, and ``best.pth`` in a folder."""

    def __init__(self, folder: Path):
        self.last, self.previous, self.best = (folder / f"{name}.pth" for name in ("last", "previous", "best"))

    def save_last(self, content: dict[str, Any]) -> None:
        """Save what a run needs to carry on; keep the file before it in case this one gets damaged."""
        if self.last.exists():
            os.replace(self.last, self.previous)
        checkpoint.save_atomically(content, self.last)

    def save_best(self, content: dict[str, Any]) -> None:
        """Save weights to use elsewhere."""
        checkpoint.save_atomically(content, self.best)

    def newest(self) -> tuple[dict[str, Any], Path, list[str]] | None:
        """The newest whole checkpoint of this folder, its path, and a line for each damaged one; None without any.

        Raises:
            UserError: there are some, and all are damaged.
        """
        damaged = []
        for path in (self.last, self.previous):
            if path.exists():
                try:
                    return checkpoint.read(path), path, damaged
                except checkpoint.DamagedFile as error:
                    damaged.append(str(error))
        if damaged:
            raise UserError(f"{'; '.join(damaged)}; remove the file to start anew, or choose another --tag")
        return None


def check_resumable(content: dict[str, Any], path: Path, global_batch: int, steps_per_epoch: int) -> None:
    """Refuse a checkpoint from which this run cannot carry on exactly."""
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
    if content["steps_per_epoch"] != steps_per_epoch:
        raise UserError(
            f"{path} was trained on data with {content['steps_per_epoch']} steps an epoch, DATA.DATA_PATH has "
            f"{steps_per_epoch}: use the same data, or start anew with --tag and --pretrained"
        )
