"""What the files of a data set are: images, others that are left out and counted, and what nothing should open.

An image is told by the ending of its name, since a look into each of millions of files would take hours; what its
bytes are is seen when it is decoded.
"""

import errno
import os
import stat
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from data.index import Index
from utils.errors import UserError

NO_EXTENT = "boxes of no width or height"
"""What an index of objects leaves out in place of files."""

IMAGE_TYPES: dict[str, tuple[str, ...]] = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".jfi"),
    "MPO": (".mpo",),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "AVIF": (".avif", ".avifs"),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "TIFF": (".tif", ".tiff"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "TGA": (".tga", ".icb", ".vda", ".vst"),
    "QOI": (".qoi",),
    "ICO": (".ico",),
    "ICNS": (".icns",),
    "PCX": (".pcx",),
    "PSD": (".psd",),
    "SGI": (".sgi", ".rgb", ".rgba", ".bw"),
    "SUN": (".ras",),
    "DDS": (".dds",),
    "MSP": (".msp",),
    "XBM": (".xbm",),
    "XPM": (".xpm",),
}
"""Pillow's names of the raster formats that pictures are kept in, and how their files' names end.

Not among them: vector formats and those that another program is started for (EPS, PS, PDF, WMF, EMF), films, what
Pillow knows but cannot decode alone (HEIC, MPEG, HDF5), and what no collection of pictures is kept in (textures of
games, cursors, telescopes' data). The list is fixed, so that hosts with other versions of Pillow have the same data.
"""
IMAGE_ENDINGS = frozenset(ending for endings in IMAGE_TYPES.values() for ending in endings)

COMPANIONS = frozenset(
    {
        "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@tmp",  # of network drives
        "__macosx", "icon\r", "thumbs.db", "ehthumbs.db", "desktop.ini", "picasa.ini", "zbthumbnail.info",
        "lost+found", "$recycle.bin", "system volume information", "__pycache__",
    }
)  # fmt: skip
"""What systems put beside people's files, in small letters. Like names that begin with a dot, it is nobody's data."""

MAX_IMAGE_BYTES = 2**30
"""A file with more bytes is not read: it is no image, or one that a limit of pixels refuses anyway."""
LONGEST_ENDING = 10
KINDS_KEPT, KINDS_SHOWN = 50, 6


def is_image(name: str) -> bool:
    """Tell whether a file of this name is an image."""
    return os.path.splitext(name)[1].lower() in IMAGE_ENDINGS


def is_companion(name: str) -> bool:
    """Tell whether a file or folder of this name (without its path) is hidden, or the system's."""
    return name.startswith(".") or name.lower() in COMPANIONS


def is_data(member: str) -> bool:
    """Tell whether nothing on a path within an archive is hidden or the system's."""
    return not any(is_companion(part) for part in PurePosixPath(member).parts if part != "..")


def type_of(name: str) -> str:
    """Tell a file's type by its name: ``.txt``, or ``without a type``."""
    ending = os.path.splitext(name)[1].lower()
    told = ending[1:].isalnum() and ending.isascii() and not ending[1:].isdecimal() and len(ending) <= LONGEST_ENDING
    return ending if told else "without a type"


def fewer_kinds(left_out: Counter[str]) -> dict[str, int]:
    """Keep the most frequent kinds of files that are left out, and count the rare ones as one."""
    kept = dict(sorted(left_out.items(), key=lambda item: (-item[1], item[0]))[:KINDS_KEPT])
    if rest := left_out.total() - sum(kept.values()):
        kept["of other types"] = rest
    return kept


def describe_kinds(left_out: Mapping[str, int]) -> str:
    """Say how many there are of each kind: ``2 .txt, 1 .heic``."""
    ranked = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{count:,} {kind}" for kind, count in ranked[:KINDS_SHOWN]]
    if rest := sum(count for _, count in ranked[KINDS_SHOWN:]):
        parts.append(f"{rest:,} others")
    return ", ".join(parts)


def describe_left_out(indexes: Mapping[str, Index | None]) -> str:
    """Say in one line which files (or boxes) the index of each split leaves out; empty where there are none."""
    told = {split: index.left_out for split, index in indexes.items() if index is not None and index.left_out}
    total = sum(sum(left_out.values()) for left_out in told.values())
    if not total:
        return ""
    if {kind for left_out in told.values() for kind in left_out} == {NO_EXTENT}:
        return f"{NO_EXTENT} are left out ({', '.join(f'{split}: {of[NO_EXTENT]:,}' for split, of in told.items())})"
    kinds = "; ".join(f"{split}: {describe_kinds(left_out)}" for split, left_out in told.items())
    return f"{total:,} {'files are' if total > 1 else 'file is'} left out, being no images of a class ({kinds})"


# ---- Folders


Ids = frozenset[tuple[int, int]]
"""Folders, each by its device and inode."""


class Entries(NamedTuple):
    """The names of the folders and of the files in a folder; and the folder itself with those that it lies in."""

    folders: list[str]
    files: list[str]
    within: Ids


class Found(NamedTuple):
    """What lies below a folder: paths of images relative to it, all folders that were looked into, and the rest."""

    images: list[str]
    folders: list[Path]
    left_out: Counter[str]


def find_images(folder: Path, above: Ids | None = None) -> Found:
    """Look for images below a folder; links are followed.

    Args:
        folder: where to begin.
        above: the folders that it lies in, where the caller knows them.

    Raises:
        UserError: a folder cannot be read, a link leads nowhere or in a circle, or something is no file (a FIFO, say).
    """
    found = Found([], [], Counter())
    to_do = [(folder, "", folders_above(folder) if above is None else above)]
    while to_do:  # not recursive: a tree may be deeper than Python's stack
        path, prefix, above = to_do.pop()
        found.folders.append(path)
        entries = list_folder(path, above)
        to_do += [(path / name, f"{prefix}{name}/", entries.within) for name in entries.folders]
        for name in entries.files:
            if is_image(name):
                found.images.append(f"{prefix}{name}")
            else:
                found.left_out[type_of(name)] += 1
    return found


def list_folder(folder: Path, above: Ids) -> Entries:
    """List a folder without hidden things and companions; ``above`` are the folders that it lies in.

    Raises:
        UserError: as :func:`find_images`.
    """
    folders, files = [], []
    try:
        within = above | {_id_of(folder)}
        with os.scandir(folder) as entries:
            wanted = [entry for entry in entries if not is_companion(entry.name)]
    except OSError as error:
        raise _unreadable(folder, error) from error
    for entry in wanted:
        try:
            if entry.is_dir():
                if entry.is_symlink() and _id_of(entry.path) in within:
                    raise UserError(f"{entry.path} is a link to a folder that it lies in; remove it")
                folders.append(entry.name)
            elif entry.is_file():
                files.append(entry.name)
            else:
                check_is_file(Path(entry.path))
        except OSError as error:
            raise _unreadable(Path(entry.path), error) from error
    return Entries(folders, files, within)


def folders_above(folder: Path) -> Ids:
    """Find the folders that a folder lies in, up to the root."""
    try:
        return frozenset(map(_id_of, Path(os.path.realpath(folder)).parents))
    except OSError as error:
        raise _unreadable(folder, error) from error


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFLNK: "a link",
}


def kind_of(mode: int) -> str:
    """Put a file mode into words: ``a FIFO``; empty for a regular file, or where it says nothing."""
    return _KINDS.get(stat.S_IFMT(mode), "")


def check_is_file(path: Path) -> None:
    """Refuse what cannot be read like a file before it is opened: opening a FIFO waits for ever.

    Raises:
        UserError: it is something else, or not there.
    """
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(mode):
        raise UserError(f"{path} is {kind_of(mode) or 'something unknown'} and not a file; move it elsewhere")


def _unreadable(path: Path, error: OSError) -> UserError:
    if os.path.islink(path) and error.errno in (errno.ENOENT, errno.ELOOP):
        leads = "in a circle" if error.errno == errno.ELOOP else "nowhere"
        return UserError(f"{path} is a link that leads {leads}; mend or remove it")
    return UserError(f"{path} cannot be read: {error.strerror}")


def _id_of(folder: str | Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino
