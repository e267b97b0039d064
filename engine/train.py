"""Training. The loop in :func:`take_steps` reads from top to bottom like the algorithm."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from config import output_dir
from data import Loaders, build_loaders, build_mixing, fingerprint
from data.loading import TrainLoader, naming_dead_workers
from engine.checkpoints import Checkpoints
from engine.ema import Ema
from engine.evaluate import build_views, check_classes, describe_turned, evaluate
from engine.memory import naming_out_of_memory, parts_that_fit
from engine.model import (
    begin_step,
    check_smallest_batch,
    compile_in_place,
    describe_gmac,
    giga_macs,
    prepare_model,
    set_training_mode,
    share_gradients,
)
from engine.precision import Precision, choose_precision
from engine.skipping import SkippedSteps, bad_batch
from engine.state import TrainState, check_resumable, images_of_a_process, step_after
from engine.stopping import PATIENCE_SECONDS, Stopped, StopRequest
from engine.trained import as_ids, named_classes
from lr_scheduler import Schedule, build_scheduler
from models import left_out, load_weights
from optimizer import build_optimizer
from utils import checkpoint
from utils.bulletin import Bulletin
from utils.compat import skips_by_itself, tell_found_inf
from utils.distributed import (
    AgreedError,
    agreement,
    from_main,
    is_main,
    largest_over_ranks,
    rank,
    sum_over_ranks,
    world_size,
)
from utils.errors import UserError
from utils.files import remove_temporaries
from utils.image_size import height_and_width
from utils.lock import Lock, hold
from utils.logger import RunLog
from utils.meters import DeviceMeters, SpikeDetector, Stopwatch, peak_memory_bytes
from utils.randomness import seed_everything
from utils.watchdog import Watchdog

RESCUE_SECONDS = 60
"""So long a GPU may take to hand over the state; then what hangs is the GPU."""


def train(config, device: torch.device, stop: StopRequest | None = None) -> None:
    """Train for TRAIN.EPOCHS, from the start or from where an earlier run of the same name stopped.

    Raises:
        Stopped: ``stop`` has asked for it; everything is saved.
    """
    stop, folder = stop or StopRequest(), output_dir(config)
    with Bulletin(stop) as bulletin, hold(folder) as lock:
        if is_main():
            remove_temporaries(folder, folder / "checkpoints")
        train_in_folder(config, device, lock, stop, bulletin)


def train_in_folder(config, device: torch.device, lock: Lock, stop: StopRequest, bulletin: Bulletin) -> None:
    """The same, for the one who holds the results folder."""
    with agreement():
        loaders = build_loaders(config, device)
        steps_per_epoch, global_batch = loaders.train.steps_per_epoch, loaders.train.global_batch
        precision = choose_precision(config, device)
        model = prepare_model(config, len(loaders.classes), device)
        gmac = giga_macs(model, config.DATA.IMG_SIZE, device)
        check_smallest_batch(config, model, config.DATA.BATCH_SIZE)
        mix = build_mixing(config, len(loaders.classes))
        state = TrainState(model, build_optimizer(config, model), precision.scaler(), build_ema(config, model))
        schedule = build_scheduler(config, steps_per_epoch, global_batch)
        checkpoints = Checkpoints(
            output_dir(config) / "checkpoints", config.TRAIN.KEEP_LAST, config.TRAIN.SAVE_EVERY_MINUTES, lock.check
        )
    check_same_data(loaders.train.dataset.index)
    started_from = start_or_resume(config, state, checkpoints, loaders, schedule)
    with agreement():
        total_steps = config.TRAIN.EPOCHS * steps_per_epoch
        done = (state.step, state.evaluated_step, state.carried.get("owed"))
        log = RunLog(output_dir(config), config, "train", total_steps, steps_per_epoch, *done, lock)
    with log, checkpoints:
        log.message(describe(config, model, gmac, precision, loaders))
        for line in filter(None, [lock.note, *left_out(config), loaders.left_out(), *started_from]):
            log.message(line)
        if config.DATA.ON_BAD_IMAGE == "skip":
            loaders.train.on_bad_image = loaders.val.on_bad_image = log.bad_image
        checkpoints.unwritten = log.unwritten
        compile_in_place(config, model)
        with naming_dead_workers(), naming_out_of_memory():
            parts = parts_of_a_batch(config, state.model, precision)
            if parts > 1:
                log.message(
                    f"micro-batches of {config.DATA.BATCH_SIZE} are computed in {parts} parts, for want of memory"
                )
            with Watchdog(config.TRAIN.HANG_MINUTES, bulletin, output_dir(config)) as watchdog:
                try:
                    take_steps(
                        config, state, loaders, schedule, mix, precision, parts, checkpoints, stop, watchdog, log
                    )
                    checkpoints.finish()
                except Stopped:
                    stop.answer()
                    checkpoints.finish()
                    log.message(stopped_after(state.step, stop))
                    log.unwritten.check()
                    raise
                except Exception as error:
                    if world_size() > 1 and not isinstance(error, AgreedError):
                        stop.outlast(error)  # it may come of another rank's end; the folder is still ours
                    raise
        log.message(f"done: best top-1 {state.best_top1:.2f}  results in {output_dir(config)}")


def stopped_after(step: int, stop: StopRequest) -> str:
    """The last line of a run that a signal has ended."""
    return f"stopped by {stop.name} after step {step:,}; the same command carries on from there"


def take_steps(
    config,
    state: TrainState,
    loaders: Loaders,
    schedule: Schedule,
    mix: Callable | None,
    precision: Precision,
    parts: int,
    checkpoints: Checkpoints,
    stop: StopRequest,
    watchdog: Watchdog,
    log: RunLog,
) -> None:
    """The training loop, from ``state.step`` to the end, or until somebody asks it to stop."""
    loader, device = loaders.train, precision.device
    steps_per_epoch, total_steps = loader.steps_per_epoch, config.TRAIN.EPOCHS * loader.steps_per_epoch
    accumulation, save_every = config.TRAIN.ACCUMULATION_STEPS, config.TRAIN.SAVE_EVERY_STEPS
    criterion = build_criterion(config, soft_targets=mix is not None)
    model = share_gradients(state.model, device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    max_norm = config.TRAIN.CLIP_GRAD or float("inf")
    meters, spikes, stopwatch, skipped = DeviceMeters(), SpikeDetector(), Stopwatch(), SkippedSteps(device)

    def evaluation_due(step: int) -> bool:
        epoch, steps_into_epoch = divmod(step, steps_per_epoch)
        return not steps_into_epoch and (epoch % config.TRAIN.EVAL_EVERY_EPOCHS == 0 or step == total_steps)

    def save() -> None:
        counts = {"meters": meters.content(), "skipped_images": skipped_images(loader)}
        if is_main():
            checkpoints.wait()  # here, where a signal finds the state free, and not with it held
            with state.changing:
                write_last(state.content(), counts)

    def write_last(content: dict, counts: dict) -> None:
        facts = {"global_batch": loader.global_batch, "images": len(loader.dataset), "classes": loaders.classes}
        epoch, steps_into_epoch = divmod(state.step, steps_per_epoch)
        keep_every = config.TRAIN.KEEP_EVERY_EPOCHS
        keep = epoch if keep_every and not steps_into_epoch and epoch and epoch % keep_every == 0 else None
        facts |= {"epoch": epoch, "config": config.dump(), "skipped": skipped.content(), "owed": log.owed()}
        checkpoints.save_last({**content, **counts, **facts}, keep)

    def rescue() -> str:
        """Save from another thread, while the main one is stuck in the middle of a step."""
        if not is_main():
            return ""
        if not state.changing.acquire(timeout=PATIENCE_SECONDS) or not state.whole:
            checkpoints.finish()
            return stop.describe()
        given_up = threading.Timer(RESCUE_SECONDS, stop.leave, (1, f"error: {stop.name}: the GPU does not answer"))
        given_up.start()
        with state.on_another_stream():
            # The other ranks cannot be asked now
            counts = {"meters": meters.content(of_all=False), "skipped_images": loader.skipped}
            write_last(state.content_before_step(), counts)
        given_up.cancel()
        checkpoints.finish()
        return stopped_after(state.step, stop)

    def say_and_close(text: str) -> None:
        log.message(text)
        log.close()

    def evaluate_and_save() -> None:
        with stop.at_once():  # the state is saved already
            evaluate_and_keep_best(config, state, loaders, precision, state.step // steps_per_epoch, log, checkpoints)
        save()
        watchdog.beat(state.step)

    meters.restore(state.carried.get("meters") or {}, device)
    skipped.restore(state.carried.get("skipped") or {})
    loader.skipped = state.carried.get("skipped_images", 0) * is_main()
    set_learning_rate(state.optimizer, schedule(max(state.step - 1, 0)))  # that of the last step, as it was
    stop.rescue, stop.say = rescue, say_and_close
    if evaluation_due(state.step) and state.evaluated_step < state.step:
        evaluate_and_save()  # an earlier run stopped between a save and its evaluation
    elif state.carried.get("owed") or state.carried.get("owed_best"):
        save()  # what could not be written then has a file now
    set_training_mode(model)
    batches = timed(loader.micro_batches(state.step, total_steps), stopwatch, watchdog)
    stop.defer()
    for step in range(state.step, total_steps):
        learning_rate = schedule(step)
        set_learning_rate(state.optimizer, learning_rate)
        state.begin_step()
        step_loss = torch.zeros((), device=device)
        begin_step(state.model)
        for micro_step in range(accumulation):
            images, targets = next(batches)
            seed_everything(device, config.SEED, "step", step, micro_step, rank())  # nothing random is ever stored
            if mix is not None:
                images, targets = mix(images, targets)
            for part, (x, y) in enumerate(zip(images.tensor_split(parts), targets.tensor_split(parts), strict=True), 1):
                share = len(x) / len(images) / accumulation
                with sync_gradients(model, on=micro_step == accumulation - 1 and part == parts):
                    with precision.autocast():
                        loss = criterion(model(x), y) * share
                    state.scaler.scale(loss).backward()
                step_loss += loss.detach()
        with state.changing:
            state.whole = False
            grad_norm, finite = update_weights(state.optimizer, state.scaler, parameters, max_norm)
            if state.ema:
                state.ema.update(state.model, step + 1, finite)
            skipped.add(finite)  # these two stay on the device
            meters.add(finite, loss=step_loss, grad_norm=grad_norm)
            state.finish_step()
        stopwatch.images(loader.global_batch)
        log.advance(state.step)
        watchdog.beat(state.step)

        end_of_epoch = state.step % steps_per_epoch == 0
        log_due = end_of_epoch or state.step % config.PRINT_FREQ == 0
        save_due = end_of_epoch or (save_every and state.step % save_every == 0)
        save_due = save_due or (log_due and largest_over_ranks(int(is_main() and checkpoints.due())))
        if log_due:  # only here and before a save is the device waited for
            values = {"epoch": step // steps_per_epoch + 1, "lr": learning_rate, **meters.read(), **stopwatch.read()}
            values["memory_bytes"] = peak_memory_bytes(device)
            values["skipped_images"] = skipped_images(loader)
            values["skipped_steps"] = skipped.total()
            log.train(state.step, values)
            if spikes.is_spike(values["loss"]):
                log.message(f"warning: the loss has jumped to {values['loss']:.4f} at step {state.step:,}")
            if skipped.longest() >= config.TRAIN.MAX_SKIPPED_STEPS:
                stop_for_good(config, state, loader, step_loss, checkpoints, log)
        if save_due:
            save()
        if state.step == steps_per_epoch and (line := describe_turned(loader, config)):
            log.message(line)
        if evaluation_due(state.step):
            evaluate_and_save()
            stopwatch.restart()
        if stop.agreed():
            save()
            raise Stopped(stop)
    stop.settle()


def skipped_images(loader: TrainLoader) -> int:
    """How many all ranks have skipped so far. A collective."""
    return int(sum_over_ranks(torch.tensor(loader.skipped)))


def parts_of_a_batch(config, model: nn.Module, precision: Precision) -> int:
    """Into how many parts TRAIN.AUTO_MICRO_BATCH cuts a micro-batch, tried out on an empty one."""
    if not config.TRAIN.AUTO_MICRO_BATCH:
        return 1
    criterion, size = build_criterion(config, soft_targets=False), height_and_width(config.DATA.IMG_SIZE)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]  # BatchNorm must not take note of it

    def train_on(count: int) -> None:
        check_smallest_batch(config, model, count)
        images = torch.zeros(count, 3, *size, device=precision.device)
        targets = torch.zeros(count, dtype=torch.long, device=precision.device)
        try:
            with precision.autocast():
                loss = criterion(model(images.contiguous(memory_format=torch.channels_last)), targets)
            loss.backward()
        finally:
            model.zero_grad()
            for buffer, before in buffers:
                buffer.copy_(before)

    return parts_that_fit(train_on, config.DATA.BATCH_SIZE)


def check_same_data(images) -> None:
    """Every rank must have the same images, or they would share one order of different things. A collective."""
    mine = fingerprint(images)
    first = from_main(mine)
    with agreement():
        if mine != first:
            raise UserError(f"rank {rank()} has other data than rank 0: {mine} there, {first} here; copy it anew")


def build_criterion(config, soft_targets: bool) -> nn.Module:
    """Cross entropy with label smoothing; mixed targets carry the smoothing already."""
    if soft_targets:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(config.MODEL.LABEL_SMOOTHING)


def build_ema(config, model: nn.Module) -> Ema | None:
    """The moving average of the weights, its decay a function of the step."""
    if not config.TRAIN.EMA_DECAY:
        return None
    return Ema(model, decay=config.TRAIN.EMA_DECAY, use_warmup=config.TRAIN.EMA_WARMUP)


def start_or_resume(
    config, state: TrainState, checkpoints: Checkpoints, loaders: Loaders, schedule: Schedule
) -> list[str]:
    """Give ``state`` its first weights, or all that an earlier run has saved; returns lines that say which.

    The run's own last checkpoint goes before MODEL.RESUME, so that the same command again carries on.
    """
    lines: list[str] = []
    path = None
    with agreement():
        if is_main() and config.TRAIN.AUTO_RESUME:
            path, lines = checkpoints.newest()
    path, lines = from_main((path, lines))
    with agreement():
        for key in ("RESUME", "PRETRAINED") if path is not None else ():
            if config.MODEL[key]:
                lines.append(
                    f"MODEL.{key} {config.MODEL[key]} is not used, for this run has begun; else choose a --tag"
                )
        path = path or config.MODEL.RESUME
        if path:
            lines += resume(config, state, Path(path), loaders, schedule)
        elif config.MODEL.PRETRAINED:
            lines += start_from_pretrained(config, state, loaders.classes)
        else:
            lines.append("starting from random weights")
    if path:
        lines += look_after_files(config, state, checkpoints, loaders)
    return lines


def look_after_files(config, state: TrainState, checkpoints: Checkpoints, loaders: Loaders) -> list[str]:
    """See that the files exist of which the state of a run speaks that is carried on; returns lines that say more."""
    before, lines = state.best_top1, []
    if is_main():
        state.best_top1, lines = checkpoints.know_best(before, state.carried.get("owed_best"))
        if config.TRAIN.KEEP_EVERY_EPOCHS and state.carried.get("global_batch") == loaders.train.global_batch:
            checkpoints.keep_missing(config.TRAIN.KEEP_EVERY_EPOCHS, loaders.train.steps_per_epoch)
    state.best_top1, lines = from_main((state.best_top1, lines))
    if state.best_top1 < before:
        state.evaluated_step = min(state.evaluated_step, state.step - 1)  # these weights may be the best
    return lines


def resume(config, state: TrainState, path: Path, loaders: Loaders, schedule: Schedule) -> list[str]:
    """Be where the run that saved ``path`` was; returns lines that say so."""
    content = checkpoint.read(path)
    own = path.resolve().parent == (output_dir(config) / "checkpoints").resolve()
    changed = check_resumable(content, path, config, len(loaders.train.dataset), own)
    check_classes(content, loaders.classes, str(path))
    state.restore(content, path)
    before, now = content["global_batch"], loaders.train.global_batch
    state.step = step_after(content, now, loaders.train.steps_per_epoch)
    lines = [f"carrying on from {path} after step {state.step:,}", *changed]
    if before != now:
        state.evaluated_step = min(state.evaluated_step, state.step)
        lines.append(f"the global batch was {before}, is now {now}: step {content['step']:,} is now {state.step:,}")
        if images_of_a_process(content["config"]) != images_of_a_process(config.dump()):  # not just more processes
            changed.append(lines[-1])
    total_steps = config.TRAIN.EPOCHS * loaders.train.steps_per_epoch
    if changed and state.step >= total_steps and state.evaluated_step >= state.step:
        raise UserError(
            f"{path} is of a run that is done: nothing is left to train with other settings ({'; '.join(changed)}); "
            "start anew with another --tag, or give it more TRAIN.EPOCHS"
        )
    if changed and state.step < total_steps:
        rates = [group["lr"] / group.get("lr_scale", 1.0) for group in content["optimizer"]["param_groups"]]
        lines.append(f"the learning rate goes on from {max(rates):.2e} to {schedule(state.step):.2e}")
    return lines


def start_from_pretrained(config, state: TrainState, classes: list[str]) -> list[str]:
    """Begin with the weights in a file, and a new head where the classes differ; returns lines that say so."""
    path = config.MODEL.PRETRAINED
    content = checkpoint.read(path)
    which, weights = checkpoint.choose(checkpoint.weights_in(content, path), config.MODEL.WEIGHTS, path)
    loaded = load_weights(state.model, weights, path, allow_new_head=True)
    if state.ema:
        state.ema.set(state.model)
    head = "the head too"
    if loaded.new_head:
        had = f"{loaded.classes_in_file} classes" if loaded.classes_in_file else "no head"
        head = f"the head is new ({had} in the file, {len(classes)} in the data)"
    elif (named := named_classes(content, None, path) or classes) and classes not in (named, as_ids(named)):
        head = "the head too, although its classes are others or in another order"
    average = ", of the moving average in it" if which == "ema" else ""
    return [f"starting from {path}{average}: {loaded.matched} weights matched, {head}", *loaded.notes]


def describe(config, model: nn.Module, gmac: float, precision: Precision, loaders: Loaders) -> str:
    """The first line of a run."""
    device = precision.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    parameters = sum(p.numel() for p in model.parameters())
    images, classes = len(loaders.train.dataset), len(loaders.classes)
    return (
        f"{config.MODEL.NAME}  {parameters / 1e6:.1f} M parameters  {describe_gmac(gmac, config.DATA.IMG_SIZE)}  "
        f"{precision.name}  {world_size()} x {name}  global batch {loaders.train.global_batch:,}  "
        f"{images:,} images of {classes:,} classes  "
        f"augmented {'on the GPU' if loaders.augments_on_device else 'by the loader processes'}  "
        f"run {output_dir(config)}"
    )


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """Let the next step use this rate, lower layers a share of it (``TRAIN.LAYER_DECAY``)."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)


def sync_gradients(model: nn.Module, on: bool):
    """A context whose backward pass averages gradients over the ranks, or leaves that to a later one."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not on else nullcontext()


def timed(batches: Iterator, stopwatch: Stopwatch, watchdog: Watchdog) -> Iterator:
    """The same batches; the time spent waiting for each goes to the stopwatch, and the watchdog knows of it."""
    while True:
        start = time.perf_counter()
        watchdog.doing("loading data")
        batch = next(batches, None)
        watchdog.doing("computing")
        if batch is None:
            return
        stopwatch.waited(time.perf_counter() - start)
        yield batch


def update_weights(
    optimizer: Optimizer, scaler: torch.amp.GradScaler, parameters: list[nn.Parameter], max_norm: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clip the gradients, step unless one of them is not finite, and clear them.

    Returns:
        their norm before clipping, and 1 or 0: whether it was finite. Both on the device, which is not waited for.
    """
    scaler.unscale_(optimizer)
    grad_norm = clip_grad_norm_(parameters, max_norm)
    finite = torch.isfinite(grad_norm)
    if skips_by_itself(optimizer):
        tell_found_inf(optimizer, ~finite)
        scaler.step(optimizer)
    elif finite:  # apex's optimizers need the host to decide
        scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return grad_norm, finite.float()


def stop_for_good(
    config, state: TrainState, loader: TrainLoader, loss: torch.Tensor, checkpoints: Checkpoints, log: RunLog
) -> None:
    """End a run whose gradients stay infinite. All ranks have the same gradients, so all of them come here."""
    unwritten = ""
    if is_main():
        log.keep_whole("bad_batch.json", bad_batch(state.step, loader))
        try:
            checkpoints.finish()
        except UserError as error:
            unwritten = f". Besides: {error}"
    raise AgreedError(
        f"{config.TRAIN.MAX_SKIPPED_STEPS} steps in a row had gradients that are not finite, the last of them step "
        f"{state.step:,} (loss {loss.item():.4g}); {log.folder / 'bad_batch.json'} lists its images. The weights are "
        "those from before: lower TRAIN.BASE_LR, warm up longer, or try AMP none, and carry on with --force-resume "
        f"from {checkpoints.last}{unwritten}"
    )


def evaluate_and_keep_best(
    config,
    state: TrainState,
    loaders: Loaders,
    precision: Precision,
    epoch: int,
    log: RunLog,
    checkpoints: Checkpoints,
) -> None:
    """Evaluate the weights, and their moving average where there is one; keep what beats the best so far."""
    state.share_buffers()
    candidates = {"model": state.model, **({"ema": state.ema.module} if state.ema else {})}
    for weights, model in candidates.items():
        result = evaluate(model, loaders.val, precision, build_views(config))
        is_best = result["top1"] > state.best_top1
        if is_best:
            state.best_top1 = result["top1"]
            if is_main():
                content = {
                    "model": model.state_dict(),
                    "weights": weights,
                    "step": state.step,
                    "epoch": epoch,
                    "classes": loaders.classes,
                    "config": config.dump(),
                    **result,
                }
                checkpoints.wait()
                with state.changing:
                    checkpoints.save_best(content)
        best = f"best {state.best_top1:.2f}" + (f" -> {checkpoints.best}" if is_best else "")
        log.evaluation({"step": state.step, "epoch": epoch, "weights": weights, **result}, best)
    state.evaluated_step = state.step
