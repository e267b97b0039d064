"""What a GPU computes, traced on a fake one: a tensor that was left on the host, or a type that meets another one.

Nothing is computed and there is no memory behind the tensors, so it needs no GPU; where there is one,
``test_gpu.py`` has the real thing. The backward pass cannot be traced: autograd asks the driver for its streams.
"""

import random

import pytest
import timm
import torch
from conftest import quick
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, unset_fake_temporarily

from config import build_config
from data.augmentation import Plan, build_mixing, build_train_stage
from data.augmentation.on_device import OPERATIONS
from data.augmentation.policy import Operation, Patch
from data.loading import Batch
from engine.ema import Ema
from engine.evaluate import evaluate
from engine.precision import Precision
from engine.skipping import SkippedSteps
from engine.step import TrainStep
from models.crossformer import VARIANTS
from optimizer import build_optimizer
from tasks.classification import Accuracy, Classification, build_views
from tasks.real_labels import RealLabels
from tasks.report import Report
from utils.meters import DeviceMeters

GPU = torch.device("cuda", 0)
DTYPES = (torch.bfloat16, torch.float16, None)
RECOMPUTING = ("none", "selective", "full")
SHALLOW = (1, 1, 4, 1)
"""Both kinds of attention, an amplitude cooling layer, and every down-sampling."""


@pytest.fixture(autouse=True)
def fake_gpu(monkeypatch):
    """torch turns autocast off where there is no driver, so it is told that there is one."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    with FakeTensorMode():
        yield


def on_gpu(module: torch.nn.Module) -> torch.nn.Module:
    return module._apply(lambda x: torch.empty(x.shape, dtype=x.dtype, device=GPU))


def network(name: str, **arguments) -> torch.nn.Module:
    with unset_fake_temporarily(), torch.device("meta"):
        model = timm.create_model(name, **{"num_classes": 10, "drop_path_rate": 0.3} | arguments)
    return on_gpu(model)


def forward(model: torch.nn.Module, dtype: torch.dtype | None, how: str, training: bool) -> None:
    model.set_grad_checkpointing(how != "none", **({"selective": True} if how == "selective" else {}))
    side = model.pretrained_cfg["input_size"][-1]
    # Higher than its own size, so that groups are padded and masked
    images = torch.empty(2, 3, side + 32, side, device=GPU).contiguous(memory_format=torch.channels_last)
    with torch.set_grad_enabled(training), Precision(GPU, dtype, tf32=False).autocast():
        batch = Batch(images, torch.zeros(2, dtype=torch.long, device=GPU), torch.arange(2))
        loss, _ = Classification(build_config(), GPU).loss(model.train(training), batch)
        assert model(images).dtype == (dtype or torch.float32)
    assert loss.device == GPU
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("name", quick(VARIANTS, ("crossformer_micro", "crossformerpp_small")))
def test_every_variant(name):
    """In each precision, each with another kind of recomputing: three neighbours have all nine pairs between them."""
    model, first = network(name, depths=SHALLOW), list(VARIANTS).index(name)
    for i, dtype in enumerate(DTYPES):
        forward(model, dtype, RECOMPUTING[(first + i) % 3], training=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_evaluation_of_a_variant(dtype):
    forward(network("crossformerpp_small", depths=SHALLOW), dtype, "none", training=False)


def plans(count: int) -> list[Plan]:
    """All operations, and a patch, for each image in another order."""
    random.seed(0)
    operations = [Operation(name, 0.5) for name in OPERATIONS]
    return [Plan(tuple(random.sample(operations, len(operations))), (Patch(1, 2, 8, 9, 77),)) for _ in range(count)]


@pytest.mark.parametrize(("erase", "interpolation"), [("pixel", "bicubic"), ("rand", "bilinear"), ("const", "nearest")])
def test_what_is_done_to_images_on_the_device(erase, interpolation):
    opts = f"DATA.IMG_SIZE [32,48] AUG.REMODE {erase} DATA.INTERPOLATION {interpolation}"
    stage = build_train_stage(build_config(opts=opts.split()), GPU)
    images = torch.empty(3, 3, 32, 48, dtype=torch.uint8)
    out = stage(images, plans(3))
    assert out.device == GPU
    assert out.shape == images.shape
    assert out.dtype == torch.float32


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("kind", ["MIXUP", "CUTMIX"])
def test_mixing(mode, kind):
    other = {"MIXUP": "CUTMIX", "CUTMIX": "MIXUP"}[kind]
    mix = build_mixing(build_config(opts=f"AUG.MIXUP_MODE {mode} AUG.{kind} 1 AUG.{other} 0".split()), 10)
    images, targets = mix(torch.empty(4, 3, 32, 32, device=GPU), torch.zeros(4, dtype=torch.long, device=GPU))
    logits = torch.empty(4, 10, device=GPU)
    loss, _ = Classification(build_config(), GPU).loss(lambda _: logits, Batch(images, targets, torch.arange(4)))
    assert images.device == targets.device == loss.device == GPU


class Images:
    """Names of ImageNet's validation images."""

    root = "nowhere"

    def __len__(self) -> int:
        return 6

    def name(self, i: int) -> str:
        return f"ILSVRC2012_val_{i + 1:08d}.JPEG"


class Batches(list):
    """As a loader of an evaluation gives them; counts them."""

    given = 0

    def __iter__(self):
        for batch in super().__iter__():
            yield batch
            self.given += 1


@pytest.mark.parametrize("views", quick(["flip", "five_crop"], ["flip"]))
def test_evaluation_and_who_listens_to_it(views, monkeypatch):
    """It goes through all batches, and waits for the device only when it reads its sums, which a fake one has not."""
    # How long its answer is depends on the values
    monkeypatch.setattr(torch, "bincount", lambda x, minlength: torch.empty(minlength, dtype=x.dtype, device=x.device))
    config = build_config(opts=["TEST.VIEWS", views, "DATA.IMG_SIZE", "32"])
    classes, among = [str(i) for i in range(1000)], torch.ones(1000, dtype=torch.bool, device=GPU)
    tables, real = report_on_gpu(classes), RealLabels(Images(), classes, GPU)
    accuracy, seen = Accuracy(GPU, build_views(config), among, real, tables), []
    monkeypatch.setattr(accuracy, "result", lambda: seen.append(accuracy.sums.tolist()))
    model, targets = network("crossformer_micro", num_classes=1000), torch.zeros(2, dtype=torch.long, device=GPU)
    side = 37 if views == "five_crop" else 32
    images, numbers = torch.empty(2, 3, side, side, device=GPU), torch.empty(2, dtype=torch.long)
    batches = Batches([Batch(images, targets, numbers)] * 3)
    with pytest.raises(DataDependentOutputException):
        evaluate(model, batches, Precision(GPU, torch.bfloat16, tf32=False), accuracy)
    assert batches.given == 3


def report_on_gpu(classes: list[str]) -> Report:
    """torchmetrics copies its state, which a fake tensor does not survive; so it is made where there is no memory."""
    with unset_fake_temporarily():
        report = Report(classes, torch.device("meta"))
    assert report.bins.device == report.confusion.confmat.device == torch.device("meta")
    report.bins = torch.empty(report.bins.shape, dtype=report.bins.dtype, device=GPU)
    report.confusion.confmat = torch.empty(report.confusion.confmat.shape, dtype=torch.long, device=GPU)
    return report


@pytest.mark.parametrize("dtype", [torch.float16, None])
def test_what_follows_the_backward_pass(dtype):
    """The scale of the loss, clipping, AdamW's fused step, which skips by itself, the moving average, the meters."""
    config, precision = build_config(), Precision(GPU, dtype, tf32=False)
    with unset_fake_temporarily():
        ema = Ema(timm.create_model("crossformer_micro", num_classes=10), decay=0.9)
    model, scaler = network("crossformer_micro"), precision.scaler()
    optimizer = build_optimizer(config, model)
    on_gpu(ema.module)
    loss = scaler.scale(torch.empty((), device=GPU))
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    step = TrainStep(None, model, optimizer, scaler, precision, max_norm=5.0)
    loss, _, grad_norm, finite = step.update(loss, {})
    ema.update(model, 1, finite)
    skipped, meters = SkippedSteps(GPU), DeviceMeters()
    skipped.add(finite)
    meters.add(finite, loss=loss, grad_norm=grad_norm)
    assert loss.device == grad_norm.device == finite.device == GPU
