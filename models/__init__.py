"""The networks. Importing this package registers every CrossFormer variant with timm."""

from models import crossformer
from models.build import build_model
from models.weights import load_weights

__all__ = ["build_model", "crossformer", "load_weights"]
