"""Image classification: one class for each image. Accuracy decides which weights are the best."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torchvision.transforms.v2.functional import five_crop

from config import Config, phases
from data.augmentation import (
    DeviceStage,
    augments_on_device,
    build_eval_transform,
    build_mixing,
    build_train_stage,
    build_train_transform,
)
from data.build import build_eval_loader, build_train_loader, check_num_classes, keep_in_memory, labels_of
from data.dataset import DecodeAndTransform
from data.decoding import build_decoding
from data.index import Index
from data.loading import Batch, EvalLoader, TrainLoader
from data.phases import PhasedLoader
from data.splits import describe_share, describe_subset, open_images
from models import build_model, load_weights
from tasks import Loaders
from tasks.class_names import as_ids, named_classes, number_as_the_model
from tasks.distillation import Distillation, build_teacher
from tasks.mistakes import Mistakes
from tasks.real_labels import RealLabels, describe_real
from tasks.report import Report
from tasks.trained import TrainedModel, prepared_otherwise
from utils import checkpoint
from utils.distributed import sum_over_ranks
from utils.errors import UserError
from utils.image_size import height_and_width

CLASSES_WITHOUT_DATA = 1000

Views = Callable[[Tensor], list[Tensor]]
"""From images ``(B, 3, H, W)`` to what the model sees of them."""


class Classification:
    """Learns the class of an image; see :class:`tasks.Task`.

    Attributes:
        classes: their names as the model counts them, once data is open.
        phase: the config that holds while a phase of TRAIN.CURRICULUM lasts.
        learns_from: the trained classifier that is its teacher; to be set before data is opened.
    """

    best_is, best_title = "top1", "top-1"

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        self.classes: list[str] = []
        self.phase, self._mixes = config, False
        self._among: Tensor | None = None
        self._real: RealLabels | None = None
        self._val: Index | None = None
        self._weights: Tensor | None = None
        self.learns_from: TrainedModel | None = None
        self._distillation: Distillation | None = None

    def model(self) -> nn.Module:
        return build_model(self.config, self._num_classes())

    def _num_classes(self) -> int:
        return len(self.classes) or self.config.MODEL.NUM_CLASSES or CLASSES_WITHOUT_DATA

    # ---- data

    def train_loaders(self) -> Loaders:
        config = self.config
        train, val, self.classes = open_images(config, training=True)
        assert train is not None
        check_num_classes(config, self.classes)
        keep_in_memory(config, train, val)
        on_device = augments_on_device(config, self.device)
        loaders = [(epoch, self._train_loader(phase, train)) for epoch, phase in phases(config)]
        self._mixes = True
        if self.learns_from is not None:
            teacher, asked = build_teacher(config, self.learns_from, self.classes, self.device), config.TRAIN.TEACHER
            self._distillation = Distillation(teacher, asked.KIND, asked.TEMPERATURE)
        if config.TRAIN.CLASS_WEIGHTS == "balanced":
            counts = np.bincount(labels_of(train, "TRAIN.CLASS_WEIGHTS balanced"), minlength=len(self.classes))
            self._weights = torch.tensor(balanced_weights(counts), dtype=torch.float32, device=self.device)
        described = (
            f"{len(train):,} images of {len(self.classes):,} classes  "
            f"augmented {'on the GPU' if on_device else 'by the loader processes'}"
        )
        notes = describe_share(config, train, val, self.classes), describe_subset(config, train)
        loader = PhasedLoader(loaders) if len(loaders) > 1 else loaders[0][1]
        return Loaders(loader, self._eval_loader(val), described, tuple(filter(None, notes)))

    def _train_loader(self, config: Config, index: Index) -> TrainLoader:
        transform = build_train_transform(config, augments_on_device(config, self.device))
        build_mixing(config, len(self.classes))  # raises what is wrong with it
        sample = DecodeAndTransform(transform, build_decoding(config))
        return build_train_loader(config, index, sample, transform.size, build_train_stage(config, self.device))

    def eval_loader(
        self, content: dict[str, Any], weights: dict[str, Tensor], path: str
    ) -> tuple[EvalLoader, list[str]]:
        config = self.config
        _, images, there = open_images(config, training=False)
        check_num_classes(config, there)
        keep_in_memory(config, images)
        val, self.classes, present = number_as_the_model(images, there, content, weights, config.MODEL.NAME, path)
        self.check(content, path)
        notes = *prepared_otherwise(content, config, path), describe_share(config, None, images, there)
        lines = [line for line in notes if line]
        if self.classes != there:
            lines.append(f"the classes are numbered as in {path}")
        if present:
            few = f"only the {len(present)} of the model's {len(self.classes)} classes that the data has are answers"
            lines.append(few)
            self._among = torch.tensor([name in present for name in self.classes], device=self.device)
        if config.TEST.REAL_LABELS:
            self._real = RealLabels(val, self.classes, self.device)
        return self._eval_loader(val), lines

    def _eval_loader(self, index: Index) -> EvalLoader:
        self._val = index
        transform = build_eval_transform(self.config)
        sample = DecodeAndTransform(transform, build_decoding(self.config))
        stage = DeviceStage(self.device, self.config.DATA.MEAN, self.config.DATA.STD)
        return build_eval_loader(self.config, index, sample, transform.size, stage)

    def synthetic_batch(self, count: int) -> Batch:
        size = height_and_width(self.config.DATA.IMG_SIZE)
        images = torch.randn(count, 3, *size, device=self.device).contiguous(memory_format=torch.channels_last)
        return Batch(images, torch.randint(self._num_classes(), (count,), device=self.device), torch.arange(count))

    # ---- training

    def prepare(self, batch: Batch) -> Batch:
        mix = build_mixing(self.phase, len(self.classes)) if self._mixes else None
        if mix is None:
            return batch
        images, targets = mix(batch.images, batch.targets)
        return batch._replace(images=images, targets=targets)

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """What the labels ask for, and what a teacher does besides, each by its share."""
        images, distillation = cast(Tensor, batch.images), self._distillation
        if distillation is None:
            return self._loss_of_labels(model(images), cast(Tensor, batch.targets)), {}
        distillation.watch(model)
        logits, share = model(images), self.config.TRAIN.TEACHER.WEIGHT
        of_labels = self._loss_of_labels(logits, cast(Tensor, batch.targets))
        of_teacher = distillation.loss(logits, images)
        terms = {"loss_labels": of_labels, "loss_teacher": of_teacher}
        return (1 - share) * of_labels + share * of_teacher, terms

    def _loss_of_labels(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy, or that of each class by itself, with label smoothing, which mixed targets carry already.

        With TRAIN.CLASS_WEIGHTS that of an image counts as much as its class, or as its classes by their shares.

        Args:
            logits: ``(B, classes)``.
            targets: ``(B,)``, or ``(B, classes)`` of mixed images.
        """
        asked, smoothing = self.config.TRAIN.LOSS, self.phase.MODEL.LABEL_SMOOTHING
        if self._weights is not None:
            return weighted_cross_entropy(logits, targets, self._weights, smoothing)
        if asked.NAME == "bce":
            return BinaryCrossEntropy(smoothing, asked.THRESHOLD or None, sum_classes=asked.SUM)(logits, targets)
        criterion = SoftTargetCrossEntropy() if targets.is_floating_point() else LabelSmoothingCrossEntropy(smoothing)
        return criterion(logits, targets)

    @property
    def teacher(self) -> nn.Module | None:
        return self._distillation.teacher if self._distillation else None

    # ---- evaluation

    def evaluator(self, report: bool = False) -> "Accuracy":
        tables = None
        if report:
            assert self._val is not None
            tables = Report(self.classes, self.device, Mistakes(self.classes, self._val, build_decoding(self.config)))
        return Accuracy(self.device, build_views(self.config), self._among, self._real, tables)

    # ---- checkpoints

    def facts(self) -> dict[str, Any]:
        return {"classes": self.classes}

    def check(self, content: dict[str, Any], path: str) -> None:
        trained_on = named_classes(content, None, path) or self.classes
        if self.classes not in (trained_on, as_ids(trained_on)) and len(trained_on) == len(self.classes):
            i = next(i for i, (a, b) in enumerate(zip(trained_on, self.classes, strict=True)) if a != b)
            raise UserError(
                f"{path} was trained on other classes: its class {i} is {trained_on[i]!r}, "
                f"the data's {self.classes[i]!r}"
            )

    def start_from(self, model: nn.Module, content: dict[str, Any], path: str) -> list[str]:
        which, weights = checkpoint.choose(checkpoint.weights_in(content, path), self.config.MODEL.WEIGHTS, path)
        loaded = load_weights(model, weights, path, allow_new_head=True)
        head = "the head too"
        if loaded.new_head:
            had = f"{loaded.classes_in_file} classes" if loaded.classes_in_file else "no head"
            head = f"the head is new ({had} in the file, {len(self.classes)} in the data)"
        else:
            named = named_classes(content, None, path) or self.classes
            if self.classes not in (named, as_ids(named)):
                head = "the head too, although its classes are others or in another order"
        average = ", of the moving average in it" if which == "ema" else ""
        return [f"starting from {path}{average}: {loaded.matched} weights matched, {head}", *loaded.notes]


def balanced_weights(counts: np.ndarray) -> np.ndarray:
    """Weigh classes in inverse proportion to their images ``(classes,)``, so that the mean over images is 1."""
    return counts.sum() / (np.count_nonzero(counts) * np.maximum(counts, 1))


def weighted_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor, smoothing: float) -> Tensor:
    """Average the cross entropy of images, each times the weight of its class.

    Args:
        logits: ``(B, classes)``.
        targets: ``(B,)``, or shares ``(B, classes)`` that are smoothed already.
        weights: ``(classes,)``.
        smoothing: of targets that are classes.
    """
    if targets.is_floating_point():
        return (F.cross_entropy(logits, targets, reduction="none") * (targets @ weights)).mean()
    losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    return (losses * weights[targets]).mean()


class Accuracy:
    """Top-1 and top-5 in percent, mean cross entropy, and how many images they are of: see :class:`tasks.Evaluator`.

    Counts are summed over images and ranks and divided once; the device is not waited for before the end.

    Args:
        device: where the answers are.
        views: see :func:`build_views`.
        among: which classes may be answered, ``(classes,)``; all for None.
        real: all labels that fit each image, which are counted too.
        tables: is told every answer.
    """

    def __init__(
        self,
        device: torch.device,
        views: Views,
        among: Tensor | None = None,
        real: RealLabels | None = None,
        tables: Report | None = None,
    ):
        self.views, self.among, self.real, self.tables = views, among, real, tables
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)  # images, top-1, top-5, loss

    def add(self, model: Callable[[Tensor], Tensor], batch: Batch) -> None:
        images, targets = cast(Tensor, batch.images), cast(Tensor, batch.targets)
        answers = [model(view).float() for view in self.views(images)]
        if self.among is not None:
            answers = [logits.masked_fill(~self.among, -math.inf) for logits in answers]
        logits = mean_of_probabilities(answers)
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
        loss = F.cross_entropy(logits, targets, reduction="none").double()
        if self.tables:
            self.tables.add(logits, targets, batch.numbers)
        if self.real:
            self.real.add(logits, batch.numbers)
        count = torch.full_like(self.sums[0], len(targets))
        self.sums += torch.stack([count, best[:, 0].sum(), best.sum(), loss.sum()])

    def result(self) -> dict[str, float]:
        images, top1, top5, loss = sum_over_ranks(self.sums.clone()).tolist()
        found = {"top1": 100 * top1 / images, "top5": 100 * top5 / images, "loss": loss / images, "images": int(images)}
        return found | (self.real.read() if self.real else {})

    def describe(self, result: dict[str, float]) -> str:
        text = (
            f"top-1 {result['top1']:.2f}  top-5 {result['top5']:.2f}  loss {result['loss']:.4f}  "
            f"{result['images']:,} images"
        )
        return f"{text}  {describe_real(result)}" if self.real else text

    def pictures(self) -> dict[str, bytes]:
        return {}

    def write(self, folder: Path) -> str:
        assert self.tables is not None
        return self.tables.write(folder)


def build_views(config: Config) -> Views:
    """The views that ``TEST.VIEWS`` names, over whose probabilities an evaluation averages."""
    size = list(height_and_width(config.DATA.IMG_SIZE))
    return {
        "none": lambda images: [images],
        "flip": lambda images: [images, images.flip(-1)],
        "five_crop": lambda images: list(five_crop(images, size)),
    }[config.TEST.VIEWS]


def mean_of_probabilities(answers: list[Tensor]) -> Tensor:
    """Logits whose probabilities are the mean of those of several ``(B, classes)``."""
    if len(answers) == 1:
        return answers[0]
    return torch.stack([logits.log_softmax(dim=1) for logits in answers]).logsumexp(dim=0) - math.log(len(answers))
