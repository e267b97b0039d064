"""Augmentation: what is done to an image between decoding and the model.

A loader process crops and flips (``transforms``) and *draws* the rest as a plan (``policy``). The operations of a plan
are carried out on the device (``on_device``), or by the loader process itself, where there is no GPU: the same seed
gives the same operations either way. The device then normalises, erases, and mixes the images of a batch (``mixing``).
"""

from data.augmentation.mixing import build_mixing
from data.augmentation.on_device import DeviceStage, augments_on_device, build_train_stage
from data.augmentation.policy import Plan
from data.augmentation.transforms import build_eval_transform, build_train_transform

__all__ = [
    "DeviceStage",
    "Plan",
    "augments_on_device",
    "build_eval_transform",
    "build_mixing",
    "build_train_stage",
    "build_train_transform",
]
