"""What a process may lack where it runs: a home folder, a name for its user, a terminal that has all letters."""

import getpass
import os
import sys
import tempfile
from pathlib import Path

from utils.errors import UserError

_has_home = True


def settle() -> None:
    """Make up for what is not done when this is imported; every command begins with it.

    A user without a home folder (an unknown number in a container) gets one in the folder for temporary files, where
    this and other libraries keep what they need not compute again.
    """
    global _has_home
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"], _has_home = str(_folder_of_mine()), False


def _name_the_user() -> None:
    """Name a user whom the system does not know: torch 2.11 asks for the name as soon as torchvision is imported."""
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = f"uid{os.getuid()}"


_name_the_user()


def _folder_of_mine() -> Path:
    """The same at each start, unless somebody else has made it."""
    folder = Path(tempfile.gettempdir(), f"crossformer-trainer-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    is_mine = not folder.is_symlink() and status.st_uid == os.getuid() and not status.st_mode & 0o077
    return folder if is_mine else Path(tempfile.mkdtemp(prefix=f"{folder.name}-"))


def expanded(path: str) -> str:
    """The path, where ``~`` is the home folder and ``~NAME`` that of another user.

    Raises:
        UserError: there is no home folder.
    """
    if not path.startswith("~"):
        return path
    if not _has_home and path.split("/")[0] == "~":
        raise UserError(f"{path}: this user has no home folder; set HOME, or write the path in full")
    return os.path.expanduser(path)


def a_path(text: str) -> Path:
    """For ``type=`` of an argument."""
    return Path(expanded(text))
