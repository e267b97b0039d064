"""Files that hold tensors: written atomically, read without running anything they carry."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from utils import inert
from utils.errors import UserError
from utils.files import NotWritten, reason_of, sync_folder, temporary_name

MAGIC = (b"PK\x03\x04", b"\x80\x02")
"""How files of torch.save begin: a zip archive, or before torch 1.6 a pickle."""


SEAL = b"crossformer-trainer sha256 "
"""Begins the comment that ends our zip files; the digest of all bytes before the comment follows."""
SEAL_SIZE = len(SEAL) + hashlib.sha256().digest_size
CHUNK = 2**22
FOLDER_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Names of the weights in a folder that timm has written."""
MODEL_NAMES = ("model", "state_dict", "module", "model_state_dict", "model_state", "net", "network", "weights")
EMA_NAMES = (
    "ema", "model_ema", "state_dict_ema", "ema_state_dict", "ema_model", "model_ema_state_dict", "ema_model_state_dict",
    "ema_weights", "ema_net", "net_ema", "ema_params", "params_ema",
)  # fmt: skip
"""Where trainers keep the weights in a file, and their moving average."""
NOT_WEIGHTS = ("_extra_state", "decay", "n_averaged", "num_updates", "updates")
"""Ends of the names of what may stand among weights without being a tensor."""
SETTINGS_KEY = "settings"
"""What exports of ours have in their metadata: the settings of the run, as in a checkpoint."""
LONGEST_KEY = 500


class _Hashing:
    """A file that is written from its beginning to its end, and the digest of that.

    ``error`` is the first one; what torch's writer then raises does not tell of it.
    """

    def __init__(self, file: BinaryIO):
        self.file = file
        self.digest = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()


def save_atomically(content: dict[str, Any], path: Path) -> None:
    """Write ``content``, sealed with a checksum, so that ``path`` holds either what it held before or all of it.

    Raises:
        NotWritten: the disk is full, say. What ``path`` held before is still there.
    """
    with written_beside(path, content) as temporary:
        os.replace(temporary, path)


@contextmanager
def written_beside(path: Path, content: dict[str, Any]) -> Iterator[Path]:
    """A file with the sealed ``content`` that is safely on disk, to be renamed to ``path`` in this block.

    Raises:
        NotWritten: this or what the block does has failed.
    """
    temporary = temporary_name(path)
    hashing = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            hashing = _Hashing(file)
            torch.save(content, cast(BinaryIO, hashing))
            _seal(file, hashing.digest.digest())
            file.flush()
            os.fsync(file.fileno())
        yield temporary
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError | RuntimeError):  # torch's writer raises the latter
            raise
        reason = reason_of((hashing and hashing.error) or error)
        raise NotWritten(path, reason, "the file before it is whole; free some space") from error


def name_too(path: Path, name: Path) -> None:
    """Give a file another name, or copy it where the file system has no such thing; ``name`` is never half of it.

    Raises:
        OSError: it cannot be.
    """
    temporary = temporary_name(name)
    try:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(temporary, name)
    finally:
        temporary.unlink(missing_ok=True)  # also when both names were the same file's already: then nothing moves


def _seal(file: BinaryIO, digest: bytes) -> None:
    """Add the digest as the zip archive's comment, which every reader of zip files skips."""
    file.seek(-2, os.SEEK_END)  # the length of the comment, so far 0, ends the archive
    file.write(SEAL_SIZE.to_bytes(2, "little") + SEAL + digest)


def is_sealed(path: str | Path) -> bool:
    """Whether a file ends with a checksum, and the checksum is that of the file. False for files of others."""
    digest, size = hashlib.sha256(), os.path.getsize(path) - SEAL_SIZE
    if size < 2:
        return False
    with open(path, "rb") as file:
        left = size - 2
        while left:
            data = file.read(min(CHUNK, left))
            if not data:
                return False
            digest.update(data)
            left -= len(data)
        digest.update(bytes(2))  # what the length of the comment was when the digest was made
        return file.read() == SEAL_SIZE.to_bytes(2, "little") + SEAL + digest.digest()


class DamagedFile(UserError):
    """A file that was to hold tensors is cut short or is not such a file."""


class RefusedFile(UserError):
    """A file asks for code to be run when it is opened."""


def read(path: str | Path, sealed: bool = False) -> dict[str, Any]:
    """The content of a checkpoint file, on the CPU; one that must be ``sealed`` only when its checksum is right.

    Nothing in the file is executed: what is not a tensor is read as plain data (:mod:`utils.inert`). Of a folder as
    timm and the Hugging Face hub write it, the weights are under ``model``, its ``config.json`` is under ``timm``.

    Raises:
        DamagedFile: the file is missing, damaged or not a checkpoint.
        RefusedFile: the file asks for code to be run.
        UserError: the file may be whole but cannot be read now.
    """
    if os.path.isdir(path):
        return _read_folder(Path(path))
    if not os.path.isfile(path):
        raise DamagedFile(f"{path} is not a file; expected a checkpoint (.pth)")
    try:
        if str(path).endswith(".safetensors"):
            return _read_safetensors(path)
        with open(path, "rb") as file:
            if not file.read(4).startswith(MAGIC):
                raise DamagedFile(f"{path} is damaged or not a checkpoint: it does not begin like one")
        if sealed and not is_sealed(path):
            raise DamagedFile(f"{path} is damaged: its checksum is wrong or missing")
        with torch.serialization.safe_globals(inert.stand_ins(path)):
            content = inert.plain(torch.load(path, map_location="cpu", weights_only=True))
    except UserError:
        raise
    except inert.Refused as error:
        raise RefusedFile(
            f"{path} is refused: it asks to run code ({error}) when it is opened; "
            "get the file from a source you trust, saved as a plain state dict"
        ) from error
    except inert.TooDeep as error:
        raise DamagedFile(f"{path} is damaged or not a checkpoint: it is nested without end") from error
    except MemoryError as error:
        raise UserError(f"{path} cannot be read: there is not enough memory") from error
    except Exception as error:  # the reader meets arbitrary bytes and fails in arbitrary ways
        if getattr(error, "errno", None) not in (None, errno.EINVAL):  # which a seek in a file cut short gives
            raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from error
        raise DamagedFile(f"{path} is damaged or not a checkpoint: torch cannot read it") from error
    if not isinstance(content, dict):
        raise DamagedFile(f"{path} holds a {type(content).__name__}, not a checkpoint (a dict)")
    return content


def _read_safetensors(path: str | Path) -> dict[str, Any]:
    """The weights alone; in an export of ours under ``model``, with the settings and classes beside them."""
    with safe_open(path, "pt") as file:
        said = file.metadata() or {}
    weights = load_file(path)
    if SETTINGS_KEY not in said:
        return weights
    names = {SETTINGS_KEY: "config", "classes": "classes", "category_ids": "category_ids"}
    return {"model": weights} | {names[key]: json.loads(value) for key, value in said.items() if key in names}


def architecture_in(path: Path) -> dict[str, Any]:
    """Read the ``config.json`` that timm and the Hugging Face hub have beside weights of timm's models.

    Raises:
        OSError: it is not there.
        DamagedFile: it is something else.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(config["architecture"], str)
    except (ValueError, KeyError, TypeError, AssertionError, RecursionError) as error:
        raise DamagedFile(f"{path} is not what timm writes: it names no architecture") from error
    return config


def _read_folder(folder: Path) -> dict[str, Any]:
    try:
        config = architecture_in(folder / "config.json")
    except OSError as error:
        raise DamagedFile(
            f"{folder} is a folder without config.json; expected a checkpoint file, or a folder that timm has written"
        ) from error
    names = [name for name in FOLDER_WEIGHTS if (folder / name).is_file()]
    return {"model": read(folder / (names or FOLDER_WEIGHTS)[0]), "timm": config}


def weights_in(content: dict[str, Any], path: str | Path) -> dict[str, dict[str, Tensor]]:
    """The weights in a checkpoint file's content: under ``model``, and where it has a moving average, under ``ema``.

    They lie under one of the names in :data:`MODEL_NAMES`, or the content itself is them; their average under one of
    :data:`EMA_NAMES` beside them, in a callback of Lightning, or among the weights with such a name before its keys.

    Raises:
        DamagedFile: there are none.
    """
    ema = _average_in([content, *_values(content.get("callbacks"))])
    model = next((content[name] for name in MODEL_NAMES if isinstance(content.get(name), dict)), None)
    if model is None and ema is not None:
        return {"ema": _state_dict(ema, path)}
    model = content if model is None else model
    if ema is None:
        parts: dict[bool, dict] = {True: {}, False: {}}
        for key, value in model.items():
            parts[isinstance(key, str) and key.partition(".")[0] in EMA_NAMES][key] = value
        model, ema = (parts[False], parts[True]) if all(parts.values()) else (model, None)
    if ema is None:
        return {"ema" if content.get("weights") == "ema" else "model": _state_dict(model, path)}  # as in our best.pth
    return {"model": _state_dict(model, path), "ema": _state_dict(ema, path)}


def state_dict_of(content: dict[str, Any], path: str | Path) -> dict[str, Tensor]:
    """The weights in a checkpoint file's content; their moving average if that is all that it has."""
    return next(iter(weights_in(content, path).values()))


def choose(found: dict[str, dict[str, Tensor]], which: str, path: str | Path) -> tuple[str, dict[str, Tensor]]:
    """Of weights by kind those that are asked for: ``model``, ``ema``, or with ``auto`` ``ema`` where there is one.

    Raises:
        UserError: it has no such weights.
    """
    if which == "auto":
        which = "ema" if "ema" in found else "model"
    if which not in found:
        kinds = {"model": "the weights themselves", "ema": "a moving average of the weights"}
        there = next(iter(found))
        raise UserError(f"{path} holds {kinds[there]}, not {kinds[which]}; choose MODEL.WEIGHTS {there} or auto")
    return which, found[which]


def is_whole(tensor: Tensor) -> bool:
    """Whether the file holds all numbers of a tensor: it is not sparse, quantised, or one number said to be many."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _average_in(places: list[Any]) -> dict[str, Any] | None:
    for place in places:
        for name in EMA_NAMES if isinstance(place, dict) else ():
            if isinstance(place.get(name), dict) and place[name]:
                inner = place[name]
                return next((inner[key] for key in MODEL_NAMES if isinstance(inner.get(key), dict)), inner)
    return None


def _values(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else []


def _state_dict(value: dict[Any, Any], path: str | Path) -> dict[str, Tensor]:
    if not value:
        raise DamagedFile(f"{path} holds no weights; expected a state dict, or a dict with one under 'model'")
    for key, item in value.items():
        if not isinstance(key, str) or len(key) > LONGEST_KEY:
            raise DamagedFile(f"{path} is not a checkpoint: its state dict has keys that are not names")
        if not isinstance(item, Tensor) and not key.endswith(NOT_WEIGHTS):
            raise DamagedFile(f"{path} is not a checkpoint: its state dict holds things that are not tensors")
        if isinstance(item, Tensor) and not is_whole(item):
            raise UserError(
                f"{path} cannot be used: its {key[:100]} is not a whole tensor of plain numbers; save it anew"
            )
    return {key: item for key, item in value.items() if isinstance(item, Tensor)}
