"""Errors that the user can mend."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend: shown as one line without a traceback, exit status 2.

    The message names the thing and the remedy.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``; did you mean X?`` for the known name that is nearest to ``name``, or an empty string."""
    by_lower_case = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), by_lower_case, n=1, cutoff=0.5)
    return f"; did you mean {by_lower_case[close[0]]}?" if close else ""
