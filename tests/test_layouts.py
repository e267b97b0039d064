"""Every way to have a data set on disk gives the same images, and every fault in one is named."""

import itertools
import re
import resource
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN, quick
from make_layouts import LAYOUTS, add, as_official, as_tar, as_zip, images_of, write_devkit

from config import build_config
from data.archive import class_and_name
from data.augmentation import build_train_transform
from data.dataset import DecodeAndTransform, ImageDataset
from data.imagenet import read_devkit
from data.splits import open_images
from tasks.classification import Classification
from utils.errors import UserError

CPU = torch.device("cpu")

FILTERED = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.0 to 3.11.3 have none


def config_of(root: Path, *opts):
    small = ("DATA.IMG_SIZE", "32", "DATA.BATCH_SIZE", "10", "DATA.NUM_WORKERS", "0")
    return build_config(opts=["DATA.DATA_PATH", str(root), *small, *map(str, opts)])


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_same_images_from_every_layout(layouts, source, name):
    train, val, classes = open_images(config_of(layouts[name]), training=True)
    expected_classes = sorted(path.name for path in (source / "train").iterdir())
    assert classes == (list("01234") if name == "webdataset" else expected_classes)
    for split, index in (("train", train), ("val", val)):
        expected = images_of(source / split)
        assert len(index) == len(expected)
        for i, path in enumerate(expected):
            data, label = index[i]
            assert data == path.read_bytes()
            assert label == expected_classes.index(path.parent.name)
            assert path.stem in index.name(i)


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "folder"])
def test_the_same_pixels_from_every_layout_and_number_of_workers(layouts, name, workers):
    def batches(name, workers):
        loaders = Classification(config_of(layouts[name], "DATA.NUM_WORKERS", workers), CPU).train_loaders()
        return [*loaders.train.micro_batches(4, 14), *loaders.val]  # epochs 0 to 2

    for a, b in zip(batches("folder", 0), batches(name, workers), strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


def test_official_class_order(layouts, source):
    """Classes are numbered by their sorted WordNet ids, as in every trained model, not by the devkit's own ids."""
    ids, truth, _ = read_devkit(layouts["official"])
    by_id = [ids[number] for number in sorted(ids)]
    assert by_id != sorted(by_id), "the test would not notice"
    assert len(ids) == 5, "inner nodes are no classes"
    for training in (True, False):
        _, val, classes = open_images(config_of(layouts["official"]), training)
        assert classes == sorted(path.name for path in (source / "train").iterdir())
        for i in range(len(val)):
            number = int(re.search(r"val_(\d+)", val.name(i))[1])
            assert classes[val.labels[i]] == ids[truth[number - 1]]


def test_evaluation_needs_no_training_images(layouts, tmp_path):
    for name in ("ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"):
        shutil.copy(layouts["official"] / name, tmp_path)
    _, val, classes = open_images(config_of(tmp_path), training=False)
    assert (len(val), len(classes)) == (23, 5)


def test_a_class_for_each_tar(source, tmp_path):
    """What remains when the official training archive was unpacked once."""
    with tarfile.open(tmp_path / "all.tar", "w"):
        pass
    as_official(source, tmp_path / "official")
    for split in ("train", "val"):
        (tmp_path / "data" / split).mkdir(parents=True)
    with tarfile.open(tmp_path / "official" / "ILSVRC2012_img_train.tar") as outer:
        outer.extractall(tmp_path / "data" / "train", **FILTERED)
    shutil.copytree(source / "val", tmp_path / "data" / "val", dirs_exist_ok=True)
    train, val, classes = open_images(config_of(tmp_path / "data"), training=True)
    assert (len(train), len(val)) == (60, 23)
    assert train[0][0] == images_of(source / "train")[0].read_bytes()
    assert classes == sorted(path.name for path in (source / "train").iterdir())


def test_names_in_archives():
    assert class_and_name("./train/n1/a/b.jpg") == ("n1", "a/b.jpg")
    assert class_and_name("imagenet/val/n1/b.jpg") == ("n1", "b.jpg")
    assert class_and_name("n1/b.jpg") == ("n1", "b.jpg")
    assert class_and_name("train/b.jpg") == ("train", "b.jpg"), "a class may be called so"
    assert class_and_name("b.jpg") == ("", "b.jpg")


def test_long_names_in_a_tar(tmp_path):
    name = "n1/" + "x" * 150 + ".png"
    for number, kind in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        (tmp_path / "val").mkdir(exist_ok=True)
        with tarfile.open(tmp_path / "val" / f"{number}.tar", "w", format=kind) as tar:
            add(tar, name.replace("x" * 9, str(number) * 9), b"some bytes")
    _, val, _ = open_images(config_of(tmp_path), training=False)
    assert [val[i][0] for i in range(len(val))] == [b"some bytes"] * 2


def test_a_format_can_be_chosen(layouts, tmp_path):
    shutil.copytree(layouts["folder"], tmp_path / "data")
    for path in layouts["zip"].iterdir():
        if not path.name.startswith("."):
            shutil.copy(path, tmp_path / "data")
    kinds = {f: type(open_images(config_of(tmp_path / "data", "DATA.FORMAT", f), True)[0]) for f in ("auto", "zip")}
    assert [kind.__name__ for kind in kinds.values()] == ["FileIndex", "ZipIndex"]
    with pytest.raises(UserError, match=r"has no folder 'train'; expected train/\*.tar in it"):
        open_images(config_of(tmp_path / "data", "DATA.FORMAT", "tar"), True)


def test_a_run_reads_what_the_flags_say(run_main, layouts):
    def losses(layout, *flags):
        flags = ("--tag", layout, *flags, "--batch-size", "8", "--data-path", layouts[layout])
        return run_main(*TINY_RUN, *flags, tag=layout).losses()

    expected = losses("folder")
    assert expected
    assert losses("zip", "--zip", "--cache-mode", "full") == expected
    assert losses("official", "--cache-mode", "part") == expected


def test_reading_ahead_reads_everything_once(layouts, source):
    for name in ("folder", "zip", "shards"):
        index = open_images(config_of(layouts[name]), True)[0]
        parts = [index.read_ahead(part, 3) for part in range(3)]
        files = (
            [index.root / archive for archive in index.archives] if name != "folder" else images_of(source / "train")
        )
        assert sum(parts) == sum(path.stat().st_size for path in files)


# ---- data sets that timm opens


def test_a_data_set_of_timm(layouts):
    train, val, classes = open_images(config_of(layouts["folder"], "DATA.FORMAT", "torch/image_folder"), True)
    reference = open_images(config_of(layouts["folder"]), True)
    assert (len(train), len(val), classes) == (60, 23, reference[2])
    loaders = [
        Classification(config_of(layouts["folder"], *o), CPU).train_loaders()
        for o in ((), ("DATA.FORMAT", "torch/image_folder"))
    ]
    a, b = (next(of.train.micro_batches(0, 1)) for of in loaders)
    assert torch.equal(a[1], b[1])
    assert a[0].shape == b[0].shape
    for name, message in {
        "wds/x": "is a stream, and exact resuming needs random access",
        "torch/nothing": "timm cannot open train in .*Unknown torchvision dataset nothing",
    }.items():
        with pytest.raises(UserError, match=message):
            open_images(config_of(layouts["folder"], "DATA.FORMAT", name), True)


# ---- what is wrong with a data set


def error_of(root: Path, *opts, training: bool = True) -> str:
    with pytest.raises(UserError) as caught:
        open_images(config_of(root, *opts), training)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_tar_that_was_cut_short_or_damaged(source, tmp_path):
    as_tar(source, tmp_path / "data")
    archive = tmp_path / "data" / "train.tar"
    whole = archive.read_bytes()
    with tarfile.open(archive) as tar:
        members = [member for member in tar if member.isreg()]
    last = members[-1]
    at = members[20].offset  # a header
    for content, message in {
        whole[: last.offset_data + 10]: f"damaged or cut short at byte {last.offset:,}.*reaches beyond",
        whole[: last.offset]: "neither a file nor an end mark",
        whole[:at] + b"\x07" * 200 + whole[at + 200 :]: f"damaged or cut short at byte {at:,}",
        b"": "empty file",
        whole[:100]: "truncated header",
        b"\x1f\x8b" + whole: "is compressed.*decompress it first",
        b"not a tar at all" * 100: "damaged or cut short at byte 0",
    }.items():
        archive.write_bytes(content)
        error = error_of(tmp_path / "data")
        assert error.startswith(str(archive))
        assert re.search(message, error)


def test_members_that_cannot_be_read(source, tmp_path):
    as_tar(source, tmp_path / "data")
    for kind, message in ((tarfile.LNKTYPE, "is a link; make the tar with --dereference"), (None, "has no class")):
        with tarfile.open(tmp_path / "data" / "train.tar", "w") as tar:
            info = tarfile.TarInfo("n1/a.jpg" if kind else "a.jpg")
            info.type = kind or tarfile.REGTYPE
            info.linkname = "n1/b.jpg"
            tar.addfile(info)
        assert message in error_of(tmp_path / "data")
    with tarfile.open(tmp_path / "data" / "train.tar", "w") as tar:
        add(tar, "a.cls", b"seven")
        add(tar, "a.jpg", b"")
    assert "train.tar:a.cls must hold the number of a class, not b'seven'" in error_of(tmp_path / "data")
    with tarfile.open(tmp_path / "data" / "train.tar", "w") as tar:
        add(tar, "readme.txt", b"")
    assert "holds no image; expected CLASS/NAME.jpg inside" in error_of(tmp_path / "data")


def test_nothing_is_written_outside_the_data(source, tmp_path):
    """Members with evil names are read like others; nothing is extracted."""
    (tmp_path / "data" / "val").mkdir(parents=True)
    with tarfile.open(tmp_path / "data" / "val" / "0.tar", "w") as tar:
        for name in ("../../evil/x.jpg", "/etc/evil/x.jpg"):
            add(tar, name, b"bytes")
    val = open_images(config_of(tmp_path / "data"), training=False)[1]
    assert [val[i][0] for i in range(len(val))] == [b"bytes"] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def test_an_archive_that_changes_under_a_run(layouts, tmp_path):
    for name, member in (("shards", "train/train-00000.tar"), ("zip", "train.zip")):
        root = tmp_path / name
        shutil.copytree(layouts[name], root)
        config = config_of(root, "DATA.ON_BAD_IMAGE", "skip")
        train = Classification(config, CPU).train_loaders().train
        content = (root / member).read_bytes()
        for changed in (content[:3000], bytes(len(content))):
            (root / member).write_bytes(changed)
            with pytest.raises(UserError, match=rf"{member} does not fit its index .*restore it, or remove the index"):
                list(train.micro_batches(0, 5))


def test_the_devkit_is_missing_or_does_not_fit(layouts, tmp_path):
    shutil.copytree(layouts["official"], tmp_path / "data", ignore=shutil.ignore_patterns(".index*"))
    devkit = tmp_path / "data" / "ILSVRC2012_devkit_t12.tar.gz"
    whole = devkit.read_bytes()
    devkit.unlink()
    assert "has ILSVRC2012_img_val.tar but no ILSVRC2012_devkit_t12.tar.gz" in error_of(tmp_path / "data")
    for content in (whole[: len(whole) // 2], b"", b"no archive" * 99):
        devkit.write_bytes(content)
        assert re.search(r"devkit_t12.tar.gz cannot be used: .+; get the devkit", error_of(tmp_path / "data"))
    ids = sorted(path.name for path in (layouts["folder"] / "train").iterdir())
    write_devkit(devkit, ids, [ids[0]] * 22)
    assert re.search("devkit.* has no class for .*val.tar:ILSVRC2012_val_00000023", error_of(tmp_path / "data"))
    write_devkit(devkit, ids, [ids[0]] * 24)
    assert "holds 23 images, but" in error_of(tmp_path / "data")
    write_devkit(devkit, [*ids[:4], "n00000001"], [*ids[:4], "n00000001"] * 4 + ids[:3])
    assert "class 'n00000001' of" in error_of(tmp_path / "data")


def test_a_bad_zip_or_map_file(source, tmp_path):
    root = tmp_path / "data"
    as_zip(source, root)
    map_file = root / "train_map.txt"
    lines = map_file.read_text().splitlines()
    for content, message in {
        "\n".join([*lines, "n1/nothing.JPEG\t0"]): "train_map.txt, line 61: train.zip holds no n1/nothing.JPEG",
        "\n".join([*lines[:3], "no label"]): "line 4: expected PATH<tab>NUMBER OF THE CLASS, not 'no label'",
        "a.JPEG\t-1": "line 1: expected PATH<tab>NUMBER",
        "a.JPEG\t99999999999": "line 1: expected PATH<tab>NUMBER",
        "": "train_map.txt is empty",
    }.items():
        map_file.write_text(content)
        assert message in error_of(root)
    map_file.write_bytes(b"\xff\xfe\x00")
    assert "train_map.txt cannot be read: it is not a text file" in error_of(root)
    map_file.unlink()
    assert f"{root / 'train.zip'} is there, but not {map_file}" in error_of(root)
    map_file.write_text("\n".join(lines))
    whole = (root / "train.zip").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"PK"):
        (root / "train.zip").write_bytes(content)
        assert re.search(r"train.zip cannot be read: .*damaged or no zip file", error_of(root))
    (root / "train.zip").unlink()
    assert f"{map_file} is there, but not {root / 'train.zip'}" in error_of(root)
    with zipfile.ZipFile(root / "train.zip", "w", zipfile.ZIP_LZMA) as archive:
        for line in lines:
            archive.writestr(line.partition("\t")[0], "bytes")
    assert "is encrypted or compressed in an unusual way" in error_of(root)


@pytest.mark.parametrize(
    ("name", "workers"),
    quick(
        itertools.product(["shards", "official", "zip", "deflated zip"], [0, 2]),
        [("shards", 2), ("official", 0), ("zip", 0), ("deflated zip", 0)],
    ),
)
def test_bad_images_in_archives(source, tmp_path, name, workers):
    """DATA.ON_BAD_IMAGE holds for all layouts, and the line names the archive and the file in it."""
    shutil.copytree(source, tmp_path / "source")
    bad = images_of(tmp_path / "source" / "train")[7]
    bad.write_bytes(bad.read_bytes()[:50])
    LAYOUTS[name](tmp_path / "source", tmp_path / "data")
    opts = ("DATA.NUM_WORKERS", workers, "DATA.BATCH_SIZE", 20)
    loaders = Classification(config_of(tmp_path / "data", *opts), CPU).train_loaders()
    with pytest.raises(UserError, match=rf"image .*(tar|zip):.*{bad.name}: .*DATA.ON_BAD_IMAGE skip"):
        list(loaders.train.micro_batches(0, 3))
    lines = []
    loaders = Classification(config_of(tmp_path / "data", *opts, "DATA.ON_BAD_IMAGE", "skip"), CPU).train_loaders()
    loaders.train.on_bad_image = lines.append
    assert [len(images) for images, *_ in loaders.train.micro_batches(0, 3)] == [20] * 3
    assert len(lines) == 1
    assert bad.name in lines[0]


def test_many_archives_need_few_open_files(source, tmp_path):
    (tmp_path / "data" / "train").mkdir(parents=True)
    first = images_of(source / "val")[0]
    (tmp_path / "data" / "val" / first.parent.name).mkdir(parents=True)
    shutil.copy(first, tmp_path / "data" / "val" / first.parent.name)
    image = first.read_bytes()
    for number in range(300):
        with tarfile.open(tmp_path / "data" / "train" / f"{number:03d}.tar", "w") as tar:
            add(tar, f"{first.parent.name}/{number}.jpg", image)
    train = open_images(config_of(tmp_path / "data"), True)[0]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        assert all(train[i][0] == image for i in range(300))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_worker_of_another_start_method_maps_the_index_itself(layouts):
    import pickle

    for name in ("folder", "shards", "zip"):
        train = open_images(config_of(layouts[name]), True)[0]
        sample = DecodeAndTransform(build_train_transform(config_of(layouts[name]), False))
        sent = pickle.dumps(ImageDataset(train, sample, 0, False))
        assert len(sent) < 20_000
        assert pickle.loads(sent).index[5] == train[5]


def test_other_numbers_of_the_classes_are_those_of_a_copy(layouts):
    import pickle

    for name in ("folder", "shards", "zip"):
        index = open_images(config_of(layouts[name]), True)[0]
        classes, before = index.classes, [index[i] for i in range(len(index))]
        copy = index.with_classes(classes[::-1]).rename_classes([f"{name}!" for name in classes[::-1]])
        assert index.classes == classes
        assert [index[i] for i in range(len(index))] == before
        del index  # what they share must outlive either
        for other in (copy, pickle.loads(pickle.dumps(copy))):
            assert other.classes == [f"{name}!" for name in classes[::-1]]
            assert [other[i] for i in range(len(other))] == [(data, len(classes) - 1 - label) for data, label in before]
