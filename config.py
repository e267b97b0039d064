"""Every setting, its default and what it means; YAML files with inheritance, overrides and validation.

Later sources win: the defaults below, the files named by ``BASE``, the file itself, ``--opts``, the flags.
"""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from math import isfinite
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from utils.errors import UserError, did_you_mean
from utils.surroundings import expanded


class Config(CfgNode):
    """All settings."""

    notes: tuple[str, ...] = ()
    """What :func:`build_config` has left out and why, a line each."""


_C = Config()

# What is learned: classification
_C.TASK = "classification"
# YAML files to read first (paths relative to this file)
_C.BASE = []

_C.DATA = CfgNode()
# Folder of the data set, whatever its layout (docs/data.md)
_C.DATA.DATA_PATH = ""
# auto | folder | tar | zip | imagenet (the official archives), or what timm's create_dataset takes, as hfds/NAME
_C.DATA.FORMAT = "auto"
# Where the index of a data set that cannot be written to is kept; the user's cache folder when empty
_C.DATA.CACHE_DIR = ""
# Read the data into memory first: no | part (each process of a host its share) | full (each process everything)
_C.DATA.CACHE_MODE = "no"
# Images of one process in one micro-batch
_C.DATA.BATCH_SIZE = 128
# Height and width of the images that the model sees: one number for squares, or [height, width]
_C.DATA.IMG_SIZE = 224
# bicubic | bilinear | nearest
_C.DATA.INTERPOLATION = "bicubic"
# Loader processes of each training process; 0 loads in the training process itself
_C.DATA.NUM_WORKERS = 8
# An image that cannot be decoded: error stops the run; skip takes another one and logs the path
_C.DATA.ON_BAD_IMAGE = "error"
# Turn and mirror images as their EXIF orientation asks for; False leaves them as they lie in the file, as published
_C.DATA.UPRIGHT = False
# An image with more pixels than this counts as bad, lest one file take all of the memory
_C.DATA.MAX_PIXELS = 178_956_970
# Value that is white in grey images of more than 8 bits; 0 takes that of 16 bits, and refuses floats and 32 bits
_C.DATA.WHITE = 0.0
# Mean and standard deviation of the red, green and blue channel, to normalise with
_C.DATA.MEAN = [0.485, 0.456, 0.406]
_C.DATA.STD = [0.229, 0.224, 0.225]

_C.MODEL = CfgNode()
# Any model that timm knows; CrossFormer's are listed in the README
_C.MODEL.NAME = "crossformer_small"
# 0 takes the number of classes in the data
_C.MODEL.NUM_CLASSES = 0
# Checkpoint to carry on from, or to evaluate
_C.MODEL.RESUME = ""
# Checkpoint whose weights to start from; the head is new when the number of classes differs
_C.MODEL.PRETRAINED = ""
# Which weights of PRETRAINED: model | ema | auto (the moving average where there is one); with --eval: auto takes both
_C.MODEL.WEIGHTS = "auto"
# Dropout before the head; -1 takes the model's own, which is 0 for a CrossFormer
_C.MODEL.DROP_RATE = -1.0
# Stochastic depth of the last block; it grows linearly from 0 at the first. -1 takes what was published with a
# CrossFormer, and for other models 0.2 where they have it
_C.MODEL.DROP_PATH_RATE = -1.0
# Share of the target spread over all classes
_C.MODEL.LABEL_SMOOTHING = 0.1
# Other arguments of the model as timm.create_model takes them, for example {img_size: 256}
_C.MODEL.KWARGS = CfgNode()

# What differs from the variant MODEL.NAME; 0 or [] keeps the variant's own
_C.MODEL.CROSSFORMER = CfgNode()
# Channels of the first stage
_C.MODEL.CROSSFORMER.EMBED_DIM = 0
# Blocks of each stage
_C.MODEL.CROSSFORMER.DEPTHS = []
# Attention heads of each stage
_C.MODEL.CROSSFORMER.NUM_HEADS = []
# Group size of each stage, or a nested list with one for each block
_C.MODEL.CROSSFORMER.GROUP_SIZE = []
# Interval of long-distance attention, likewise
_C.MODEL.CROSSFORMER.INTERVAL = []

_C.TRAIN = CfgNode()
_C.TRAIN.EPOCHS = 300
# Epochs of linear warm-up from WARMUP_LR to BASE_LR
_C.TRAIN.WARMUP_EPOCHS = 20
# Learning rates are for LR_REFERENCE_BATCH images a step and scale with the global batch
_C.TRAIN.BASE_LR = 5e-4
_C.TRAIN.WARMUP_LR = 5e-7
_C.TRAIN.MIN_LR = 5e-6
# 0 takes the learning rates as they are, whatever the global batch
_C.TRAIN.LR_REFERENCE_BATCH = 512
# Not applied to biases and other 1-d parameters
_C.TRAIN.WEIGHT_DECAY = 0.05
# Each layer's learning rate is that of the layer above it times this (for fine-tuning, as 0.8); 1 for the same
_C.TRAIN.LAYER_DECAY = 1.0
# Train the head alone (linear probe); the trunk stays as it is
_C.TRAIN.FREEZE_TRUNK = False
# Largest norm of the gradient; 0 does not clip
_C.TRAIN.CLIP_GRAD = 5.0
# Micro-batches whose gradients make up one step
_C.TRAIN.ACCUMULATION_STEPS = 1
# Cut micro-batches that do not fit into the GPU's memory into parts; the gradient is that of the whole
_C.TRAIN.AUTO_MICRO_BATCH = False
# Recompute in the backward pass instead of keeping: none | selective (all but most matrix products; CrossFormer only:
# half of the memory, a tenth more time) | full (a fifth or less, a quarter more time). True means full, False none
_C.TRAIN.USE_CHECKPOINT = "none"
# torch.compile mode: none | default | reduce-overhead (CUDA graphs) | max-autotune-no-cudagraphs
_C.TRAIN.COMPILE = "none"
# Decay of the moving average of the weights, for example 0.9999; 0 keeps none
_C.TRAIN.EMA_DECAY = 0.0
# Let the EMA decay grow from 0 over the first steps
_C.TRAIN.EMA_WARMUP = False
# Carry on from checkpoints/last.pth of the results folder when it is there
_C.TRAIN.AUTO_RESUME = True
# Carry on from a checkpoint although it is of another data set, or of a run with other settings
_C.TRAIN.FORCE_RESUME = False
# Save last.pth at the end of each epoch, and every so many steps and minutes besides; 0 for never
_C.TRAIN.SAVE_EVERY_STEPS = 0
_C.TRAIN.SAVE_EVERY_MINUTES = 15.0
# Of last.pth this many saves: the newest, and those before it in previous.pth, previous_2.pth, ...
_C.TRAIN.KEEP_LAST = 2
# Keep epoch_0010.pth for good after every so many epochs; 0 for none
_C.TRAIN.KEEP_EVERY_EPOCHS = 0
# End the run when nothing has happened for so long (an evaluation counts as one thing); 0 waits forever
_C.TRAIN.HANG_MINUTES = 60.0
# Stop after this many steps in a row whose gradient is not finite; each of them is skipped
_C.TRAIN.MAX_SKIPPED_STEPS = 20
# Evaluate after every so many epochs, and after the last
_C.TRAIN.EVAL_EVERY_EPOCHS = 1

_C.TRAIN.OPTIMIZER = CfgNode()
# adamw | sgd | fused_adam | fused_lamb (the last two are NVIDIA apex's)
_C.TRAIN.OPTIMIZER.NAME = "adamw"
_C.TRAIN.OPTIMIZER.BETAS = [0.9, 0.999]
_C.TRAIN.OPTIMIZER.EPS = 1e-8
# Of sgd, with Nesterov's correction
_C.TRAIN.OPTIMIZER.MOMENTUM = 0.9

_C.TRAIN.LR_SCHEDULER = CfgNode()
# cosine | linear | step
_C.TRAIN.LR_SCHEDULER.NAME = "cosine"
# step: multiply by DECAY_RATE every so many epochs after the warm-up
_C.TRAIN.LR_SCHEDULER.DECAY_EPOCHS = 30
_C.TRAIN.LR_SCHEDULER.DECAY_RATE = 0.1

_C.AUG = CfgNode()
# Where AUTO_AUGMENT or COLOR_JITTER run: cpu (the loader processes) | cuda | auto (on the GPU where there is one)
_C.AUG.DEVICE = "auto"
# Area of the random crop, as a share of the image
_C.AUG.SCALE = [0.08, 1.0]
# Aspect ratio of the random crop
_C.AUG.RATIO = [0.75, 1.3333333333333333]
# Probability of a horizontal flip
_C.AUG.HFLIP = 0.5
# Strength of colour jitter; AUTO_AUGMENT takes its place unless that is none
_C.AUG.COLOR_JITTER = 0.4
# timm's notation, for example rand-m9-mstd0.5-inc1; or none
_C.AUG.AUTO_AUGMENT = "rand-m9-mstd0.5-inc1"
# Random erasing: probability, pixel | rand | const, number of patches
_C.AUG.REPROB = 0.25
_C.AUG.REMODE = "pixel"
_C.AUG.RECOUNT = 1
# Alpha of mixup and of cutmix; 0 turns one off
_C.AUG.MIXUP = 0.8
_C.AUG.CUTMIX = 1.0
# Smallest and largest share of a cutmix patch, in place of CUTMIX; [] for none
_C.AUG.CUTMIX_MINMAX = []
# Probability that a batch is mixed at all, and that it is cutmix when both are on
_C.AUG.MIXUP_PROB = 1.0
_C.AUG.MIXUP_SWITCH_PROB = 0.5
# One draw for each: batch | pair | elem
_C.AUG.MIXUP_MODE = "batch"

_C.TEST = CfgNode()
# Crop the centre; False resizes to IMG_SIZE x IMG_SIZE
_C.TEST.CROP = True
# Share of the resized short side that the crop takes: 0.875 resizes to 256 for 224
_C.TEST.CROP_PCT = 0.875
# Average over views of each image: none | flip | five_crop (corners and centre of the square that CROP_PCT leaves)
_C.TEST.VIEWS = "none"
# --eval writes tables and a picture: each class, the confusion matrix, the calibration
_C.TEST.REPORT = False
# --eval of ImageNet's own validation images with all labels that fit each besides (ImageNet-ReaL)
_C.TEST.REAL_LABELS = False

_C.LOG = CfgNode()
# Project of Weights & Biases to send the curves to as well; empty for none
_C.LOG.WANDB = ""

# Precision of the model: auto (bf16 on a GPU that has it, else fp16; none on a CPU) | bf16 | fp16 | tf32 | none
_C.AMP = "auto"
_C.SEED = 0
# Results go to OUTPUT/MODEL.NAME/TAG
_C.OUTPUT = "output"
_C.TAG = "default"
# Steps between two lines of the log
_C.PRINT_FREQ = 10

CHOICES = {
    "AMP": ("auto", "bf16", "fp16", "tf32", "none"),
    "AUG.DEVICE": ("auto", "cpu", "cuda"),
    "AUG.MIXUP_MODE": ("batch", "pair", "elem"),
    "AUG.REMODE": ("pixel", "rand", "const"),
    "DATA.CACHE_MODE": ("no", "part", "full"),
    "DATA.FORMAT": ("auto", "folder", "tar", "zip", "imagenet"),
    "DATA.INTERPOLATION": ("bicubic", "bilinear", "nearest"),
    "DATA.ON_BAD_IMAGE": ("error", "skip"),
    "MODEL.WEIGHTS": ("auto", "model", "ema"),
    "TASK": ("classification",),
    "TEST.VIEWS": ("none", "flip", "five_crop"),
    "TRAIN.COMPILE": ("none", "default", "reduce-overhead", "max-autotune-no-cudagraphs"),
    "TRAIN.LR_SCHEDULER.NAME": ("cosine", "linear", "step"),
    "TRAIN.OPTIMIZER.NAME": ("adamw", "sgd", "fused_adam", "fused_lamb"),
    "TRAIN.USE_CHECKPOINT": ("none", "selective", "full"),
}

DICTS = ("MODEL.KWARGS",)
"""Settings that are a dict, with names that are not ours."""

_ANY = float("inf")
RANGES = {
    "AUG.COLOR_JITTER": (0, 1), "AUG.CUTMIX": (0, _ANY), "AUG.HFLIP": (0, 1), "AUG.MIXUP": (0, _ANY),
    "AUG.MIXUP_PROB": (0, 1), "AUG.MIXUP_SWITCH_PROB": (0, 1), "AUG.RECOUNT": (1, _ANY), "AUG.REPROB": (0, 1),
    "DATA.BATCH_SIZE": (1, _ANY), "DATA.IMG_SIZE": (1, _ANY), "DATA.NUM_WORKERS": (0, _ANY),
    "DATA.MAX_PIXELS": (1, _ANY), "DATA.WHITE": (0, _ANY),
    "MODEL.DROP_PATH_RATE": (0, 0.999), "MODEL.DROP_RATE": (0, 0.999), "MODEL.LABEL_SMOOTHING": (0, 0.999),
    "MODEL.NUM_CLASSES": (0, _ANY), "MODEL.CROSSFORMER.EMBED_DIM": (0, _ANY), "PRINT_FREQ": (1, _ANY),
    "SEED": (0, _ANY), "TEST.CROP_PCT": (0.01, 1), "TRAIN.ACCUMULATION_STEPS": (1, _ANY), "TRAIN.BASE_LR": (0, _ANY),
    "TRAIN.CLIP_GRAD": (0, _ANY), "TRAIN.EMA_DECAY": (0, 1), "TRAIN.LAYER_DECAY": (0.01, 1), "TRAIN.EPOCHS": (1, _ANY),
    "TRAIN.EVAL_EVERY_EPOCHS": (1, _ANY), "TRAIN.LR_REFERENCE_BATCH": (0, _ANY),
    "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": (1, _ANY), "TRAIN.LR_SCHEDULER.DECAY_RATE": (0, 1), "TRAIN.MIN_LR": (0, _ANY),
    "TRAIN.HANG_MINUTES": (0, _ANY), "TRAIN.KEEP_EVERY_EPOCHS": (0, _ANY), "TRAIN.KEEP_LAST": (1, 100),
    "TRAIN.MAX_SKIPPED_STEPS": (1, _ANY),
    "TRAIN.SAVE_EVERY_MINUTES": (0, _ANY),
    "TRAIN.OPTIMIZER.EPS": (0, _ANY), "TRAIN.OPTIMIZER.MOMENTUM": (0, 1), "TRAIN.SAVE_EVERY_STEPS": (0, _ANY),
    "TRAIN.WARMUP_EPOCHS": (0, _ANY), "TRAIN.WARMUP_LR": (0, _ANY), "TRAIN.WEIGHT_DECAY": (0, _ANY),
}  # fmt: skip

NUMBER_LISTS = {
    "AUG.CUTMIX_MINMAX": (0, 2), "AUG.RATIO": (2,), "AUG.SCALE": (2,), "DATA.MEAN": (3,), "DATA.STD": (3,),
    "TRAIN.OPTIMIZER.BETAS": (2,),
}  # fmt: skip
"""Lists of numbers, and how many of them there may be."""

MUST_STAY = ("TRAIN.OPTIMIZER.NAME", "TRAIN.LAYER_DECAY", "TRAIN.FREEZE_TRUNK")
"""Settings that the state of an optimizer depends on, so that a resumed run may not change them."""

PATHS = ("DATA.CACHE_DIR", "DATA.DATA_PATH", "MODEL.PRETRAINED", "MODEL.RESUME", "OUTPUT")
"""Settings that name a file or a folder, so that ~ in them is the home folder."""

NO_EFFECT = (
    "DATA.BATCH_SIZE", "DATA.CACHE_DIR", "DATA.CACHE_MODE", "DATA.DATA_PATH", "DATA.FORMAT", "DATA.MAX_PIXELS",
    "DATA.NUM_WORKERS", "DATA.ON_BAD_IMAGE", "LOG.WANDB", "MODEL.NUM_CLASSES", "MODEL.WEIGHTS", "OUTPUT",
    "PRINT_FREQ", "TAG", "TEST.REAL_LABELS", "TEST.REPORT", "TRAIN.ACCUMULATION_STEPS", "TRAIN.AUTO_MICRO_BATCH",
    "TRAIN.AUTO_RESUME", "TRAIN.COMPILE", "TRAIN.EVAL_EVERY_EPOCHS", "TRAIN.FORCE_RESUME", "TRAIN.HANG_MINUTES",
    "TRAIN.KEEP_EVERY_EPOCHS", "TRAIN.KEEP_LAST", "TRAIN.MAX_SKIPPED_STEPS", "TRAIN.SAVE_EVERY_MINUTES",
    "TRAIN.SAVE_EVERY_STEPS", "TRAIN.USE_CHECKPOINT",
)  # fmt: skip
"""Settings that a resumed run may change freely (what matters of a batch is checked as the global batch)."""

STARTED_FROM = ("MODEL.PRETRAINED", "MODEL.RESUME")
"""Settings that a resumed run may leave out, for it has begun, but not give another value."""

NOT_ASKED_FOR = -1.0
"""The value of a rate that is left to the model."""
LEFT_TO_THE_MODEL = {"MODEL.DROP_PATH_RATE": 0.2, "MODEL.DROP_RATE": 0.0}
"""Such rates, and what a run of another model than a CrossFormer has had for them so far."""

PUBLISHED_DROP_PATH_RATES = {
    "crossformer_tiny": 0.1, "crossformer_small": 0.2, "crossformer_base": 0.3, "crossformer_large": 0.5,
    "crossformerpp_small": 0.2, "crossformerpp_base": 0.3, "crossformerpp_large": 0.5, "crossformerpp_huge": 0.5,
}  # fmt: skip

Setting = tuple[str, Any, str]
"""A key, its value, and where it was set, for errors."""


def default_config() -> Config:
    """Every setting at its default."""
    return _C.clone()


def flatten(node: CfgNode, prefix: str = "") -> dict[str, Any]:
    """Every setting of a config as ``SECTION.KEY``, and its value."""
    flat = {}
    for key, value in node.items():
        key = f"{prefix}{key}"
        if key in DICTS:
            flat[key] = _plain(value)
        else:
            flat |= flatten(value, f"{key}.") if isinstance(value, CfgNode) else {key: value}
    return flat


def _plain(value: Any) -> Any:
    """Dicts in place of config nodes."""
    return {key: _plain(inner) for key, inner in value.items()} if isinstance(value, CfgNode) else value


def all_keys() -> list[str]:
    """Every setting as ``SECTION.KEY``."""
    return list(flatten(_C))


def build_config(cfg_file: str = "", opts: Iterable[str] = (), flags: Iterable[Setting] = ()) -> Config:
    """The frozen config that a file, ``--opts`` (KEY VALUE ...) and flags make together.

    ``notes`` of it say what was set for another model than the one that it names in the end, and so is left out.

    Raises:
        UserError: a key is unknown, or a value is of the wrong type or out of range.
    """
    config = default_config()
    origin: dict[str, str] = {}
    cfg_file = expanded(cfg_file)
    settings = [*(read_yaml(Path(cfg_file)) if cfg_file else ()), *_pairs(list(opts)), *flags]
    for key, value, source in settings:
        _set(config, key, value, source)
        origin[key] = source
    config.BASE = []  # what the files say is in the config now
    _validate(config, origin)
    _leave_to_the_model(config, origin, list(dict.fromkeys(_file_of(source) for _, _, source in settings)))
    config.freeze()
    return config


def _leave_to_the_model(config: Config, origin: dict[str, str], sources: list[str]) -> None:
    """Settle what depends on MODEL.NAME and was not asked for.

    A file's architecture is that of the model which the file names: with another one that is no CrossFormer, named by
    a later one of the ``sources``, nobody has asked for it.
    """
    name = config.MODEL.NAME
    if config.MODEL.DROP_PATH_RATE == NOT_ASKED_FOR:
        config.MODEL.DROP_PATH_RATE = PUBLISHED_DROP_PATH_RATES.get(name, NOT_ASKED_FOR)
    if name.startswith("crossformer"):
        if config.MODEL.DROP_RATE == NOT_ASKED_FOR:
            config.MODEL.DROP_RATE = 0.0
        return
    for key in [key for key in origin if key.startswith("MODEL.CROSSFORMER.")]:
        if sources.index(_file_of(origin[key])) < sources.index(_file_of(origin["MODEL.NAME"])):
            vars(config)["notes"] = (*config.notes, f"{key} ({origin[key]}) is left out: MODEL.NAME {name} has none")
            _set(config, key, get(_C, key), "")


def _file_of(source: str) -> str:
    return source.rpartition(", line ")[0] or source


def read_yaml(path: Path, being_read: tuple[Path, ...] = ()) -> Iterator[Setting]:
    """The settings of a YAML file, those of its ``BASE`` files first."""
    path_shown, path = path, path.resolve()
    if path in being_read:
        raise UserError(f"{path_shown} is its own BASE: {' -> '.join(p.name for p in (*being_read, path))}")
    try:
        document = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a text file"
        raise UserError(f"config file {path_shown} cannot be read: {reason}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path_shown}{where} is not YAML: {getattr(error, 'problem', None) or error}") from error
    settings = list(_settings_of(document, path_shown)) if document else []
    for key, value, source in settings:
        if key == "BASE":
            if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
                raise UserError(f"BASE ({source}) must be a file name or a list of them")
            for base in [value] if isinstance(value, str) else value:
                if base:
                    yield from read_yaml(path_shown.parent / expanded(base), (*being_read, path))
    yield from (setting for setting in settings if setting[0] != "BASE")


def _settings_of(node: yaml.Node, path: Path, prefix: str = "") -> Iterator[Setting]:
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}, line {node.start_mark.line + 1}: expected settings as 'KEY: value'")
    seen: set[str] = set()
    for key_node, value_node in node.value:
        key, source = f"{prefix}{key_node.value}", f"{path}, line {key_node.start_mark.line + 1}"
        if key in seen:
            raise UserError(f"setting {key} stands twice ({source}); keep one")
        seen.add(key)
        if isinstance(_lookup(key, source), CfgNode) and key not in DICTS:
            yield from _settings_of(value_node, path, f"{key}.")
        else:
            loader = yaml.SafeLoader("")
            try:
                yield key, loader.construct_document(value_node), source
            except yaml.YAMLError as error:
                raise UserError(f"{key} ({source}): {getattr(error, 'problem', error)}") from error


def _pairs(opts: list[str]) -> Iterator[Setting]:
    if len(opts) % 2:
        raise UserError(f"--opts takes pairs of KEY VALUE; {opts[-1]} has no partner")
    for key, text in zip(opts[::2], opts[1::2], strict=True):
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            if not isinstance(_lookup(key, "--opts"), str):  # a name may hold anything
                raise UserError(f"--opts {key}: {text!r} is not a YAML value") from error
            value = text
        if key == "BASE":
            raise UserError("BASE belongs in a YAML file; on the command line give the file with --cfg")
        is_text = isinstance(_lookup(key, "--opts"), str) and not isinstance(value, bool)
        yield key, text if is_text or value is None else value, "--opts"  # a TAG 010 is not 8


def _lookup(key: str, source: str) -> Any:
    node: Any = _C
    for part in key.split("."):
        if not isinstance(node, CfgNode) or part not in node:
            sections = {known.rpartition(".")[0] for known in all_keys()} - {""}
            raise UserError(f"unknown setting {key} ({source}){did_you_mean(key, [*all_keys(), *sections])}")
        node = node[part]
    return node


def _set(config: CfgNode, key: str, value: Any, source: str) -> None:
    default = _lookup(key, source)
    if isinstance(default, CfgNode) and key not in DICTS:
        keys = ", ".join(f"{key}.{name}" for name in default)
        raise UserError(f"{key} ({source}) is a section, not a setting; it has {keys}")
    *sections, name = key.split(".")
    for section in sections:
        config = config[section]
    value = _coerce(key, value, default, source)
    config[name] = expanded(value) if key in PATHS else value


def _coerce(key: str, value: Any, default: Any, source: str) -> Any:
    """``value`` as the type of ``default``, where nothing is lost by it."""
    if key == "TRAIN.USE_CHECKPOINT" and isinstance(value, bool):
        value = "full" if value else "none"  # as in the YAML files of other trainers
    if key in DICTS and isinstance(value, dict | None):
        return _as_node(key, value or {}, source)
    if key == "DATA.IMG_SIZE" and isinstance(value, tuple | list):
        return value[0] if len(value) == 2 and value[0] == value[1] else list(value)
    if value is None and isinstance(default, str | list):
        return "none" if "none" in CHOICES.get(key, ()) else type(default)()
    if isinstance(default, float) and isinstance(value, int | float | str) and not isinstance(value, bool):
        with suppress(ValueError):
            number = float(value)  # also from 5e-4, which YAML takes for a text
            if isfinite(number):
                return number
    if isinstance(default, str) and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(default, list) and isinstance(value, tuple | list):
        return list(value)
    if type(value) is type(default) and not isinstance(value, float):
        return value
    wanted = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", list: "a list"}
    choices = f" ({' | '.join(CHOICES[key])})" if key in CHOICES else ""
    example = f", for example {default}" if default not in ("", [], False, {}) and not choices else ""
    kind = wanted.get(type(default), "a dict")
    raise UserError(f"{key} must be {kind}{choices}{example}, not {value!r:.100} ({source})")


def _as_node(key: str, values: dict, source: str) -> CfgNode:
    """``values`` as what yacs can write and read again."""
    for name, value in values.items():
        if not isinstance(name, str):
            raise UserError(f"{key} ({source}): {name!r} is not the name of an argument")
        if isinstance(value, dict):
            values = values | {name: _as_node(f"{key}.{name}", value, source)}
        elif not isinstance(value, str | bool | int | float | list | None):
            raise UserError(f"{key}.{name} ({source}) must be a number, a text, a list or a dict, not {value!r}")
    return CfgNode(values)


def get(config: CfgNode, key: str) -> Any:
    """The value of ``SECTION.KEY``."""
    for part in key.split("."):
        config = config[part]
    return config


def _validate(config: CfgNode, origin: dict[str, str]) -> None:
    def fail(key: str, problem: str) -> None:
        raise UserError(f"{key} {get(config, key)} ({origin.get(key, 'the default')}): {problem}")

    for key, choices in CHOICES.items():
        if key == "DATA.FORMAT" and "/" in config.DATA.FORMAT:
            continue  # a name for timm
        if get(config, key) not in choices:
            near = did_you_mean(get(config, key), choices)
            fail(key, f"choose one of {', '.join(choices)}{near}")
    for key, (low, high) in RANGES.items():
        value = get(config, key)
        if key == "DATA.IMG_SIZE" and isinstance(value, list):
            if len(value) != 2 or not all(type(side) is int and side >= low for side in value):
                fail(key, "must be a whole number, or a height and a width, for example 224 or [192, 640]")
        elif key in LEFT_TO_THE_MODEL and value == NOT_ASKED_FOR:
            continue
        elif not low <= value <= high:
            fail(key, f"must be at least {low}" if high == _ANY else f"must lie between {low} and {high}")
    for key, lengths in NUMBER_LISTS.items():
        value = get(config, key)
        if len(value) not in lengths or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in value):
            fail(key, f"must be a list of {max(lengths)} numbers, for example {get(_C, key) or [0.2, 0.8]}")
    for key in ("DEPTHS", "NUM_HEADS", "GROUP_SIZE", "INTERVAL"):
        for value in config.MODEL.CROSSFORMER[key]:
            numbers = value if key in ("GROUP_SIZE", "INTERVAL") and isinstance(value, list) else [value]
            if not numbers or not all(type(n) is int and n >= 1 for n in numbers):
                fail(f"MODEL.CROSSFORMER.{key}", "must hold whole numbers of at least 1, for example [7, 7, 7, 7]")
    for key in ("AUG.SCALE", "AUG.RATIO"):
        if not 0 < get(config, key)[0] <= get(config, key)[1]:
            fail(key, "must be a smallest value above 0 and a largest")
    if config.AUG.CUTMIX_MINMAX and not 0 < config.AUG.CUTMIX_MINMAX[0] < config.AUG.CUTMIX_MINMAX[1] <= 1:
        fail("AUG.CUTMIX_MINMAX", "must be a smallest share above 0 and a larger one of at most 1, or []")
    if min(config.DATA.STD) <= 0:
        fail("DATA.STD", "each must be above 0")
    if not all(0 <= beta < 1 for beta in config.TRAIN.OPTIMIZER.BETAS):
        fail("TRAIN.OPTIMIZER.BETAS", "each must be at least 0 and below 1")
    if config.TRAIN.COMPILE == "reduce-overhead":
        if config.TRAIN.ACCUMULATION_STEPS > 1:
            fail("TRAIN.COMPILE", "with CUDA graphs gradients are not accumulated; set TRAIN.ACCUMULATION_STEPS 1")
        if config.TRAIN.AUTO_MICRO_BATCH:
            fail("TRAIN.COMPILE", "with CUDA graphs gradients are not accumulated; set TRAIN.AUTO_MICRO_BATCH False")
    if config.TRAIN.EMA_DECAY == 1:
        fail("TRAIN.EMA_DECAY", "must be below 1, for example 0.9999")
    if config.TRAIN.WARMUP_EPOCHS >= config.TRAIN.EPOCHS:
        fail("TRAIN.WARMUP_EPOCHS", f"must be below TRAIN.EPOCHS {config.TRAIN.EPOCHS}")
    if config.TEST.VIEWS == "five_crop" and not (config.TEST.CROP and config.TEST.CROP_PCT < 1):
        fail("TEST.VIEWS", "there is nothing to crop; set TEST.CROP True and TEST.CROP_PCT below 1, for example 0.875")
    if config.MODEL.RESUME and config.MODEL.PRETRAINED:
        fail("MODEL.PRETRAINED", "give either --resume (carry on a run) or --pretrained (start one), not both")
    for key in ("MODEL.NAME", "TAG", "OUTPUT"):
        path = Path(get(config, key))
        if not path.parts or (key != "OUTPUT" and (".." in path.parts or path.is_absolute())):
            fail(key, "must name a folder below OUTPUT" if key != "OUTPUT" else "must name a folder")


LONGEST_DUMP, LONGEST_NUMBER, DEEPEST_DUMP = 2**20, 3500, 10


def settings_in(dumped: Any, source: str) -> dict[str, Any]:
    """The settings in a config that was dumped into a file, as ``SECTION.KEY``; those that are not known are left out.

    Raises:
        UserError: it is no such text. One that would unfold to more than it says, by YAML's aliases, is not read.
    """
    try:
        if not isinstance(dumped, str) or len(dumped) > LONGEST_DUMP:
            raise ValueError("is not a text of settings")
        depth = 0
        for event in yaml.parse(dumped, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if getattr(event, "anchor", None) is not None or depth > DEEPEST_DUMP:
                raise ValueError("has YAML aliases or is nested without end")
            if isinstance(event, yaml.ScalarEvent) and not event.style and len(event.value) > LONGEST_NUMBER:
                raise ValueError("has a number without end")
        content = yaml.load(dumped, Loader=yaml.SafeLoader)
        if not isinstance(content, dict):
            raise ValueError("is not a text of settings")
        found, defaults = dict(_leaves(content)), flatten(_C)
        misplaced = {key.rpartition(".")[0] for key in defaults} & found.keys()
        misplaced |= {key.rpartition(".")[0] for key in found} & defaults.keys()
        if misplaced:
            raise ValueError(f"has {min(misplaced)} in a form that it cannot have")
        return {key: _plain(_coerce(key, found[key], defaults[key], source)) for key in defaults if key in found}
    except yaml.YAMLError as error:
        raise UserError(f"{source}: its config is not YAML: {getattr(error, 'problem', None)}") from error
    except (ValueError, TypeError, OverflowError) as error:  # a number, date or key that there is not
        raise UserError(f"{source}: its config {next(iter(str(error).splitlines()), 'is wrong')}") from error


def _leaves(node: dict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        key = f"{prefix}{key}"
        if isinstance(value, dict) and value and key not in DICTS:
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def differing_settings(dumped: str, config: CfgNode) -> list[tuple[str, Any, Any]]:
    """The settings that may change what a run computes and differ from a dumped config: key, value there, here.

    A setting that the dump does not know is at its default there.
    """
    before, now = flatten(_C) | settings_in(dumped, "the checkpoint"), flatten(config)
    keys = [key for key in now if key not in (*NO_EFFECT, "BASE")]
    for key, value in LEFT_TO_THE_MODEL.items():
        now[key] = value if now[key] == NOT_ASKED_FOR else now[key]
        before[key] = value if before[key] == NOT_ASKED_FOR else before[key]
    differing = [(key, before[key], now[key]) for key in keys if before[key] != now[key]]
    return [(key, there, here) for key, there, here in differing if here or key not in STARTED_FROM]


def may_change(key: str, before: Any, now: Any) -> bool:
    """Whether a run that is carried on may change this setting without being forced to."""
    return key == "TRAIN.EPOCHS" and now > before


def output_dir(config: CfgNode) -> Path:
    """Where the results of a run go."""
    return Path(config.OUTPUT) / config.MODEL.NAME / config.TAG
