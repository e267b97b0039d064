"""How far a command has come that takes long."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

SECONDS_BETWEEN_LINES = 30

Part = TypeVar("Part")


def with_progress(parts: Iterable[Part], title: str, total: int, size: Callable[[Part], int]) -> Iterator[Part]:
    """Yield the parts as they come, with a live bar on a terminal and a plain line now and then in a file.

    Each has ``size(part)`` images, and all together have ``total``.
    """
    live = Console().is_terminal
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[facts]}")
    began, said, done = time.perf_counter(), -math.inf, 0
    with Progress(*columns, disable=not live) as bar:
        task = bar.add_task(title, total=total, facts="")
        for part in parts:
            done += size(part)
            now = time.perf_counter()
            rate = done / (now - began)
            left = timedelta(seconds=round((total - done) / rate))
            facts = f"{done:,}/{total:,} images  {rate:,.0f} images/s  {left} left"
            bar.update(task, completed=done, facts=facts)
            if not live and (done == total or now - said > SECONDS_BETWEEN_LINES):
                said = now
                print(f"{title}  {facts}", flush=True)
            yield part
