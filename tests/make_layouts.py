"""Builds every layout of a data set from a class-folder tree of train and val."""

import io
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.io import savemat


def classes_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def images_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def as_folder(source: Path, target: Path) -> None:
    shutil.copytree(source, target)


def as_tar(source: Path, target: Path) -> None:
    """One tar a split, made in the folder's own order of files, with the folders as members too."""
    target.mkdir()
    for split in ("train", "val"):
        with tarfile.open(target / f"{split}.tar", "w") as tar:
            tar.add(source / split, arcname=f"./{split}")


def as_shards(source: Path, target: Path) -> None:
    """Three tars a split, the classes mixed, in a folder of the split."""
    for split in ("train", "val"):
        (target / split).mkdir(parents=True)
        for number in range(3):
            with tarfile.open(target / split / f"{split}-{number:05d}.tar", "w") as tar:
                for path in images_of(source / split)[number::3][::-1]:
                    add(tar, str(path.relative_to(source / split)), path.read_bytes())


def as_webdataset(source: Path, target: Path) -> None:
    """Shards of flat names, with the class's number in a .cls file beside each image, and something else."""
    target.mkdir()
    for split, name in (("train", "digits-train-{:04d}.tar"), ("val", "digits-validation-{:04d}.tar")):
        for number in range(2):
            with tarfile.open(target / name.format(number), "w") as tar:
                for path in images_of(source / split)[number::2]:
                    label = classes_of(source / "train").index(path.parent.name)
                    add(tar, f"{path.stem}.json", b"{}")
                    add(tar, f"{path.stem}.cls", f"{label}\n".encode())
                    add(tar, f"{path.stem}.png", path.read_bytes())


def as_zip(source: Path, target: Path, compression: int = zipfile.ZIP_STORED) -> None:
    """What Swin-style trainers read."""
    target.mkdir()
    for split in ("train", "val"):
        lines = []
        with zipfile.ZipFile(target / f"{split}.zip", "w", compression) as archive:
            for path in images_of(source / split)[::-1]:
                label = classes_of(source / "train").index(path.parent.name)
                name = str(path.relative_to(source / split)) if split == "train" else path.name
                archive.write(path, name)
                lines.append(f"{name}\t{label}\n")
        (target / f"{split}_map.txt").write_text("".join(lines))


def as_deflated_zip(source: Path, target: Path) -> None:
    as_zip(source, target, zipfile.ZIP_DEFLATED)


def as_official(source: Path, target: Path) -> None:
    """The archives of ILSVRC2012: a tar of one tar for each class, and a flat one with the devkit for its labels."""
    target.mkdir()
    classes = classes_of(source / "train")
    with tarfile.open(target / "ILSVRC2012_img_train.tar", "w", format=tarfile.GNU_FORMAT) as outer:
        for name in classes[::-1]:
            content = io.BytesIO()
            with tarfile.open(fileobj=content, mode="w", format=tarfile.GNU_FORMAT) as inner:
                for path in images_of(source / "train" / name)[::-1]:
                    add(inner, path.name, path.read_bytes())
            add(outer, f"{name}.tar", content.getvalue())
    with tarfile.open(target / "ILSVRC2012_img_val.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        images = sorted(images_of(source / "val"), key=lambda path: path.name)
        for path in images:
            add(tar, path.name, path.read_bytes())
    write_devkit(target / "ILSVRC2012_devkit_t12.tar.gz", classes, [path.parent.name for path in images])


def write_devkit(path: Path, classes: list[str], of_val_images: list[str]) -> None:
    """ILSVRC2012_ID numbers the classes in an order of its own, and meta.mat holds inner nodes of WordNet too."""
    ids = {name: i + 1 for i, name in enumerate(np.random.RandomState(5).permutation(classes).tolist())}
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height"]
    rows = [(number, name, f"words of {name}", "gloss", 0, [], 0) for name, number in ids.items()]
    rows += [(len(classes) + 1 + i, f"n1{i:07d}", "inner node", "gloss", 2, [1, 2], 3) for i in range(4)]
    synsets = np.array(rows, dtype=[(field, object) for field in fields])[:, None]
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    with tarfile.open(path, "w:gz") as devkit:
        folder = "ILSVRC2012_devkit_t12"
        add(devkit, f"{folder}/readme.txt", b"hello")
        add(devkit, f"{folder}/data/meta.mat", meta.getvalue())
        truth = "".join(f"{ids[name]}\n" for name in of_val_images)
        add(devkit, f"{folder}/data/ILSVRC2012_validation_ground_truth.txt", truth.encode())


LAYOUTS: dict[str, Callable[[Path, Path], None]] = {
    "folder": as_folder,
    "tar": as_tar,
    "shards": as_shards,
    "webdataset": as_webdataset,
    "zip": as_zip,
    "deflated zip": as_deflated_zip,
    "official": as_official,
}
