"""Averages that stay on the device until somebody reads them."""

import resource
import sys
import time

import torch

from utils.distributed import sum_over_ranks, world_size


class DeviceMeters:
    """Means over steps and ranks. ``add`` never waits for the device; ``read`` does, and starts afresh."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._count = 0

    @torch.no_grad()
    def add(self, **values: torch.Tensor) -> None:
        """Take one step's values (0-d tensors)."""
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._count += 1

    def read(self) -> dict[str, float]:
        """Mean of each value since the last read, over all ranks. A collective: every rank must call it."""
        names = sorted(self._sums)
        total = sum_over_ranks(torch.stack([self._sums[name] for name in names]))
        means = (total / (self._count * world_size())).tolist()
        self._sums, self._count = {}, 0
        return dict(zip(names, means, strict=True))


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
