"""Training. The loop in :func:`train` reads from top to bottom like the algorithm."""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from config import output_dir
from data import build_loaders, build_mixing
from engine.evaluate import check_classes, evaluate
from engine.model import compile_in_place, giga_macs, prepare_model, share_gradients
from engine.precision import Precision, choose_precision
from engine.state import Checkpoints, TrainState, check_resumable
from lr_scheduler import build_scheduler
from models import load_weights
from optimizer import build_optimizer
from utils import checkpoint
from utils.distributed import agreement, from_main, is_main, rank, sum_over_ranks, world_size
from utils.errors import UserError
from utils.logger import RunLog
from utils.meters import DeviceMeters, Stopwatch, peak_memory_bytes
from utils.randomness import seed_everything


def train(config, device: torch.device) -> None:
    """Train for TRAIN.EPOCHS, from the start or from where an earlier run of the same name stopped."""
    with agreement():
        loaders = build_loaders(config, device)
        loader, steps_per_epoch = loaders.train, loaders.train.steps_per_epoch
        precision = choose_precision(config, device)
        model = prepare_model(config, len(loaders.classes), device)
        gmac = giga_macs(model, config.DATA.IMG_SIZE, device)
        mix = build_mixing(config, len(loaders.classes))
        state = TrainState(model, build_optimizer(config, model), precision.scaler(), build_ema(config, model))
        schedule = build_scheduler(config, steps_per_epoch, loader.global_batch)
        checkpoints = Checkpoints(output_dir(config) / "checkpoints")
        started_from = start_or_resume(config, state, checkpoints, loaders)
        total_steps = config.TRAIN.EPOCHS * steps_per_epoch
        log = RunLog(output_dir(config), config, "train", total_steps, steps_per_epoch, first_step=state.step)
    log.message(describe(config, model, gmac, precision, loaders))
    log.message(started_from)
    if config.DATA.ON_BAD_IMAGE == "skip":
        loader.on_bad_image = loaders.val.on_bad_image = log.bad_image

    criterion = build_criterion(config, mix is not None)
    if mix is None:
        mix = leave_unmixed
    compile_in_place(config, model)
    trained_model = share_gradients(model, device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    max_norm = config.TRAIN.CLIP_GRAD or float("inf")
    accumulation = config.TRAIN.ACCUMULATION_STEPS
    meters, stopwatch = DeviceMeters(), Stopwatch()

    model.train()
    batches = timed(loader.micro_batches(state.step, total_steps), stopwatch)
    for step in range(state.step, total_steps):
        learning_rate = schedule(step)
        set_learning_rate(state.optimizer, learning_rate)
        step_loss = torch.zeros((), device=device)
        for micro_step in range(accumulation):
            images, targets, _ = next(batches)
            seed_everything(device, config.SEED, "step", step, micro_step, rank())  # nothing random is ever stored
            images, targets = mix(images, targets)
            with sync_gradients(trained_model, on=micro_step == accumulation - 1):
                with precision.autocast():
                    loss = criterion(trained_model(images), targets) / accumulation
                state.scaler.scale(loss).backward()
            step_loss += loss.detach()
        state.scaler.unscale_(state.optimizer)
        grad_norm = clip_grad_norm_(parameters, max_norm)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        if state.ema:
            state.ema.update(model, step=step + 1)
        state.step = step + 1
        meters.add(loss=step_loss, grad_norm=grad_norm)  # stays on the device
        stopwatch.images(loader.global_batch)
        log.advance(state.step)

        epoch, end_of_epoch = step // steps_per_epoch + 1, state.step % steps_per_epoch == 0
        if end_of_epoch or state.step % config.PRINT_FREQ == 0:  # the only place that waits for the device
            values = {"epoch": epoch, "lr": learning_rate, **meters.read(), **stopwatch.read()}
            values["memory_bytes"] = peak_memory_bytes(device)
            values["skipped_images"] = int(sum_over_ranks(torch.tensor(loader.skipped)))
            log.train(state.step, values)
            stop_if_not_finite(values["loss"], state.step, checkpoints)
        if end_of_epoch and (epoch % config.TRAIN.EVAL_EVERY_EPOCHS == 0 or epoch == config.TRAIN.EPOCHS):
            evaluate_and_keep_best(state, loaders, precision, epoch, log, checkpoints)
            stopwatch.restart()
        save_every = config.TRAIN.SAVE_EVERY_STEPS
        if is_main() and (end_of_epoch or (save_every and state.step % save_every == 0)):
            facts = {"global_batch": loader.global_batch, "steps_per_epoch": steps_per_epoch}
            checkpoints.save_last(
                {**state.content(), **facts, "epoch": epoch, "classes": loaders.classes, "config": config.dump()}
            )
    log.message(f"done: best top-1 {state.best_top1:.2f}  results in {output_dir(config)}")
    log.close()


def build_criterion(config, soft_targets: bool) -> nn.Module:
    """Cross entropy with label smoothing; mixed targets carry the smoothing already."""
    if soft_targets:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(config.MODEL.LABEL_SMOOTHING)


def build_ema(config, model: nn.Module) -> ModelEmaV3 | None:
    """The moving average of the weights, its decay a function of the step."""
    if not config.TRAIN.EMA_DECAY:
        return None
    return ModelEmaV3(model, decay=config.TRAIN.EMA_DECAY, use_warmup=config.TRAIN.EMA_WARMUP)


def start_or_resume(config, state: TrainState, checkpoints: Checkpoints, loaders) -> str:
    """Give ``state`` its first weights, or all that an earlier run has saved; returns a line that says which.

    The run's own last checkpoint goes before MODEL.RESUME, so that the same command again carries on.
    """
    newest = checkpoints.newest() if is_main() and config.TRAIN.AUTO_RESUME else None
    path, damaged = from_main((newest[1], newest[2]) if newest else (None, []))
    if path is None and config.MODEL.RESUME:
        path = Path(config.MODEL.RESUME)
    if path is not None:
        content = newest[0] if newest else checkpoint.read(path)
        check_resumable(content, path, loaders.train.global_batch, loaders.train.steps_per_epoch)
        check_classes(content, loaders.classes, str(path))
        state.restore(content, path)
        warning = "".join(f"{line}; using the one before it. " for line in damaged)
        return f"{warning}carrying on from {path} after step {state.step:,}"
    if config.MODEL.PRETRAINED:
        path = config.MODEL.PRETRAINED
        weights = checkpoint.state_dict_of(checkpoint.read(path), path)
        loaded = load_weights(state.model, weights, path, keep_trunk_only=True)
        if state.ema:
            state.ema.set(state.model)
        head = "the head too"
        if loaded.new_head:
            had = f"{loaded.classes_in_file} classes" if loaded.classes_in_file else "no head"
            head = f"the head is new ({had} in the file, {len(loaders.classes)} in the data)"
        return f"starting from {path}: {loaded.matched} weights matched, {head}"
    return "starting from random weights"


def describe(config, model: nn.Module, gmac: float, precision: Precision, loaders) -> str:
    """The first line of a run."""
    device = precision.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    parameters = sum(p.numel() for p in model.parameters())
    images, classes = len(loaders.train.dataset), len(loaders.classes)
    return (
        f"{config.MODEL.NAME}  {parameters / 1e6:.1f} M parameters  {gmac:.3g} GMAC at {config.DATA.IMG_SIZE}  "
        f"{precision.name}  {world_size()} x {name}  global batch {loaders.train.global_batch:,}  "
        f"{images:,} images of {classes:,} classes  run {output_dir(config)}"
    )


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """Let the next step of all parameter groups use this rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def sync_gradients(model: nn.Module, on: bool):
    """A context whose backward pass averages gradients over the ranks, or leaves that to a later one."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not on else nullcontext()


def leave_unmixed(images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What to do with a batch when neither mixup nor cutmix is on."""
    return images, targets


def timed(batches: Iterator, stopwatch: Stopwatch) -> Iterator:
    """The same batches; the time spent waiting for each goes to the stopwatch."""
    while True:
        start = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        stopwatch.waited(time.perf_counter() - start)
        yield batch


def stop_if_not_finite(loss: float, step: int, checkpoints: Checkpoints) -> None:
    """End a run whose weights are lost."""
    if loss != loss or abs(loss) == float("inf"):
        raise UserError(
            f"the loss is {loss} at step {step}: lower TRAIN.BASE_LR, or try AMP none; "
            f"the weights before may be in {checkpoints.best}"
        )


def evaluate_and_keep_best(
    state: TrainState, loaders, precision: Precision, epoch: int, log: RunLog, checkpoints: Checkpoints
) -> None:
    """Evaluate the weights, and their moving average where there is one; keep what beats the best so far."""
    candidates = {"model": state.model, **({"ema": state.ema.module} if state.ema else {})}
    for weights, model in candidates.items():
        result = evaluate(model, loaders.val, precision)
        is_best = result["top1"] > state.best_top1
        if is_best:
            state.best_top1 = result["top1"]
            if is_main():
                checkpoints.save_best(
                    {
                        "model": model.state_dict(),
                        "weights": weights,
                        "step": state.step,
                        "epoch": epoch,
                        "classes": loaders.classes,
                        **result,
                    }
                )
        best = f"best {state.best_top1:.2f}" + (f" -> {checkpoints.best}" if is_best else "")
        log.evaluation({"step": state.step, "epoch": epoch, "weights": weights, **result}, best)
