"""What several test files use: small folders of real images, and the real command line in processes of its own."""

import json
import shutil
from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import start
from make_coco import write_coco
from make_layouts import LAYOUTS
from make_pairs import write_pairs
from PIL import Image
from sklearn.datasets import load_digits

import models  # noqa: F401  (registers the variants with timm, for every test)

ROOT = Path(__file__).parent.parent
TINY_RUN = (
    "--cfg", "configs/micro.yaml", "--tag", "run", "--opts",
    "DATA.NUM_WORKERS", "0", "TRAIN.EPOCHS", "2", "TRAIN.WARMUP_EPOCHS", "1", "PRINT_FREQ", "1",
)  # fmt: skip
"""Flags of a run of a few steps; more ``--opts`` may follow."""


def quick(values: Iterable, those: Container) -> list:
    """The parameters of a test, of which only those are for the quick tier."""

    def slow(value):
        return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)

    return [value if value in those else slow(value) for value in values]


def write_digits(folder: Path, count: int) -> Path:
    """``count`` of scikit-learn's digits as ``folder/CLASS/NUMBER.png``, all ten classes among them."""
    digits = load_digits()
    for i in range(count):
        path = folder / str(digits.target[i]) / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.uint8(digits.images[i] * 255 / 16)).save(path)
    return folder


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """72 training and 37 validation images: neither number divides by the batch and world sizes used here."""
    root = tmp_path_factory.mktemp("digits")
    write_digits(root / "train", 72)
    write_digits(root / "val", 37)
    return root


@dataclass
class Result:
    """What a command has done."""

    status: int
    stdout: str
    stderr: str
    results: Path

    @property
    def error(self) -> str:
        """The one line that a user sees when something is wrong; fails on a traceback."""
        assert "Traceback" not in self.stderr, self.stderr
        lines = [line for line in self.stderr.splitlines() if line.startswith("error")]
        assert len(lines) == 1, self.stderr
        return lines[0]

    def events(self, kind: str) -> list[dict]:
        lines = (self.results / "metrics.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"] == kind]

    def losses(self) -> list[float]:
        return [event["loss"] for event in self.events("train")]

    def checkpoint(self, name: str = "last") -> dict:
        return torch.load(self.results / "checkpoints" / f"{name}.pth", weights_only=True)


@pytest.fixture
def run_main(tmp_path):
    """Start ``main.py`` as a user does, under ``torchrun`` for several processes; results go to ``tmp_path``."""

    def run(*arguments, ok: bool = True, tag: str = "run", **how) -> Result:
        done = start("main.py", *arguments, "--output", tmp_path / "output", **how)
        result = Result(done.returncode, done.stdout, done.stderr, tmp_path / "output" / "crossformer_micro" / tag)
        assert not ok or result.status == 0, result.stdout + result.stderr
        return result

    return run


def assert_same_tensors(a: dict, b: dict) -> None:
    """Bit-identical, down to every tensor of nested dicts and lists."""
    assert a.keys() == b.keys()
    for key in a:
        if isinstance(a[key], torch.Tensor):
            assert torch.equal(a[key], b[key]), key
        elif isinstance(a[key], dict):
            assert_same_tensors(a[key], b[key])
        else:
            assert a[key] == b[key], key


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """A class-folder tree in ImageNet's style of names: 5 classes, 60 and 23 images (PNG, so that they stay small)."""
    root = tmp_path_factory.mktemp("source")
    rng = np.random.RandomState(0)
    classes = [f"n{number:08d}" for number in rng.choice(10**7, 5, replace=False)]
    for split, count in (("train", 60), ("val", 23)):
        for i in range(count):
            label = classes[rng.randint(5) if i >= 5 else i]
            name = f"{label}_{rng.randint(9999)}.JPEG" if split == "train" else f"ILSVRC2012_val_{i + 1:08d}.JPEG"
            path = root / split / label / name
            path.parent.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(rng.randint(0, 256, (5, 6, 3), np.uint8)).resize((50 + i, 40))
            picture.save(path, format="JPEG" if i % 3 else "PNG")
    return root


@pytest.fixture(scope="session")
def layouts(source, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("layouts")
    for name, make in LAYOUTS.items():
        make(source, root / name)
    return {name: root / name for name in LAYOUTS}


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    """13 training and 7 validation images of mixed sizes with label maps of 3 classes."""
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="session")
def coco(tmp_path_factory) -> Path:
    """13 training and 7 validation images of mixed sizes with objects of 2 classes."""
    return write_coco(tmp_path_factory.mktemp("coco"))


@pytest.fixture(scope="session")
def objects(tmp_path_factory) -> Path:
    """24 training and 7 validation images of mixed sizes in COCO's format, with masks of 2 classes."""
    return write_coco(tmp_path_factory.mktemp("objects") / "data", train=24, val=7)


@pytest.fixture
def browser():
    """Chromium without a window."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("needs Chromium (apt-get install chromium)")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()
