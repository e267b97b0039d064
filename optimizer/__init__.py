"""Parameter groups and the optimizer."""

from optimizer.build import build_optimizer, parameter_groups, set_learning_rate

__all__ = ["build_optimizer", "parameter_groups", "set_learning_rate"]
