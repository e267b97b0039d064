"""The files that hold a run: written by a thread while training goes on, and found again when it starts anew."""

import math
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from utils import checkpoint
from utils.calendar import Calendar
from utils.errors import UserError
from utils.files import NotWritten, Unwritten, reason_of

NO_BEST = -math.inf
"""The best metric before the first evaluation."""
SECONDS_TO_NEXT_TRY = 300
"""When something could not be written, the next save comes so soon."""
MOST_EPOCHS_IN_MEMORY = 2
"""Of saves to be kept for good for which there was no space at all."""
WAITING = ".waiting"
"""Ends the name of a save that is to be kept for good while its own name cannot be written."""


class Checkpoints:
    """``last.pth`` and those before it, ``best.pth`` and ``epoch_0010.pth`` in a folder.

    Saving takes the time of a copy to the host's memory; a thread writes. The next save and :meth:`finish` wait for it.
    A file that cannot be written is reported and tried again with the next save, and training goes on: the files before
    it stay whole, the best weights are kept in memory, and in ``last.pth`` until they have a file of their own.

    Args:
        keep_last: how many of the latest saves to keep, each of another step.
        every_minutes: when :meth:`due` says so; 0 for never.
        may_write: called before a save is written; raises if it must not be.
        best_is: the name of the metric that the best weights go by.

    Attributes:
        unwritten: is told of files that could not be written.
    """

    def __init__(
        self,
        folder: Path,
        keep_last: int = 2,
        every_minutes: float = 0.0,
        may_write: Callable[[], None] = lambda: None,
        best_is: str = "top1",
    ):
        self.folder = folder
        older = ["previous.pth", *(f"previous_{number}.pth" for number in range(2, keep_last))]
        self.latest = [folder / name for name in ["last.pth", *older][:keep_last]]
        self.best = folder / "best.pth"
        self.unwritten = Unwritten()
        self._may_write = may_write
        self._best_is = best_is
        self._every_seconds = 60 * every_minutes
        self._saved_at = time.monotonic()
        self._host_copy, self._host_copy_of_best = HostCopy(), HostCopy()
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._writing: Future | None = None
        self._outcomes: list[Callable[[Unwritten], None]] = []
        self._steps: dict[Path, int | None] = {}  # what is known of the files in ``latest``
        self._owed_last: tuple[dict[str, Any], Path | None] | None = None
        self._owed_epochs: dict[Path, int] = {}  # saves that are there, but not under this name yet
        self._unsaved_epochs: dict[Path, dict[str, Any]] = {}  # those that are nowhere but in memory
        self._best_weights: dict[str, Any] = {}
        self._best_on_disk = NO_BEST

    @property
    def last(self) -> Path:
        return self.latest[0]

    def epoch_file(self, epoch: int) -> Path:
        return self.folder / f"epoch_{epoch:04d}.pth"

    def due(self) -> bool:
        """Whether the last save is long enough ago."""
        elapsed = time.monotonic() - self._saved_at
        return 0 < self._every_seconds <= elapsed or (elapsed >= SECONDS_TO_NEXT_TRY and self._owes())

    def save_last(self, content: dict[str, Any], epoch_to_keep: int | None = None) -> None:
        """Save what a run needs to carry on; under the epoch's name too, if that is to be kept for good."""
        self.wait()  # for the memory that the copy goes to, too
        if self._owed_last and self._owed_last[1]:
            self._host_copy = HostCopy()  # what is to be kept for good stays where it is until it is written
        kept_as = self.epoch_file(epoch_to_keep) if epoch_to_keep is not None else None
        self._start(self._write_last, self._host_copy(content), kept_as)
        self._saved_at = time.monotonic()

    def save_best(self, content: dict[str, Any]) -> None:
        """Save weights to use elsewhere, and their metrics, which say how good they are."""
        self.wait()
        self._best_weights = self._host_copy_of_best(content)
        self._start(self._write_best)

    def finish(self) -> None:
        """Wait until everything is written.

        Raises:
            UserError: something could not be.
        """
        self.wait()
        if self._owes():
            self._start(self._try_again)
            self.wait()
        self.unwritten.check()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error) -> None:
        self.wait()

    def _start(self, write: Callable, *arguments: Any) -> None:
        self._writing = self._thread.submit(self._write, write, *arguments)

    def _write(self, write: Callable, *arguments: Any) -> None:
        self._may_write()
        write(*arguments)

    def wait(self) -> None:
        """Wait for the file that is being written, and tell of those that could not be."""
        writing = self._writing
        try:
            if writing is not None:
                writing.result()  # a signal may raise here, and whoever comes next has to wait on
        finally:
            if writing is not None and writing.done():
                self._writing = None
            outcomes, self._outcomes = self._outcomes, []
            for tell in outcomes:
                tell(self.unwritten)

    def _attempt(self, path: Path, write: Callable[[], None]) -> bool:
        """Whether ``path`` could be written; :meth:`wait` reports it."""
        try:
            write()
        except NotWritten as error:
            problem = error
        except OSError as error:
            problem = NotWritten(path, reason_of(error), "it is tried again with the next save")
        else:
            self._outcomes.append(lambda unwritten: unwritten.written(path))
            return True
        self._outcomes.append(lambda unwritten: unwritten.failed(problem))
        return False

    def _owes(self) -> bool:
        return bool(
            self._owed_last
            or self._owed_epochs
            or self._unsaved_epochs
            or self._best_is_owed()
            or self._waiting_epochs()
        )

    def _try_again(self) -> None:
        if self._owed_last:
            self._write_last(*self._owed_last)
        else:
            self._write_best()
            self._write_epochs()

    def _write_last(self, content: dict[str, Any], kept_as: Path | None) -> None:
        self._write_best()
        self._write_epochs()

        def write() -> None:
            with checkpoint.written_beside(self.last, self._true_of_best(content)) as temporary:
                self._may_write()  # still: the process may have been stopped in between
                if kept_as:  # first, so that no kill can leave the save without it
                    self._keep(temporary, kept_as, content["step"])
                if self.last not in self._steps or content.get("step") != self._steps[self.last]:
                    self._move_older_saves()
                os.replace(temporary, self.last)
            self._steps[self.last] = content.get("step")

        if self._attempt(self.last, write):
            self._owed_last = None
            if kept_as:
                self._unsaved_epochs.pop(kept_as, None)
            return
        self._owed_last = content, kept_as
        if kept_as:
            self._unsaved_epochs[kept_as] = content
            for path in list(self._unsaved_epochs)[:-MOST_EPOCHS_IN_MEMORY]:
                del self._unsaved_epochs[path]
                self._outcomes.append(partial(Unwritten.give_up, path=path, what="there was no space for it"))

    def _true_of_best(self, content: dict[str, Any]) -> dict[str, Any]:
        """The content of a save that speaks of no best weights but those on disk, and has better ones in itself."""
        best = content.get("best", NO_BEST)
        return {
            **content,
            "best": min(best, self._best_on_disk),
            "owed_best": self._best_weights if best > self._best_on_disk and self._best_weights else None,
        }

    def _move_older_saves(self) -> None:
        """Let each take the name of the one before it, as far as one is missing; the oldest goes."""
        gap = next((i for i, path in enumerate(self.latest) if not path.exists()), None)
        for i in range(gap or len(self.latest) - 1, 0, -1) if gap != 0 else ():
            newer, older = self.latest[i - 1], self.latest[i]
            for kept_as, step in list(self._owed_epochs.items()):
                if step == self._steps.get(older):
                    with suppress(OSError):
                        os.replace(older, waiting_name(kept_as))
                    del self._owed_epochs[kept_as]
            if self._attempt(older, partial(os.replace, newer, older)):
                self._steps[older] = self._steps.pop(newer, None)

    def _keep(self, path: Path, kept_as: Path, step: int) -> bool:
        """Keep the save in ``path`` under the name of an epoch, or under one that will do until that can be written."""
        if self._attempt(kept_as, partial(checkpoint.name_too, path, kept_as)):
            self._owed_epochs.pop(kept_as, None)
            return True
        try:
            checkpoint.name_too(path, waiting_name(kept_as))
        except OSError:
            self._owed_epochs[kept_as] = step
        return False

    def _waiting_epochs(self) -> list[Path]:
        return list(self.folder.glob(f"epoch_*{WAITING}"))

    def _write_epochs(self) -> None:
        """Give the saves that are to be kept the names that they could not get so far."""
        for path in self._waiting_epochs():
            kept_as = path.with_name(path.name.removesuffix(WAITING))
            self._attempt(kept_as, partial(os.replace, path, kept_as))
        for kept_as, content in list(self._unsaved_epochs.items()):
            whole = {**self._true_of_best(content), "owed": {}}  # the run itself does not carry on from here
            if self._attempt(kept_as, partial(checkpoint.save_atomically, whole, kept_as)):
                del self._unsaved_epochs[kept_as]
        for kept_as, step in list(self._owed_epochs.items()):
            for path, holds in self._steps.items():
                if holds == step and self._keep(path, kept_as, step):
                    break

    def keep_missing(self, every: int, calendar: Calendar) -> None:
        """Keep those of the latest saves for good that are of an epoch that should have been kept and is not there."""
        newest = calendar.epoch_of(max((step for step in self._steps.values() if step), default=0))[0] // every * every
        if all(self.epoch_file(epoch).exists() for epoch in range(newest, 0, -every)[: len(self.latest)]):
            return
        for path in filter(Path.exists, self.latest):
            if path not in self._steps:
                with suppress(UserError):
                    self._steps[path] = checkpoint.read(path, sealed=True).get("step")
            epoch, steps_into_epoch = calendar.epoch_of(self._steps.get(path) or 1)
            kept_as = self.epoch_file(epoch)
            if epoch and not steps_into_epoch and epoch % every == 0 and not kept_as.exists():
                self._keep(path, kept_as, calendar.first_step(epoch))

    def _best_is_owed(self) -> bool:
        on_disk = self.best.is_file() and self._best_weights.get(self._best_is) == self._best_on_disk
        return bool(self._best_weights) and not on_disk

    def _write_best(self) -> None:
        """Write the best weights unless their file has them."""

        def write() -> None:
            with checkpoint.written_beside(self.best, self._best_weights) as temporary:
                self._may_write()
                os.replace(temporary, self.best)

        if self._best_is_owed() and self._attempt(self.best, write):
            self._best_on_disk = cast(float, self._best_weights.get(self._best_is))
        if not self.best.is_file():
            self._best_on_disk = NO_BEST

    def know_best(self, best: float, owed: dict[str, Any] | None) -> tuple[float, list[str]]:
        """Look after the best weights of a run that is carried on: it says that their file has the metric ``best``.

        Args:
            best: NO_BEST if there is no file.
            owed: better ones, whose file could not be written.

        Returns:
            the metric of those that are there, and a line if that is less than the run says.
        """
        there: dict[str, Any] = {}
        if best > NO_BEST:
            with suppress(UserError):
                there = checkpoint.read(self.best, sealed=True)
        self._best_on_disk = min(best, there.get(self._best_is, NO_BEST))
        if owed and self._best_is in owed:
            self._best_weights = owed
            return owed[self._best_is], []
        if there.get(self._best_is) == self._best_on_disk:
            self._best_weights = there
        if self._best_on_disk == best:
            return best, []
        line = f"{self.best} does not hold the weights of {self._best_is} {best:.2f}: the best is sought anew"
        return self._best_on_disk, [line]

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest whole checkpoint of this folder, if any, and a line for each damaged one, which is renamed.

        Raises:
            UserError: there are some, and all are damaged.
        """
        damaged: list[str] = []
        for path in self.latest:
            if path.exists():
                try:
                    self._steps[path] = checkpoint.read(path, sealed=True).get("step")
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


def waiting_name(kept_as: Path) -> Path:
    """Where a save waits for the name ``epoch_0010.pth``."""
    return kept_as.with_name(kept_as.name + WAITING)
