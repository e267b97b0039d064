"""Checkpoints of other trainers: read as plain data, fitted to the model, and never run."""

import argparse
import collections
import copy
import datetime
import os
import re
import runpy
import subprocess
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import TINY_RUN
from torch import Tensor, nn

from main import main
from models import load_weights
from models.weights import classes_in, fit, variant_of
from tasks.trained import load_trained
from utils import checkpoint
from utils.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return timm.create_model("crossformer_micro", num_classes=10).state_dict()


def under(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in weights.items()}


def doubled(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: 2 * value for key, value in weights.items()}


class Attributes(dict):
    """As the dicts with attributes of many packages."""


class Loss:
    """An object of another package, of which the reader knows nothing."""

    def __init__(self):
        self.smoothing, self.of = 0.1, [argparse.Namespace(k=Path("a/b"))]


def in_one_storage(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = torch.cat([value.flatten() for value in weights.values()]).split([v.numel() for v in weights.values()])
    return {key: part.view(weights[key].shape) for key, part in zip(weights, parts, strict=True)}


def of_timm(w: dict) -> dict:
    args = argparse.Namespace(lr=0.1, model="x", data_dir=Path("/imagenet"), start=datetime.datetime(2026, 1, 1))
    return {"epoch": 3, "arch": "x", "state_dict": w, "args": args, "metric": np.float64(71.2), "version": 2}


TRAINERS: dict[str, Callable[[dict[str, Tensor]], dict]] = {
    "timm": of_timm,
    "deit": lambda w: {"model": w, "model_ema": doubled(w), "args": argparse.Namespace(), "scaler": {"scale": 1.0}},
    "swin": lambda w: {"model": w, "config": Attributes(A=Attributes(B=1)), "max_accuracy": np.float32(81), "epoch": 9},
    "lightning": lambda w: {
        "state_dict": under("model.", w) | {"criterion.weight": torch.ones(10)},
        "callbacks": {"ModelCheckpoint{}": {"best_model_score": torch.tensor(0.5), "dirpath": PurePosixPath("x")}},
        "hyper_parameters": Attributes(lr=0.1, loss=Loss()),
        "pytorch-lightning_version": "2.5.0",
        "loops": {"state": collections.defaultdict(dict, {"fit": {1: 2}})},
    },
    "lightning, compiled": lambda w: {"state_dict": under("model._orig_mod.", w), "epoch": np.int64(3)},
    "deepspeed": lambda w: {"module": under("module.", w), "ds_config": {}, "args": types.SimpleNamespace(a=1)},
    "compiled": lambda w: {"model": under("_orig_mod.", w)},
    "compiled, distributed": lambda w: under("module._orig_mod.", w),
    "distributed, compiled": lambda w: {"model_state_dict": under("_orig_mod.module.model.", w)},
    "a name of its own": lambda w: {"state_dict": under("my_net.", w)},
    "averaged": lambda w: {"state_dict": under("module.", w) | {"n_averaged": torch.tensor(7)}},
    "counted": lambda w: w | {"total_ops": torch.zeros(1), "layers.0.blocks.0.total_params": torch.zeros(1)},
    "half": lambda w: {"state_dict": {key: value.half() for key, value in w.items()}},
    "one storage": lambda w: in_one_storage(w),
    "numpy": lambda w: {"model": {key: value.numpy() for key, value in w.items()}},
}  # fmt: skip


@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_files_of_other_trainers(tmp_path, weights, trainer, as_zip):
    made, path = TRAINERS[trainer](weights), tmp_path / "x.pth"
    torch.save(made, path, _use_new_zipfile_serialization=as_zip)
    found = checkpoint.weights_in(checkpoint.read(path), path)
    assert variant_of(found["model"]) == "crossformer_micro"
    assert classes_in(found["model"], "crossformer_micro") == 10
    for which, state_dict in found.items():
        model = timm.create_model("crossformer_micro", num_classes=10)
        loaded = load_weights(model, state_dict, "x.pth", allow_new_head=False)
        assert loaded.matched == len(weights)
        for key, value in model.state_dict().items():
            wanted = weights[key].half().float() if trainer == "half" else weights[key]
            assert torch.equal(value, wanted * (2 if which == "ema" else 1)), key


VALUES = {
    "namespace": (argparse.Namespace(a=1, b=[argparse.Namespace(c=2)]), {"a": 1, "b": [{"c": 2}]}),
    "numbers of numpy": ([np.float64(71.25), np.int64(3), np.bool_(True), np.float32(0.5)], [71.25, 3, True, 0.5]),
    "kinds of numpy": (np.dtype("f4"), "numpy.f4"),
    "arrays": ([np.arange(4).reshape(2, 2).T, np.arange(2, dtype=">i4")], [[[0, 2], [1, 3]], [0, 1]]),
    "an array of objects": (np.array([{}], dtype=object), "an array"),
    "paths": ([Path("/a/b"), PurePosixPath("c")], ["/a/b", "c"]),
    "times": (datetime.timedelta(1), (1, 0, 0)),
    "dicts": ([collections.defaultdict(list, {1: [2]}), collections.Counter("aab")], [{1: [2]}, {"a": 2, "b": 1}]),
    "ordered": (collections.OrderedDict(a=collections.OrderedDict(b=1)), {"a": {"b": 1}}),
    "attributes": (types.SimpleNamespace(a=1), {"a": 1}),
    "kinds of torch": ([torch.float16, torch.Size([2])], [torch.float16, (2,)]),
    "versions": (torch.__version__, str(torch.__version__)),
    "objects": (Loss(), {"smoothing": 0.1, "of": [{"k": "a/b"}]}),
    "dicts of packages": (Attributes(a=Attributes(b=1)), {"a": {"b": 1}}),
}  # fmt: skip


@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize("kind", VALUES)
def test_what_a_file_carries_is_read_as_plain_data(tmp_path, kind, as_zip):
    value, plain = VALUES[kind]
    torch.save({"x": value}, tmp_path / "x.pth", _use_new_zipfile_serialization=as_zip)
    read = checkpoint.read(tmp_path / "x.pth")["x"]
    lists = [item.tolist() if isinstance(item, Tensor) else item for item in read] if isinstance(read, list) else read
    assert lists == plain
    assert type(lists) is type(plain)


class Calling:
    """Calls something when it is unpickled."""

    def __init__(self, *call: Any):
        self.call = call[0], call[1:]

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.system, "posix.system"),
        (eval, "builtins.eval"),
        (exec, "builtins.exec"),
        (getattr, "builtins.getattr"),
        (subprocess.Popen, "subprocess.Popen"),
        (subprocess.check_output, "subprocess.check_output"),
        (runpy.run_path, "runpy.run_path"),
        (torch.load, "torch.serialization.load"),
        (torch.hub.load_state_dict_from_url, "torch.hub.load_state_dict_from_url"),
        (np.load, "numpy.load"),
        (timm.create_model, "timm.models._factory.create_model"),
        (partial, "functools.partial"),
        (nn.Linear, "torch.nn.modules.linear.Linear"),
        (open, f"{open.__module__}.open"),  # io, and from Python 3.12 on _io
    ],
)
def test_what_would_run_is_refused_by_name(tmp_path, function, name, as_zip):
    proof = tmp_path / "it_ran"
    content = {"model": {"a": torch.ones(1)}, "args": [argparse.Namespace(), Calling(function, f"touch {proof}")]}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=as_zip)
    with pytest.raises(checkpoint.RefusedFile, match=rf"it asks to run code \({re.escape(name)}\) when it is opened"):
        checkpoint.read(tmp_path / "x.pth")
    assert not proof.exists()


def test_what_a_file_names_is_never_imported(tmp_path):
    """A module that would say so."""
    import sys

    (tmp_path / "told_me.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\nclass A: pass\n")
    sys.path.insert(0, str(tmp_path))
    try:
        import told_me

        torch.save({"x": told_me.A()}, tmp_path / "x.pth")
        del sys.modules["told_me"]
        (tmp_path / "imported").unlink()
        assert checkpoint.read(tmp_path / "x.pth") == {"x": {}}
        assert not (tmp_path / "imported").exists()
    finally:
        sys.path.remove(str(tmp_path))


def test_a_zip_that_unfolds_to_more_than_it_is(tmp_path):
    import zipfile

    torch.save({"a": torch.zeros(10**6)}, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as whole, zipfile.ZipFile(tmp_path / "y.pth", "w", 8) as packed:
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    with pytest.raises(checkpoint.DamagedFile, match="y.pth is damaged or not a checkpoint"):
        checkpoint.read(tmp_path / "y.pth")


class Wrapping(nn.Module):
    """With parts that are called like wrappers, as some models of timm have."""

    num_classes, pretrained_cfg = 3, {"classifier": "head"}

    def __init__(self):
        super().__init__()
        self.model = nn.ModuleDict({"net": nn.Linear(2, 2), "model": nn.BatchNorm1d(2)})
        self.backbone, self.encoder, self.head = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 3)


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.module.", "model.model.", "encoder."])
def test_parts_that_are_called_like_wrappers_stay(prefix):
    source = Wrapping()
    for state_dict in (source.state_dict(), dict(reversed(source.state_dict().items()))):
        model = Wrapping()
        loaded = load_weights(model, under(prefix, state_dict), "x.pth", allow_new_head=False)
        assert loaded.matched == len(state_dict)
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in state_dict.items())
        assert loaded.notes == ([f"the prefix {prefix} was taken off"] if prefix else [])


@pytest.mark.parametrize(
    "name", ["resnet10t", "convnext_atto", "levit_128s", "swin_tiny_patch4_window7_224", "tiny_vit_5m_224"]
)
def test_timms_own_files_load_as_they_are(name):
    """Models with tables of their own, and with names that are endings of others."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=3)
    state_dict = model.state_dict()
    for prefix in ("", "model."):
        fitted = fit(under(prefix, state_dict), model, "x.pth")
        assert fitted.weights.keys() == state_dict.keys()
        assert classes_in(under(prefix, state_dict), name) == 3


def test_names_that_authors_gave_become_timms():
    """ConvNeXt's own files."""
    source = timm.create_model("convnext_atto", num_classes=3)
    renamed = {}
    for key, value in source.state_dict().items():
        key = re.sub(r"^stem\.", "downsample_layers.0.", key)
        key = re.sub(r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1.", key)
        key = re.sub(r"^stages\.(\d+)\.blocks\.(\d+)\.", r"stages.\1.\2.", key)
        key = key.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv").replace("head.norm.", "norm.")
        renamed[key.replace("head.fc.", "head.")] = value.flatten(1) if "mlp.fc" in key and value.ndim == 4 else value
    model = timm.create_model("convnext_atto", num_classes=3)
    loaded = load_weights(model, under("module.", renamed), "x.pth", allow_new_head=False)
    assert loaded.notes == ["the prefix module. was taken off", "its names were changed to those of timm"]
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())
    assert classes_in(renamed, "convnext_atto") == 3


def test_a_model_that_somebody_has_registered_without_a_config(monkeypatch, tmp_path):
    """Nothing says what its classifier is called, or how its images are prepared."""
    model = timm.create_model("resnet10t", num_classes=3)
    for cfg in (None, timm.models.PretrainedCfg()):
        monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name, cfg=cfg: cfg)
        assert classes_in(model.state_dict(), "resnet10t") == 3
        assert classes_in({}, "resnet10t") is None
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: None)
    torch.save(model.state_dict(), tmp_path / "x.pth")
    assert load_trained(str(tmp_path / "x.pth"), CPU, "resnet10t").config.DATA.IMG_SIZE == 224


def test_what_is_left_over_is_said_or_an_error(weights):
    model = timm.create_model("crossformer_micro", num_classes=10)
    counted = weights | {
        "x.total_ops": torch.zeros(1),
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(2),
    }
    notes = load_weights(model, counted, "x.pth", allow_new_head=False).notes
    assert notes == ["left out 2 which are no weights: x.total_ops, layers.0.blocks.0.attn.relative_position_index"]
    others = under("net.", weights) | {f"criterion.{i}": torch.zeros(1) for i in range(4)}
    notes = load_weights(model, others, "x.pth", allow_new_head=False).notes
    assert notes == [
        "the prefix net. was taken off", "left out 4 of other modules: criterion.0, criterion.1, criterion.2, ..."
    ]  # fmt: skip
    for state_dict, message in (
        (weights | {"extra.weight": torch.zeros(1)}, "it has but the model lacks extra.weight"),
        (under("net.", weights | {"extra.weight": torch.zeros(1)}), "it has but the model lacks extra.weight"),
        (under("student.", weights) | under("teacher.", weights), "several models, under student., teacher.; save"),
        ({"a.b": torch.zeros(1)}, r"no classes in x.pth, 10 in the data; .* \(its keys begin like a.b\)"),
        ({k: v.long() for k, v in weights.items()}, "holds whole numbers in the file, fractions in the model"),
        ({k: v.cfloat() for k, v in weights.items()}, "holds complex numbers in the file, fractions in the model"),
        ({k: v[None] for k, v in weights.items()}, "10 in the data|does not fit the model: .* in the file"),
        (
            {k: v * float("nan") for k, v in weights.items()},
            "x.pth cannot be used: .* holds values that are not finite",
        ),
        ({k: v.double() * 1e300 for k, v in weights.items()}, "holds values that are not finite; take an earlier"),
    ):
        with pytest.raises(UserError, match=message):
            load_weights(model, state_dict, "x.pth", allow_new_head=False)


AVERAGES: dict[str, Callable[[dict, dict], dict]] = {
    "timm": lambda w, e: {"state_dict": w, "state_dict_ema": e},
    "torchvision": lambda w, e: {"model": w, "model_ema": under("module.", e) | {"n_averaged": torch.tensor(3)}},
    "wrapped": lambda w, e: {"model": w, "ema": {"module": e, "decay": 0.99, "updates": 4}},
    "a callback": lambda w, e: {"state_dict": under("model.", w), "callbacks": {"EMA": {"ema_state_dict": e}}},
    "among the weights": lambda w, e: {"state_dict": under("model.", w) | under("model_ema.module.", e)
                                       | {"model_ema.decay": torch.tensor(0.9)}},
    "nothing else": lambda w, e: {"ema_state_dict": e},
}  # fmt: skip


@pytest.mark.parametrize("kind", AVERAGES)
def test_a_moving_average_is_found_and_chosen(tmp_path, weights, kind):
    path = tmp_path / "x.pth"
    torch.save(AVERAGES[kind](weights, doubled(weights)), path)
    for which, factor in (("auto", 2), ("ema", 2), ("model", 1)):
        if kind == "nothing else" and which == "model":
            with pytest.raises(UserError, match=r"holds a moving average of the weights, not .* MODEL.WEIGHTS ema"):
                load_trained(str(path), CPU, weights=which)
            continue
        trained = load_trained(str(path), CPU, weights=which)
        assert trained.facts["weights"] == ("model" if which == "model" else "ema")
        assert all(torch.equal(value, factor * weights[key]) for key, value in trained.model.state_dict().items())
    torch.save({"model": weights}, path)
    with pytest.raises(UserError, match=r"holds the weights themselves, not .*; choose MODEL.WEIGHTS model or auto"):
        load_trained(str(path), CPU, weights="ema")


@pytest.fixture
def run(tmp_path, digits, capsys):
    """``main.py`` in this process: its status, and what it says."""

    def start(*flags: Any) -> tuple[int, str]:
        output = "--output", str(tmp_path / "output"), "--data-path", str(digits), "--batch-size", "36"
        status = main([*TINY_RUN, *map(str, flags), *output])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return start


def test_evaluating_and_starting_from_files_of_others(run, tmp_path, weights):
    """With --eval and --pretrained: an argparse.Namespace, numpy's numbers, and the prefixes of two wrappers."""
    lightning = {"state_dict": under("model._orig_mod.", weights) | {"criterion.weight": torch.ones(10)}}
    lightning["epoch"], lightning["loss"] = torch.tensor(3), np.array([1.0])
    torch.save(lightning, tmp_path / "lightning.ckpt")
    torch.save(of_timm(weights) | {"state_dict_ema": doubled(weights)}, tmp_path / "timm.pth.tar")
    torch.save(weights, tmp_path / "plain.pth")
    status, plain = run("--eval", "--resume", tmp_path / "plain.pth")
    assert status == 0
    result = re.search(r"top-1 .* 37 images", plain)[0]
    status, said = run("--eval", "--resume", tmp_path / "lightning.ckpt")
    assert (status, result in said) == (0, True)
    assert "the prefix model._orig_mod. was taken off" in said
    assert "left out 1 of other modules: criterion.weight" in said
    status, said = run("--eval", "--resume", tmp_path / "timm.pth.tar")
    assert (status, result in said, said.count("eval "), "ema of" in said) == (0, True, 2, True)
    status, said = run("--eval", "--resume", tmp_path / "timm.pth.tar", "--opts", "MODEL.WEIGHTS", "model")
    assert (status, result in said, said.count("eval ")) == (0, True, 1)
    for name, notes in (
        ("lightning.ckpt", "the prefix model._orig_mod. was taken off"),
        ("timm.pth.tar", "average in it"),
    ):
        flags = (
            "--pretrained",
            tmp_path / name,
            "--tag",
            name,
            "--opts",
            "TRAIN.EPOCHS",
            "1",
            "TRAIN.WARMUP_EPOCHS",
            "0",
        )
        status, said = run(*flags)
        assert status == 0
        assert f"{len(weights)} weights matched, the head too" in said
        assert notes in said


def test_weights_that_are_not_numbers_are_not_evaluated(run, tmp_path, weights):
    broken = copy.deepcopy(weights)
    broken["norm.weight"][3] = float("nan")
    torch.save({"model": weights, "ema": broken}, tmp_path / "x.pth")
    status, said = run("--eval", "--resume", tmp_path / "x.pth")
    assert status == 2
    assert "error: the moving average in" in said
    assert "norm.weight holds values that are not finite" in said
    torch.save({key: torch.full_like(value, 3e38) for key, value in weights.items()}, tmp_path / "x.pth")
    status, said = run("--eval", "--resume", tmp_path / "x.pth")
    assert status == 2
    assert "gives answers that are not finite" in said
