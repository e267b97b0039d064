"""A model on its device, ready for a loop."""

import copy

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from models import build_model
from utils.distributed import world_size
from utils.errors import UserError
from utils.randomness import seed_everything


def prepare_model(config, num_classes: int, device: torch.device) -> nn.Module:
    """The configured model with its initial weights, which depend on the seed alone."""
    seed_everything(device, config.SEED, "weights")
    model = build_model(config, num_classes)
    if config.TRAIN.FREEZE_TRUNK:
        freeze_trunk(model)
    return model.to(device, memory_format=torch.channels_last)


def freeze_trunk(model: nn.Module) -> None:
    """Let the head alone be trained."""
    model.requires_grad_(False)
    heads = model.get_classifier()
    for head in heads if isinstance(heads, tuple) else (heads,):
        head.requires_grad_(True)


def set_training_mode(model: nn.Module) -> None:
    """``model.train()``; modules of which nothing is trained compute as in evaluation."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()


def compile_in_place(config, model: nn.Module) -> None:
    """Let torch.compile take over the model's forward (``TRAIN.COMPILE``); its state-dict keys stay.

    It is compiled for one size of batch in training and one in evaluation, so both must keep to it.
    """
    if config.TRAIN.COMPILE != "none":
        if config.TRAIN.USE_CHECKPOINT != "none":
            torch._dynamo.config.optimize_ddp = False  # not every torch can split recomputed blocks for DDP
        model.compile(mode=config.TRAIN.COMPILE, dynamic=False)


def is_compiled(model: nn.Module) -> bool:
    """Whether :func:`compile_in_place` has been there; every new size of batch then costs minutes."""
    return model._compiled_call_impl is not None


def begin_step(model: nn.Module) -> None:
    """Let the CUDA graphs of a compiled model write over what they returned in the step before."""
    if is_compiled(model):  # else it would load the compiler for nothing
        torch.compiler.cudagraph_mark_step_begin()


def share_gradients(model: nn.Module, device: torch.device) -> nn.Module:
    """The model as each of several processes trains it; the model itself in a single process."""
    if world_size() == 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )


@torch.no_grad()
def giga_macs(model: nn.Module, image_size: int, device: torch.device) -> float:
    """Multiply-accumulates of one forward pass of one image, in units of 1e9.

    Raises:
        UserError: the model does not take images of this size.
    """
    was_training = model.training
    model.eval()
    try:
        # Attention as two matrix products: of a kernel that does both, not every torch counts them
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, image_size, image_size, device=device))
    except torch.OutOfMemoryError:
        raise
    except (ValueError, AssertionError, RuntimeError) as error:
        raise UserError(f"DATA.IMG_SIZE {image_size}: the model does not take it: {error}") from error
    finally:
        model.train(was_training)
    return counter.get_total_flops() / 2e9


@torch.no_grad()
def training_giga_macs(model: nn.Module, image_size: int, batch_size: int) -> float:
    """What training's forward pass takes of a batch for one image, in units of 1e9.

    A CrossFormer does not compute what stochastic depth drops. Counted on a copy without data.
    """
    twin = copy.deepcopy(model).to("meta").train()
    with FlopCounterMode(display=False) as counter:
        twin(torch.zeros(batch_size, 3, image_size, image_size, device="meta"))
    return counter.get_total_flops() / 2e9 / batch_size
