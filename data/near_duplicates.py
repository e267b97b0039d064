"""Images that look alike: the same photograph in another size or quality, or the next frame of a film."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ROWS, COLUMNS = 16, 17
BITS = ROWS * (COLUMNS - 1)
ALIKE = 24
"""So many bits may differ. A JPEG written anew differs in 2 to 10, one of another size in 3 to 9; other photographs
differ in 128 on average, and hardly ever in fewer than 60."""
LEAST_CONTRAST = 8
"""Deviation of the grey levels; with less of it, noise decides."""
CHUNK = 4096
MOST_PAIRS = 10_000


def look_of(pixels: Tensor) -> np.ndarray:
    """Sum up what an image ``(3, H, W)`` looks like: a difference hash, ``(32,)`` uint8.

    A bit says of one of 16 x 16 places whether it is brighter than the one to the left of it. All are 0 where an image
    is too small or too dull to tell.
    """
    if pixels.shape[1] < ROWS or pixels.shape[2] < COLUMNS:
        return np.zeros(BITS // 8, np.uint8)
    grey = F.adaptive_avg_pool2d(pixels.float().mean(0, keepdim=True), (ROWS, COLUMNS))[0]
    brighter = (grey.diff(dim=1) > 0).flatten().numpy() & bool(grey.std() >= LEAST_CONTRAST)
    return np.packbits(brighter)


def pairs_alike(first: np.ndarray, second: np.ndarray) -> list[tuple[int, int]]:
    """Find the images of two collections that look alike, by their looks ``(N, 32)``; at most 10,000 pairs."""
    told = [np.flatnonzero(looks.any(axis=1)) for looks in (first, second)]
    pairs: list[tuple[int, int]] = []
    for rows in _chunks(told[0]):
        one = _as_signs(first[rows])
        for columns in _chunks(told[1]):  # of two bits the product is 1 where they are the same, else -1
            alike = (one @ _as_signs(second[columns]).T >= BITS - 2 * ALIKE).nonzero().numpy()
            pairs += zip(rows[alike[:, 0]].tolist(), columns[alike[:, 1]].tolist(), strict=True)
            if len(pairs) >= MOST_PAIRS:
                return pairs[:MOST_PAIRS]
    return pairs


def _chunks(numbers: np.ndarray) -> list[np.ndarray]:
    return [numbers[start : start + CHUNK] for start in range(0, len(numbers), CHUNK)]


def _as_signs(looks: np.ndarray) -> Tensor:
    return torch.from_numpy(np.unpackbits(looks, axis=1)).float() * 2 - 1
