"""Images anywhere below a folder, whose classes a table names: a CSV file with a line for each."""

import csv
import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from data.archive import SPLIT_FOLDERS, class_and_name
from data.files import check_is_file, fewer_kinds, find_images, is_image
from data.folder import FileIndex
from data.index import Layout, Scan, order
from utils.errors import UserError, did_you_mean
from utils.files import reason_of

FILE_COLUMNS = (
    "file", "filename", "file_name", "filepath", "file_path", "path", "image", "image_id", "image_name", "image_path",
    "img", "id", "name",
)  # fmt: skip
CLASS_COLUMNS = "class", "class_name", "label", "label_name", "labels", "category", "category_name", "target"
SPLIT_COLUMNS = "split", "subset"
"""What the columns of a table are often called, in small letters; the first that is there counts."""
SEPARATORS = ",", ";", "\t"
UNSAID, TRAIN, VAL = 0, 1, 2
NAMED = 3
SPLIT_NUMBERS = {"train": TRAIN, "training": TRAIN, "val": VAL, "valid": VAL, "validation": VAL}
"""What the split of an image may be called, in a column or as a folder."""


class Row(NamedTuple):
    """A line of a table: its number, the file as it is written there, its class, and its split in small letters."""

    line: int
    file: str
    label: str
    split: str


class LabelledIndex(FileIndex):
    """Each image is a file; its ``name`` is its path below the root. ``arrays["split"]`` has what is said of that."""

    def path(self, i: int) -> Path:
        return self.root / super().name_in_class(i)

    def name_in_class(self, i: int) -> str:
        return name_in_class(super().name_in_class(i), self._folders[self.arrays["labels"][i]])


class LabelledLayout(Layout):
    """The images below ``root`` that tables name.

    Args:
        root: the folder of the data.
        table: the CSV file.
        val_table: another one, of the validation images; ``table`` is of the training images then.
        columns: those of the file and of the class; what they are called tells where this is empty.
    """

    index_class = LabelledIndex

    def __init__(self, root: Path, table: Path, val_table: Path | None, columns: list[str]):
        self.root, self.archives, self.columns = root, [root], columns
        self.tables = {table: UNSAID if val_table is None else TRAIN}
        if val_table is not None:
            self.tables[val_table] = VAL
        said = repr(([(os.path.realpath(path), split) for path, split in self.tables.items()], columns))
        self.name = f"labels-{hashlib.blake2b(said.encode('utf-8', 'surrogateescape'), digest_size=6).hexdigest()}"

    def places(self, cache_dir: str) -> list[Path]:
        """Say where the index may be kept: not in the folder, whose date would change by it."""
        return [self.place_of_mine(cache_dir, os.path.realpath(self.root))]

    def scan(self) -> Scan:
        found = find_images(self.root)
        files, unknown = Files(self.root, found.images), set[str]()
        left_out, named = Counter(found.left_out), dict[str, tuple[Path, int]]()
        paths, labels, splits = [], [], []
        for table, split_of_table in self.tables.items():
            for row in read_table(table, self.columns, files.has):
                if row.split and row.split not in SPLIT_NUMBERS:
                    left_out[f"of the split {row.split}"] += 1
                    unknown.add(row.split)
                    continue
                path = files.find(row, table, split_of_table)
                if path in named:
                    lines = f"{named[path][0]}, line {named[path][1]}, and {table}, line {row.line},"
                    raise UserError(f"{lines} name the same image {path}; remove one of them")
                named[path] = table, row.line
                paths.append(path)
                labels.append(row.label)
                splits.append(split_of_table or SPLIT_NUMBERS.get(row.split, UNSAID) or split_of_folder(path))
        if not paths:
            but = f" of the split train or val, only of {', '.join(sorted(unknown)[:NAMED])}" if unknown else ""
            raise UserError(f"{next(iter(self.tables))} names no image{but}; it needs a line FILE,CLASS for each")
        if unnamed := len(found.images) - len(paths):
            left_out["images that no line names"] += unnamed
        classes = sorted(set(labels))
        number = {name: i for i, name in enumerate(classes)}
        numbers = np.array([number[label] for label in labels], dtype=np.int32)
        short = [os.fsencode(name_in_class(path, label)) for path, label in zip(paths, labels, strict=True)]
        ordered = order(short, numbers)
        encoded = [os.fsencode(paths[i]) for i in ordered]
        arrays = {
            "labels": numbers[ordered],
            "names": np.frombuffer(b"".join(encoded), dtype=np.uint8),
            "ends": np.cumsum([len(path) for path in encoded], dtype=np.int64),
            "split": np.array(splits, dtype=np.uint8)[ordered],
        }
        return Scan(classes, arrays, ["."], [*self.tables, *found.folders], fewer_kinds(left_out))


class Files:
    """The images below a folder, by the ends of their paths."""

    def __init__(self, root: Path, images: list[str]):
        self.root, self._by_name = root, dict[str, list[str]]()
        for path in images:
            name = PurePosixPath(path).name
            for key in {name, os.path.splitext(name)[0]}:
                self._by_name.setdefault(key, []).append(path)

    def has(self, file: str) -> bool:
        """Tell whether there is an image of this name, whatever folder it is in."""
        return PurePosixPath(file.strip()).name in self._by_name

    def find(self, row: Row, table: Path, split: int) -> str:
        """Find the one image that a line means: its path, a path that ends so, or one without its type.

        Raises:
            UserError: there is none, or there are several.
        """
        wanted = below(row.file, self.root) if os.path.isabs(row.file) else str(PurePosixPath(row.file))
        candidates = self._by_name.get(PurePosixPath(wanted).name, [])
        ends = [path for path in candidates if wanted in (path, without_type(path))]
        ends = ends or [path for path in candidates if f"/{path}".endswith(f"/{wanted}")]
        ends = ends or [path for path in candidates if f"/{without_type(path)}".endswith(f"/{wanted}")]
        if len(ends) > 1 and split:
            ends = [path for path in ends if split_of_folder(path) == split] or ends
        if len(ends) > 1:
            raise UserError(f"{table}, line {row.line}: {row.file} may be {' or '.join(ends[:2])}; write its folder")
        if not ends:
            raise UserError(
                f"{table}, line {row.line}: there is no image {row.file} below {self.root}; mend or remove the line"
            )
        return ends[0]


def below(path: str, root: Path) -> str:
    """Give an absolute path from ``root`` on, also where either goes through links."""
    plain = os.path.relpath(path, root)
    folder, name = os.path.split(path)
    real = os.path.relpath(os.path.join(os.path.realpath(folder), name), os.path.realpath(root))
    return real if plain.startswith("..") else plain


def without_type(path: str) -> str:
    """Take the type off a file's name."""
    return os.path.splitext(path)[0]


def split_of_folder(path: str) -> int:
    """Tell the split that the first folder of a path names."""
    return SPLIT_NUMBERS.get(PurePosixPath(path).parts[0].lower(), UNSAID) if "/" in path else UNSAID


def name_in_class(path: str, label: str) -> str:
    """Take the folders of the split and the class off a path, as class folders would have it."""
    folder, name = class_and_name(path)
    return name if folder in (label, *SPLIT_FOLDERS) else path


def read_table(path: Path, columns: list[str], is_there: Callable[[str], bool]) -> Iterator[Row]:
    """Read the lines of a table whose first line names its columns, or that has two columns without names.

    Args:
        path: of the table.
        columns: those of the file and of the class; what they are called tells where this is empty.
        is_there: tells whether there is an image of a name, which then is no name of a column.

    Raises:
        UserError: it cannot be read, or does not tell which of its columns has the file and which the class.
    """
    check_is_file(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not a text file (UTF-8)" if isinstance(error, UnicodeDecodeError) else reason_of(error)
        raise UserError(f"{path} cannot be read: {reason}; it needs a line FILE,CLASS for each image") from error
    first = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(SEPARATORS, key=first.count))
    try:
        header = [name.strip() for name in next(reader, [])]
        named = not any(is_image(name) for name in header) and not (len(header) == 2 and is_there(header[0]))
        file, label, split = choose_columns(path, header, columns) if named else (0, 1, None)
        rows = [] if named else [(1, header)]
        rows += [(reader.line_num, fields) for fields in reader]
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num} cannot be read: {error}") from error
    for line, fields in rows:
        if not any(fields):
            continue
        if len(fields) <= max(file, label, split or 0) or not fields[file].strip() or not fields[label].strip():
            raise UserError(f"{path}, line {line} has no file or no class; write both, or remove it")
        said = "" if split is None else fields[split].strip().lower()
        yield Row(line, fields[file].strip(), fields[label].strip(), said)


def choose_columns(path: Path, header: list[str], columns: list[str]) -> tuple[int, int, int | None]:
    """Find the columns of the file, the class and the split (None where there is none)."""
    lower = [name.lower() for name in header]
    split = next((lower.index(name) for name in SPLIT_COLUMNS if name in lower), None)
    for name in columns:
        if name not in header:
            raise UserError(f"DATA.LABEL_COLUMNS: {path} has no column {name}{did_you_mean(name, header)}")
    if columns:
        return header.index(columns[0]), header.index(columns[1]), split
    others = [i for i in range(len(header)) if i != split]
    file = next((lower.index(name) for name in FILE_COLUMNS if name in lower), None)
    label = next((lower.index(name) for name in CLASS_COLUMNS if name in lower), None)
    if len(others) == 2 and (file is None or label is None):
        file, label = reversed(others) if file == others[1] or label == others[0] else others
    if file is None or label is None or file == label:
        raise UserError(
            f"{path} does not tell which of its columns ({', '.join(header)}) has the file and which the class; "
            "set DATA.LABEL_COLUMNS, for example [filename, label]"
        )
    return file, label, split
