"""Learning from a teacher: a trained classifier whose answers to the same images are targets too.

timm's distillation tasks are not used: they want to call the student themselves, and look at each step whether teacher
and student normalise alike, which waits for the device.
"""

from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config
from tasks.trained import TrainedModel, load_trained
from utils.distributed import agreement, from_main, is_main
from utils.errors import UserError
from utils.image_size import height_and_width
from utils.parallel import unwrap


class Teacher(nn.Module):
    """A trained classifier that answers as a student is asked: for its images and its classes.

    Args:
        trained: the classifier and how its images are prepared.
        columns: of its answers, which are the student's classes, in their order.
        mean, std: that the student's images are normalised with.
        source: where it is from.
        least: the top-1 that it must have to be believed.
    """

    scale: Tensor
    shift: Tensor
    columns: Tensor | None

    def __init__(
        self,
        trained: TrainedModel,
        columns: list[int],
        mean: list[float],
        std: list[float],
        source: str = "",
        least: float = 0.0,
    ):
        super().__init__()
        self.source, self.least = source, least
        self.pretrained_cfg = trained.model.pretrained_cfg  # for whoever asks what images it takes
        self.model = trained.model.requires_grad_(False)
        data = trained.config.DATA
        own_mean, own_std = torch.tensor(data.MEAN), torch.tensor(data.STD)
        # (image * std + mean - own_mean) / own_std
        scale, shift = torch.tensor(std) / own_std, (torch.tensor(mean) - own_mean) / own_std
        self.register_buffer("scale", scale[:, None, None])
        self.register_buffer("shift", shift[:, None, None])
        self.normalises_alike = bool(torch.all(scale == 1) and torch.all(shift == 0))
        takes_all = columns == list(range(cast(Any, trained.model).num_classes))
        self.register_buffer("columns", None if takes_all else torch.tensor(columns))
        is_fixed = cast(Any, trained.model).pretrained_cfg.get("fixed_input_size")
        self.size = height_and_width(data.IMG_SIZE) if is_fixed else None
        self.eval()

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in evaluation mode: nothing of it is trained."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Answer images ``(B, 3, H, W)``, normalised for the student, with logits ``(B, classes)`` of its classes."""
        if not self.normalises_alike:
            images = images * self.scale + self.shift
        if self.size is not None and tuple(images.shape[2:]) != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True)
        logits = self.model(images)
        return logits if self.columns is None else logits[:, self.columns]


def read_teacher(config: Config) -> TrainedModel | None:
    """Read the classifier that ``config.TRAIN.TEACHER`` names; None where it names none.

    A collective: rank 0 alone reads it and hands it to the others.

    Raises:
        AgreedError: it cannot be read.
    """
    asked, trained = config.TRAIN.TEACHER, None
    if not asked.FROM:
        return None
    with agreement():
        if is_main():
            try:
                trained = load_trained(file_of(asked.FROM), torch.device("cpu"), asked.NAME)
            except UserError as error:
                raise UserError(str(error).replace("--model", "TRAIN.TEACHER.NAME")) from error
    return from_main(trained)


def build_teacher(config: Config, trained: TrainedModel, classes: list[str], device: torch.device) -> Teacher:
    """Make a teacher of a classifier, for a student of these classes.

    Raises:
        UserError: it is no classifier, or does not know a class.
    """
    asked = config.TRAIN.TEACHER
    if trained.config.TASK != "classification":
        raise UserError(f"TRAIN.TEACHER.FROM {asked.FROM} is a model for {trained.config.TASK}; take a classifier")
    names = trained.class_ids
    missing = [name for name in classes if name not in names]
    by_place = len(missing) == len(names) == len(classes)  # it calls none of them by its name
    if missing and not by_place:
        raise UserError(
            f"TRAIN.TEACHER.FROM {asked.FROM} does not know {len(missing)} of the {len(classes)} classes, the first is "
            f"{missing[0]!r}; take a teacher of the same classes"
        )
    columns = list(range(len(classes))) if missing else [names.index(name) for name in classes]
    guessing = 100 / len(classes)
    least = asked.AT_LEAST or min(2 * guessing, (guessing + 100) / 2)
    return Teacher(trained, columns, config.DATA.MEAN, config.DATA.STD, asked.FROM, least).to(device)


def file_of(source: str) -> str:
    """Give the best checkpoint where the source is the results folder of a run."""
    best = Path(source, "checkpoints", "best.pth")
    return str(best) if best.is_file() else source


class Features:
    """Keeps what a classifier's last layer gets: the features ``(B, C)`` of the images of the last pass.

    Raises:
        UserError: it has no single last layer.
    """

    def __init__(self, model: nn.Module):
        self.last: Tensor | None = None
        head = cast(Any, unwrap(model)).get_classifier()
        if not isinstance(head, nn.Linear):
            raise UserError("TRAIN.TEACHER.KIND features: the model has no single last layer; use soft or hard")
        head.register_forward_pre_hook(self._keep)

    def _keep(self, _: nn.Module, arguments: tuple) -> None:
        self.last = arguments[0]

    def take(self) -> Tensor:
        """Give them, and keep them no longer."""
        assert self.last is not None
        found, self.last = self.last, None
        return found


class Distillation:
    """What a student has to learn of its teacher: ``soft`` answers, ``hard`` ones, or the teacher's ``features``."""

    def __init__(self, teacher: Teacher, kind: str, temperature: float):
        self.teacher, self.kind, self.temperature = teacher, kind, temperature
        self._own: Features | None = None
        self._teachers = Features(teacher.model) if kind == "features" else None

    def watch(self, student: nn.Module) -> None:
        """Get ready for a pass of the student."""
        if self.kind == "features" and self._own is None:
            self._own = Features(student)

    def loss(self, logits: Tensor, images: Tensor) -> Tensor:
        """Give the mean loss of the student's logits ``(B, classes)`` for images ``(B, 3, H, W)``."""
        answers = self.teacher(images).float()
        if self._own is not None and self._teachers is not None:
            return 1 - similarity(self._own.take(), self._teachers.take())
        if self.kind == "hard":
            return F.cross_entropy(logits, answers.argmax(dim=1))
        return soft_loss(logits.float(), answers, self.temperature)


def soft_loss(logits: Tensor, answers: Tensor, temperature: float) -> Tensor:
    """Give the divergence of softened answers, whose gradient does not shrink with the temperature.

    Source: arXiv 1503.02531, section 2.
    """
    student, teacher = (F.log_softmax(x / temperature, dim=1) for x in (logits, answers))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def similarity(features: Tensor, others: Tensor) -> Tensor:
    """Tell how alike two networks see the images of a batch, from 0 to 1: linear centred kernel alignment.

    It needs nothing that is learned, however many channels each has. Source: arXiv 1905.00414, section 3.

    Args:
        features, others: ``(B, C)`` and ``(B, D)``.
    """
    with torch.autocast(features.device.type, enabled=False):  # in half precision the products overflow
        x, y = (of.float() - of.float().mean(dim=0) for of in (features, others))
        own, theirs = x @ x.T, y @ y.T
        return (own * theirs).sum() / (own.norm() * theirs.norm()).clamp(min=1e-12)
