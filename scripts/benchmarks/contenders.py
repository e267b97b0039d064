"""The models that are raced: this project's, the plain implementation of each, and others of their size."""

from functools import cache

import timm
import torch
from torch import nn

import models  # noqa: F401  (registers the variants with timm)
from config import build_config
from engine.model import giga_macs
from engine.precision import Precision, choose_precision
from models.crossformer import VARIANTS
from models.reference import plain
from utils.errors import UserError, did_you_mean

PLAIN = "plain_"
"""Before the name of a variant: its plain implementation, models/reference.py."""

PEERS = {
    "swin_tiny": "swin_tiny_patch4_window7_224",
    "swin_small": "swin_small_patch4_window7_224",
    "swin_base": "swin_base_patch4_window7_224",
    "convnext_tiny": "convnext_tiny",
    "convnext_small": "convnext_small",
    "convnext_base": "convnext_base",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
}
"""What others are called here, and by timm."""

AT_224 = [name for name in VARIANTS if name != "crossformer_micro"]
DEFAULT_ON_GPU = (*AT_224, *(PLAIN + name for name in AT_224), *PEERS)
DEFAULT_ON_CPU = (
    "crossformer_small", "plain_crossformer_small", "crossformerpp_small", "plain_crossformerpp_small",
    "swin_tiny", "convnext_tiny", "vit_small",
)  # fmt: skip

CLASSES = 1000
STOCHASTIC_DEPTH_OF_PEERS = 0.2


def check_names(names: list[str]) -> None:
    """Raises: UserError: one of them is no model, or stands twice."""
    for i, name in enumerate(names):
        if name.removeprefix(PLAIN) not in VARIANTS and name not in PEERS and not timm.is_model(name):
            known = [*VARIANTS, *(PLAIN + variant for variant in VARIANTS), *PEERS, *timm.list_models()]
            raise UserError(f"--models: there is no model {name}{did_you_mean(name, known)}")
        if name in names[:i]:
            raise UserError(f"--models: {name} stands twice")


def create(name: str, image_size: int) -> nn.Module:
    """The model with random weights, stochastic depth and 1,000 classes, on the CPU."""
    if name.startswith(PLAIN):
        variant = name.removeprefix(PLAIN)
        model = plain(variant, num_classes=CLASSES, drop_path_rate=published_stochastic_depth(variant))
        model.load_state_dict(create(variant, image_size).state_dict())
        return model
    if name in VARIANTS:
        return timm.create_model(name, num_classes=CLASSES, drop_path_rate=published_stochastic_depth(name))
    name = PEERS.get(name, name)
    fixed = timm.get_pretrained_cfg(name).fixed_input_size
    sizes = {"img_size": image_size} if fixed else {}  # of these the constructor has to know
    try:
        return timm.create_model(name, num_classes=CLASSES, drop_path_rate=STOCHASTIC_DEPTH_OF_PEERS, **sizes)
    except TypeError:  # not every model of timm has stochastic depth
        return timm.create_model(name, num_classes=CLASSES, **sizes)


@cache
def published_stochastic_depth(variant: str) -> float:
    """That of the variant's recipe, which decides how much of a training step need not be computed."""
    recipe = variant.removeprefix("crossformer").removeprefix("_")
    return build_config(f"configs/{recipe}.yaml").MODEL.DROP_PATH_RATE


@cache
def count_gmac(name: str, image_size: int) -> float:
    """Of one image. Both implementations of a variant have that of the plain one, which hides no operation.

    Raises:
        UserError: the model does not take images of this size.
    """
    model = create(PLAIN + name if name in VARIANTS else name, image_size)
    try:
        return giga_macs(model, image_size, torch.device("cpu"))
    except UserError as error:
        reason = str(error.__cause__).partition("\n")[0]
        raise UserError(f"--image-size {image_size}: {name} does not take it: {reason}") from error


def precision_of(name: str, device: torch.device) -> Precision:
    """``auto | bf16 | fp16 | tf32 | fp32`` as the trainer understands AMP."""
    return choose_precision(build_config("", ["AMP", {"fp32": "none"}.get(name, name)]), device)


def compile_model(model: nn.Module, mode: str) -> None:
    """Let torch.compile take over the forward pass, for each batch size on its own; ``none`` does nothing."""
    if mode != "none":
        torch._dynamo.config.recompile_limit = 64  # all models share one entry point, and with it the limit
        model.compile(mode=mode, dynamic=False)


def synthetic_batch(batch_size: int, image_size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Images ``(B, 3, H, W)``, channels last, and classes ``(B,)``."""
    images = torch.randn(batch_size, 3, image_size, image_size, device=device)
    targets = torch.randint(CLASSES, (batch_size,), device=device)
    return images.contiguous(memory_format=torch.channels_last), targets
