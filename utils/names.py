"""Names of files and classes, which may hold anything, in what people and programs read."""

EXECUTED = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""What begins a cell that a spreadsheet takes for a formula, in full width too."""


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
