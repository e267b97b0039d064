"""What differs when many devices train one model: wrapping, sharding, synchronising, the gradient's norm, its state."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from utils.distributed import AgreedError, is_main, processes_of_each_host, world_size
from utils.sync_batch_norm import synchronise_batch_norm

State = TypeVar("State")


class Sharding(NamedTuple):
    """How the weights, gradients and optimizer state of a model are divided among the ranks (FSDP2).

    Attributes:
        mesh: the ranks; with two dimensions the second shards, and the first has copies.
        dtype: of the weights that the ranks send each other for computing; None for their own.
    """

    mesh: DeviceMesh
    dtype: torch.dtype | None

    def apply(self, model: nn.Module) -> None:
        """Shard a model in place, unit by unit."""
        model.to(memory_format=torch.contiguous_format)  # FSDP2 takes no other weights
        policy = MixedPrecisionPolicy(
            param_dtype=self.dtype,
            reduce_dtype=torch.float32 if self.dtype else None,
            cast_forward_inputs=False,  # autocast decides
        )
        for module in model.modules():
            if isinstance(module, _BatchNorm) and self.dtype:  # its weights are to be of its statistics' kind
                fully_shard(module, mesh=self.mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
        for unit in sharding_units(model):
            fully_shard(unit, mesh=self.mesh, mp_policy=policy)
        fully_shard(model, mesh=self.mesh, mp_policy=policy)
        for module in model.modules():  # any of them may be loaded alone, as a backbone is
            module.register_load_state_dict_pre_hook(_shard_what_is_loaded)


def choose_sharding(how: str, device: torch.device, dtype: torch.dtype | None) -> Sharding | None:
    """Understand TRAIN.SHARD; None where every rank has the whole model.

    Raises:
        AgreedError: ``hybrid`` without several processes on each host.
    """
    if how == "none" or world_size() == 1:
        return None
    if how == "full":
        return Sharding(init_device_mesh(device.type, (world_size(),), mesh_dim_names=("shard",)), dtype)
    of_a_host = processes_of_each_host()
    if of_a_host is None or of_a_host in (1, world_size()):
        raise AgreedError(
            "TRAIN.SHARD hybrid shards within each host and copies between them: it takes several hosts with as many "
            "processes each, more than one, whose ranks follow each other; use full or none"
        )
    shape = world_size() // of_a_host, of_a_host
    return Sharding(init_device_mesh(device.type, shape, mesh_dim_names=("copies", "shard")), dtype)


def sharding_units(model: nn.Module) -> list[nn.Module]:
    """Find the parts of a model whose weights are gathered and freed together: the members of its lists of blocks.

    A list that computes as a whole, as CrossFormer's stages do, is one.
    """
    children = list(model.children())
    if isinstance(model, nn.ModuleList) and type(model).forward is not nn.ModuleList.forward:
        return [model]
    within = [unit for child in children for unit in sharding_units(child)]
    is_list = isinstance(model, nn.ModuleList | nn.Sequential) and len({type(child) for child in children}) == 1
    if is_list and len(children) > 1 and not within:
        return [child for child in children if any(True for _ in child.children())]  # not single layers
    return within


def wrap(
    model: nn.Module,
    device: torch.device,
    sync_batch_norm: bool = False,
    sharding: Sharding | None = None,
    compress: str = "none",
) -> nn.Module:
    """Let several processes train ``model`` as one; in a single process it stays as it is.

    To be called before the optimizer is built, which takes the wrapped model's parameters.

    Args:
        sync_batch_norm: whether BatchNorm normalises over the batches of all processes.
        sharding: divides the model among them, in place.
        compress: ``bf16`` or ``fp16``, in which gradients are summed; ``none`` sums them as they are.
    """
    if world_size() == 1:
        return model
    if sync_batch_norm:
        synchronise_batch_norm(model, device)
    if sharding:
        sharding.apply(model)
        return model
    wrapped = DistributedDataParallel(
        model, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )
    if compress != "none":
        hooks = {"bf16": default_hooks.bf16_compress_hook, "fp16": default_hooks.fp16_compress_hook}
        wrapped.register_comm_hook(None, hooks[compress])
    return wrapped


def unwrap(model: nn.Module) -> nn.Module:
    """Give the model itself, whose names are those of checkpoints."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def sync(model: nn.Module, on: bool) -> AbstractContextManager:
    """Let the backward pass in this block average the gradients over the ranks, or leave that to a later one."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(on)
        return nullcontext()
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not on else nullcontext()


def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients down to ``max_norm``; returns their norm before, 0-d on the device."""
    parameters = list(parameters)
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()  # of all ranks
    clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def local(tensor: Tensor) -> Tensor:
    """Give this rank's share of a tensor, which shares its memory; all of one that is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_sharded(model: nn.Module) -> bool:
    """Tell whether a rank has only a share of the model."""
    return isinstance(model, FSDPModule)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Give each rank all weights of a sharded model in this block, for ranks that compute different amounts."""
    if not isinstance(model, FSDPModule):
        yield
        return
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)]
    model.set_reshard_after_forward(False)
    for module in shards:
        module.unshard()
    try:
        yield
    finally:
        for module in shards:
            module.reshard()
        model.set_reshard_after_forward(True)
        model.set_reshard_after_forward(False, recurse=False)  # as FSDP2 chooses for the outermost module


def whole(state: State) -> State:
    """Put together the tensors of a state (of any nesting) on rank 0, in its memory. A collective if any is sharded.

    Without sharding the state stays as it is. The other ranks get one without the sharded tensors.
    """
    if not any(isinstance(leaf, DTensor) for leaf in tree_leaves(state)):
        return state

    def gather(leaf: Any) -> Any:
        if not isinstance(leaf, DTensor):
            return leaf
        full = leaf.full_tensor()
        return full.cpu() if is_main() else None

    return tree_map(gather, state)


def load_whole(optimizer: Optimizer) -> None:
    """Let ``optimizer.load_state_dict()`` take the whole state, of which each rank keeps its share."""
    optimizer.register_load_state_dict_pre_hook(_shard_state_that_is_loaded)


def _shard_like(value: Tensor, like: Any) -> Tensor:
    """Give this rank's share of a tensor that all ranks have."""
    if not isinstance(like, DTensor) or value.shape != like.shape or isinstance(value, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _shard_what_is_loaded(model: nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
    for name, parameter in model.named_parameters(recurse=False):
        if prefix + name in state:
            state[prefix + name] = _shard_like(state[prefix + name], parameter)


def _shard_state_that_is_loaded(optimizer: Optimizer, content: dict[str, Any]) -> dict[str, Any]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [number for group in content["param_groups"] for number in group["params"]]
    sharded = {}
    for number, parameter in zip(numbers, parameters, strict=True):
        state = content["state"].get(number)
        if state is not None:
            sharded[number] = {
                name: _shard_like(v, parameter) if isinstance(v, Tensor) else v for name, v in state.items()
            }
    return {**content, "state": sharded}
