"""Training. The loop in :func:`take_steps` reads from top to bottom like the algorithm."""

from collections.abc import Callable

import torch

from config import Config, output_dir
from data import fingerprint
from data.files import describe_left_out
from data.loading import naming_dead_workers
from engine.checkpoints import Checkpoints
from engine.curriculum import Curriculum
from engine.ema import ScheduleFreeAverage, build_ema
from engine.memory import naming_out_of_memory, parts_that_fit
from engine.model import (
    compile_in_place,
    describe_model,
    giga_macs,
    prepare_model,
    set_training_mode,
)
from engine.precision import choose_precision
from engine.resume import start_or_resume
from engine.run import Run
from engine.state import TrainState
from engine.step import TrainStep
from engine.stopping import Stopped, StopRequest
from engine.teaching import check_teacher, task_with_teacher
from lr_scheduler import build_scheduler, rate_scale, total_steps
from models import left_out
from optimizer import (
    averages_by_itself,
    build_optimizer,
    check_optimizer,
    describe_optimizer,
    set_learning_rate,
)
from tasks import Task, build_task
from utils import parallel
from utils.bar import bar
from utils.bulletin import Bulletin
from utils.distributed import AgreedError, agreement, describe_hosts, from_main, is_main, rank, world_size
from utils.errors import UserError
from utils.files import remove_temporaries
from utils.lock import Lock, hold
from utils.logger import RunLog
from utils.shared_folder import check_shared
from utils.watchdog import Watchdog


def train(
    config: Config,
    device: torch.device,
    stop: StopRequest | None = None,
    choose_task: Callable[..., Task] = build_task,
) -> None:
    """Train for TRAIN.EPOCHS or TRAIN.STEPS, from the start or from where an earlier run of the same name stopped.

    Args:
        choose_task: makes the task of the config and the device.

    Raises:
        Stopped: ``stop`` has asked for it; everything is saved.
    """
    stop, folder = stop or StopRequest(), output_dir(config)
    with Bulletin(stop) as bulletin, hold(folder) as lock:
        if is_main():
            remove_temporaries(folder, folder / "checkpoints")
        train_in_folder(config, device, choose_task, lock, stop, bulletin)


def train_in_folder(
    config, device: torch.device, choose_task: Callable[..., Task], lock: Lock, stop: StopRequest, bulletin: Bulletin
) -> None:
    """Put the run together and train, for the one who holds the results folder."""
    unshared = check_shared(output_dir(config))
    task = task_with_teacher(choose_task, config, device)
    with agreement():
        check_optimizer(config)
        bar.doing("looking through the data")
        loaders = task.train_loaders()
        bar.doing("building the network")
        precision = choose_precision(config, device)
        model = prepare_model(config, task.model, device)
        gmac = giga_macs(model, config.DATA.IMG_SIZE, device)
        curriculum = Curriculum(config, loaders.train.calendar, task, model, None)
        curriculum.check(device)
    check_same_data(loaders.train.dataset.index)
    sharding = parallel.choose_sharding(config.TRAIN.SHARD, device, precision.dtype)
    ema = build_ema(config, model)
    wrapped = parallel.wrap(model, device, config.TRAIN.SYNC_BN, sharding, config.TRAIN.COMPRESS_GRADIENTS)
    if ema and sharding:
        sharding.apply(ema.module)
    with agreement():
        optimizer = build_optimizer(config, model, rate_scale(config, loaders.train.global_batch))
        if averages_by_itself(config.TRAIN.OPTIMIZER.NAME):
            ema = ScheduleFreeAverage(model, optimizer)
        curriculum.ema = ema
        parallel.load_whole(optimizer)
        state = TrainState(model, optimizer, precision.scaler(), ema)
        schedule = build_scheduler(config, loaders.train.calendar)
        checkpoints = Checkpoints(
            output_dir(config) / "checkpoints",
            config.TRAIN.KEEP_LAST,
            config.TRAIN.SAVE_EVERY_MINUTES,
            lock.check,
            task.best_is,
        )
    started_from = start_or_resume(config, task, state, checkpoints, loaders.train, schedule)
    with agreement():
        done = (state.step, state.evaluated_step, state.carried.get("owed"))
        steps = total_steps(config, loaders.train.calendar)
        log = RunLog(output_dir(config), config, "train", steps, loaders.train.calendar, *done, lock)
    with log, checkpoints:
        log.message(
            f"{describe_model(config, model, gmac, precision)}  global batch {loaders.train.global_batch:,}  "
            f"{loaders.described}  run {output_dir(config)}"
        )
        indexes = {"train": loaders.train.dataset.index, "val": loaders.val.dataset.index}
        of_data = describe_left_out(indexes), *loaders.notes
        notes = describe_hosts(), lock.note, unshared, describe_optimizer(config, device), *left_out(config), *of_data
        for line in filter(None, (*notes, *started_from)):
            log.message(line)
        if config.DATA.ON_BAD_IMAGE == "skip":
            loaders.train.on_bad_image = loaders.val.on_bad_image = log.bad_image
        checkpoints.unwritten = log.unwritten
        for network in (*state.candidates().values(), *filter(None, [task.teacher])):
            compile_in_place(config, network)
        with naming_dead_workers(), naming_out_of_memory():
            if task.teacher and state.step == 0:
                log.message(check_teacher(task, loaders.val, precision))
            parts = parts_that_fit(config, task, state, precision) if config.TRAIN.AUTO_MICRO_BATCH else 1
            if parts > 1:
                log.message(
                    f"micro-batches of {config.DATA.BATCH_SIZE} are computed in {parts} parts, for want of memory"
                )
            train_step = TrainStep(
                task,
                wrapped,
                state.optimizer,
                state.scaler,
                precision,
                seed=config.SEED,
                max_norm=config.TRAIN.CLIP_GRAD or float("inf"),
                accumulation=config.TRAIN.ACCUMULATION_STEPS,
                parts=parts,
            )
            with Watchdog(config.TRAIN.HANG_MINUTES, bulletin, output_dir(config)) as watchdog:
                parts_of_run = task, loaders, state, schedule, curriculum, precision, checkpoints, log, stop, watchdog
                run = Run(config, *parts_of_run)
                train_until_done(run, train_step)
        log.message(f"done: best {task.best_title} {state.best:.2f}  results in {output_dir(config)}")


def train_until_done(run: Run, train_step: TrainStep) -> None:
    """Take all steps and see that everything is written, however it ends."""
    try:
        take_steps(run, train_step)
        run.checkpoints.finish()
    except Stopped:
        run.stop.answer()
        run.checkpoints.finish()
        run.log.message(run.stopped())
        run.log.unwritten.check()
        raise
    except Exception as error:
        if world_size() > 1 and not isinstance(error, AgreedError):
            run.stop.outlast(error)  # it may come of another rank's end; the folder is still ours
        raise


def take_steps(run: Run, train_step: TrainStep) -> None:
    """Train from ``state.step`` to the end, or until somebody asks the run to stop."""
    state = run.state
    run.begin()
    set_training_mode(train_step.model)
    batches = run.batches()
    run.stop.defer()
    for step in range(state.step, run.total_steps):
        if run.is_stalled():
            break
        run.enter(step)
        learning_rate = run.schedule(step)
        set_learning_rate(state.optimizer, learning_rate)
        state.begin_step()
        loss, terms = train_step.accumulate(step, batches)
        with state.change():
            result = train_step.update(loss, terms)
            run.count(result)
            state.advance(result.finite)
        run.tick()
        save_is_due = run.save_is_due()
        if run.log_is_due():
            run.log_line(learning_rate, result)
        if save_is_due:
            run.save()
        run.tell_of_turned()
        if run.evaluation_is_due():
            run.evaluate()
        if run.stop.agreed():
            run.save()
            raise Stopped(run.stop)
    run.stop.settle()


def check_same_data(index) -> None:
    """Refuse to train where a rank has other samples, for they share one order. A collective."""
    mine = fingerprint(index)
    first = from_main(mine)
    with agreement():
        if mine != first:
            raise UserError(f"rank {rank()} has other data than rank 0: {mine} there, {first} here; copy it anew")
