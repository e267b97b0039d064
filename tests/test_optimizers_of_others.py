"""Optimizers by timm's factory and schedule-free ones: each trains, resumes exactly, skips, or is refused by name."""

import copy
from pathlib import Path

import pytest
import timm
import torch
from conftest import assert_same_tensors, quick
from timm.optim import list_optimizers
from torch import nn

from config import build_config
from data.loading import Batch
from engine.ema import ScheduleFreeAverage
from engine.precision import Precision
from engine.state import TrainState
from engine.step import TrainStep
from optimizer import averages, build_optimizer, parameter_groups, step_if
from optimizer.of_timm import WAITING, names, refusal
from optimizer.schedule_free import CLASSES
from optimizer.skipping import step_and_undo
from utils.errors import UserError

ALL = [*names(), *CLASSES]
FEW = "muon", "lion", "lamb", "adafactor", "schedule_free_adamw"
"""One that takes matrices apart, one with a single moment, one that counts in its groups, one whose state has other
shapes than the parameters, and one that averages."""
PRECISION = Precision(torch.device("cpu"), None, tf32=False)
STEPS = 20


class Answers:
    """A task of one batch."""

    def prepare(self, batch):
        return batch

    def loss(self, model, batch):
        return nn.functional.cross_entropy(model(batch.images), batch.targets), {}


def optimizer_of(name: str, model: nn.Module, *opts: str) -> torch.optim.Optimizer:
    return build_optimizer(build_config(opts=["TRAIN.OPTIMIZER.NAME", name, *opts]), model)


def begin(name: str, network: str, **arguments) -> TrainState:
    torch.manual_seed(0)
    model = timm.create_model(network, num_classes=10, **arguments).to(memory_format=torch.channels_last)
    optimizer = optimizer_of(name, model)
    average = ScheduleFreeAverage(model, optimizer) if name in CLASSES else None
    return TrainState(model, optimizer, PRECISION.scaler(), average)


def take_steps(state: TrainState, first: int, last: int) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 32, 32, generator=generator)
    step = TrainStep(Answers(), state.model, state.optimizer, state.scaler, PRECISION, max_norm=5.0)
    losses = []
    for number in range(first, last):
        batch = Batch(images.clone(), torch.arange(8), torch.arange(8))
        result = step(number, iter([batch]))
        state.advance(result.finite)
        losses.append(float(result.loss))
    return losses


@pytest.mark.parametrize("name", quick(ALL, FEW))
def test_twenty_steps_resumed_in_the_middle(name):
    """From a checkpoint's content after half of them: all weights, moments and averages are the same bits."""
    arguments = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)} if name in FEW else {}
    state = begin(name, "crossformer_micro", **arguments)
    losses = take_steps(state, 0, STEPS // 2)
    resumed = begin(name, "crossformer_micro", **arguments)
    with torch.no_grad():
        for parameter in resumed.model.parameters():
            parameter += 1
    resumed.restore(copy.deepcopy(state.content()), Path("last.pth"))
    losses += take_steps(state, STEPS // 2, STEPS)
    assert take_steps(resumed, STEPS // 2, STEPS) == losses[STEPS // 2 :]
    assert losses[-1] < losses[0]
    one, other = resumed.content(), state.content()
    for part in ("model", "ema", "optimizer") if state.ema else ("model", "optimizer"):
        assert_same_tensors(one[part], other[part])


def small() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 4, 6))
    return model.to(memory_format=torch.channels_last)


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    states = [optimizer.state[p] for p in model.parameters()]
    kept = [v for state in states for k, v in state.items() if isinstance(v, torch.Tensor) and k != "step"]
    return [x.detach().clone() for x in (*model.parameters(), *kept)]


@pytest.mark.parametrize("name", quick(ALL, FEW))
def test_a_step_that_is_undone_leaves_every_bit(name):
    """As on a GPU, where the host does not know of it."""
    model = small()
    optimizer = optimizer_of(name, model)
    give_gradients(model, 1)
    optimizer.step()
    before = everything(model, optimizer)
    give_gradients(model, 2)
    for parameter in model.parameters():
        parameter.grad[0] = torch.nan
    step_and_undo(torch.tensor(False), optimizer)
    torch.testing.assert_close(everything(model, optimizer), before, rtol=0, atol=0)


def test_an_optimizer_that_is_undone_never_sees_what_is_not_finite():
    class Looks(torch.optim.SGD):
        def step(self):
            assert all(p.grad.isfinite().all() for group in self.param_groups for p in group["params"])

    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.tensor([1.0, torch.nan, torch.inf])
    step_and_undo(torch.tensor(False), Looks([parameter], lr=1.0))


@pytest.mark.parametrize("name", quick(ALL, FEW))
def test_a_step_that_is_not_undone_is_the_optimizers_own(name):
    models = small(), small()
    optimizers = [optimizer_of(name, model) for model in models]
    for seed in (1, 2):
        for model in models:
            give_gradients(model, seed)
        optimizers[0].step()
        optimizers[1].step() if seed == 1 else step_and_undo(torch.tensor(True), optimizers[1])
    first, second = map(everything, models, optimizers)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("name", quick([name for name in ALL if name not in ("adamw", "sgd")], FEW))
def test_no_step_waits_for_the_device(name):
    """On a device without memory, which nobody can read a number from; counters on the host are none of it."""
    with torch.device("meta"):
        model = timm.create_model("crossformer_micro", num_classes=10, depths=(1, 1, 1, 1))
    optimizer = optimizer_of(name, model)

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        step_if(torch.ones((), dtype=torch.bool, device="meta"), optimizer)

    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state.setdefault(parameter, {})  # as after the first step, the only one that may wait
    if name in WAITING:
        with pytest.raises(RuntimeError, match="item"):
            step()
        return
    for _ in range(3):
        step()


@pytest.mark.parametrize("name", [name for name in list_optimizers() if refusal(name)])
def test_who_is_refused_is_told_why(name):
    with pytest.raises(UserError, match=rf"^TRAIN.OPTIMIZER.NAME {name} (needs|draws|is) "):
        optimizer_of(name, nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["muonn"], "TRAIN.OPTIMIZER.NAME muonn is not known; did you mean muon"),
        (["lion", "TRAIN.OPTIMIZER.EPS", "1e-6"], "TRAIN.OPTIMIZER.EPS: lion has none; leave it out"),
        (["lion", "TRAIN.OPTIMIZER.MOMENTUM", "0.5"], "TRAIN.OPTIMIZER.MOMENTUM: lion has none"),
        (["adan", "TRAIN.OPTIMIZER.BETAS", "[0.9, 0.99]"], "TRAIN.OPTIMIZER.BETAS: adan has 3, not 2"),
        (["muon", "TRAIN.OPTIMIZER.KWARGS", "{ns_step: 3}"], "muon does not take ns_step; did you mean ns_steps.; it"),
        (["muon", "TRAIN.OPTIMIZER.KWARGS", "{lr: 3}"], "TRAIN.OPTIMIZER.KWARGS lr is TRAIN.BASE_LR here"),
        (["muon", "TRAIN.OPTIMIZER.KWARGS", "{conv_mode: x}"], "TRAIN.OPTIMIZER muon: Invalid conv_mode: x"),
        (["muon", "TRAIN.OPTIMIZER.KWARGS", "{fallback_list: [hed.*]}"], "no parameter of the model is called hed"),
        (["adamw", "TRAIN.OPTIMIZER.KWARGS", "{amsgrad: True}"], "TRAIN.OPTIMIZER.KWARGS: adamw has none"),
        (["adamw", "TRAIN.OPTIMIZER.BETAS", "[0.9]"], "TRAIN.OPTIMIZER.BETAS: adamw has two"),
        (["schedule_free_sgd", "TRAIN.OPTIMIZER.BETAS", "[0.9, 0.99]"], "BETAS: schedule_free_sgd has none"),
        (["schedule_free_adamw", "TRAIN.OPTIMIZER.KWARGS", "{rr: 1}"], "schedule_free_adamw does not take rr"),
        (["lion", "TRAIN.OPTIMIZER.KWARGS", "{fallback_list: [x]}"], "lion does not take fallback_list"),
        (["adam", "TRAIN.OPTIMIZER.KWARGS", "{capturable: True}"], "TRAIN.OPTIMIZER adam: "),
        (["schedule_free_adamw", "TRAIN.OPTIMIZER.BETAS", "[0.0, 0.9]"], "the first of BETAS, or MOMENTUM, must be ab"),
        (["schedule_free_adamw", "TRAIN.EMA_DECAY", "0.9"], "TRAIN.EMA_DECAY: schedule_free_adamw averages"),
    ],
)
def test_wrong_arguments_are_named(opts, message):
    with pytest.raises(UserError, match=message):
        optimizer_of(opts[0], nn.Linear(2, 2), *opts[1:])


def test_only_named_optimizers_go_with_sharding():
    with pytest.raises(UserError, match="TRAIN.SHARD .*does not go with muon; use adamw or sgd"):
        build_config(opts=["TRAIN.OPTIMIZER.NAME", "muon", "TRAIN.SHARD", "full"])


def test_settings_reach_an_optimizer_of_timm():
    model, opts = nn.Linear(2, 2), ["TRAIN.OPTIMIZER.BETAS", "[0.8, 0.9, 0.95]", "TRAIN.OPTIMIZER.EPS", "1e-5"]
    adan = optimizer_of("adan", model, *opts, "TRAIN.WEIGHT_DECAY", "0.3", "TRAIN.OPTIMIZER.KWARGS", "{foreach: True}")
    group = adan.param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.9, 0.95), 1e-5, 0.3)
    assert group["foreach"] is True
    lamb = optimizer_of("lamb", model, "TRAIN.OPTIMIZER.KWARGS", "{max_grad_norm: 1e0}")  # a text, for YAML
    assert lamb.defaults["max_grad_norm"] == 1.0
    assert optimizer_of("muon", model).param_groups[0]["momentum"] == 0.95  # its own, where timm's factory gives 0.9
    assert optimizer_of("lamb", model).defaults["max_grad_norm"] is None


def test_the_largest_rate_is_known():
    """For decays that follow the rate's share of it."""
    config = build_config(opts=["TRAIN.OPTIMIZER.NAME", "adamc", "TRAIN.BASE_LR", "1e-3"])
    assert build_optimizer(config, nn.Linear(2, 2), rate=2.0).defaults["lr"] == 2e-3


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_what_muon_leaves_to_adamw(layer_decay):
    """The head is in groups of its own, decayed or not, and in no other."""
    model = timm.create_model("crossformer_micro", num_classes=3)
    groups = parameter_groups(model, 0.05, layer_decay, fallback=["head.*"])
    names = {id(p): name for name, p in model.named_parameters()}
    head = {names[id(p)]: g["weight_decay"] for g in groups if g.get("use_fallback") for p in g["params"]}
    assert head == {"head.weight": 0.05, "head.bias": 0.0}
    assert sorted(names[id(p)] for g in groups for p in g["params"]) == sorted(names.values())


def test_the_average_of_a_schedule_free_optimizer():
    """It is what the package's own eval() makes of the weights, and training does not notice."""
    model = small()
    optimizer = optimizer_of("schedule_free_adamw", model)
    for seed in range(3):
        give_gradients(model, seed)
        optimizer.step()
    found = averages(optimizer)
    trained = [p.detach().clone() for p in model.parameters()]
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), trained, strict=True))
    optimizer.eval()
    for parameter in model.parameters():
        torch.testing.assert_close(parameter.detach(), found[parameter], rtol=0, atol=0)
