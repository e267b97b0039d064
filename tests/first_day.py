"""Go the way of a new user: ``python tests/first_day.py PHOTOGRAPHS``, a folder with a folder for each class.

In a copy of the project it runs the commands of two sections of the README, as they stand there: the quick start, and
the way from photographs to a report, a fine-tuned model, predictions and an ONNX file. Then it classifies the
photographs that were set apart outside the copy, with the ONNX file and the lines of docs/export.md alone, and compares
that with the evaluation. The quick start's weights stand in for published ones, which cannot be had everywhere.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from config import build_config  # noqa: E402
from data.splits import open_images  # noqa: E402

SECTIONS = ("## Quick start", "### Fine-tune on your own images")
STAND_INS = {
    "crossformer-s.pth": "quickstart/crossformer_micro/digits/checkpoints/best.pth",
    "crossformer_small": "crossformer_micro",
}
RUN = "output/crossformer_micro/my_images"
MORE = 30
"""Photographs that are asked for."""
CLASSIFY = """
import sys

files = json.loads(sys.stdin.read())
answers = []
for first in range(0, len(files), 64):
    batch = np.stack([prepare(file) for file in files[first : first + 64]])
    answers += session.run(["logits"], {"images": batch})[0].argmax(1).tolist()
print(json.dumps([said["class_ids"][answer] for answer in answers]))
"""


def commands_of(section: str) -> list[str]:
    """The indented lines of a section of the README, the first block of them alone."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition(f"{section}\n")[2]
    return re.search(r"(?:^    \S.*\n)+", text, re.MULTILINE)[0].replace("    ", "").splitlines()


def copy_of_project(place: Path) -> Path:
    """The files that are in the repository, or would be."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    for name in listed.stdout.splitlines():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, place / name)
    return place


def lines_of_docs() -> str:
    """What docs/export.md says of an ONNX file, but for the two lines that classify one image."""
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    block = next(block for block in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S) if "def prepare" in block)
    return block.partition("\n(logits,)")[0]


def go(photographs: Path, place: Path) -> float:
    """Go the whole way; returns the accuracy in percent of the ONNX file outside the project.

    Raises:
        AssertionError: something is not as the README says.
    """
    project = copy_of_project(place / "project")
    (project / "my_images").symlink_to(photographs.resolve())
    images = sorted(path for path in photographs.rglob("*") if path.is_file() and not path.name.startswith("."))
    (project / "my_photos").mkdir()
    for number, path in enumerate(images[:: max(1, len(images) // MORE)]):
        shutil.copy(path, project / "my_photos" / f"{number}{path.suffix}")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment.setdefault("VIRTUAL_ENV", sys.prefix)
    for command in (command for section in SECTIONS for command in commands_of(section)):
        for word, other in STAND_INS.items():
            command = command.replace(word, other)
        began = time.monotonic()
        done = subprocess.run(["bash", "-c", command], cwd=project, env=environment, capture_output=True, text=True)
        print(f"{time.monotonic() - began:6.1f} s  {command}", flush=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    run = project / RUN
    assert (run / "report.html").stat().st_size < 5e6
    assert (project / "found.png").stat().st_size > 10_000

    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(run / "checkpoints" / "best.onnx", elsewhere)
    settings = ["DATA.DATA_PATH", str(photographs), "DATA.VAL_SHARE", "0.2"]
    _, val, classes = open_images(build_config(opts=settings), training=False)
    files = [str(Path(val.root, val.name(i))) for i in range(len(val))]
    code = lines_of_docs() + CLASSIFY
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=elsewhere, input=json.dumps(files), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    right = sum(answer == classes[val.labels[i]] for i, answer in enumerate(answers))
    evaluated = [line for line in map(json.loads, (run / "metrics.jsonl").open()) if "checkpoint" in line][-1]
    assert evaluated["images"] == len(files)
    assert round(evaluated["top1"] * len(files) / 100) == right, f"{evaluated['top1']} % by --eval, {right} by ONNX"
    accuracy = 100 * right / len(files)
    print(f"{accuracy:.2f} % of {len(files)} photographs, by main.py --eval and by best.onnx outside the project alike")
    return accuracy


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        go(Path(sys.argv[1]).resolve(), Path(folder))
