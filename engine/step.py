"""One optimizer step: forward, loss, backward, clip and update. It exists once, here."""

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from data.loading import Batch
from engine.model import begin_step
from engine.precision import Precision
from optimizer import step_if
from tasks import Task
from utils import parallel
from utils.distributed import rank
from utils.randomness import seed_everything


class StepResult(NamedTuple):
    """What a step has come to, as 0-d tensors on the device, which is not waited for.

    Attributes:
        loss: the mean over this rank's samples.
        terms: the named parts of the loss, likewise.
        grad_norm: before clipping.
        finite: 1, or 0 for a step that was skipped because a gradient was not finite.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    grad_norm: Tensor
    finite: Tensor


class TrainStep:
    """Takes optimizer steps: micro-batches in, what they have come to out.

    Args:
        task: prepares a batch on the device and tells its loss.
        model: wrapped for its device (:func:`utils.parallel.wrap`).
        scaler: of the loss, as ``precision`` makes it.
        seed: of the run, from which everything random in a step is derived.
        max_norm: of the gradient; infinite does not clip.
        accumulation: micro-batches of a step.
        parts: into how many a micro-batch is cut on the device, for want of memory.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler,
        precision: Precision,
        *,
        seed: int = 0,
        max_norm: float = float("inf"),
        accumulation: int = 1,
        parts: int = 1,
    ):
        self.task, self.model, self.optimizer, self.scaler, self.precision = task, model, optimizer, scaler, precision
        self.seed, self.max_norm, self.accumulation, self.parts = seed, max_norm, accumulation, parts
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def __call__(self, step: int, micro_batches: Iterator[Batch]) -> StepResult:
        """Take the step with this number."""
        return self.update(*self.accumulate(step, micro_batches))

    def accumulate(self, step: int, micro_batches: Iterator[Batch]) -> tuple[Tensor, dict[str, Tensor]]:
        """Add up the gradients of the next micro-batches; returns the loss and its terms."""
        device, last = self.precision.device, self.accumulation - 1
        total = torch.zeros((), device=device)
        terms: dict[str, Tensor] = {}
        begin_step(self.model)
        for micro_step in range(self.accumulation):
            batch = next(micro_batches)
            seed_everything(device, self.seed, "step", step, micro_step, rank())  # nothing random is ever stored
            batch = self.task.prepare(batch)
            for number, part in enumerate(cut(batch, self.parts), start=1):
                share = len(part.images) / len(batch.images) / self.accumulation
                with parallel.sync(self.model, on=micro_step == last and number == self.parts):
                    with self.precision.autocast():
                        loss, of_part = self.task.loss(self.model, part)
                        loss = loss * share
                    self.scaler.scale(loss).backward()
                total += loss.detach()
                for name, term in of_part.items():
                    terms[name] = terms.get(name, 0) + term.detach() * share
        return total, terms

    def update(self, loss: Tensor, terms: dict[str, Tensor]) -> StepResult:
        """Clip the gradients, let the optimizer step unless one of them is not finite, and clear them."""
        self.scaler.unscale_(self.optimizer)
        grad_norm = parallel.clip_grad_norm(self.parameters, self.max_norm)
        finite = torch.isfinite(grad_norm)
        step_if(finite, self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return StepResult(loss, terms, grad_norm, finite.float())


def cut(batch: Batch, parts: int) -> list[Batch]:
    """The samples of a batch in so many batches."""
    pieces = (tensor.tensor_split(parts) for tensor in cast(tuple[Tensor, ...], batch))
    return [batch] if parts == 1 else [Batch(*piece) for piece in zip(*pieces, strict=True)]
