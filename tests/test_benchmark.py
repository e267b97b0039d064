"""``scripts/benchmark.py`` on the real command line, and what it counts. No test depends on how fast anything is."""

import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import torch
from commands import start
from conftest import ROOT, quick
from PIL import Image
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from benchmarks.common import in_turn, ratio
from benchmarks.contenders import Contender, check_names, count_gmac
from engine.memory import within_memory
from scripts import benchmark
from utils.counting import count_kernels, moved_bytes, saved_bytes
from utils.errors import UserError

CPU = torch.device("cpu")
SMALL = ("--image-size", "64", "--repeats", "2")


def run_benchmark(*arguments) -> subprocess.CompletedProcess:
    return start("scripts/benchmark.py", *arguments)


def figures(folder: Path, what: str) -> dict:
    return json.loads((folder / f"benchmark_{what}.json").read_text())


@pytest.mark.slow
def test_model(tmp_path):
    names = ("crossformer_micro", "plain_crossformer_micro", "convnext_atto")
    done = run_benchmark("model", "--models", *names, "--batch-sizes", "2", "1", *SMALL, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in names)
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert "…" not in done.stdout  # no cell was cut
    report = figures(tmp_path, "model")
    assert report["precision"] == "fp32"
    assert len(report["matmul_tflops"]) == len(report["copy_gb_per_second"]) == 2
    models = {model["name"]: model for model in report["models"]}
    assert tuple(models) == names
    ours, plain, other = models.values()
    assert ours["parameters"] == plain["parameters"]
    assert ours["gmac"] == plain["gmac"]
    assert 0 < ours["moved_bytes"]["inference"] < ours["moved_bytes"]["training"]
    assert ours["kernels"]["inference"] < plain["kernels"]["inference"] < plain["kernels"]["training"]
    for model in models.values():
        assert [batch["batch_size"] for batch in model["batches"]] == [1, 2]
        for batch in model["batches"]:
            assert len(batch["inference"]["images_per_second"]) == len(batch["training"]["images_per_second"]) == 2
            (forward, backward, update, average), _ = batch["training"]["parts_milliseconds"]
            assert min(forward, backward, update, average) > 0
        saved = [batch["training"]["memory_bytes"] for batch in model["batches"]]
        assert 1.7 * saved[0] < saved[1] <= 2 * saved[0]
    assert other["parameters"] > 3e6
    with Image.open(tmp_path / "benchmark_model.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 1000
        assert picture.height > 500
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 10


@pytest.mark.slow
def test_step(tmp_path):
    done = run_benchmark("step", "--models", "crossformer_micro", "--batch-sizes", "2", *SMALL, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "…" not in done.stdout
    steps = {step["name"]: step["batches"][0]["training"] for step in figures(tmp_path, "step")["models"]}
    ours, plain = "crossformer_micro", "plain_crossformer_micro"
    assert list(steps) == [
        ours, f"{ours}, recompute selective", f"{ours}, recompute full", plain, f"{plain}, plain step", "swin_tiny"
    ]  # fmt: skip
    for step in steps.values():
        assert len(step["images_per_second"]) == len(step["parts_milliseconds"]) == 2
    assert steps[f"{ours}, recompute full"]["memory_bytes"] < 0.5 * steps[ours]["memory_bytes"]


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> Path:
    """What one run of all benchmarks without data has written, its standard output too."""
    folder = tmp_path_factory.mktemp("all")
    models = "crossformer_micro", "plain_crossformer_micro"
    flags = "--models", *models, "--batch-sizes", "1", "--megabytes", "4", "--image-size", "32", "--repeats", "1"
    done = run_benchmark("all", *flags, "--output", folder)
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder


@pytest.mark.slow
def test_all_says_what_it_leaves_out(everything):
    assert "data is left out: it needs --data-path" in (everything / "stdout").read_text()
    assert {path.stem for path in everything.glob("*.json")} == {
        "benchmark_model", "benchmark_step", "benchmark_checkpoint",
    }  # fmt: skip


@pytest.mark.slow
def test_checkpoint(everything):
    assert len(figures(everything, "checkpoint")["seconds"]["loop with a save"]) == 1
    assert not (everything / "benchmark_checkpoint").exists()


def run_report(folder: Path, page: Path) -> subprocess.CompletedProcess:
    return run_benchmark("report", "--output", folder, "--page", page)


@pytest.mark.slow
def test_report(everything, tmp_path):
    """Twice, since what stood between the two comments is replaced."""
    folder, page = tmp_path / "figures", tmp_path / "page.md"
    shutil.copytree(everything, folder)
    model = figures(folder, "model")
    unknown = {"images_per_second": None, "memory_bytes": None, "parts_milliseconds": []}
    model["models"][0]["batches"][0]["training"] = unknown
    (folder / "compiled").mkdir()
    (folder / "compiled" / "benchmark_model.json").write_text(json.dumps(model))
    (folder / "tests.log").write_text("...\n2 passed, 500 deselected in 61.20s (0:01:01)\n")
    (folder / "crossformer_small" / "end_to_end").mkdir(parents=True)
    lines = [{"event": "train", "step": i, "images_per_second": 10 * i, "data_wait": 0.25} for i in range(1, 6)]
    lines.append({"event": "eval"})
    metrics = folder / "crossformer_small" / "end_to_end" / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page.write_text("# Page\n\n<!-- gpu:begin -->\nold\n<!-- gpu:end -->\n\nThe end.\n")
    for _ in range(2):
        done = run_report(folder, page)
        assert done.returncode == 0, done.stderr
        text = page.read_text()
        assert text.startswith("# Page\n\n<!-- gpu:begin -->\n\nMeasured on ")
        assert text.endswith("\n<!-- gpu:end -->\n\nThe end.\n")
    assert "old" not in text
    assert "The tests marked `gpu`: 2 passed, 500 deselected in 61.20s (0:01:01)." in text
    assert "Not measured: the input pipeline." in text
    assert "35 images/s, of whose time 25.0 % is waiting for data (step 5; crossformer_small)" in text  # of 20 to 50
    assert text.count("| out of memory |") == 1
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert sum(row.startswith("| crossformer_micro |") for row in rows) == 9  # speeds, parts and work, three times
    tables = text.split("\n\n")
    for table in (part.splitlines() for part in tables if part.startswith("| ")):
        assert {line.count(" | ") for line in table} == {table[0].count(" | ")}


@pytest.mark.slow
def test_report_without_a_place_to_put_it(everything, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- gpu:begin -->\n")
    done = run_report(everything, page)
    assert done.returncode == 2
    assert done.stderr == f"error: {page} must have <!-- gpu:begin --> and after it <!-- gpu:end -->, each once\n"
    done = run_report(tmp_path, page)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path} has no figures; scripts/gpu_report.sh writes them\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_report_needs_a_gpu():
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "scripts/gpu_report.sh"], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith("error: python on PATH has no torch that sees a GPU")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model", "--models", "crossformer_smal"], "no model crossformer_smal; did you mean crossformer_small?"),
        (["model", "--models", "plain_crossformer_smal"], "did you mean plain_crossformer_small?"),
        (["model", "--models", "vit_small", "vit_small"], "vit_small stands twice"),
        (["step", "--models", "swin_tiny"], "swin_tiny is not a CrossFormer"),
        (["model", "--batch-sizes", "4", "0"], "--batch-sizes must be at least 1, not 0"),
        (["model", "--image-size", "31"], "--image-size must be at least 32, not 31"),
        (["model", "--image-size", "32", "64", "3"], "--image-size must be at least 32, not 3"),
        (["model", "--image-size", "32", "64", "96"], "--image-size takes one number, or a height and a width, not 3"),
        (["step", "--repeats", "0"], "--repeats must be at least 1, not 0"),
        (["step", "--batch-sizes", "many"], "--batch-sizes: invalid int value: 'many'"),
        (["model", "--compile", "fast"], "--compile: invalid choice: 'fast'"),
        (["data"], "--data-path"),
        (["speed"], "invalid choice: 'speed'"),
    ],
)
def test_what_a_user_can_mend(monkeypatch, capsys, tmp_path, arguments, message):
    output = ["--output", str(tmp_path)] if len(arguments) > 1 else []
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments, *output])
    assert benchmark.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "--data-path", "/nowhere", "--output", "out"], "--data-path /nowhere has no folder train/"),
        (["model", "--output", "file/below"], "--output file/below cannot be written to: Not a directory"),
        (["model", "--models", "levit_128s", "--image-size", "50", "--output", "out"], "levit_128s does not take it"),
    ],
)
def test_what_shows_once_it_has_begun(tmp_path, arguments, message):
    (tmp_path / "file").touch()
    done = start(ROOT / "scripts" / "benchmark.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr
    assert message in line


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


def test_moved_bytes_are_counted_exactly():
    x, weight = torch.ones(4, 8), torch.ones(8, 16)

    def run():
        y = x @ weight  # 128 + 512 bytes in, 256 out
        return y.view(8, 8) + torch.ones(1).expand(8, 8)  # 4 out; 256 + 4 in, 256 out

    assert moved_bytes(run) == 128 + 512 + 256 + 4 + 256 + 4 + 256


def test_what_was_counted_is_freed():
    """Also what an operation keeps of its own result."""
    x, made = torch.ones(8, 8, requires_grad=True), []

    def run():
        y = x.exp()
        made.append(StorageWeakRef(y.untyped_storage()))
        return y.sum()

    assert saved_bytes(run) == 256
    assert all(reference.expired() for reference in made)


def test_saved_bytes_of_what_is_recomputed():
    layer = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8))
    x = torch.ones(4, 8, requires_grad=True)
    assert saved_bytes(lambda: layer(x), layer.parameters()) == 128 + 4 * 64 * 4
    assert saved_bytes(lambda: checkpoint(layer, x, use_reentrant=False), layer.parameters()) == 128
    # Selective: what is kept by a mode of torch's own and not saved by autograd counts too, 4 x 64 numbers
    keep = partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
    kept = saved_bytes(lambda: checkpoint(layer, x, use_reentrant=False, context_fn=keep), layer.parameters())
    assert kept == 128 + 4 * 64 * 4


def test_a_segmenter_is_a_contender():
    one = Contender("semantic_fpn/crossformer_micro", Namespace(image_size=(64, 64), precision="fp32"))
    one.training(one.task.synthetic_batch(2))
    assert len(one.part_milliseconds()) == 4
    for wrong in ("upernet/nothing", "upernet/plain_crossformer_micro"):
        with pytest.raises(UserError, match="there is no model"):
            check_names([wrong])


@pytest.mark.parametrize(
    "head", quick(["retinanet", "retinanet_torchvision", "mask_rcnn_torchvision"], ["retinanet_torchvision"])
)
def test_a_detector_is_a_contender(head):
    """On images that are no squares; a row of the report says nothing of GMAC, which are unknown."""
    name, size = f"{head}/crossformer_micro", (32, 64)
    one = Contender(name, Namespace(image_size=size, precision="fp32"))
    assert one.model.published != ("torchvision" in head)
    batch = one.task.synthetic_batch(2)
    assert [image.shape for image in batch.images] == [(3, *size)] * 2
    one.training(batch)
    assert len(one.part_milliseconds()) == 4
    one.model.eval()
    one.inference(batch)
    assert one.memory("training", batch) > 0
    assert count_gmac(name, size) is None
    with pytest.raises(UserError, match="there is no model nothing/crossformer_micro"):
        check_names(["nothing/crossformer_micro"])


@pytest.mark.slow
def test_detectors(tmp_path):
    names = ("retinanet/crossformer_micro", "mask_rcnn_torchvision/crossformer_micro", "retinanet/swin_tiny")
    size = ("--image-size", "32", "64", "--batch-sizes", "1", "2", "--repeats", "1", "--output", tmp_path)
    done = run_benchmark("model", "--models", *names, *size)
    assert done.returncode == 0, done.stderr
    assert "32 x 64" in done.stdout
    assert "nan" not in done.stdout.split()
    for model in figures(tmp_path, "model")["models"]:
        assert model["gmac"] is None
        assert all(batch[kind]["images_per_second"] for batch in model["batches"] for kind in ("inference", "training"))


@pytest.mark.parametrize(
    ("data", "cfg", "stages"),
    [
        ("objects", "detection/mask_rcnn_micro", {"decode masks", "resize, crop, flip, pack masks"}),
        ("pairs", "segmentation/semantic_fpn_micro", {"decode label map", "change colours"}),
    ],
)
def test_data_of_dense_tasks(request, tmp_path, data, cfg, stages):
    words = ("--cfg", f"configs/{cfg}.yaml", "--data-path", request.getfixturevalue(data), "--workers", "1")
    words += ("--batch-size", "2", "--batches", "1", "--repeats", "2", "--output", tmp_path)
    done = run_benchmark("data", *words)
    assert done.returncode == 0, done.stderr
    report = figures(tmp_path, "data")
    assert len(report["images_per_second"]["this loader"]) == 2
    assert {"read", "decode image", *stages} <= report["milliseconds_per_image"].keys()
    assert min(report["milliseconds_per_image"].values()) > 0
    assert f"Loader for {cfg.partition('/')[0]}: " in done.stdout


def test_what_normalises_over_the_batch_is_not_timed_on_one_image(capsys):
    assert (
        benchmark.run_command(benchmark.benchmark, ["model", "--models", "upernet/swin_tiny", "--batch-sizes", "1"])
        == 2
    )
    assert "--batch-sizes 1: upernet/swin_tiny has BatchNorm over single values" in capsys.readouterr().err
