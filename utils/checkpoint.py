"""Files that hold tensors: written atomically, read without running anything they carry."""

import errno
import os
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from utils.errors import UserError

MAGIC = (b"PK\x03\x04", b"\x80\x02")
"""How files of torch.save begin: a zip archive, or before torch 1.6 a pickle."""


def save_atomically(content: dict[str, Any], path: Path, keep: Path | None = None) -> None:
    """Write ``content`` so that ``path`` holds either what it held before or all of the new content.

    With ``keep``, what it held before moves there once the new content is safely on disk.

    Raises:
        UserError: the disk is full, say.
    """
    temporary = path.with_name(f".{path.name}.writing")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter
        temporary.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{path} cannot be written: {reason}; the file before it is whole; free some space") from error
    if keep and path.exists():
        os.replace(path, keep)
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name itself must survive a power cut
    finally:
        os.close(folder)


class DamagedFile(UserError):
    """A file that was to hold tensors is cut short or is not such a file."""


class RefusedFile(UserError):
    """A file asks for code to be run when it is opened."""


def read(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint file, on the CPU.

    Nothing in the file is executed: besides tensors and plain containers only yacs' ``CfgNode``, which published
    checkpoints carry, is allowed, and read as the dict that it is.

    Raises:
        DamagedFile: the file is missing, damaged or not a checkpoint.
        RefusedFile: the file asks for code to be run.
        UserError: the file may be whole but cannot be read now.
    """
    if not os.path.isfile(path):
        raise DamagedFile(f"{path} is not a file; expected a checkpoint (.pth)")
    try:
        if str(path).endswith(".safetensors"):
            return load_file(path)
        with open(path, "rb") as file:
            if not file.read(4).startswith(MAGIC):
                raise DamagedFile(f"{path} is damaged or not a checkpoint: it does not begin like one")
        with torch.serialization.safe_globals([(OrderedDict, "yacs.config.CfgNode")]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            raise RefusedFile(
                f"{path} is refused: it asks to run code ({refused[1]}) when it is opened; "
                "get the file from a source you trust, saved as a plain state dict"
            ) from error
        raise DamagedFile(f"{path} is damaged or not a checkpoint: torch cannot read it") from error
    except MemoryError as error:
        raise UserError(f"{path} cannot be read: there is not enough memory") from error
    except Exception as error:  # the reader meets arbitrary bytes and fails in arbitrary ways
        if getattr(error, "errno", None) not in (None, errno.EINVAL):  # which a seek in a file cut short gives
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        raise DamagedFile(f"{path} is damaged or not a checkpoint: torch cannot read it") from error
    if not isinstance(content, dict):
        raise DamagedFile(f"{path} holds a {type(content).__name__}, not a checkpoint (a dict)")
    return content


def state_dict_of(content: dict[str, Any], path: str | Path) -> dict[str, torch.Tensor]:
    """The model's weights in a checkpoint file's content: under ``model`` or ``state_dict``, or the content itself."""
    state_dict = content.get("model", content.get("state_dict", content))
    if not isinstance(state_dict, dict) or not state_dict:
        raise DamagedFile(f"{path} holds no weights; expected a state dict, or a dict with one under 'model'")
    if not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
        raise DamagedFile(f"{path} is not a checkpoint: its state dict holds things that are not tensors")
    return state_dict
