"""Heads for dense tasks, on any backbone of timm's. Pure torch; published files load as they are."""

from models.heads.segmenter import HEADS, AtImageSize, Segmenter, create_segmenter

__all__ = ["HEADS", "AtImageSize", "Segmenter", "create_segmenter"]
