"""Every command and every piece of Python in the documents runs, on digits and micro where the real thing is large."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch
from commands import start
from conftest import ROOT, quick, write_digits
from make_coco import write_coco
from make_pairs import write_pairs
from test_convert import voc as write_voc
from timm.models._hub import save_for_hf

import main
import predict
from engine import throughput

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

LESS = (
    "MODEL.NAME", "crossformer_micro", "DATA.IMG_SIZE", "32", "DATA.BATCH_SIZE", "16", "DATA.NUM_WORKERS", "0",
    "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0", "TRAIN.BASE_LR", "1e-4",
)  # fmt: skip
"""Settings before those of a command, so that it takes seconds."""
LESS_PIXELS = (
    *LESS, "TRAIN.STEPS", "2", "TRAIN.WARMUP_STEPS", "0", "TRAIN.EVAL_EVERY_STEPS", "2", "DATA.BATCH_SIZE", "2",
    "DATA.IMG_SIZE", "64", "AUG.RESIZE", "[128, 64]", "TEST.RESIZE", "[128, 64]", "MODEL.HEAD_CHANNELS", "16",
)  # fmt: skip
"""The same for segmentation."""
LESS_OBJECTS = (*LESS_PIXELS, "AUG.RESIZE", "[96, 64]", "TEST.RESIZE", "[96, 64]")
"""And for detection."""
OF_DETECTION = re.compile(r"detection/|mask_rcnn|retinanet")
OF_SEGMENTATION = re.compile(r"segmentation/|nuclei\.yaml")

STAND_INS = {
    "swin_tiny_patch4_window7_224": "resnet10t", "vit_giant_patch14_224": "resnet10t", "resnet18": "resnet10t",
    "default": "none", "WORD": "resume", "timm/resnet50.a1_in1k": "from_the_hub",
}  # fmt: skip
"""For a model and a mode of torch.compile that would take minutes, and for what the reader puts in."""
SHORTER = {
    "TRAIN.EPOCHS": "1", "TRAIN.STEPS": "2", "TRAIN.EVAL_EVERY_STEPS": "2",
    "AUG.RESIZE": "[96, 64]", "TEST.RESIZE": "[96, 64]",
}  # fmt: skip
"""Values of settings in a command that would take minutes."""
ONLY_PRINT = {"--help", "--settings"}


def commands(pattern: str) -> list[list[str]]:
    """The words of the commands in indented or ticked code whose program matches ``pattern``, from there on."""
    found = {}
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for code in re.findall(r"^    (\S.*)$|`([^`\n]+)`", text, re.MULTILINE):
            words = re.search(rf"(?:python|torchrun)\b.*?\s({pattern}(?:\s.*)?)$", "".join(code))
            if words:
                found[words[1].partition(" #")[0]] = None
    return [shlex.split(command) for command in found]


def one_of_each_kind(found: list[list[str]]) -> list:
    """All of the commands as parameters: of those with the same flags, for the same task, one is for the quick tier."""
    of_no_code_of_their_own, first = {"--tag", "--batch-size", "--opts"}, {}
    for words in found:
        task = next((name for name in (OF_DETECTION, OF_SEGMENTATION) if any(map(name.search, words))), None)
        flags = frozenset(word for word in words if word.startswith("-")) - of_no_code_of_their_own
        first.setdefault((words[0], task, flags), words)
    return quick(found, list(first.values()))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with all that the commands name: the project, a data set in several layouts, checkpoints."""
    root = tmp_path_factory.mktemp("place")
    for path in ROOT.iterdir():
        if path.name not in ("output", "quickstart", "docs") and not path.name.startswith("."):
            (root / path.name).symlink_to(path)
    (root / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "performance.md", root / "docs")
    for path in sorted(write_digits(root / "imagenet" / "train", 88).rglob("*.png"))[::4]:
        moved = root / "imagenet" / "val" / path.relative_to(root / "imagenet" / "train")
        moved.parent.mkdir(parents=True, exist_ok=True)
        path.rename(moved)
    start("scripts/prepare_imagenet.py", "imagenet", "zips", "--zip", cwd=root).check_returncode()
    start("scripts/prepare_imagenet.py", "imagenet", "bucket", "--short-side", "320", cwd=root).check_returncode()
    for path in (root / "zips").glob("*_map.txt"):
        shutil.copy(path, root / "imagenet")
        shutil.copy(path.with_name(path.name.replace("_map.txt", ".zip")), root / "imagenet")
    for name in ("my_images", "cifar10_12k", "imagenet_v2", "imagenet_a", "quickstart/digits"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).symlink_to(root / "imagenet")
    shutil.copytree(root / "imagenet" / "val" / "0", root / "my_photos")
    shutil.copytree(root / "imagenet" / "train", root / "flat")
    images = sorted((root / "imagenet").glob("*/*/*.png"))
    shutil.copy(images[0], root / "a_digit.png")
    (root / "labels.csv").write_text("\n".join(f"{image},{image.parent.name}" for image in images))
    shutil.copy(next((root / "my_photos").iterdir()), root / "photo.jpg")
    shutil.copy(next((root / "my_photos").iterdir()), root / "image.png")
    write_pairs(root / "my_data")
    write_pairs(root / "ade20k")
    write_pairs(root / "camvid", void=11)
    write_pairs(root / "nuclei")
    for name in ("nuclei_objects", "my_objects", "coco"):
        write_coco(root / name)
    write_voc(root / "my_voc")
    (root / "args.yaml").write_text("model: crossformer_micro\nlr: 0.001\nepochs: 30\nopt: adamw\n")
    (root / "my.yaml").write_text("BASE: configs/base.yaml\nTRAIN:\n  EMA_DECAY: 0.9999\n")
    for name in ("crossformer-s.pth", "crossformer-b.pth"):
        torch.save({"model": timm.create_model("crossformer_micro", num_classes=10).state_dict()}, root / name)
    save_for_hf(
        timm.create_model("crossformer_micro", num_classes=1000), root / "from_the_hub", safe_serialization=True
    )
    arguments = ["--cfg", "configs/micro.yaml", "--data-path", str(root / "imagenet"), "--opts", *LESS]
    for folder in (("quickstart", "digits"), ("output", "default")):
        output, tag = folder
        assert main.main([*arguments, "--output", str(root / output), "--tag", tag]) == 0
    (root / "output" / "crossformer_micro" / "my_images").symlink_to(root / "output" / "crossformer_micro" / "default")
    for epoch in (1, 2):
        kept = root / "output" / "crossformer_micro" / "default" / "checkpoints"
        shutil.copy(kept / "best.pth", kept / f"epoch_000{epoch}.pth")
    few = " ".join(LESS)
    flags = f"--cfg configs/micro.yaml --data-path {root / 'imagenet'} --opts {few}"
    (root / "my_trials.yaml").write_text(f"flags: {flags}\nvariants:\n  one: {{}}\n")
    for name in ("crossformer_small", "crossformer_base"):
        (root / "output" / name).symlink_to(root / "output" / "crossformer_micro")
    arguments = ["--cfg", "configs/segmentation/semantic_fpn_micro.yaml", "--data-path", str(root / "nuclei")]
    assert main.main([*arguments, "--output", str(root / "output"), "--tag", "nuclei", "--opts", *LESS_PIXELS]) == 0
    arguments = ["--cfg", "examples/nuclei/mask_rcnn.yaml", "--data-path", str(root / "nuclei_objects")]
    assert main.main([*arguments, "--output", str(root / "output"), "--tag", "nuclei", "--opts", *LESS_OBJECTS]) == 0
    return root


@pytest.fixture(autouse=True)
def there(request, monkeypatch):
    monkeypatch.setattr(throughput, "SECONDS_PER_REPEAT", 0.02)
    if "place" in request.fixturenames:
        monkeypatch.chdir(request.getfixturevalue("place"))


def in_place(words: list[str], place: Path) -> list[str]:
    """The words, with what stands in for what the reader has."""
    absolute = {"/imagenet": "imagenet", "/imagenet_v2": "imagenet_v2", "/imagenet_a": "imagenet_a"}
    absolute |= {"/ade20k": "ade20k", "/shards_ade20k": "shards_ade20k", "my_data": "my_data", "/camvid": "camvid"}
    nuclei = "nuclei_objects" if any(map(OF_DETECTION.search, words)) else "nuclei"
    absolute |= {f"examples/nuclei{below}": f"{nuclei}{below}" for below in ("", "/images/val")}
    absolute |= {"/coco": "coco", "/bccd": "coco", "/nuclei": "coco"}
    absolute |= {"quickstart/digits/val/0/0000.png": "a_digit.png"}
    absolute |= {"/shards": "shards", "/zipped": "zipped", "/the/disk/of/the/run": "disk"}
    absolute |= {"OUTPUT/MODEL.NAME/TAG": "quickstart/crossformer_micro/digits"}
    absolute |= {"s3://bucket/imagenet": "bucket"}  # test_remote.py has a real one
    absolute |= {"my_images": "flat"} if "DATA.VAL_SHARE" in words else {}
    pairs = zip(["", *words[:-1]], words, strict=True)
    words = [str(place / absolute[word]) if word in absolute and before != "--tag" else word for before, word in pairs]
    words = [STAND_INS.get(word, word) for word in words]
    return [SHORTER.get(before, word) for before, word in zip(["", *words[:-1]], words, strict=True)]


def test_settings_and_flags_of_all_commands(place):
    for _, *words in commands(r"main\.py"):
        if not ONLY_PRINT & {*words}:
            main.parse(words)


@pytest.mark.parametrize("command", one_of_each_kind(commands(r"main\.py")), ids=" ".join)
def test_commands_of_main(place, tmp_path, command):
    words = command[1:]
    if ONLY_PRINT & {*words}:
        assert main.main(in_place(words, place)) == 0
        return
    if any(word.startswith("hfds/") for word in words) or not words:
        return  # what is on a hub cannot be reached here; the rest would start the default run
    evaluated = ["TEST.REAL_LABELS"] if "TEST.REAL_LABELS" in words else []
    less = LESS_PIXELS if any(map(OF_SEGMENTATION.search, words)) else LESS
    less = LESS_OBJECTS if any(map(OF_DETECTION.search, words)) else less
    less = [*less, *(["TRAIN.TEACHER.AT_LEAST", "0.001"] if "TRAIN.TEACHER.FROM" in words else [])]
    less = [*less, *(["MODEL.DROP_PATH_RATE", "0"] if "swin_tiny_patch4_window7_224" in words else [])]
    status = main.main(["--output", str(tmp_path), "--opts", *less, *in_place(words, place)])
    assert status == (2 if evaluated else 0)  # digits are not ImageNet, whose own images test_metrics.py has


@pytest.mark.parametrize("command", one_of_each_kind(commands(r"predict\.py")), ids=" ".join)
def test_commands_of_predict(place, command):
    ours = (
        []
        if any(re.search("output/(semantic_fpn|mask_rcnn)", word) for word in command)
        else ["--model", "crossformer_micro"]
    )
    words = [*in_place(command[1:], place), *ours]
    if "--serve" in words:  # which would go on; test_serving.py asks it
        assert predict.parse(words).serve
        return
    assert predict.main(words) == 0


SHORT = {
    "scripts/benchmark.py model": "--models crossformer_micro --image-size 64 --batch-sizes 1 --repeats 1",
    "scripts/benchmark.py step": "--models crossformer_micro --image-size 64 --batch-sizes 1 --repeats 1",
    "scripts/benchmark.py data": "--batches 1 --repeats 1 --workers 1 --batch-size 8 --output bench",
    "scripts/benchmark.py checkpoint": "--megabytes 1 --repeats 1",
}


def run(words: list[str], place: Path) -> None:
    short = SHORT.get(" ".join(words[:2]), "").split()
    done = start(*in_place(words, place), *short, cwd=place)
    assert done.returncode == 0, done.stderr


EXPORTS = commands(r"scripts/export\.py")
STARTED_ELSEWHERE = ("scripts/export.py", "scripts/launch.py")  # what the latter starts is a command of main.py
SCRIPTS = [words for words in commands(r"scripts/\w+\.py") if words[0] not in STARTED_ELSEWHERE]
TIMED = [words for words in SCRIPTS if words[0] == "scripts/benchmark.py"]  # test_benchmark.py times all the same


@pytest.mark.parametrize(
    "command", [*one_of_each_kind([words for words in SCRIPTS if words not in TIMED]), *quick(TIMED, [])], ids=" ".join
)
def test_commands_of_scripts(place, command):
    if "--prepared" in command:
        run("scripts/prepare_imagenet.py /imagenet /shards --short-side 320 --quality 92".split(), place)
    if command[:2] == ["scripts/benchmark.py", "report"]:
        run("scripts/benchmark.py model --output output/gpu_report/eager".split(), place)
    run(command, place)


@pytest.mark.slow
def test_python_of_the_documents(place, monkeypatch):
    """Exports first: what they write is what the pieces of Python read."""
    for command in EXPORTS:
        run(command, place)
    checkpoints = place / "quickstart" / "crossformer_micro" / "digits" / "checkpoints"
    assert {"best.pt2", "best.onnx", "best.safetensors", "best-hf"} <= {path.name for path in checkpoints.iterdir()}
    pytest.importorskip("captum")
    shutil.copy(place / "image.png", checkpoints)
    pages = {page: re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL) for page in PAGES}
    assert sum(map(len, pages.values())) >= 8
    monkeypatch.setitem(sys.modules, "crossformer", sys.modules["models.crossformer"])  # as if it were installed
    for page, pieces in pages.items():
        monkeypatch.chdir(checkpoints if page.name == "export.md" else place)
        for piece in pieces:
            exec(piece.replace("800, 1216", "64, 96"), {})


def test_the_documents_were_searched():
    assert len(commands(r"main\.py")) >= 15
    assert len(commands(r"predict\.py")) >= 2
    assert len(EXPORTS) >= 4
    assert len(commands(r"scripts/\w+\.py")) >= 10


def test_the_tests_that_the_documents_name_are_there():
    there = {
        (path.name, name)
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    named = [
        pair for page in PAGES for pair in re.findall(r"(?:(test_\w+\.py)::)?`?(test_\w+)(?=[`\[])", page.read_text())
    ]
    assert len(named) > 100
    for file, name in named:
        assert any(name == known and file in ("", home) for home, known in there), f"{file}::{name}"
