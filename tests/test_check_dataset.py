"""Checking a data set before training on it, by the real command line."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import start
from conftest import ROOT, quick
from make_coco import write_coco
from make_layouts import LAYOUTS
from PIL import Image

from config import build_config
from tasks.classification import Classification
from tasks.object_check import MEDIUM, SMALL

COMMAND = ("scripts/check_dataset.py", "--workers", "2")
RED, GREEN, BLUE = (200, 30, 40), (20, 180, 60), (10, 50, 220)
KINDS = {
    "unreadable", "empty", "truncated", "broken", "other_format", "cmyk", "grey", "more_than_8_bits", "palette",
    "alpha", "rotated", "tiny", "huge", "other_size",
}  # fmt: skip


@dataclass
class Check:
    """What the command has done."""

    status: int
    stdout: str
    stderr: str
    output: Path

    @property
    def report(self) -> dict:
        return json.loads((self.output / "report.json").read_text())

    def found(self) -> dict[str, set[str]]:
        """The names (without folder and suffix) of each kind of image."""
        found: dict[str, set[str]] = {}
        for split in self.report["splits"].values():
            for kind, entries in split["findings"].items():
                found.setdefault(kind, set()).update(stem(entry["image"]) for entry in entries)
        return found


def stem(name: str) -> str:
    """``data/val.zip:a/1.jpg`` to 1."""
    return Path(name.rpartition(":")[2]).stem


@pytest.fixture
def check(tmp_path):
    def run(folder: Path, *arguments: str) -> Check:
        done = start(*COMMAND, "--data-path", folder, "--output", tmp_path / "out", *arguments)
        assert "Traceback" not in done.stderr, done.stderr
        return Check(done.returncode, done.stdout, done.stderr, tmp_path / "out")

    return run


def picture(seed: int) -> Image.Image:
    pixels = np.random.RandomState(seed).randint(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((64, 48))


def save(image: Image.Image, path: Path, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


@pytest.fixture(scope="module")
def faulty(tmp_path_factory) -> Path:
    """One of each fault and oddity, among sound images; class b has no image in val."""
    root = tmp_path_factory.mktemp("faulty")
    a, b, val = root / "train" / "a", root / "train" / "b", root / "val" / "a"
    sound = save(picture(0), a / "sound.jpg")
    save(picture(1), a / "upright.jpg", exif=exif(1))
    save(picture(2), a / "progressive.jpeg", progressive=True)
    whole = save(picture(3), a / "truncated.jpg")
    whole.write_bytes(whole.read_bytes()[:-200])
    for name in ("empty_a", "empty_b"):  # both: two empty files are no duplicates
        (a / f"{name}.jpg").touch()
    (a / "broken.jpg").write_text("this is no image")
    save(picture(4), a / "png_named.JPEG", format="PNG")
    save(picture(5).convert("CMYK"), a / "cmyk.JPEG")
    save(picture(6).convert("L"), a / "grey.jpg")
    save(picture(7), a / "turned.jpg", exif=exif(6))
    save(Image.fromarray(np.arange(64 * 48, dtype=np.uint16).reshape(48, 64)), a / "sixteen_bits.png")
    save(picture(8).convert("P"), a / "palette.png")
    save(picture(9).convert("RGBA"), a / "alpha.png", exif=b"damaged")
    save(picture(10).resize((40, 31)), a / "tiny.jpg")
    save(Image.new("RGB", (8000, 5001), RED), a / "huge.jpg")
    twin = save(picture(11), a / "twin_a.jpg")
    (root / "train" / "b").mkdir()
    (b / "twin_b.jpg").write_bytes(twin.read_bytes())
    save(picture(12), val / "other.jpg")
    (val / "leaked.jpg").write_bytes(sound.read_bytes())
    return root


@pytest.mark.parametrize("layout", quick(["folder", "shards", "deflated zip"], ["folder"]))
def test_every_fault_is_found_and_nothing_else(faulty, check, tmp_path, layout):
    LAYOUTS[layout](faulty, tmp_path / "data")
    expected = {kind: set() for kind in KINDS} | {
        "empty": {"empty_a", "empty_b"},
        "truncated": {"truncated"},
        "broken": {"broken"},
        "other_format": {"png_named"},
        "cmyk": {"cmyk"},
        "grey": {"grey", "sixteen_bits"},
        "more_than_8_bits": {"sixteen_bits"},
        "palette": {"palette"},
        "alpha": {"alpha"},
        "rotated": {"turned"},
        "tiny": {"tiny"},
        "huge": {"huge"},
    }
    if layout == "folder":
        (tmp_path / "data" / "train" / "a" / "gone.jpg").symlink_to("/proc/self/mem")  # whose first page is not there
        expected["unreadable"] = {"gone"}
    done = check(tmp_path / "data")
    assert done.status == 1, done.stderr
    assert done.found() == expected
    report = done.report
    assert not report["sound"]

    findings = report["splits"]["train"]["findings"]
    assert "image file is truncated" in findings["truncated"][0]["detail"]
    assert "cannot identify image file" in findings["broken"][0]["detail"]
    assert findings["other_format"][0]["detail"] == "PNG"
    assert findings["rotated"][0]["detail"] == "orientation 6"
    assert findings["tiny"][0]["detail"] == "40 x 31"

    (twins,) = report["splits"]["train"]["duplicates"]
    assert {stem(name) for name in twins["images"]} == {"twin_a", "twin_b"}
    assert twins["classes"] == ["a", "b"]
    assert report["splits"]["val"]["duplicates"] == []
    (leak,) = report["leaks"]
    assert [[stem(name) for name in leak[split]] for split in ("train", "val")] == [["sound"], ["leaked"]]

    assert report["splits"]["train"]["classes_missing"] == []
    assert report["splits"]["val"]["classes_missing"] == ["b"]
    assert report["splits"]["train"]["images"] - report["splits"]["train"]["decoded"] == 4 + (layout == "folder")
    for heading in ("empty (2):", "truncated (1):", "more than once in train (1)", "in val and in train too (1)"):
        assert heading in done.stdout
    assert "(in different classes: a, b)" in done.stdout
    assert "the data set is NOT sound" in done.stdout
    assert "val  2/2 images" in done.stdout


def test_a_leak_alone_is_not_sound(check, tmp_path):
    for i in range(4):
        save(picture(i), tmp_path / "data" / "train" / "a" / f"{i}.png")
    save(picture(3), tmp_path / "data" / "val" / "a" / "other_name.png")
    done = check(tmp_path / "data")
    assert (done.status, len(done.report["leaks"])) == (1, 1)


def test_photographs_that_look_alike(check, tmp_path):
    """One of train is in val too, smaller and as a JPEG; the others have nothing to do with each other."""
    clouds = np.random.default_rng(0).integers(0, 255, (12, 9, 12, 3)).astype(np.uint8)
    photographs = [Image.fromarray(cloud).resize((400, 300), Image.Resampling.BICUBIC) for cloud in clouds]
    photographs += [Image.new("RGB", (400, 300), colour) for colour in (RED, GREEN)]  # too dull to tell
    for i, photograph in enumerate(photographs):
        save(photograph, tmp_path / "data" / ("train" if i % 2 else "val") / "a" / f"{i}.png")
    small = photographs[3].resize((240, 180))
    small.save(tmp_path / "data" / "val" / "a" / "again.jpg", quality=60)
    done = check(tmp_path / "data")
    assert done.status == 0, done.stderr
    (pair,) = done.report["alike"]
    assert [stem(pair["train"]), stem(pair["val"])] == ["3", "again"]
    assert "alike in val and in train (1), perhaps the same photograph" in done.stdout


def test_a_flat_folder_is_checked_as_it_will_be_divided(check, tmp_path):
    for i in range(40):
        save(picture(i), tmp_path / "data" / "ab"[i % 2] / f"{i}.png")
    done = check(tmp_path / "data", "--opts", "DATA.VAL_SHARE", "0.3")
    counts = {name: split["images"] for name, split in done.report["splits"].items()}
    assert sum(counts.values()) == 40
    assert 4 < counts["val"] < 20


def test_a_sound_data_set_and_its_contact_sheet(check, tmp_path):
    """Flat colours and no augmentation: what the sheet shows is what the files hold, once normalising is undone."""
    of_images = [("red", RED)] * 3 + [("green", GREEN)] * 2 + [("blue", BLUE)]
    for i, (label, colour) in enumerate(of_images):
        save(Image.new("RGB", (40 + i, 60 + 2 * i), colour), tmp_path / "data" / "train" / label / f"{i}.png")
    for label, colour in (("red", RED), ("green", GREEN), ("blue", BLUE)):
        save(Image.new("RGB", (50, 50), colour), tmp_path / "data" / "val" / label / "0.png")
    (tmp_path / "data" / "train" / "red" / "photo.heic").touch()
    (tmp_path / "data" / "val" / "blue" / "@eaDir").mkdir()
    plain = "AUG.AUTO_AUGMENT none AUG.COLOR_JITTER 0 AUG.REPROB 0 AUG.MIXUP 0 AUG.CUTMIX 0".split()
    done = check(tmp_path / "data", "--opts", *plain, "DATA.IMG_SIZE", "32")
    assert done.status == 0, done.stdout + done.stderr
    assert done.found() == {kind: set() for kind in KINDS}
    verdict = "the data set is sound; 1 file is left out, being no images of a class (train: 1 .heic)"
    assert done.stdout.splitlines()[-1] == verdict

    report = done.report
    assert [report["splits"][split]["left_out"] for split in ("train", "val")] == [{".heic": 1}, {}]
    train = report["splits"]["train"]
    assert (report["classes"], train["images"], train["decoded"], train["formats"]) == (3, 6, 6, {"PNG": 6})
    assert train["images_per_class"] == {
        "smallest": {"class": "blue", "images": 1},
        "median": 2.0,
        "largest": {"class": "red", "images": 3},
    }
    assert train["sizes"]["width"] == {"min": 40, "median": 42.5, "mean": 42.5, "max": 45}
    assert train["sizes"]["pixels"]["max"] == 45 * 70
    assert train["sizes"]["bytes"]["max"] == max(p.stat().st_size for p in (tmp_path / "data" / "train").rglob("*.png"))
    colours = np.array([RED] * 3 + [GREEN] * 2 + [BLUE]) / 255
    assert train["colours"]["sampled_images"] == 6
    np.testing.assert_allclose(train["colours"]["mean"], colours.mean(0), atol=1e-6)
    np.testing.assert_allclose(train["colours"]["std_of_all_pixels"], colours.std(0), atol=1e-6)
    np.testing.assert_allclose(train["colours"]["std_within_images"], 0, atol=1e-6)

    sheet = Image.open(done.output / "augmentations.png")
    assert sheet.size == (8 * 132 + 4, 40 + 3 * 152)  # as in evaluation, epoch 0, epoch 1
    centres = [[sheet.getpixel((4 + 132 * x + 64, 60 + 152 * y + 64)) for x in range(6)] for y in range(3)]
    assert centres[0] == centres[1] == centres[2]
    assert sorted(centres[0]) == sorted([RED] * 3 + [GREEN] * 2 + [BLUE])


def test_the_contact_sheet_is_the_recipe(check, digits):
    """Epoch 0 is the first batch of training; mixup and cutmix have a row each. All of val leaks here."""
    opts = "DATA.IMG_SIZE 128 DATA.BATCH_SIZE 8 DATA.NUM_WORKERS 0 AUG.DEVICE cpu SEED 3".split()
    done = check(digits, "--opts", *opts)
    assert done.status == 1, done.stderr
    assert (done.report["splits"]["train"]["images"], len(done.report["leaks"])) == (72, 37)
    assert (done.output / "augmentations.png").stat().st_size < 2_000_000
    sheet = Image.open(done.output / "augmentations.png")
    assert sheet.size == (8 * 132 + 4, 40 + 5 * 152)

    def cells(row: int) -> np.ndarray:
        top = 60 + 152 * row
        return np.stack([np.array(sheet)[top : top + 128, 4 + 132 * x : 132 + 132 * x] for x in range(8)])

    config = build_config(opts=["DATA.DATA_PATH", str(digits), *opts])
    images, *_ = next(Classification(config, torch.device("cpu")).train_loaders().train.micro_batches(0, 1))
    mean, std = torch.tensor(config.DATA.MEAN), torch.tensor(config.DATA.STD)
    trained_on = (255 * (images.permute(0, 2, 3, 1) * std + mean)).clamp(0, 255).numpy()
    assert np.abs(cells(1) - trained_on).max() < 1
    rows = [cells(row) for row in range(5)]
    assert all((a != b).any((1, 2, 3)).sum() >= 6 for i, a in enumerate(rows) for b in rows[:i])  # no row is another


@pytest.mark.parametrize(("there", "not_there"), [("train", "val"), ("val", "train")])
def test_one_split_alone(check, tmp_path, there, not_there):
    for i in range(12):
        save(picture(i).convert("L"), tmp_path / "data" / there / "a" / f"[red]{i}.png")  # no mark-up of the terminal's
    done = check(tmp_path / "data", "--opts", "DATA.IMG_SIZE", "32")
    assert done.status == 0, done.stderr
    assert done.report["missing_splits"] == [not_there]
    assert f"there is no {not_there}" in done.stdout
    assert len(done.found()["grey"]) == 12
    assert done.stdout.count("/[red]") == 10
    assert f"and 2 more, see {done.output / 'report.json'}" in done.stdout
    assert (done.output / "augmentations.png").exists()


def test_a_data_set_without_one_sound_image(check, tmp_path):
    save(picture(0), tmp_path / "data" / "train" / "a" / "0.png").write_bytes(b"nothing")
    done = check(tmp_path / "data")
    assert done.status == 1, done.stderr
    assert done.found()["broken"] == {"0"}
    assert not (done.output / "augmentations.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data-path", "/nowhere"], "DATA.DATA_PATH /nowhere is not a folder"),
        (["--data-path", "{data}", "--opts", "AUG.MIXUPS", "1"], "did you mean AUG.MIXUP?"),
        (["--data-path", "{data}", "--opts", "DATA.BATCH_SIZE", "7"], "DATA.BATCH_SIZE 7 is odd"),
        (["--data-path", "{data}", "--workers", "0"], "--workers 0: must be at least 1"),
        (["--data-path", "{data}", "--output", "{data}/val/1/file"], "cannot be written"),
        (["--wrong"], "unrecognized arguments: --wrong (see python scripts/check_dataset.py --help)"),
    ],
)
def test_a_mistake_is_one_line(digits, tmp_path, arguments, message):
    (tmp_path / "file").touch()
    arguments = [argument.format(data=digits) for argument in arguments]
    if "--output" in arguments:
        arguments[-1] = str(tmp_path / "file")
    done = start(*COMMAND, *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.fixture
def odd_objects(tmp_path) -> Path:
    """One of each fault and oddity of objects among sound ones: see what the test of them expects."""
    root = write_coco(tmp_path / "data", train=9, val=3)
    path = root / "annotations" / "train.json"
    content = json.loads(path.read_text())
    images = {one["file_name"]: one for one in content["images"]}
    images["0000.png"]["width"] += 1
    of_0000 = images["0000.png"]["id"]
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] != of_0000]
    (root / "images/train/0001.png").write_bytes(b"nothing")
    (root / "images/val/1000.png").write_bytes((root / "images/train/0002.png").read_bytes())
    leaked = json.loads((root / "annotations/val.json").read_text())
    leaked["images"][0] |= {side: images["0002.png"][side] for side in ("height", "width")}
    leaked["annotations"] = [one for one in leaked["annotations"] if one["image_id"] != leaked["images"][0]["id"]]
    (root / "annotations/val.json").write_text(json.dumps(leaked))
    last, width = images["0003.png"], images["0003.png"]["width"]
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] != last["id"]]
    content["categories"].append({"id": 99, "name": "nowhere"})
    leaked["categories"].append({"id": 99, "name": "nowhere"})
    (root / "annotations/val.json").write_text(json.dumps(leaked))
    boxes = {
        "cut": [width - 10, 5, 12, 12], "rounded": [width - 10, 20, 10.4, 12], "twice": [2, 2, 12, 12],
        "again": [2, 2, 12, 12], "thin": [5, 20, 12, 1.5], "flat": [5, 25, 12, 0], "no mask": [20, 2, 13, 14],
        "shifted": [30, 15, 20, 12],
    }  # fmt: skip
    for number, (name, (x, y, w, h)) in enumerate(boxes.items(), start=1000):
        right, left = min(x + w, width), x + 3 * (name == "shifted")
        polygon = [left, y, right, y, right, y + max(h, 2), left, y + max(h, 2)]
        one = {"id": number, "image_id": last["id"], "category_id": 3, "bbox": [x, y, w, h]}
        one |= {"segmentation": [] if name == "no mask" else [polygon]}
        content["annotations"].append(one)
    path.write_text(json.dumps(content))
    return root


def test_objects(check, odd_objects):
    done = check(odd_objects, "--cfg", "configs/detection/mask_rcnn_micro.yaml", "--opts", "AUG.RESIZE", "[160, 80]")
    assert done.status == 1, done.stderr
    found = done.found()
    assert (found["other_size"], found["broken"]) == ({"0000"}, {"0001"})
    (leak,) = done.report["leaks"]
    assert [stem(name) for name in leak["val"] + leak["train"]] == ["1000", "0002"]
    train, val = (done.report["splits"][split] for split in ("train", "val"))
    odd = {what.partition(",")[0].partition(" once")[0]: lines for what, lines in train["odd_objects"].items()}
    assert odd.pop("boxes cut at the edge of the image") == ["0003.png: annotation 1000, by 2 pixels"]
    assert [stem(line) for line in odd.pop("images without objects")] == ["0000", "0004"]
    image = odd_objects / "images/train/0003.png"
    assert odd == {
        "boxes with a side below 4 pixels": [f"{image}: rectangle from 5, 20 to 17, 21.5"],
        "boxes that stand twice in an image": [f"{image}: rectangle from 2, 2 to 14, 14"],
        "boxes that differ from their masks by over 10 % of a side": [f"{image}: rectangle from 30, 15 to 50, 27"],
        "objects without a mask": [f"{image}: rectangle from 20, 2 to 33, 16"],
    }
    assert train["classes_missing"] == val["classes_missing"] == ["nowhere"]
    assert "; boxes of no width or height are left out (train: 1)" in done.stdout


def test_counts_of_objects(check, coco):
    """As in the json."""
    done = check(coco, "--cfg", "configs/detection/mask_rcnn_micro.yaml")
    assert done.status == 0, done.stderr
    for split in ("train", "val"):
        content, counted = json.loads((coco / f"annotations/{split}.json").read_text()), {}
        for number, name in ((3, "rectangle"), (7, "ellipse")):
            of_class = [one for one in content["annotations"] if one["category_id"] == number]
            known = [one for one in of_class if not one["iscrowd"]]
            small = sum(one["area"] < 1024 for one in known)
            counted[name] = {
                "images": len({one["image_id"] for one in known}), "objects": len(known),
                "crowds": len(of_class) - len(known), "small": small, "medium": len(known) - small, "large": 0,
            }  # fmt: skip
        assert done.report["splits"][split]["objects"] == counted
        assert not any(lines for what, lines in done.report["splits"][split]["odd_objects"].items() if "boxes" in what)


def test_objects_are_drawn(check, coco, tmp_path):
    """On black images, so that all colour is that of objects: in each row, of full boxes' pixels in places."""
    black = shutil.copytree(coco, tmp_path / "data")
    for path in black.glob("images/*/*.png"):
        Image.new("RGB", Image.open(path).size).save(path)
    done = check(black, "--cfg", "configs/detection/mask_rcnn_micro.yaml")
    rows = np.split(np.asarray(Image.open(done.output / "augmentations.png").convert("HSV"))[40:, :, 1] > 100, 3)
    shares = [row.mean() for row in rows]
    assert min(shares) > 0.01
    assert max(shares) < 1.2 * min(shares)
    assert (rows[1] != rows[2]).any()  # another epoch, another flip


def test_areas_are_cocos():
    assert np.digitize([1023, 1024, 9215, 9216], [SMALL, MEDIUM]).tolist() == [0, 1, 1, 2]


@pytest.fixture
def long_check(tmp_path):
    """The command at work on enough images to be disturbed, after its first word; and its processes."""
    save(Image.new("RGB", (1000, 1000), RED), tmp_path / "data" / "train" / "a" / "0.png")
    for i in range(1, 3000):
        (tmp_path / "data" / "train" / "a" / f"{i}.png").hardlink_to(tmp_path / "data" / "train" / "a" / "0.png")
    process = subprocess.Popen(
        [sys.executable, *COMMAND, "--data-path", str(tmp_path / "data"), "--output", str(tmp_path / "out")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell in the background ignores it
    )
    assert process.stdout.readline().startswith("train  32/3,000 images")
    yield process
    process.kill()
    process.communicate()


def test_ctrl_c_stops_it(long_check):
    os.killpg(long_check.pid, signal.SIGINT)  # as a terminal does
    _, stderr = long_check.communicate(timeout=60)
    assert (long_check.returncode, stderr) == (130, "\nstopped\n")


@pytest.mark.slow
def test_a_killed_process_is_named(long_check):
    children = Path(f"/proc/{long_check.pid}/task/{long_check.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    _, stderr = long_check.communicate(timeout=60)
    assert long_check.returncode == 2
    assert stderr.startswith("error: a process was killed while it checked train")
