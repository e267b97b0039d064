"""The escape hatch: random-access data sets that ``timm.data.create_dataset`` names (``hfds/...``, ``torch/...``)."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from PIL import Image
from timm.data import create_dataset

from utils.errors import UserError

STREAMS = ("hfids/", "tfds/", "wds/")


class TimmIndex:
    """The images of a data set that timm opens: ``index[i]`` is a PIL image or the bytes of a file, and the class.

    Attributes:
        classes: class names, or None where the data set does not tell.
        left_out: nothing, since the data sets do not tell which files they do not use.

    Raises:
        UserError: timm cannot open it, or it is a stream.
    """

    left_out: Mapping[str, int] = MappingProxyType({})

    def __init__(self, name: str, root: Path, split: str):
        self.root, self._title = root, f"{name} {split}"
        if name.lower().startswith(STREAMS):
            raise UserError(
                f"DATA.FORMAT {name} is a stream, and exact resuming needs random access: give the folder of its tar "
                "files to --data-path, or make shards of it with scripts/prepare_imagenet.py (see docs/data.md)"
            )
        try:
            self._dataset = create_dataset(name, root=str(root), split=split)
        except Exception as error:  # the libraries behind it raise whatever they like
            raise UserError(f"DATA.FORMAT {name}: timm cannot open {split} in {root}: {_one_line(error)}") from error
        self._reader = getattr(self._dataset, "reader", None)  # timm's own class would replace a bad image silently
        self.classes = self._class_names()

    def _class_names(self) -> list[str] | None:
        numbers = getattr(self._reader, "class_to_idx", None) or getattr(self._dataset, "class_to_idx", None)
        if numbers:
            return sorted(numbers, key=numbers.get)
        features: Any = getattr(getattr(self._reader, "dataset", None), "features", None) or {}
        label = features.get(getattr(self._reader, "label_key", "label"))
        return list(label.names) if hasattr(label, "names") else None

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, i: int) -> tuple[bytes | Image.Image, int]:
        if self._reader is None:
            return self._dataset[i]
        data, target, *_ = self._reader[i]
        return (data if isinstance(data, Image.Image) else data.read()), int(target)

    def name(self, i: int) -> str:
        """Say where image ``i`` is, for people."""
        return f"{self._title} in {self.root}, number {i}"


def _one_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
