"""Everything random is derived from (seed, where it is used); nothing random is ever stored."""

import hashlib
import random

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """A 64-bit number that depends on every part and on nothing else (not on the process, nor on versions)."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def seed_cpu(seed: int) -> None:
    """Seed Python's, numpy's and torch's global generators on the CPU.

    ``torch.manual_seed`` would visit every device and cost 80 times as much: too slow for each image.
    """
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.random.default_generator.manual_seed(seed)


def seed_everything(device: torch.device, *parts: int | str) -> None:
    """Seed the generators of the CPU and of ``device`` from ``parts``. Does not wait for the device."""
    seed = derive_seed(*parts)
    seed_cpu(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)
