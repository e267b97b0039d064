"""The number format of the forward and backward pass, chosen once before any loop."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from config import Config
from utils.errors import UserError

TF32_SINCE = (8, 0)
"""The compute capability of Ampere, the first generation that has it."""


@dataclass(frozen=True)
class Precision:
    """``autocast`` for the forward pass and ``scaler`` for the backward pass; both do nothing in single precision.

    Args:
        device: where it is used.
        dtype: of autocast; None for single precision.
        tf32: whether products that stay in single precision are rounded to 10 bits for CUDA's matrix units.
    """

    device: torch.device
    dtype: torch.dtype | None
    tf32: bool

    @property
    def name(self) -> str:
        return {torch.bfloat16: "bf16", torch.float16: "fp16", None: "tf32" if self.tf32 else "fp32"}[self.dtype]

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def scaler(self) -> torch.amp.GradScaler:
        """Scales the loss so that small fp16 gradients survive, and skips a step whose gradients overflow."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)


def choose_precision(config: Config, device: torch.device) -> Precision:
    """What ``config.AMP`` means on this device; tells torch whether it may use TF32 there."""
    precision = _precision(config, device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if precision.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = precision.tf32
    return precision


def _precision(config: Config, device: torch.device) -> Precision:
    on_gpu = device.type == "cuda"
    has_bf16 = not on_gpu or torch.cuda.is_bf16_supported(including_emulation=False)
    match config.AMP:
        case "none":
            return Precision(device, None, tf32=False)
        case "tf32":
            if not on_gpu:
                raise UserError(f"AMP tf32: the device is {device.type}, which does not have it; use AMP bf16 or none")
            if torch.cuda.get_device_capability(device) < TF32_SINCE:
                raise UserError(
                    f"AMP tf32: {torch.cuda.get_device_name(device)} does not have it; use AMP fp16 or none"
                )
            return Precision(device, None, tf32=True)
        case "bf16":
            if not has_bf16:
                raise UserError(
                    f"AMP bf16: {torch.cuda.get_device_name(device)} does not have it; use AMP fp16 or none"
                )
            return Precision(device, torch.bfloat16, tf32=on_gpu)
        case "fp16":
            return Precision(device, torch.float16, tf32=on_gpu)
    if not on_gpu:
        return Precision(device, None, tf32=False)
    return Precision(device, torch.bfloat16 if has_bf16 else torch.float16, tf32=True)
