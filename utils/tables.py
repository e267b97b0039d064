"""Tables of figures, for a terminal, for a Markdown page and as CSV."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box, table
from rich.console import Console

from utils.files import write_whole
from utils.names import harmless


@dataclass
class Table:
    """Figures in rows. The first column is text, the others are numbers; a row may be shorter than ``columns``."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __rich__(self) -> table.Table:
        shown = table.Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for i, column in enumerate(self.columns):
            shown.add_column(column, justify="right" if i else "left", no_wrap=True)
        for row in self.rows:
            shown.add_row(*row)
        return shown

    def markdown(self) -> str:
        """Write the title and the table below it."""
        full = [[*row, *[""] * (len(self.columns) - len(row))] for row in self.rows]
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *full]
        return f"{self.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show(*items: Table | str) -> None:
    """Print tables and lines; a table may be wider than the terminal, since figures cut off to fit would be wrong."""
    for item in items:
        console = Console()
        if isinstance(item, Table):
            console.print(item.title, highlight=False)
            needed = console.measure(item, options=console.options.update(width=1000)).maximum
            console.width = max(console.width, needed)
        console.print(item, highlight=False)


def csv_of(header: Sequence[str], rows: Iterable[Iterable]) -> bytes:
    """A table as a CSV file that a spreadsheet shows as it is: no cell is taken for a formula."""
    csv.writer(out := io.StringIO(newline="")).writerows([harmless(cell) for cell in row] for row in (header, *rows))
    return out.getvalue().encode(errors="backslashreplace")


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Iterable]) -> None:
    """Write such a file.

    Raises:
        OSError: it cannot be written.
    """
    write_whole(path, csv_of(header, rows))
