"""Libraries that tell their own story at length."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout


@contextmanager
def in_silence() -> Iterator[None]:
    """Keep what a library prints and warns of to itself; what matters of it is raised."""
    with warnings.catch_warnings(action="ignore"), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield
