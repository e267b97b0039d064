"""CrossFormer and CrossFormer++ for timm: importing this package registers every variant.

It needs nothing else of this project; ``pip install .`` installs it as ``crossformer``.
"""

from .network import CROSSFORMERPP, VARIANTS, CrossFormer, checkpoint_filter_fn

__all__ = ["CROSSFORMERPP", "VARIANTS", "CrossFormer", "checkpoint_filter_fn"]
