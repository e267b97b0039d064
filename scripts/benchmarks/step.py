"""The whole training step as the trainer takes it, on synthetic images, and its parts."""

import statistics
import time
from argparse import Namespace
from collections.abc import Callable

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.utils._pytree import tree_leaves

from config import SETTINGS, build_config
from engine.ema import Ema
from engine.model import begin_step
from engine.precision import Precision
from engine.skipping import SkippedSteps
from engine.train import build_criterion, build_ema, set_learning_rate, update_weights
from models.build import recompute
from models.crossformer import VARIANTS
from optimizer import build_optimizer
from scripts.benchmarks import contenders
from scripts.benchmarks.common import (
    in_turn,
    peak_bytes,
    ratio,
    rounded,
    seconds,
    show,
    show_progress,
    spread,
    start_report,
    synchronize,
    table,
    this_device,
    within_memory,
    write_report,
)
from utils.counting import saved_bytes
from utils.errors import UserError, did_you_mean
from utils.meters import DeviceMeters
from utils.randomness import seed_everything

RECOMPUTING = SETTINGS["TRAIN.USE_CHECKPOINT"].choices[1:]

SWINS = {"swin_tiny": 4.5, "swin_small": 8.7, "swin_base": 15.4}
"""The published GMAC of each, to choose the one of similar size."""

PARTS = ("forward", "backward", "clip + optimizer", "EMA + meters")
PLAIN_STEP = "plain step"
EMA_DECAY = "0.9999"
SECONDS_PER_MEASUREMENT = 0.5


class Trainee:
    """A model and all that its training needs; ``step`` is the body of the loop in engine/train.py."""

    def __init__(self, model: nn.Module, precision: Precision):
        config = build_config("", ["TRAIN.EMA_DECAY", EMA_DECAY])
        self.device = precision.device
        self.model = model.to(self.device, memory_format=torch.channels_last)
        self.precision, self.scaler = precision, precision.scaler()
        self.optimizer, self.criterion = build_optimizer(config, model), build_criterion(config, soft_targets=False)
        self.ema: Ema = build_ema(config, model)
        self.parameters, self.max_norm = list(model.parameters()), config.TRAIN.CLIP_GRAD
        self.meters, self.skipped = DeviceMeters(), SkippedSteps(self.device)
        self.learning_rate, self.taken = config.TRAIN.BASE_LR, 0

    def loss(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with self.precision.autocast():
            return self.criterion(self.model(images), targets)

    def step(self, images: torch.Tensor, targets: torch.Tensor, part_ended: Callable[[], None] = lambda: None) -> None:
        begin_step(self.model)
        set_learning_rate(self.optimizer, self.learning_rate)
        seed_everything(self.device, 0, "step", self.taken, 0, 0)
        try:
            loss = self.loss(images, targets)
            part_ended()
            self.scaler.scale(loss).backward()
            part_ended()
        except BaseException:
            self.optimizer.zero_grad()  # the memory of a step that does not fit
            raise
        grad_norm, finite = update_weights(self.optimizer, self.scaler, self.parameters, self.max_norm)
        part_ended()
        self.taken += 1
        self.ema.update(self.model, self.taken, finite)
        self.skipped.add(finite)
        self.meters.add(finite, loss=loss.detach(), grad_norm=grad_norm)
        part_ended()

    def state_bytes(self) -> int:
        """Of weights, moving average and the optimizer's moments."""
        states = self.model.state_dict(), self.ema.module.state_dict(), self.optimizer.state_dict()["state"]
        return sum(t.nbytes for t in tree_leaves(states) if isinstance(t, torch.Tensor))


class PlainTrainee(Trainee):
    """With a step as it is first written: torch's default optimizer, the average one weight at a time, ``.item()``."""

    def __init__(self, model: nn.Module, precision: Precision):
        super().__init__(model, precision)
        groups = [
            {"params": group["params"], "weight_decay": group["weight_decay"]} for group in self.optimizer.param_groups
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=self.learning_rate)
        self.ema = ModelEmaV3(model, decay=float(EMA_DECAY), foreach=False)

    def step(self, images: torch.Tensor, targets: torch.Tensor, part_ended: Callable[[], None] = lambda: None) -> None:
        try:
            loss = self.loss(images, targets)
            part_ended()
            self.scaler.scale(loss).backward()
            part_ended()
            self.scaler.unscale_(self.optimizer)
            grad_norm = nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        finally:
            self.optimizer.zero_grad()
        part_ended()
        self.taken += 1
        self.ema.update(self.model, self.taken)
        self.last = loss.item(), grad_norm.item()
        part_ended()


class Marks:
    """Points in time on the device, which is not waited for."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.points: list = []
        self()

    def __call__(self) -> None:
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.points.append(event)
        else:
            self.points.append(time.perf_counter())

    def milliseconds(self) -> list[float]:
        """Between each point and the one before it."""
        pairs = zip(self.points[:-1], self.points[1:], strict=True)
        if self.on_gpu:
            torch.cuda.synchronize()
            return [a.elapsed_time(b) for a, b in pairs]
        return [1e3 * (b - a) for a, b in pairs]


def benchmark_step(arguments: Namespace) -> None:
    """Images per second, memory and the parts of a training step: eager, recomputing, plain, Swin, compiled."""
    device = this_device()
    precision = contenders.precision_of(arguments.precision, device)
    on_gpu = device.type == "cuda"
    arguments.models = arguments.models or ["crossformer_small", "crossformerpp_small"][: 2 if on_gpu else 1]
    arguments.batch_size = arguments.batch_size or (256 if on_gpu else 4)
    for name in arguments.models:
        if name not in VARIANTS:
            raise UserError(f"--models: {name} is not a CrossFormer{did_you_mean(name, VARIANTS)}")
    contenders.check_names(arguments.models)
    batch = contenders.synthetic_batch(arguments.batch_size, arguments.image_size, device)
    trainees = {name: make() for name, make in lineup(arguments, precision).items()}
    memory = {}
    for name, trainee in trainees.items():
        show_progress(f"warming up {name}")
        memory[name] = memory_of(trainee, batch, "compiled" in name)
    parts: dict[str, list[list[float]]] = {name: [] for name in trainees}
    runs = {name: measurement(trainee, batch, parts[name]) for name, trainee in trainees.items()}
    figures = in_turn(runs, arguments.repeats)
    report = start_report(arguments, device) | {
        "precision": precision.name,
        "steps": [
            {
                "name": name,
                "images_per_second": figures.get(name),
                "parts_milliseconds": dict(zip(PARTS, zip(*parts[name], strict=True), strict=False)),
                "memory_bytes": memory[name],
            }
            for name in trainees
        ],
    }
    show(step_table(report))
    write_report(report, arguments.output)


def lineup(arguments: Namespace, precision: Precision) -> dict[str, Callable[[], Trainee]]:
    """Who takes part: each variant on its own and recomputing, its plain implementation and a Swin; and compiled."""

    def trainee(name: str, how: str = "none", mode: str = "none", kind: type = Trainee) -> Callable[[], Trainee]:
        def make() -> Trainee:
            torch.manual_seed(0)
            model = contenders.create(name, arguments.image_size)
            if how != "none":
                recompute(model, name, how)
            made = kind(model, precision)
            contenders.compile_model(model, mode)
            return made

        return make

    everyone: dict[str, Callable[[], Trainee]] = {}
    for name in arguments.models:
        gmac = contenders.count_gmac(name, arguments.image_size)
        swin = min(SWINS, key=lambda swin: abs(SWINS[swin] - gmac))
        for one in (name, contenders.PLAIN + name, swin):
            everyone[one] = trainee(one)
            for how in RECOMPUTING if one == name else ():
                everyone[f"{one}, recompute {how}"] = trainee(one, how)
            if one.startswith(contenders.PLAIN):
                everyone[f"{one}, {PLAIN_STEP}"] = trainee(one, kind=PlainTrainee)
            if arguments.compile != "none":
                everyone[f"{one}, compiled"] = trainee(one, mode=arguments.compile)
    return everyone


def memory_of(trainee: Trainee, batch: tuple, compiled: bool) -> float | None:
    """The peak of a step on a GPU; on a CPU, what an eager one keeps for its backward pass. None: see ``model``."""
    if trainee.device.type == "cuda":
        peak = within_memory(lambda: peak_bytes(lambda: trainee.step(*batch), trainee.device))
        return None if peak is None else peak + trainee.state_bytes()
    if compiled:
        return None
    return within_memory(lambda: saved_bytes(lambda: trainee.loss(*batch), trainee.model.parameters()))


def measurement(trainee: Trainee, batch: tuple, parts: list[list[float]]) -> Callable[[], float | None]:
    """A function that returns images/s, or None when memory does not suffice, and adds to ``parts``."""

    def measure() -> float:
        trainee.step(*batch)
        synchronize()
        marks = Marks(trainee.device)
        once = seconds(lambda: trainee.step(*batch, part_ended=marks))
        parts.append(marks.milliseconds())
        times = max(1, int(SECONDS_PER_MEASUREMENT / once))
        return times * len(batch[0]) / seconds(lambda: [trainee.step(*batch) for _ in range(times)])

    return lambda: within_memory(measure)


def compared_with(name: str) -> str:
    """Whose step: compiled with compiled; recomputing with the plain network, which does not know how to."""
    variant, _, how = name.partition(", ")
    if how == PLAIN_STEP:
        return variant
    return contenders.PLAIN + variant + (", compiled" if how == "compiled" else "")


def step_table(report: dict):
    """One row for each that took part."""
    settings, on_gpu = report["settings"], report["machine"]["device"] != "no GPU"
    shown = table(
        f"training step, batch {settings['batch_size']:,}, {settings['image_size']} x {settings['image_size']}, "
        f"{report['precision']}, compile {settings['compile']}; ms, medians of {settings['repeats']}; "
        f"MB {'at most' if on_gpu else 'kept for the backward pass'}",
        "", "images/s", "+-", "x plain", "ms", "forward", "backward", "update", "EMA", "MB",
    )  # fmt: skip
    figures = {step["name"]: step["images_per_second"] for step in report["steps"]}
    for step in report["steps"]:
        values = step["images_per_second"]
        variant, _, how = step["name"].partition(", ")
        label = f"  {how}" if how else variant
        if values is None:
            shown.add_row(label, "no memory")
            continue
        plain = figures.get(compared_with(step["name"]))
        median = statistics.median(values)
        parts = [statistics.median(step["parts_milliseconds"][part]) for part in PARTS]
        shown.add_row(
            label,
            rounded(median),
            spread(values),
            f"{ratio(values, plain):.2f}" if plain else "",
            rounded(1e3 * settings["batch_size"] / median),
            *map(rounded, parts),
            rounded(step["memory_bytes"] / 1e6) if step["memory_bytes"] else "",
        )
    return shown
