"""One step: what is random in it depends on the seed, the step, the micro-step and the rank, and on nothing else."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from config import build_config
from data import Batch
from data.augmentation import build_mixing
from engine.ema import Ema
from engine.precision import Precision
from engine.run import Run
from engine.step import TrainStep, cut

CPU = torch.device("cpu")


class Draws:
    """A task that notes what its batches would be mixed with."""

    def __init__(self):
        self.drawn = []

    def prepare(self, batch):
        self.drawn.append(torch.rand(()).item())
        return batch

    def loss(self, model, batch):
        return model(batch.images).square().mean(), {}


def batches(count: int):
    return iter([Batch(torch.ones(4, 2), torch.zeros(4), torch.arange(4))] * count)


def draws(monkeypatch, *, seed: int = 0, step: int = 0, rank: str = "0") -> list[float]:
    monkeypatch.setenv("RANK", rank)
    task, model = Draws(), nn.Linear(2, 1)
    precision, optimizer = Precision(CPU, None, tf32=False), torch.optim.SGD(model.parameters(), lr=0.1)
    TrainStep(task, model, optimizer, precision.scaler(), precision, seed=seed, accumulation=2)(step, batches(2))
    return task.drawn


def test_what_is_random_is_derived(monkeypatch):
    first = draws(monkeypatch)
    torch.rand(7)
    assert draws(monkeypatch) == first
    others = [draws(monkeypatch, **other) for other in ({"seed": 1}, {"step": 1}, {"rank": "1"})]
    assert len({number for drawn in (first, *others) for number in drawn}) == 8


@pytest.mark.parametrize(("accumulation", "parts"), [(2, 1), (1, 3), (2, 3)])
def test_parts_make_up_the_whole(accumulation, parts):
    """The loss and the gradient are those of all samples at once: 4 images in 3 parts are 2, 1 and 1."""
    images, losses, gradients = torch.randn(4 * accumulation, 2), [], []
    for micro_batches, cut_into in ((1, 1), (accumulation, parts)):
        torch.manual_seed(0)
        model = nn.Linear(2, 1)
        precision, optimizer = Precision(CPU, None, tf32=False), torch.optim.SGD(model.parameters(), lr=0.1)
        step = TrainStep(
            Draws(), model, optimizer, precision.scaler(), precision, accumulation=micro_batches, parts=cut_into
        )
        chunks = [Batch(part, torch.zeros(len(part)), torch.arange(len(part))) for part in images.chunk(micro_batches)]
        losses.append(step.accumulate(0, iter(chunks))[0])
        gradients.append(model.weight.grad)
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_batch_is_cut_without_losing_a_sample():
    batch = Batch(torch.arange(10), torch.arange(10), torch.arange(10))
    parts = cut(batch, 4)
    assert torch.cat([part.targets for part in parts]).tolist() == list(range(10))
    assert cut(batch, 1) == [batch]


def test_the_first_batch_is_drawn_from_a_copy():
    """timm mixes images in place, and the step is to mix them once."""
    config = build_config("configs/micro.yaml", ["AUG.CUTMIX", "1.0", "AUG.MIXUP", "0.8"])
    mixing, kept = build_mixing(config, 10), {}

    def prepare(batch):
        images, targets = mixing(batch.images, batch.targets)
        return batch._replace(images=images, targets=targets)

    log = SimpleNamespace(keep_whole=kept.__setitem__, pictures=lambda *_: None)
    precision = SimpleNamespace(device=torch.device("cpu"))
    run = SimpleNamespace(config=config, task=SimpleNamespace(prepare=prepare), precision=precision, log=log)
    batch = Batch(torch.randn(4, 3, 32, 32), torch.arange(4), torch.arange(4))
    before = batch.images.clone()
    Run._show(run, batch)
    assert torch.equal(batch.images, before)
    assert kept["first_batch.png"].startswith(b"\x89PNG")
    assert not torch.equal(prepare(batch).images, before)


def test_the_moving_average_leaves_out_skipped_steps():
    model = nn.Linear(2, 2)
    ema = Ema(model, decay=0.9)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model.weight += 1
    ema.update(model, 1, torch.tensor(0.0))
    assert torch.equal(ema.module.weight, before["weight"])
    ema.update(model, 2, torch.tensor(1.0))
    assert torch.allclose(ema.module.weight, before["weight"] + 0.1)
    assert torch.equal(ema.module.bias, before["bias"])
