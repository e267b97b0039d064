"""Names of files and classes, which may hold anything, in what people and programs read."""

from functools import cache
from itertools import groupby
from pathlib import Path

EXECUTED = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""What begins a cell that a spreadsheet takes for a formula, in full width too."""

PLAIN_TEXT = {"text.parse_math": False, "text.usetex": False, "font.family": "DejaVu Sans"}
"""Settings of matplotlib with which a ``$`` in a name is a ``$``, and the letters are those of :func:`drawable`."""


def printable(text: str) -> str:
    """The text in one line; bytes that are no text and letters that cannot be seen as Python would write them."""
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in text)


def _escaped(letter: str) -> str:
    code = ord(letter)
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte of a file's name that is no text
        return f"\\x{code - 0xDC00:02x}"
    return repr(letter)[1:-1]


def harmless(cell):
    """A cell of a CSV file that no spreadsheet executes: a text that looks like a formula gets an apostrophe in front.

    So does one that begins with an apostrophe, so that whoever removes the first one has the text again.
    """
    return f"'{cell}" if isinstance(cell, str) and cell.startswith((*EXECUTED, "'")) else cell


def font_file() -> Path:
    """DejaVu Sans, which comes with matplotlib: Latin, Greek, Cyrillic, Arabic, Hebrew, many signs, no Chinese."""
    try:
        from matplotlib import get_data_path  # takes its time to load, and only pictures need it
    except ImportError as error:
        from utils.errors import UserError  # which imports this

        raise UserError("drawing pictures needs matplotlib: pip install matplotlib") from error

    return Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


@cache
def _letters() -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(str(font_file())).get_charmap())


def drawable(text: str) -> str:
    """The text in letters that :func:`font_file` has, others as their code points: ``U+4F60 U+597D``."""
    runs = groupby(printable(text), key=lambda letter: ord(letter) in _letters())
    return "".join(
        "".join(letters) if known else " ".join(f"U+{ord(letter):04X}" for letter in letters) for known, letters in runs
    )
