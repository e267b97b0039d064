"""Where a run begins: with random weights, with those of a file, or where an earlier run of the same name stopped."""

from pathlib import Path
from typing import Any

from config import Config, output_dir
from data.loading import TrainLoader
from data.phases import PhasedLoader
from engine.checkpoints import Checkpoints
from engine.state import TrainState, check_resumable, images_of_a_process, step_after
from lr_scheduler import Schedule, total_steps
from models.pretrained import locate
from tasks import Task
from utils import checkpoint
from utils.bar import bar
from utils.distributed import agreement, from_main, is_main
from utils.errors import UserError


def start_or_resume(
    config,
    task: Task,
    state: TrainState,
    checkpoints: Checkpoints,
    loader: TrainLoader | PhasedLoader,
    schedule: Schedule,
) -> list[str]:
    """Give ``state`` its first weights, or all that an earlier run has saved; returns lines that say which.

    The run's own last checkpoint goes before MODEL.RESUME, so that the same command again carries on. A collective.
    """
    lines: list[str] = []
    path = None
    with agreement():
        if is_main() and config.TRAIN.AUTO_RESUME:
            path, lines = checkpoints.newest()
    path, lines = from_main((path, lines))
    for key in ("RESUME", "PRETRAINED") if path is not None else ():
        if config.MODEL[key]:
            lines.append(f"MODEL.{key} {config.MODEL[key]} is not used, for this run has begun; else choose a --tag")
    carried_on = path or config.MODEL.RESUME
    if carried_on:
        source, content = read_on_main(str(carried_on), config.MODEL.NAME)
        with agreement():
            lines += resume(config, task, state, content, Path(source), loader, schedule)
        return lines + look_after_files(config, state, checkpoints, loader)
    if config.MODEL.PRETRAINED:
        source, content = read_on_main(config.MODEL.PRETRAINED, config.MODEL.NAME)
        with agreement():
            lines += task.start_from(state.model, content, source)
            if state.ema:
                state.ema.set(state.model)
        return lines
    return [*lines, "starting from random weights"]


def read_on_main(source: str, name: str) -> tuple[str, dict[str, Any]]:
    """The path and the content of a checkpoint, which rank 0 alone reads and hands to the others. A collective.

    Args:
        source, name: see :func:`models.pretrained.locate`.
    """
    found = None
    with agreement():
        if is_main():
            bar.doing("reading the checkpoint")
            path = locate(source, name)
            found = path, checkpoint.read(path)
    return from_main(found)


def look_after_files(
    config: Config, state: TrainState, checkpoints: Checkpoints, loader: TrainLoader | PhasedLoader
) -> list[str]:
    """See that the files exist of which the state of a run speaks that is carried on; returns lines that say more."""
    before = state.best
    lines: list[str] = []
    if is_main():
        state.best, lines = checkpoints.know_best(before, state.carried.get("owed_best"))
        if config.TRAIN.KEEP_EVERY_EPOCHS and state.carried.get("global_batch") == loader.global_batch:
            checkpoints.keep_missing(config.TRAIN.KEEP_EVERY_EPOCHS, loader.calendar)
    state.best, lines = from_main((state.best, lines))
    if state.best < before:
        state.evaluated_step = min(state.evaluated_step, state.step - 1)  # these weights may be the best
    return lines


def resume(
    config,
    task: Task,
    state: TrainState,
    content: dict[str, Any],
    path: Path,
    loader: TrainLoader | PhasedLoader,
    schedule: Schedule,
) -> list[str]:
    """Be where the run that saved ``content`` in ``path`` was; returns lines that say so."""
    own = path.resolve().parent == (output_dir(config) / "checkpoints").resolve()
    changed = check_resumable(content, path, config, len(loader.dataset), own)
    task.check(content, str(path))
    state.restore(content, path)
    before, now = content["global_batch"], loader.global_batch
    state.step = step_after(content, loader.calendar, path)
    lines = [f"carrying on from {path} after step {state.step:,}", *changed]
    if before != now:
        state.evaluated_step = min(state.evaluated_step, state.step)
        lines.append(f"the global batch was {before}, is now {now}: step {content['step']:,} is now {state.step:,}")
        if images_of_a_process(content["config"]) != images_of_a_process(config.dump()):  # not just more processes
            changed.append(lines[-1])
    steps = total_steps(config, loader.calendar)
    if changed and state.step >= steps and state.evaluated_step >= state.step:
        raise UserError(
            f"{path} is of a run that is done: nothing is left to train with other settings ({'; '.join(changed)}); "
            "start anew with another --tag, or give it more TRAIN.EPOCHS (or TRAIN.STEPS)"
        )
    if changed and state.step < steps:
        rates = [group["lr"] / group.get("lr_scale", 1.0) for group in content["optimizer"]["param_groups"]]
        lines.append(f"the learning rate goes on from {max(rates):.2e} to {schedule(state.step):.2e}")
    return lines
