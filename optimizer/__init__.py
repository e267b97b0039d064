"""Parameter groups and the optimizer."""

from optimizer.build import (
    build_optimizer,
    check_optimizer,
    describe_optimizer,
    parameter_groups,
    set_learning_rate,
)
from optimizer.schedule_free import COUNTERS, averages, averages_by_itself
from optimizer.skipping import step_if

__all__ = [
    "COUNTERS",
    "averages",
    "averages_by_itself",
    "build_optimizer",
    "check_optimizer",
    "describe_optimizer",
    "parameter_groups",
    "set_learning_rate",
    "step_if",
]
