"""Which images of a data set are there to train on, and which to evaluate on."""

import os
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from data.files import Ids, find_images, folders_above, is_image, list_folder
from data.folder import FolderLayout
from data.index import ImageIndex, Layout, folder_of_mine, open_index
from data.labels import TRAIN, UNSAID, VAL, LabelledLayout
from data.layouts import SPLITS, find_layout, missing
from data.parts import JoinedIndex, PartOfIndex, divide, only_classes, subset
from data.remote import RemoteTarIndex, Store, find_remote_layout, is_url
from data.timm_index import TimmIndex
from utils.distributed import once_a_host
from utils.errors import UserError, did_you_mean
from utils.surroundings import expanded

EXPECTED_IMAGES = "train/CLASS/*.jpg (see docs/data.md)"
SET_APART = "to evaluate on a fifth of {of} add --opts DATA.VAL_SHARE 0.2"
NAMED = 3
OF_SPLITS = {"test", *(name for names in SPLITS.values() for name in names)}
"""Names of folders that are splits and no classes."""

Splits = tuple[ImageIndex | None, ImageIndex, list[str]]
"""The training images (None where nobody asked for them), the validation images, and the classes."""


def open_images(config, training: bool) -> tuple[ImageIndex | TimmIndex | None, ImageIndex | TimmIndex, list[str]]:
    """Open the images of classes in DATA.DATA_PATH, both splits numbered by the classes of the training images.

    Returns:
        the index of the training images (None unless ``training``), that of the validation images, and the classes.

    Raises:
        UserError: something is missing, damaged or empty.
    """
    if "/" in config.DATA.FORMAT:
        return _open_with_timm(config, root_of(config, EXPECTED_IMAGES), training)
    train, val, classes = once_a_host(lambda: _open_all(config, training))
    for index in (val, train):  # the one that is read again and again first, should there not be room for both
        for part in index.parts if isinstance(index, JoinedIndex) else (index,):
            if isinstance(part, RemoteTarIndex) and config.DATA.CACHE_GB:
                part.cache_in(folder_of_mine(config.DATA.CACHE_DIR), int(1e9 * config.DATA.CACHE_GB))
    return _part_of(config, train, val, classes)


def _part_of(config, train: ImageIndex | None, val: ImageIndex, classes: list[str]) -> Splits:
    """Leave out what DATA.ONLY_CLASSES and DATA.SUBSET do not ask for."""
    wanted = config.DATA.ONLY_CLASSES
    if wanted:
        for name in wanted:
            if name not in classes:
                raise UserError(f"DATA.ONLY_CLASSES: the data has no class {name!r}{did_you_mean(name, classes)}")
        classes = [name for name in classes if name in wanted]
        val = only_classes(val, classes)
        train = None if train is None else only_classes(train, classes)
        if not len(val):
            raise UserError(
                f"DATA.ONLY_CLASSES: no validation image is of {', '.join(classes[:NAMED])}; name more classes"
            )
    if train is not None and config.DATA.SUBSET < 1:
        train = subset(train, config.DATA.SUBSET, config.SEED)
    return train, val, classes


def describe_subset(config, train: ImageIndex | TimmIndex) -> str:
    """Say in a line what is trained on where DATA.SUBSET leaves some out; empty where it does not."""
    if config.DATA.SUBSET == 1 or not isinstance(train, PartOfIndex):
        return ""
    return f"trained on {len(train):,} of {len(train.whole):,} images (DATA.SUBSET {config.DATA.SUBSET:g})"


def root_of(config, expected: str) -> Path:
    """Give the folder of the data.

    Raises:
        UserError: it is not named, or not there.
    """
    _folder("DATA.DATA_PATH", config.DATA.DATA_PATH, expected)
    return Path(config.DATA.DATA_PATH)


def describe_share(
    config, train: ImageIndex | TimmIndex | None, val: ImageIndex | TimmIndex, classes: list[str]
) -> str:
    """Say in a line what DATA.VAL_SHARE has set apart; empty where it has nothing."""
    if not config.DATA.VAL_SHARE:
        return ""
    assert isinstance(val, ImageIndex)
    apart = np.bincount(val.labels, minlength=len(classes))
    text = f"{len(val):,} images are set apart to evaluate on (DATA.VAL_SHARE {config.DATA.VAL_SHARE:g})"
    if isinstance(train, ImageIndex):
        shares = 100 * apart / (apart + np.bincount(train.labels, minlength=len(classes)))
        text += (
            f": {100 * len(val) / (len(val) + len(train)):.1f} % of all, {shares.min():.1f} to {shares.max():.1f} % "
        )
        text += "of a class"
    if none := [name for name, count in zip(classes, apart, strict=True) if not count]:
        text += f"; none of {', '.join(none[:NAMED])}" + f" and {len(none) - NAMED} more" * (len(none) > NAMED)
    return text


# ---- folders and archives


def _open_all(config, training: bool) -> Splits:
    data = config.DATA
    if data.LABELS:
        return _open_labelled(config, root_of(config, "images, and DATA.LABELS with their classes"), training)
    paths = {"DATA.DATA_PATH": [data.DATA_PATH], "DATA.MORE_PATHS": list(map(expanded, data.MORE_PATHS))}
    places = [(key, path) for key, of_key in paths.items() for path in of_key]
    for key, path in places:
        if not is_url(path):
            _folder(key, path)
    if data.VAL_SHARE:
        whole = [open_index(_only_layout(config, key, path), data.CACHE_DIR) for key, path in places]
        return _divided(config, _joined(whole), training)
    opened = [_open_both(config, key, path, training) for key, path in places]
    if len(opened) == 1:
        train, val, classes = opened[0]
        assert val is not None
        return train, val, classes
    classes = sorted({name for _, _, names in opened for name in names})
    train = _joined([index for index, _, _ in opened if index is not None], classes) if training else None
    return train, _joined([index for _, index, _ in opened if index is not None], classes), classes


def _joined(indexes: list[ImageIndex], classes: list[str] | None = None) -> ImageIndex:
    classes = classes or sorted({name for index in indexes for name in index.classes})
    return indexes[0].with_classes(classes) if len(indexes) == 1 else JoinedIndex(indexes, classes)


def _open_both(config, key: str, path: str, training: bool) -> tuple[ImageIndex | None, ImageIndex | None, list[str]]:
    """Open data with splits; a folder of DATA.MORE_PATHS needs no val, and may be class folders to train on."""
    find: Callable[[str], Layout | None]
    if is_url(path):
        if config.DATA.FORMAT not in ("auto", "tar"):
            raise UserError(f"DATA.FORMAT {config.DATA.FORMAT}: data at a URL are tar shards; leave it at auto")
        find = partial(find_remote_layout, Store(path))
    else:
        find = partial(find_layout, Path(path), layout=config.DATA.FORMAT)
    layouts, is_first = {"train": None, "val": find("val")}, key == "DATA.DATA_PATH"
    with nullcontext() if training else suppress(UserError):  # evaluation only takes the names of its classes
        layouts["train"] = find("train")
    if not is_first and layouts["train"] is None and not is_url(path) and _is_flat(config, Path(path)):
        layouts["train"] = FolderLayout(Path(path), ".")
    needed = [*(["train"] if training or not is_first else []), *(["val"] if is_first else [])]
    for split in needed:
        if layouts[split] is None:
            absent = missing(path, split, "tar" if is_url(path) else config.DATA.FORMAT, key)
            raise absent if is_url(path) or not is_first else _with_way_out(absent, Path(path), layouts["train"])
    there, cache_dir = {split: layout for split, layout in layouts.items() if layout is not None}, config.DATA.CACHE_DIR
    train = open_index(there["train"], cache_dir) if training else None
    classes = train.classes if train is not None else there["train" if "train" in there else "val"].classes(cache_dir)
    val = open_index(there["val"], cache_dir).with_classes(classes) if "val" in there else None
    return train, val, classes


def _with_way_out(absent: UserError, root: Path, train: Layout | None) -> UserError:
    """Say too what could be done with data that lacks a split, where something comes to mind."""
    way = ""
    with suppress(UserError):
        inside = list_folder(root, folders_above(root))
        tables = [name for name in sorted(inside.files) if name.lower().endswith(".csv")]
        direct, deeper = _class_folders(root)
        if train is not None:
            way = SET_APART.format(of="the training images")
        elif tables:
            way = f"if {tables[0]} has the classes of the images add --opts DATA.LABELS {root / tables[0]}"
        elif len(direct) > 1:
            way = f"its folders seem to be the classes: {SET_APART.format(of='the images')}"
        elif deeper:
            way = f"there are images deeper down: give --data-path {root / deeper[0]} if its folders are the classes"
    return UserError(f"{absent}; {way}") if way else absent


def _class_folders(root: Path) -> tuple[list[str], list[str]]:
    """List the folders in ``root`` that hold images, if not all are splits; and those that hold some deeper down."""
    inside = list_folder(root, folders_above(root))
    direct: list[str] = []
    deeper: list[str] = []
    for name in sorted(inside.folders):
        if _holds_images(root / name, inside.within):
            direct.append(name)
        elif name not in OF_SPLITS and find_images(root / name, inside.within).images:
            deeper.append(name)
    return [] if OF_SPLITS.issuperset(direct) else direct, deeper


def _is_flat(config, root: Path) -> bool:
    """Tell whether the folders in ``root`` are the classes: several hold images themselves, and not all are splits."""
    if config.DATA.FORMAT not in ("auto", "folder"):
        return False
    inside = list_folder(root, folders_above(root))
    direct = (name for name in sorted(inside.folders) if _holds_images(root / name, inside.within))
    first = [*islice(direct, len(OF_SPLITS) + 1)]  # enough to see, and there may be thousands
    return len(first) > 1 and not OF_SPLITS.issuperset(first)


def _holds_images(folder: Path, within: Ids) -> bool:
    return any(map(is_image, list_folder(folder, within).files))


def _only_layout(config, key: str, path: str) -> Layout:
    """Find the images of which DATA.VAL_SHARE is taken: those of ``train``, or class folders without more ado.

    Raises:
        UserError: there is none, or a val besides.
    """
    if is_url(path):
        raise UserError(f"DATA.VAL_SHARE is for folders and archives on disks; {path} needs shards of its own for val")
    root = Path(path)
    if _is_flat(config, root):  # one of whose classes may be called train
        return FolderLayout(root, ".")
    train = find_layout(root, "train", config.DATA.FORMAT)
    if train is None:
        raise _with_way_out(missing(root, "train", config.DATA.FORMAT, key), root, None)
    if find_layout(root, "val", config.DATA.FORMAT):
        raise _has_val(config, root)
    return train


def _has_val(config, where: Path) -> UserError:
    share = config.DATA.VAL_SHARE
    return UserError(f"DATA.VAL_SHARE {share:g}: {where} has validation images of its own; leave it at 0")


def _open_labelled(config, root: Path, training: bool) -> Splits:
    data = config.DATA
    val_table = Path(data.VAL_LABELS) if data.VAL_LABELS else None
    layout = LabelledLayout(root, Path(data.LABELS), val_table, data.LABEL_COLUMNS)
    index = open_index(layout, data.CACHE_DIR)
    splits = index.arrays["split"]
    if not (splits == VAL).any():
        if not data.VAL_SHARE:
            raise UserError(f"{data.LABELS} names no image of val; {SET_APART.format(of='the images')}")
        return _divided(config, index, training)
    if data.VAL_SHARE:
        raise _has_val(config, Path(data.LABELS))
    if (splits == UNSAID).any():
        name = index.name(int((splits == UNSAID).argmax()))
        raise UserError(f"{data.LABELS} names images of val, and does not tell of {name} whether it is train or val")
    train = PartOfIndex(index, np.flatnonzero(splits == TRAIN), counts=True)
    val = PartOfIndex(index, np.flatnonzero(splits == VAL), counts=not training)
    if training and not len(train):
        raise UserError(f"{data.LABELS} names no image of train; write some with their classes")
    classes = [index.classes[label] for label in np.unique(train.labels)] if len(train) else index.classes
    return train.with_classes(classes) if training else None, val.with_classes(classes), classes


def _divided(config, index: ImageIndex, training: bool) -> Splits:
    share = config.DATA.VAL_SHARE
    train, val = divide(index, share, config.SEED)
    counts = np.bincount(train.labels, minlength=len(index.classes))
    problem = "" if len(val) else "no image is"
    if not counts.all():
        empty = int(counts.argmin())
        problem = f"all {(index.labels == empty).sum()} images of class {index.classes[empty]!r} are"
    if problem:
        raise UserError(
            f"DATA.VAL_SHARE {share:g}: {problem} set apart to evaluate on; add images, or take another share"
        )
    return train if training else None, val, index.classes


def _folder(key: str, path: str, expected: str = EXPECTED_IMAGES) -> None:
    if not path:
        raise UserError(f"{key} is not set: give --data-path DIR with {expected}")
    if not os.path.isdir(path):
        raise UserError(f"{key} {path} is not a folder; give the one with {expected}")


# ---- data sets of timm's


def _open_with_timm(config, root: Path, training: bool) -> tuple[TimmIndex | None, TimmIndex, list[str]]:
    train = TimmIndex(config.DATA.FORMAT, root, "train") if training else None
    val = TimmIndex(config.DATA.FORMAT, root, "validation")
    classes = (train or val).classes or [str(i) for i in range(config.MODEL.NUM_CLASSES)]
    if train and train.classes != val.classes:
        raise UserError(f"DATA.FORMAT {config.DATA.FORMAT}: train and validation do not have the same classes")
    if not classes:
        raise UserError(f"DATA.FORMAT {config.DATA.FORMAT} does not tell its classes: set MODEL.NUM_CLASSES")
    return train, val, classes
