"""A trained model from a file: the architecture, the weights, the names of the classes, and how to prepare an image."""

import os
from typing import Any, NamedTuple

import timm
import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn
from yacs.config import CfgNode

from config import build_config, default_config, flatten, settings_in
from engine.validation import describe, facts_of
from models import build_model, load_weights
from models.build import ARCHITECTURE, NOT_FOR_KWARGS
from models.weights import check_size, classes_in, variant_of
from utils import checkpoint
from utils.errors import UserError, did_you_mean

SAID_BESIDES = {"upright": "DATA.UPRIGHT", "white": "DATA.WHITE", "views": "TEST.VIEWS"}
"""What an export says of its preparation that timm has no words for, and the setting."""
PREPARATION = (
    "DATA.IMG_SIZE", "DATA.INTERPOLATION", "DATA.MEAN", "DATA.STD", "TEST.CROP", "TEST.CROP_PCT",
    *SAID_BESIDES.values(),
)  # fmt: skip
"""The settings that decide what a model sees of an image."""


class TrainedModel(NamedTuple):
    """What a checkpoint file holds.

    Attributes:
        model: in evaluation mode.
        config: the settings that it was trained with as far as the file says, else the defaults.
        classes: their names as the model counts them.
        facts: ``step``, ``epoch``, ``top1``, ``top5``, ``weights`` ... as far as the file says.
        notes: in words, what was done to the file's keys and which of them are not used.
    """

    model: nn.Module
    config: CfgNode
    classes: list[str]
    facts: dict[str, Any]
    notes: list[str]


def load_trained(
    path: str, device: torch.device, name: str = "", image_size: int = 0, weights: str = "auto"
) -> TrainedModel:
    """The model in a checkpoint: one of ours, a published one, plain weights, or a folder that timm has written.

    Args:
        path: a ``.pth`` or ``.safetensors`` file, or a folder with ``config.json`` and ``model.safetensors``.
        device: where the model goes.
        name: the timm name, for weights that do not say of which network they are.
        image_size: in place of the one that it was trained with; 0 keeps that.
        weights: ``model``, ``ema`` (their moving average), or ``auto``, the average where there is one.

    Raises:
        UserError: the file cannot be read, or fits no model that is known.
    """
    content = checkpoint.read(path)
    which, state_dict = checkpoint.choose(checkpoint.weights_in(content, path), weights, path)
    known = facts_of(content, path)
    config = _config_of(content, state_dict, path, name, image_size)
    num_classes = classes_in(state_dict, config.MODEL.NAME)
    if num_classes is None:
        raise UserError(f"{path} has no head of {config.MODEL.NAME}, so it cannot tell classes apart")
    check_size(config, num_classes, state_dict, path)
    model = build_model(config, num_classes)
    loaded = load_weights(model, state_dict, path, allow_new_head=False)
    facts = {key: known[key] for key in ("step", "epoch", "top1", "top5", "loss", "images") if key in known}
    facts["weights"] = which
    model.to(device, memory_format=torch.channels_last).eval()
    classes = in_words(named_classes(content, num_classes, path), num_classes)
    return TrainedModel(model, config, classes, facts, [f"{path}: {line}" for line in loaded.notes])


def _config_of(content: dict, weights: dict[str, Tensor], path: str, name: str, image_size: int) -> CfgNode:
    saved = content.get("config")
    timms = content["timm"] if os.path.isdir(path) else {}
    settings: list[tuple[str, Any, str]] = []
    if isinstance(saved, str):  # ours; a published checkpoint's is a dict with settings of its own
        settings += [(key, value, path) for key, value in settings_in(saved, path).items() if key != "BASE"]
    elif timms:
        settings.append(("MODEL.NAME", timms["architecture"], path))
        settings += preparation_of(timms, path)
        arguments = _dict_in(timms, "model_args")
        settings += [(f"MODEL.CROSSFORMER.{k}", arguments[a], path) for k, a in ARCHITECTURE.items() if a in arguments]
        others = arguments.keys() - ARCHITECTURE.values() - NOT_FOR_KWARGS.keys()
        settings.append(("MODEL.KWARGS", {argument: arguments[argument] for argument in sorted(others)}, path))
    else:
        found = name or variant_of(weights)
        if not found:
            raise UserError(f"{path} does not say which model it holds: give its timm name with --model")
        if not timm.is_model(found):
            raise UserError(f"--model {found} is not a model that timm knows{did_you_mean(found, timm.list_models())}")
        settings.append(("MODEL.NAME", found, path))
        settings += preparation_of({"pretrained_cfg": timm.get_pretrained_cfg(found).to_dict()}, path)
    holds = dict(setting[:2] for setting in settings).get("MODEL.NAME", default_config().MODEL.NAME)
    if name not in ("", holds):
        raise UserError(f"--model {name}: {path} says that it holds {holds}; leave out --model")
    settings += [("MODEL.DROP_PATH_RATE", 0.0, path), ("MODEL.DROP_RATE", 0.0, path), ("MODEL.NUM_CLASSES", 0, path)]
    if image_size:
        settings.append(("DATA.IMG_SIZE", image_size, "--image-size"))
    return build_config(flags=settings)


def _dict_in(timms: dict[str, Any], name: str) -> dict[str, Any]:
    value = timms.get(name)
    return value if isinstance(value, dict) else {}


def preparation_of(timms: dict[str, Any], path: str) -> list[tuple[str, Any, str]]:
    """timm's way to say how images are prepared, as settings, with what an export of ours says besides."""
    pretrained_cfg, defaults = _dict_in(timms, "pretrained_cfg"), default_config()
    size = pretrained_cfg.get("input_size", (3, 224, 224))
    if not isinstance(size, list | tuple) or not size:
        raise UserError(f"{path}: its input_size is {describe(size)}, expected channels, height and width")
    crop_pct, crop_mode = pretrained_cfg.get("crop_pct", defaults.TEST.CROP_PCT), pretrained_cfg.get("crop_mode")
    if crop_mode == "border" or (crop_mode == "squash" and crop_pct != 1):
        raise UserError(f"{path} prepares images with crop_mode {crop_mode} and crop_pct {crop_pct}, unknown here")
    settings = {
        "DATA.IMG_SIZE": size[1:] if len(size) > 2 else size[-1],
        "DATA.MEAN": pretrained_cfg.get("mean", defaults.DATA.MEAN),
        "DATA.STD": pretrained_cfg.get("std", defaults.DATA.STD),
        "DATA.INTERPOLATION": pretrained_cfg.get("interpolation", "bicubic"),
        "TEST.CROP": crop_mode != "squash",
        "TEST.CROP_PCT": crop_pct,
        **{key: timms[name] for name, key in SAID_BESIDES.items() if name in timms},
    }
    return [(key, value, path) for key, value in settings.items()]


def prepared_otherwise(content: dict, config: CfgNode, path: str) -> str:
    """A line that names what of the settings differs from how a checkpoint's images were prepared; else empty."""
    saved, there = content.get("config"), {}
    if isinstance(saved, str):
        there = flatten(default_config()) | settings_in(saved, path)
    elif os.path.isdir(path):
        there = {key: value for key, value, _ in preparation_of(content["timm"], path)}
    here = flatten(config)
    differing = [key for key in PREPARATION if there.get(key, here[key]) != here[key]]
    differing = [f"{key} {here[key]} (there {there[key]})" for key in differing]
    return f"images are prepared otherwise than {path} says: {', '.join(differing)}" if differing else ""


def named_classes(content: dict, num_classes: int | None, path: str) -> list[str] | None:
    """The names of a checkpoint's classes as its model counts them: of a run of ours, or the ``label_names`` of timm.

    Raises:
        UserError: they are not as many as the model has classes, or no names.
    """
    timms = content["timm"] if os.path.isdir(path) else {}
    names = facts_of(content, path).get("classes") or timms.get("label_names")
    names = names or _dict_in(timms, "pretrained_cfg").get("label_names")
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
