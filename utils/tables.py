"""Tables of figures, for a terminal and for a Markdown page."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box, table
from rich.console import Console


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
