"""``scripts/benchmark.py`` on the real command line, and what it counts. No test depends on how fast anything is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch import nn
from torch.utils.checkpoint import checkpoint

from scripts.benchmarks.common import in_turn, ratio, within_memory
from scripts.benchmarks.counting import count_kernels, saved_bytes

CPU = torch.device("cpu")
SMALL = ("--image-size", "64", "--repeats", "2")


def run_benchmark(*arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "scripts/benchmark.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def figures(folder: Path, what: str) -> dict:
    return json.loads((folder / f"benchmark_{what}.json").read_text())


def test_model(tmp_path):
    names = ("crossformer_micro", "plain_crossformer_micro", "convnext_atto")
    done = run_benchmark("model", "--models", *names, "--batch-sizes", "2", "1", *SMALL, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in names)
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert "…" not in done.stdout  # no cell was cut
    report = figures(tmp_path, "model")
    assert report["precision"] == "fp32"
    assert len(report["matmul_tflops"]) == 2
    models = {model["name"]: model for model in report["models"]}
    assert tuple(models) == names
    ours, plain, other = models.values()
    assert ours["parameters"] == plain["parameters"]
    assert ours["gmac"] == plain["gmac"]
    assert ours["kernels"]["inference"] < plain["kernels"]["inference"] < plain["kernels"]["training"]
    for model in models.values():
        assert [batch["batch_size"] for batch in model["batches"]] == [1, 2]
        for batch in model["batches"]:
            assert len(batch["inference"]["images_per_second"]) == len(batch["training"]["images_per_second"]) == 2
        saved = [batch["training"]["memory_bytes"] for batch in model["batches"]]
        assert 1.7 * saved[0] < saved[1] <= 2 * saved[0]
    assert other["parameters"] > 3e6
    with Image.open(tmp_path / "benchmark_model.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 1000
        assert picture.height > 500
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 10


def test_step(tmp_path):
    done = run_benchmark("step", "--models", "crossformer_micro", "--batch-size", "2", *SMALL, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "…" not in done.stdout
    steps = {step["name"]: step for step in figures(tmp_path, "step")["steps"]}
    assert {"crossformer_micro", "crossformer_micro, recompute full", "plain_crossformer_micro"} < steps.keys()
    assert "swin_tiny" in steps
    for step in steps.values():
        assert len(step["images_per_second"]) == 2
        assert list(step["parts_milliseconds"]) == ["forward", "backward", "clip + optimizer", "EMA + meters"]
        assert all(len(values) == 2 and min(values) > 0 for values in step["parts_milliseconds"].values())
    saved = {name: step["memory_bytes"] for name, step in steps.items()}
    assert saved["crossformer_micro, recompute full"] < 0.5 * saved["crossformer_micro"]


def test_checkpoint(tmp_path):
    done = run_benchmark("checkpoint", "--megabytes", "4", "--repeats", "1", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(figures(tmp_path, "checkpoint")["seconds"]["loop with a save"]) == 1
    assert not (tmp_path / "benchmark_checkpoint").exists()


def test_all_says_what_it_leaves_out(tmp_path):
    flags = "--models", "crossformer_micro", "--batch-sizes", "1", "--megabytes", "4", "--image-size", "32"
    done = run_benchmark("all", *flags, "--repeats", "1", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "data is left out: it needs --data-path" in done.stdout
    assert {path.stem for path in tmp_path.glob("*.json")} == {
        f"benchmark_{w}" for w in ("model", "step", "checkpoint")
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model", "--models", "crossformer_smal"], "no model crossformer_smal; did you mean crossformer_small?"),
        (["model", "--models", "plain_crossformer_smal"], "did you mean plain_crossformer_small?"),
        (["model", "--models", "vit_small", "vit_small"], "vit_small stands twice"),
        (["step", "--models", "swin_tiny"], "swin_tiny is not a CrossFormer"),
        (["model", "--batch-sizes", "4", "0"], "--batch-sizes must be at least 1, not 0"),
        (["model", "--image-size", "31"], "--image-size must be at least 32, not 31"),
        (["step", "--repeats", "0"], "--repeats must be at least 1, not 0"),
        (["step", "--batch-size", "many"], "--batch-size: invalid int value: 'many'"),
        (["model", "--compile", "fast"], "--compile: invalid choice: 'fast'"),
        (["data"], "--data-path"),
        (["data", "--data-path", "/nowhere"], "--data-path /nowhere has no folder train/"),
        (["speed"], "invalid choice: 'speed'"),
    ],
)
def test_what_a_user_can_mend(tmp_path, arguments, message):
    done = run_benchmark(*arguments, *(["--output", tmp_path] if len(arguments) > 1 else []))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    done = run_benchmark("model", "--output", tmp_path / "file" / "below")
    assert done.returncode == 2
    assert done.stderr == f"error: --output {tmp_path}/file/below cannot be written to: Not a directory\n"


def test_contenders_run_in_turn():
    calls = []
    contenders = {name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}
    assert in_turn(contenders, 2) == {"a": [1, 3], "b": [2, 4]}
    assert calls == ["a", "b", "a", "b"]
    assert in_turn({"a": lambda: 1.0, "too large": lambda: None}, 2) == {"a": [1.0, 1.0]}
    assert ratio([2, 6, 30], [1, 2, 3]) == 3


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_want_of_memory_is_no_crash(error):
    def run():
        raise error

    assert within_memory(run) is None
    error.args = ("something else",)
    if not isinstance(error, torch.OutOfMemoryError):
        with pytest.raises(RuntimeError, match="something else"):
            within_memory(run)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_kernels_are_counted_exactly(mode):
    """A transpose, a view, a split and a detach compute nothing; a reshape that has to copy is a kernel."""
    x, weight = torch.ones(4, 8), torch.ones(8, 8)

    def run():
        with mode():
            a, _ = (x @ weight.t()).view(2, 2, 8).split(4, dim=-1)  # 1: the product
            a = a.detach().transpose(0, 1).reshape(-1)  # 2: the copy
            b = torch.nn.functional.layer_norm(a, (16,))  # 3
            b.add_(1)  # 4
            return torch.cat([b, torch.empty(1)])  # 5

    assert count_kernels(run, CPU) == 5


def test_a_linear_layer_and_its_backward_pass():
    layer, x = nn.Linear(8, 8), torch.ones(4, 8)

    def run():
        layer.zero_grad()
        layer(x).sum().backward()

    # addmm and sum; then the gradient of the sum (a fill and an expanded view), of the weight, and of the bias
    assert count_kernels(run, CPU) == 5


def test_saved_bytes_are_counted_exactly():
    x, weight = torch.ones(4, 8), torch.ones(8, 8, requires_grad=True)  # 128 and 256 bytes

    def run():
        y = (x @ weight).exp()  # x for the gradient of the weight; the result of exp for its own
        return (y * y.view(8, 4).view(4, 8)).sum()  # that storage again

    assert saved_bytes(run, [weight]) == 256
    assert saved_bytes(run) == 256  # the weight needs no saving here: nothing asks for the gradient of x
    with torch.no_grad():
        assert saved_bytes(run, [weight]) == 0


def test_saved_bytes_of_what_is_recomputed():
    layer = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8))
    x = torch.ones(4, 8, requires_grad=True)
    assert saved_bytes(lambda: layer(x), layer.parameters()) == 128 + 4 * 64 * 4
    assert saved_bytes(lambda: checkpoint(layer, x, use_reentrant=False), layer.parameters()) == 128
