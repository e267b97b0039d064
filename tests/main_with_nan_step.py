"""``main.py`` whose last rank finds, in the eleventh step, a loss that is not a number."""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from engine.step import TrainStep  # noqa: E402
from utils.distributed import rank, world_size  # noqa: E402

accumulate = TrainStep.accumulate


def accumulate_or_spoil(self, step, micro_batches):
    loss_of = type(self.task).loss.__get__(self.task)
    spoilt = float("nan") if step == 10 and rank() == world_size() - 1 else 1.0
    self.task.loss = lambda *given: (lambda loss, terms: (loss * spoilt, terms))(*loss_of(*given))
    return accumulate(self, step, micro_batches)


TrainStep.accumulate = accumulate_or_spoil  # type: ignore[method-assign]
runpy.run_path(str(ROOT / "main.py"), run_name="__main__")
