"""The moving average of the weights."""

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from config import Config
from optimizer import averages
from utils.compat import move_towards
from utils.parallel import local


class Ema(ModelEmaV3):
    """timm's moving average, which a step that was skipped leaves as it is, without the host knowing of the skip."""

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, finite: Tensor) -> None:  # type: ignore[override]
        """Move towards ``model`` after ``step`` steps, if ``finite`` (0-d, 1 or 0) is 1."""
        averages, values = [], []
        for average, value in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True):
            if average.is_floating_point():
                averages.append(local(average))
                values.append(local(value))
            else:
                average.copy_(value)
        move_towards(averages, values, (1 - self.get_decay(step)) * finite)


class ScheduleFreeAverage(Ema):
    """The average that a schedule-free optimizer makes, of its state and of the weights that it trains."""

    def __init__(self, model: nn.Module, optimizer: Optimizer):
        super().__init__(model)
        self.optimizer = optimizer

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, finite: Tensor) -> None:  # type: ignore[override]
        """Be the average after this step; a step that was skipped has changed nothing that it follows from."""
        found = averages(self.optimizer)
        for own, parameter in zip(self.module.parameters(), model.parameters(), strict=True):
            own.copy_(found.get(parameter, parameter))
        for average, buffer in zip(self.module.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)


def build_ema(config: Config, model: nn.Module) -> Ema | None:
    """The moving average of the weights, its decay a function of the step; None without TRAIN.EMA_DECAY."""
    if not config.TRAIN.EMA_DECAY:
        return None
    return Ema(model, decay=config.TRAIN.EMA_DECAY, use_warmup=config.TRAIN.EMA_WARMUP)
