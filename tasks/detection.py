"""Object detection and instance segmentation: the boxes, classes and pixels of objects. The best weights are those with
the highest average precision of boxes."""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from config import Config
from data.augmentation import DeviceStage
from data.augmentation.objects import build_object_eval_transform, build_object_transform
from data.build import (
    build_eval_loader,
    build_train_loader,
    check_masks,
    check_num_classes,
    keep_in_memory,
    open_objects,
    orientations,
    wants_masks,
)
from data.coco import ObjectIndex
from data.decoding import build_decoding
from data.loading import Batch, EvalLoader
from data.objects import DecodeObjects, DecodeWhole
from models import Detector, build_detector, load_detector
from tasks import Loaders
from tasks.average_precision import KINDS, Result, evaluate_results, read_truth, to_results, twelve
from tasks.class_names import check_classes
from tasks.object_album import ObjectAlbum
from tasks.object_report import write_report
from tasks.objects import Ask, find_objects, pad_together, unpack_masks
from utils import checkpoint
from utils.distributed import from_main, gathered_on_main
from utils.errors import UserError
from utils.image_size import height_and_width

CLASSES_WITHOUT_DATA = 80
NO_MASKS = "{file} has no masks, so their average precision is not told"
SYNTHETIC_OBJECTS = 8
"""In each image of a synthetic batch."""


class Detection:
    """Learns to find objects; see :class:`tasks.Task`.

    Attributes:
        classes: their names, once data is open.
        masks: whether their pixels are found too.
    """

    best_is, best_title = "box_ap", "box AP"
    teacher = None

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        self.classes: list[str] = []
        self.masks = wants_masks(config)
        self._val: ObjectIndex | None = None

    def model(self) -> nn.Module:
        return build_detector(self.config, self._num_classes(), self.masks)

    def _num_classes(self) -> int:
        return len(self.classes) or self.config.MODEL.NUM_CLASSES or CLASSES_WITHOUT_DATA

    # ---- data

    def train_loaders(self) -> Loaders:
        config = self.config
        train, val, self.classes = open_objects(config, training=True)
        assert train is not None
        check_num_classes(config, self.classes)
        keep_in_memory(config, train, val)
        boxes_only = self.masks and not train.has_masks
        self.masks = self.masks and train.has_masks
        check_masks(self.masks, val)
        sample = DecodeObjects(build_decoding(config), build_object_transform(config), self.masks)
        loader = build_train_loader(config, train, sample, None, self._stage(), orientations(config, train))
        described = f"{len(train):,} images with {int(train.counts.sum()):,} objects of {len(self.classes):,} classes"
        described += f"; {NO_MASKS.format(file=val.annotation_file)}" if self.masks and not val.has_masks else ""
        described += f"; {train.annotation_file.name} has no masks, so boxes alone are learned" if boxes_only else ""
        return Loaders(loader, self._eval_loader(val), described)

    def eval_loader(
        self, content: dict[str, Any], weights: dict[str, Tensor], path: str
    ) -> tuple[EvalLoader, list[str]]:
        config = self.config
        _, val, self.classes = open_objects(config, training=False)
        check_num_classes(config, self.classes)
        keep_in_memory(config, val)
        self.check(content, path)
        self.masks = self.masks and any("mask_predictor." in key for key in weights)
        check_masks(self.masks, val)
        lines = [NO_MASKS.format(file=val.annotation_file)] if self.masks and not val.has_masks else []
        return self._eval_loader(val), lines

    def _eval_loader(self, index: ObjectIndex) -> EvalLoader:
        self._val = index
        sample = DecodeWhole(build_decoding(self.config), build_object_eval_transform(self.config))
        return build_eval_loader(self.config, index, sample, None, self._stage())

    def _stage(self) -> DeviceStage:
        return DeviceStage(self.device, self.config.DATA.MEAN, self.config.DATA.STD)

    def synthetic_batch(self, count: int) -> Batch:
        height, width = height_and_width(self.config.DATA.IMG_SIZE)
        corners = torch.rand(count, SYNTHETIC_OBJECTS, 4, device=self.device)
        corners = torch.cat([corners[..., :2] * 0.5, 0.5 + corners[..., 2:] * 0.5], dim=-1)
        boxes = corners * corners.new_tensor([width, height, width, height])
        labels = torch.randint(self._num_classes(), (count, SYNTHETIC_OBJECTS), device=self.device)
        filled = torch.full((SYNTHETIC_OBJECTS, height, -(-width // 8)), 255, dtype=torch.uint8, device=self.device)
        targets = [{"boxes": one, "labels": two, "masks": filled} for one, two in zip(boxes, labels, strict=True)]
        images = list(torch.randn(count, 3, height, width, device=self.device))
        return Batch(images, targets, torch.arange(count))

    # ---- training

    def prepare(self, batch: Batch) -> Batch:
        """Pad the images together and unpack the masks."""
        images = pad_together(cast(list[Tensor], batch.images), self.config.TEST.MULTIPLE)
        targets = []
        for image, target in zip(batch.images, cast(list[dict[str, Any]], batch.targets), strict=True):
            size = image.shape[1], image.shape[2]
            known = {"boxes": target["boxes"], "labels": target["labels"], "size": size}
            if self.masks:
                known["masks"] = unpack_masks(target["masks"], size[1], images.shape[2], images.shape[3])
            targets.append(known)
        return Batch(images, targets, batch.numbers)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of what the heads tell, and these terms."""
        targets = cast(list[dict[str, Any]], batch.targets)
        terms = model(batch.images, [target["size"] for target in targets], targets)
        return torch.stack([*terms.values()]).sum(), terms

    # ---- evaluation

    def evaluator(self, report: bool = False) -> "AveragePrecision":
        assert self._val is not None
        data = self.config.DATA
        album = ObjectAlbum(self._val, data.MEAN, data.STD, self.classes, report)
        return AveragePrecision(self._val, self.masks, self.config.TEST.MULTIPLE, album)

    # ---- checkpoints

    def facts(self) -> dict[str, Any]:
        ids = {} if self._val is None else {"category_ids": self._val.category_ids.tolist()}
        return {"classes": self.classes, **ids}

    def check(self, content: dict[str, Any], path: str) -> None:
        check_classes(content, self.classes, path)

    def start_from(self, model: nn.Module, content: dict[str, Any], path: str) -> list[str]:
        which, weights = checkpoint.choose(checkpoint.weights_in(content, path), self.config.MODEL.WEIGHTS, path)
        average = ", of the moving average in it" if which == "ema" else ""
        line, *notes = load_detector(cast(Detector, model), weights, path)
        return [f"starting from {path}{average}: {line}", *notes]


class AveragePrecision:
    """COCO's twelve numbers in percent, of boxes and perhaps of masks: see :class:`tasks.Evaluator`.

    Args:
        index: of the images.
        masks: whether they are found.
        multiple: that sides of images are padded to.
        album: of pictures.
    """

    def __init__(self, index: ObjectIndex, masks: bool, multiple: int, album: ObjectAlbum):
        self.index, self.multiple, self.album = index, multiple, album
        self.kinds = [kind for kind in KINDS if kind == "bbox" or (masks and index.has_masks)]
        self.category_ids: list[int] = index.category_ids.tolist()
        self.found: dict[int, list[Result]] = {}
        self.all_found: list[Result] = []
        self.image_ids: list[int] = []

    def add(self, model: Ask, batch: Batch) -> None:
        targets = cast(list[dict[str, Tensor]], batch.targets)
        for number, image, target in zip(batch.numbers.tolist(), batch.images, targets, strict=True):
            height, width = target["original_size"].tolist()
            found = find_objects(model, image, (height, width), self.multiple, masks="segm" in self.kinds)
            self.album.add(number, image, found)
            image_id = int(target["image_id"])
            self.found[image_id] = to_results(image_id, found._asdict(), self.category_ids, found.masks)

    def result(self) -> dict[str, float]:
        everyones = gathered_on_main(self.found)
        result: dict[str, float] = {}
        if everyones is not None:
            of_images = dict(sorted(pair for found in everyones for pair in found.items()))
            self.image_ids = [*of_images]
            self.all_found = [one for found in of_images.values() for one in found]
            truth = read_truth(self.index.annotation_file)
            for kind in self.kinds:
                result |= twelve(evaluate_results(truth, self.all_found, of_images, kind), kind)
            result["images"] = len(of_images)
        result = from_main(result)
        if "box_ap" not in result:
            raise UserError(f"{self.index.annotation_file} has no object to find in the images that were evaluated")
        return result

    def describe(self, result: dict[str, float]) -> str:
        said = []
        for kind in ("box", "mask"):
            if f"{kind}_ap" in result:
                of_kind = [f"{result[f'{kind}_{name}']:.2f}" for name in ("ap", "ap50", "ap75")]
                said.append(f"{kind} AP {of_kind[0]} (50: {of_kind[1]}, 75: {of_kind[2]})")
        return f"{'  '.join(said)}  {int(result['images']):,} images"

    def pictures(self) -> dict[str, bytes]:
        return {"images": self.album.sheet()} if self.album.first else {}

    def write(self, folder: Path) -> str:
        return write_report(folder, self.index, self.all_found, self.kinds, self.image_ids, self.album)
