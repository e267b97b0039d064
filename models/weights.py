"""Put the weights of a checkpoint into a model."""

import re
from collections import Counter
from collections.abc import Container, Iterable
from contextlib import suppress
from typing import Any, NamedTuple, cast

import timm
import torch
from torch import Tensor, nn

from models.build import build_model
from models.crossformer import VARIANTS
from models.crossformer.network import WRAPPERS
from models.heads import Detector, Segmenter, from_published
from models.heads.anchors import RATIOS
from models.heads.retinanet import STEPS
from utils.compat import timm_converter
from utils.errors import UserError

COUNTERS = re.compile(
    r"(^|\.)(num_batches_tracked|n_averaged|total_ops|total_params|num_updates|updates|decay|attn\.biases|attn_mask|"
    r"relative_position_index|relative_coords_table|attention_bias_idxs)$"
)
"""What files hold besides weights: counts of other tools, and tables that models compute themselves."""
HEADS = ("head", "fc", "classifier")
"""What the last layer is called by those who do not name it as timm does."""
NAMED = 3
"""So many examples are named of what was left out."""


class Loaded(NamedTuple):
    """What :func:`load_weights` has done.

    Attributes:
        matched: how many weights of the model come from the file.
        new_head: whether the head is still the model's own.
        classes_in_file: None when the file has no head.
        notes: in words, what was done to the file's keys and which of them are not used.
    """

    matched: int
    new_head: bool
    classes_in_file: int | None
    notes: list[str]


class Fitted(NamedTuple):
    """A state dict with a model's keys: the weights, and what was done to get them."""

    weights: dict[str, Tensor]
    notes: list[str]


def load_weights(
    model: nn.Module,
    state_dict: dict[str, Tensor],
    source: str,
    *,
    allow_new_head: bool,
    unused: Container[str] = frozenset(),
) -> Loaded:
    """Copy ``state_dict`` (published, ours or from timm) into ``model``; every weight must match, and be a number.

    Args:
        model: a timm model.
        state_dict: its keys may carry prefixes such as ``module.`` and ``_orig_mod.``, see :func:`fit`.
        source: where it came from, for errors.
        allow_new_head: when the number of classes differs, leave the head as it is instead of raising.
        unused: what the file may have besides and the model has not.

    Raises:
        UserError: a weight is missing, left over, of another shape or kind, or not finite.
    """
    if isinstance(model, Detector):
        state_dict = from_published(state_dict)
    weights, notes = fit(state_dict, model, source)
    if beside := [key for key in weights if key in unused]:
        notes += _left_out("which the model has no use for", beside)
        weights = {key: value for key, value in weights.items() if key not in unused}
    own = model.state_dict()
    heads = _heads(cast(Any, model).pretrained_cfg["classifier"])
    head = tuple(f"{name}." for name in heads)
    rows = _rows(weights.get(f"{heads[0]}.weight"))
    classes_in_file = rows if rows is None or not isinstance(model, Detector) else model.classes_of(rows)
    new_head = classes_in_file != model.num_classes
    if new_head and not allow_new_head:
        raise UserError(
            f"{classes_in_file or 'no'} classes in {source}, {model.num_classes} in the data; "
            f"to train a new head on its trunk start with --pretrained{_keys_of(state_dict, own)}"
        )
    if new_head:
        weights = {key: value for key, value in weights.items() if not key.startswith(head)}
        own = {key: value for key, value in own.items() if not key.startswith(head)}
    buffers = {key for key, _ in model.named_buffers()}
    counters = {key: own[key] for key in own if key in buffers - weights.keys() and COUNTERS.search(key)}
    weights |= counters  # not every file has them
    difference = _difference(own, weights)
    if difference:
        raise UserError(f"{source} does not fit the model: {difference}{_advice(weights)}{_keys_of(state_dict, own)}")
    for key, value in own.items():
        if not is_finite(weights[key].to(value.dtype)) and is_finite(value):
            raise UserError(
                f"{source} cannot be used: {key} holds values that are not finite; "
                "take an earlier checkpoint, from before training went wrong"
            )
    model.load_state_dict(weights, strict=not new_head)
    return Loaded(len(weights) - len(counters), new_head, classes_in_file, notes)


def load_segmenter(model: Segmenter, state_dict: dict[str, Tensor], source: str) -> list[str]:
    """Copy a segmenter's weights into ``model``, or those of a classifier into its backbone; every one must match.

    Returns:
        a line that says which of both, and the notes of :func:`load_weights`.

    Raises:
        UserError: as :func:`load_weights`.
    """
    if not any("decode_head." in key for key in state_dict):
        loaded = load_weights(model.backbone, state_dict, source, allow_new_head=True, unused=model.removed)
        return [f"{loaded.matched} weights of the backbone matched, the head is new", *loaded.notes]
    loaded = load_weights(model, state_dict, source, allow_new_head=True)
    last = (
        f"the last layer is new ({loaded.classes_in_file} classes in the file)" if loaded.new_head else "the head too"
    )
    return [f"{loaded.matched} weights matched, {last}", *loaded.notes]


def load_detector(model: Detector, state_dict: dict[str, Tensor], source: str) -> list[str]:
    """Copy a detector's weights, ours or published, into ``model``, or those of a classifier into its backbone.

    Returns:
        a line that says which of both, and the notes of :func:`load_weights`.

    Raises:
        UserError: as :func:`load_weights`.
    """
    if not any("neck.fpn_convs." in key for key in state_dict):
        loaded = load_weights(model.backbone, state_dict, source, allow_new_head=True, unused=model.removed)
        return [f"{loaded.matched} weights of the backbone matched, the head is new", *loaded.notes]
    loaded = load_weights(model, state_dict, source, allow_new_head=True)
    last = f"the last layers are new ({loaded.classes_in_file} classes in the file)"
    return [f"{loaded.matched} weights matched, {last if loaded.new_head else 'the head too'}", *loaded.notes]


def fit(state_dict: dict[str, Tensor], model: nn.Module, source: str) -> Fitted:
    """``state_dict`` with the keys of ``model``.

    The prefix under which most of the model's keys are found comes off, whatever it is called; what lies beside it
    belongs to other modules and is left out, as are counters and tables that the model does not have. Names that
    timm's own models had elsewhere become timm's.

    Raises:
        UserError: several models are in it, and none of them is the likely one.
    """
    own, notes = model.state_dict(), []
    prefix = _prefix(state_dict, own, source)
    weights = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
    if prefix:
        notes.append(f"the prefix {prefix} was taken off")
        others = [key for key in state_dict if not key.startswith(prefix)]
        weights |= {key: state_dict[key] for key in others if key in own and key not in weights}
        notes += _left_out("of other modules", [key for key in others if key not in own])
    renamed = _renamed(weights, model, own)
    if renamed is not weights:
        notes.append("its names were changed to those of timm")
    counters = [key for key in renamed if key not in own and COUNTERS.search(key)]
    notes += _left_out("which are no weights", counters)
    return Fitted({key: value for key, value in renamed.items() if key not in set(counters)}, notes)


def classes_in(state_dict: dict[str, Tensor], name: str) -> int | None:
    """How many classes the weights of timm's model ``name`` tell apart; None when they have no head."""
    if not timm.is_model(name):
        return None
    cfg = timm.get_pretrained_cfg(name)  # not every model has one
    for head in (*(_heads(cfg.classifier)[:1] if cfg and cfg.classifier else ()), *HEADS):
        weights = _unwrapped(state_dict, f"{head}.weight")
        if weights:
            return _rows(weights[f"{head}.weight"])
    return None


def segmenter_classes(state_dict: dict[str, Tensor]) -> int | None:
    """How many classes the weights of a segmenter tell apart; None when they are of none."""
    weights = _unwrapped(state_dict, "decode_head.conv_seg.weight")
    return _rows(weights.get("decode_head.conv_seg.weight"))


def detector_in(state_dict: dict[str, Tensor]) -> tuple[str, int, bool] | None:
    """Tell a detector's head, how many classes it finds, and whether masks too; None for other weights."""
    weights = from_published(state_dict)
    for anchor, head in LAST_OF_DETECTORS.items():
        found = _unwrapped(weights, anchor)
        if rows := _rows(found.get(anchor)):
            classes = rows // ANCHORS_OF_RETINANET if head == "retinanet" else rows - 1
            return head, classes, any("mask_predictor." in key for key in found)
    return None


def variant_of(state_dict: dict[str, Tensor]) -> str:
    """The name of the variant whose weights these are; an empty string when they are of none."""
    weights = _unwrapped(state_dict, EMBEDDING)
    shape = _shape(weights)
    family = "crossformerpp_" if any(".ex_conv." in key for key in weights) else "crossformer_"
    for name, architecture in VARIANTS.items():
        if name.startswith(family) and shape == (architecture["embed_dim"], list(architecture["depths"])):
            return name
    return ""


def check_size(config, num_classes: int, state_dict: dict[str, Tensor], source: str) -> None:
    """Refuse weights that are far fewer than those of the model that ``config`` describes, before it takes the memory.

    Raises:
        UserError: they are.
    """
    name, settings = config.MODEL.NAME, config.MODEL.CROSSFORMER
    if name in VARIANTS:
        depths = list(settings.DEPTHS or VARIANTS[name]["depths"])
        described, there = (
            (settings.EMBED_DIM or VARIANTS[name]["embed_dim"], depths),
            _shape(_unwrapped(state_dict, EMBEDDING)),
        )
        if there != described:
            raise UserError(
                f"{source} does not fit the model: {name} has embed_dim {described[0]} and depths {described[1]}, its "
                f"weights have {f'{there[0]} and {there[1]}' if there else 'none'}"
            )
        return
    with suppress(NotImplementedError, RuntimeError), torch.device("meta"):  # a model that needs numbers to be built
        wanted = sum(value.numel() for value in build_model(config, num_classes).state_dict().values())
        had = sum(value.numel() for value in state_dict.values())
        if wanted > 2 * had:
            raise UserError(f"{source} does not fit the model: {name} has {wanted:,} weights, the file {had:,}")


def is_finite(value: Tensor) -> bool:
    """Whether every number is one."""
    return not value.is_floating_point() or bool(torch.isfinite(value).all())


LAST_OF_DETECTORS = {
    "retinanet.head.classification_head.cls_logits.weight": "retinanet",
    "roi_heads.box_predictor.cls_score.weight": "mask_rcnn",
    "roi_heads.stages.0.box_predictor.cls_score.weight": "cascade_mask_rcnn",
}
"""Keys by which a detector is known, and its head."""
ANCHORS_OF_RETINANET = len(STEPS) * len(RATIOS)
EMBEDDING = "patch_embed.norm.weight"
"""A key by which a CrossFormer is known."""


def _prefix(state_dict: dict[str, Tensor], own: dict[str, Tensor], source: str) -> str:
    """What stands before the model's keys in ``state_dict``: where most of them are found."""
    found: Counter[str] = Counter()
    for key in state_dict:
        start = 0
        while True:
            if key[start:] in own:
                found[key[:start]] += 1
            start = key.find(".", start) + 1
            if not start:
                break
    if max(found.values(), default=0) < len(own) / 2:  # the names are others, but a wrapper's prefix is the same
        wrappers = {match[0] for key in state_dict if (match := WRAPPERS.match(key))}
        return wrappers.pop() if len(wrappers) == 1 else ""
    most = [prefix for prefix, count in found.items() if count == max(found.values())]
    likely = [prefix for prefix in most if WRAPPERS.fullmatch(prefix)] or most
    if len(likely) > 1 and "" not in likely:
        raise UserError(
            f"{source} holds several models, under {', '.join(sorted(likely)[:NAMED])}; "
            "save the weights of the one that you want as a state dict of its own"
        )
    return "" if "" in likely else likely[0]


def _unwrapped(state_dict: dict[str, Tensor], anchor: str) -> dict[str, Tensor]:
    """Those keys that have what stands before ``anchor``, without it; nothing when that is not among them."""
    prefixes = [key.removesuffix(anchor) for key in state_dict if key == anchor or key.endswith(f".{anchor}")]
    if not prefixes:
        return {}
    prefix = max(sorted(prefixes, key=len), key=lambda p: sum(key.startswith(p) for key in state_dict))
    return {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}


def _renamed(weights: dict[str, Tensor], model: nn.Module, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """With timm's names, where timm knows how the authors of a model call its weights."""
    unknown = [key for key in weights if key not in own and not COUNTERS.search(key)]
    convert = timm_converter(model)
    sane = sum(value.numel() for value in weights.values()) <= 2 * sum(value.numel() for value in own.values())
    if not unknown or convert is None or not sane:
        return weights
    try:
        renamed = dict(convert(dict(weights), model))
    except Exception:  # it meets what it was not made for, and :func:`load_weights` says what does not fit
        return weights
    better = all(isinstance(value, Tensor) for value in renamed.values()) and renamed.keys() >= weights.keys() & own
    return renamed if better and len(renamed.keys() & own) > len(weights.keys() & own) else weights


def _left_out(what: str, keys: list[str]) -> list[str]:
    if not keys:
        return []
    more = ", ..." if len(keys) > NAMED else ""
    return [f"left out {len(keys)} {what}: {', '.join(keys[:NAMED])}{more}"]


def _heads(classifier: str | tuple[str, ...]) -> tuple[str, ...]:
    return (classifier,) if isinstance(classifier, str) else tuple(classifier)


def _rows(weight: Tensor | None) -> int | None:
    return None if weight is None or not weight.ndim else len(weight)


def _difference(own: dict[str, Tensor], weights: dict[str, Tensor]) -> str:
    missing, left_over = own.keys() - weights.keys(), weights.keys() - own.keys()
    if missing or left_over:
        example = min(missing or left_over)
        kind = "lacks" if missing else "has but the model lacks"
        return f"it {kind} {example} ({len(missing)} weights missing, {len(left_over)} left over)"
    for key, value in own.items():
        there = weights[key]
        if there.shape != value.shape:
            return f"{key} is {tuple(there.shape)} in the file, {tuple(value.shape)} in the model"
        if kind_of(there) != kind_of(value):
            return f"{key} holds {kind_of(there)} in the file, {kind_of(value)} in the model"
    return ""


def kind_of(value: Tensor) -> str:
    """What the numbers of a tensor are, in words."""
    if value.dtype == torch.bool:
        return "truth values"
    return "complex numbers" if value.is_complex() else "fractions" if value.is_floating_point() else "whole numbers"


def _keys_of(state_dict: Iterable[str], own: Iterable[str]) -> str:
    """How the keys in a file begin, when none of them is the model's."""
    if any(key in own for key in state_dict):
        return ""
    return f" (its keys begin like {min(state_dict)})"


def _shape(weights: dict[str, Tensor]) -> tuple[int, list[int]] | None:
    """Channels of the first stage and blocks of each, if these are a CrossFormer's weights."""
    norm = weights.get(EMBEDDING)
    if norm is None or _rows(norm) is None:
        return None
    depths: list[int] = []
    while any(key.startswith(f"layers.{len(depths)}.") for key in weights):
        prefix = f"layers.{len(depths)}.blocks."
        blocks = [int(key[len(prefix) :].split(".")[0]) for key in weights if re.match(rf"{prefix}\d{{1,4}}\.", key)]
        depths.append(1 + max(blocks, default=0))
    return len(norm), depths


def _advice(weights: dict[str, Tensor]) -> str:
    """Which variant the weights belong to, if one of ours."""
    shape, name = _shape(weights), variant_of(weights)
    if shape and name:
        return f"; it holds {name} (embed_dim {shape[0]}): set MODEL.NAME {name}"
    return f"; it has embed_dim {shape[0]} and depths {shape[1]}" if shape else ""
