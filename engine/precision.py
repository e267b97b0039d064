"""The number format of the forward and backward pass, chosen once before any loop."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from utils.errors import UserError


@dataclass(frozen=True)
class Precision:
    """``autocast`` for the forward pass and ``scaler`` for the backward pass; both do nothing in single precision."""

    device: torch.device
    dtype: torch.dtype | None

    @property
    def name(self) -> str:
        return {torch.bfloat16: "bf16", torch.float16: "fp16", None: "fp32"}[self.dtype]

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def scaler(self) -> torch.amp.GradScaler:
        """Scales the loss so that small fp16 gradients survive, and skips a step whose gradients overflow."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)


def choose_precision(config, device: torch.device) -> Precision:
    """What ``config.AMP`` means on this device."""
    has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    match config.AMP:
        case "none":
            return Precision(device, None)
        case "bf16":
            if not has_bf16:
                raise UserError(
                    f"AMP bf16: {torch.cuda.get_device_name(device)} does not have it; use AMP fp16 or none"
                )
            return Precision(device, torch.bfloat16)
        case "fp16":
            return Precision(device, torch.float16)
    if device.type != "cuda":
        return Precision(device, None)
    return Precision(device, torch.bfloat16 if has_bf16 else torch.float16)
