"""Words in pictures, which may hold anything too: only letters that the font has, and no formulas."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import groupby
from pathlib import Path
from types import ModuleType

from utils.errors import UserError
from utils.names import printable


def font_file() -> Path:
    """Return DejaVu Sans, which comes with matplotlib: Latin, Greek, Cyrillic, Arabic, Hebrew, signs, no Chinese.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        from matplotlib import get_data_path  # takes its time to load, and only pictures need it
    except ImportError as error:
        raise UserError("drawing pictures needs matplotlib: pip install matplotlib") from error

    return Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


@cache
def _letters() -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(str(font_file())).get_charmap())


def drawable(text: str) -> str:
    """Write a text in letters that :func:`font_file` has, others as their code points: ``U+4F60 U+597D``."""
    runs = groupby(printable(text), key=lambda letter: ord(letter) in _letters())
    return "".join(
        "".join(letters) if known else " ".join(f"U+{ord(letter):04X}" for letter in letters) for known, letters in runs
    )


@contextmanager
def pyplot() -> Iterator[ModuleType]:
    """Lend ``matplotlib.pyplot`` to draw files with: a ``$`` is a ``$``, and the letters are those of :func:`drawable`.

    To be loaded no earlier than here: by now there is a home folder for what it keeps.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"text.parse_math": False, "text.usetex": False, "font.family": "DejaVu Sans"}):
        yield plt
