"""What this machine is, and what it can do at best: what figures are measured on, and against."""

import os
import platform
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torchvision

from utils.timing import seconds

SECONDS_PER_PRODUCT = 0.2
COPIED_BYTES = 1 << 28
MATRIX_SIZE = {"cuda": 8192, "cpu": 2048}


def this_device() -> torch.device:
    """Choose the first GPU, or the CPU where there is none."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def machine() -> dict[str, str]:
    """Say what the figures are measured on."""
    return {
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU",
        "cpu": cpu_name(),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
    }


def cpu_name() -> str:
    """Name the CPU as Linux does; elsewhere by its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def matrix_product(device: torch.device, dtype: torch.dtype | None) -> Callable[[], float]:
    """Make a function that returns the TFLOP/s of the product of two large square matrices."""
    n = MATRIX_SIZE[device.type]
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    a @ b
    times = max(1, int(SECONDS_PER_PRODUCT / seconds(lambda: a @ b)))
    return lambda: 2 * n**3 / 1e12 / seconds(lambda: a @ b, times)


def copying(device: torch.device) -> Callable[[], float]:
    """Make a function that returns GB/s, read and written, of copying a large tensor."""
    source = torch.zeros(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    times = max(1, int(SECONDS_PER_PRODUCT / seconds(lambda: target.copy_(source))))
    return lambda: 2 * COPIED_BYTES / 1e9 / seconds(lambda: target.copy_(source), times)
