"""From bytes on disk to batches on the device."""

from data.build import Loaders, build_loaders, fingerprint
from data.mixing import build_mixing

__all__ = ["Loaders", "build_loaders", "build_mixing", "fingerprint"]
