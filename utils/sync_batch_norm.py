"""BatchNorm over the batches of all processes, where torch has none: on CPUs."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.distributed import AgreedError


class SumOverRanks(torch.autograd.Function):
    """Sum a tensor over all processes; its gradient is summed as well."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return SumOverRanks.forward(ctx, gradient)


class HostSyncBatchNorm(nn.BatchNorm2d):
    """``nn.SyncBatchNorm`` for tensors on the host: mean and variance are those of all processes' batches."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(self, x: Tensor) -> Tensor:
        """Normalise maps ``(B, C, H, W)``. A collective in training mode."""
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        axes, numbers = (0, 2, 3), x.numel() / x.shape[1]
        wide = x.double() if x.dtype == torch.float64 else x.float()
        sums = torch.cat([wide.sum(axes), wide.new_tensor([numbers])])
        sums = SumOverRanks.apply(sums)
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centred = wide - mean[:, None, None]
        variance = SumOverRanks.apply(centred.square().sum(axes)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var), self.momentum)
        scaled = centred * (variance + self.eps).rsqrt()[:, None, None]
        return (scaled * self.weight[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def synchronise_batch_norm(model: nn.Module, device: torch.device) -> None:
    """Let every BatchNorm in a model normalise over the batches of all processes; its weights and keys stay.

    Raises:
        AgreedError: the model has a kind of BatchNorm that cannot, on a CPU.
    """
    if device.type == "cuda":
        from timm.layers import (
            convert_sync_batchnorm,
        )  # knows BatchNorm with an activation in it; takes its time to load

        convert_sync_batchnorm(model)
        return
    for name, module in model.named_modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = HostSyncBatchNorm
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            raise AgreedError(
                f"TRAIN.SYNC_BN: on a CPU {type(module).__name__} ({name}) cannot normalise over several processes; "
                "set TRAIN.SYNC_BN False"
            )
