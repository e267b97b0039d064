"""Label maps of image files, as pictures and as files for programs."""

from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image

from data.augmentation import DeviceStage, Plan
from data.decoding import build_decoding, tensor_to_pil
from engine.photographs import check_pictures, names_below, read_images, save
from engine.precision import choose_precision
from tasks.overlay import label_file, overlay, painted, shares
from tasks.trained import TrainedModel
from tasks.whole_image import build_whole_image

KEYS = ("class_index", "class", "share")
"""What is told of a class in an image."""


def segment(
    trained: TrainedModel, paths: list[Path], device: torch.device, top: int, folder: Path | None
) -> Iterator[tuple[dict, Image.Image | None]]:
    """Yield what there is to say of each image, in order, and the image with its classes painted over.

    Args:
        trained: a segmenter.
        paths: image files.
        device: where the model is.
        top: so many classes of each image are told, those with the most pixels.
        folder: for ``overlays/`` and ``labels/``, with the paths of the images below their common folder.

    Raises:
        UserError: two images would become one file, or a file cannot be written.
    """
    config, classes = trained.config, trained.classes
    precision, whole, decoding = choose_precision(config, device), build_whole_image(config), build_decoding(config)
    stage = DeviceStage(device, config.DATA.MEAN, config.DATA.STD)
    if folder:
        check_pictures(paths)
    for name, (path, image) in zip(names_below(paths), read_images(paths, decoding), strict=True):
        if isinstance(image, str):
            yield {"file": str(path), "error": image}, None
            continue
        with torch.inference_mode(), precision.autocast():
            seen = stage(image[None], [Plan()])[0]
            labels = whole.classes(trained.model, seen, tuple(image.shape[1:])).byte().cpu().numpy()
        photograph, there = tensor_to_pil(image), shares(labels, classes)
        if folder:
            save(overlay(photograph, labels, classes), folder / "overlays" / name.with_suffix(".png"))
            first = int(config.DATA.ZERO_IS_VOID)
            save(label_file(labels, first, len(classes)), folder / "labels" / name.with_suffix(".png"))
        told = [dict(zip(KEYS, (i, name, float(f"{share:.6g}")), strict=True)) for i, name, share in there]
        yield {"file": str(path), "predictions": told[:top]}, painted(photograph, labels, classes)
