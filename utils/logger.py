"""What a run says: to a person on the terminal, and to files in its results folder."""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from utils.bar import Fact, bar, share_done
from utils.calendar import Calendar
from utils.distributed import is_main, world_size
from utils.errors import UserError
from utils.files import Appender, Unwritten, WholeFile, reason_of, write_whole
from utils.lock import Lock
from utils.names import printable
from utils.settings import Section, flatten


class RunLog:
    """The log of one run; only rank 0 writes it.

    A terminal shows a live bar; a file or a pipe gets one plain line each time. The results folder holds ``log.txt``,
    ``metrics.jsonl`` and, for training, ``tensorboard/``. What the last two say of steps after ``first_step`` (from
    before a restart) is removed, so that the curves of a resumed run are those of an uninterrupted one.

    What cannot be written is kept and tried again with the next line; leaving the log raises if something is missing.

    Args:
        folder: results folder; it is made.
        config: written to the folder, to be used with ``--cfg`` again.
        mode: ``train``, ``evaluate``, ``find_lr`` or ``throughput``.
        total_steps: steps of the whole run.
        calendar: their epochs.
        first_step: steps that are done already.
        evaluated_step: the last of them whose evaluation is done.
        owed: what :meth:`owed` said when these steps were saved.
        lock: of the folder, for training.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        config,
        mode: str,
        total_steps: int = 0,
        calendar: Calendar | None = None,
        first_step: int = 0,
        evaluated_step: int = 0,
        owed: Mapping[str, str] | None = None,
        lock: Lock | None = None,
    ):
        self.folder = folder
        self.total_steps = total_steps
        self.epochs = calendar.epoch_of(total_steps - 1)[0] + 1 if calendar and total_steps else 0
        self.first_step = first_step
        self.unwritten = Unwritten(self.message if is_main() else print)
        self._start = time.perf_counter()
        self._lock = lock or Lock(folder)
        self._wandb = None
        self._facts: list[Fact] = []
        self._growing: dict[str, Any] = {}  # Appenders; "tensorboard" is an EventFile
        self._whole: list[WholeFile] = []
        if not is_main():
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mend_last_line(folder / "log.txt")
            lost_from, lines = forget_after(folder / "metrics.jsonl", first_step, evaluated_step, mode == "train")
        except OSError as error:
            raise UserError(
                f"results folder {folder} cannot be written: {reason_of(error)}; choose another --output"
            ) from error
        for name in ("log.txt", "metrics.jsonl"):
            self._growing[name] = Appender(folder / name, self.unwritten)
        if mode == "train":
            from utils.event_file import EventFile  # takes a second to load: rank 0 of training only

            purge_step = int(min(first_step + 1, lost_from))
            self._growing["tensorboard"] = EventFile(folder / "tensorboard", purge_step, self.unwritten)
        for name, records in (owed or {}).items():
            self._growing.setdefault(name, Appender(folder / name, self.unwritten)).add(records.encode("latin-1"))
        if mode == "train":
            for values in lines:
                if "checkpoint" not in values and values["event"] != "start" and values["step"] >= purge_step:
                    self._add_to_event_file(values)
            self._growing["tensorboard"].text("config", config.dump())
            self._growing["tensorboard"].settings(unusual(config))
            began = {"event": "start", "step": first_step, "processes": world_size(), "time": int(time.time())}
            self.append("metrics.jsonl", json.dumps(began))
            if config.LOG.WANDB:
                from utils.wandb_run import start_wandb

                self._wandb = start_wandb(folder, config, first_step, self.keep_whole)
        self.keep_whole("config.yaml" if mode == "train" else f"config_{mode}.yaml", config.dump())

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *error) -> None:
        self.close()
        if error[0] is None:
            self.unwritten.check()

    def message(self, text: str) -> None:
        """A line for the person who watches."""
        if is_main():
            self._say(text)

    def bad_image(self, line: str) -> None:
        """An image was skipped; every rank notes it in ``skipped_images.txt``, rank 0 says it too."""
        self.append("skipped_images.txt", printable(line))
        if is_main():
            self._say(f"skipped image {line}")

    def append(self, name: str, line: str) -> None:
        """Add a line to another file of the results folder."""
        if name not in self._growing:
            self._growing[name] = Appender(self.folder / name, self.unwritten)
        self._growing[name].add(f"{line}\n".encode(errors="backslashreplace"))

    def owed(self) -> dict[str, str]:
        """What could not be written so far and has to be saved elsewhere, for the run that carries on from there."""
        for file in self._whole:
            file.write()
        for growing in self._growing.values():
            growing.flush()
        waiting = {name: file.waiting() for name, file in self._growing.items()}
        return {name: records.decode("latin-1") for name, records in waiting.items() if records}

    def advance(self, step: int) -> None:
        """``step`` steps are done. Moves the bar; does not wait for the device."""
        if bar.is_live:
            bar.show([*share_done(step, self.total_steps, "steps"), *self._facts])

    def train(self, step: int, values: dict[str, Any], terms: Sequence[str] = ()) -> None:
        """Log the means since the last line; ``terms`` names those that the loss is made of."""
        if not is_main():
            return
        self._add_metrics({"event": "train", "step": step, **values})
        seconds = (time.perf_counter() - self._start) / (step - self.first_step) * (self.total_steps - step)
        facts = [
            Fact(f"loss {values['loss']:.4f}", 2),
            *(Fact(f"{name} {values[name]:.4f}", 7) for name in terms),
            Fact(f"lr {values['lr']:.2e}", 8),
            Fact(f"grad {values['grad_norm']:.2f}", 10),
            Fact(f"{values['images_per_second']:,.0f} images/s", 5),
            Fact(f"data wait {100 * values['data_wait']:.1f} %", 6),
            Fact(f"{values['memory_bytes'] / 1e9:.1f} GB", 9),
        ]
        skipped = {"images": values["skipped_images"], "steps": values["skipped_steps"]}
        facts += [Fact(f"{count:,} {what} skipped", 2) for what, count in skipped.items() if count]
        epoch = Fact(f"epoch {values['epoch']:>{len(str(self.epochs))}}/{self.epochs}", 4)
        left = Fact(f"{timedelta(seconds=round(seconds))} left", 1)
        self._facts = [epoch, *facts, left]
        self.advance(step)
        line = "  ".join(fact.text for fact in (epoch, Fact(f"step {step:,}/{self.total_steps:,}", 0), *facts, left))
        (self._note if bar.is_live else self._say)(line)

    def evaluation(self, values: dict[str, Any], text: str, **more: Any) -> None:
        """Log the result of an evaluation; ``text`` goes to the person, ``more`` to metrics.jsonl."""
        if not is_main():
            return
        self._add_metrics({"event": "eval", **values, **more})
        epoch = f" {values['epoch']:>{len(str(self.epochs))}}/{self.epochs}" if self.epochs else ""
        ema = "  EMA" if values["weights"] == "ema" else ""
        self._say(f"eval {epoch}{ema}  {text}")

    def pictures(self, pictures: Mapping[str, bytes], step: int) -> None:
        """Show PNG files in TensorBoard."""
        if "tensorboard" in self._growing and pictures:
            self._growing["tensorboard"].pictures(pictures, step)

    def close(self) -> None:
        """Remove the bar, and finish what is not written yet."""
        bar.stop()
        self.owed()
        if self._wandb:
            self._wandb.finish()

    def _say(self, text: str) -> None:
        text = printable(text)  # the name of a file or class may hold anything
        bar.say(text)
        self._note(text)

    def _note(self, text: str) -> None:
        self.append("log.txt", f"{time.strftime('%F %T')}  {text}")

    def keep_whole(self, name: str, content: str | bytes) -> None:
        """Write a small file of the results folder, and again when it is removed."""
        data = content.encode() if isinstance(content, str) else content
        self._whole.append(WholeFile(self.folder / name, data, self.unwritten))

    def _add_metrics(self, values: dict[str, Any]) -> None:
        self._lock.check()
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        finite["time"] = int(time.time())
        self.append("metrics.jsonl", json.dumps(finite))
        self._add_to_event_file(values)
        if self._wandb:
            try:
                self._wandb.log({**curves_of(values), "step": values["step"]})
            except OSError as error:
                self.unwritten.give_up(self.folder / "wandb", f"curves could not be written: {reason_of(error)}")

    def _add_to_event_file(self, values: dict[str, Any]) -> None:
        if "tensorboard" in self._growing:
            self._growing["tensorboard"].scalars(curves_of(values), values["step"])


def unusual(config: Section) -> dict[str, Any]:
    """The settings that are not at their defaults, by their keys."""
    defaults = type(config).settings()
    return {key: value for key, value in flatten(config).items() if value != defaults[key].default}


OF_THE_MACHINE = {"images_per_second", "data_wait", "memory_bytes", "skipped_images", "skipped_steps"}
OF_WEIGHTS = {"model": "val", "ema": "val_ema"}


def curves_of(values: dict[str, Any]) -> dict[str, float]:
    """Give the points of a line of ``metrics.jsonl`` by the names of their curves: train/, val/, val_ema/, system/."""
    group = "train" if values["event"] == "train" else OF_WEIGHTS[values["weights"]]
    curves = {f"system/{name}": float(values[name]) for name in OF_THE_MACHINE & values.keys()}
    for name, value in values.items():
        if isinstance(value, float | None) and name not in OF_THE_MACHINE:
            curves[f"{group}/{name}"] = math.nan if value is None else value
    return curves


def forget_after(metrics: Path, step: int, evaluated_step: int, forget: bool = True) -> tuple[float, list[dict]]:
    """Remove the lines of a run about later steps than these of training and evaluation, and one that was cut short.

    Returns:
        the first step of an evaluation that was removed (infinite for none), and the lines that are left.
    """
    first_lost, kept = math.inf, []
    left: list[dict] = []
    if not forget or not metrics.exists():
        return first_lost, left
    with open(metrics, "rb") as file:
        lines = file.read().splitlines(keepends=True)
        for line in lines:
            try:
                values = json.loads(line)
                is_evaluation = values["event"] == "eval"
                keep = "checkpoint" in values or (values["event"] == "start" and step > 0)
                keep = keep or values["step"] <= (evaluated_step if is_evaluation else step)
            except (ValueError, KeyError, TypeError):
                continue
            if keep:
                kept.append(line if line.endswith(b"\n") else line + b"\n")
                left.append(values)
            elif is_evaluation:
                first_lost = min(first_lost, values["step"])
        if kept != lines:
            write_whole(metrics, b"".join(kept))
            late = file.read()  # an evaluation of another process may have added its line meanwhile
            if late:
                with open(metrics, "ab") as now:
                    now.write(late)
    return first_lost, left


def mend_last_line(path: Path) -> None:
    """End a line of a text file that a kill has cut short, so that the next one begins a line."""
    if not path.exists() or not path.stat().st_size:
        return
    with open(path, "rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
