"""From bytes on disk to batches on the device."""

from data.build import build_loaders
from data.mixing import build_mixing

__all__ = ["build_loaders", "build_mixing"]
