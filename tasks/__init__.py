"""What is learned. A task is one file that answers the questions of :class:`Task`; :func:`build_task` chooses it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from config import Config
from data.loading import Batch, EvalLoader, TrainLoader
from data.phases import PhasedLoader
from utils.errors import UserError


class Loaders(NamedTuple):
    """What training reads, a description for the first line of its log, and further lines of it."""

    train: TrainLoader | PhasedLoader
    val: EvalLoader
    described: str
    notes: tuple[str, ...] = ()


class Evaluator(Protocol):
    """Collects what a model answers; the result is exact on any number of processes and with any batch size."""

    def add(self, model: Callable[[Tensor], Tensor], batch: Batch) -> None:
        """Take the model's answers to a batch of this rank."""

    def result(self) -> dict[str, float]:
        """Give the metrics by name, over all ranks. A collective."""

    def describe(self, result: dict[str, float]) -> str:
        """Put the metrics into words for a line of the log."""

    def pictures(self) -> dict[str, bytes]:
        """Draw a few of this rank's answers for TensorBoard, PNG files by their names; none where there are none."""

    def write(self, folder: Path) -> str:
        """Write tables and pictures of the result, and say where. A collective. Called for TEST.REPORT only."""


class Task(Protocol):
    """The questions that the engine asks. It knows batches and named metrics, never classes, masks or boxes.

    Attributes:
        best_is: the metric of the evaluator that ``best.pth`` goes by; more is better.
        best_title: what a person calls it.
        teacher: the trained network that the loss asks, once data is open; None where there is none.
    """

    best_is: str
    best_title: str

    @property
    def teacher(self) -> nn.Module | None: ...

    def model(self) -> nn.Module:
        """Build the network, on the host, with random weights."""

    def train_loaders(self) -> Loaders:
        """Open the data to train on and to evaluate with meanwhile."""

    def eval_loader(self, content: dict[str, Any], weights: dict[str, Tensor], path: str) -> tuple[EvalLoader, list]:
        """Open the data to evaluate a checkpoint on; with lines for the log on how it was made to fit.

        Args:
            content: of the checkpoint file ``path``.
            weights: those of the model in it.
        """

    def synthetic_batch(self, count: int) -> Batch:
        """Make a batch on the device without data, as training takes it."""

    def prepare(self, batch: Batch) -> Batch:
        """Do on the device what training does to a batch; it draws from the global generators, which are seeded."""

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Give the mean loss of a batch, and the named terms that it is made of if the log is to show them."""

    def evaluator(self, report: bool = False) -> Evaluator:
        """Begin an evaluation; with ``report`` one that can :meth:`Evaluator.write`."""

    def facts(self) -> dict[str, Any]:
        """Tell what a checkpoint has to say of the task besides the config: plain data."""

    def check(self, content: dict[str, Any], path: str) -> None:
        """Raise a UserError if a checkpoint is of the same task on something else, so that no run can carry it on."""

    def start_from(self, model: nn.Module, content: dict[str, Any], path: str) -> list[str]:
        """Give ``model`` the weights in a checkpoint to begin with; returns lines for the log."""


def build_task(config: Config, device: torch.device) -> Task:
    """The task that ``config.TASK`` names, for a device."""
    match config.TASK:
        case "classification":
            from tasks.classification import Classification

            return Classification(config, device)
        case "segmentation":
            from tasks.segmentation import Segmentation

            return Segmentation(config, device)
        case "detection":
            from tasks.detection import Detection

            return Detection(config, device)
    raise UserError(f"TASK {config.TASK} is not one of classification, segmentation, detection")
