"""Uncompressed tar files: shards with class folders or ``.cls`` files inside, and tars of one tar for each class."""

import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from data.archive import MAX_CLASS_DIGITS, ArchiveIndex, Members, class_and_name, is_image
from data.index import Layout, Scan
from utils.errors import UserError

BLOCK = tarfile.BLOCKSIZE


class TarIndex(ArchiveIndex):
    """``offset`` is where an image's bytes begin; the member's header lies before them and is checked."""

    def read(self, i: int) -> bytes:
        offset, length = int(self._offset[i]), int(self._length[i])
        data = self.bytes_at(i, offset - BLOCK, BLOCK + length)
        if len(data) < BLOCK + length or _size(data) != length:
            raise self.misfit(i)
        return data[BLOCK:]

    def member(self, i: int) -> str:
        header = self.bytes_at(i, int(self._offset[i]) - BLOCK, BLOCK)
        try:
            return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
        except tarfile.HeaderError as error:
            raise self.misfit(i) from error


def _size(header: bytes) -> int:
    """The length that a member's header states."""
    try:
        return tarfile.nti(header[124:136])
    except tarfile.HeaderError:
        return -1


class TarLayout(Layout):
    """The tar files ``archives``, all below ``root``."""

    index_class = TarIndex

    def __init__(self, root: Path, split: str, archives: list[Path]):
        self.root, self.name, self.archives = root, f"{split}-tar", archives

    def scan(self) -> Scan:
        members = Members(self.root, self.archives)
        numbered = False
        for number, path in enumerate(self.archives):
            with open_tar(path) as file:
                images: dict[str, tuple[str, int, int]] = {}
                labels: dict[str, str] = {}
                for member in read_members(file, path):
                    key = member.name.partition(".")[0] if "/" not in member.name else _key(member.name)
                    if member.name.endswith(".cls"):
                        labels[key] = _class_number(file, member, path)
                    elif is_image(member.name):
                        images[member.name] = (key, member.offset_data, member.size)
            for member_name, (key, offset, length) in images.items():
                label, name = class_and_name(member_name)
                label = labels.get(key, label) or _wordnet_id(path)
                numbered |= key in labels
                if not label:
                    raise UserError(
                        f"{path}:{member_name} has no class: it needs a folder CLASS/ before its name or a file "
                        f"{key}.cls beside it (see docs/data.md)"
                    )
                members.add(label, name, number, offset, length)
        if not members.names:
            raise UserError(f"{self.archives[0]} holds no image; expected CLASS/NAME.jpg inside (see docs/data.md)")
        classes = sorted(members.classes)
        if numbered:
            if not all(name.isdecimal() for name in classes):
                name = next(name for name in classes if not name.isdecimal())
                raise UserError(f"{self.root} has images with a .cls file and images without one (class {name!r})")
            classes = [str(i) for i in range(max(map(int, classes)) + 1)]
        return members.scan(classes)


def open_tar(path: Path) -> BinaryIO:
    """The file, after a look at whether it can be an uncompressed tar."""
    try:
        file = open(path, "rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    magic = file.read(6)
    if magic.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        file.close()
        raise UserError(f"{path} is compressed, which rules out reading single images; decompress it first")
    return file


def read_members(file: BinaryIO, path: Path, start: int = 0, end: int | None = None) -> Iterator[tarfile.TarInfo]:
    """The regular files in the tar that lies in ``file`` from byte ``start`` to ``end``.

    Raises:
        UserError: it is cut short or damaged. ``tarfile`` alone would stop at the first bad header without a word.
    """
    file.seek(0, os.SEEK_END)
    end = file.tell() if end is None else end
    file.seek(start)
    tar, position = None, start

    def damaged(why: str) -> UserError:
        return UserError(f"{path} is damaged or cut short at byte {position:,}: {why}; get it again")

    while True:
        try:
            tar = tar or tarfile.TarFile(fileobj=file, mode="r", encoding="utf-8", errors="surrogateescape")
            member = tar.next()
        except Exception as error:  # the module fails in arbitrary ways on arbitrary bytes
            raise damaged(str(error) or type(error).__name__) from error
        if member is None:
            break
        tar.members = []  # it would keep them all
        if not position <= member.offset < member.offset_data <= tar.offset or member.size < 0:
            raise damaged("the next file lies before it")
        if member.offset_data + member.size > end:
            raise damaged(f"{member.name} reaches beyond the end")
        position = tar.offset
        if member.islnk() or member.issym():
            if is_image(member.name):
                raise UserError(f"{path}:{member.name} is a link; make the tar with --dereference --hard-dereference")
        elif member.issparse():
            raise UserError(f"{path}:{member.name} is sparse; make the tar without --sparse")
        elif member.isreg():
            yield member
    file.seek(tar.offset)
    if tar.offset + BLOCK > end or file.read(BLOCK) != bytes(BLOCK):  # blocks of zeros mark the end
        position = tar.offset
        raise damaged("there is no end mark")


def _wordnet_id(path: Path) -> str:
    """The class of a tar that came out of the official archive, which holds one for each class."""
    return path.stem if re.fullmatch(r"n\d{8}", path.stem) else ""


def _key(member: str) -> str:
    folder, _, name = member.rpartition("/")
    return f"{folder}/{name.partition('.')[0]}"


def _class_number(file: BinaryIO, member: tarfile.TarInfo, path: Path) -> str:
    file.seek(member.offset_data)
    text = file.read(min(member.size, 64)).strip()
    if not text.isdigit() or len(text) > MAX_CLASS_DIGITS:
        raise UserError(f"{path}:{member.name} must hold the number of a class, not {text[:20]!r}")
    return str(int(text))
