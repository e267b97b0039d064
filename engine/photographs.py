"""Image files read ahead of what is made of them, and pictures written."""

import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from torch import Tensor

from data.decoding import Decoding, decode, read_file
from utils.errors import UserError
from utils.files import write_whole, writing

AHEAD = 2
"""Images that are decoded while one is computed."""


def read_images(paths: list[Path], decoding: Decoding) -> Iterator[tuple[Path, Tensor | str]]:
    """Yield each file's image ``(3, H, W)`` uint8, in order; or why it cannot be decoded."""

    def read(path: Path) -> Tensor | str:
        try:
            return decode(read_file(path), decoding)
        except Exception as error:  # decoders fail in arbitrary ways on arbitrary bytes
            return getattr(error, "strerror", None) or str(error) or type(error).__name__

    with ThreadPoolExecutor(AHEAD) as pool:
        waiting = [pool.submit(read, path) for path in paths[:AHEAD]]
        for number, path in enumerate(paths):
            image = waiting.pop(0).result()
            waiting += [pool.submit(read, following) for following in paths[number + AHEAD : number + AHEAD + 1]]
            yield path, image


def names_below(paths: list[Path]) -> list[Path]:
    """Give the paths of files below their common folder."""
    above = Path(os.path.commonpath([path.absolute().parent for path in paths]))
    return [path.absolute().relative_to(above) for path in paths]


def check_pictures(paths: list[Path]) -> None:
    """Refuse files that differ in their type only, of which one's PNG would take the place of the other's."""
    of_pictures: dict[Path, Path] = {}
    for path, name in zip(paths, names_below(paths), strict=True):
        other = of_pictures.setdefault(name.with_suffix(".png"), path)
        if other.absolute() != path.absolute():
            raise UserError(f"{other} and {path} would both be drawn as {name.with_suffix('.png')}; rename one of them")


def save(picture: Image.Image, path: Path) -> None:
    """Write a PNG, and its folder."""
    picture.save(out := io.BytesIO(), "PNG")
    with writing(path, "choose another --overlay"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, out.getvalue())
