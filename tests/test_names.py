"""Names of files and classes that hold anything, and processes without a home."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageDraw, ImageFont

import main
import predict
from config import SETTINGS, build_config
from scripts import check_dataset
from tasks.report import Report
from utils import surroundings
from utils.drawing import drawable, font_file
from utils.errors import UserError
from utils.names import harmless, printable

CLASSES = ["$x^2$ and $y", "=1+1", "@SUM(A1)", "[red]b", 'a\nb, "c"', "b=\u202ec", "你好", "مرحبا", "🦄 é"]
CLASSES = sorted([*CLASSES, os.fsdecode(b"caf\xe9")])
"""Ten, as many as there are digits."""


def test_printable_text_is_one_line_and_can_be_encoded():
    for name, expected in (
        ("a\nb\t\x1b[31m\u202e", r"a\nb\t\x1b[31m\u202e"),
        (os.fsdecode(b"caf\xe9"), r"caf\xe9"),
        ("\ud800", r"\ud800"),
        ("你好 مرحبا 🦄 é $ [red]", "你好 مرحبا 🦄 é $ [red]"),
    ):
        assert printable(name) == expected
        printable(name).encode()


def test_cells_are_harmless_and_can_be_had_back():
    for text in ("=1+1", "+1", "-1", "@x", "\t=1", "\r=1", "\n=1", "\uff1d1", "'x"):
        assert harmless(text) == f"'{text}"
    for cell in ("a=b", "", " x", 3, -0.5, "\\x"):
        assert harmless(cell) == cell


def test_what_is_drawn_is_no_empty_box():
    font = ImageFont.truetype(font_file(), 20)

    def drawing(text: str) -> bytes:
        ImageDraw.Draw(image := Image.new("L", (40, 40))).text((5, 5), text, 255, font)
        return image.tobytes()

    missing = drawing("\uffff")
    assert drawing("你") == missing
    for name in CLASSES:
        assert all(drawing(letter) != missing for letter in drawable(name)), name
    assert drawable("a 你好") == "a U+4F60 U+597D"
    assert drawable(CLASSES[0]).count("\n") == 0


@pytest.fixture(scope="module")
def odd(tmp_path_factory) -> Path:
    """Two digits' worth of noise for each odd class, in files with odd names, and a checkpoint that knows them."""
    root = tmp_path_factory.mktemp("odd")
    rng = np.random.RandomState(0)
    for split in ("train", "val"):
        for i, name in enumerate(CLASSES):
            for j in range(2):
                path = root / split / name / f"{CLASSES[(i + j) % 10]}{j}{split}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.randint(0, 256, (40, 40, 3), np.uint8)).save(path, "PNG")
    return root


@pytest.fixture(scope="module")
def trained(odd, tmp_path_factory) -> Path:
    """The results of one epoch, of a tag that is odd too."""
    output = tmp_path_factory.mktemp("output")
    command = [
        "--cfg", "configs/micro.yaml", "--data-path", str(odd), "--batch-size", "10", "--output", str(output),
        "--opts", "DATA.NUM_WORKERS", "0", "TRAIN.EPOCHS", "2", "TRAIN.WARMUP_EPOCHS", "1", "TAG", "@$1$ [red] = 你\n",
    ]  # fmt: skip
    assert main.main(command) == 0
    return output / "crossformer_micro" / "@$1$ [red] = 你\n"


def test_a_run_and_its_report(odd, trained, tmp_path, capfd):
    checkpoint = trained / "checkpoints" / "last.pth"
    command = ["--cfg", "configs/micro.yaml", "--data-path", str(odd), "--output", str(tmp_path), "--report", "--eval"]
    bad = odd / "val" / CLASSES[0] / "\nbad.png"
    bad.write_bytes(b"no image")
    try:
        opts = ["--opts", "DATA.NUM_WORKERS", "0", "DATA.ON_BAD_IMAGE", "skip"]
        assert main.main([*command, "--resume", str(checkpoint), *opts]) == 0
        assert main.main([*command, "--resume", str(checkpoint), *opts[:3]]) == 2
    finally:
        bad.unlink()
    out, err = capfd.readouterr()
    assert r"\nbad.png: cannot identify" in out
    assert err.count("\n") == 1
    assert err.startswith("error: image ")
    results = tmp_path / "crossformer_micro" / "default"
    assert len((results / "skipped_images.txt").read_text().splitlines()) == 1
    for line in (results / "log.txt").read_text(encoding="utf-8").splitlines():
        assert line.startswith("20")  # each begins with its date, so no name has broken one
    rows = list(csv.reader(open(results / "report_model" / "per_class.csv", newline="", encoding="utf-8")))
    names = [row[0] for row in rows[1:]]
    assert [name.encode("utf-8", "backslashreplace") for name in map(harmless, CLASSES)] == [n.encode() for n in names]
    assert (results / "report_model" / "report.png").stat().st_size > 10_000
    for line in (trained / "metrics.jsonl").read_text().splitlines():
        json.loads(line)
    assert build_config(str(trained / "config.yaml")).TAG == "@$1$ [red] = 你\n"


def test_a_picture_shows_a_dollar_as_it_is(tmp_path):
    """A formula that is none would be an error of matplotlib's, in the middle of an evaluation."""
    names = [r"$\frac{$", "a$^b$", *CLASSES, "x" * 30 + "1", "x" * 30 + "2"]
    report = Report(names, torch.device("cpu"))
    count = torch.arange(len(names))
    report.add(torch.eye(len(names)), count, count)
    report.write(tmp_path)
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_predictions(odd, trained, tmp_path, capsys):
    command = ["--checkpoint", str(trained / "checkpoints" / "last.pth"), str(odd / "val"), "--device", "cpu"]
    files = {str(path) for path in (odd / "val").rglob("*.png")}
    assert predict.main([*command, "--format", "json", "--to", str(tmp_path / "x.json")]) == 0
    records = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert {record["file"] for record in records} == files
    assert {p["class"] for p in records[0]["predictions"]} < set(CLASSES)
    flags = ["--format", "csv", "--to", str(tmp_path / "x.csv"), "--sheet", str(tmp_path / "x.png"), "--top", "10"]
    assert predict.main([*command, *flags]) == 0
    with open(tmp_path / "x.csv", newline="", encoding="utf-8") as file:
        classes = {row["class"] for row in csv.DictReader(file)}
    assert classes == {harmless(name).encode("utf-8", "backslashreplace").decode() for name in CLASSES}
    capsys.readouterr()
    assert predict.main(command) == 0
    assert len(capsys.readouterr().out.splitlines()) == 20


def test_check_dataset(odd, tmp_path, capsys):
    command = ["--data-path", str(odd), "--workers", "1", "--output", str(tmp_path), "--opts", "DATA.IMG_SIZE", "32"]
    assert check_dataset.main(command) == 0
    assert json.loads((tmp_path / "report.json").read_text())["classes"] == 10
    assert (tmp_path / "augmentations.png").exists()


# ---- Home


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my.yaml").write_text("BASE: ~/base.yaml\nOUTPUT: ~/out\n")
    (tmp_path / "base.yaml").write_text("SEED: 7\n")
    config = build_config("~/my.yaml")
    assert (7, f"{tmp_path}/out") == (config.SEED, config.OUTPUT)
    for key in (key for key, setting in SETTINGS.items() if setting.path):
        value = build_config(opts=["DATA.LABELS", "with the other", key, "~/x"])
        for part in key.split("."):
            value = value[part]
        assert value == f"{tmp_path}/x"
    assert build_config(opts=["DATA.DATA_PATH", "x/~/y"]).DATA.DATA_PATH == "x/~/y"
    assert predict.parse(["--checkpoint", "~/c", "~/i", "--to", "~/t"]).to == tmp_path / "t"


def test_a_name_need_not_be_yaml():
    for name in ("@x", "[x", "a: b: c", "*x", "{"):
        assert name == build_config(opts=["DATA.DATA_PATH", name]).DATA.DATA_PATH
    with pytest.raises(UserError, match="SEED.*is not a YAML value"):
        build_config(opts=["SEED", "[x"])


def test_no_home_is_said_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(surroundings, "_has_home", False)
    with pytest.raises(UserError, match="~/x: this user has no home folder; set HOME"):
        build_config(opts=["OUTPUT", "~/x"])


def test_a_terminal_that_knows_few_letters(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    surroundings.settle()
    print("é 你 \udcff")
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue() == rb"\xe9 \u4f60 \udcff" + b"\n"


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("setpriv"), reason="only root can be somebody else")
@pytest.mark.slow
def test_a_user_whom_nobody_knows(odd, trained, tmp_path_factory):
    """No HOME, no entry in the list of users, and data that cannot be written to."""
    for index in odd.glob(".index*"):
        index.unlink()
    folder = tmp_path_factory.mktemp("nobody")
    folder.chmod(0o777)
    code = """
import getpass, sys, tempfile
from pathlib import Path
import predict
from data.splits import open_images
from config import build_config
from torch._inductor.runtime.cache_dir_utils import cache_dir
status = predict.main(sys.argv[2:])
images, _, _ = open_images(build_config(opts=["DATA.DATA_PATH", sys.argv[1]]), True)
assert Path.home().is_dir() and Path.home().stat().st_mode & 0o77 == 0
assert images.file.is_relative_to(Path.home()), images.file
assert cache_dir().startswith(tempfile.gettempdir())
print(status, getpass.getuser())
"""
    # It may read what root may, or it could not even start this Python
    user = "setpriv --reuid 54321 --regid 54321 --clear-groups --inh-caps +dac_read_search --ambient-caps "
    environment = {"TMPDIR": str(folder), "PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONUTF8": "0"}
    environment |= {"PYTHONCOERCECLOCALE": "0", "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    flags = ["--checkpoint", trained / "checkpoints" / "last.pth", odd / "val", "--sheet", folder / "sheet.png"]
    done = subprocess.run(
        [*user.split(), "+dac_read_search", sys.executable, "-c", code, odd, *flags, "--to", folder / "table"],
        env=environment, capture_output=True, text=True, cwd="/", timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "0 uid54321"
    assert (folder / "sheet.png").exists()


def test_a_tag_is_no_problem_for_tensorboard(trained):
    assert any((trained / "tensorboard").iterdir())


def test_random_names_make_no_box():
    rng = np.random.RandomState(0)
    letters = drawable("".join(chr(code) for code in rng.randint(32, 0xD7FF, 2000)))
    from matplotlib.ft2font import FT2Font

    known = FT2Font(str(font_file())).get_charmap()
    assert all(ord(letter) in known for letter in letters)
