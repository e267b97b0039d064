"""Rules that a config as a whole keeps, and what is settled where a setting leaves it open; config.py has the settings.

A config comes as an argument, since nothing here may import the module that declares it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from utils import settings

CLASSES, PIXELS, OBJECTS = "classification", "segmentation", "detection"
TASK_OF_HEAD = {
    "upernet": PIXELS, "semantic_fpn": PIXELS, "retinanet": OBJECTS, "mask_rcnn": OBJECTS, "cascade_mask_rcnn": OBJECTS,
}  # fmt: skip
"""What may be put on a model."""
HEADS_WITH_MASKS = "mask_rcnn", "cascade_mask_rcnn"
SHARDED_BY = "adamw", "sgd"
"""Optimizers whose steps are the same on a share of each parameter, and which skip by themselves."""
READ_BY_ONE_SCHEDULE = {
    "COOLDOWN_EPOCHS": "constant", "COOLDOWN_STEPS": "constant",
    "CYCLE_EPOCHS": "restarts", "CYCLE_GROWTH": "restarts", "CYCLE_DECAY": "restarts",
}  # fmt: skip
"""Settings of TRAIN.LR_SCHEDULER, and the NAME that they are for."""
DETECTOR = "mask_rcnn"
"""The head of detection where none is named."""
CROSSFORMERS = {
    "crossformer_micro": -1.0, "crossformer_tiny": 0.1, "crossformer_small": 0.2, "crossformer_base": 0.3,
    "crossformer_large": 0.5, "crossformerpp_small": 0.2, "crossformerpp_base": 0.3, "crossformerpp_large": 0.5,
    "crossformerpp_huge": 0.5,
}  # fmt: skip
"""The variants, and the MODEL.DROP_PATH_RATE that each was published with; micro was not."""

Refuse = Callable[[str, str], NoReturn]
"""Raises the error for a setting (its key) and what is wrong with it."""


def check_together(config: Any, refuse: Refuse) -> None:
    """Check the rules that limits of a single number do not say."""
    for key, (low, high) in {"AUG.SCALE": config.AUG.SCALE, "AUG.RATIO": config.AUG.RATIO}.items():
        if not 0 < low <= high:
            refuse(key, "must be a smallest value above 0 and a largest")
    if config.AUG.CUTMIX_MINMAX and not 0 < config.AUG.CUTMIX_MINMAX[0] < config.AUG.CUTMIX_MINMAX[1] <= 1:
        refuse("AUG.CUTMIX_MINMAX", "must be a smallest share above 0 and a larger one of at most 1, or []")
    check_data(config.DATA, refuse)
    check_loss(config.TRAIN, refuse)
    if config.TRAIN.COMPILE == "reduce-overhead":
        if config.TRAIN.ACCUMULATION_STEPS > 1:
            refuse("TRAIN.COMPILE", "with CUDA graphs gradients are not accumulated; set TRAIN.ACCUMULATION_STEPS 1")
        if config.TRAIN.AUTO_MICRO_BATCH:
            refuse("TRAIN.COMPILE", "with CUDA graphs gradients are not accumulated; set TRAIN.AUTO_MICRO_BATCH False")
    if config.TRAIN.SHARD != "none":
        if config.TRAIN.COMPILE != "none":
            refuse("TRAIN.SHARD", "does not go with TRAIN.COMPILE; set one of them to none")
        if config.TRAIN.AUTO_MICRO_BATCH:
            refuse("TRAIN.SHARD", "does not go with TRAIN.AUTO_MICRO_BATCH; set that to False")
        if config.TRAIN.COMPRESS_GRADIENTS != "none":
            refuse("TRAIN.COMPRESS_GRADIENTS", "is for whole models; sharded ones follow AMP")
        if config.TRAIN.OPTIMIZER.NAME not in SHARDED_BY:
            refuse("TRAIN.SHARD", f"does not go with {config.TRAIN.OPTIMIZER.NAME}; use {' or '.join(SHARDED_BY)}")
    if config.TRAIN.CURRICULUM:
        check_curriculum(config, refuse)
    if config.AUG.REPEATS > 1 and config.DATA.SAMPLER != "shuffle":
        refuse("AUG.REPEATS", f"does not go with DATA.SAMPLER {config.DATA.SAMPLER}; set 1")
    for key, name in READ_BY_ONE_SCHEDULE.items():
        scheduler = config.TRAIN.LR_SCHEDULER
        if scheduler[key] != scheduler.settings()[key].default and name != scheduler.NAME:
            refuse(f"TRAIN.LR_SCHEDULER.{key}", f"is read by TRAIN.LR_SCHEDULER.NAME {name}, not by {scheduler.NAME}")
    if not config.TRAIN.WARMUP_STEPS and config.TRAIN.WARMUP_EPOCHS >= config.TRAIN.EPOCHS:
        refuse("TRAIN.WARMUP_EPOCHS", f"must be below TRAIN.EPOCHS {config.TRAIN.EPOCHS}")
    if config.TEST.VIEWS == "five_crop" and not (config.TEST.CROP and config.TEST.CROP_PCT < 1):
        refuse(
            "TEST.VIEWS", "there is nothing to crop; set TEST.CROP True and TEST.CROP_PCT below 1, for example 0.875"
        )
    epochs, is_multistep = config.TRAIN.LR_SCHEDULER.DECAY_AT, config.TRAIN.LR_SCHEDULER.NAME == "multistep"
    if epochs != sorted(set(epochs)) or (is_multistep and not epochs):
        refuse("TRAIN.LR_SCHEDULER.DECAY_AT", "must be the epochs after which multistep decays, for example [8, 11]")
    if config.MODEL.RESUME and config.MODEL.PRETRAINED:
        refuse("MODEL.PRETRAINED", "give either --resume (carry on a run) or --pretrained (start one), not both")
    for key, name in {"MODEL.NAME": config.MODEL.NAME, "TAG": config.TAG}.items():
        path = Path(name)
        if not path.parts or ".." in path.parts or path.is_absolute():
            refuse(key, "must name a folder below OUTPUT")
    if not Path(config.OUTPUT).parts:
        refuse("OUTPUT", "must name a folder")


def check_curriculum(config: Any, refuse: Refuse) -> None:
    """Check what does not go with settings that change on the way."""
    train, changed = config.TRAIN, {key for entry in config.TRAIN.CURRICULUM for key in entry}
    if train.STEPS:
        refuse("TRAIN.CURRICULUM", "counts in epochs; set TRAIN.EPOCHS in place of TRAIN.STEPS")
    if train.AUTO_MICRO_BATCH:
        refuse("TRAIN.AUTO_MICRO_BATCH", "does not go with TRAIN.CURRICULUM; set False")
    if "DATA.BATCH_SIZE" in changed and train.LR_SCHEDULER.NAME in ("step", "restarts"):
        refuse(
            "TRAIN.LR_SCHEDULER.NAME",
            "counts epochs of one length, and TRAIN.CURRICULUM changes DATA.BATCH_SIZE; use cosine or multistep",
        )
    if "TRAIN.EMA_DECAY" in changed and not train.EMA_DECAY:
        refuse("TRAIN.CURRICULUM", "changes TRAIN.EMA_DECAY, which is 0: set it for the end of the run")


def check_loss(train: Any, refuse: Refuse) -> None:
    """Check what is minimised."""
    loss, teacher = train.LOSS, train.TEACHER
    if loss.NAME != "bce":
        for key, value in {"SUM": loss.SUM, "THRESHOLD": loss.THRESHOLD}.items():
            if value:
                refuse(f"TRAIN.LOSS.{key}", "goes with TRAIN.LOSS.NAME bce; leave it out")
    elif train.CLASS_WEIGHTS != "none":
        refuse("TRAIN.CLASS_WEIGHTS", "does not go with TRAIN.LOSS.NAME bce; set one of them otherwise")
    if not teacher.FROM:
        for key, one in teacher.settings().items():
            if teacher[key] != one.default:
                refuse(f"TRAIN.TEACHER.{key}", "goes with TRAIN.TEACHER.FROM, which is not set")
    elif teacher.KIND == "features" and train.COMPILE != "none":
        refuse("TRAIN.TEACHER.KIND", "features does not go with TRAIN.COMPILE; use soft or hard")
    elif teacher.KIND == "features" and train.AUTO_MICRO_BATCH:
        refuse("TRAIN.TEACHER.KIND", "features compares the images of a whole batch; set TRAIN.AUTO_MICRO_BATCH False")
    if teacher.TEMPERATURE != 1 and teacher.KIND != "soft":
        refuse("TRAIN.TEACHER.TEMPERATURE", f"goes with TRAIN.TEACHER.KIND soft, not with {teacher.KIND}")


def check_data(data: Any, refuse: Refuse) -> None:
    """Check what says which images there are and what their classes are."""
    if not data.LABELS:
        for key in ("VAL_LABELS", "LABEL_COLUMNS"):
            if data[key]:
                refuse(f"DATA.{key}", "goes with DATA.LABELS, which is not set")
    parts = {"SUBSET": data.SUBSET < 1, "ONLY_CLASSES": data.ONLY_CLASSES}
    others = {"LABELS": data.LABELS, "VAL_SHARE": data.VAL_SHARE, "MORE_PATHS": data.MORE_PATHS}
    for key, what in (others | parts).items():
        if what and "/" in data.FORMAT:
            refuse(f"DATA.{key}", f"is for folders and archives; DATA.FORMAT {data.FORMAT} has its own ways")
    if data.LABELS and data.LABELS == data.VAL_LABELS:
        refuse("DATA.VAL_LABELS", "is DATA.LABELS too; name the table of the validation images")
    if data.LABELS and data.MORE_PATHS:
        refuse("DATA.MORE_PATHS", "does not go with DATA.LABELS; put the folders below one, which may be links")
    if data.LABELS and data.FORMAT not in ("auto", "folder"):
        refuse("DATA.LABELS", f"is for files in folders, and DATA.FORMAT is {data.FORMAT}; leave one of them out")
    if data.VAL_LABELS and data.VAL_SHARE:
        refuse("DATA.VAL_SHARE", "does not go with DATA.VAL_LABELS, which names the images to evaluate on")


def check_task(config: Any, refuse: Refuse, origin: dict[str, str]) -> None:
    """Refuse what nothing would read, and what does not go with the task."""
    known = config.settings()
    for key in origin:
        one = known[key]
        if one.tasks and config.TASK not in one.tasks and settings.get(config, key) != one.default:
            refuse(key, f"is read by {' and '.join(one.tasks)} only, and TASK is {config.TASK}; leave it out")
    if config.TASK == CLASSES:
        return
    head = config.MODEL.HEAD
    if TASK_OF_HEAD[head] != config.TASK and (config.TASK == PIXELS or "MODEL.HEAD" in origin):
        heads = ", ".join(name for name, task in TASK_OF_HEAD.items() if task == config.TASK)
        refuse("MODEL.HEAD", f"is for {TASK_OF_HEAD[head]}; choose one of {heads}, or set TASK {TASK_OF_HEAD[head]}")
    low, high = config.AUG.RESIZE_RATIO
    if not 0 < low <= high:
        refuse("AUG.RESIZE_RATIO", "must be a smallest value above 0 and a largest")
    for key, (longest, shortest) in {"AUG.RESIZE": config.AUG.RESIZE, "TEST.RESIZE": config.TEST.RESIZE}.items():
        if longest < shortest:
            refuse(key, "must be the longest side and then the shortest, for example [2048, 512]")
    if config.TEST.STRIDE > config.TEST.WINDOW:
        refuse("TEST.STRIDE", f"leaves gaps between windows of {config.TEST.WINDOW}; set TEST.WINDOW at least as large")
    if config.TEST.VIEWS == "five_crop":
        refuse("TEST.VIEWS", "is for classification; choose none or flip")
    if config.TEST.VIEWS == "flip" and config.TASK == OBJECTS:
        refuse("TEST.VIEWS", "is not for detection; choose none")
    if config.TRAIN.COMPILE != "none" and config.TASK == OBJECTS:
        refuse("TRAIN.COMPILE", "is not for detection, whose batches are of many sizes; set none")
    if config.TRAIN.AUTO_MICRO_BATCH and config.TASK == OBJECTS:
        refuse("TRAIN.AUTO_MICRO_BATCH", "is not for detection; its losses are of a whole batch")
    if config.TRAIN.LAYER_DECAY != 1 and config.TRAIN.NO_WEIGHT_DECAY != "1d":
        refuse("TRAIN.NO_WEIGHT_DECAY", "goes with TRAIN.LAYER_DECAY 1 only; set 1d")


def leave_to_the_model(config: Any, origin: dict[str, str]) -> None:
    """Settle what depends on TASK or MODEL.NAME and was not asked for.

    A file's architecture is that of the model which the file names: with another one that is no CrossFormer, named
    later, nobody has asked for it.
    """
    name, model, left_open = config.MODEL.NAME, config.MODEL, type(config.MODEL)()
    if config.TASK == OBJECTS and "MODEL.HEAD" not in origin:
        model.HEAD = DETECTOR
    if config.TASK == PIXELS and model.DROP_RATE == left_open.DROP_RATE:
        model.DROP_RATE = 0.1
    if name in CROSSFORMERS:
        if model.DROP_RATE == left_open.DROP_RATE:
            model.DROP_RATE = 0.0
        if model.DROP_PATH_RATE == left_open.DROP_PATH_RATE:
            model.DROP_PATH_RATE = CROSSFORMERS[name]
        return
    architecture, keys = model.CROSSFORMER.settings("MODEL.CROSSFORMER."), list(origin)
    for key in keys[: keys.index("MODEL.NAME")]:
        if key in architecture and settings.file_of(origin[key]) != settings.file_of(origin["MODEL.NAME"]):
            note = f"{key} ({origin[key]}) is left out: MODEL.NAME {name} has none"
            vars(config)["notes"] = (*config.notes, note)
            settings.assign(config, key, architecture[key].default, "")
