"""What a run says: to a person on the terminal, and to files in its results folder."""

import json
import math
import os
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from utils.distributed import is_main
from utils.errors import UserError
from utils.names import printable


class RunLog:
    """The log of one run; only rank 0 writes it.

    A terminal shows a live bar; a file or a pipe gets one plain line each time. The results folder holds ``log.txt``,
    ``metrics.jsonl`` and, for training, ``tensorboard/``. What the last two say of steps after ``first_step`` (from
    before a restart) is removed, so that the curves of a resumed run are those of an uninterrupted one.

    Args:
        folder: results folder; it is made.
        config: written to the folder, to be used with ``--cfg`` again.
        mode: ``train``, ``evaluate`` or ``throughput``.
        total_steps: steps of the whole run.
        steps_per_epoch: of them, in each epoch.
        first_step: steps that are done already.
        evaluated_step: the last of them whose evaluation is done.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        config,
        mode: str,
        total_steps: int = 0,
        steps_per_epoch: int = 1,
        first_step: int = 0,
        evaluated_step: int = 0,
    ):
        self.folder = folder
        self.total_steps = total_steps
        self.epochs = total_steps // steps_per_epoch
        self.first_step = first_step
        self._start = time.perf_counter()
        self._text = self._metrics = self._tensorboard = self._wandb = self._bar = None
        if not is_main():
            return
        try:
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            name = "config.yaml" if mode == "train" else f"config_{mode}.yaml"
            (folder / name).write_text(config.dump(), encoding="utf-8")
            self._text = open(folder / "log.txt", "a", encoding="utf-8")
            if mode == "train":
                forget_after(folder / "metrics.jsonl", first_step, evaluated_step)
            self._metrics = open(folder / "metrics.jsonl", "a", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"results folder {folder} cannot be written: {error.strerror}; choose another --output"
            ) from error
        if mode == "train":
            from torch.utils.tensorboard import SummaryWriter  # takes a second to load: rank 0 of training only

            self._tensorboard = SummaryWriter(folder / "tensorboard", purge_step=first_step + 1)
            if config.LOG.WANDB:
                from utils.wandb_run import start_wandb

                self._wandb = start_wandb(folder, config, first_step)
            if sys.stdout.isatty():
                self._bar = _progress_bar()
                self._task = self._bar.add_task("starting", total=total_steps, completed=first_step, facts="")
                self._bar.start()

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def message(self, text: str) -> None:
        """A line for the person who watches."""
        if is_main():
            self._say(text)

    def bad_image(self, line: str) -> None:
        """An image was skipped; every rank notes it in ``skipped_images.txt``, rank 0 says it too."""
        with suppress(OSError):  # training goes on; hosts that share no OUTPUT have no folder there yet
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / "skipped_images.txt", "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{printable(line)}\n")
        if is_main():
            self._say(f"skipped image {line}")

    def advance(self, step: int) -> None:
        """``step`` steps are done. Moves the bar; does not wait for the device."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    def train(self, step: int, values: dict[str, Any]) -> None:
        """The means since the last line."""
        if not is_main():
            return
        self._write_metrics({"event": "train", "step": step, **values})
        self._add_to_curves("train", values, ("loss", "lr", "grad_norm", "images_per_second", "data_wait"), step)
        left = (time.perf_counter() - self._start) / (step - self.first_step) * (self.total_steps - step)
        skipped = f"  {values['skipped_images']:,} images skipped" if values["skipped_images"] else ""
        skipped += f"  {values['skipped_steps']:,} steps skipped" if values["skipped_steps"] else ""
        facts = (
            f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  grad {values['grad_norm']:.2f}  "
            f"{values['images_per_second']:,.0f} images/s  data wait {100 * values['data_wait']:.1f} %  "
            f"{values['memory_bytes'] / 1e9:.1f} GB{skipped}"
        )
        epoch = f"epoch {values['epoch']:>{len(str(self.epochs))}}/{self.epochs}"
        line = f"{epoch}  step {step:,}/{self.total_steps:,}  {facts}  {timedelta(seconds=round(left))} left"
        if self._bar:
            self._bar.update(self._task, description=epoch, facts=facts)
            self._text.write(f"{time.strftime('%F %T')}  {line}\n")
            self._text.flush()
        else:
            self._say(line)

    def evaluation(self, values: dict[str, Any], note: str, **more: Any) -> None:
        """The result of an evaluation; ``note`` goes to the person, ``more`` to metrics.jsonl."""
        if not is_main():
            return
        self._write_metrics({"event": "eval", **values, **more})
        self._add_to_curves(values["weights"], values, ("top1", "top5", "loss"), values["step"])
        epoch = f" {values['epoch']:>{len(str(self.epochs))}}/{self.epochs}" if self.epochs else ""
        ema = "  EMA" if values["weights"] == "ema" else ""
        self._say(
            f"eval {epoch}{ema}  top-1 {values['top1']:.2f}  top-5 {values['top5']:.2f}  loss {values['loss']:.4f}  "
            f"{values['images']:,} images  {note}"
        )

    def close(self) -> None:
        """Finish the bar and the files."""
        if self._bar:
            self._bar.stop()
        for file in (self._text, self._metrics, self._tensorboard):
            if file:
                file.close()
        if self._wandb:
            self._wandb.finish()

    def _say(self, text: str) -> None:
        text = printable(text)  # the name of a file or class may hold anything
        if self._bar:
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, flush=True)
        self._text.write(f"{time.strftime('%F %T')}  {text}\n")
        self._text.flush()

    def _add_to_curves(self, group: str, values: dict[str, Any], names: Iterable[str], step: int) -> None:
        curves = {f"{group}/{name}": values[name] for name in names}
        if self._tensorboard:
            for name, value in curves.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log({**curves, "step": step})

    def _write_metrics(self, values: dict[str, Any]) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._metrics.write(json.dumps(finite) + "\n")
        self._metrics.flush()


def forget_after(metrics: Path, step: int, evaluated_step: int) -> None:
    """Remove the lines of a run about later steps than these of training and evaluation, and one that was cut short."""
    if not metrics.exists():
        return
    kept = []
    for line in metrics.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue
        last = evaluated_step if values["event"] == "eval" else step
        if "checkpoint" in values or values["step"] <= last:
            kept.append(line)
    temporary = metrics.with_name(f".{metrics.name}.writing")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, metrics)


def _progress_bar():
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.table import Column

    facts = Column(ratio=1, overflow="fold")  # wraps on a narrow terminal, so that nothing is cut off
    return Progress(
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=10),
        TaskProgressColumn(),
        TextColumn("{task.fields[facts]}", table_column=facts),
        TimeRemainingColumn(),
        TextColumn("left"),
        expand=True,
    )
