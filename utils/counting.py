"""What a computation launches, and what it keeps for its backward pass: counted, so that no noise reaches it."""

import math
import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MADE_OF_OTHERS = torch._C.DispatchKey.CompositeImplicitAutograd
"""The key of the kernels of operations that call others and compute nothing themselves: those that run in eager mode.

(What ``OpOverload.decompose`` runs may be written anew in Python, and copy where the kernel does not.)
"""

NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "is_same_size"}
"""Operations of aten whose schema does not say that they compute nothing: they allocate, view or look."""


def count_kernels(run: Callable[[], object], device: torch.device) -> int:
    """Kernels that ``run`` launches: as the GPU's profiler sees them; on a CPU, operations that compute something.

    Of the latter, one that is a single kernel in eager mode counts once, whatever it does inside. What ``run`` does
    for the first time only (fill a cache, choose an algorithm) does not count.
    """
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            run()
            torch.cuda.synchronize(device)
        return sum(
            event.device_type == DeviceType.CUDA
            and not event.name.startswith(("Memcpy", "Memset"))
            and not getattr(event, "is_user_annotation", False)
            for event in profiler.events()
        )
    with _Counter() as counter:
        run()
    return counter.kernels


def moved_bytes(run: Callable[[], object]) -> int:
    """The most that the kernels of ``run`` read and write in eager mode: each of all that it is given and returns.

    In truth less where something is in a cache, or where only some of it is read (a gather) or none (a fill).
    """
    run()
    with _Counter() as counter:
        run()
    return counter.bytes


class _Counter(TorchDispatchMode):
    kernels = bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), MADE_OF_OTHERS):
            with self:  # in inference mode such operations arrive, as reshape, which is made of view and clone
                return func._op_dk(MADE_OF_OTHERS, *args, **kwargs)
        result = func(*args, **kwargs)
        if launches(func):
            self.kernels += 1
            self.bytes += sum(touched_bytes(t) for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor))
        return result


def launches(operation: torch._ops.OpOverload) -> bool:
    """Whether it computes something: not if all that it returns are views of what it was given, or no tensors."""
    schema = operation._schema
    tensors = [r for r in schema.returns if "Tensor" in str(r.type)]
    views = all(r.alias_info is not None and not r.alias_info.is_write for r in tensors)
    name = schema.name.partition("::")[2]
    return bool(tensors) and not views and operation.namespace != "prim" and name not in NO_KERNEL


def touched_bytes(tensor: Tensor) -> int:
    """Of its elements, those that stand for several (expanded) once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(sizes) * tensor.element_size()


def saved_bytes(run: Callable[[], object], parameters: Iterable[Tensor] = ()) -> int:
    """Bytes that ``run``, a forward pass, leaves in memory for the backward pass; each storage counts once.

    They are what autograd saves, and what is still alive of all that was computed: so nothing is missed that keeps
    tensors in a way of its own (recomputing does). ``parameters``, which are there anyway, do not count, nor do the
    tensors that ``run`` returns.
    """
    run()  # what is cached at the first time is not for the backward pass
    kept = _Kept()
    with warnings.catch_warnings(), torch.autograd.graph.saved_tensors_hooks(kept.save, lambda tensor: tensor), kept:
        # Selective recomputing passes such hooks by, today; either way its tensors are found
        warnings.filterwarnings("ignore", message="A saved_tensors_hooks context", category=FutureWarning)
        result = run()
    returned = {storage_key(t) for t in tree_leaves(result) if isinstance(t, Tensor)}
    there_anyway = {storage_key(p) for p in parameters}
    made = {key: size for key, (reference, size) in kept.made.items() if not reference.expired()}
    made = {key: size for key, size in made.items() if key not in returned}
    return sum(size for key, size in {**made, **kept.saved}.items() if key not in there_anyway)


class _Kept(TorchDispatchMode):
    """Every storage that is saved for the backward pass or made, and how many bytes it has."""

    def __init__(self) -> None:
        super().__init__()
        self.saved: dict[int, int] = {}
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def save(self, tensor: Tensor) -> Tensor:
        self.saved[storage_key(tensor)] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # a result that its own operation keeps would otherwise never be freed

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                reference = StorageWeakRef(tensor.untyped_storage())  # as long as it is held, no other has its key
                self.made[reference.cdata] = reference, tensor.untyped_storage().nbytes()
        return result


def storage_key(tensor: Tensor) -> int:
    """The same for tensors that share their memory."""
    return tensor.untyped_storage()._cdata
