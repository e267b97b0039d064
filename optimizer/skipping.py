"""Steps that leave everything as it is when a gradient is not finite, without the host looking at it."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer

from utils.compat import keep_where, skips_by_itself, tell_found_inf


def step_if(finite: Tensor, optimizer: Optimizer) -> None:
    """Let the optimizer step if ``finite`` (0-d, on the device) is true.

    Else weights and state stay as they are. Only what the host counts, as the steps of a bias correction, goes on where
    the host cannot know of it: on a GPU, with optimizers that cannot skip by themselves.

    The device is waited for by apex's optimizers, and once in a run, before there is any state.
    """
    if skips_by_itself(optimizer):
        tell_found_inf(optimizer, ~finite)
        optimizer.step()
    elif finite.device.type == "cpu" or _is_of_apex(optimizer) or not optimizer.state:
        if finite:
            optimizer.step()
    else:
        step_and_undo(finite, optimizer)


def step_and_undo(finite: Tensor, optimizer: Optimizer) -> None:
    """Step, and put everything back that lies on the device where ``finite`` is false."""
    live = dict(_on_device(optimizer, finite.device))
    before = [torch.empty_like(x) for x in live.values()]
    torch._foreach_copy_(before, list(live.values()))
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    keep_where(finite, gradients, None)  # lest NaN make more of it, or the optimizer fail
    optimizer.step()
    after = dict(_on_device(optimizer, finite.device))  # some put another tensor in place of one
    keep_where(finite, [after[key] for key in live], before)


def _on_device(optimizer: Optimizer, device: torch.device) -> Iterator[tuple[tuple[Tensor, str], Tensor]]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield (parameter, ""), parameter.detach()
            for name, value in optimizer.state[parameter].items() if parameter in optimizer.state else ():
                if isinstance(value, Tensor) and value.device == device:
                    yield (parameter, name), value


def _is_of_apex(optimizer: Optimizer) -> bool:
    return type(optimizer).__module__.partition(".")[0] == "apex"
