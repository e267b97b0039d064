"""Measured outputs of published dense networks (tests/data/dense_heads), and the weights and images they are of."""

import json
import zlib

import numpy as np
import torch
from conftest import ROOT
from torch import Tensor

FOLDER = ROOT / "tests/data/dense_heads"
GROUPS = dict(group_size=(7, 7, 7, 7), interval=(8, 4, 2, 1))
"""Of small in dense tasks."""


def read(variant: str, head: str) -> tuple[dict, dict[str, Tensor], dict[str, Tensor]]:
    """What was measured, numbers and arrays, and the weights that it was measured with."""
    told = json.loads((FOLDER / f"{variant}_{head}.json").read_text())
    with np.load(FOLDER / f"{variant}_{head}.npz") as arrays:
        measured = {key: torch.from_numpy(arrays[key]) for key in arrays}
    weights = {key: weight(key, shape, told["special_fill"]) for key, shape in told["state_dict"].items()}
    return told, measured, weights


def weight(key: str, shape: list[int], special: dict) -> Tensor:
    """What the reference's rule gives a key."""
    drawn = np.random.RandomState(zlib.crc32(key.encode()) & 0xFFFFFFFF).standard_normal(shape).astype(np.float32)
    if key.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.long)
    if len(shape) >= 2:
        drawn *= np.float32(np.prod(shape[1:])) ** np.float32(-0.5)
    elif key.endswith(".weight"):
        drawn = 1 + np.float32(0.1) * drawn
    elif key.endswith(".running_var"):
        drawn = 1 + np.float32(0.1) * np.abs(drawn)
    else:
        drawn = np.float32(0.1) * drawn
    multiplier, offset = special.get(key, (1, 0))
    return torch.from_numpy(np.float32(multiplier) * drawn + np.float32(offset))


def images(seed: int, count: int) -> Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal((count, 3, 160, 224)).astype(np.float32))


def check(measured: dict, name: str, value: Tensor, atol: float = 1e-4) -> None:
    assert list(value.shape) == measured[f"{name}_shape"].tolist()
    value, samples = value.detach(), measured[f"{name}_samples"]
    places = np.linspace(0, value.numel() - 1, len(samples)).astype(np.int64)
    torch.testing.assert_close(value.flatten()[places].float(), samples, rtol=0, atol=atol)
    of_all = torch.stack([value.mean(), value.std(correction=0), value.abs().max()]).float()
    torch.testing.assert_close(of_all, measured[f"{name}_mean_std_absmax"], rtol=0, atol=atol)
