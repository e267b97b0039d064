"""A trained model from a file: the architecture, the weights, the names of the classes, and how to prepare an image."""

import os
from typing import Any, NamedTuple

import timm
import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn
from yacs.config import CfgNode

from config import build_config, default_config, settings_in
from engine.validation import describe, facts_of
from models import build_model, load_weights
from models.build import ARCHITECTURE
from models.weights import check_size, classes_in, variant_of
from utils import checkpoint
from utils.errors import UserError, did_you_mean


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
    return TrainedModel(
        model, config, _classes_of(content, known, num_classes), facts, [f"{path}: {line}" for line in loaded.notes]
    )


def _config_of(content: dict, weights: dict[str, Tensor], path: str, name: str, image_size: int) -> CfgNode:
    saved = content.get("config")
    timms = content["timm"] if os.path.isdir(path) else {}
    settings: list[tuple[str, Any, str]] = []
    if isinstance(saved, str):  # ours; a published checkpoint's is a dict with settings of its own
        settings += [(key, value, path) for key, value in settings_in(saved, path).items() if key != "BASE"]
    elif timms:
        settings.append(("MODEL.NAME", timms["architecture"], path))
        settings += _preparation_of(_dict_in(timms, "pretrained_cfg"), path)
        arguments = _dict_in(timms, "model_args")
        settings += [(f"MODEL.CROSSFORMER.{k}", arguments[a], path) for k, a in ARCHITECTURE.items() if a in arguments]
    else:
        found = name or variant_of(weights)
        if not found:
            raise UserError(f"{path} does not say which model it holds: give its timm name with --model")
        if not timm.is_model(found):
            raise UserError(f"--model {found} is not a model that timm knows{did_you_mean(found, timm.list_models())}")
        settings.append(("MODEL.NAME", found, path))
        settings += _preparation_of(timm.get_pretrained_cfg(found).to_dict(), path)
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


def _preparation_of(pretrained_cfg: dict[str, Any], path: str) -> list[tuple[str, Any, str]]:
    """timm's way to say how images are prepared, as settings."""
    size = pretrained_cfg.get("input_size", (3, 224, 224))
    if not isinstance(size, list | tuple) or not size:
        raise UserError(f"{path}: its input_size is {describe(size)}, expected channels, height and width")
    settings = {
        "DATA.IMG_SIZE": size[-1],
        "DATA.MEAN": pretrained_cfg.get("mean", default_config().DATA.MEAN),
        "DATA.STD": pretrained_cfg.get("std", default_config().DATA.STD),
        "DATA.INTERPOLATION": pretrained_cfg.get("interpolation", "bicubic"),
        "TEST.CROP_PCT": pretrained_cfg.get("crop_pct", default_config().TEST.CROP_PCT),
    }
    return [(key, value, path) for key, value in settings.items()]


def _names_of(timms: Any) -> list[str]:
    names = timms.get("label_names") if isinstance(timms, dict) else None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []


def _classes_of(content: dict, known: dict, num_classes: int) -> list[str]:
    """Their names, in words where they are WordNet ids of ImageNet."""
    info = ImageNetInfo("imagenet-1k")
    names = known.get("classes") or _names_of(content.get("timm"))
    if names and len(names) == num_classes:
        ids = set(info.label_names())
        return [info.label_name_to_description(name) if name in ids else name for name in names]
    if num_classes == info.num_classes():
        return [info.index_to_description(i) for i in range(num_classes)]
    return [f"class {i}" for i in range(num_classes)]
