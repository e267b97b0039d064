"""Stopping a run from outside without losing a step: SIGTERM, SIGUSR1 (Slurm's warning), SIGHUP and Ctrl-C."""

import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from utils.bar import bar
from utils.distributed import is_main
from utils.errors import UserError
from utils.launchers import is_torchrun
from utils.processes import CTRL_C_STATUS, STOP_SIGNALS

MAY_BE_IGNORED = (signal.SIGHUP, signal.SIGINT)
"""By ``nohup`` and by a shell that starts something in the background; that stays so."""
SAME_CTRL_C_SECONDS = 2
"""A launcher may hand on the Ctrl-C that the terminal has sent to all processes: that is no second one."""
PATIENCE_SECONDS = 5
"""So long the main thread has to answer; who has sent a signal expects an end within ten."""
SECONDS_TO_FORK = 0.2
SECONDS_FOR_NEWS = 3
"""So long after an error that another rank's end may have caused, word may come that it was asked to stop."""
END = 0
"""What is no signal's number."""


class Stopped(BaseException):
    """Raised in the main thread when a signal ends the run: at once where nothing would be lost, else after a save."""

    def __init__(self, request: "StopRequest"):
        super().__init__(request)
        self.request = request


class StopRequest:
    """What a signal does to this process.

    While steps are taken (after :meth:`defer`) a signal waits until the loop asks (:meth:`agreed`), and all ranks stop
    after the same step. At any other time it raises :class:`Stopped` in the main thread. If the main thread does not
    answer, because it compiles, waits for data or for another rank, a thread calls ``rescue`` and ends the process.
    The second Ctrl-C ends it at once. Processes that are forked meanwhile, as the loader's, ignore all of these
    signals: they end with their trainer.

    Attributes:
        signal: the first one that has come; 0 for none.
        rescue: saves what it can while the main thread is stuck; returns what to say. None before training begins.
        say: tells it to whoever watches.
        agreed_by_all: whether every rank knows of it.
        patience: seconds that the main thread has to answer.
    """

    def __init__(self) -> None:
        self.signal = 0
        self.rescue: Callable[[], str] | None = None
        self.say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)
        self.patience: float = PATIENCE_SECONDS
        self._handlers: dict[int, Any] = {}
        self._deferred = self._forking = False
        self.agreed_by_all = False
        self._error = ""
        self._answered = threading.Event()
        self._stopped_by = 0
        self._asked = torch.zeros(1, dtype=torch.int32)
        self._answer: dist.Work | None = None

    def __enter__(self) -> "StopRequest":
        """Take the signals of this process. Only its main thread can do so; in another this takes none."""
        self._in_charge = threading.current_thread() is threading.main_thread()
        if not self._in_charge:
            return self
        self._wake_up, self._writer = socket.socketpair()  # Python itself writes there, whatever the main thread does
        self._writer.setblocking(False)
        self._wake_up_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            if number not in MAY_BE_IGNORED or signal.getsignal(number) != signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, self._take)
        self._thread = threading.Thread(target=self._guard, name="signals", daemon=True)
        self._thread.start()
        _listening.append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error) -> None:
        if (
            not self._in_charge or kind is Stopped
        ):  # the process is about to end, and what else comes is to change nothing
            return
        _listening.remove(self)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wake_up_before)
        self._writer.send(bytes([END]))
        self._thread.join()
        self._writer.close()
        self._wake_up.close()

    @property
    def name(self) -> str:
        """What asked for it."""
        return "Ctrl-C" if self.signal == signal.SIGINT else signal.Signals(self.signal).name

    @property
    def answered(self) -> bool:
        """Whether the main thread sees to the end of the run."""
        return self._answered.is_set()

    @property
    def status(self) -> int:
        """The exit status of a run that has ended as it should: 130 if Ctrl-C has stopped it, else 0.

        Under a launcher 0 too, which would take anything else for a failure and start the process again.
        """
        return CTRL_C_STATUS if self._stopped_by == signal.SIGINT and not is_torchrun() else 0

    def defer(self) -> None:
        """From now on let a signal wait until :meth:`agreed` is asked."""
        self._deferred = True

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Let a signal, and one that has come already, raise :class:`Stopped` within this block."""
        before, self._deferred = self._deferred, False
        try:
            if self.signal:
                raise Stopped(self)
            yield
        except BaseException:
            before = True  # one is enough, and after an error it is for the other thread to answer
            raise
        finally:
            self._deferred = before

    def agreed(self) -> bool:
        """Whether to stop now. Every rank must ask after every step, and all get the same answer.

        The ranks exchange what they know while the next step runs, so that nobody waits: with several, a request
        takes effect one step later.
        """
        stop = bool(self.signal)
        if dist.is_initialized():
            stop = self.settle()
            self._asked.fill_(self.signal)
            self._answer = dist.all_reduce(self._asked, dist.ReduceOp.MAX, async_op=True)
        if stop:
            self.agreed_by_all = dist.is_initialized()
            self.answer()
        return stop

    def settle(self) -> bool:
        """Wait for the answer that is under way, if any; returns whether somebody has asked to stop."""
        if self._answer is None:
            return False
        self._answer.wait()
        self._answer = None
        self.signal = self.signal or int(self._asked)
        return bool(self._asked)

    def answer(self) -> None:
        """The main thread sees to the end of the run, however long its last save takes."""
        self._stopped_by = self.signal
        self._answered.set()

    def outlast(self, error: Exception) -> None:
        """Find out whether an error comes of another rank's end: if a signal has come the process ends here.

        The other thread ends it, as soon as it has saved what it can. If this one has already begun to answer, it saves
        alone what the ranks could not save together. Without a signal this returns.
        """
        self._error = "".join(traceback.format_exception_only(error)).strip()
        deadline = time.monotonic() + SECONDS_FOR_NEWS
        while time.monotonic() < deadline or (self.signal and not self.answered):
            time.sleep(0.1)
        if self.signal:
            self.leave(*self._rescued())

    def describe(self) -> str:
        """What to say of a run that has ended before the loop could answer."""
        carries_on = "; the same command carries on from the last save" if self.rescue else " before training began"
        return f"stopped by {self.name}{carries_on}"

    def leave(self, status: int, text: str) -> NoReturn:
        """End the process at once, after a line that says why."""
        threading.Timer(PATIENCE_SECONDS, os._exit, [status]).start()  # who should read the line may be stuck too
        try:
            bar.stop()
            if text:
                self.say(text)
        finally:
            os._exit(status)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.signal = self.signal or number
        if self._forking:  # what is raised in the hooks of a fork is lost; the same signal again finds it done
            threading.Timer(SECONDS_TO_FORK, os.kill, (os.getpid(), number)).start()
        elif not self._deferred and not self._answered.is_set():
            self._deferred = True  # once is enough
            raise Stopped(self)

    def _rescued(self) -> tuple[int, str]:
        """The exit status after what could be saved is, and what to say of it."""
        try:
            text = self.rescue() if self.rescue else self.describe() * is_main()
        except UserError as error:
            return 2, f"error: {error}"
        except Exception as error:  # a bug of ours, and nobody else to tell of it
            return 1, "".join(traceback.format_exception(error)).rstrip()
        if self._error and text:
            text += f" (after {self._error.splitlines()[0]})"
        return self.status, text

    def _end_unanswered(self) -> None:
        self._stopped_by = self.signal
        self.leave(*self._rescued())

    def _guard(self) -> None:
        first, ending = None, False
        while True:
            waits = not ending and not self._answered.is_set()
            left = max(0.0, first + self.patience - time.monotonic()) if first is not None and waits else None
            if not select.select([self._wake_up], [], [], left)[0]:
                if not self._answered.is_set():
                    ending = True
                    threading.Thread(target=self._end_unanswered, name="rescue", daemon=True).start()
                continue
            number = self._wake_up.recv(1)[0]
            if number == END:
                return
            if number not in STOP_SIGNALS:
                continue
            self.signal = self.signal or number
            if first is None:
                first = time.monotonic()
            elif number == signal.SIGINT and time.monotonic() - first > SAME_CTRL_C_SECONDS:
                self.leave(CTRL_C_STATUS, "\nstopped at once by a second Ctrl-C; the last save is whole")


_listening: list[StopRequest] = []


def _hold_signals() -> None:
    if _listening:
        _listening[-1]._forking = True
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def _release_signals() -> None:
    if _listening:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # a signal that waits is taken here, in a hook still
        _listening[-1]._forking = False


def _ignore_signals() -> None:
    """In a new process: its trainer decides. What would be written to is the trainer's too."""
    if _listening:
        signal.set_wakeup_fd(-1)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        _release_signals()
        _listening.clear()


os.register_at_fork(before=_hold_signals, after_in_parent=_release_signals, after_in_child=_ignore_signals)
