"""Semantic segmentation: a class for each pixel. The mean IoU decides which weights are the best."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config
from data.augmentation import DeviceStage, Plan
from data.augmentation.pairs import VOID, PairTransform, build_pair_transform
from data.build import build_eval_loader, build_train_loader, check_num_classes, keep_in_memory, open_pairs
from data.dataset import Sample
from data.decoding import BadImage, Decoding, build_decoding, decode_with_orientation
from data.loading import Batch, EvalLoader
from data.pairs import LabelMaps, decode_labels
from models import Segmenter, build_segmenter, load_segmenter
from models.heads.layers import resize
from tasks import Loaders
from tasks.class_names import check_classes
from tasks.miou import confusion_matrix, scores, zeros
from tasks.pixel_report import Album, write_report
from tasks.whole_image import Ask, WholeImage, build_whole_image
from utils import checkpoint
from utils.distributed import sum_over_ranks
from utils.errors import UserError
from utils.image_size import height_and_width

CLASSES_WITHOUT_DATA = 150


@dataclass
class DecodePair:
    """Makes samples of images and their label maps.

    Args:
        table: ``(256,)`` uint8 from the numbers in a file to those of classes, or VOID.
        decoding: how pixels are made of an image.
        transform: what training does to both; None leaves them at their size.
    """

    table: np.ndarray
    decoding: Decoding
    transform: PairTransform | None = None

    def __call__(self, raw: tuple[bytes, bytes], look: bool) -> Sample:
        """Make a sample whose target is the label map, ``(H, W)`` uint8.

        Raises:
            BadImage: the image or its label map cannot be decoded, or they differ in size.
        """
        image, orientation = decode_with_orientation(raw[0], self.decoding, look)
        labels = torch.from_numpy(self.table[decode_labels(raw[1])])
        if image.shape[1:] != labels.shape:
            raise BadImage(f"its label map is {tuple(labels.shape)}, the image {tuple(image.shape[1:])}")
        if self.transform is None:
            return Sample(image, labels, Plan(), orientation)
        return Sample(*self.transform(image, labels), orientation)


class Segmentation:
    """Learns the class of each pixel; see :class:`tasks.Task`.

    Attributes:
        classes: their names, once data is open.
    """

    best_is, best_title = "miou", "mIoU"
    teacher = None

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        self.classes: list[str] = []
        self._names: Callable[[int], str] = str

    def model(self) -> nn.Module:
        return build_segmenter(self.config, self._num_classes())

    def _num_classes(self) -> int:
        return len(self.classes) or self.config.MODEL.NUM_CLASSES or CLASSES_WITHOUT_DATA

    # ---- data

    def train_loaders(self) -> Loaders:
        config = self.config
        train, val, self.classes = open_pairs(config, training=True)
        assert train is not None
        check_num_classes(config, self.classes)
        keep_in_memory(config, train, val)
        tables = {
            name: label_table(config, index, len(self.classes)) for name, index in (("train", train), ("val", val))
        }
        sample = DecodePair(tables["train"], build_decoding(config), build_pair_transform(config))
        size = height_and_width(config.DATA.IMG_SIZE)
        loader = build_train_loader(config, train, sample, size, self._stage())
        missing = never_occurring(config, train, tables["train"], self.classes)
        described = f"{len(train):,} images of {len(self.classes):,} classes{missing}"
        return Loaders(loader, self._eval_loader(val, tables["val"]), described)

    def eval_loader(
        self, content: dict[str, Any], weights: dict[str, Tensor], path: str
    ) -> tuple[EvalLoader, list[str]]:
        config = self.config
        _, val, self.classes = open_pairs(config, training=False)
        check_num_classes(config, self.classes)
        keep_in_memory(config, val)
        self.check(content, path)
        return self._eval_loader(val, label_table(config, val, len(self.classes))), []

    def _eval_loader(self, index: LabelMaps, table: np.ndarray) -> EvalLoader:
        sample, self._names = DecodePair(table, build_decoding(self.config)), index.name
        return build_eval_loader(self.config, index, sample, None, self._stage())

    def _stage(self) -> DeviceStage:
        return DeviceStage(self.device, self.config.DATA.MEAN, self.config.DATA.STD)

    def synthetic_batch(self, count: int) -> Batch:
        size = height_and_width(self.config.DATA.IMG_SIZE)
        images = torch.randn(count, 3, *size, device=self.device).contiguous(memory_format=torch.channels_last)
        labels = torch.randint(self._num_classes(), (count, *size), device=self.device).to(torch.uint8)
        return Batch(images, labels, torch.arange(count))

    # ---- training

    def prepare(self, batch: Batch) -> Batch:
        return batch

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross entropy of each head, averaged over all pixels, those that are void included."""
        weights = {"decode": 1.0, "aux": self.config.MODEL.AUX_WEIGHT}
        targets = cast(Tensor, batch.targets)
        terms = {name: weights[name] * cross_entropy(logits, targets) for name, logits in model(batch.images).items()}
        return torch.stack([*terms.values()]).sum(), terms

    # ---- evaluation

    def evaluator(self, report: bool = False) -> "MeanIoU":
        data = self.config.DATA
        album = Album(data.MEAN, data.STD, self.classes, report)
        return MeanIoU(self.classes, self.device, build_whole_image(self.config), album, self._names)

    # ---- checkpoints

    def facts(self) -> dict[str, Any]:
        return {"classes": self.classes}

    def check(self, content: dict[str, Any], path: str) -> None:
        check_classes(content, self.classes, path)

    def start_from(self, model: nn.Module, content: dict[str, Any], path: str) -> list[str]:
        which, weights = checkpoint.choose(checkpoint.weights_in(content, path), self.config.MODEL.WEIGHTS, path)
        average = ", of the moving average in it" if which == "ema" else ""
        line, *notes = load_segmenter(cast(Segmenter, model), weights, path)
        return [f"starting from {path}{average}: {line}", *notes]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Average over all pixels, void ones (0 each) in the denominator, as published.

    Args:
        logits: ``(B, classes, h, w)``, resized to the labels.
        labels: ``(B, H, W)`` uint8.
    """
    logits = resize(logits, tuple(labels.shape[1:]))
    return F.cross_entropy(logits, labels.long(), ignore_index=VOID, reduction="sum") / labels.numel()


class MeanIoU:
    """Mean IoU, mean and pixel accuracy in percent, at the size of each label map: see :class:`tasks.Evaluator`.

    Args:
        classes: their names.
        device: where the answers are.
        whole: how the model sees an image.
        album: of pictures.
        name: of an image by its number.
    """

    def __init__(
        self,
        classes: list[str],
        device: torch.device,
        whole: WholeImage,
        album: Album,
        name: Callable[[int], str] = str,
    ):
        self.classes, self.whole, self.album, self.name = classes, whole, album, name
        self.confusion, self.images = zeros(len(classes), device), 0

    def add(self, model: Ask, batch: Batch) -> None:
        for number, image, labels in zip(batch.numbers.tolist(), batch.images, batch.targets, strict=True):
            answers = self.whole.classes(model, image, tuple(labels.shape))
            confusion = confusion_matrix(answers, labels, len(self.classes))
            self.confusion += confusion
            self.album.add(number, image, labels, answers, confusion)
        self.images += len(batch.images)

    def result(self) -> dict[str, float]:
        images = sum_over_ranks(torch.tensor(self.images))
        found = scores(sum_over_ranks(self.confusion.clone()).cpu().numpy())
        return {
            "miou": 100 * found.miou,
            "mean_accuracy": 100 * found.mean_accuracy,
            "pixel_accuracy": 100 * found.pixel_accuracy,
            "images": int(images),
        }

    def describe(self, result: dict[str, float]) -> str:
        return (
            f"mIoU {result['miou']:.2f}  mean accuracy {result['mean_accuracy']:.2f}  "
            f"pixel accuracy {result['pixel_accuracy']:.2f}  {result['images']:,} images"
        )

    def pictures(self) -> dict[str, bytes]:
        return {"images": self.album.sheet()} if self.album.first else {}

    def write(self, folder: Path) -> str:
        low, confusion = self.album.lowest_of_all(), sum_over_ranks(self.confusion.clone()).cpu().numpy()
        return write_report(folder, confusion, self.classes, {seen.number: self.name(seen.number) for seen in low}, low)


# ---- label maps


def label_table(config: Config, index: LabelMaps, num_classes: int) -> np.ndarray:
    """Give the table ``(256,)`` uint8 from numbers in an index's label maps to classes, or VOID.

    Raises:
        UserError: a number occurs that is neither a class nor void, or what is to be void is a class.
    """
    data = config.DATA
    table, void, first = index.arrays["table"].copy(), data.IGNORE_LABEL, int(data.ZERO_IS_VOID)
    is_mapped = not np.array_equal(table, np.arange(len(table)))
    if is_mapped:  # the layout knows what is void
        return table
    if first <= void < num_classes + first:
        raise UserError(
            f"DATA.IGNORE_LABEL {void} is the class {index.classes[void - first]!r}; void must have a number of its own"
        )
    known = np.zeros(len(table), dtype=bool)
    known[first : num_classes + first] = known[void] = True
    known[:first] = True
    for value in np.flatnonzero(index.occurring() & ~known).tolist():
        hint = "; if 0 is void there, as in ADE20K, set DATA.ZERO_IS_VOID True" if value == num_classes else ""
        raise UserError(
            f"label map {index.first_with(value)} has the number {value}, which is neither one of the {num_classes} "
            f"classes ({first} to {num_classes + first - 1}) nor void (DATA.IGNORE_LABEL {void}){hint}"
        )
    if first:
        table -= 1  # and 0 becomes VOID
    table[~known] = table[void] = VOID
    return table


def never_occurring(config: Config, index: LabelMaps, table: np.ndarray, classes: list[str]) -> str:
    """Name the classes of which no label map has a pixel; empty where there are none."""
    present = set(table[index.occurring()].tolist())
    missing = [name for i, name in enumerate(classes) if i not in present]
    if not missing:
        return ""
    named = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
    shifted = config.DATA.ZERO_IS_VOID and missing[-1] == classes[-1]
    hint = " (is 0 void in these label maps, as DATA.ZERO_IS_VOID says?)" if shifted else ""
    return f"; warning: {len(missing)} of them never occur in the training data: {named}{hint}"
