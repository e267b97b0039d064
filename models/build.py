"""From a config to a model."""

import timm
from torch import nn

from models.crossformer import CrossFormer
from utils.errors import UserError, did_you_mean

ARCHITECTURE = {
    "EMBED_DIM": "embed_dim",
    "DEPTHS": "depths",
    "NUM_HEADS": "num_heads",
    "GROUP_SIZE": "group_size",
    "INTERVAL": "interval",
}
"""Settings under MODEL.CROSSFORMER, and the arguments of :class:`models.crossformer.CrossFormer` they set."""


def build_model(config, num_classes: int) -> nn.Module:
    """The model that ``config.MODEL`` describes, with ``num_classes`` classes; any model that timm knows will do."""
    name = config.MODEL.NAME
    if not timm.is_model(name):
        raise UserError(f"MODEL.NAME {name} is not a model that timm knows{did_you_mean(name, timm.list_models())}")
    settings = {key: config.MODEL.CROSSFORMER[key] for key in ARCHITECTURE if config.MODEL.CROSSFORMER[key]}
    if settings and not name.startswith("crossformer"):
        raise UserError(f"MODEL.CROSSFORMER.{next(iter(settings))} is set, but MODEL.NAME {name} is no CrossFormer")
    try:
        model = timm.create_model(
            name,
            num_classes=num_classes,
            drop_rate=config.MODEL.DROP_RATE or None,
            drop_path_rate=config.MODEL.DROP_PATH_RATE or None,  # not every model has it
            **{ARCHITECTURE[key]: value for key, value in settings.items()},
        )
    except ValueError as error:
        argument, _, rest = str(error).partition(" ")
        key = next((key for key, name in ARCHITECTURE.items() if name == argument), None)
        raise UserError(f"MODEL.CROSSFORMER.{key} {rest}" if key else f"MODEL.NAME {name}: {error}") from error
    except TypeError as error:
        if "unexpected keyword argument 'drop" not in str(error):
            raise
        setting = str(error).split("'")[1].upper()
        raise UserError(f"MODEL.NAME {name} has no {setting.lower()}: set MODEL.{setting} 0") from error
    if config.TRAIN.USE_CHECKPOINT != "none":
        recompute(model, name, config.TRAIN.USE_CHECKPOINT)
    return model


def recompute(model: nn.Module, name: str, how: str) -> None:
    """Let the backward pass recompute what it needs: ``full``, or for a CrossFormer ``selective``.

    Raises:
        UserError: the model ``name`` cannot.
    """
    if how == "selective" and not isinstance(model, CrossFormer):
        raise UserError(f"TRAIN.USE_CHECKPOINT selective: MODEL.NAME {name} is no CrossFormer; use full or none")
    try:
        model.set_grad_checkpointing(True, **({"selective": True} if how == "selective" else {}))
    except (AssertionError, AttributeError) as error:
        raise UserError(f"MODEL.NAME {name} cannot recompute: set TRAIN.USE_CHECKPOINT none") from error
