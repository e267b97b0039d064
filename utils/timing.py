"""How long something takes on a device that works while the host goes on."""

import time
from collections.abc import Callable

import torch


def synchronize() -> None:
    """Wait until the GPU has done all its work, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(run: Callable[[], object], times: int = 1) -> float:
    """Measure the mean of ``times`` runs, from an idle device to an idle device."""
    synchronize()
    began = time.perf_counter()
    for _ in range(times):
        run()
    synchronize()
    return (time.perf_counter() - began) / times
