"""The networks. Importing this package registers every CrossFormer variant with timm."""

from models import crossformer
from models.build import build_model, left_out
from models.weights import load_weights

__all__ = ["build_model", "crossformer", "left_out", "load_weights"]
