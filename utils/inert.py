"""What a checkpoint holds besides tensors, as plain data: nothing that a file names is imported, and nothing is called.

torch's reader of weights refuses every name in a file that it does not know. Here such names get stand-ins that only
store what the file says: known kinds of values one each, objects of other packages a dict of their attributes.
Whatever would be *called* when the file is opened, or comes from the parts of Python that can do harm, is refused.
"""

import io
import pickletools
import re
import sys
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from utils.compat import name_in_python_3

DEEPEST = 100
"""Levels of nesting that a checkpoint may have."""
OF_TORCH = re.compile(
    r"collections\.(OrderedDict|Counter)|_codecs\.encode|builtins\.(bytearray|set|complex)|"
    r"torch\.(Tensor|Size|device|\w+Storage|\w+Tensor|per_(tensor|channel)_\w+|u?int\d+|b?float\w+|complex\d+|bool|"
    r"q?u?int\w+|half|double|cfloat|short|long)|torch\.(storage|cuda|sparse)\.\w+|torch\._utils\._rebuild_\w+|"
    r"torch\._tensor\._rebuild_from_type_v2|torch\.nn\.parameter\.Parameter|torch\.serialization\._get_layout"
)
"""Names that torch's reader of weights may know itself; it decides."""
SIMPLE = (type(None), bool, int, float, complex, str, bytes, bytearray, torch.dtype, torch.device, torch.layout)
LEGACY_PICKLES = 5
"""A file of torch before 1.6 begins with so many: magic number, version, system, the content, names of storages."""


class Refused(Exception):
    """A file asks for something to be called; the message is its name."""


class TooDeep(Exception):
    """What a file holds is nested without end."""


class Dtype:
    """Stands in for ``numpy.dtype``."""

    def __init__(self, kind: str, *_: Any):
        self.kind, self.order = kind, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]

    def read(self, data: bytes) -> np.ndarray:
        """The numbers in ``data``; of other kinds there are none."""
        if not re.fullmatch(r"[biufc]\d{1,2}", self.kind) or self.order not in ("<", ">", "|", "="):
            raise ValueError(f"not a number: {self.kind!r}")
        return np.frombuffer(data, np.dtype(self.order + self.kind))


class Array:
    """Stands in for ``numpy.ndarray``."""

    state: tuple = ()

    def __setstate__(self, state: tuple) -> None:
        self.state = state

    def tensor(self) -> Tensor | None:
        """None when it is not one of numbers."""
        try:
            _, shape, dtype, fortran, data = self.state
            numbers = dtype.read(data).reshape(shape, order="F" if fortran else "C")
            return torch.from_numpy(numbers.astype(numbers.dtype.newbyteorder("=")))
        except (ValueError, TypeError, AttributeError):
            return None


class _Object(type):
    """A class whose objects are dicts; to call it is refused, as a file does that names a function."""

    def __call__(cls, *_: Any):
        raise Refused(cls.__name__)


class _Text:
    """Stands in for a kind of text."""

    def __new__(cls, *arguments: Any) -> str:  # type: ignore[misc]
        return str(arguments[0])


def _scalar(dtype: Dtype, data: bytes = b"") -> Any:
    try:
        return dtype.read(data)[0].item()
    except (ValueError, IndexError, AttributeError):
        return None


def _path(*parts: str) -> str:
    return "/".join(map(str, parts)).replace("//", "/")


def _attributes(*_: Any) -> OrderedDict:
    return OrderedDict()


def _arguments(*arguments: Any) -> tuple:
    return arguments


CALLED: dict[str, Any] = {
    "collections.defaultdict": _attributes,
    "decimal.Decimal": _Text,
    "builtins.frozenset": _arguments,
    "builtins.range": _arguments,
    "builtins.slice": _arguments,
    "types.SimpleNamespace": _attributes,
    "torch.torch_version.TorchVersion": _Text,
    "numpy.dtype": Dtype,
    "numpy.ndarray": Array,
    **{f"builtins.{name}": name for name in
       ("int", "float", "str", "bool", "list", "dict", "tuple", "bytes", "object")},
    **{f"datetime.{name}": _arguments for name in ("datetime", "date", "time", "timedelta", "timezone")},
    **{f"{module}.{kind}Path": _path for module in ("pathlib", "pathlib._local") for kind in
       ("", "Pure", "Posix", "PurePosix", "Windows", "PureWindows")},
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray._reconstruct": lambda *_: Array() for core in ("core", "_core")},
    **{f"numpy.{kind}": kind for kind in
       ("bool_", "float16", "float32", "float64", *(f"{u}int{bits}" for u in ("", "u") for bits in (8, 16, 32, 64)))},
}  # fmt: skip
"""Stand-ins for kinds of values of Python and numpy, whose pickles call them."""
OBJECTS = ("argparse.Namespace",)
"""Of Python's own classes, those whose objects are read like those of other packages."""


def stand_ins(path: str | Path) -> list[Callable | tuple[Callable, str]]:
    """For every name in the file that torch does not know, in the form that ``torch.serialization.safe_globals`` takes.

    Raises:
        Refused: one of the names is none of data.
        Exception: the file is damaged.
    """
    found: list[Callable | tuple[Callable, str]] = []
    for name in sorted(_names_in(path)):
        root = name.partition(".")[0]
        if name in CALLED:
            found.append((CALLED[name], name))
        elif OF_TORCH.fullmatch(name):
            continue
        elif name in OBJECTS or not (root in sys.stdlib_module_names or root in ("torch", "numpy")):
            found.append((_Object(name, (), {"__new__": lambda cls, *_: OrderedDict()}), name))
        else:
            raise Refused(name)
    return found


def _names_in(path: str | Path) -> set[str]:
    with open(path, "rb") as file:
        is_zip = file.read(2) == b"PK"
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > Path(path).stat().st_size:
                raise ValueError("it would unfold to more than it is")
            names: set[str] = set()
            for entry in archive.namelist():
                if entry.rpartition("/")[2] == "data.pkl":
                    names |= _globals(io.BytesIO(archive.read(entry)))
            return names
    with open(path, "rb") as file:
        return set().union(*(_globals(file) for _ in range(LEGACY_PICKLES)))


def _globals(file: BinaryIO) -> set[str]:
    """The names in the pickle that begins where ``file`` stands, as Python 3 calls them."""
    named = set()
    for operation, argument, _ in pickletools.genops(file):
        if operation.name == "GLOBAL":
            module, _, name = str(argument).partition(" ")
            named.add(".".join(name_in_python_3(module, name)))
    return named


def plain(value: Any, depth: int = 0, seen: dict[int, Any] | None = None) -> Any:
    """The same in dicts, lists, tuples, sets and plain tensors, whose methods no file has any say in.

    Raises:
        TooDeep: it is nested without end.
    """
    seen = {} if seen is None else seen
    if isinstance(value, Tensor):
        return Tensor.detach(value) if type(value) in (Tensor, torch.nn.Parameter) else f"a {type(value).__name__}"
    if isinstance(value, Array):
        tensor = value.tensor()
        return "an array" if tensor is None else tensor
    if isinstance(value, Dtype):
        return f"numpy.{value.kind}"
    if not isinstance(value, dict | list | tuple | set):
        return value if isinstance(value, SIMPLE) else f"a {getattr(value, '__name__', type(value).__name__)}"
    if id(value) in seen:
        return seen[id(value)]
    if depth > DEEPEST:
        raise TooDeep
    result: Any
    if isinstance(value, dict):
        result = seen[id(value)] = {}
        items = type(value).items(value)
        if not items and type(value) in (OrderedDict, Counter):
            items = vars(value).items()  # of an object of another package
        result.update({key: plain(item, depth + 1, seen) for key, item in items})
    elif isinstance(value, list):
        result = seen[id(value)] = []
        result.extend(plain(item, depth + 1, seen) for item in value)
    else:
        kind = set if isinstance(value, set) else tuple
        result = seen[id(value)] = kind(value) if kind is set else kind(plain(item, depth + 1, seen) for item in value)
    return result
