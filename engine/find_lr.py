"""A learning rate to begin with: short trials from the start that a run would have, each with a rate of its own."""

import io
import math
import shlex
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from config import Config, output_dir
from data.loading import naming_dead_workers
from engine.curriculum import Curriculum
from engine.memory import naming_out_of_memory, parts_that_fit
from engine.model import (
    check_image_size,
    compile_in_place,
    prepare_model,
    set_training_mode,
)
from engine.precision import choose_precision
from engine.resume import read_on_main
from engine.state import TrainState
from engine.step import TrainStep
from engine.teaching import task_with_teacher
from engine.train import check_same_data
from lr_scheduler import build_scheduler, rate_scale, total_steps
from optimizer import build_optimizer, set_learning_rate
from tasks import build_task
from utils import parallel
from utils.bar import bar
from utils.distributed import AgreedError, agreement, is_main, sum_over_ranks, world_size
from utils.drawing import pyplot
from utils.launchers import is_torchrun
from utils.logger import RunLog
from utils.tables import csv_of

SHARE, TRIALS = 0.025, 6
"""Of the run's steps, that all trials together are to take; and how many they are if they begin near the best rate."""
FEWEST, MOST = 2, 100
"""Steps of a trial."""
COARSE, FINE = 10.0, math.sqrt(10.0)
"""From one rate to the next: first, and then around the best of those."""
NOTHING_HAPPENS = 1e-3
"""The share of the loss by which it must differ from the start's for a rate not to be too small to tell."""
SMALLEST, LARGEST = 1e-10, 1e3
HALVINGS = 24
"""Of a loss scale at most, until gradients are finite."""
SCALED = ("WARMUP_LR", "MIN_LR")
"""Settings of TRAIN that go with BASE_LR, so that the schedule keeps its shape."""


class Found(NamedTuple):
    """The loss after a trial with each rate, the loss of the start, and the rate that is suggested."""

    losses: dict[float, float]
    start: float
    rate: float


class Trials:
    """Trains for a few steps with one rate after the other, from the same weights, on the same images and draws.

    Args:
        config: of the run that the rate is for.
    """

    def __init__(self, config: Config, device: torch.device):
        self.config, self.parts = config, 1
        self.task = task_with_teacher(build_task, config, device)
        with agreement():
            bar.doing("looking through the data")
            self.loader = self.task.train_loaders().train
            bar.doing("building the network")
            self.precision = choose_precision(config, device)
            self.model = prepare_model(config, self.task.model, device)
            check_image_size(self.model, config.DATA.IMG_SIZE, device)
            curriculum = Curriculum(config, self.loader.calendar, self.task, self.model, None)
            curriculum.check(device)
            curriculum.enter(0)  # trials are of the beginning
            build_scheduler(config, self.loader.calendar)  # refuses what a run would
        check_same_data(self.loader.dataset.index)
        self.notes: list[str] = []
        if config.MODEL.PRETRAINED:
            source, content = read_on_main(config.MODEL.PRETRAINED, config.MODEL.NAME)
            with agreement():
                self.notes = self.task.start_from(self.model, content, source)
        sharding = parallel.choose_sharding(config.TRAIN.SHARD, device, self.precision.dtype)
        compress = config.TRAIN.COMPRESS_GRADIENTS
        self.wrapped = parallel.wrap(self.model, device, config.TRAIN.SYNC_BN, sharding, compress)
        compile_in_place(config, self.model)
        self.scaler = self.precision.scaler()
        self.scale = self.scaler.state_dict()
        self.begun = [(tensor, tensor.detach().clone()) for tensor in (*self.model.parameters(), *self.model.buffers())]

    def fit(self) -> None:
        """Find out into how many parts a micro-batch must be cut (TRAIN.AUTO_MICRO_BATCH), and fp16's loss scale."""
        if self.config.TRAIN.AUTO_MICRO_BATCH:
            state = TrainState(self.model, build_optimizer(self.config, self.model), self.precision.scaler(), None)
            self.parts = parts_that_fit(self.config, self.task, state, self.precision)
        if not self.scaler.is_enabled():
            return
        step = self.step(0.0)
        for _ in range(HALVINGS):
            if step(0, self.loader.micro_batches(0, 1)).finite:
                break
        self.scale = self.scaler.state_dict()

    def step(self, rate: float) -> TrainStep:
        """Make what takes steps from the start, with an optimizer of its own at that rate."""
        with torch.no_grad():
            for tensor, before in self.begun:
                tensor.copy_(before)
        optimizer, train = build_optimizer(self.config, self.model), self.config.TRAIN
        optimizer.zero_grad()
        set_learning_rate(optimizer, rate)
        set_training_mode(self.wrapped)
        return TrainStep(
            self.task,
            self.wrapped,
            optimizer,
            self.scaler,
            self.precision,
            seed=self.config.SEED,
            max_norm=train.CLIP_GRAD or float("inf"),
            accumulation=train.ACCUMULATION_STEPS,
            parts=self.parts,
        )

    def loss_after(self, steps: int, rate: float, evaluated: int) -> float:
        """Compute the loss of the images of the step ``evaluated``, after so many steps before it. A collective.

        The rate rises to ``rate`` step by step, as in a warm-up: at once it would upset an untrained network.
        """
        self.scaler.load_state_dict(self.scale)
        train_step = self.step(rate)
        batches = self.loader.micro_batches(evaluated - steps, evaluated + 1)
        for done, step in enumerate(range(evaluated - steps, evaluated), start=1):
            set_learning_rate(train_step.optimizer, rate * done / steps)
            train_step(step, batches)
        loss, _ = train_step.accumulate(evaluated, batches)
        return float(sum_over_ranks(loss)) / world_size()


def run_find_lr(config: Config, device: torch.device, words: Sequence[str]) -> Found:
    """``--find-lr``: try rates, draw the losses and say how to go on. The run itself is not touched.

    Args:
        words: of the command line.

    Raises:
        AgreedError: no rate lowers the loss.
    """
    given = config.TRAIN.BASE_LR
    trials = Trials(config, device)
    loader, run = trials.loader, total_steps(config, trials.loader.calendar)
    steps = min(max(int(SHARE * run / TRIALS) - 1, FEWEST), MOST)
    scale = rate_scale(config, loader.calendar.global_batch_at(0))
    with agreement():
        log = RunLog(output_dir(config), config, "find_lr")
    if config.DATA.ON_BAD_IMAGE == "skip":
        loader.on_bad_image = log.bad_image
    with log, naming_dead_workers(), naming_out_of_memory():
        for line in filter(None, [*config.notes, *trials.notes]):
            log.message(line)
        weights = f"the weights of {config.MODEL.PRETRAINED}" if config.MODEL.PRETRAINED else "random weights"
        log.message(f"{steps:,} steps with each rate, from {weights}, on the same images; the run has {run:,} steps")
        trials.fit()

        def try_out(rate: float) -> float:
            bar.doing("trying rates", f"{rate:.1e}")
            loss = trials.loss_after(steps, rate, evaluated=steps)
            log.message(f"TRAIN.BASE_LR {rate / scale:.2e}  rate {rate:.2e}  loss {loss:.4f}")
            return loss

        bar.doing("computing the first loss")
        found = search(try_out, given * scale, trials.loss_after(0, 0.0, evaluated=steps))
        taken = 1 + len(found.losses) * (steps + 1)
        log.message(f"that took {taken:,} steps, {100 * taken / run:.1f} % of the run's")
        if is_main():
            rows = (
                (f"{rate / scale:.6g}", f"{rate:.6g}", f"{found.losses[rate]:.6g}") for rate in sorted(found.losses)
            )
            log.keep_whole("find_lr.csv", csv_of(["base_lr", "learning_rate", "loss"], rows))
            log.keep_whole("find_lr.png", draw(found, scale, given))
        log.message(f"losses in {log.folder / 'find_lr.csv'}, drawn in {log.folder / 'find_lr.png'}")
        for line in advise(config, found, scale, words):
            log.message(line)
    return found


def search(try_out: Callable[[float], float], given: float, start: float) -> Found:
    """Find the rate with the lowest loss: by tenfold steps from the given one, then around the best of these.

    Args:
        try_out: computes the loss after a trial with a rate.
        given: the rate to begin at.
        start: the loss before any step.

    Raises:
        AgreedError: no rate lowers the loss.
    """
    losses: dict[float, float] = {}

    def loss(rate: float) -> float:
        if rate not in losses:
            found = try_out(rate) if SMALLEST <= rate <= LARGEST else math.inf
            losses[rate] = found if math.isfinite(found) else math.inf
        return losses[rate]

    def is_better(rate: float, than: float) -> bool:
        too_small = rate > than and abs(start - loss(than)) < NOTHING_HAPPENS * abs(start)
        diverged = rate < than and loss(than) >= start
        return SMALLEST <= rate <= LARGEST and (too_small or diverged or loss(rate) < loss(than))

    best = given
    for factor in (COARSE, 1 / COARSE):
        while is_better(best * factor, best):
            best *= factor
    loss(best * FINE), loss(best / FINE)
    losses = {rate: found for rate, found in losses.items() if SMALLEST <= rate <= LARGEST}
    best = min(losses, key=losses.__getitem__)
    if not losses[best] < start:
        raise AgreedError(
            f"no rate from {min(losses):.1e} to {max(losses):.1e} lowers the loss of {start:.4f} in a trial: are the "
            "labels right? Else set the rate by hand"
        )
    return Found(losses, start, valley(losses, best, start))


def valley(losses: dict[float, float], best: float, start: float) -> float:
    """Find the bottom of the parabola over the logarithm of the rate, through the best one and those beside it."""
    below, above = (min(losses, key=lambda rate: abs(math.log(rate / (best * factor)))) for factor in (1 / FINE, FINE))
    if not below < best < above:
        return best
    left, middle, right = (min(losses[rate], start) for rate in (below, best, above))
    curvature = left - 2 * middle + right
    return best * FINE ** (0.5 * (left - right) / curvature) if curvature > 0 else best


def rounded(number: float) -> float:
    """To two digits."""
    return float(f"{number:.1e}")


def advise(config: Config, found: Found, scale: float, words: Sequence[str]) -> list[str]:
    """Say in lines which rate to take, why, and by which command."""
    train, base_lr = config.TRAIN, rounded(found.rate / scale)
    too_large = [rate for rate, loss in found.losses.items() if loss >= found.start and rate > found.rate]
    least = min(found.losses.values())
    why = f"the loss has fallen most, from {found.start:.4f} to {least:.4f}, around this rate"
    why += f", and from {min(too_large) / scale:.1e} on it grows" if too_large else ""
    given = found.rate / scale / train.BASE_LR
    near = f"; TRAIN.BASE_LR {train.BASE_LR:g}, as given, is within a factor of 3 of it" if 1 / 3 <= given <= 3 else ""
    settings = ["TRAIN.BASE_LR", f"{base_lr:g}"]
    for name in SCALED:
        if train[name]:
            settings += [f"TRAIN.{name}", f"{rounded(train[name] * base_lr / train.BASE_LR):g}"]
    rest = [word for word in words if word != "--find-lr"]
    alone = world_size() == 1 and not is_torchrun()
    command = "the same command without --find-lr" if not alone else f"python main.py {shlex.join(rest)}"
    added = f"--opts {' '.join(settings)}"
    return [
        f"suggested: TRAIN.BASE_LR {base_lr:g}: {why}{near}",
        f"to go on: {command} {'' if alone else 'and with '}{added}",
    ]


def draw(found: Found, scale: float, given: float) -> bytes:
    """Draw the losses over TRAIN.BASE_LR, with the given one and the suggestion, as PNG."""
    rates = sorted(found.losses)
    top = found.start + 0.5 * (found.start - min(found.losses.values()))
    with pyplot() as plt:
        figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
        axis.set_xscale("log")
        shown = [min(found.losses[rate], top) for rate in rates]  # what lies above the picture is drawn at its edge
        axis.plot([rate / scale for rate in rates], shown, "o-", color="#3b82f6")
        axis.axhline(found.start, color="#64748b", linestyle="--", label="before any step")
        axis.axvline(given, color="#64748b", linestyle=":", label=f"as given: {given:g}")
        suggested = rounded(found.rate / scale)
        axis.axvline(suggested, color="#f97316", label=f"suggested: {suggested:g}")
        axis.xaxis.set_major_formatter(lambda rate, _: f"{rate:.0e}")
        axis.xaxis.set_minor_formatter("")
        axis.set_xlabel("TRAIN.BASE_LR")
        axis.set_ylabel("training loss after a trial")
        axis.legend()
        figure.savefig(out := io.BytesIO(), format="png", dpi=110)
        plt.close(figure)
    return out.getvalue()
