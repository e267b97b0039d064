"""What a trained model sees of a photograph, what its tokens attend to, and which places speak for a class."""

from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from config import CLASSES, OBJECTS
from data.augmentation import DeviceStage, Plan, build_eval_transform
from data.augmentation.objects import build_object_eval_transform
from data.decoding import build_decoding, decode, pictures_of, read_file
from models.grad_cam import grad_cam
from tasks.trained import TrainedModel
from tasks.whole_image import build_whole_image
from utils.errors import UserError
from utils.files import reason_of


class Seen(NamedTuple):
    """An image as the model takes it, ``(3, H, W)``, and as a picture of that size."""

    image: Tensor
    picture: Image.Image


class Evidence(NamedTuple):
    """A class, its probability, and how much each place speaks for it, ``(h, w)`` from 0 to 1."""

    name: str
    probability: float
    places: Tensor


def see(trained: TrainedModel, path: Path) -> Seen:
    """Prepare an image file as for a prediction, on the CPU.

    Raises:
        UserError: it cannot be decoded.
    """
    config = trained.config
    try:
        pixels = decode(read_file(path), build_decoding(config))
    except Exception as error:  # decoders fail in arbitrary ways on arbitrary bytes
        raise UserError(f"image {path}: {reason_of(error)}; leave it out") from error
    stage = DeviceStage(torch.device("cpu"), config.DATA.MEAN, config.DATA.STD)
    if config.TASK == CLASSES:
        seen = stage(build_eval_transform(config)(pixels)[0][None], [Plan()])[0]
    elif config.TASK == OBJECTS:
        seen = stage(build_object_eval_transform(config)(pixels, torch.zeros(0, 4)).image[None], [Plan()])[0]
    else:
        view, _ = next(build_whole_image(config).views(stage(pixels[None], [Plan()])[0]))
        seen = view[0]
    return Seen(seen, pictures_of([seen], config.DATA.MEAN, config.DATA.STD)[0])


def explain(trained: TrainedModel, seen: Seen, numbers: list[int], top: int) -> list[Evidence]:
    """Compute Grad-CAM for the classes with these numbers, or if there are none for the ``top`` most probable ones.

    Raises:
        UserError: the model is no classifier of a kind that can be explained so.
    """
    with torch.no_grad():
        probabilities = trained.model(seen.image[None])[0].float().softmax(0)
    numbers = numbers or probabilities.topk(min(top, len(trained.classes))).indices.tolist()
    try:
        places = grad_cam(trained.model, seen.image.expand(len(numbers), -1, -1, -1).clone(), numbers)
    except ValueError as error:
        raise UserError(f"MODEL.NAME {trained.config.MODEL.NAME}: {error}; take another model") from error
    return [
        Evidence(trained.classes[i], float(probabilities[i]), map_) for i, map_ in zip(numbers, places, strict=True)
    ]
