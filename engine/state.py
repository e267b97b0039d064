"""What a run consists of besides its config and data."""

import math
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from config import Config, default_config, differing_settings, flatten, may_change, must_stay, settings_in
from engine import validation
from engine.ema import Ema
from models import load_weights
from utils import parallel
from utils.calendar import Calendar, Span
from utils.checkpoint import choose, weights_in
from utils.distributed import broadcast_from_main
from utils.errors import UserError
from utils.fields import CARRIED, NEEDED, check_fields, upgrade


@dataclass
class TrainState:
    """Weights, optimizer, moving average, loss scale, steps done, best score: all that a run changes.

    There is no state of random generators, data loader or schedule: they are derived from the step.

    Attributes:
        best: the metric that the task goes by, of the best weights so far.
        evaluations_since_best: how many in a row have brought nothing better.
        carried: CARRIED of the checkpoint that the run goes on from, for whom it concerns.
        changing: held while weights, step and the rest change.
        whole: whether they fit each other.
    """

    model: nn.Module
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    ema: Ema | None
    step: int = 0
    best: float = -math.inf
    evaluated_step: int = 0
    evaluations_since_best: int = 0
    carried: dict[str, Any] = field(default_factory=dict)
    changing: threading.RLock = field(default_factory=threading.RLock)
    whole: bool = True
    _finished: torch.cuda.Event | None = None
    _buffers: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def sharded(self) -> bool:
        """Whether each rank has only its share."""
        return parallel.is_sharded(self.model)

    def begin_step(self) -> None:
        """Remember what a forward pass changes, BatchNorm's statistics, in case the step is never finished."""
        with self.changing:
            self._buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}

    @contextmanager
    def change(self) -> Iterator[None]:
        """Change weights, optimizer and step in this block, which nobody may save in the middle of."""
        with self.changing:
            self.whole = False
            yield
            self.whole = True

    def advance(self, finite: Tensor) -> None:
        """Take note that a step is done; the moving average follows if it was ``finite`` (0-d, 1 or 0)."""
        if self.ema:
            self.ema.update(self.model, self.step + 1, finite)
        self.step += 1
        self._buffers = {}
        if torch.cuda.is_initialized():
            self._finished = torch.cuda.current_stream().record_event()

    def candidates(self) -> dict[str, nn.Module]:
        """The networks to evaluate: the model, and its moving average where there is one."""
        return {"model": self.model, **({"ema": self.ema.module} if self.ema else {})}

    def on_another_stream(self) -> AbstractContextManager:
        """Let a GPU copy the state as it was after the last step, whatever the stream in use is waiting for."""
        if self._finished is None:
            return nullcontext()
        stream = torch.cuda.Stream()
        stream.wait_event(self._finished)
        return torch.cuda.stream(stream)

    def content_before_step(self) -> dict[str, Any]:
        """The same as :meth:`content` in the middle of a step: what was there before it."""
        content = self.content()
        content["model"].update((name, value) for name, value in self._buffers.items() if name in content["model"])
        return content

    def content(self) -> dict[str, Any]:
        """What :meth:`restore` needs."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "step": self.step,
            "best": self.best,
            "evaluated_step": self.evaluated_step,
            "evaluations_since_best": self.evaluations_since_best,
        }

    def restore(self, content: dict[str, Any], path: Path) -> None:
        """Be as when ``content`` was saved."""
        if self.ema and not content.get("ema"):
            raise UserError(f"{path} holds no moving average, but TRAIN.EMA_DECAY is set; keep it at 0 or start anew")
        optimizer_state = validation.optimizer_state(content["optimizer"], self.optimizer, path)
        scale = validation.check_scaler(content["scaler"], path)
        weights = weights_in(content, path)
        load_weights(self.model, choose(weights, "model", path)[1], str(path), allow_new_head=False)
        if self.ema:
            average = choose(weights, "ema", path)[1]
            load_weights(self.ema.module, average, f"the moving average in {path}", allow_new_head=False)
        self.optimizer.load_state_dict(optimizer_state)  # weight decay and the like in it are the config's
        self.scaler.load_state_dict(scale or self.scaler.state_dict())
        self.step, self.best = content["step"], content["best"]
        self.evaluated_step = content["evaluated_step"]
        self.evaluations_since_best = content.get("evaluations_since_best", 0)
        self.carried = {key: content[key] for key in CARRIED if key in content}

    def share_buffers(self) -> None:
        """Give every rank rank 0's buffers, such as BatchNorm's statistics, so that all evaluate the same model."""
        for buffer in chain(*(model.buffers() for model in self.candidates().values())):
            broadcast_from_main(buffer)


def check_resumable(content: dict[str, Any], path: Path, config: Config, images: int, same_run: bool) -> list[str]:
    """Refuse a checkpoint from which this run cannot carry on, unless TRAIN.FORCE_RESUME says so.

    Args:
        same_run: it is of this run's own results folder, whose settings may not change by mistake.

    Returns:
        a line for each setting that may change the result and differs from the run so far.
    """
    upgrade(content)
    missing = [key for key in NEEDED if key not in content]
    if missing:
        raise UserError(
            f"{path} holds no {missing[0]}, so a run cannot carry on from it: "
            "to start a run from its weights use --pretrained instead of --resume"
        )
    check_fields(content, path)
    lines = []
    if content["images"] != images:
        problem = f"{path} was trained on {content['images']:,} images, DATA.DATA_PATH has {images:,}"
        if not config.TRAIN.FORCE_RESUME:
            raise UserError(
                f"{problem}, which changes their order: use the same data (DATA.ON_BAD_IMAGE skip for bad images; "
                "docs/data.md says which files are images), "
                "start anew with another --tag, or carry on all the same with --force-resume"
            )
        lines.append(problem)
    elsewhere = same_run and Path(config.MODEL.RESUME).resolve().parent != path.resolve().parent
    differing = differing_settings(content["config"], config)
    differing = [setting for setting in differing if setting[0] != "MODEL.RESUME" or elsewhere]
    for key, before, now in differing:
        if must_stay(key):
            raise UserError(f"{path} was trained with {key} {before}, this run has {now}: keep it, or use --pretrained")
    refused = [(key, before, now) for key, before, now in differing if not may_change(key, before, now)]
    if refused and same_run and not config.TRAIN.FORCE_RESUME:
        settings = ", ".join(f"{key} was {before!r}, is now {now!r}" for key, before, now in refused)
        raise UserError(
            f"{path} is of a run with other settings: {settings}; start anew with another --tag, give the old "
            f"value{'s' if len(refused) > 1 else ''}, or carry on all the same with --force-resume"
        )
    return [*lines, *(f"{key} was {before}, is now {now}" for key, before, now in differing)]


def images_of_a_process(dumped: str) -> int:
    """How many images each process takes in a step, as a dumped config says."""
    settings = flatten(default_config()) | settings_in(dumped, "the checkpoint")
    return settings["DATA.BATCH_SIZE"] * settings["TRAIN.ACCUMULATION_STEPS"]


def step_after(content: dict[str, Any], calendar: Calendar, path: Path) -> int:
    """The step to carry on at: the one that was next, or with another global batch the one at its place in the epoch.

    Images that a step would have only in part are seen again.
    """
    before, now, spans = content["global_batch"], calendar.global_batch, content.get("calendar")
    there = Calendar(*(Span(*span) for span in spans)) if spans else None
    if (there and not there.is_even) or not calendar.is_even:
        if there and there.until(content["step"]) != calendar.until(content["step"]):
            raise UserError(
                f"{path} has trained with batches that TRAIN.CURRICULUM now has in other epochs, so its step is of "
                "another place in the data: keep DATA.BATCH_SIZE, the accumulation, the processes, and shares of "
                "TRAIN.EPOCHS that lie behind"
            )
        return content["step"]
    if before == now:
        return content["step"]
    epoch, steps_into_epoch = divmod(content["step"], content["images"] // before)
    steps_per_epoch = calendar.first_step(1)
    return epoch * steps_per_epoch + min(steps_into_epoch * before // now, steps_per_epoch)
