"""How far a command has come that takes long."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

from utils.bar import Fact, bar, share_done

SECONDS_BETWEEN_LINES = 30

Part = TypeVar("Part")


def with_progress(parts: Iterable[Part], title: str, total: int, size: Callable[[Part], int]) -> Iterator[Part]:
    """Yield the parts as they come, with a live bar on a terminal and a plain line now and then in a file.

    Each has ``size(part)`` images, and all together have ``total``.
    """
    bar.start(title)
    began, said, done = time.perf_counter(), -math.inf, 0
    try:
        for part in parts:
            done += size(part)
            now = time.perf_counter()
            speed = f"{done / (now - began):,.0f} images/s"
            left = f"{timedelta(seconds=round((total - done) * (now - began) / max(done, 1)))} left"
            if bar.is_live:
                bar.show([Fact(title, 1), *share_done(done, total, "images"), Fact(speed, 4), Fact(left, 2)])
            elif done == total or now - said > SECONDS_BETWEEN_LINES:
                said = now
                print(f"{title}  {done:,}/{total:,} images  {speed}  {left}", flush=True)
            yield part
    finally:
        bar.stop()
