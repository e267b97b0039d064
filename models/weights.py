"""Put the weights of a checkpoint into a model."""

from typing import NamedTuple

import timm
from torch import Tensor, nn

from models.crossformer import VARIANTS, checkpoint_filter_fn
from utils.errors import UserError


class Loaded(NamedTuple):
    """What :func:`load_weights` has done."""

    matched: int
    new_head: bool
    classes_in_file: int | None


def load_weights(model: nn.Module, state_dict: dict[str, Tensor], source: str, *, allow_new_head: bool) -> Loaded:
    """Copy ``state_dict`` (published, ours or from timm) into ``model``; every weight must match.

    Args:
        model: a timm model.
        state_dict: its keys may carry a prefix, see :func:`models.crossformer.checkpoint_filter_fn`.
        source: where it came from, for errors.
        allow_new_head: when the number of classes differs, leave the head as it is instead of raising.

    Raises:
        UserError: a weight is missing, left over or of another shape.
    """
    weights = checkpoint_filter_fn(state_dict)
    own = model.state_dict()
    heads = _heads(model.pretrained_cfg["classifier"])
    head = tuple(f"{name}." for name in heads)
    classes_in_file = len(weights[f"{heads[0]}.weight"]) if f"{heads[0]}.weight" in weights else None
    new_head = classes_in_file != model.num_classes
    if new_head and not allow_new_head:
        raise UserError(
            f"{classes_in_file or 'no'} classes in {source}, {model.num_classes} in the data; "
            "to train a new head on its trunk start with --pretrained"
        )
    if new_head:
        weights = {key: value for key, value in weights.items() if not key.startswith(head)}
        own = {key: value for key, value in own.items() if not key.startswith(head)}
    difference = _difference(own, weights)
    if difference:
        raise UserError(f"{source} does not fit the model: {difference}{_advice(weights)}")
    model.load_state_dict(weights, strict=not new_head)
    return Loaded(len(weights), new_head, classes_in_file)


def classes_in(state_dict: dict[str, Tensor], name: str) -> int | None:
    """How many classes the weights of timm's model ``name`` tell apart; None when they have no head."""
    if not timm.is_model(name):
        return None
    weights, head = checkpoint_filter_fn(state_dict), _heads(timm.get_pretrained_cfg(name).classifier)[0]
    return len(weights[f"{head}.weight"]) if f"{head}.weight" in weights else None


def _heads(classifier: str | tuple[str, ...]) -> tuple[str, ...]:
    return (classifier,) if isinstance(classifier, str) else tuple(classifier)


def _difference(own: dict[str, Tensor], weights: dict[str, Tensor]) -> str:
    missing, left_over = own.keys() - weights.keys(), weights.keys() - own.keys()
    if missing or left_over:
        example = min(missing or left_over)
        kind = "lacks" if missing else "has but the model lacks"
        return f"it {kind} {example} ({len(missing)} weights missing, {len(left_over)} left over)"
    for key, value in own.items():
        if value.shape != weights[key].shape:
            return f"{key} is {tuple(weights[key].shape)} in the file, {tuple(value.shape)} in the model"
    return ""


def variant_of(weights: dict[str, Tensor]) -> str:
    """The name of the variant whose weights these are; an empty string when they are of none."""
    shape = _shape(checkpoint_filter_fn(weights))
    family = "crossformerpp_" if any(".ex_conv." in key for key in weights) else "crossformer_"
    for name, architecture in VARIANTS.items():
        if name.startswith(family) and shape == (architecture["embed_dim"], list(architecture["depths"])):
            return name
    return ""


def _shape(weights: dict[str, Tensor]) -> tuple[int, list[int]] | None:
    """Channels of the first stage and blocks of each, if these are a CrossFormer's weights."""
    norm = weights.get("patch_embed.norm.weight")
    if norm is None:
        return None
    depths = []
    while any(key.startswith(f"layers.{len(depths)}.") for key in weights):
        prefix = f"layers.{len(depths)}.blocks."
        blocks = [int(key[len(prefix) :].split(".")[0]) for key in weights if key.startswith(prefix)]
        depths.append(1 + max(blocks, default=0))
    return len(norm), depths


def _advice(weights: dict[str, Tensor]) -> str:
    """Which variant the weights belong to, if one of ours."""
    shape, name = _shape(weights), variant_of(weights)
    if name:
        return f"; it holds {name} (embed_dim {shape[0]}): set MODEL.NAME {name}"
    return f"; it has embed_dim {shape[0]} and depths {shape[1]}" if shape else ""
