"""A checkpoint is looked at before any of it is used: each wrong field ends in one line that names it."""

import copy
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_mutations import BOMB, CPU, IMAGES, start, take_step
from conftest import TINY_RUN, assert_same_tensors

from config import settings_in
from engine.state import check_resumable
from optimizer import build_optimizer
from tasks.trained import load_trained
from utils import checkpoint
from utils.errors import UserError

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def run() -> tuple[Any, Any, dict]:
    return start()


def resume(run, content: dict, path: Path = Path("last.pth")) -> None:
    config, state, _ = run
    check_resumable(content, path, config, IMAGES, same_run=False)
    copy_of(state).restore(content, path)


def copy_of(state):
    """With a lock of its own, since locks cannot be copied."""
    return copy.deepcopy(state, {id(state.changing): threading.RLock()})


def first(content: dict) -> dict:
    return content["optimizer"]["state"][0]


NAN = float("nan")
WRONG: dict[str, tuple[Callable[[dict], Any], str]] = {
    "a short moment": (
        lambda c: first(c).update(exp_avg=torch.zeros(3)),
        r"last.pth cannot be used: its optimizer state\[0\] exp_avg is a tensor of shape \(3,\) and torch.float32, "
        r"expected a tensor of shape \(8, 3, 4, 4\) of fractions; take another checkpoint",
    ),
    "an expanded moment that is not whole": (lambda c: first(c).update(exp_avg=torch.zeros(9, 1)), "exp_avg is a te"),
    "whole numbers": (lambda c: first(c).update(exp_avg=first(c)["exp_avg"].long()), "exp_avg is a tensor .*int64"),
    "a moment that is not finite": (lambda c: first(c)["exp_avg"].fill_(NAN), "exp_avg is .* expected finite numbers"),
    "a square below 0": (lambda c: first(c)["exp_avg_sq"].neg_().sub_(1), "exp_avg_sq is .*, none below 0"),
    "a sparse moment": (lambda c: first(c).update(exp_avg=first(c)["exp_avg"].to_sparse()), "exp_avg is a tensor"),
    "no moment": (lambda c: first(c).pop("exp_avg"), r"state\[0\] is a list of 2, expected a dict of step, exp_avg,"),
    "another moment": (lambda c: first(c).update(x=1), "is a list of 4, expected a dict of step"),
    "steps below 0": (lambda c: first(c).update(step=torch.tensor(-1.0)), "step is -1.0, expected a number of steps"),
    "half a step": (lambda c: first(c).update(step=torch.tensor(0.5)), "step is 0.5, expected a number of steps"),
    "steps of many": (lambda c: first(c).update(step=torch.ones(3)), r"step is a tensor of shape \(3,\)"),
    "one more parameter": (lambda c: c["optimizer"]["state"].update({9999: {}}), "state is 9999, expected parameters"),
    "no state": (lambda c: c["optimizer"].pop("state"), "its optimizer state is None, expected a dict"),
    "no groups": (lambda c: c["optimizer"].update(param_groups=[]), "param_groups is a list of 0, expected"),
    "a group of others": (lambda c: c["optimizer"]["param_groups"][0].update(params=[1, 0]), "params is a list of 2"),
    "a group of tensors": (lambda c: c["optimizer"]["param_groups"][0].update(params=[torch.ones(2)]), "params is a l"),
    "an optimizer that is none": (lambda c: c.update(optimizer=[]), "its optimizer is a list of 0, expected a dict"),
    "a scale below 0": (
        lambda c: c.update(scaler=dict(
            scale=-1.0, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000, _growth_tracker=0)),
        "its scaler scale is -1.0, expected a number in its range",
    ),
    "a scale of text": (lambda c: c.update(scaler={"scale": "x"}), "its scaler is a dict of 1, expected a dict"),
    "steps of text": (lambda c: c.update(step="7"), "its step is '7', expected a whole number from 0"),
    "a step of truth": (lambda c: c.update(step=True), "its step is True, expected a whole number"),
    "a negative step": (lambda c: c.update(step=-1), "its step is -1, expected a whole number from 0"),
    "endless steps": (lambda c: c.update(step=10**15), "its step is 1000000000000000, expected a whole number from 0"),
    "evaluated in the future": (lambda c: c.update(evaluated_step=9), "evaluated_step is 9, expected at most step 3"),
    "a best that is none": (lambda c: c.update(best=NAN), "its best is nan, expected a number"),
    "no images": (lambda c: c.update(images=0), "its images is 0, expected a whole number from 1"),
    "a batch of none": (lambda c: c.update(global_batch=0), "its global_batch is 0, expected a whole number from 1"),
    "a batch of all and more": (lambda c: c.update(global_batch=25), "global_batch is 25, expected at most images 24"),
    "a step that is a tensor": (lambda c: c.update(step=torch.ones(2)), "its step is a tensor of shape"),
    "a class twice": (lambda c: c.update(classes=["a", "a", "b"]), "its classes is a list of 3, expected"),
    "a class without a name": (lambda c: c.update(classes=["a", 1, "b"]), "its classes is a list of 3"),
    "weights that are none": (lambda c: c.update(model=[1]), "its model is a list of 1, expected a state dict"),
    "no weights": (lambda c: c.update(model={}), "holds no weights"),
    "an average that is none": (lambda c: c.update(ema=3), "its ema is 3, expected a state dict or None"),
    "no average": (lambda c: c.update(ema=None), "holds no moving average, but TRAIN.EMA_DECAY is set"),
    "an average of an average": (lambda c: c["ema"].update(x=c["ema"]), "holds things that are not tensors"),
    "an average that is not finite": (lambda c: c["ema"]["norm.bias"].fill_(NAN), "the moving average in last.pth c"),
    "weights that are not finite": (lambda c: c["model"]["norm.bias"].fill_(NAN), "norm.bias holds values that are"),
    "weights of another shape": (lambda c: c["model"].update({"norm.bias": torch.ones(1)}), r"norm.bias is \(1,\) in"),
    "weights that claim to be many": (
        lambda c: c["model"].update({"head.weight": torch.zeros(1, 1).expand(10**9, 128)}),
        "its head.weight is not a whole tensor of plain numbers",
    ),
    "weights without numbers": (
        lambda c: c["model"].update({"head.weight": torch.zeros(10**6, 10**6, device="meta")}), "its head.weight is no"
    ),
    "a config of numbers": (lambda c: c.update(config=5), "its config is 5, expected a text of settings"),
    "a config that unfolds": (lambda c: c.update(config=BOMB), "config has YAML aliases or is nested without end"),
    "a config without end": (lambda c: c.update(config="[" * 10**5), "config has YAML aliases or is nested"),
    "a config that is none": (lambda c: c.update(config="1"), "its config is not a text of settings"),
    "a config that is broken": (lambda c: c.update(config="a: b: c"), "its config is not YAML"),
    "a config of code": (lambda c: c.update(config="a: !!python/object:os.system x"), "its config is not YAML"),
    "a section that is none": (lambda c: c.update(config="MODEL: 3"), "its config has MODEL in a form that it cannot"),
    "a setting of another kind": (lambda c: c.update(config="SEED: []"), "SEED must be a whole number"),
    "a number without end": (lambda c: c.update(config=f"SEED: 0x{'f' * 4000}"), "its config has a number without end"),
    "no day": (lambda c: c.update(config="a: 2001-99-99"), "its config month must be in 1..12"),
}  # fmt: skip


@pytest.mark.parametrize("field", WRONG)
def test_each_wrong_field_is_named(run, field):
    content = copy.deepcopy(run[2])
    change, message = WRONG[field]
    change(content)
    with pytest.raises(UserError, match=message) as error:
        resume(run, content)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_a_whole_checkpoint_is_taken_as_it_is(run):
    _, state, content = run
    other = copy_of(state)
    for tensor in [*other.model.state_dict().values(), *other.ema.module.state_dict().values()]:
        tensor.zero_()
    other.restore(copy.deepcopy(content), Path("last.pth"))
    assert_same_tensors(other.content()["optimizer"]["state"], state.content()["optimizer"]["state"])
    for name in ("model", "ema"):
        assert_same_tensors(other.content()[name], state.content()[name])


def test_moments_that_lie_elsewhere_in_memory_are_the_same_moments(run):
    """As views of one storage, and with other strides: the fused kernels know of neither."""
    ended = []
    for change in (lambda t: t, in_one_storage, in_another_order):
        state, content = copy_of(run[1]), copy.deepcopy(run[2])
        for moments in content["optimizer"]["state"].values():
            moments.update({key: change(value) for key, value in moments.items() if value.ndim})
        state.restore(content, Path("last.pth"))
        torch.manual_seed(1)
        take_step(state)
        ended.append(state.content())
    for other in ended[1:]:
        assert_same_tensors(other["model"], ended[0]["model"])
        assert_same_tensors(other["optimizer"]["state"], ended[0]["optimizer"]["state"])
    state, content = copy_of(run[1]), copy.deepcopy(run[2])
    one = torch.zeros(8)
    same = [m for m in content["optimizer"]["state"].values() if m["exp_avg"].shape == one.shape]
    for moments in same:
        moments["exp_avg"] = one
    assert len(same) > 1
    state.restore(content, Path("last.pth"))
    loaded = [m["exp_avg"].data_ptr() for m in state.optimizer.state.values() if m["exp_avg"].shape == one.shape]
    assert len(set(loaded)) == len(loaded)


def in_one_storage(value: torch.Tensor) -> torch.Tensor:
    """Every other number of twice as many."""
    return torch.stack([value, value + 1], dim=-1)[..., 0]


def in_another_order(value: torch.Tensor) -> torch.Tensor:
    return value.transpose(0, -1).contiguous().transpose(0, -1)


SGD = ["TRAIN.OPTIMIZER.NAME", "sgd"]


@pytest.mark.parametrize("opts", [SGD, [*SGD, "TRAIN.OPTIMIZER.MOMENTUM", "0"], ["TRAIN.LAYER_DECAY", "0.8"]])
def test_every_optimizer_takes_its_own_state(run, opts):
    from checkpoint_mutations import SMALL

    from config import build_config

    config = build_config(str(ROOT / "configs" / "micro.yaml"), [*SMALL, *opts])
    state = copy_of(run[1])
    state.optimizer = build_optimizer(config, state.model)
    take_step(state)
    content = copy.deepcopy(state.content())
    for moments in state.optimizer.state.values():
        for value in moments.values():
            value.zero_() if isinstance(value, torch.Tensor) else None
    state.restore(copy.deepcopy(content), Path("last.pth"))
    assert_same_tensors(state.content()["optimizer"]["state"], content["optimizer"]["state"])


def test_a_config_that_unfolds_costs_no_memory(tmp_path):
    """In a process of its own, which may not take more."""
    (tmp_path / "bomb.yaml").write_text(BOMB)
    code = (
        "import resource, pathlib; from config import settings_in; from utils.errors import UserError\n"
        "most = int(pathlib.Path('/proc/self/statm').read_text().split()[0]) * 4096 + 2**28\n"
        "resource.setrlimit(resource.RLIMIT_AS, (most, most))\n"
        f"try: settings_in(pathlib.Path({str(tmp_path / 'bomb.yaml')!r}).read_text(), 'x.pth')\n"
        "except UserError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "x.pth: its config has YAML aliases" in done.stdout, done.stderr


def test_settings_of_other_versions_are_passed_over():
    found = settings_in("MODEL: {NAME: a, OF_LATER: 3}\nSEED: 5\nLATER: {A: 1}\n", "x.pth")
    assert found == {"MODEL.NAME": "a", "SEED": 5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c.replace("DEPTHS:\n", "DEPTHS:\n    - 99999999\n", 1),
            "embed_dim 16 and depths .99999999, 1, 1, 1, 1., its w",
        ),
        (
            lambda c: c.replace("EMBED_DIM: 16", "EMBED_DIM: 16000000"),
            "has embed_dim 16000000 and depths .*, its weights",
        ),
        (lambda c: "MODEL: {NAME: vit_giant_patch14_224}", "vit_giant_patch14_224 has .* weights, the file"),
        (
            lambda c: c.replace("IMG_SIZE: 32", "IMG_SIZE: 1000000"),
            "DATA.IMG_SIZE is 1000000, expected whole numbers up",
        ),
        (lambda c: c.replace("GROUP_SIZE: []", "GROUP_SIZE: [[9999999], 1, 1, 1]"), "GROUP_SIZE is 9999999, expected"),
    ],
)
def test_a_config_that_asks_for_a_model_beyond_all_bounds(run, tmp_path, change, message):
    content = copy.deepcopy(run[2])
    content["config"] = change(content["config"])
    assert content["config"] != run[2]["config"]
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match=message):
        load_trained(str(tmp_path / "x.pth"), CPU)


def test_on_the_command_line(run_main, digits, tmp_path):
    """A moment of the wrong shape used to be a segmentation fault, weights that are not numbers ``nan %``."""
    flags = (*TINY_RUN, "--data-path", digits, "--batch-size", "36")
    path, wrong = run_main(*flags).results / "checkpoints" / "last.pth", tmp_path / "wrong.pth"
    whole = checkpoint.read(path)
    for change, way, message in (
        (WRONG["a short moment"][0], (), "optimizer state[0] exp_avg is a tensor of shape (3,)"),
        (WRONG["weights that are not finite"][0], ("--eval",), "norm.bias holds values that are not finite"),
        (WRONG["a config that unfolds"][0], ("--eval",), "its config has YAML aliases"),
    ):
        content = copy.deepcopy(whole)
        change(content)
        torch.save(content, wrong)
        again = "--tag", "again", "--opts", "TRAIN.EPOCHS", "3"
        result = run_main(*flags, *way, "--resume", wrong, *again, ok=False)
        assert result.status == 2
        assert message in result.error
    content = copy.deepcopy(whole)
    content["optimizer"]["state"][0]["step"] = torch.tensor(1.0)
    torch.save(content, wrong)
    assert run_main(*flags, "--resume", wrong, *again).status == 0


def fuzz(folder: Path, first: int, last: int) -> None:
    code = "tests/checkpoint_mutations.py"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", code, folder, str(first), str(last)],
        cwd=ROOT, capture_output=True, text=True, timeout=3600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    whole, *cases = map(json.loads, done.stdout.splitlines())
    assert set(whole["ended"].values()) == {""}
    assert len(cases) == last - first
    made = [case for case in cases if case["ended"] is not None]
    assert len(made) > 0.9 * len(cases)
    for case in made:
        assert case["status"] == 0, case
        assert "traceback" not in case["ended"], case["ended"]["traceback"]
        assert not any("\n" in words for words in case["ended"].values()), case
        assert case["memory"] < whole["memory"] + 2**30, case
    refused = sum(any(case["ended"].values()) for case in made)
    assert 0.4 * len(made) < refused < 0.98 * len(made), "both outcomes must be met"
    most = max(case["memory"] for case in made) - whole["memory"]
    print(f"{len(made)} mutations: {refused} refused, {len(made) - refused} loaded; at most {most / 2**20:.0f} MB more")


@pytest.mark.slow
def test_many_mutations_of_a_checkpoint(tmp_path):
    """The same, 500 times."""
    fuzz(tmp_path, 0, 500)
