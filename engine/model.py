"""A model on its device, ready for a loop."""

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, cast

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from config import Config
from engine.precision import Precision
from utils.compat import compile_ddp_whole, is_compiled
from utils.distributed import world_size
from utils.errors import UserError
from utils.image_size import describe_size, height_and_width
from utils.parallel import unwrap
from utils.randomness import seed_everything


def prepare_model(config: Config, build: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """The model that a task builds with its initial weights, which depend on the seed alone, on the device."""
    seed_everything(device, config.SEED, "weights")
    model = build()
    if config.TRAIN.FREEZE_TRUNK:
        freeze_trunk(model)
    return model.to(device).to(memory_format=torch.channels_last)


def freeze_trunk(model: nn.Module) -> None:
    """Let the head alone be trained."""
    model.requires_grad_(False)
    heads = cast(Any, model).get_classifier()
    for head in heads if isinstance(heads, tuple) else (heads,):
        head.requires_grad_(True)


def set_training_mode(model: nn.Module) -> None:
    """``model.train()``; modules of which nothing is trained compute as in evaluation."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()


def compile_in_place(config: Config, model: nn.Module) -> None:
    """Let torch.compile take over the model's forward (``TRAIN.COMPILE``); its state-dict keys stay.

    It is compiled for one size of batch in training and one in evaluation, so both must keep to it.
    """
    if config.TRAIN.COMPILE != "none":
        if config.TRAIN.USE_CHECKPOINT != "none":
            compile_ddp_whole()  # not every torch can split recomputed blocks for DDP
        model.compile(mode=config.TRAIN.COMPILE, dynamic=False)


def begin_step(model: nn.Module) -> None:
    """Let the CUDA graphs of a compiled model write over what they returned in the step before."""
    if is_compiled(unwrap(model)):  # else it would load the compiler for nothing
        torch.compiler.cudagraph_mark_step_begin()


@torch.no_grad()
def check_image_size(model: nn.Module, image_size: int | Sequence[int], device: torch.device) -> None:
    """Find out with an empty image whether the model takes images of this size.

    Raises:
        UserError: it does not.
    """
    was_training = model.training
    model.eval()

    def failure(size: Sequence[int]) -> Exception | None:
        try:
            model(torch.zeros(1, 3, *size, device=device))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # models say it in arbitrary ways
            return error
        return None

    try:
        error = failure(height_and_width(image_size))
        if error is None:
            return
        cfg: Any = model.pretrained_cfg
        own, shown = cfg["input_size"][1:], describe_size(image_size)
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        refused = f"DATA.IMG_SIZE {shown}: the model does not take it: {reason}"
        if failure(own) is not None:  # it was built for another size still
            raise UserError(refused) from error
        raise UserError(
            f"{refused}; it takes {describe_size(own)}"
            f"{_another_size(image_size) if cfg.get('fixed_input_size') else ''}"
        ) from error
    finally:
        model.train(was_training)


def _another_size(image_size: int | Sequence[int]) -> str:
    return f", or this with --opts MODEL.KWARGS '{{img_size: {image_size}}}' where it is a vision transformer"


def giga_macs(model: nn.Module, image_size: int | Sequence[int], device: torch.device) -> float:
    """Multiply-accumulates of one forward pass of one image, in units of 1e9; NaN when they cannot be counted.

    Raises:
        UserError: the model does not take images of this size.
    """
    check_image_size(model, image_size, device)
    with suppress(Exception):  # what cannot be counted can be computed, as has been seen
        return _count(copy.deepcopy(model).to("meta").eval(), 1, image_size)
    return float("nan")


def training_giga_macs(model: nn.Module, image_size: int | Sequence[int], batch_size: int) -> float:
    """What training's forward pass takes of a batch for one image, in units of 1e9; NaN when it cannot be counted.

    A CrossFormer does not compute what stochastic depth drops.
    """
    with suppress(Exception):
        return _count(copy.deepcopy(model).to("meta").train(), batch_size, image_size)
    return float("nan")


def _count(twin: nn.Module, batch_size: int, image_size: int | Sequence[int]) -> float:
    """Giga-MACs for each image, counted on a ``twin`` of the model that has no data and none of its gradients.

    torch's counter asks for the gradient function of every tensor that wants a gradient and enters a module, and a
    parameter, as a class token is, has none.
    """
    # Attention as two matrix products: of a kernel that does both, not every torch counts them
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        twin.requires_grad_(False)(torch.zeros(batch_size, 3, *height_and_width(image_size), device="meta"))
    return counter.get_total_flops() / 2e9 / batch_size


def describe_model(config: Config, model: nn.Module, gmac: float, precision: Precision) -> str:
    """For the first line of a run: the model, what it costs, and on what it is trained."""
    device = precision.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    parameters = sum(p.numel() for p in model.parameters())
    return (
        f"{config.MODEL.NAME}  {parameters / 1e6:.1f} M parameters  {describe_gmac(gmac, config.DATA.IMG_SIZE)}  "
        f"{precision.name}  {world_size()} x {name}"
    )


def describe_gmac(gmac: float, image_size: int | Sequence[int]) -> str:
    """For a person."""
    return f"{'unknown' if math.isnan(gmac) else f'{gmac:.3g}'} GMAC at {describe_size(image_size)}"


def check_smallest_batch(config: Config, model: nn.Module, images: int) -> None:
    """Find out whether the model can be trained on batches of so many ``images``, without computing anything.

    Raises:
        UserError: it normalises over the batch (BatchNorm), which takes more than one.
    """
    if images > 1:
        return

    def trains_on(count: int) -> bool:
        try:
            twin(torch.zeros(count, 3, *height_and_width(config.DATA.IMG_SIZE), device="meta"))
        except Exception:
            return False
        return True

    twin = copy.deepcopy(model).to("meta")
    set_training_mode(twin)
    if not trains_on(1) and trains_on(2):
        raise UserError(
            f"MODEL.NAME {config.MODEL.NAME} normalises over the batch (BatchNorm) and cannot be trained on one image "
            "at a time: use --batch-size 2 or more"
        )
