"""From a config to a model."""

import inspect
from functools import cache
from typing import Any, cast

import timm
import torch
from timm.layers import DropPath
from torch import nn

from models.crossformer import VARIANTS, CrossFormer
from models.heads import Detector, Segmenter, create_detector, create_segmenter
from utils.errors import UserError, did_you_mean

ARCHITECTURE = {
    "EMBED_DIM": "embed_dim",
    "DEPTHS": "depths",
    "NUM_HEADS": "num_heads",
    "GROUP_SIZE": "group_size",
    "INTERVAL": "interval",
}
"""Settings under MODEL.CROSSFORMER, and the arguments of :class:`models.crossformer.CrossFormer` they set."""

DROP_PATH_RATE = 0.2
"""Of models for which none was asked for and none was published."""

RATES = {"drop_rate": "DROP_RATE", "drop_path_rate": "DROP_PATH_RATE"}
"""Arguments of models, and the settings under MODEL that they are."""

NOT_FOR_KWARGS = {
    "num_classes": "it is MODEL.NUM_CLASSES, or read from the data",
    "in_chans": "images are read as RGB",
    "features_only": "a model without a head tells no classes apart",
    **{argument: f"it is MODEL.{setting}" for argument, setting in RATES.items()},
    **dict.fromkeys(("pretrained", "checkpoint_path"), "weights to start from are MODEL.PRETRAINED"),
    **dict.fromkeys(("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"), "it is about weights of timm's"),
}
"""What timm.create_model takes besides, but not from MODEL.KWARGS, and why."""


def build_model(config, num_classes: int, drop_rate: float | None = None) -> nn.Module:
    """The model that ``config.MODEL`` describes, with ``num_classes`` classes; any model that timm knows will do.

    Args:
        num_classes: 0 for a backbone.
        drop_rate: in place of MODEL.DROP_RATE; a negative one is the model's own.

    Raises:
        UserError: the model cannot be built as described.
    """
    name = config.MODEL.NAME
    if not timm.is_model(name):
        raise UserError(f"MODEL.NAME {name} is not a model that timm knows{did_you_mean(name, timm.list_models())}")
    settings = {key: config.MODEL.CROSSFORMER[key] for key in ARCHITECTURE if config.MODEL.CROSSFORMER[key]}
    if settings and name not in VARIANTS:
        raise UserError(f"MODEL.CROSSFORMER.{next(iter(settings))} is set, but MODEL.NAME {name} is no CrossFormer")
    of_others = {a: f"it is MODEL.CROSSFORMER.{key}" for key, a in ARCHITECTURE.items() if name in VARIANTS}
    for argument, reason in (NOT_FOR_KWARGS | of_others).items():
        if argument in config.MODEL.KWARGS:
            raise UserError(f"MODEL.KWARGS {argument} is not to be set here: {reason}")
    arguments = {ARCHITECTURE[key]: value for key, value in settings.items()} | dict(config.MODEL.KWARGS)
    drop_rate = config.MODEL.DROP_RATE if drop_rate is None else drop_rate
    for argument, rate in {"drop_rate": drop_rate, "drop_path_rate": _drop_path_rate(config)}.items():
        # A negative one is the model's own; without knowing of it a model has 0
        if rate > 0 or (rate == 0 and takes(name, argument)):
            arguments[argument] = rate
    try:
        model = timm.create_model(name, num_classes=num_classes, **arguments)
    except Exception as error:  # constructors refuse what they do not take in arbitrary ways
        raise _refusal(name, arguments, error) from error
    if config.TRAIN.USE_CHECKPOINT != "none":
        recompute(model, name, config.TRAIN.USE_CHECKPOINT)
    return model


def build_segmenter(config, num_classes: int) -> Segmenter:
    """The network that ``config.MODEL`` describes for segmentation: a head on any model of timm's that gives maps.

    Raises:
        UserError: it cannot be built as described.
    """
    try:
        backbone = build_model(config, num_classes=0, drop_rate=-1.0)  # MODEL.DROP_RATE is the head's
        wanted = config.MODEL
        return create_segmenter(wanted.HEAD, backbone, num_classes, wanted.DROP_RATE, wanted.HEAD_CHANNELS)
    except ValueError as error:
        raise UserError(f"MODEL.NAME {config.MODEL.NAME} takes no head for segmentation: {error}") from error


def build_detector(config, num_classes: int, masks: bool) -> Detector:
    """The network that ``config.MODEL`` describes for detection: heads on any model of timm's that gives maps.

    Raises:
        UserError: it cannot be built as described.
    """
    try:
        backbone = build_model(config, num_classes=0, drop_rate=-1.0)
        wanted = config.MODEL
        inside = wanted.STYLE, wanted.HEAD_CHANNELS, wanted.ANCHOR_SCALE
        return create_detector(wanted.HEAD, backbone, num_classes, masks, *inside)
    except ValueError as error:
        raise UserError(f"MODEL.NAME {config.MODEL.NAME} takes no head for detection: {error}") from error


def left_out(config) -> list[str]:
    """What nobody has asked for and the model does not take: a line each, for the log."""
    lines = list(config.notes)
    if config.MODEL.DROP_PATH_RATE < 0 and not takes(config.MODEL.NAME, "drop_path_rate"):
        lines.append(f"MODEL.NAME {config.MODEL.NAME} has no drop_path_rate: trained without stochastic depth")
    return lines


def _drop_path_rate(config) -> float:
    """That of MODEL.DROP_PATH_RATE; where nobody has asked for one, 0 for a model that has none."""
    if config.MODEL.DROP_PATH_RATE >= 0:
        return config.MODEL.DROP_PATH_RATE
    return DROP_PATH_RATE if takes(config.MODEL.NAME, "drop_path_rate") else 0.0


def set_drop_path_rate(model: nn.Module, config, built_by) -> None:
    """Give a model the stochastic depth of ``config``, as if it had been built by it.

    Args:
        built_by: the config that it was built by.

    Raises:
        UserError: it is no CrossFormer and was built without.
    """
    rate, built_with = _drop_path_rate(config), _drop_path_rate(built_by)
    if isinstance(model, CrossFormer):
        blocks = [block for stage in model.layers for block in cast(Any, stage).blocks]
        for block, own in zip(blocks, torch.linspace(0, rate, len(blocks), device="cpu").tolist(), strict=True):
            block.drop_path_rate = own
        return
    if rate and not built_with:
        raise UserError(
            f"TRAIN.CURRICULUM: {config.MODEL.NAME} is built without stochastic depth; set MODEL.DROP_PATH_RATE to the "
            "largest rate that it is to have, and the smaller ones in the curriculum"
        )
    for module in model.modules():
        if isinstance(module, DropPath) and built_with:
            vars(module).setdefault("built_with", module.drop_prob)
            module.drop_prob = vars(module)["built_with"] * rate / built_with


@cache
def takes(name: str, argument: str) -> bool:
    """Whether the constructor of timm's model ``name`` takes an argument (with 0 for a value)."""
    if name in VARIANTS:
        return argument in inspect.signature(CrossFormer).parameters
    return _failure(name, {argument: 0.0}) is None


def _failure(name: str, arguments: dict[str, Any]) -> Exception | None:
    """Why the model cannot be built with ``arguments``. It is built without memory, and no random number is drawn."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            timm.create_model(name, **arguments)
    except Exception as error:
        return error
    return None


def _refusal(name: str, arguments: dict[str, Any], error: Exception) -> Exception:
    """What to tell whoever has set the arguments with which the model cannot be built."""
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if name in VARIANTS and isinstance(error, ValueError):
        argument, _, rest = reason.partition(" ")  # as our own constructor words it
        key = next((key for key, own in ARCHITECTURE.items() if own == argument), None)
        if key:
            return UserError(f"MODEL.CROSSFORMER.{key} {rest}")
    for argument, value in arguments.items():
        others = {key: other for key, other in arguments.items() if key != argument}
        if _failure(name, others) is not None:
            continue  # it is not this one, or not this one alone
        known = argument in _parameters(name)
        if argument in RATES and not known:
            return UserError(f"MODEL.NAME {name} has no {argument}: set MODEL.{RATES[argument]} 0")
        if argument in RATES:
            return UserError(f"MODEL.{RATES[argument]} {value}: MODEL.NAME {name} does not take it: {reason}")
        if not known:
            near = did_you_mean(argument, _parameters(name) - NOT_FOR_KWARGS.keys())
            return UserError(f"MODEL.KWARGS {argument}: MODEL.NAME {name} has no such argument{near}")
        return UserError(f"MODEL.KWARGS {argument} {value}: MODEL.NAME {name} does not take it: {reason}")
    if name in VARIANTS:
        return error
    return UserError(f"MODEL.NAME {name} cannot be built: {reason}")


def _parameters(name: str) -> set[str]:
    """The names of the arguments of the model's constructor."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return set(inspect.signature(type(timm.create_model(name))).parameters)


def recompute(model: nn.Module, name: str, how: str) -> None:
    """Let the backward pass recompute what it needs: ``full``, or for a CrossFormer ``selective``.

    Raises:
        UserError: the model ``name`` cannot.
    """
    if how == "selective" and not isinstance(model, CrossFormer):
        raise UserError(f"TRAIN.USE_CHECKPOINT selective: MODEL.NAME {name} is no CrossFormer; use full or none")
    try:
        cast(Any, model).set_grad_checkpointing(True, **({"selective": True} if how == "selective" else {}))
    except (AssertionError, AttributeError) as error:
        raise UserError(f"MODEL.NAME {name} cannot recompute: set TRAIN.USE_CHECKPOINT none") from error
