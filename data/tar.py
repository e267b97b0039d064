"""Uncompressed tar files: shards with class folders or ``.cls`` files inside, and tars of one tar for each class."""

import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from data.archive import MAX_CLASS_DIGITS, ArchiveIndex, Members, class_and_name
from data.files import check_is_file, folders_above, is_data, is_image, list_folder, type_of
from data.index import Layout, Scan
from utils.compat import end_of_member, forget_members, tar_number
from utils.errors import UserError

BLOCK = tarfile.BLOCKSIZE
CHUNK = 2**20
LABEL = ".cls"
MAX_LABEL_BYTES = 64
VOLUME_LABEL, FOLDER_DUMP = b"V", b"D"
"""Kinds of members that GNU tar writes beside files: a name of the whole tar, and the list of a folder's files."""


class TarIndex(ArchiveIndex):
    """``offset`` is where an image's bytes begin; the member's header lies before them and is checked."""

    def read(self, i: int) -> bytes:
        return self.read_member(i, int(self._offset[i]), int(self._length[i]))

    def read_member(self, i: int, offset: int, length: int) -> bytes:
        """Read a member of image ``i``'s archive whose bytes are there.

        Raises:
            UserError: the archive does not fit the index.
        """
        return self.content(i, self.bytes_at(i, offset - BLOCK, BLOCK + length), length)

    def content(self, i: int, member: bytes, length: int) -> bytes:
        """Take the content off a member of image ``i``'s archive, header and all.

        Raises:
            UserError: the archive does not fit the index.
        """
        if len(member) < BLOCK + length or _size(member) != length:
            raise self.misfit(i)
        return member[BLOCK:]

    def member(self, i: int) -> str:
        header = self.bytes_at(i, int(self._offset[i]) - BLOCK, BLOCK)
        try:
            return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
        except tarfile.HeaderError as error:
            raise self.misfit(i) from error


def _size(header: bytes) -> int:
    """Take from a member's header the length that it states."""
    try:
        return tar_number(header[124:136])
    except tarfile.HeaderError:
        return -1


class TarredImage(NamedTuple):
    """An image in a tar: where its bytes are, and the class that a file beside it states, if one does."""

    name: str
    offset: int
    length: int
    label: str


class TarLayout(Layout):
    """The tar files ``archives``, all below ``root``."""

    index_class = TarIndex

    def __init__(self, root: Path, split: str, archives: list[Path]):
        self.root, self.name, self.archives = root, f"{split}-tar", archives

    def scan(self) -> Scan:
        members = Members(self.root, self.archives)
        labelled = unlabelled = ""  # the first image of each kind
        for number, (path, images) in enumerate(zip(self.archives, self.listed(members.left_out), strict=True)):
            for image in images:
                if image.label:
                    labelled = labelled or f"{path}:{image.name}"
                else:
                    unlabelled = unlabelled or f"{path}:{image.name}"
                folder, name = class_and_name(image.name)
                label = image.label or folder or _wordnet_id(path)
                if not label:
                    raise UserError(
                        f"{path}:{image.name} has no class: it needs a folder CLASS/ before its name or a file "
                        f"{_stem(image.name)}{LABEL} beside it (see docs/data.md)"
                    )
                members.add(label, name, number, image.offset, image.length)
        if not members.names:
            raise UserError(f"{self.archives[0]} holds no image; expected CLASS/NAME.jpg inside (see docs/data.md)")
        classes = sorted(members.classes)
        if labelled:
            if unlabelled:
                raise UserError(f"{labelled} has a {LABEL} file beside it, but {unlabelled} has none")
            classes = [str(i) for i in range(max(map(int, classes)) + 1)]
        return members.scan(classes, *self._folder_of_shards(members.left_out))

    def listed(self, left_out: Counter[str]) -> Iterator[list[TarredImage]]:
        """List the images of each archive, and count in ``left_out`` what else is in them."""
        for path in self.archives:
            with open_tar(path) as file:
                yield images_in(file, path, left_out)

    def _folder_of_shards(self, left_out: Counter[str]) -> list[Path]:
        """Find the folder that only has this split's shards, if there is one, and count what else lies in it."""
        folder = self.archives[0].parent
        if folder == self.root:
            return []
        entries = list_folder(folder, folders_above(folder))
        shards = {path.name for path in self.archives}
        left_out.update(type_of(name) for name in entries.files if name not in shards)
        if folders := len(set(entries.folders) - shards):
            left_out["folders"] += folders
        return [folder]


def images_in(file: BinaryIO, path: Path, left_out: Counter[str]) -> list[TarredImage]:
    """List the images of an open tar in their order, each with its label where the tar has labels.

    The label of ``photo.000.jpg`` is in ``photo.000.cls``, or in ``photo.cls``: WebDataset takes a name up to its first
    dot as the key that a sample's files share, others the name up to its last. The longest key that fits counts, and
    under it must be one image and one label.

    Raises:
        UserError: the tar is damaged, a name is there twice, two images or labels share a key, a label has no image.
    """
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, tuple[str, str]] = {}  # by key: the file's name and the class
    for name, member in members_once(file, path, lambda name: is_image(name) or _is_label(name), left_out):
        if is_image(name):
            images[name] = member.offset_data, member.size
            continue
        stem = _stem(name)
        if stem in labels:
            raise UserError(f"{path} holds two labels of one image, {labels[stem][0]} and {name}; remove one")
        labels[stem] = name, _class_number(file, member, path)
    image_of: dict[str, str] = {}
    found = []
    for name, (offset, length) in images.items():
        key = next((key for key in _keys(name) if key in labels), None)
        if key is not None and image_of.setdefault(key, name) != name:
            raise UserError(
                f"{path} holds two images of the one label {labels[key][0]}, {image_of[key]} and {name}; "
                "a sample is one image and one label"
            )
        found.append(TarredImage(name, offset, length, labels[key][1] if key is not None else ""))
    for key, (name, _) in labels.items():
        if key not in image_of:
            raise UserError(f"{path} holds a label without an image, {name}; add the image or remove the label")
    return found


def _stem(name: str) -> str:
    """Cut the last ending off a name."""
    return os.path.splitext(name)[0]


def _keys(name: str) -> Iterator[str]:
    """Say what the label of an image may be called, without its ending: ``a/b.0`` and ``a/b`` for ``a/b.0.jpg``."""
    shorter = _stem(name)
    while shorter != name:
        yield shorter
        name, shorter = shorter, _stem(shorter)


def _is_label(name: str) -> bool:
    return os.path.splitext(name)[1].lower() == LABEL


def open_tar(path: Path) -> BinaryIO:
    """Open the file, after a look at whether it can be an uncompressed tar."""
    check_is_file(path)
    try:
        file = open(path, "rb")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    try:
        check_uncompressed(file, path)
    except UserError:
        file.close()
        raise
    return file


def check_uncompressed(file: BinaryIO, path: Path) -> None:
    """Refuse what cannot be read in pieces.

    Raises:
        UserError: the file is compressed.
    """
    if file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        raise UserError(f"{path} is compressed, which rules out reading single images; decompress it first")


def members_once(
    file: BinaryIO,
    path: Path,
    wanted: Callable[[str], bool],
    left_out: Counter[str],
    start: int = 0,
    end: int | None = None,
) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """Yield name and member of what is ``wanted`` in a tar (as :func:`read_members`), and count the others.

    Raises:
        UserError: a name is there twice, as after ``tar --update``: which of them is meant, nobody knows.
    """
    offsets: dict[str, int] = {}
    for member in read_members(file, path, start, end):
        name = str(PurePosixPath(member.name))
        if not wanted(name):
            left_out[type_of(name)] += 1
            continue
        if name in offsets:
            raise UserError(
                f"{path} holds {name} twice, at bytes {offsets[name]:,} and {member.offset:,}; make it anew with one"
            )
        offsets[name] = member.offset
        yield name, member


def read_members(file: BinaryIO, path: Path, start: int = 0, end: int | None = None) -> Iterator[tarfile.TarInfo]:
    """Yield the regular files in the tar, or tars joined with ``cat``, in bytes ``start`` to ``end`` of ``file``.

    Hidden files and companions are passed over.

    Raises:
        UserError: it is cut short or damaged, or something in it is no file. ``tarfile`` alone would stop at the first
            bad header, and at the first end mark, without a word.
    """
    file.seek(0, os.SEEK_END)
    end = file.tell() if end is None else end
    position = yield from _read_to_end_mark(file, path, start, end)
    while (position := _after_zeros(file, position, end)) < end:
        position = yield from _read_to_end_mark(file, path, position, end)


def _read_to_end_mark(file: BinaryIO, path: Path, start: int, end: int) -> Generator[tarfile.TarInfo, None, int]:
    """Yield the files, and return where the end mark is."""
    file.seek(start)
    tar, position = None, start

    def damaged(why: str) -> UserError:
        return UserError(f"{path} is damaged or cut short at byte {position:,}: {why}; get it again")

    while True:
        try:
            tar = tar or tarfile.TarFile(fileobj=file, mode="r", encoding="utf-8", errors="surrogateescape")
            member = tar.next()
        except UserError:
            raise
        except Exception as error:  # the module fails in arbitrary ways on arbitrary bytes
            raise damaged(str(error) or type(error).__name__) from error
        if member is None:
            break
        forget_members(tar)
        if not position <= member.offset < member.offset_data <= end_of_member(tar) or member.size < 0:
            raise damaged("the next file lies before it")
        if member.offset_data + member.size > end:
            raise damaged(f"{member.name} reaches beyond the end")
        position = end_of_member(tar)
        if is_data(member.name) and _is_file(member, path):
            yield member
    position = end_of_member(tar)
    file.seek(position)
    if position + BLOCK > end or file.read(BLOCK) != bytes(BLOCK):  # blocks of zeros mark the end
        raise damaged("here is neither a file nor an end mark")
    return position


def _after_zeros(file: BinaryIO, position: int, end: int) -> int:
    """Find the first block from ``position`` on that is not all zeros; ``end`` if there is none."""
    while position < end:
        file.seek(position)
        chunk = file.read(min(CHUNK, end - position))
        if rest := chunk.lstrip(b"\0"):
            return position + (len(chunk) - len(rest)) // BLOCK * BLOCK
        position += len(chunk) or end
    return end


def _is_file(member: tarfile.TarInfo, path: Path) -> bool:
    """Tell whether it is a regular file; False for a folder and other things that hold no data."""
    if member.isdir() or member.type in (VOLUME_LABEL, FOLDER_DUMP):
        return False
    if member.issym() or member.islnk():
        raise UserError(f"{path}:{member.name} is a link; make the tar with --dereference --hard-dereference")
    if member.issparse():
        raise UserError(f"{path}:{member.name} is sparse; make the tar without --sparse")
    if not member.isreg():
        kind = {tarfile.FIFOTYPE: "a FIFO", tarfile.CHRTYPE: "a device", tarfile.BLKTYPE: "a device"}
        raise UserError(
            f"{path}:{member.name} is {kind.get(member.type, 'something unknown')}; make the tar without it"
        )
    return True


def _wordnet_id(path: Path) -> str:
    """Take the class from the name of a tar out of the official archive, which holds one for each class."""
    stem = Path(path).stem
    return stem if re.fullmatch(r"n\d{8}", stem) else ""


def _class_number(file: BinaryIO, member: tarfile.TarInfo, path: Path) -> str:
    file.seek(member.offset_data)
    text = file.read(min(member.size, MAX_LABEL_BYTES + 1)).strip()
    if not text.isdigit() or len(text) > MAX_CLASS_DIGITS or member.size > MAX_LABEL_BYTES:
        raise UserError(f"{path}:{member.name} must hold the number of a class, not {text[:20]!r}")
    return str(int(text))
