"""The networks; reference.py is the one to read first. Importing this package registers every variant with timm."""

from models import crossformer
from models.build import build_model, left_out
from models.weights import load_weights

__all__ = ["build_model", "crossformer", "left_out", "load_weights"]
