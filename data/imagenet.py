"""ImageNet-1k as its authors distribute it: ``ILSVRC2012_img_train.tar``, ``ILSVRC2012_img_val.tar`` and the devkit."""

import io
import os
import re
import tarfile
from pathlib import Path
from typing import IO, cast

from scipy.io import loadmat

from data.archive import Members
from data.files import check_is_file, is_image
from data.index import Layout, Scan
from data.tar import TarIndex, members_once, open_tar
from utils.errors import UserError
from utils.files import reason_of

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKITS = ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12.tar")
MAX_DEVKIT_FILE = 2**26


class OfficialTrainLayout(Layout):
    """A tar of one tar for each class, named after it; nothing is unpacked."""

    index_class = TarIndex

    def __init__(self, root: Path):
        self.root, self.name, self.archives = root, "train-official", [root / TRAIN]

    def scan(self) -> Scan:
        members, path = Members(self.root, self.archives), self.root / TRAIN
        with open_tar(path) as file:
            for _, inner in list(members_once(file, path, lambda name: True, members.left_out)):
                if not inner.name.endswith(".tar"):
                    raise UserError(
                        f"{path}:{inner.name} is not the tar of a class; a tar of images is named otherwise"
                    )
                begin, end = inner.offset_data, inner.offset_data + inner.size
                name = Path(inner.name).stem
                before = len(members.names)
                for image_name, image in members_once(file, path, is_image, members.left_out, begin, end):
                    members.add(name, image_name, 0, image.offset_data, image.size)
                if len(members.names) == before:
                    raise UserError(f"{path}:{inner.name} holds no image; get the archive again")
        if not members.names:
            raise UserError(f"{path} is empty; get it again")
        return members.scan(sorted(members.classes))


class OfficialValLayout(Layout):
    """A tar of images; which class each is of is written in the devkit."""

    index_class = TarIndex

    def __init__(self, root: Path):
        self.root, self.name, self.archives = root, "val-official", [root / VAL]

    def classes(self, cache_dir: str) -> list[str]:
        return sorted(read_devkit(self.root)[0].values())

    def scan(self) -> Scan:
        members, path = Members(self.root, self.archives), self.root / VAL
        synsets, truth, devkit = read_devkit(self.root)
        found: set[int] = set()
        with open_tar(path) as file:
            for name_in_tar, image in members_once(file, path, is_image, members.left_out):
                name = Path(name_in_tar).name
                number = re.search(r"_(\d+)\.[^.]*$", name)
                if not number or not 1 <= int(number[1]) <= len(truth):
                    raise UserError(
                        f"{devkit} has no class for {path}:{image.name}; get the devkit of ILSVRC2012 (t12)"
                    )
                if int(number[1]) in found:
                    raise UserError(f"{path} holds image number {number[1]} twice, the second time as {image.name}")
                found.add(int(number[1]))
                members.add(synsets[truth[int(number[1]) - 1]], name, 0, image.offset_data, image.size)
        if len(members.names) != len(truth):
            raise UserError(
                f"{path} holds {len(members.names):,} images, but {devkit} has the classes of {len(truth):,}"
            )
        return members.scan(sorted(synsets.values()), devkit)


def read_devkit(root: Path) -> tuple[dict[int, str], list[int], Path]:
    """Read WordNet ids by ILSVRC2012_ID, the ILSVRC2012_ID of each validation image, and the devkit's path.

    The ids number the classes in another order than the one that all trained models use, which is that of the sorted
    WordNet ids.
    """
    path = next((root / name for name in DEVKITS if os.path.lexists(root / name)), None)
    if path is None:
        raise UserError(
            f"{root} has {VAL} but no {DEVKITS[0]}, which tells the classes of its images; put the devkit beside it"
        )
    meta = truth = None
    check_is_file(path)
    try:
        with tarfile.open(path) as devkit:
            for member in devkit:
                name = Path(member.name).name
                if name not in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt") or not member.isreg():
                    continue
                if member.size > MAX_DEVKIT_FILE:
                    raise ValueError(f"{name} is too large")
                content = cast(IO[bytes], devkit.extractfile(member)).read()
                if name == "meta.mat":
                    meta = content
                else:
                    truth = [int(line) for line in content.split()]
        if meta is None or not truth:
            raise ValueError(f"it has no {'meta.mat' if meta is None else 'ground truth'}")
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True, struct_as_record=True)["synsets"]
        leaves = synsets[synsets["num_children"] == 0]  # inner nodes of the WordNet tree are no classes
        wordnet_ids = {int(leaf["ILSVRC2012_ID"]): str(leaf["WNID"]) for leaf in leaves}
        if unknown := set(truth) - set(wordnet_ids):
            raise ValueError(f"its ground truth names a class {min(unknown)} that meta.mat does not have")
    except Exception as error:  # three modules that fail in arbitrary ways on arbitrary bytes
        reason = f"{reason_of(error).rstrip(':')}; get the devkit of ILSVRC2012 (t12) again"
        raise UserError(f"{path} cannot be used: {reason}") from error
    return wordnet_ids, truth, path
