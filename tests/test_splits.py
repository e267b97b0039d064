"""Photographs in a flat folder, with a table of their classes, or in several folders."""

import csv
import pickle
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
from commands import start
from conftest import TINY_RUN
from make_layouts import LAYOUTS, images_of
from test_layouts import config_of

from data.build import fingerprint
from data.index import ImageIndex
from data.splits import describe_share, open_images
from utils.errors import UserError

SHARE = "DATA.VAL_SHARE", "0.3"


@pytest.fixture
def flat(source, tmp_path) -> Path:
    """Class folders with the training images of the digits, and nothing else."""
    shutil.copytree(source / "train", tmp_path / "flat")
    return tmp_path / "flat"


def opened(root: Path, *opts) -> tuple[ImageIndex, ImageIndex, list[str]]:
    return open_images(config_of(root, *opts), training=True)


def names_of(index: ImageIndex) -> set[str]:
    """Class and name of each image."""
    return {f"{index.classes[label]}/{index.name_in_class(i)}" for i, label in enumerate(index.labels)}


def parts_of(root: Path, *opts) -> tuple[set[str], set[str]]:
    train, val, _ = opened(root, *opts)
    return names_of(train), names_of(val)


def test_a_share_of_a_flat_folder_is_set_apart(flat):
    train, val, classes = opened(flat, *SHARE)
    assert classes == sorted(path.name for path in flat.iterdir())
    everything = {str(path.relative_to(flat)) for path in images_of(flat)}
    assert names_of(train) | names_of(val) == everything
    assert not names_of(train) & names_of(val)
    assert 0.2 < len(val) / len(everything) < 0.4
    for index in (train, val):
        for i in range(len(index)):
            path = flat / classes[index.labels[i]] / index.name_in_class(i)
            assert index[i] == (path.read_bytes(), index.labels[i])
            assert index.name(i) == str(path)
    assert sorted(path.name for path in flat.iterdir()) == classes, "nothing is written beside the photographs"
    copy = pickle.loads(pickle.dumps(val))
    assert [copy[i] for i in range(len(copy))] == [val[i] for i in range(len(val))]
    assert names_of(open_images(config_of(flat, *SHARE), training=False)[1]) == names_of(val)


def test_no_file_moves_another(flat):
    train, val = parts_of(flat, *SHARE)
    paths = images_of(flat)
    for path in paths[::7]:
        path.unlink()
    gone = {str(path.relative_to(flat)) for path in paths[::7]}
    for path in paths[1::7]:
        path.rename(path.with_name(f"renamed_{path.name}"))
    gone |= {str(path.relative_to(flat)) for path in paths[1::7]}
    for path in paths[2::7]:
        shutil.copy(path, path.with_name(f"new_{path.name}"))
    now_train, now_val = parts_of(flat, *SHARE)
    assert train - gone <= now_train
    assert val - gone <= now_val
    assert any("renamed" in name for name in now_val | now_train)
    larger = parts_of(flat, "DATA.VAL_SHARE", "0.5")[1]
    assert now_val < larger, "a larger share adds to the smaller one"
    assert parts_of(flat, *SHARE, "SEED", "1")[1] != now_val


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in ("webdataset", "official")])
def test_the_same_split_of_every_layout(layouts, flat, tmp_path, layout):
    root = tmp_path / "data"
    shutil.copytree(layouts[layout], root)
    for path in list(root.rglob("*val*")):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    assert parts_of(root, *SHARE) == parts_of(flat, *SHARE)
    assert fingerprint(opened(root, *SHARE)[0]) == fingerprint(opened(flat, *SHARE)[0])


def test_a_class_may_be_called_train(flat):
    shutil.copytree(next(flat.iterdir()), flat / "train")
    train, _, classes = opened(flat, *SHARE)
    assert "train" in classes
    assert train.labels.max() == len(classes) - 1


# ---- tables of labels


def write_table(path: Path, rows: Iterable[Iterable[str]], delimiter: str = ",") -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


def in_one_folder(flat: Path, folder: Path) -> list[tuple[str, str]]:
    """Move all images into a folder, and return their new names and their classes."""
    folder.mkdir(parents=True)
    rows = []
    for path in images_of(flat):
        name = f"{path.parent.name}_{path.name}"
        path.rename(folder / name)
        rows.append((name, path.parent.name))
    return rows


def test_a_table_names_the_classes(flat, tmp_path):
    rows = in_one_folder(flat, tmp_path / "photos" / "train_images")
    stems = [(Path(name).stem, label, "0.5") for name, label in rows]
    table = write_table(tmp_path / "labels.csv", [("image_id", "label", "weight"), *stems])
    train, val, classes = opened(tmp_path / "photos", "DATA.LABELS", table, *SHARE)
    assert classes == sorted({label for _, label in rows})
    found = [index.name(i).rpartition("/")[2] for index in (train, val) for i in range(len(index))]
    assert sorted(found) == sorted(name for name, _ in rows)
    for i in range(len(train)):
        data, label = train[i]
        assert data == Path(train.name(i)).read_bytes()
        assert train.name(i).rpartition("/")[2].startswith(f"{classes[label]}_")


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_tables_as_people_write_them(flat, tmp_path, delimiter):
    rows = [(str(path.relative_to(flat)), path.parent.name) for path in images_of(flat)]
    expected = parts_of(flat, *SHARE)
    for number, content in enumerate(
        (
            rows,  # no line of names
            [("FileName", "Class"), *rows],
            [("what it is", "path"), *((label, name) for name, label in rows)],
            [("picture", "kind"), *((str(flat / name), label) for name, label in rows), ()],
        )
    ):
        table = write_table(tmp_path / f"{number}.csv", content, delimiter)
        table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())
        assert parts_of(flat, "DATA.LABELS", table, *SHARE) == expected, "as by class folders"
    table = write_table(tmp_path / "many.csv", [("a", "b", "c"), *((label, "x", name) for name, label in rows)])
    assert parts_of(flat, "DATA.LABELS", table, "DATA.LABEL_COLUMNS", "[c, a]", *SHARE) == expected


def test_a_table_without_names_of_columns_and_without_types(flat, tmp_path):
    rows = in_one_folder(flat, tmp_path / "photos")
    table = write_table(tmp_path / "labels.csv", [(Path(name).stem, label) for name, label in rows])
    train, val, _ = opened(tmp_path / "photos", "DATA.LABELS", table, *SHARE)
    assert len(train) + len(val) == len(rows), "the first line is one of them"


def test_a_table_may_name_the_split(flat, tmp_path):
    rows = [(str(path.relative_to(flat)), path.parent.name) for path in images_of(flat)]
    splits = ["train", "Val", "test", "validation"]
    content = [(splits[i % 4], *row) for i, row in enumerate(rows)]
    for order in ([0, 1, 2], [1, 2, 0]):
        lines = [("split", "file", "label"), *content]
        table = write_table(tmp_path / f"labels{order[0]}.csv", [[line[i] for i in order] for line in lines])
        train, val, _ = opened(flat, "DATA.LABELS", table)
        assert names_of(train) == {name for name, _ in rows[::4]}
        assert names_of(val) == {name for name, _ in rows[1::2]}
        assert train.left_out == {"of the split test": len(rows[2::4]), "images that no line names": len(rows[2::4])}


def test_flat_train_and_val_folders_with_a_table_or_two(source, tmp_path):
    tables, rows = [], []
    for split in ("train", "val"):
        shutil.copytree(source / split, tmp_path / split)
        rows.append(in_one_folder(tmp_path / split, tmp_path / "photos" / split))
        tables.append(write_table(tmp_path / f"{split}.csv", [("id", "label"), *rows[-1]]))
    two = opened(tmp_path / "photos", "DATA.LABELS", tables[0], "DATA.VAL_LABELS", tables[1])
    assert [len(index) for index in two[:2]] == [len(of) for of in rows]
    assert all("/photos/val/" in two[1].name(i) for i in range(len(two[1])))
    swapped = opened(tmp_path / "photos", "DATA.LABELS", tables[1], "DATA.VAL_LABELS", tables[0])
    assert len(swapped[0]) == len(rows[1])
    of_splits = zip(("train", "val"), rows, strict=True)
    with_folders = [(f"{split}/{name}", label) for split, of in of_splits for name, label in of]
    table = write_table(tmp_path / "both.csv", [("id", "label"), *with_folders])
    train, val, _ = opened(tmp_path / "photos", "DATA.LABELS", table)
    assert (len(train), len(val)) == (len(rows[0]), len(rows[1]))


# ---- several folders


def test_several_folders(flat, layouts, tmp_path):
    more = tmp_path / "more"
    shutil.copytree(flat, more)
    only = sorted(more.iterdir())[0]
    only.rename(more / "zz_new")
    alone = [opened(root, *SHARE) for root in (flat, more)]
    both = opened(flat, *SHARE, "DATA.MORE_PATHS", f"[{more}]")
    assert both[2] == sorted({*alone[0][2], "zz_new"})
    for number in (0, 1):
        index = both[number]
        assert len(index) == sum(len(one[number]) for one in alone)
        for i in (0, len(alone[0][number]) - 1, len(alone[0][number]), len(index) - 1):
            path = Path(index.name(i))
            assert index[i][0] == path.read_bytes()
            assert both[2][index.labels[i]] == path.parent.name
        copy = pickle.loads(pickle.dumps(index))
        assert copy[len(index) - 1] == index[len(index) - 1]
    shutil.rmtree(more)
    shutil.copytree(layouts["folder"] / "train", more)
    mixed = opened(layouts["folder"], "DATA.MORE_PATHS", f"[{layouts['zip']}, {more}]")
    sizes = [len(index) for index in opened(layouts["zip"])[:2]]
    assert [len(index) for index in mixed[:2]] == [3 * sizes[0], 2 * sizes[1]], "class folders are for training alone"
    assert mixed[0].read_ahead(0, 1) > 0
    mixed[0].expect([0, len(mixed[0]) - 1])
    of_val = open_images(config_of(layouts["folder"], "DATA.MORE_PATHS", f"[{more}]"), training=False)[1]
    assert len(of_val) == sizes[1]


def test_a_share_of_several_folders_is_taken_of_all_together(flat, tmp_path):
    images = images_of(flat)
    for name, image in (("one", images[0]), ("two", images[0]), ("six", images[1])):
        folder = tmp_path / "few" / (images[0].parent.name if name == "one" else "other")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, folder / f"{name}.png")
    train, val, classes = opened(flat, *SHARE, "DATA.MORE_PATHS", f"[{tmp_path / 'few'}]")
    assert len(train) + len(val) == len(images) + 3
    assert "other" in classes


# ---- what goes wrong


def problem(root: Path, *opts) -> str:
    with pytest.raises(UserError) as caught:
        opened(root, *opts)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_way_out_is_named(flat, layouts, tmp_path):
    assert "its folders seem to be the classes: to evaluate on a fifth of the images add --opts DATA.VAL_SHARE 0.2" in (
        problem(flat)
    )
    (tmp_path / "only").mkdir()
    shutil.copytree(flat, tmp_path / "only" / "train")
    assert "fifth of the training images add --opts DATA.VAL_SHARE 0.2" in problem(tmp_path / "only")
    (tmp_path / "photos").mkdir()
    table = write_table(tmp_path / "photos" / "train.csv", [("a", "b")])
    assert f"add --opts DATA.LABELS {table}" in problem(tmp_path / "photos")
    assert "has validation images of its own; leave it at 0" in problem(layouts["zip"], *SHARE)
    assert "has no folder 'train'" in problem(tmp_path / "photos", *SHARE)
    (tmp_path / "download").mkdir()
    flat.rename(tmp_path / "download" / "PetImages")
    for opts in ((), SHARE):
        assert f"give --data-path {tmp_path}/download/PetImages if its folders are the classes" in (
            problem(tmp_path / "download", *opts)
        )
    for split in ("train", "test"):
        shutil.copytree(images_of(tmp_path / "download")[0].parent, tmp_path / "kaggle" / split)
    assert "has no class folders" in problem(tmp_path / "kaggle", *SHARE), "they are no classes"


def test_shares_that_leave_nothing(flat):
    only, *others = images_of(next(flat.iterdir()))
    for path in others:
        path.unlink()
    error = problem(flat, "DATA.VAL_SHARE", "0.999")
    assert error.startswith(f"DATA.VAL_SHARE 0.999: all 1 images of class {only.parent.name!r} are set apart to")
    assert "no image is set apart" in problem(flat, "DATA.VAL_SHARE", "0.00001")
    train, val, classes = opened(flat, "DATA.VAL_SHARE", "0.05")
    assert f"; none of {only.parent.name}" in describe_share(
        config_of(flat, "DATA.VAL_SHARE", "0.05"), train, val, classes
    )


def test_tables_with_mistakes(flat, tmp_path):
    rows = [(str(path.relative_to(flat)), path.parent.name) for path in images_of(flat)]
    head = ("file", "label")
    for content, message in (
        ([head, *rows, ("nowhere.jpg", "1")], f", line {len(rows) + 2}: there is no image nowhere.jpg below"),
        ([head, *rows, rows[0]], f"line 2, and .*line {len(rows) + 2}, name the same image"),
        ([head, *rows[:3], ("", "x")], "line 5 has no file or no class"),
        ([head, ("alone",)], "line 2 has no file or no class"),
        ([("a", "b", "c")], r"does not tell which of its columns \(a, b, c\) has the file"),
        ([head], "names no image; it needs"),
        ([(*head, "split"), *((*row, "fold 1") for row in rows)], "names no image of the split .*, only of fold 1;"),
        (
            [(*head, "split"), *((*row, "train") for row in rows[:-1]), (rows[-1][0], "only in val", "val")],
            "class 'only in val' of .* is not one of the .* classes of the training data",
        ),
        ([], "does not tell which of its columns"),
        ([head, *rows], "names no image of val; to evaluate on a fifth of the images add"),
        ([(*head, "split"), *((*row, "val" * (i % 2)) for i, row in enumerate(rows))], "does not tell of .* train or"),
    ):
        with pytest.raises(UserError, match=message):
            opened(flat, "DATA.LABELS", write_table(tmp_path / "labels.csv", content))
    table = write_table(tmp_path / "labels.csv", [head, *rows])
    assert "has no column lable; did you mean label?" in problem(
        flat, "DATA.LABELS", table, "DATA.LABEL_COLUMNS", "[file, lable]"
    )
    assert "no.csv cannot be read: No such file" in problem(flat, "DATA.LABELS", tmp_path / "no.csv")
    table.write_bytes(b"\xff\xfe\x00")
    assert "it is not a text file" in problem(flat, "DATA.LABELS", table)
    twice = flat / "sub" / Path(rows[0][0]).name
    twice.parent.mkdir()
    shutil.copy(flat / rows[0][0], twice)
    table = write_table(tmp_path / "labels.csv", [head, (twice.name, "x")])
    assert "write its folder" in problem(flat, "DATA.LABELS", table, *SHARE)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("DATA.VAL_LABELS", "x"), "goes with DATA.LABELS"),
        (("DATA.LABEL_COLUMNS", "[a, b]"), "goes with DATA.LABELS"),
        (("DATA.LABELS", "x", "DATA.VAL_LABELS", "x"), "is DATA.LABELS too"),
        (("DATA.LABELS", "x", "DATA.LABEL_COLUMNS", "[a]"), "must be the names of two columns"),
        (("DATA.LABELS", "x", "DATA.MORE_PATHS", "[y]"), "does not go with DATA.LABELS"),
        (("DATA.LABELS", "x", "DATA.FORMAT", "zip"), "is for files in folders"),
        (("DATA.LABELS", "x", "DATA.VAL_LABELS", "y", *SHARE), "does not go with DATA.VAL_LABELS"),
        ((*SHARE, "DATA.FORMAT", "hfds/x"), "is for folders and archives"),
        (("DATA.VAL_SHARE", "1"), "below 1"),
        (("DATA.MORE_PATHS", "[nowhere]"), "DATA.MORE_PATHS nowhere is not a folder"),
    ],
)
def test_settings_that_do_not_go_together(layouts, opts, message):
    assert message in problem(layouts["folder"], *opts)


def run(*command) -> tuple[int, str, str]:
    done = start("main.py", *TINY_RUN, *command)
    return done.returncode, done.stdout, done.stderr


def test_a_flat_folder_trains_resumes_and_is_evaluated(flat, tmp_path):
    command = *SHARE, "DATA.BATCH_SIZE", 8, "DATA.DATA_PATH", flat, "OUTPUT", tmp_path / "out", "SEED"
    status, said, _ = run(*command, 3)
    assert status == 0
    assert "images are set apart to evaluate on (DATA.VAL_SHARE 0.3): " in said
    best = next((tmp_path / "out").rglob("best.pth"))
    evaluate = "--eval", "--resume", best
    assert "warning" not in run(*command, 3, *evaluate)[1]
    assert (
        f"warning: {best} may have been trained on some of these images: SEED 0 (there 3)"
        in (run(*command, 0, *evaluate)[1])
    )
    status, _, errors = run(*command, 3, "TRAIN.EPOCHS", 3, "DATA.VAL_SHARE", 0.4)
    assert status == 2
    assert re.search("was .* images", errors)
