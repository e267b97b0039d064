"""What a run keeps besides its algorithm: what is due, what it counts, logs and saves."""

import threading
import time
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from config import Config
from data.decoding import pictures_of
from data.loading import Batch, describe_turned
from engine.checkpoints import Checkpoints
from engine.curriculum import Curriculum
from engine.evaluate import evaluate
from engine.precision import Precision
from engine.skipping import SkippedSteps, bad_batch
from engine.state import TrainState
from engine.step import StepResult
from engine.stopping import PATIENCE_SECONDS, StopRequest
from lr_scheduler import Schedule, total_steps
from optimizer import set_learning_rate
from tasks import Loaders, Task
from utils import parallel
from utils.bar import bar
from utils.contact_sheet import PER_ROW, draw_rows
from utils.distributed import AgreedError, count_over_ranks, is_main, largest_over_ranks
from utils.errors import UserError
from utils.logger import RunLog
from utils.meters import DeviceMeters, SpikeDetector, Stopwatch, peak_memory_bytes
from utils.randomness import seed_everything
from utils.watchdog import Watchdog

PATIENCE_WITH_SHARDS_SECONDS = 90
"""So long a signal waits for the step where all ranks can save together: one alone has only its share."""
RESCUE_SECONDS = 60
"""So long a GPU may take to hand over the state; then what hangs is the GPU."""


class Run:
    """The parts of a run, and its bookkeeping: nothing here changes what is computed.

    Args:
        schedule: the learning rate of a step.
        curriculum: the phases of the run.
        stop: is told how the state can be saved from another thread.
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        loaders: Loaders,
        state: TrainState,
        schedule: Schedule,
        curriculum: Curriculum,
        precision: Precision,
        checkpoints: Checkpoints,
        log: RunLog,
        stop: StopRequest,
        watchdog: Watchdog,
    ):
        self.config, self.task, self.loader, self.val = config, task, loaders.train, loaders.val
        self.state, self.schedule, self.precision = state, schedule, precision
        self.checkpoints, self.log, self.stop, self.watchdog = checkpoints, log, stop, watchdog
        self.calendar, self.curriculum = self.loader.calendar, curriculum
        self.total_steps = total_steps(config, self.calendar)
        self.meters, self.spikes, self.stopwatch = DeviceMeters(), SpikeDetector(), Stopwatch()
        self.skipped = SkippedSteps(precision.device)

    # ---- what is due after a step

    def _ends_epoch(self) -> bool:
        return self.calendar.ends_epoch(self.state.step)

    def is_done(self) -> bool:
        return self.state.step == self.total_steps

    def is_stalled(self) -> bool:
        """Whether TRAIN.PATIENCE is at an end; says so."""
        patience, waited = self.config.TRAIN.PATIENCE, self.state.evaluations_since_best
        if not patience or waited < patience or self.is_done():
            return False
        self.log.message(
            f"stopped early after step {self.state.step:,}: {waited} evaluations have brought no better "
            f"{self.task.best_title} than {self.state.best:.2f} (TRAIN.PATIENCE {patience})"
        )
        return True

    def log_is_due(self) -> bool:
        return self._ends_epoch() or self.is_done() or self.state.step % self.config.PRINT_FREQ == 0

    def save_is_due(self) -> bool:
        """Whether to save, by steps or by rank 0's clock. A collective when a line of the log is due."""
        every = self.config.TRAIN.SAVE_EVERY_STEPS
        if self._ends_epoch() or self.evaluation_is_due() or (every and self.state.step % every == 0):
            return True
        return self.log_is_due() and bool(largest_over_ranks(int(is_main() and self.checkpoints.due())))

    def evaluation_is_due(self) -> bool:
        train, epoch = self.config.TRAIN, self.calendar.epoch_of(self.state.step)[0]
        if train.EVAL_EVERY_STEPS:
            return self.is_done() or self.state.step % train.EVAL_EVERY_STEPS == 0
        return self.is_done() or (self._ends_epoch() and epoch % train.EVAL_EVERY_EPOCHS == 0)

    # ---- the loop

    def begin(self) -> None:
        """Be as after the last step of the run that is carried on, and do what it still owes."""
        carried, device = self.state.carried, self.precision.device
        self.enter(self.state.step)
        self.meters.restore(carried.get("meters") or {}, device)
        self.skipped.restore(carried.get("skipped") or {})
        self.loader.skipped = carried.get("skipped_images", 0) * is_main()
        set_learning_rate(self.state.optimizer, self.schedule(max(self.state.step - 1, 0)))
        self.stop.rescue, self.stop.say = self.rescue, self._say_and_close
        if self.state.sharded:
            self.stop.patience = PATIENCE_WITH_SHARDS_SECONDS
        if self.evaluation_is_due() and self.state.evaluated_step < self.state.step:
            self.evaluate()  # an earlier run stopped between a save and its evaluation
        elif carried.get("owed") or carried.get("owed_best"):
            self.save()  # what could not be written then has a file now

    def enter(self, step: int) -> None:
        """Let the step be one of its phase, and say so where a phase begins."""
        if line := self.curriculum.enter(step):
            self.log.message(line)

    def batches(self) -> Iterator[Batch]:
        """Yield the micro-batches from the next step on; the time spent waiting for each is noted."""
        batches = self.loader.micro_batches(self.state.step, self.total_steps)
        first, to_show = True, self.state.step == 0 and is_main()
        bar.doing("waiting for the first batch")
        while True:
            start = time.perf_counter()
            self.watchdog.doing("loading data")
            batch = next(batches, None)
            self.watchdog.doing("computing")
            if batch is None:
                return
            self.stopwatch.waited(time.perf_counter() - start)
            if to_show:
                self._show(batch)
            if first:
                bar.doing("compiling the network" if self.config.TRAIN.COMPILE != "none" else "taking the first step")
            first = to_show = False
            yield batch

    def _show(self, batch: Batch) -> None:
        """Draw some images of the first batch as the network sees them."""
        images = batch.images.clone() if isinstance(batch.images, Tensor) else batch.images  # timm mixes in place
        seed_everything(self.precision.device, self.config.SEED, "step", 0, 0, 0)  # as the step will do
        seen = self.task.prepare(batch._replace(images=images)).images[: 2 * PER_ROW]
        pictures = pictures_of(seen, self.config.DATA.MEAN, self.config.DATA.STD)
        rows = {
            f"{i + 1} to {min(i + PER_ROW, len(pictures))}": pictures[i : i + PER_ROW]
            for i in range(0, len(pictures), PER_ROW)
        }
        sheet = draw_rows(rows, [], f"{len(pictures)} images of the first batch, as the network sees them")
        self.log.keep_whole("first_batch.png", sheet)
        self.log.pictures({"first_batch": sheet}, 0)

    def count(self, result: StepResult) -> None:
        """Take note of a step, on the device."""
        self.skipped.add(result.finite)
        self.meters.add(result.finite, loss=result.loss, grad_norm=result.grad_norm, **result.terms)

    def tick(self) -> None:
        """Tell everybody who watches that a step is done."""
        self.stopwatch.images(self.calendar.global_batch_at(self.state.step - 1))
        self.log.advance(self.state.step)
        self.watchdog.beat(self.state.step)

    def log_line(self, learning_rate: float, result: StepResult) -> None:
        """Log the means since the last line. Only here and before a save is the device waited for."""
        step = self.state.step
        values = {
            "epoch": self.calendar.epoch_of(step - 1)[0] + 1,
            "lr": learning_rate,
            **self.meters.read(),
            **self.stopwatch.read(),
            "memory_bytes": peak_memory_bytes(self.precision.device),
            "skipped_images": count_over_ranks(self.loader.skipped),
            "skipped_steps": self.skipped.total(),
        }
        self.log.train(step, values, [*result.terms])
        if self.spikes.is_spike(values["loss"]):
            self.log.message(f"warning: the loss has jumped to {values['loss']:.4f} at step {step:,}")
        if self.skipped.longest() >= self.config.TRAIN.MAX_SKIPPED_STEPS:
            self._give_up(float(result.loss))

    def tell_of_turned(self) -> None:
        """Say how many images are turned, once the first pass over them has shown it."""
        seen = self.state.step == self.calendar.first_step(1)
        if seen and (line := describe_turned(self.loader, self.config.DATA.UPRIGHT)):
            self.log.message(line)

    # ---- saving

    def save(self) -> None:
        """Save all that the run needs to carry on. Every rank must call it; rank 0 writes."""
        counts = {"meters": self.meters.content(), "skipped_images": count_over_ranks(self.loader.skipped)}
        if is_main():
            self.checkpoints.wait()  # here, where a signal finds the state free, and not with it held
        with self.state.changing:
            content = parallel.whole(self.state.content())
            if is_main():
                self._write_last(content, counts)

    def _write_last(self, content: dict[str, Any], counts: dict[str, Any]) -> None:
        epoch, steps_into_epoch = self.calendar.epoch_of(self.state.step)
        every = self.config.TRAIN.KEEP_EVERY_EPOCHS
        keep = epoch if every and not steps_into_epoch and epoch and epoch % every == 0 else None
        facts = {
            "global_batch": self.loader.global_batch,
            "calendar": [list(span) for span in self.calendar.spans],
            "images": len(self.loader.dataset),
            "epoch": epoch,
            "config": self.config.dump(),
            "skipped": self.skipped.content(),
            "owed": self.log.owed(),
        }
        self.checkpoints.save_last({**content, **counts, **facts, **self.task.facts()}, keep)

    def rescue(self) -> str:
        """Save from another thread, while the main one is stuck in the middle of a step; returns the last line."""
        state, stop = self.state, self.stop
        if not is_main():
            return ""
        if state.sharded:  # the other ranks have shares of it
            self.checkpoints.finish()
            return stop.describe()
        if not state.changing.acquire(timeout=PATIENCE_SECONDS) or not state.whole:
            self.checkpoints.finish()
            return stop.describe()
        given_up = threading.Timer(RESCUE_SECONDS, stop.leave, (1, f"error: {stop.name}: the GPU does not answer"))
        given_up.start()
        with state.on_another_stream():
            # The other ranks cannot be asked now
            counts = {"meters": self.meters.content(of_all=False), "skipped_images": self.loader.skipped}
            self._write_last(state.content_before_step(), counts)
        given_up.cancel()
        self.checkpoints.finish()
        return self.stopped()

    def stopped(self) -> str:
        """The last line of a run that a signal has ended."""
        return f"stopped by {self.stop.name} after step {self.state.step:,}; the same command carries on from there"

    def _say_and_close(self, text: str) -> None:
        self.log.message(text)
        self.log.close()

    def _give_up(self, loss: float) -> None:
        """End a run whose gradients stay infinite. All ranks have the same gradients, so all of them come here."""
        unwritten = ""
        if is_main():
            self.log.keep_whole("bad_batch.json", bad_batch(self.state.step, self.loader))
            try:
                self.checkpoints.finish()
            except UserError as error:
                unwritten = f". Besides: {error}"
        raise AgreedError(
            f"{self.config.TRAIN.MAX_SKIPPED_STEPS} steps in a row had gradients that are not finite, the last of them "
            f"step {self.state.step:,} (loss {loss:.4g}); {self.log.folder / 'bad_batch.json'} lists its images. The "
            "weights are those from before: lower TRAIN.BASE_LR, warm up longer, or try AMP none, and carry on with "
            f"--force-resume from {self.checkpoints.last}{unwritten}"
        )

    # ---- evaluation

    def evaluate(self) -> None:
        """Evaluate the weights, and their moving average where there is one; keep what beats the best so far."""
        with self.stop.at_once():  # the state is saved already
            self.state.share_buffers()
            before = self.state.best
            for weights, model in self.state.candidates().items():
                self._evaluate(weights, model)
            self.state.evaluated_step = self.state.step
            self.state.evaluations_since_best = 0 if self.state.best > before else self.state.evaluations_since_best + 1
        self.save()
        self.watchdog.beat(self.state.step)
        self.stopwatch.restart()

    def _evaluate(self, weights: str, model) -> None:
        state, evaluator = self.state, self.task.evaluator()
        with parallel.gathered(model):
            result = evaluate(model, self.val, self.precision, evaluator)
        metric, epoch = self.task.best_is, self.calendar.epoch_of(state.step)[0]
        is_best = result[metric] > state.best
        if is_best:
            state.best = result[metric]
            if is_main():
                self.checkpoints.wait()
            with state.changing:
                network = parallel.whole(model.state_dict())
                if is_main():
                    facts = {"weights": weights, "step": state.step, "epoch": epoch, "config": self.config.dump()}
                    self.checkpoints.save_best({"model": network, **facts, **self.task.facts(), **result})
        best = f"best {state.best:.2f}" + (f" -> {self.checkpoints.best}" if is_best else "")
        values = {"step": state.step, "epoch": epoch, "weights": weights, **result}
        self.log.pictures({f"{weights}/{name}": data for name, data in evaluator.pictures().items()}, state.step)
        self.log.evaluation(values, f"{evaluator.describe(result)}  {best}")
