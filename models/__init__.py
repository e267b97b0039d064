"""The networks; reference.py is the one to read first. Importing this package registers every variant with timm."""

from models import crossformer
from models.build import build_detector, build_model, build_segmenter, left_out, set_drop_path_rate
from models.heads import Detector, Segmenter, create_detector, create_segmenter, paste
from models.weights import load_detector, load_segmenter, load_weights

__all__ = [
    "Detector",
    "Segmenter",
    "build_detector",
    "build_model",
    "build_segmenter",
    "create_detector",
    "create_segmenter",
    "crossformer",
    "left_out",
    "load_detector",
    "load_segmenter",
    "load_weights",
    "paste",
    "set_drop_path_rate",
]
