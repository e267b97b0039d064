"""Which of the known layouts a data set of images with label maps has."""

from pathlib import Path

from data.index import Layout
from data.layouts import tars_in
from data.pair_tar import TarPairLayout
from data.pairs import as_cityscapes, as_voc, in_folders

EXPECTED = (
    "images/{split} with masks/{split} (or {split} with masks/{split}), ADE20K's images/training with "
    "annotations/training, Cityscapes' leftImg8bit/{split} with gtFine/{split}, Pascal VOC's JPEGImages with "
    "SegmentationClass, or {split}/*.tar of prepare_imagenet.py"
)


def find_pair_layout(root: Path, split: str) -> Layout | None:
    """Find out how ``split`` (train or val) of the pairs in ``root`` is kept; None where nothing of it is there."""
    for find in (as_cityscapes, as_voc, in_folders, in_tars):
        if layout := find(root, split):
            return layout
    return None


def in_tars(root: Path, split: str) -> TarPairLayout | None:
    """Tar files in the split's folder."""
    archives = tars_in(root / split)
    return TarPairLayout(root, split, archives) if archives else None
