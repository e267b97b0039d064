"""What can only be seen on a GPU. Skipped without one."""

import json
import math
import warnings

import pytest
import test_detection as detection
import timm
import torch
from commands import start
from conftest import TINY_RUN
from test_crossformer import fill, images
from timm.data.auto_augment import _RAND_INCREASING_TRANSFORMS
from torch._dynamo.utils import counters

from config import build_config
from data.augmentation import Plan, build_train_stage, build_train_transform
from engine.model import begin_step
from engine.train import train
from models.crossformer import fusion
from models.heads import DETECTORS
from tasks.classification import Classification
from utils.randomness import seed_cpu

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("name", ["crossformer_small", "crossformerpp_small"])
@pytest.mark.parametrize("size", [(224, 224), (192, 640)])
def test_same_logits_and_gradients_as_on_the_cpu(name, size, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # AMP none does so
    results = []
    for device in ("cpu", "cuda"):
        model = timm.create_model(name)
        fill(model)
        model.to(device, memory_format=torch.channels_last)
        out = model(images(0, 2, 3, *size).to(device))
        out.square().mean().backward()
        results.append((out.cpu(), [p.grad.norm().item() for p in model.parameters()]))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-3)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("name", ["crossformer_small", "crossformerpp_small"])
@pytest.mark.parametrize("recompute", [None, False, True])
def test_the_kernels_compute_what_torch_does(name, recompute, monkeypatch):
    """Beside single precision as near as torch's operations in half precision, and twice the same to the bit."""

    monkeypatch.setattr(fusion, "LEAST_ELEMENTS", 0)

    def gradients(fused: bool, dtype: torch.dtype) -> torch.Tensor:
        monkeypatch.setattr(timm.layers.config, "_USE_FUSED_ATTN", int(fused))
        model = timm.create_model(name, depths=(2, 1, 3, 1), num_classes=10, drop_path_rate=0.5).cuda()
        fill(model)
        if recompute is not None:
            model.set_grad_checkpointing(selective=recompute)
        torch.manual_seed(0)
        with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
            out = model(images(0, 8, 3, 208, 240).cuda())
        out.float().square().mean().backward()
        return torch.cat([out.flatten().float(), *(p.grad.flatten() for p in model.parameters())])

    def error(got: torch.Tensor) -> float:
        return ((got - expected).norm() / expected.norm()).item()

    expected = gradients(False, torch.float32)
    fused = gradients(True, torch.bfloat16)
    assert torch.equal(fused, gradients(True, torch.bfloat16))
    assert error(fused) < 1.2 * error(gradients(False, torch.bfloat16)) < 0.1


def test_a_batch_with_more_groups_than_a_grid_dimension():
    """256 images in 256 groups each are one more than the 65,535 blocks of a CUDA grid dimension.

    In training under autocast, with stochastic depth and a block that ends with an amplitude cooling layer.
    """
    model = timm.create_model("crossformerpp_small", depths=(2, 1, 4, 1), drop_path_rate=0.5).cuda()
    x = torch.randn(256, 3, 224, 224, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        model(x).float().sum().backward()
        small = model.eval()(x[-2:])
        assert torch.allclose(model(x)[-2:], small, atol=0.05)


def test_cuda_graphs_train_and_evaluate_the_same(run_main, digits):
    """37 images to evaluate: the last batch is not a whole one. That graphs are used is the next test."""
    results = []
    for mode in ("none", "reduce-overhead"):
        flags = ("MODEL.DROP_PATH_RATE", "0", "AMP", "none", "TRAIN.COMPILE", mode, "TEST.VIEWS", "flip", "--tag", mode)
        result = run_main(*TINY_RUN, *flags, "--data-path", digits, "--batch-size", "12", tag=mode)
        results.append((result.losses(), [event["loss"] for event in result.events("eval")]))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-3)
    assert results[0][1] == pytest.approx(results[1][1], abs=1e-3)


def test_nothing_keeps_cuda_graphs_from_being_used():
    """With stochastic depth, whose draws differ from step to step."""
    counters.clear()
    model = timm.create_model("crossformer_micro", num_classes=10, depths=(1, 1, 10, 1), drop_path_rate=0.5).cuda()
    model.compile(mode="reduce-overhead", dynamic=False)
    x, losses = torch.ones(8, 3, 32, 32, device="cuda"), []
    for _ in range(6):
        begin_step(model)
        loss = model(x).square().mean()
        loss.backward()
        model.zero_grad()
        losses.append(loss.item())
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert len(set(losses)) == len(losses)


@pytest.mark.parametrize("amp", ["none", "tf32", "bf16", "fp16"])
def test_a_run_trains_and_carries_on(run_main, digits, amp):
    flags = (*TINY_RUN, "AMP", amp, "AUG.MIXUP", "0.8", "TRAIN.EMA_DECAY", "0.9", "--data-path", digits)
    first = run_main(*flags, "--batch-size", "12", "--accumulation-steps", "2")
    assert f"  {amp.replace('none', 'fp32')}  1 x " in first.stdout
    resumed = run_main(*flags, "--batch-size", "12", "--accumulation-steps", "2", "--opts", "TRAIN.EPOCHS", "4")
    assert [event["step"] for event in resumed.events("train")] == list(range(1, 13))
    assert all(event["memory_bytes"] > 0 for event in resumed.events("train"))


@pytest.mark.parametrize("head", DETECTORS)
@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_detectors_train_and_evaluate(objects, tmp_path, amp, head):
    words = (*detection.RUN, "AMP", amp, "MODEL.HEAD", head, "--data-path", objects)
    done = start("main.py", *words, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("*/run/metrics.jsonl")
    events = [json.loads(line) for line in file.read_text().splitlines()]
    losses = [event["loss"] for event in events if event["event"] == "train"]
    assert len(losses) == 6
    assert all(map(math.isfinite, losses))


def test_throughput(run_main):
    result = run_main("--cfg", "configs/micro.yaml", "--tag", "run", "--throughput", "--batch-size", "64")
    values = json.loads((result.results / "throughput.json").read_text())
    assert values["precision"] == "bf16"
    assert values["device"] == torch.cuda.get_device_name()


def test_no_step_waits_for_the_device(digits, tmp_path):
    """Fault 8, as CUDA itself sees it: twice the steps between two log lines bring no more synchronisations."""
    counts = []
    for batch_size in ("24", "12"):
        opts = ["DATA.BATCH_SIZE", batch_size, "DATA.DATA_PATH", str(digits), "OUTPUT", str(tmp_path / batch_size)]
        opts += "TRAIN.EPOCHS 2 TRAIN.WARMUP_EPOCHS 0 PRINT_FREQ 1000 DATA.NUM_WORKERS 1 AUG.MIXUP 0.8 AMP bf16".split()
        device = torch.device("cuda", 0)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                train(build_config("configs/micro.yaml", opts), device)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchronizing" in str(w.message) for w in caught))
    assert counts[0] == counts[1]


def pictures_and_plans(count: int, size: int) -> tuple[torch.Tensor, list[Plan]]:
    seed_cpu(0)
    transform = build_train_transform(build_config(opts=["DATA.IMG_SIZE", str(size)]), on_device=True)
    coarse = torch.rand(count, 3, 8, 8).mul(255)
    pictures = torch.nn.functional.interpolate(coarse, size, mode="bilinear").to(torch.uint8)
    return pictures.contiguous(memory_format=torch.channels_last), [transform.draw_plan() for _ in range(count)]


def test_augmentation_is_the_same_as_on_the_cpu():
    config = build_config(opts=["DATA.IMG_SIZE", "96"])
    pictures, plans = pictures_and_plans(200, 96)
    assert {operation.name for plan in plans for operation in plan.operations} == set(_RAND_INCREASING_TRANSFORMS)
    cpu, gpu = (build_train_stage(config, torch.device(name, 0))(pictures, plans).cpu() for name in ("cpu", "cuda"))
    assert gpu.is_contiguous(memory_format=torch.channels_last)
    level = 1 / (255 * min(config.DATA.STD))
    difference = (cpu - gpu).abs()
    assert (difference > 1.1 * level).float().mean() < 1e-3
    assert (difference > 1e-4).float().mean() < 0.02


@pytest.mark.parametrize("where", ["cuda", "cpu"])
def test_batches_that_are_copied_ahead_are_the_right_ones(digits, where):
    opts = f"DATA.DATA_PATH {digits} DATA.IMG_SIZE 32 DATA.BATCH_SIZE 8 DATA.NUM_WORKERS 2 AUG.DEVICE {where}"
    config, gpu = build_config(opts=opts.split()), torch.device("cuda", 0)
    loaders = Classification(config, gpu).train_loaders()
    assert ("on the GPU" in loaders.described) == (where == "cuda")
    loader = loaders.train
    expected = [loader.dataset[key].sample for batch in first_batches(loader, 12) for key in batch]
    stage = build_train_stage(config, torch.device("cpu"))
    got = []
    for batch in loader.micro_batches(0, 12):
        torch.cuda._sleep(10**6)  # the next batch is prepared while this one is in use
        got += zip(batch.images.cpu(), batch.targets.tolist(), strict=True)
    assert len(got) == len(expected) == 96
    for (image, target), sample in zip(got, expected, strict=True):
        assert target == sample.target
        assert torch.allclose(image, stage(sample.image[None], [sample.plan])[0], atol=0.02)


def first_batches(loader, count: int) -> list:
    loader.batches.first_step, loader.batches.last_step = 0, count
    return list(loader.batches)


def test_preparing_a_batch_does_not_wait_for_the_gpu():
    config = build_config(opts=["DATA.IMG_SIZE", "96"])
    stage = build_train_stage(config, torch.device("cuda", 0))
    pictures, plans = pictures_and_plans(64, 96)
    pictures = pictures.pin_memory()
    stage(pictures, plans)
    torch.cuda.set_sync_debug_mode("error")
    try:
        stage(pictures, plans)
    finally:
        torch.cuda.set_sync_debug_mode("default")
