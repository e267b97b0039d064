"""A trained model from a file: the architecture, the weights, the names of the classes, and how to prepare an image."""

import os
from collections.abc import Iterable
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from config import OBJECTS, PIXELS, Config, build_config, default_config, flatten, settings_in
from models import build_detector, build_model, build_segmenter, load_weights
from models.build import ARCHITECTURE, NOT_FOR_KWARGS
from models.pretrained import locate
from models.weights import check_size, classes_in, detector_in, segmenter_classes, variant_of
from tasks.class_names import IMAGENET, as_ids, in_words, named_classes
from utils import checkpoint
from utils.errors import UserError, did_you_mean
from utils.fields import describe, dict_in, facts_of, fail
from utils.rules import CLASSES, CROSSFORMERS
from utils.settings import Given

SAID_BESIDES = {"upright": "DATA.UPRIGHT", "white": "DATA.WHITE", "views": "TEST.VIEWS"}
"""What an export says of its preparation that timm has no words for, and the setting."""
LARGEST = {"DATA.IMG_SIZE": 2**13, "MODEL.CROSSFORMER.GROUP_SIZE": 2**10, "MODEL.CROSSFORMER.INTERVAL": 2**10}
"""Settings with which a model would take all of the memory however small its weights are, and how large they may be."""
GROUPS_AS_PUBLISHED = [
    ("MODEL.CROSSFORMER.GROUP_SIZE", [7, 7, 7, 7], "the published recipe"),
    ("MODEL.CROSSFORMER.INTERVAL", [8, 4, 2, 1], "the published recipe"),
]
"""For a segmenter's or detector's weights that come without settings."""
PREPARATION = (
    "DATA.IMG_SIZE", "DATA.INTERPOLATION", "DATA.MEAN", "DATA.STD", "TEST.CROP", "TEST.CROP_PCT",
    *SAID_BESIDES.values(),
)  # fmt: skip
"""The settings that decide what a model sees of an image."""
SET_APART = "DATA.VAL_SHARE", "SEED"
"""The settings that decide which images it has not been trained on, where the data does not."""


ARCHITECTURE_SETTINGS = *(f"MODEL.CROSSFORMER.{key}" for key in ARCHITECTURE), "MODEL.KWARGS"
OF_ALL_TASKS = "DATA.MEAN", "DATA.STD"
"""What of the preparation holds for every task."""


class TrainedModel(NamedTuple):
    """What a checkpoint file holds.

    Attributes:
        model: in evaluation mode.
        config: the settings that it was trained with as far as the file says, else the defaults.
        classes: their names in words, as the model counts them.
        class_ids: their names in the data, which are WordNet ids in ImageNet's.
        facts: ``step``, ``epoch``, ``top1``, ``top5``, ``weights`` ... as far as the file says.
        notes: in words, what was done to the file's keys and which of them are not used.
    """

    model: nn.Module
    config: Config
    classes: list[str]
    class_ids: list[str]
    facts: dict[str, Any]
    notes: list[str]


def load_trained(
    path: str, device: torch.device, name: str = "", image_size: int = 0, weights: str = "auto"
) -> TrainedModel:
    """The model in a checkpoint: one of ours, a published one, plain weights, or a folder that timm has written.

    Args:
        path: a ``.pth`` or ``.safetensors`` file, a folder with ``config.json`` and ``model.safetensors``, or a name or
            URL as of :func:`models.pretrained.locate`.
        device: where the model goes.
        name: the timm name, for weights that do not say of which network they are.
        image_size: in place of the one that it was trained with; 0 keeps that.
        weights: ``model``, ``ema`` (their moving average), or ``auto``, the average where there is one.

    Raises:
        UserError: the file cannot be read, or fits no model that is known.
    """
    path = locate(path, name)
    content = checkpoint.read(path)
    which, state_dict = checkpoint.choose(checkpoint.weights_in(content, path), weights, path)
    known = facts_of(content, path)
    config = _config_of(content, state_dict, path, name, image_size)
    model = build(config, state_dict, path)
    loaded = load_weights(model, state_dict, path, allow_new_head=False)
    num_classes = model.num_classes
    told = ("step", "epoch", "top1", "top5", "miou", "loss", "images", "category_ids")
    facts: dict[str, Any] = {key: known[key] for key in told if key in known}
    facts["weights"] = which
    model.to(device).to(memory_format=torch.channels_last).eval()
    names = named_classes(content, num_classes, path)
    classes = in_words(names, num_classes)
    ids = (names and as_ids(names)) or names or (IMAGENET if num_classes == len(IMAGENET) else classes)
    return TrainedModel(model, config, classes, ids, facts, [f"{path}: {line}" for line in loaded.notes])


def build(config: Config, state_dict: dict[str, Tensor], path: str) -> Any:
    """The network of a config, with as many classes as its weights have.

    Raises:
        UserError: it cannot be built, or the weights have no head.
    """
    detector = detector_in(state_dict) if config.TASK == OBJECTS else None
    if detector is not None:
        return build_detector(config, detector[1], detector[2])
    segments = config.TASK == PIXELS
    num_classes = segmenter_classes(state_dict) if segments else classes_in(state_dict, config.MODEL.NAME)
    if num_classes is None:
        raise UserError(f"{path} has no head of {config.MODEL.NAME}, so it cannot tell classes apart")
    if segments:
        return build_segmenter(config, num_classes)
    check_size(config, num_classes, state_dict, path)
    return build_model(config, num_classes)


def _config_of(content: dict, weights: dict[str, Tensor], path: str, name: str, image_size: int) -> Config:
    settings = settings_of(content, weights, path, name)
    holds = dict(setting[:2] for setting in settings).get("MODEL.NAME", default_config().MODEL.NAME)
    if name not in ("", holds):
        raise UserError(f"--model {name}: {path} says that it holds {holds}; leave out --model")
    settings += [("MODEL.DROP_PATH_RATE", 0.0, path), ("MODEL.DROP_RATE", 0.0, path), ("MODEL.NUM_CLASSES", 0, path)]
    if image_size:
        settings.append(("DATA.IMG_SIZE", image_size, "--image-size"))
    return build_config(flags=settings)


def settings_of(content: dict, weights: dict[str, Tensor], path: str, name: str) -> list[Given]:
    """The settings that a checkpoint's content was trained with, as far as it says; its model and preparation at least.

    Args:
        name: the timm name, for weights that do not say of which network they are.

    Raises:
        UserError: it says nothing, or nonsense.
    """
    saved = content.get("config")
    timms = content["timm"] if os.path.isdir(path) else {}
    settings: list[Given] = []
    if isinstance(saved, str):  # ours; a published checkpoint's is a dict with settings of its own
        saved = settings_in(saved, path)
        _check_sizes(saved, path)
        settings += [(key, value, path) for key, value in saved.items() if key != "BASE"]
    elif timms:
        settings.append(("MODEL.NAME", timms["architecture"], path))
        settings += preparation_of(timms, path)
        arguments = dict_in(timms, "model_args")
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
        detector = detector_in(weights)
        if detector is not None:
            settings += [("TASK", OBJECTS, path), ("MODEL.HEAD", detector[0], path), ("TEST.RESIZE", [1333, 800], path)]
            settings += GROUPS_AS_PUBLISHED if found in CROSSFORMERS else []
        elif segmenter_classes(weights) is None:
            cfg = timm.get_pretrained_cfg(found)  # not every model has one
            settings += preparation_of({"pretrained_cfg": cfg.to_dict()} if cfg else {}, f"{path}, or timm of {found},")
        else:
            head = "semantic_fpn" if any("neck." in key for key in weights) else "upernet"
            settings += [("TASK", PIXELS, path), ("MODEL.HEAD", head, path)]
            settings += GROUPS_AS_PUBLISHED if found in CROSSFORMERS else []
    return settings


def _check_sizes(settings: dict[str, Any], path: str) -> None:
    for key, limit in LARGEST.items():
        value = settings.get(key, 0)
        for number in value if isinstance(value, list) else [value]:
            for one in number if isinstance(number, list) else [number]:
                if type(one) is not int or one > limit:
                    fail(path, key, f"whole numbers up to {limit:,}", one)


def preparation_of(timms: dict[str, Any], path: str) -> list[Given]:
    """timm's way to say how images are prepared, as settings, with what an export of ours says besides."""
    pretrained_cfg, defaults = dict_in(timms, "pretrained_cfg"), default_config()
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


def prepared_otherwise(content: dict, config: Config, path: str) -> list[str]:
    """Lines that name what of the settings differs from how a checkpoint's images were chosen and prepared."""
    saved, there = content.get("config"), {}
    if isinstance(saved, str):
        there = flatten(default_config()) | settings_in(saved, path)
    elif os.path.isdir(path):
        preparation = preparation_of(content["timm"], path)
        of_folder = flatten(build_config(flags=preparation))  # values as settings have them
        there = {key: of_folder[key] for key, *_ in preparation}
    here = flatten(config)
    matter = [key for key in PREPARATION if key != "TEST.CROP_PCT" or here["TEST.CROP"]]
    lines = []
    if differing := _differing(matter, here, there):
        lines.append(f"images are prepared otherwise than {path} says: {differing}")
    differing = _differing(SET_APART, here, there)
    if differing and here["DATA.VAL_SHARE"]:
        lines.append(f"warning: {path} may have been trained on some of these images: {differing}")
    return lines


def _differing(keys: Iterable[str], here: dict[str, Any], there: dict[str, Any]) -> str:
    differing = [key for key in keys if there.get(key, here[key]) != here[key]]
    return ", ".join(f"{key} {here[key]} (there {there[key]})" for key in differing)


def followed(config: Config, given: list[Given]) -> list[Given]:
    """Of the settings of weights those that a run from them takes over: architecture, and how images are prepared.

    Args:
        config: of the run, as it would be without them.
        given: as of :func:`settings_of`.
    """
    there = {key: (value, source) for key, value, source in given}

    def of(key: str) -> Any:
        return there.get(key, (None, ""))[0]

    keys = [key for key in PREPARATION if key != "TEST.VIEWS"]
    if config.TASK != CLASSES or of("TASK") not in (None, CLASSES):
        keys = [*OF_ALL_TASKS]
    if "MODEL.NAME" not in config.given or of("MODEL.NAME") == config.MODEL.NAME:
        keys += ["MODEL.NAME", *ARCHITECTURE_SETTINGS]
    return [(key, *there[key]) for key in keys if key in there]


def describe_following(config: Config, given: list[Given]) -> list[str]:
    """Say in a line what is as weights say, and what of it was asked for."""
    values, said = flatten(config), [one for one in given if one[0] in ("MODEL.NAME", *PREPARATION)]
    lines = []
    for source in dict.fromkeys(source for _, _, source in said):
        keys = [key for key, _, one in said if one == source]
        own = [key for key in keys if key in config.given]
        text = ", ".join(f"{key} {values[key]}" for key in keys if key not in own)
        asked = f"; as was asked for: {', '.join(f'{key} {values[key]}' for key in own)}" if own else ""
        lines.append(f"as {source} says: {text or 'nothing'}{asked}")
    return lines
