"""What command lines have in common: how they are parsed, and how they end."""

import argparse
import sys
from collections.abc import Callable

from utils.errors import UserError
from utils.names import printable
from utils.processes import CTRL_C_STATUS
from utils.surroundings import settle


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are :class:`UserError`; ``prog`` is the program's path."""

    def error(self, message: str):
        raise UserError(f"{message} (see python {self.prog} --help)")


def run_command(command: Callable[[list[str]], int | None], arguments: list[str], stopped: str = "stopped") -> int:
    """Run a command to its end, also where that is an error of the user's or Ctrl-C; returns the exit status.

    Args:
        command: gets the arguments; returns the exit status where that may be another than 0.
        arguments: without the program's name.
        stopped: what to say after Ctrl-C.
    """
    settle()
    try:
        return command(arguments) or 0
    except (UserError, RuntimeError) as error:
        if not isinstance(error, UserError) and not is_out_of_memory(error):
            raise
        print(f"error: {printable(str(error))}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr, flush=True)
        return CTRL_C_STATUS


def is_out_of_memory(error: Exception) -> bool:
    import torch  # takes seconds to load, which whoever has made a mistake would wait for

    return isinstance(error, torch.OutOfMemoryError)
