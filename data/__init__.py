"""From bytes on disk to batches on the device.

An index (``index``, one for each ``layout``) says which images there are. A task makes a sample of each (``dataset``),
loader processes decode and augment (``decoding``, ``augmentation``), in the order that ``sampling`` derives from the
seed and the step, and a loader (``loading``) brings batches of them to the device. ``build`` puts all this together.
"""

from data.augmentation import build_mixing
from data.build import build_eval_loader, build_train_loader, fingerprint
from data.dataset import Sample
from data.index import Index
from data.loading import Batch
from data.splits import open_images

__all__ = [
    "Batch",
    "Index",
    "Sample",
    "build_eval_loader",
    "build_mixing",
    "build_train_loader",
    "fingerprint",
    "open_images",
]
