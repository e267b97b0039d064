"""Which images of a data set are there to train on, and which to evaluate on."""

import os
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

import numpy as np

from data.files import find_images, folders_above, list_folder
from data.folder import FolderLayout
from data.index import ImageIndex, Layout, folder_of_mine, open_index
from data.labels import TRAIN, UNSAID, VAL, LabelledLayout
from data.layouts import SPLITS, find_layout, missing
from data.parts import JoinedIndex, PartOfIndex, divide
from data.remote import RemoteTarIndex, Store, find_remote_layout, is_url
from data.timm_index import TimmIndex
from utils.distributed import once_a_host
from utils.errors import UserError
from utils.surroundings import expanded

EXPECTED_IMAGES = "train/CLASS/*.jpg (see docs/data.md)"
SET_APART = "to evaluate on a fifth of {of} add --opts DATA.VAL_SHARE 0.2"
NAMED = 3

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
    return train, val, classes


def root_of(config, expected: str) -> Path:
    """Give the folder of the data.

    Raises:
        UserError: it is not named, or not there.
    """
    if not config.DATA.DATA_PATH:
        raise UserError(f"DATA.DATA_PATH is not set: give --data-path DIR with {expected}")
    return _folder("DATA.DATA_PATH", config.DATA.DATA_PATH, expected)


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
    opened = [_open_one(config, config.DATA.DATA_PATH, training)]
    for path in map(expanded, config.DATA.MORE_PATHS):
        if not is_url(path):
            _folder("DATA.MORE_PATHS", path, EXPECTED_IMAGES)
        opened.append(_open_one(config, path, training))
    if len(opened) == 1:
        return opened[0]
    classes = sorted({name for _, _, names in opened for name in names})
    train = [index for index, _, _ in opened if index is not None]
    return JoinedIndex(train, classes) if train else None, JoinedIndex([val for _, val, _ in opened], classes), classes


def _open_one(config, path: str, training: bool) -> Splits:
    if config.DATA.LABELS:
        return _open_labelled(config, root_of(config, "images, and DATA.LABELS with their classes"), training)
    if config.DATA.VAL_SHARE:
        if is_url(path):
            raise UserError(f"DATA.VAL_SHARE: data at a URL needs shards of its own for val, and {path} may have them")
        root = _folder("DATA.DATA_PATH", path, EXPECTED_IMAGES) if path else root_of(config, EXPECTED_IMAGES)
        return _divided(config, open_index(_only_layout(config, root), config.DATA.CACHE_DIR), training)
    return _open_both(config, path, training)


def _open_both(config, path: str, training: bool) -> Splits:
    """Open data that has a split of either kind."""
    find: Callable[[str], Layout | None]
    if is_url(path):
        if config.DATA.FORMAT not in ("auto", "tar"):
            raise UserError(f"DATA.FORMAT {config.DATA.FORMAT}: data at a URL are tar shards; leave it at auto")
        root: Path | str = path
        find = partial(find_remote_layout, Store(path))
    else:
        root = _folder("DATA.DATA_PATH", path, EXPECTED_IMAGES) if path else root_of(config, EXPECTED_IMAGES)
        find = partial(find_layout, root, layout=config.DATA.FORMAT)
    layouts = {"train": None, "val": find("val")}
    with nullcontext() if training else suppress(UserError):  # evaluation only takes the names of its classes
        layouts["train"] = find("train")
    for split in ("train", "val") if training else ("val",):
        if layouts[split] is None:
            absent = missing(root, split, "tar" if is_url(path) else config.DATA.FORMAT)
            raise absent if is_url(path) else UserError(f"{absent}{_way_out(Path(root), layouts['train'])}")
    there, cache_dir = {split: layout for split, layout in layouts.items() if layout is not None}, config.DATA.CACHE_DIR
    train = open_index(there["train"], cache_dir) if training else None
    classes = train.classes if train is not None else there.get("train", there["val"]).classes(cache_dir)
    return train, open_index(there["val"], cache_dir).with_classes(classes), classes


def _way_out(root: Path, train: Layout | None) -> str:
    """Say what could be done with data that lacks a split; empty where nothing comes to mind."""
    if train is not None:
        return f"; {SET_APART.format(of='the training images')}"
    with suppress(UserError):
        inside = list_folder(root, folders_above(root))
        tables = [name for name in sorted(inside.files) if name.lower().endswith(".csv")]
        if tables:
            return f"; if {tables[0]} has the classes of the images add --opts DATA.LABELS {root / tables[0]}"
        if _has_classes(root, inside.folders):
            return f"; its folders seem to be the classes: {SET_APART.format(of='the images')}"
    return ""


def _has_classes(root: Path, folders: list[str]) -> bool:
    """Tell whether there are images in folders that are not those of the splits."""
    others = (folder for folder in folders if all(folder not in names for names in SPLITS.values()))
    return any(find_images(root / folder).images for folder in others)


def _only_layout(config, root: Path) -> Layout:
    """Find the images of which DATA.VAL_SHARE is taken: those of ``train``, or class folders without more ado.

    Raises:
        UserError: there is none, or a val besides.
    """
    folders, train_folder = list_folder(root, folders_above(root)).folders, root / SPLITS["train"][0]
    is_flat = config.DATA.FORMAT in ("auto", "folder") and _has_classes(root, folders)
    is_class = train_folder.is_dir() and not list_folder(train_folder, folders_above(train_folder)).folders
    train = None if is_flat and is_class else find_layout(root, "train", config.DATA.FORMAT)
    if train is None and is_flat:
        return FolderLayout(root, ".")
    if train is None:
        raise missing(root, "train", config.DATA.FORMAT)
    if find_layout(root, "val", config.DATA.FORMAT):
        raise _has_val(config, root)
    return train


def _has_val(config, where: Path) -> UserError:
    return UserError(
        f"DATA.VAL_SHARE {config.DATA.VAL_SHARE:g}: {where} has validation images of its own; leave it at 0"
    )


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
    val = PartOfIndex(index, np.flatnonzero(splits == VAL), counts=not training)
    return PartOfIndex(index, np.flatnonzero(splits == TRAIN), counts=True) if training else None, val, index.classes


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


def _folder(key: str, path: str, expected: str) -> Path:
    if not os.path.isdir(path):
        raise UserError(f"{key} {path} is not a folder; give the one with {expected}")
    return Path(path)


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
