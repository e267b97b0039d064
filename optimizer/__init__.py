"""Parameter groups and the optimizer."""

from optimizer.build import (
    build_optimizer,
    check_optimizer,
    describe_waiting,
    parameter_groups,
    set_learning_rate,
)
from optimizer.schedule_free import averages, averages_by_itself
from optimizer.skipping import step_if

__all__ = [
    "averages",
    "averages_by_itself",
    "build_optimizer",
    "check_optimizer",
    "describe_waiting",
    "parameter_groups",
    "set_learning_rate",
    "step_if",
]
