"""Averages that stay on the device until somebody reads them."""

import math
import resource
import statistics
import sys
import time
from collections import deque

import torch

from utils.distributed import rank, sum_over_ranks, world_size

SPIKE_MEMORY = 50
SPIKE_DEVIATIONS = 6


class DeviceMeters:
    """Means over steps and ranks. ``add`` never waits for the device; ``read`` does, and starts afresh."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def add(self, counts: torch.Tensor, **values: torch.Tensor) -> None:
        """Take one step's values (0-d tensors), if ``counts`` (0-d, 1 or 0) is 1."""
        for name, value in {**values, "": torch.ones_like(counts)}.items():
            value = torch.where(counts > 0, value.detach().float(), 0.0)
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def read(self) -> dict[str, float]:
        """Mean of each value since the last read, over all ranks. A collective: every rank must call it."""
        names = sorted(self._sums)
        sums = dict(zip(names, sum_over_ranks(torch.stack([self._sums[name] for name in names])).tolist(), strict=True))
        count = sums.pop("")
        self._sums = {}
        return {name: value / count if count else float("nan") for name, value in sums.items()}

    def content(self, of_all: bool = True) -> dict[str, torch.Tensor]:
        """What has not been read yet, ``(ranks,)`` each, for :meth:`restore`. A collective if it is of all ranks."""
        names = sorted(self._sums)
        if not names:
            return {}
        sums = self._sums[names[0]].new_zeros(world_size(), len(names))
        sums[rank()] = torch.stack([self._sums[name] for name in names])
        return dict(zip(names, (sum_over_ranks(sums) if of_all else sums).unbind(1), strict=True))

    def restore(self, content: dict[str, torch.Tensor], device: torch.device) -> None:
        """Go on from there; with another number of ranks the first one takes what all had."""
        for name, sums in content.items():
            mine = sums[rank()] if len(sums) == world_size() else sums.sum() * (rank() == 0)
            self._sums[name] = mine.to(device)


class SpikeDetector:
    """Tells a loss that is far above those before it."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=SPIKE_MEMORY)

    def is_spike(self, loss: float) -> bool:
        """Whether ``loss`` lies more than SPIKE_DEVIATIONS above the last ones."""
        known = [value for value in self._losses if math.isfinite(value)]
        self._losses.append(loss)
        if len(known) < SPIKE_MEMORY // 2:
            return False
        return loss > statistics.mean(known) + SPIKE_DEVIATIONS * max(statistics.stdev(known), 1e-3)


class Stopwatch:
    """Images per second of the whole run and the share of time spent waiting for data, since the last read."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget what was measured, for example after an evaluation."""
        self._start, self._waited, self._images = time.perf_counter(), 0.0, 0

    def waited(self, seconds: float) -> None:
        self._waited += seconds

    def images(self, count: int) -> None:
        self._images += count

    def read(self) -> dict[str, float]:
        elapsed = time.perf_counter() - self._start
        values = {"images_per_second": self._images / elapsed, "data_wait": self._waited / elapsed}
        self.restart()
        return values


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory used so far: on the GPU, or by this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
