"""From bytes on disk to batches on the device."""

from data.build import build_eval_loader, build_train_loader, fingerprint
from data.dataset import Sample
from data.loading import Batch
from data.mixing import build_mixing

__all__ = ["Batch", "Sample", "build_eval_loader", "build_mixing", "build_train_loader", "fingerprint"]
