"""Heads for dense tasks, on any backbone of timm's. Pure torch; published files load as they are."""

from models.heads.boxes import paste
from models.heads.detector import DETECTORS, Detector, create_detector
from models.heads.fixed import FixedDetector, largest_differences
from models.heads.published import from_published
from models.heads.segmenter import HEADS, AtImageSize, Segmenter, create_segmenter

__all__ = [
    "DETECTORS",
    "HEADS",
    "AtImageSize",
    "Detector",
    "FixedDetector",
    "Segmenter",
    "create_detector",
    "create_segmenter",
    "from_published",
    "largest_differences",
    "paste",
]
