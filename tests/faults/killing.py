"""Kill a run at one system call after the other, let the same command finish it, and compare all of its files.

``python tests/faults/killing.py DATA FOLDER EVERY``: in a process of its own, for it forks one that has imported
everything for each run. Of the places to kill at it takes every EVERY-th.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from conftest import TINY_RUN, assert_same_tensors  # noqa: E402
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402

import engine.train  # noqa: E402, F401
import utils.event_file  # noqa: E402, F401
from engine.checkpoints import Checkpoints  # noqa: E402
from main import main  # noqa: E402
from utils import checkpoint  # noqa: E402

CALLS = ("replace", "link", "unlink", "fsync")
WRITES_OF_CHECKPOINTS = 12
"""Of the many writes into checkpoints, so many are tried."""
TIMED = ("images_per_second", "data_wait", "memory_bytes", "time")
FLAGS = (
    *TINY_RUN, "MODEL.CROSSFORMER.EMBED_DIM", "16", "MODEL.CROSSFORMER.DEPTHS", "[1, 1, 1, 1]",
    "MODEL.DROP_PATH_RATE", "0.2", "AUG.MIXUP", "0.8", "TRAIN.EMA_DECAY", "0.9", "TRAIN.EPOCHS", "3",
    "TRAIN.SAVE_EVERY_STEPS", "2", "PRINT_FREQ", "5", "TRAIN.EVAL_EVERY_EPOCHS", "2", "TRAIN.KEEP_EVERY_EPOCHS", "1",
    "TRAIN.KEEP_LAST", "3", "--batch-size", "24", "--output", "output",
)  # fmt: skip
"""Three steps an epoch; saves lie between lines of the log, and epochs without an evaluation are kept."""


class Places:
    """Counts the calls of one run, and kills it before, after or in the middle of one of them."""

    def __init__(self, kind: str = "", number: int = 0, when: str = ""):
        self.kind, self.number, self.when = kind, number, when
        self.counts = {"call": 0, "line": 0, "checkpoint": 0}

    def install(self) -> None:
        for name in CALLS:
            setattr(os, name, self.around("call", getattr(os, name)))
        os.write = self.in_the_middle("line", os.write)
        checkpoint._Hashing.write = self.in_the_middle("checkpoint", checkpoint._Hashing.write)
        start = Checkpoints._start

        def start_and_wait(self, *arguments) -> None:
            start(self, *arguments)
            self._writing.exception()  # else two threads' calls would mix in another order each time

        Checkpoints._start = start_and_wait

    def here(self, kind: str) -> bool:
        self.counts[kind] += 1
        return (kind, self.counts[kind]) == (self.kind, self.number)

    def around(self, kind: str, call):
        def wrapped(*arguments, **more):
            here = self.here(kind)
            if here and self.when == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return call(*arguments, **more)
            finally:
                if here:
                    os.kill(os.getpid(), signal.SIGKILL)

        return wrapped

    def in_the_middle(self, kind: str, write):
        def wrapped(file, data):
            if self.here(kind):
                write(file, bytes(data)[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return write(file, data)

        return wrapped


def run(folder: Path, data: str, places: Places) -> int:
    """The status of a run with its results below ``folder``; negative if it was killed."""
    folder.mkdir(exist_ok=True)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.chdir(folder)
            said = os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(said, 1)
            os.dup2(said, 2)
            flags = [str(ROOT / flag) if flag.startswith("configs/") else flag for flag in FLAGS]
            places.install()
            status = main([*flags, "--data-path", data])
            Path("counts.json").write_text(json.dumps(places.counts))
            sys.stdout.flush()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if name.rpartition("/")[2] not in TIMED]
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in names}


def files_of(folder: Path) -> dict:
    """Everything in a results folder that does not tell the time."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".pth":
            found[name] = torch.load(path, weights_only=True)
        elif name == "metrics.jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{k: v for k, v in row.items() if k not in TIMED} for row in rows if row["event"] != "start"]
        elif name == "config.yaml":
            found[name] = path.read_text()
        elif not name.startswith("tensorboard/"):
            found[name] = None
    return {**found, "tensorboard": curves(folder / "tensorboard")}


def sweep(data: str, folder: Path, every: int) -> int:
    began = time.monotonic()
    assert run(folder / "warm", data, Places()) == 0, (folder / "warm" / "said.txt").read_text()  # makes the index
    assert run(folder / "whole", data, Places()) == 0
    whole = files_of(folder / "whole" / "output" / "crossformer_micro" / "run")
    counts = json.loads((folder / "whole" / "counts.json").read_text())
    places = [("call", n, when) for n in range(1, counts["call"] + 1) for when in ("before", "after")]
    places += [("line", n, "inside") for n in range(1, counts["line"] + 1)]
    step = counts["checkpoint"] / WRITES_OF_CHECKPOINTS
    places += [("checkpoint", 1 + int(step * n), "inside") for n in range(WRITES_OF_CHECKPOINTS)]
    chosen = places[every // 2 :: every]
    wrong = []
    for place in chosen:
        one = folder / "one"
        killed = run(one, data, Places(*place))
        status = run(one, data, Places())
        try:
            assert (killed, status) == (-signal.SIGKILL, 0), (killed, status)
            found = files_of(one / "output" / "crossformer_micro" / "run")
            assert found.keys() == whole.keys(), found.keys() ^ whole.keys()
            assert_same_tensors(found, whole)
        except (AssertionError, OSError, ValueError) as error:
            wrong.append(place)
            print(f"killed at {place}: {type(error).__name__} {error}\n{(one / 'said.txt').read_text()}", flush=True)
        shutil.rmtree(one)
    print(f"{len(chosen)} kills, {counts} calls, {len(wrong)} wrong {wrong}, {time.monotonic() - began:.0f} s")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(sweep(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])))
