"""Steps that were skipped because a gradient was not finite."""

import json

import torch
from torch import Tensor

from data.loading import TrainLoader
from data.phases import PhasedLoader


class SkippedSteps:
    """Counts them on the device. ``add`` never waits for it; the others do."""

    def __init__(self, device: torch.device):
        self._total, self._in_a_row, self._longest = (torch.zeros((), device=device) for _ in range(3))

    @torch.no_grad()
    def add(self, finite: Tensor) -> None:
        """Take one step: ``finite`` (0-d) is 1, or 0 for one that was skipped."""
        self._in_a_row = (self._in_a_row + 1) * (1 - finite)
        self._total = self._total + (1 - finite)
        self._longest = torch.maximum(self._longest, self._in_a_row)

    def content(self) -> dict[str, Tensor]:
        """What :meth:`restore` needs; the device is not waited for."""
        return {"total": self._total, "in_a_row": self._in_a_row}

    def restore(self, content: dict[str, Tensor]) -> None:
        """Count on from there."""
        for name, count in content.items():
            getattr(self, f"_{name}").copy_(count)

    def total(self) -> int:
        """How many so far."""
        return int(self._total)

    def longest(self) -> int:
        """The most in a row."""
        return int(self._longest)


def bad_batch(step: int, loader: TrainLoader | PhasedLoader) -> str:
    """The files that made up the last of ``step`` steps, over all ranks, as JSON."""
    keys = loader.global_batch_of(step - 1)
    images = [{"epoch": epoch + 1, "image": loader.dataset.index.name(i)} for epoch, i, *_ in keys]
    return json.dumps({"step": step, "images": images}, indent=1) + "\n"
