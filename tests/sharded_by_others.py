"""Trains a network five steps, divided among the processes as users of FSDP do it: ``... HOW RECOMPUTED FILE.json``.

``ddp`` is whole on each process, for comparison. Each process has images of its own.
"""

import json
import sys
from pathlib import Path

import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from models.crossformer.block import CrossFormerBlock

STEPS = 5


def divide(model: nn.Module, how: str) -> nn.Module:
    if how == "ddp":
        return DistributedDataParallel(model)
    if how == "fsdp1":
        blocks = ModuleWrapPolicy({CrossFormerBlock})
        return FullyShardedDataParallel(
            model, auto_wrap_policy=blocks, use_orig_params=True, device_id=torch.device("cpu")
        )
    for stage in model.layers:
        for block in stage.blocks if how in ("block", "block and stage") else ():
            fully_shard(block)
        if how == "blocks":
            fully_shard(stage.blocks)
        if how in ("stage", "block and stage"):
            fully_shard(stage)
    return fully_shard(model)


def train(model: nn.Module) -> list[tuple[float, float]]:
    """The loss of all processes and the norm of the gradient, of each step; then the answer to one image."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator, steps = torch.Generator().manual_seed(dist.get_rank()), []
    for _ in range(STEPS):
        images, labels = torch.randn(3, 3, 64, 96, generator=generator), torch.randint(5, (3,), generator=generator)
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        if isinstance(model, FullyShardedDataParallel):
            norm = model.clip_grad_norm_(1e9)
        else:
            norm = nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        steps.append((total.item() / dist.get_world_size(), norm.item()))
    with torch.no_grad():
        answer = model.eval()(torch.ones(1, 3, 64, 64))
    return [*steps, (answer.sum().item(), 0.0)]


if __name__ == "__main__":
    how, recomputed, file = sys.argv[1:]
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    network = timm.create_model("crossformer_micro", num_classes=5, amplitude_cooling=True, depths=(2, 4, 2, 2))
    if recomputed != "none":
        network.set_grad_checkpointing(True, selective=recomputed == "selective")
    found = train(divide(network, how))
    if dist.get_rank() == 0:
        Path(file).write_text(json.dumps(found))
    dist.destroy_process_group()
