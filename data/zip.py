"""The zip layout of the Swin family: ``train.zip`` and ``train_map.txt`` with a line ``PATH<tab>CLASS`` an image."""

import os
import struct
import zipfile
import zlib
from pathlib import Path

from data.archive import MAX_CLASS_DIGITS, ArchiveIndex, Members, class_and_name
from data.files import MAX_IMAGE_BYTES, check_is_file, is_data, is_image, kind_of, type_of
from data.index import Layout, Scan
from utils.errors import UserError
from utils.files import reason_of

LOCAL_HEADER = struct.Struct("<4s5H3I2H")  # APPNOTE 4.3.7
SIGNATURE = b"PK\x03\x04"
NAME_AND_EXTRA = 512
"""So many bytes are read in advance for a member's name and extra fields; more of them cost a second read."""
STORED, DEFLATED = 0, 8


class ZipIndex(ArchiveIndex):
    """``offset`` is where a member's local header begins; ``length`` is what its data take, compressed or not."""

    def read(self, i: int) -> bytes:
        offset, length = int(self._offset[i]), int(self._length[i])
        data = self.bytes_at(i, offset, LOCAL_HEADER.size + NAME_AND_EXTRA + length)
        method, name_length, extra_length = self._header(i, data)
        begin = LOCAL_HEADER.size + name_length + extra_length
        if name_length + extra_length > NAME_AND_EXTRA:
            data = self.bytes_at(i, offset, begin + length)
        data = data[begin : begin + length]
        if len(data) < length:
            raise self.misfit(i)
        if method == DEFLATED:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, MAX_IMAGE_BYTES + 1)
            if len(data) > MAX_IMAGE_BYTES:
                raise ValueError(f"it unfolds to more than {MAX_IMAGE_BYTES:,} bytes, too many for an image; remove it")
        return data

    def member(self, i: int) -> str:
        data = self.bytes_at(i, int(self._offset[i]), LOCAL_HEADER.size + NAME_AND_EXTRA)
        name_length = self._header(i, data)[1]
        return data[LOCAL_HEADER.size :][:name_length].decode("utf-8", "replace")

    def _header(self, i: int, data: bytes) -> tuple[int, int, int]:
        """Take from the local header the compression method, and the lengths of the name and of the extra fields."""
        if len(data) < LOCAL_HEADER.size:
            raise self.misfit(i)
        signature, _, _, method, *_, name_length, extra_length = LOCAL_HEADER.unpack_from(data)
        if signature != SIGNATURE or method not in (STORED, DEFLATED):
            raise self.misfit(i)
        return method, name_length, extra_length


class ZipLayout(Layout):
    """``root/SPLIT.zip`` and ``root/SPLIT_map.txt``."""

    index_class = ZipIndex

    def __init__(self, root: Path, split: str):
        self.root, self.split, self.name = root, split, f"{split}-zip"
        self.archives = [root / f"{split}.zip"]

    def scan(self) -> Scan:
        members, archive = Members(self.root, self.archives), self.archives[0]
        map_file = self.root / f"{self.split}_map.txt"
        train_map = self.root / "train_map.txt"
        names = class_names(map_file, *([train_map] if os.path.lexists(train_map) else []))
        content = read_directory(archive)
        line_of: dict[str, int] = {}
        for line, path, label in read_map(map_file):
            name_in_zip = path if path in content else f"{self.split}/{path}"
            if name_in_zip not in content:
                raise UserError(
                    f"{map_file}, line {line}: {archive.name} holds no {path}; mend the line or the archive"
                )
            if name_in_zip in line_of:
                raise UserError(f"{map_file}: lines {line_of[name_in_zip]} and {line} name the same image {path}")
            line_of[name_in_zip] = line
            info = _the_one_file(archive, content[name_in_zip])
            class_folder, name = class_and_name(path)
            name = name if class_folder == names[label] or not class_folder else path
            members.add(names[label], name, 0, info.header_offset, info.compress_size)
        for name in content.keys() - line_of.keys():
            if is_data(name) and not name.endswith("/"):
                members.left_out[type_of(name) + f" outside of {map_file.name}" * is_image(name)] += 1
        return members.scan(names, map_file, train_map)


def read_directory(archive: Path) -> dict[str, list[zipfile.ZipInfo]]:
    """Read the members of a zip file, by their names; of each name there should be one.

    Raises:
        UserError: it is damaged or no zip file.
    """
    check_is_file(archive)
    content: dict[str, list[zipfile.ZipInfo]] = {}
    try:
        with zipfile.ZipFile(archive) as zipped:
            for info in zipped.infolist():
                content.setdefault(info.filename, []).append(info)
    except Exception as error:  # the module fails in arbitrary ways on arbitrary bytes
        reason = f"{reason_of(error)}; it is damaged or no zip file: get it again"
        raise UserError(f"{archive} cannot be read: {reason}") from error
    return content


def _the_one_file(archive: Path, members: list[zipfile.ZipInfo]) -> zipfile.ZipInfo:
    """Take the member of a name, which must be one regular file that can be read at its place."""
    info = members[0]
    if len(members) > 1:
        offsets = " and ".join(f"{member.header_offset:,}" for member in members[:2])
        raise UserError(f"{archive} holds {info.filename} twice, at bytes {offsets}; make it anew with one")
    kind = "a folder" if info.is_dir() else kind_of(info.external_attr >> 16)  # Unix's mode, where it was made there
    if kind:
        raise UserError(f"{archive}:{info.filename} is {kind} and not a file; make the archive without it")
    if info.flag_bits & 1 or info.compress_type not in (STORED, DEFLATED):
        raise UserError(f"{archive}:{info.filename} is encrypted or compressed in an unusual way; zip it again with -0")
    return info


def read_map(path: Path) -> list[tuple[int, str, int]]:
    """Read the lines of a map file: number of the line, path in the archive, number of the class.

    A byte order mark and blank lines say nothing. Lines end with ``\n`` or ``\r\n``: what else Python takes for the
    end of a line (U+2028, say) may be in a name.
    """
    check_is_file(path)
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a text file"
        raise UserError(f"{path} cannot be read: {reason}; it needs a line PATH<tab>CLASS for an image") from error
    entries = []
    for number, line in enumerate(lines, 1):
        line = line.removesuffix("\r")
        if not line.strip(" \t"):
            continue
        member, tab, label = line.rpartition("\t")
        label = label.strip(" ")
        if not tab or not member or not (label.isascii() and label.isdecimal()) or len(label) > MAX_CLASS_DIGITS:
            raise UserError(f"{path}, line {number}: expected PATH<tab>NUMBER OF THE CLASS, not {line[:80]!r}")
        entries.append((number, member.removeprefix("./"), int(label)))
    if not entries:
        raise UserError(f"{path} is empty; it needs a line PATH<tab>CLASS for an image")
    return entries


def class_names(*map_files: Path) -> list[str]:
    """Name the classes that map files number: by the folders of their images, in the order of the numbers.

    Where the last file (that of the training images) does not give each number one folder of its own, by the numbers.
    """
    entries = [read_map(path) for path in map_files]
    folder_of: dict[int, str] = {}
    consistent = True
    for _, path, label in entries[-1]:
        folder = class_and_name(path)[0]
        consistent &= bool(folder) and folder_of.setdefault(label, folder) == folder
    count = 1 + max(label for of_file in entries for _, _, label in of_file)
    if consistent and len(folder_of) == count == len(set(folder_of.values())):
        return [folder_of[label] for label in range(count)]
    return [str(label) for label in range(count)]
