"""Settings files of other trainers as they are: CrossFormer's and Swin's YAML, and ``args.yaml`` of timm's train.py.

``docs/moving.md`` shows the tables below; what has no counterpart is named all at once.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from utils.errors import UserError

ANY = object()
"""Stands for all values: what is set changes nothing of what is learned."""


class Leaf(NamedTuple):
    """A line of a settings file: ``SECTION.KEY``, its value, and where it stands."""

    key: str
    value: Any
    line: int


@dataclass(frozen=True)
class Counterpart:
    """What a key of another trainer is here.

    Attributes:
        to: the setting that it is.
        only: the values that need none, because that is how it is here anyway.
        instead: what there is in its place.
        reads: makes our value of theirs.
        none: our value where theirs is None; without one the setting keeps its default.
    """

    to: str = ""
    only: tuple[Any, ...] = ()
    instead: str = ""
    reads: Callable[[Any], Any] = lambda value: value
    none: Any = None


def to(key: str, reads: Callable[[Any], Any] = lambda value: value, none: Any = None) -> Counterpart:
    return Counterpart(to=key, reads=reads, none=none)


def only(*values: Any, instead: str) -> Counterpart:
    return Counterpart(only=values, instead=instead)


def needless(instead: str) -> Counterpart:
    return Counterpart(only=(ANY,), instead=instead)


def same(section: str, names: str) -> dict[str, Counterpart]:
    """Keys that are called the same here."""
    return {f"{section}{name}": to(f"{section}{name}") for name in names.split()}


def _mixed_precision(level: Any) -> str:
    return "none" if level in ("O0", "", False) else "auto"


NETWORK = "it is what the network is here; others are a model of timm's (MODEL.NAME, MODEL.KWARGS)"
OF_SWIN: dict[str, Counterpart] = {
    **same("", "OUTPUT TAG SEED PRINT_FREQ"),
    "BASE": only("", [""], [], None, instead="write its settings into the one file"),
    **same("DATA.", "BATCH_SIZE DATA_PATH IMG_SIZE INTERPOLATION CACHE_MODE NUM_WORKERS"),
    "DATA.DATASET": only("imagenet", "", instead="the layout of the data is found by itself (DATA.FORMAT)"),
    "DATA.ZIP_MODE": to("DATA.FORMAT", lambda value: "zip" if value else "auto"),
    "DATA.PIN_MEMORY": needless("memory is pinned where there is a GPU"),
    "DATA.MASK_PATCH_SIZE": only(32, instead="there is no masked pre-training"),
    "DATA.MASK_RATIO": only(0.6, instead="there is no masked pre-training"),
    **same("MODEL.", "RESUME PRETRAINED NUM_CLASSES DROP_RATE DROP_PATH_RATE LABEL_SMOOTHING"),
    "MODEL.TYPE": only("cross-scale", "swin", instead="say MODEL.NAME as timm calls it"),
    "MODEL.NAME": needless("the sizes below decide which network it is; a TAG names the run"),
    **{f"MODEL.CROS.{key}": to(f"MODEL.CROSSFORMER.{key}") for key in "EMBED_DIM DEPTHS NUM_HEADS".split()},
    **{f"MODEL.CROS.{key}": to(f"MODEL.CROSSFORMER.{key}") for key in "GROUP_SIZE INTERVAL".split()},
    "MODEL.CROS.USE_ACL": Counterpart(instead="decides between crossformer_* and crossformerpp_*"),
    "MODEL.CROS.PATCH_SIZE": only([4, 8, 16, 32], instead=NETWORK),
    "MODEL.CROS.MERGE_SIZE": only([[2, 4], [2, 4], [2, 4]], instead=NETWORK),
    "MODEL.CROS.USE_CPE": only(False, instead="there is no convolutional position encoding; DPB takes its place"),
    "MODEL.CROS.PAD_TYPE": needless("feature maps are padded at the right and the bottom, and the padding is masked"),
    "MODEL.CROS.NO_MASK": only(False, instead="padding is always masked"),
    "MODEL.CROS.ADAPT_INTERVAL": only(False, instead="MODEL.CROSSFORMER.INTERVAL says the interval of each block"),
    "MODEL.SWIN.EMBED_DIM": Counterpart(instead="decides which of timm's Swin it is"),
    "MODEL.SWIN.DEPTHS": Counterpart(instead="decides which of timm's Swin it is"),
    "MODEL.SWIN.NUM_HEADS": Counterpart(instead="decides which of timm's Swin it is"),
    "MODEL.SWIN.WINDOW_SIZE": Counterpart(instead="decides which of timm's Swin it is"),
    "MODEL.SWIN.PATCH_SIZE": only(4, instead=NETWORK),
    **{
        f"MODEL.{network}.{key}": only(*values, instead=NETWORK)
        for network in ("CROS", "SWIN")
        for key, values in {
            "IN_CHANS": (3,),
            "MLP_RATIO": (4, [4, 4, 4, 4]),
            "QKV_BIAS": (True,),
            "QK_SCALE": (None,),
            "APE": (False,),
            "PATCH_NORM": (True,),
        }.items()
    },
    "TRAIN.START_EPOCH": only(0, instead="a run carries on where its last.pth says"),
    **same("TRAIN.", "EPOCHS WARMUP_EPOCHS WEIGHT_DECAY BASE_LR WARMUP_LR MIN_LR AUTO_RESUME ACCUMULATION_STEPS"),
    **same("TRAIN.", "USE_CHECKPOINT LAYER_DECAY"),
    "TRAIN.CLIP_GRAD": to("TRAIN.CLIP_GRAD", none=0.0),
    "TRAIN.LR_SCHEDULER.NAME": to("TRAIN.LR_SCHEDULER.NAME"),
    **same("TRAIN.LR_SCHEDULER.", "DECAY_EPOCHS DECAY_RATE"),
    "TRAIN.LR_SCHEDULER.MULTISTEPS": to("TRAIN.LR_SCHEDULER.DECAY_AT"),
    "TRAIN.LR_SCHEDULER.GAMMA": to("TRAIN.LR_SCHEDULER.DECAY_RATE"),
    "TRAIN.LR_SCHEDULER.WARMUP_PREFIX": only(False, instead="the warm-up hides the beginning of the curve"),
    **same("TRAIN.OPTIMIZER.", "NAME EPS BETAS MOMENTUM"),
    "TRAIN.MOE.SAVE_MASTER": only(False, instead="there are no mixtures of experts"),
    **same("AUG.", "COLOR_JITTER REPROB REMODE RECOUNT MIXUP CUTMIX MIXUP_PROB MIXUP_SWITCH_PROB MIXUP_MODE"),
    "AUG.AUTO_AUGMENT": to("AUG.AUTO_AUGMENT", none="none"),
    "AUG.CUTMIX_MINMAX": to("AUG.CUTMIX_MINMAX", none=[]),
    "TEST.CROP": to("TEST.CROP"),
    "TEST.SEQUENTIAL": needless("an evaluation counts every image once, on any number of processes"),
    "TEST.SHUFFLE": only(False, instead="the order of an evaluation changes nothing"),
    "AMP_OPT_LEVEL": to("AMP", _mixed_precision),
    "AMP_ENABLE": to("AMP", _mixed_precision),
    "ENABLE_AMP": to("AMP", _mixed_precision),
    "SAVE_FREQ": to("TRAIN.KEEP_EVERY_EPOCHS"),
    "EVAL_MODE": only(False, instead="the flag --eval"),
    "THROUGHPUT_MODE": only(False, instead="the flag --throughput"),
    "LOCAL_RANK": needless("the launcher tells it"),
    "FUSED_WINDOW_PROCESS": only(False, instead="TRAIN.COMPILE"),
    "FUSED_LAYERNORM": only(False, instead="TRAIN.COMPILE"),
}
"""The keys of the Swin family, CrossFormer's among them."""
DEFAULTS_OF_SWIN = {"MODEL.DROP_PATH_RATE": 0.1}
"""What a file leaves open and their code has another default for."""

STEPS = "the learning rate changes with every step"
NO_COUNTERPART = "there is nothing like it"
OF_TIMM: dict[str, Counterpart] = {
    "data": to("DATA.DATA_PATH"), "data_dir": to("DATA.DATA_PATH"),
    "dataset": to("DATA.FORMAT", lambda name: name if "/" in name else "auto"),
    "train_split": only("train", instead="the folder is called train"),
    "val_split": only("val", "validation", instead="the folder is called val or validation"),
    "class_map": only("", None, instead="DATA.LABELS, or the names of the folders"),
    "train_num_samples": only(None, instead="DATA.VAL_SHARE, or another folder"),
    "val_num_samples": only(None, instead="DATA.VAL_SHARE, or another folder"),
    "dataset_download": only(False, instead="data sets are not downloaded"),
    "dataset_trust_remote_code": only(False, instead="code of data sets is not run"),
    "input_img_mode": only(None, "RGB", instead="images are read as RGB"),
    "input_key": only(None, instead=NO_COUNTERPART), "target_key": only(None, instead=NO_COUNTERPART),
    "in_chans": only(None, 3, instead="images are read as RGB"),
    "model": to("MODEL.NAME"),
    "model_kwargs": to("MODEL.KWARGS", none={}),
    "pretrained": to("MODEL.PRETRAINED", lambda value: "default" if value else ""),
    "pretrained_path": to("MODEL.PRETRAINED"), "initial_checkpoint": to("MODEL.PRETRAINED"),
    "resume": to("MODEL.RESUME"),
    "no_resume_opt": only(False, instead="--pretrained starts from the weights alone"),
    "num_classes": to("MODEL.NUM_CLASSES", none=0),
    "gp": only(None, instead="MODEL.KWARGS {global_pool: ...}"),
    "head_init_scale": only(None, instead=NO_COUNTERPART), "head_init_bias": only(None, instead=NO_COUNTERPART),
    "img_size": to("DATA.IMG_SIZE"),
    "input_size": to("DATA.IMG_SIZE", lambda size: list(size[1:])),
    "crop_pct": to("TEST.CROP_PCT"), "mean": to("DATA.MEAN"), "std": to("DATA.STD"),
    "interpolation": to("DATA.INTERPOLATION", lambda name: name or "bicubic"),
    "batch_size": to("DATA.BATCH_SIZE"),
    "validation_batch_size": needless("evaluation takes DATA.BATCH_SIZE"),
    "channels_last": needless("memory is always channels-last"),
    "layout": needless("memory is always channels-last"),
    "fuser": needless("torch chooses"), "fast_norm": only(False, instead=NO_COUNTERPART),
    "grad_accum_steps": to("TRAIN.ACCUMULATION_STEPS"),
    "grad_checkpointing": to("TRAIN.USE_CHECKPOINT"),
    "torchscript": only(False, instead="TRAIN.COMPILE"),
    "torchcompile": to("TRAIN.COMPILE", lambda backend: "default" if backend else "none"),
    "torchcompile_mode": to("TRAIN.COMPILE"),
    "opt": to("TRAIN.OPTIMIZER.NAME"),
    "opt_eps": to("TRAIN.OPTIMIZER.EPS"), "opt_betas": to("TRAIN.OPTIMIZER.BETAS", list),
    "momentum": to("TRAIN.OPTIMIZER.MOMENTUM"),
    "weight_decay": to("TRAIN.WEIGHT_DECAY"),
    "clip_grad": to("TRAIN.CLIP_GRAD", none=0.0),
    "clip_mode": only("norm", instead="the norm is clipped"),
    "layer_decay": to("TRAIN.LAYER_DECAY", none=1.0),
    "layer_decay_min_scale": only(0, None, instead=NO_COUNTERPART),
    "layer_decay_no_opt_scale": only(None, instead=NO_COUNTERPART),
    "opt_kwargs": to("TRAIN.OPTIMIZER.KWARGS", none={}),
    "opt_foreach": needless("the fastest form is chosen"),
    "sched": to("TRAIN.LR_SCHEDULER.NAME"),
    "sched_on_updates": needless(STEPS),
    "lr": to("TRAIN.BASE_LR"),
    "lr_base": needless("see lr"), "lr_base_size": needless("see lr"), "lr_base_scale": needless("see lr"),
    "lr_noise": only(None, instead=NO_COUNTERPART), "lr_noise_pct": needless("see lr_noise"),
    "lr_noise_std": needless("see lr_noise"),
    "lr_cycle_mul": only(1.0, instead="TRAIN.LR_SCHEDULER.NAME restarts, CYCLE_GROWTH"),
    "lr_cycle_decay": only(0.5, 1.0, instead="TRAIN.LR_SCHEDULER.NAME restarts, CYCLE_DECAY"),
    "lr_cycle_limit": only(1, instead="TRAIN.LR_SCHEDULER.NAME restarts, CYCLE_EPOCHS"),
    "lr_k_decay": only(1.0, instead=NO_COUNTERPART),
    "warmup_lr": to("TRAIN.WARMUP_LR"), "min_lr": to("TRAIN.MIN_LR"),
    "epochs": to("TRAIN.EPOCHS"),
    "epoch_repeats": only(0.0, instead="a longer run is more TRAIN.EPOCHS"),
    "start_epoch": only(None, 0, instead="a run carries on where its last.pth says"),
    "decay_milestones": to("TRAIN.LR_SCHEDULER.DECAY_AT"), "decay_epochs": to("TRAIN.LR_SCHEDULER.DECAY_EPOCHS", int),
    "decay_rate": to("TRAIN.LR_SCHEDULER.DECAY_RATE"),
    "warmup_epochs": to("TRAIN.WARMUP_EPOCHS", int),
    "warmup_prefix": only(False, instead="the warm-up hides the beginning of the curve"),
    "cooldown_epochs": only(0, instead="the curve ends at TRAIN.EPOCHS; see TRAIN.LR_SCHEDULER.COOLDOWN_EPOCHS"),
    "patience_epochs": needless("for timm's plateau"),
    "no_aug": only(False, instead="set the settings AUG.*"),
    "train_crop_mode": only(None, "rrc", instead="training crops are random resized crops"),
    "scale": to("AUG.SCALE", list), "ratio": to("AUG.RATIO", list), "hflip": to("AUG.HFLIP"),
    "vflip": only(0.0, instead=NO_COUNTERPART),
    "color_jitter": to("AUG.COLOR_JITTER", none=0.0),
    "color_jitter_prob": only(None, instead=NO_COUNTERPART), "grayscale_prob": only(None, 0.0, instead=NO_COUNTERPART),
    "gaussian_blur_prob": only(None, 0.0, instead=NO_COUNTERPART),
    "aa": to("AUG.AUTO_AUGMENT", none="none"),
    "aug_repeats": to("AUG.REPEATS", lambda count: int(count) or 1),
    "aug_splits": only(0, instead="there are no splits of a batch"),
    "jsd_loss": only(False, instead="the loss is cross entropy"),
    "bce_loss": to("TRAIN.LOSS.NAME", lambda bce: "bce" if bce else "cross_entropy"),
    "bce_sum": to("TRAIN.LOSS.SUM"), "bce_target_thresh": to("TRAIN.LOSS.THRESHOLD", none=0.0),
    "bce_pos_weight": only(None, instead="TRAIN.CLASS_WEIGHTS, with cross entropy"),
    "reprob": to("AUG.REPROB"), "remode": to("AUG.REMODE"), "recount": to("AUG.RECOUNT"),
    "resplit": only(False, instead="there are no splits of a batch"),
    "mixup": to("AUG.MIXUP"), "cutmix": to("AUG.CUTMIX"),
    "cutmix_minmax": to("AUG.CUTMIX_MINMAX", list, none=[]),
    "mixup_prob": to("AUG.MIXUP_PROB"), "mixup_switch_prob": to("AUG.MIXUP_SWITCH_PROB"),
    "mixup_mode": to("AUG.MIXUP_MODE"),
    "mixup_off_epoch": only(0, instead="TRAIN.CURRICULUM, for example [{FROM: 280, AUG.MIXUP: 0, AUG.CUTMIX: 0}]"),
    "smoothing": to("MODEL.LABEL_SMOOTHING"),
    "train_interpolation": only("", "bicubic", "bilinear", "random", instead="DATA.INTERPOLATION is for training too"),
    "drop": to("MODEL.DROP_RATE"),
    "drop_connect": only(None, instead="MODEL.DROP_PATH_RATE"),
    "drop_path": to("MODEL.DROP_PATH_RATE", none=0.0),
    "drop_block": only(None, 0.0, instead=NO_COUNTERPART),
    "bn_momentum": only(None, instead=NO_COUNTERPART), "bn_eps": only(None, instead=NO_COUNTERPART),
    "sync_bn": to("TRAIN.SYNC_BN"),
    "dist_bn": only("reduce", "broadcast", instead="statistics are averaged over processes"),
    "split_bn": only(False, instead="there are no splits of a batch"),
    "model_ema": Counterpart(instead="TRAIN.EMA_DECAY above 0"),
    "model_ema_decay": Counterpart(instead="TRAIN.EMA_DECAY, where model_ema is true"),
    "model_ema_warmup": to("TRAIN.EMA_WARMUP"),
    "model_ema_force_cpu": only(False, instead="the average is on the device"),
    "seed": to("SEED"), "worker_seeding": needless("every image's seed is derived from SEED, the epoch and its number"),
    "log_interval": to("PRINT_FREQ"),
    "recovery_interval": to("TRAIN.SAVE_EVERY_STEPS"),
    "checkpoint_hist": needless("best.pth, last.pth and TRAIN.KEEP_LAST of those before it stay"),
    "workers": to("DATA.NUM_WORKERS"),
    "save_images": only(False, instead="first_batch.png is always drawn"),
    "pin_mem": needless("memory is pinned where there is a GPU"),
    "no_prefetcher": needless("batches are always fetched ahead"),
    "use_multi_epochs_loader": needless("loader processes live as long as the run"),
    "amp": Counterpart(instead="AMP"), "amp_dtype": Counterpart(instead="AMP, where amp is true"),
    "amp_impl": only("native", instead="apex.amp has been removed from apex"),
    "model_dtype": only(None, "float32", instead="AMP"),
    "no_ddp_bb": needless("buffers are the same on all processes"),
    "synchronize_step": needless(NO_COUNTERPART),
    "local_rank": needless("the launcher tells it"), "rank": needless("the launcher tells it"),
    "world_size": needless("the launcher tells it"), "distributed": needless("the launcher tells it"),
    "device": needless("GPUs are used where there are any"), "device_modules": only(None, instead=NO_COUNTERPART),
    "output": to("OUTPUT", lambda folder: folder or "output", none="output"),
    "experiment": to("TAG", lambda name: name or "default"),
    "eval_metric": only("top1", instead="top-1 decides which weights are best.pth"),
    "tta": only(0, instead="TEST.VIEWS"),
    "log_wandb": Counterpart(instead="LOG.WANDB"), "wandb_project": Counterpart(instead="LOG.WANDB"),
    "wandb_tags": needless("see TAG"), "wandb_resume_id": needless("a run carries its curves on by itself"),
    "kd_model_name": only(None, instead="TRAIN.TEACHER.FROM"),
    "naflex_loader": only(False, instead="images of a batch have one size"),
}  # fmt: skip
"""The arguments of timm's train.py."""

TINY, SMALL, BASE, HUGE = (1, 1, 8, 6), (2, 2, 6, 2), (2, 2, 18, 2), (6, 6, 18, 2)
SIZES = {(64, TINY): "tiny", (96, SMALL): "small", (96, BASE): "base", (128, BASE): "large"}
SIZES_PP = {(64, BASE): "small", (96, BASE): "base", (128, BASE): "large", (128, HUGE): "huge"}
"""Published variants by embed_dim and depths: a file's own name may be another's."""
SWINS = {(96, SMALL): "tiny", (96, BASE): "small", (128, BASE): "base", (192, BASE): "large"}
SWINS_AT = {(7, 224): ("tiny", "small", "base", "large"), (12, 384): ("base", "large")}
"""Windows and sizes of images for which timm has them by name."""


def is_of_swin(leaves: Iterable[Leaf]) -> bool:
    """Tell whether a file is CrossFormer's or Swin's."""
    return any(leaf.key == "MODEL.TYPE" or leaf.key.startswith(("MODEL.CROS.", "MODEL.SWIN.")) for leaf in leaves)


def is_of_timm(leaves: Iterable[Leaf]) -> bool:
    """Tell whether a file is timm's ``args.yaml``: no sections, and a model."""
    keys = {leaf.key for leaf in leaves}
    return "model" in keys and all(key == key.lower() for key in keys)


def moved(leaves: list[Leaf], ours: Iterable[str], path: str) -> tuple[list[tuple[str, Any, int]], list[str]]:
    """Translate the settings of another trainer.

    Args:
        leaves: of its file.
        ours: the names of our settings.
        path: of the file, for errors.

    Returns:
        our settings with their values and lines, and what there is to say.

    Raises:
        UserError: names all that has no counterpart.
    """
    swin = is_of_swin(leaves)
    table, ours = OF_SWIN if swin else OF_TIMM, set(ours)
    leaves = [leaf._replace(value=None if leaf.value == "None" else leaf.value) for leaf in leaves]
    given, problems = [], []
    for key, value, line in leaves:
        known = table.get(key)
        if known is None and swin and key in ours:
            given.append((key, value, line))
        elif known is None:
            problems.append(f"{key} (line {line}): unknown")
        elif known.to:
            new = known.none if value is None else known.reads(value)
            if new is not None:
                given.append((known.to, new, line))
        elif known.only and ANY not in known.only and value not in known.only:
            problems.append(f"{key} {value} (line {line}): {known.instead}")
    values = {leaf.key: leaf.value for leaf in leaves}
    together = _swin_together if swin else _timm_together
    more, notes = together(values, {leaf.key: leaf.line for leaf in leaves}, problems)
    if problems:
        count = f"{len(problems)} settings" if len(problems) > 1 else "a setting"
        raise UserError(f"{path} has {count} without a counterpart (docs/moving.md): {'; '.join(problems)}")
    return _last_of_each([*given, *more]), notes


def _last_of_each(given: list[tuple[str, Any, int]]) -> list[tuple[str, Any, int]]:
    return list({key: (key, value, line) for key, value, line in given}.values())


Together = tuple[list[tuple[str, Any, int]], list[str]]


def _swin_together(values: dict[str, Any], lines: dict[str, int], problems: list[str]) -> Together:
    """What several keys say together: which network it is."""
    line = lines.get("MODEL.TYPE", 1)
    given: list[tuple[str, Any, int]] = []
    given += [(key, value, line) for key, value in DEFAULTS_OF_SWIN.items() if key not in values]
    cros = any(key.startswith("MODEL.CROS.") for key in values)
    prefix = "MODEL.CROS." if cros or values.get("MODEL.TYPE") == "cross-scale" else "MODEL.SWIN."
    depths, dim = values.get(f"{prefix}DEPTHS") or [2, 2, 6, 2], values.get(f"{prefix}EMBED_DIM") or 96
    size = (dim, tuple(depths) if isinstance(depths, list) else ())
    if prefix == "MODEL.CROS.":
        pp = bool(values.get("MODEL.CROS.USE_ACL"))
        name = f"crossformer{'pp' * pp}_{(SIZES_PP if pp else SIZES).get(size, 'small')}"
        given.append(("MODEL.NAME", name, line))
    else:
        window, image = values.get("MODEL.SWIN.WINDOW_SIZE") or 7, values.get("DATA.IMG_SIZE") or 224
        heads = values.get("MODEL.SWIN.NUM_HEADS") or [3, 6, 12, 24]
        published = SWINS.get(size) in SWINS_AT.get((window, image), ())
        published &= heads == [dim // 32 * 2**i for i in range(4)]
        name = f"swin_{SWINS[size]}_patch4_window{window}_{image}" if published else "swin_tiny_patch4_window7_224"
        given.append(("MODEL.NAME", name, line))
        if not published:
            sizes = {"embed_dim": dim, "depths": depths, "num_heads": heads, "window_size": window, "img_size": image}
            given.append(("MODEL.KWARGS", sizes, line))
    said = values.get("MODEL.NAME")
    return given, [f"MODEL.NAME {said} is {name} here, by its sizes"] if said and said != name else []


def _timm_together(values: dict[str, Any], lines: dict[str, int], problems: list[str]) -> Together:
    """What several arguments say together: moving average, precision, learning rate, curves elsewhere."""

    def at(key: str) -> int:
        return lines.get(key, 1)

    given: list[tuple[str, Any, int]] = []
    notes = []
    if "model_ema" in values:
        decay = values.get("model_ema_decay", 0.9998) if values["model_ema"] else 0.0
        given.append(("TRAIN.EMA_DECAY", decay, at("model_ema")))
    if "amp" in values:
        kind = {"float16": "fp16", "bfloat16": "bf16"}.get(str(values.get("amp_dtype", "float16")), "auto")
        given.append(("AMP", kind if values["amp"] else "none", at("amp")))
    if values.get("log_wandb"):
        given.append(("LOG.WANDB", values.get("wandb_project") or "timm", at("log_wandb")))
    if values.get("lr") is not None:
        given.append(("TRAIN.LR_REFERENCE_BATCH", 0, at("lr")))
    elif values.get("lr_base_scale") in ("linear",) or str(values.get("opt", "sgd")).startswith(("sgd", "momentum")):
        given.append(("TRAIN.BASE_LR", values.get("lr_base", 0.1), at("lr_base")))
        given.append(("TRAIN.LR_REFERENCE_BATCH", values.get("lr_base_size", 256), at("lr_base")))
    else:
        problems.append(
            f"lr None (line {at('lr')}): write the learning rate itself, which grew with the root of the batch"
        )
    if values.get("initial_checkpoint") and values.get("pretrained"):
        problems.append(
            f"initial_checkpoint (line {at('initial_checkpoint')}): pretrained is set too; keep one of them"
        )
    if values.get("train_interpolation") in ("random", "bilinear"):
        notes.append("train_interpolation: training images are resized by DATA.INTERPOLATION too")
    if not values.get("sched_on_updates", True):
        notes.append(f"sched_on_updates False: {STEPS} here")
    if values.get("opt") == "momentum":
        problems.append(f"opt momentum (line {at('opt')}): sgd, which has Nesterov's correction")
    return given, notes


def listing(table: dict[str, Counterpart]) -> list[tuple[str, str]]:
    """Show a table for people: each key, and what it is here."""
    rows = []
    for key, known in table.items():
        if known.to:
            rows.append((f"`{key}`", f"`{known.to}`"))
        elif not known.only or ANY in known.only:
            rows.append((f"`{key}`", known.instead))
        else:
            values = " or ".join(f"`{value}`" for value in known.only)
            rows.append((f"`{key}`", f"{values} alone; else: {known.instead}"))
    return rows
