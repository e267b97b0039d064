"""The live line at the bottom of a terminal: what a command is at and how far it has come.

A terminal has one, so a process has one: :data:`bar`. Where the output goes to a file or a pipe it shows nothing.
"""

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

WIDEST = 100
"""Columns of the line at most, so that it stays whole when a wide terminal is made narrower."""
ROOM_FOR_CTRL_C = 4
"""Columns left free: a terminal writes ^C behind the line, which must not begin another."""
CELLS = 10
REFRESHES = 4
"""Of the bar in the line, and how often a second it is drawn."""
SECONDS_UNTIL_TOLD = 2
"""So long a word stands alone; then the seconds it has lasted come behind it."""


class Fact(NamedTuple):
    """A part of the line; where there is no room, those with the highest ``rank`` are left out."""

    text: str
    rank: int


def fitted(facts: Sequence[Fact], room: int) -> str:
    """Join as many of the facts, in their order, as go into so many columns; the first in rank is cut if need be."""
    kept = sorted(range(len(facts)), key=lambda i: facts[i].rank)
    while True:
        line = "  ".join(facts[i].text for i in sorted(kept))
        if len(line) <= room or len(kept) <= 1:
            return line[:room]
        kept.pop()


def share_done(done: int, total: int, unit: str) -> list[Fact]:
    """The bar and the share in words: ``━━━─────── 33 % of 660 steps``."""
    filled = CELLS * done // max(total, 1)
    return [
        Fact("━" * filled + "─" * (CELLS - filled), 3),
        Fact(f"{100 * done // max(total, 1)} % of {total:,} {unit}", 0),
    ]


class Bar:
    """Keeps one line of a terminal up to date until :meth:`stop` removes it."""

    def __init__(self) -> None:
        self._live: Any = None
        self._facts: Sequence[Fact] = ()
        self._word = self._part = ""
        self._since, self._drawn = 0.0, 0

    @property
    def is_live(self) -> bool:
        return self._live is not None

    def start(self, word: str) -> None:
        """Show the line if the output is a terminal, with what the command is at."""
        if self.is_live or not sys.stdout.isatty():
            return
        from rich.console import Console  # only where there is a terminal
        from rich.live import Live

        console = Console()
        if not console.is_terminal or console.is_dumb_terminal:
            return
        self.doing(word)
        self._facts = ()
        self._live = Live(console=console, get_renderable=self._draw, refresh_per_second=REFRESHES, transient=True)
        with suppress(OSError):  # as when a terminal is closed
            self._live.start(refresh=True)
            console.show_cursor(True)  # whoever ends this process from outside leaves the cursor as it is

    def doing(self, word: str, part: str = "") -> None:
        """Say what the command is at while it has no more to show; ``part`` of it may change as it goes on."""
        if word != self._word:
            self._since = time.monotonic()
        self._word, self._part = word, part

    def show(self, facts: Sequence[Fact]) -> None:
        """Show how far it has come, in place of a word."""
        self._word, self._facts = "", facts

    def say(self, text: str) -> None:
        """Print a line above the live one, or simply print it."""
        with suppress(OSError):  # a terminal that was closed is nobody's loss
            if self._live:
                self._live.console.print(text, highlight=False, markup=False, soft_wrap=True)
            else:
                print(text, flush=True)

    def stop(self) -> None:
        """Remove the line."""
        live, self._live = self._live, None
        if live:
            with suppress(OSError):
                live.stop()

    def _draw(self):
        from rich.text import Text

        live = self._live
        width = live.console.width if live else WIDEST
        if live and self._drawn > width:  # the terminal has become narrower and has wrapped the line
            live.console.file.write(f"\x1b[{-(-self._drawn // width) - 1}A\r\x1b[J")
        room = min(width, WIDEST) - ROOM_FOR_CTRL_C
        line = fitted(self._facts, room) if not self._word else self._words()[:room]
        self._drawn = len(line)
        return Text(line, no_wrap=True, overflow="crop")

    def _words(self) -> str:
        seconds = int(time.monotonic() - self._since)
        lasted = f"  {seconds} s" if seconds >= SECONDS_UNTIL_TOLD else ""
        return f"{self._word}{self._part and f': {self._part}'} ...{lasted}"


bar = Bar()
"""That of this process."""
