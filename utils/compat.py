"""Every use of a part of a library that its makers may change without notice, for want of a public one.

Each function says what breaks when that part goes, and how it would show; ``tests/test_compat.py`` tries each of them.
Two are elsewhere: ``Tensor._version`` in ``models/crossformer``, which is used without this folder, and what tells the
operations of torch apart, which is all that ``utils/counting.py`` does.
"""

import sys
import tarfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def skips_by_itself(optimizer: Optimizer) -> bool:
    """Whether the optimizer's step does nothing when :func:`tell_found_inf` has told it so.

    Uses ``_step_supports_amp_scaling``, by which torch's loss scaler knows its fused optimizers. If that goes, this is
    False for all of them: the same weights, but the host waits for the device at every step.
    """
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def tell_found_inf(optimizer: Optimizer, found_inf: Tensor) -> None:
    """Let the next step do nothing if ``found_inf`` (0-d) is true, without the host looking at it.

    Uses the attributes ``found_inf`` and ``grad_scale`` of fused optimizers. If they go, a step whose gradients are not
    finite is taken: the loss is NaN from then on.
    """
    optimizer.found_inf = found_inf.float()  # type: ignore[attr-defined]
    optimizer.grad_scale = None  # type: ignore[attr-defined]  # they are unscaled already


def keep_where(chosen: Tensor, values: list[Tensor], others: list[Tensor] | None) -> None:
    """Put ``others``, or 0 where there are none, in place of ``values`` unless ``chosen`` (0-d) is true, bit by bit.

    It takes a few kernels, whatever the number of tensors. ``others`` are written over.

    Uses ``torch._foreach_mul_`` and the like. If they go, a step of an optimizer that cannot skip by itself ends on a
    GPU with an AttributeError.
    """
    by_size: dict[int, list[int]] = {}
    for number, value in enumerate(values):
        by_size.setdefault(value.element_size(), []).append(number)
    for size, numbers in by_size.items():
        # As whole numbers: a product with 0 or 1 is exact then, and there is no NaN
        kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
        kept = [values[number].view(kind) for number in numbers]
        torch._foreach_mul_(kept, chosen.to(kind))
        if others is not None:
            put_back = [others[number].view(kind) for number in numbers]
            torch._foreach_mul_(put_back, (~chosen).to(kind))
            torch._foreach_add_(kept, put_back)


def orthogonalise_in_single_precision() -> None:
    """Let timm's Muon compute in float32: on a CPU that has no bf16 a step takes a hundred times as long otherwise.

    Uses the defaults of ``timm.optim.muon.zeropower_via_newtonschulz``, which computes in bf16 unless told otherwise.
    If the function goes, building a Muon on a CPU ends with an AttributeError.
    """
    from timm.optim import muon

    function: Any = muon.zeropower_via_newtonschulz
    function.__defaults__ = tuple(torch.float32 if x is torch.bfloat16 else x for x in function.__defaults__)


def move_towards(averages: list[Tensor], values: list[Tensor], share: Tensor) -> None:
    """``averages += share * (values - averages)`` in a few kernels, whatever their number; ``share`` is 0-d.

    Uses ``torch._foreach_sub`` and the like. If they go, training with a moving average ends with an AttributeError.
    """
    difference = torch._foreach_sub(values, averages)
    torch._foreach_mul_(difference, share)
    torch._foreach_add_(averages, difference)


def is_compiled(model: nn.Module) -> bool:
    """Whether ``model.compile()`` has been called.

    Uses ``_compiled_call_impl``. If that goes, training and evaluation end with an AttributeError before they begin.
    """
    return model._compiled_call_impl is not None


def compile_ddp_whole() -> None:
    """Let torch.compile leave a model inside DistributedDataParallel in one piece, where it would cut it into buckets.

    Uses ``torch._dynamo.config``. If the setting goes, a compiled model that recomputes ends with an AttributeError.
    """
    torch._dynamo.config.optimize_ddp = False


def compile_many_models(limit: int = 64) -> None:
    """Let torch.compile keep so many graphs of one entry point; all models of a process share theirs.

    Uses ``torch._dynamo.config``. If the setting goes, a benchmark of compiled models ends with an AttributeError.
    """
    torch._dynamo.config.recompile_limit = limit


def timm_converter(model: nn.Module) -> Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] | None:
    """What renames the weights of a model's authors to timm's names; None where timm has no such thing.

    Uses the function ``checkpoint_filter_fn`` of the model's file. If it gets another name, weights that were not saved
    by timm do not fit the model any more: an error that names the first missing key.
    """
    return getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)


def replace_operations(policy: Callable, replacement: Callable[[str], Callable]) -> set[str]:
    """Let timm's RandAugment or AutoAugment call ``replacement(name)`` where it would carry out an operation.

    It is called with what is to be augmented, the operation's arguments, and keywords. Returns the operations' names.
    Uses the attributes ``ops`` and ``policy`` of the policies, and ``name`` and ``aug_fn`` of their operations. If one
    goes, augmentation on the device ends with an AttributeError; if ``aug_fn`` is no longer what is called, with an
    error in Pillow, which gets no image.

    Raises:
        TypeError: the policy does not consist of operations one after another (AugMix).
    """
    from timm.data.auto_augment import AutoAugment, RandAugment  # takes its time to load

    if isinstance(policy, RandAugment):
        operations = list(policy.ops)
    elif isinstance(policy, AutoAugment):
        operations = [operation for part in policy.policy for operation in part]
    else:
        raise TypeError(f"{type(policy).__name__} does not consist of operations")
    for operation in operations:
        operation.aug_fn = replacement(operation.name)
    return {operation.name for operation in operations}


def tar_number(field: bytes) -> int:
    """The number in a field of a tar file's header.

    Uses ``tarfile.nti``; to read the whole header would take 20 times as long. If it goes, reading an image from a tar
    file ends with an AttributeError.

    Raises:
        tarfile.HeaderError: there is none.
    """
    return tarfile.nti(field)  # type: ignore[attr-defined]


def forget_members(tar: tarfile.TarFile) -> None:
    """Let go of the members that have been read: tar files of millions of images would fill the memory.

    Uses ``members``; what does it in public is there from Python 3.13 on (``stream``). If it goes, reading takes about
    a kilobyte for each image.
    """
    tar.members = []  # type: ignore[attr-defined]


def end_of_member(tar: tarfile.TarFile) -> int:
    """Where the header of the next member begins, or at the end the mark.

    Uses ``offset``. If that goes, looking through a tar file ends with an AttributeError.
    """
    return tar.offset


def name_in_python_3(module: str, name: str) -> tuple[str, str]:
    """What a module and a name in it, written by Python 2 or for it, are called in Python 3.

    Uses the tables of ``_compat_pickle``. If they go, no checkpoint can be read; if they lose a name, files of torch
    that hold it are refused.
    """
    from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING

    return NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
