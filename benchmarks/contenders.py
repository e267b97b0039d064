"""The networks that are raced, and what is timed: this project's, their plain forms, and others of their size."""

import itertools
import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils._pytree import tree_leaves

from config import CLASSES, OBJECTS, PIXELS, Config, build_config
from data.loading import Batch
from engine.ema import Ema
from engine.memory import within_memory
from engine.model import begin_step, giga_macs
from engine.precision import Precision, choose_precision
from engine.step import StepResult, TrainStep
from engine.throughput import none_if_unknown
from models.build import recompute, takes
from models.crossformer import VARIANTS
from models.heads import DETECTORS, HEADS, create_detector, create_segmenter
from models.reference import plain
from optimizer import build_optimizer
from tasks import Task, build_task
from tasks.detection import CLASSES_WITHOUT_DATA as CLASSES_OF_OBJECTS
from tasks.segmentation import CLASSES_WITHOUT_DATA as CLASSES_OF_PIXELS
from utils.compat import compile_many_models, is_compiled
from utils.counting import saved_bytes
from utils.errors import UserError, did_you_mean
from utils.image_size import describe_size
from utils.machine import this_device
from utils.meters import DeviceMeters
from utils.timing import seconds, synchronize

PLAIN = "plain_"
"""Before the name of a variant: its plain implementation, models/reference.py."""

TORCHVISION = "_torchvision"
"""Behind the head of a detector: in torchvision's style."""

PEERS = {
    **{f"swin_{size}": f"swin_{size}_patch4_window7_224" for size in ("tiny", "small", "base")},
    **{f"convnext_{size}": f"convnext_{size}" for size in ("tiny", "small", "base")},
    **{f"vit_{size}": f"vit_{size}_patch16_224" for size in ("small", "base")},
}
"""What others are called here, and by timm."""

AT_224 = [name for name in VARIANTS if name != "crossformer_micro"]
DEFAULT_ON_GPU = (*AT_224, *(PLAIN + name for name in AT_224), *PEERS)
SMALL = ("crossformer_small", "crossformerpp_small")
DEFAULT_ON_CPU = (*SMALL, *(PLAIN + name for name in SMALL), "swin_tiny", "convnext_tiny", "vit_small")

KINDS = ("inference", "training")
"""Of work: methods of :class:`Contender`."""

PLAIN_STEP = "plain step"
"""What :class:`PlainStep` takes."""

PARTS = ("forward", "backward", "clip + optimizer", "EMA + meters")
"""Of a training step."""

CLASSES_TOLD = 1000
STOCHASTIC_DEPTH_OF_PEERS = 0.2
EMA_DECAY = 0.9999
SECONDS_PER_MEASUREMENT = 0.3


def marked(task: Task, mark: Callable[[], None]) -> Task:
    """Let the trainer's task call ``mark`` where the forward pass ends."""
    loss = task.loss

    def loss_and_mark(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        found = loss(model, batch)
        mark()
        return found

    vars(task)["loss"] = loss_and_mark
    return task


class Contender:
    """A network with random weights on its device, and all that training it takes.

    Args:
        network: its name.
        arguments: of the command line: precision and image size.
    """

    def __init__(self, network: str, arguments: Namespace):
        config = config_of(network, arguments.image_size)
        device = this_device()
        torch.manual_seed(0)
        self.network = network
        self.model = create(network, arguments.image_size).to(device).to(memory_format=torch.channels_last)
        self.precision = precision_of(arguments.precision, device)
        self.task = marked(build_task(config, device), self.mark)
        self.optimizer, self.average, self.meters = self.build_optimizer(config), self.build_average(), DeviceMeters()
        scaler, max_norm = self.precision.scaler(), config.TRAIN.CLIP_GRAD
        self.step = TrainStep(self.task, self.model, self.optimizer, scaler, self.precision, max_norm=max_norm)
        self.taken = 0
        self.marks: list = []

    def build_optimizer(self, config) -> torch.optim.Optimizer:
        """Build that of the recipe."""
        return build_optimizer(config, self.model)

    def build_average(self) -> ModelEmaV3:
        """Build the moving average of the weights."""
        return Ema(self.model, decay=EMA_DECAY)

    def inference(self, batch: Batch) -> None:
        """Compute logits."""
        begin_step(self.model)
        with torch.inference_mode(), self.precision.autocast():
            self.model(batch.images if isinstance(batch.images, torch.Tensor) else torch.stack(batch.images))

    def training(self, batch: Batch) -> None:
        """Take a step as the training loop does, and mark the end of each of its PARTS."""
        self.mark()
        try:
            sums = self.step.accumulate(self.taken, iter([batch]))
            self.mark()
            result = self.step.update(*sums)
        except BaseException:
            self.optimizer.zero_grad()  # the memory of a step that does not fit
            raise
        self.mark()
        self.taken += 1
        self.note(result)
        self.mark()

    def note(self, result: StepResult) -> None:
        """Do what the loop does after a step."""
        cast(Ema, self.average).update(self.model, self.taken, result.finite)
        self.meters.add(result.finite, loss=result.loss, grad_norm=result.grad_norm)

    def mark(self) -> None:
        """Note this point in time on the device, which is not waited for."""
        if self.precision.device.type == "cuda":
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def part_milliseconds(self) -> list[float]:
        """Give the median of each of PARTS over the steps of the last measurement."""
        marks = len(PARTS) + 1
        took = [milliseconds(a, b) for a, b in itertools.pairwise(self.marks)]  # each marks-th lies between two steps
        return [statistics.median(took[part::marks]) for part in range(len(PARTS))]

    def measurement(self, kind: str, batch: Batch, parts: list[list[float]]) -> Callable[[], float | None]:
        """Make a function that returns images per second, or None when memory does not suffice; fills ``parts``."""

        def run() -> None:
            getattr(self, kind)(batch)

        def measure() -> float:
            self.model.train(kind == "training")
            run()  # the first one after a change of mode fills caches
            self.marks.clear()
            once = seconds(run)
            times = int(SECONDS_PER_MEASUREMENT / once)
            took = seconds(run, times) if times else once
            if kind == "training":
                parts.append(self.part_milliseconds())
            return len(batch.images) / took

        return lambda: within_memory(measure)

    def memory(self, kind: str, batch: Batch) -> float | None:
        """Count the bytes at the peak on a GPU; on a CPU those that a training step keeps for the backward pass.

        None where there is no such figure, or not memory enough.
        """
        self.model.train(kind == "training")
        if self.precision.device.type == "cuda":
            return within_memory(lambda: self.peak_bytes(lambda: getattr(self, kind)(batch)))
        if kind == "inference" or is_compiled(self.model):
            return None

        def forward() -> torch.Tensor:
            with self.precision.autocast():
                return self.task.loss(self.model, self.task.prepare(batch))[0]

        return within_memory(lambda: saved_bytes(forward, self.model.parameters()))

    def peak_bytes(self, run: Callable[[], object]) -> int:
        """Count the most of the GPU's memory that ``run`` takes, with what stays there between two steps."""
        run()  # work space of libraries stays for good
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        synchronize()
        stays = self.model.state_dict(), self.optimizer.state_dict()["state"], self.average.module.state_dict()
        held = sum(t.nbytes for t in tree_leaves(stays) if isinstance(t, torch.Tensor))
        return held + torch.cuda.max_memory_allocated() - before


class PlainStep(Contender):
    """Steps as a first version takes them: torch's default AdamW, the average one weight at a time, ``.item()``."""

    def build_optimizer(self, config) -> torch.optim.Optimizer:
        groups = super().build_optimizer(config).param_groups
        groups = [{key: group[key] for key in ("params", "weight_decay")} for group in groups]
        return torch.optim.AdamW(groups, lr=config.TRAIN.BASE_LR)

    def build_average(self) -> ModelEmaV3:
        return ModelEmaV3(self.model, decay=EMA_DECAY, foreach=False)

    def note(self, result: StepResult) -> None:
        self.average.update(self.model, self.taken)
        self.last = result.loss.item(), result.grad_norm.item()


def make_contender(name: str, arguments: Namespace) -> Contender:
    """Build ``NETWORK``, or ``NETWORK, HOW``: compiled (by ``--compile``), recompute full ..., or PLAIN_STEP."""
    network, _, how = name.partition(", ")
    one = (PlainStep if how == PLAIN_STEP else Contender)(network, arguments)
    if how.startswith("recompute "):
        recompute(one.model, network, how.removeprefix("recompute "))
    if how == "compiled":
        compile_many_models()
        one.model.compile(mode=arguments.compile, dynamic=False)  # for each batch size on its own
    return one


def milliseconds(began, ended) -> float:
    """Between two marks; the device must have reached both."""
    return 1e3 * (ended - began) if isinstance(began, float) else began.elapsed_time(ended)


def head_of(network: str) -> str:
    """The head in ``HEAD/BACKBONE``; empty for a classifier."""
    head, _, backbone = network.partition("/")
    return head if backbone and (head in HEADS or head.removesuffix(TORCHVISION) in DETECTORS) else ""


def config_of(network: str, image_size: tuple[int, int]) -> Config:
    """Give the settings of the network's task."""
    head, size = head_of(network), ["DATA.IMG_SIZE", str(list(image_size))]
    if not head:
        return build_config("", ["TASK", CLASSES, *size])
    if head in HEADS:
        return build_config("", ["TASK", PIXELS, *size])
    return build_config("", ["TASK", OBJECTS, "MODEL.HEAD", head.removesuffix(TORCHVISION), *size])


def check_names(names: list[str]) -> None:
    """Raises: UserError: one of them is no model, or stands twice."""
    for i, each in enumerate(names):
        name = each.removeprefix(f"{head_of(each)}/")
        is_plain_backbone = head_of(each) and name.startswith(PLAIN)
        if is_plain_backbone or (
            name.removeprefix(PLAIN) not in VARIANTS and name not in PEERS and not timm.is_model(name)
        ):
            known = [*VARIANTS, *(PLAIN + variant for variant in VARIANTS), *PEERS, *timm.list_models()]
            raise UserError(f"--models: there is no model {name}{did_you_mean(name, known)}")
        if each in names[:i]:
            raise UserError(f"--models: {each} stands twice")


def create(name: str, image_size: tuple[int, int]) -> nn.Module:
    """Build it with random weights, stochastic depth and 1,000 classes (150 of pixels, 80 of objects), on the CPU."""
    if head := head_of(name):
        backbone: Any = create(name.removeprefix(f"{head}/"), image_size)
        backbone.reset_classifier(0)
        if head in HEADS:
            return create_segmenter(head, backbone, CLASSES_OF_PIXELS)
        style = "torchvision" if head.endswith(TORCHVISION) else "published"
        return create_detector(head.removesuffix(TORCHVISION), backbone, CLASSES_OF_OBJECTS, style=style)
    if name.startswith(PLAIN):
        variant = name.removeprefix(PLAIN)
        model = plain(variant, num_classes=CLASSES_TOLD, drop_path_rate=published_stochastic_depth(variant))
        model.load_state_dict(create(variant, image_size).state_dict())
        return model
    if name in VARIANTS:
        return timm.create_model(name, num_classes=CLASSES_TOLD, drop_path_rate=published_stochastic_depth(name))
    name = PEERS.get(name, name)
    arguments: dict[str, Any] = {"drop_path_rate": STOCHASTIC_DEPTH_OF_PEERS} if takes(name, "drop_path_rate") else {}
    cfg = timm.get_pretrained_cfg(name)
    if cfg and cfg.fixed_input_size:
        arguments["img_size"] = image_size  # its constructor has to know
    return timm.create_model(name, num_classes=CLASSES_TOLD, **arguments)


@cache
def published_stochastic_depth(variant: str) -> float:
    """Look up that of the variant's recipe, which decides how much of a training step need not be computed."""
    recipe = variant.removeprefix("crossformer").removeprefix("_")
    return build_config(f"configs/{recipe}.yaml").MODEL.DROP_PATH_RATE


@cache
def count_gmac(name: str, image_size: tuple[int, int]) -> float | None:
    """Count one image's; None of a detector, whose work depends on what it finds.

    Both implementations of a variant have that of the plain one, which hides no operation.

    Raises:
        UserError: the model does not take images of this size.
    """
    model = create(PLAIN + name if name in VARIANTS else name, image_size)
    try:
        return none_if_unknown(giga_macs(model, image_size, torch.device("cpu")))
    except UserError as error:
        reason = str(error.__cause__).partition("\n")[0]
        raise UserError(f"--image-size {describe_size(image_size)}: {name} does not take it: {reason}") from error


def precision_of(name: str, device: torch.device) -> Precision:
    """Understand ``auto | bf16 | fp16 | tf32 | fp32`` as the trainer does AMP."""
    return choose_precision(build_config("", ["AMP", {"fp32": "none"}.get(name, name)]), device)
