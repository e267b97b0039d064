"""The files that hold a run: written by a thread while training goes on, and found again when it starts anew."""

import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils import checkpoint
from utils.errors import UserError


class Checkpoints:
    """``last.pth`` and those before it, ``best.pth`` and ``epoch_0010.pth`` in a folder.

    Saving takes the time of a copy to the host's memory; a thread writes. The next save and :meth:`finish` wait for it.
    A file that cannot be written is reported, and training goes on: the files before it stay whole.

    Args:
        keep_last: how many of the latest saves to keep.
        every_minutes: when :meth:`due` says so; 0 for never.
    """

    def __init__(self, folder: Path, keep_last: int = 2, every_minutes: float = 0.0):
        self.folder = folder
        older = ["previous.pth", *(f"previous_{number}.pth" for number in range(2, keep_last))]
        self.latest = [folder / name for name in ["last.pth", *older][:keep_last]]
        self.best = folder / "best.pth"
        self.on_problem: Callable[[str], None] = print
        self._every_seconds = 60 * every_minutes
        self._saved_at = time.monotonic()
        self._host_copy = HostCopy()
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._writing: Future | None = None
        self._unsaved = ""

    @property
    def last(self) -> Path:
        return self.latest[0]

    def due(self) -> bool:
        """Whether the last save is long enough ago."""
        return 0 < self._every_seconds <= time.monotonic() - self._saved_at

    def save_last(self, content: dict[str, Any], epoch_to_keep: int | None = None) -> None:
        """Save what a run needs to carry on; under the epoch's name too, if that is to be kept for good."""
        kept_as = self.folder / f"epoch_{epoch_to_keep:04d}.pth" if epoch_to_keep is not None else None
        self._start(self._write_last, content, kept_as)
        self._saved_at = time.monotonic()

    def save_best(self, content: dict[str, Any]) -> None:
        """Save weights to use elsewhere."""
        self._start(checkpoint.save_atomically, content, self.best)

    def finish(self) -> None:
        """Wait until everything is written.

        Raises:
            UserError: the last save of the run's state could not be.
        """
        self._wait()
        if self._unsaved:
            raise UserError(self._unsaved)

    def _start(self, write: Callable, content: dict[str, Any], *arguments: Any) -> None:
        self._wait()  # for the memory that the copy goes to, too
        self._writing = self._thread.submit(write, self._host_copy(content), *arguments)

    def _wait(self) -> None:
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        try:
            writing.result()
        except UserError as error:
            self.on_problem(f"error: {error}")

    def _write_last(self, content: dict[str, Any], kept_as: Path | None) -> None:
        try:
            checkpoint.save_atomically(content, self.last, keep=self.latest[1:])
        except UserError as error:
            self._unsaved = str(error)
            raise
        self._unsaved = ""
        if kept_as:
            keep_as(self.last, kept_as)

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest whole checkpoint of this folder, if any, and a line for each damaged one, which is renamed.

        Raises:
            UserError: there are some, and all are damaged.
        """
        damaged = []
        for path in self.latest:
            if path.exists():
                try:
                    checkpoint.read(path, sealed=True)
                    return path, damaged
                except (checkpoint.DamagedFile, checkpoint.RefusedFile) as error:
                    os.replace(path, path.with_suffix(".pth.corrupt"))  # out of the way of the next save
                    damaged.append(f"{error} (now {path.name}.corrupt)")
        if damaged:
            raise UserError(f"{'; '.join(damaged)}; the same command again starts anew")
        return None, []


class HostCopy:
    """Copies nested dicts and lists of tensors to the host, into memory that is allocated once and used again."""

    def __init__(self) -> None:
        self._buffers: dict[tuple, Tensor] = {}

    def __call__(self, content: Any) -> Any:
        """The copy; valid until the next one. Waits for the device."""
        copied = self._copy(content, ())
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        return copied

    def _copy(self, value: Any, key: tuple) -> Any:
        if isinstance(value, dict):
            return {name: self._copy(item, (*key, name)) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._copy(item, (*key, i)) for i, item in enumerate(value))
        if not isinstance(value, Tensor):
            return value
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            buffer = self._buffers[key] = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return buffer.copy_(value.detach(), non_blocking=True)


def keep_as(path: Path, name: Path) -> None:
    """Another name for a file, or a copy where the file system has no such thing."""
    with suppress(FileNotFoundError):
        name.unlink()
    try:
        os.link(path, name)
    except OSError:
        try:
            shutil.copyfile(path, name)
        except OSError as error:
            name.unlink(missing_ok=True)
            raise UserError(f"{name} cannot be written: {error.strerror}; {path} is whole") from error
