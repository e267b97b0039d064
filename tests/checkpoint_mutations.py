"""Wrong checkpoints by the hundred, and what becomes of each.

``python tests/checkpoint_mutations.py FOLDER FIRST LAST``: every number is a mutation of the same checkpoint of a small
run. A forked process opens it in every way there is; a line of JSON for each says how that ended: loaded, refused and
with which words, or what must not be: a traceback or a signal.
"""

import argparse
import copy
import json
import os
import random
import signal
import sys
import traceback
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from config import build_config  # noqa: E402
from engine.ema import Ema  # noqa: E402
from engine.precision import choose_precision  # noqa: E402
from engine.state import TrainState, check_resumable  # noqa: E402
from models import build_model  # noqa: E402
from optimizer import build_optimizer  # noqa: E402
from tasks.trained import load_trained  # noqa: E402
from utils import checkpoint  # noqa: E402
from utils.errors import UserError  # noqa: E402

CPU = torch.device("cpu")
SECONDS = 120
"""After which one that hangs is ended by a signal."""
SMALL = ["MODEL.CROSSFORMER.EMBED_DIM", "16", "MODEL.CROSSFORMER.DEPTHS", "[1, 1, 1, 1]", "TRAIN.EMA_DECAY", "0.5"]
CLASSES, IMAGES, BATCH = ["a", "b", "c"], 24, 4
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)
"""Nine to the ninth entries, once it is unfolded."""


def start() -> tuple[Any, TrainState, dict[str, Any]]:
    """A config, a run of three steps, and its checkpoint."""
    torch.manual_seed(0)
    config = build_config(str(ROOT / "configs" / "micro.yaml"), SMALL)
    model = build_model(config, len(CLASSES))
    precision = choose_precision(config, CPU)
    ema = Ema(model, decay=config.TRAIN.EMA_DECAY)
    state = TrainState(model, build_optimizer(config, model), precision.scaler(), ema)
    for _ in range(3):
        take_step(state)
    facts = {"global_batch": BATCH, "images": IMAGES, "classes": CLASSES, "epoch": 0, "config": config.dump()}
    return config, state, {**copy.deepcopy(state.content()), **facts}


def take_step(state: TrainState) -> None:
    loss = state.model(torch.randn(2, 3, 32, 32)).square().mean()
    loss.backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.advance(torch.ones(()))


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


class Shadowed:
    """A dict that is saved as one whose methods are numbers."""

    def __init__(self, value: dict):
        self.value = value

    def __reduce__(self):
        return (
            OrderedDict,
            (),
            dict.fromkeys(("items", "keys", "get", "values", "pop"), 5),
            None,
            iter(self.value.items()),
        )


def shadowed_tensor() -> Tensor:
    """Whose methods are numbers."""
    tensor = torch.ones(3)
    for name in ("to", "copy_", "expand", "double", "untyped_storage_"):
        tensor.__dict__[name] = 5
    return tensor


def endless() -> list:
    value: list = [1]
    value.append(value)
    return value


VALUES: list[Callable[[], Any]] = [
    lambda: None, lambda: True, lambda: -1, lambda: 0, lambda: 10**18, lambda: 2**300, lambda: -0.5, lambda: 1e300,
    lambda: float("nan"), lambda: float("inf"), lambda: "", lambda: "x" * 100_000, lambda: "two\nlines", list, dict,
    lambda: (1, 2), lambda: b"bytes", lambda: {1, 2}, lambda: 1j, lambda: [None] * 10, lambda: {"a": {"b": []}},
    lambda: {0: 1}, lambda: {None: torch.zeros(2)}, lambda: {"x": torch.zeros(2)}, lambda: nested(150),
    lambda: nested(5),
    endless, lambda: torch.float16, lambda: torch.Size([3]), lambda: np.float64("nan"), lambda: np.int64(7),
    lambda: argparse.Namespace(step=3), lambda: Path("a/b"), lambda: np.arange(6).reshape(2, 3),
    lambda: np.array([{}], dtype=object), lambda: bytearray(10), lambda: torch.zeros(3), lambda: torch.zeros(()),
    lambda: torch.zeros(0), lambda: torch.tensor(float("nan")), lambda: torch.zeros(1).expand(10**6, 10**6),
    lambda: torch.empty(10**6, 10**6, device="meta"), lambda: torch.zeros(2, 2, dtype=torch.complex64),
    lambda: torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.long), torch.ones(1), (10**6, 10**6)),
    lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), lambda: torch.tensor(-5),
    lambda: Shadowed({}), shadowed_tensor, lambda: ["a", "a", "b"], lambda: ["a", 1, "c"],
    lambda: ["x"] * 3, lambda: torch.ones(3, dtype=torch.bool), lambda: torch.tensor(10**15), lambda: [[0], [1]],
]  # fmt: skip
TENSORS: list[Callable[[Tensor], Any]] = [
    lambda t: t * float("nan"), lambda t: t + float("inf"), lambda t: t * 0 + 1e38, lambda t: t.double() * 0 + 1e300,
    lambda t: t.half(), lambda t: t.bfloat16(), lambda t: t.double(), lambda t: t.long(), lambda t: t.bool(),
    lambda t: t.cfloat(), lambda t: t.flatten(), lambda t: t[None], lambda t: t.flatten()[:1],
    lambda t: t.flatten()[:1].expand(t.shape) if t.numel() else t, lambda t: t.to_sparse() if t.ndim else t,
    lambda t: t.to("meta"), lambda t: -t.abs() - 1, lambda t: torch.cat([t.flatten()] * 3), lambda t: t.to_sparse_csr()
    if t.ndim == 2 else t[..., None], lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    lambda t: t.mT.contiguous().mT if t.ndim > 1 else t.clone(), lambda t: torch.nn.Parameter(t.float()),
    lambda t: t.numpy(), lambda t: t.float().to(torch.float8_e5m2), lambda t: t.expand(1000, *t.shape),
    lambda t: torch.empty(2 * t.numel(), dtype=t.dtype).fill_(0.5)[::2].view(t.shape) if t.is_floating_point() else t,
]  # fmt: skip
CONFIGS: list[Callable[[str], Any]] = [
    lambda c: c + BOMB, lambda c: BOMB, lambda c: "[" * 100_000, lambda c: "a: " * 5_000, lambda c: c.encode(),
    lambda c: c + f"X: {'9' * 5000}\n", lambda c: c + f"SEED: 0x{'f' * 5000}\n",
    lambda c: "x: !!python/object:os.system 1",
    lambda c: c.replace("EPOCHS: ", "EPOCHS: -"), lambda c: c.replace("NAME: crossformer_micro", "NAME: [1]"),
    lambda c: "\0", lambda c: "1", lambda c: "", lambda c: "? {a: 1}\n: 2", lambda c: "a: 2001-99-99", lambda c: c * 2,
    lambda c: c.replace("MODEL:", "MODEL: 3\nM:"), lambda c: c + "1: {2: {3: 4}}\n", lambda c: "x" * 2**21,
    lambda c: c.replace("EMBED_DIM: 16", "EMBED_DIM: 1000000000"),
    lambda c: c.replace("EMBED_DIM: 16", "EMBED_DIM: 17"), lambda c: c.replace("micro", "tiny"),
    lambda c: c.replace("IMG_SIZE: 32", "IMG_SIZE: 1000000000"),
    lambda c: c.replace("SEED: 0", "SEED: 0x" + "f" * 3000),
    lambda c: c.replace("DEPTHS:", "DEPTHS: [99999999, 1, 1, 1]\n    X:"),
    lambda c: c.replace("IMG_SIZE: 32", "IMG_SIZE: .nan"), lambda c: c.replace("GROUP_SIZE:", "GROUP_SIZE: {}\n    Y:"),
    lambda c: c.replace("SEED: 0", "SEED: &x 0\nZ: *x"),
]  # fmt: skip


def places(content: Any, rng: random.Random, depth: int) -> tuple[Any, Any]:
    """A container some way down, and one of its keys."""
    key = rng.choice(list(content))
    below = content[key]
    if depth and isinstance(below, dict | list) and below:
        return (
            places(below if isinstance(below, dict) else dict(enumerate(below)), rng, depth - 1)
            if isinstance(below, dict)
            else in_list(below, rng, depth)
        )
    return content, key


def in_list(values: list, rng: random.Random, depth: int) -> tuple[Any, Any]:
    i = rng.randrange(len(values))
    return places(values[i], rng, depth - 1) if isinstance(values[i], dict) and values[i] else (values, i)


def mutate(content: dict[str, Any], number: int) -> Any:
    """The mutation of that number, and what it is in words."""
    rng = random.Random(number)
    holder, key = places(content, rng, rng.choice((0, 1, 2, 3, 3)))
    value, kind = holder[key], rng.choice(("value", "value", "value", "tensor", "keys", "config"))
    if kind == "tensor" and not isinstance(value, Tensor):
        kind = "value"
    if isinstance(value, Tensor) and rng.random() < 0.5:
        kind = "tensor"
    said = f"{number}: {kind} of {key!r}"
    if kind == "config" or key == "config":
        i = rng.randrange(len(CONFIGS))
        content["config"], said = CONFIGS[i](content["config"]), f"{number}: config {i}"
    elif kind == "tensor":
        i = rng.randrange(len(TENSORS))
        holder[key], said = TENSORS[i](value), f"{said}, {i}"
    elif kind == "value":
        i = rng.randrange(len(VALUES))
        holder[key], said = VALUES[i](), f"{said}, {i}"
    else:
        i = rng.randrange(7)
        said = f"{said}, {i}"
        names = list(holder) if isinstance(holder, dict) else []
        if i == 0 or not names:
            del holder[key]
        elif i == 1:
            holder[rng.choice((f"{key}.x", "", 7, None, f"module.{key}", ("a",), "a." * 10_000))] = holder.pop(key)
        elif i == 2:
            other = rng.choice(names)
            holder[key], holder[other] = holder[other], holder[key]
        elif i == 3:
            for name in names:
                if isinstance(holder[name], Tensor) and isinstance(value, Tensor) and holder[name].shape == value.shape:
                    holder[name] = value  # one storage for all of them
        elif i == 4:
            for name in names:
                holder[rng.choice(("module.", "_orig_mod.", "model.module.")) + str(name)] = holder.pop(name)
        elif i == 5:
            holder[key] = holder
        else:
            holder[key] = Shadowed(value if isinstance(value, dict) else {})
    return said


def open_in_every_way(path: Path, config: Any, state: TrainState) -> dict[str, str]:
    """How it ended to carry on from it, and to use its model: an empty text, or the words of the error."""

    def resume() -> None:
        content = checkpoint.read(path)
        check_resumable(content, path, config, IMAGES, same_run=False)
        state.restore(content, path)
        take_step(state)

    def predict() -> None:
        trained = load_trained(str(path), CPU)
        trained.model(torch.zeros(1, 3, 32, 32))
        json.dumps(trained.facts, allow_nan=False)

    ended = {}
    for way in (resume, predict):
        try:
            way()
            ended[way.__name__] = ""
        except UserError as error:
            ended[way.__name__] = str(error)
    return ended


def memory_of(pid: int) -> tuple[int, int]:
    """The status of a process that has ended, and the most bytes that it held."""
    _, status, usage = os.wait4(pid, 0)
    return status, usage.ru_maxrss * 1024


def in_a_process(work: Callable[[], dict]) -> dict[str, Any]:
    """What ``work`` returns or raises, done in a fork of this process; with the memory that it took."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reading)
        signal.alarm(SECONDS)
        with os.fdopen(writing, "w") as out:
            try:
                out.write(json.dumps(work()))
            except BaseException:
                out.write(json.dumps({"traceback": traceback.format_exc()}))
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answers:
        text = answers.read()
    status, memory = memory_of(pid)
    return {"ended": json.loads(text) if text else {}, "status": status, "memory": memory}


def main(folder: str, first: str, last: str) -> None:
    torch.set_num_threads(1)
    config, state, content = start()
    path = Path(folder, "x.pth")
    torch.save(content, path)
    whole = in_a_process(lambda: open_in_every_way(path, config, state))
    print(json.dumps({"said": "whole", **whole}), flush=True)
    for number in range(int(first), int(last)):
        changed = copy.deepcopy(content)
        try:
            said = mutate(changed, number)
            torch.save(changed, path)
        except (RuntimeError, NotImplementedError, RecursionError) as error:  # torch makes no such tensor
            print(json.dumps({"said": f"{number}: none: {error}".splitlines()[0], "ended": None}), flush=True)
            continue
        done = in_a_process(lambda: open_in_every_way(path, config, state))
        print(json.dumps({"said": said, **done}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
