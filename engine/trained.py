"""A trained model from a file: the architecture, the weights, the names of the classes, and how to prepare an image."""

from typing import Any, NamedTuple

import timm
import torch
import yaml
from timm.data import ImageNetInfo
from torch import Tensor, nn
from yacs.config import CfgNode

from config import build_config, default_config, flatten
from models import build_model, load_weights
from models.build import ARCHITECTURE, NOT_FOR_KWARGS
from models.weights import classes_in, variant_of
from utils import checkpoint
from utils.errors import UserError, did_you_mean


class TrainedModel(NamedTuple):
    """What a checkpoint file holds.

    Attributes:
        model: in evaluation mode.
        config: the settings that it was trained with as far as the file says, else the defaults.
        classes: their names as the model counts them.
        facts: ``step``, ``epoch``, ``top1``, ``top5``, ``weights`` ... as far as the file says.
    """

    model: nn.Module
    config: CfgNode
    classes: list[str]
    facts: dict[str, Any]


def load_trained(path: str, device: torch.device, name: str = "", image_size: int = 0) -> TrainedModel:
    """The model in a checkpoint: one of ours, a published one, plain weights, or a folder that timm has written.

    The moving average is taken where there is one.

    Args:
        path: a ``.pth`` or ``.safetensors`` file, or a folder with ``config.json`` and ``model.safetensors``.
        device: where the model goes.
        name: the timm name, for weights that do not say of which network they are.
        image_size: in place of the one that it was trained with; 0 keeps that.

    Raises:
        UserError: the file cannot be read, or fits no model that is known.
    """
    content = checkpoint.read(path)
    weights = content.get("ema") or checkpoint.state_dict_of(content, path)
    config = _config_of(content, weights, path, name, image_size)
    num_classes = classes_in(weights, config.MODEL.NAME)
    if num_classes is None:
        raise UserError(f"{path} has no head of {config.MODEL.NAME}, so it cannot tell classes apart")
    model = build_model(config, num_classes)
    load_weights(model, weights, path, allow_new_head=False)
    facts = {key: content[key] for key in ("step", "epoch", "top1", "top5", "loss", "images") if key in content}
    facts["weights"] = "ema" if content.get("ema") else content.get("weights", "model")
    model.to(device, memory_format=torch.channels_last).eval()
    return TrainedModel(model, config, _classes_of(content, num_classes), facts)


def _config_of(content: dict, weights: dict[str, Tensor], path: str, name: str, image_size: int) -> CfgNode:
    saved = content.get("config")
    timms = content.get("timm", {})
    settings: list[tuple[str, Any, str]] = []
    if isinstance(saved, str):  # ours; a published checkpoint's is a dict with settings of its own
        known = flatten(default_config())
        ours = flatten(CfgNode(yaml.safe_load(saved))).items()
        settings += [(key, value, path) for key, value in ours if key in known and key != "BASE"]
    elif timms:
        settings.append(("MODEL.NAME", timms["architecture"], path))
        settings += _preparation_of(timms.get("pretrained_cfg", {}), path)
        arguments = timms.get("model_args", {})
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
        settings += _preparation_of(timm.get_pretrained_cfg(found).to_dict(), path)
    holds = dict(setting[:2] for setting in settings).get("MODEL.NAME", default_config().MODEL.NAME)
    if name not in ("", holds):
        raise UserError(f"--model {name}: {path} says that it holds {holds}; leave out --model")
    settings += [("MODEL.DROP_PATH_RATE", 0.0, path), ("MODEL.DROP_RATE", 0.0, path), ("MODEL.NUM_CLASSES", 0, path)]
    if image_size:
        settings.append(("DATA.IMG_SIZE", image_size, "--image-size"))
    return build_config(flags=settings)


def _preparation_of(pretrained_cfg: dict[str, Any], path: str) -> list[tuple[str, Any, str]]:
    """timm's way to say how images are prepared, as settings."""
    settings = {
        "DATA.IMG_SIZE": pretrained_cfg.get("input_size", (3, 224, 224))[1:],
        "DATA.MEAN": list(pretrained_cfg.get("mean", default_config().DATA.MEAN)),
        "DATA.STD": list(pretrained_cfg.get("std", default_config().DATA.STD)),
        "DATA.INTERPOLATION": pretrained_cfg.get("interpolation", "bicubic"),
        "TEST.CROP_PCT": pretrained_cfg.get("crop_pct", default_config().TEST.CROP_PCT),
    }
    return [(key, value, path) for key, value in settings.items()]


def _classes_of(content: dict, num_classes: int) -> list[str]:
    """Their names, in words where they are WordNet ids of ImageNet."""
    info = ImageNetInfo("imagenet-1k")
    names = content.get("classes") or content.get("timm", {}).get("label_names")
    if names and len(names) == num_classes:
        ids = set(info.label_names())
        return [info.label_name_to_description(name) if name in ids else name for name in names]
    if num_classes == info.num_classes():
        return [info.index_to_description(i) for i in range(num_classes)]
    return [f"class {i}" for i in range(num_classes)]
