"""The names of a model's classes: in a checkpoint, in words, and matched with those of the data."""

import os

from timm.data import ImageNetInfo
from torch import Tensor

from data.index import ImageIndex, Index
from models.weights import classes_in
from utils.errors import UserError
from utils.fields import dict_in, facts_of

IMAGENET = ImageNetInfo("imagenet-1k").label_names()
NUMBERS = set(map(str, range(len(IMAGENET))))
"""The WordNet ids of its 1,000 classes, in order, and these numbers as names."""


def named_classes(content: dict, num_classes: int | None, path: str) -> list[str] | None:
    """The names of a checkpoint's classes as its model counts them: of a run of ours, or the ``label_names`` of timm.

    Raises:
        UserError: they are not as many as the model has classes, or no names.
    """
    timms = content["timm"] if os.path.isdir(path) else {}
    names = facts_of(content, path).get("classes") or timms.get("label_names")
    names = names or dict_in(timms, "pretrained_cfg").get("label_names")
    if not names:
        return None
    if isinstance(names, dict):  # timm's, where some numbers have no name
        numbers = [int(number) for number in names if str(number).isdecimal() and len(str(number)) < 7]
        count = num_classes or max(numbers, default=0) + 1
        names = [names.get(str(i), f"class {i}") for i in range(count)]
    names = [str(name) if isinstance(name, int) else name for name in names] if isinstance(names, list) else [None]
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"{path}: label_names must be a list of names, one for each class; mend its config.json")
    if num_classes not in (None, len(names)):
        raise UserError(f"{path} has the names of {len(names):,} classes, but its head has {num_classes:,}; mend them")
    return names


def check_classes(content: dict, classes: list[str], path: str) -> None:
    """Refuse a checkpoint whose classes have other names than the data's, or another order.

    Raises:
        UserError: names the first that differs.
    """
    for i, (there, here) in enumerate(zip(named_classes(content, None, path) or classes, classes, strict=False)):
        if there != here:
            raise UserError(f"{path} was trained on other classes: its class {i} is {there!r}, the data's {here!r}")


def in_words(names: list[str] | None, num_classes: int) -> list[str]:
    """The names where there are any, of ImageNet's WordNet ids what they mean."""
    info = ImageNetInfo("imagenet-1k")
    if names:
        ids = set(info.label_names())
        return [info.label_name_to_description(name) if name in ids else name for name in names]
    if num_classes == info.num_classes():
        return [info.index_to_description(i) for i in range(num_classes)]
    return [f"class {i}" for i in range(num_classes)]


def as_ids(names: list[str]) -> list[str] | None:
    """WordNet ids of ImageNet's classes for their descriptions or ids; None where one is neither, or is ambiguous."""
    info = ImageNetInfo("imagenet-1k")
    ids = info.label_names()
    words = [info.index_to_description(i) for i in range(len(ids))]
    if names == words:
        return ids
    known = {word: name for word, name in zip(words, ids, strict=True) if words.count(word) == 1}
    known |= {name: name for name in ids}
    return [known[name] for name in names] if all(name in known for name in names) else None


def number_as_the_model(
    index: Index, classes: list[str], content: dict, weights: dict[str, Tensor], name: str, path: str
) -> tuple[Index, list[str], set[str]]:
    """Number the data's ``classes`` like the model ``name`` where it has only some of its classes, or in disorder.

    So a model of ImageNet's 1,000 classes is evaluated on ImageNet-A and -R, which have 200 of them, and on
    ImageNet-V2, whose folders are named by their numbers. What a file says of its classes goes before their order on
    disk.

    Returns:
        the index with these numbers, the classes of the model, and those that the data has if it has not all of them.
    """
    num_classes = classes_in(weights, name)
    known = named_classes(content, num_classes, path)
    if known is None and num_classes == len(IMAGENET):
        known = IMAGENET
    if known is None or known == classes:
        return index, classes, set()
    if not isinstance(index, ImageIndex):  # where it does not name its classes, their numbers are the model's
        return index, known if getattr(index, "classes", None) is None else classes, set()
    present = classes
    if as_ids(known) == IMAGENET and set(present) == NUMBERS:  # fewer of them are most likely something else
        known, present = IMAGENET, [IMAGENET[int(number)] for number in present]
    if not set(present) <= set(known):
        known_ids, present_ids = as_ids(known), as_ids(present)
        if known_ids is None or present_ids is None or not set(present_ids) <= set(known_ids):
            return index, classes, set()
        known, present = known_ids, present_ids  # words in one place, WordNet ids in the other
    if len(set(known)) < len(known):
        twice = next(name for name in known if known.count(name) > 1)
        raise UserError(f"{path}: two of its classes are called {twice!r}, so that the data's cannot be told apart")
    index = index.rename_classes(present).with_classes(known)
    return index, known, set(present) if len(present) < len(known) else set()
