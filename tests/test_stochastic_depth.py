"""Stochastic depth: each branch of each image at its rate, and nothing computed of what is dropped but a fraction."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from models.crossformer.fusion import add_branch
from models.crossformer.stochastic_depth import Drawn, computed_images, draw_branches, pick
from utils.counting import saved_bytes

CPU = torch.device("cpu")


def factors_of(drawn: Drawn | None, batch: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What a branch of each image is multiplied with, ``(batch, 1, 1, 1)``."""
    nothing = torch.zeros(batch, 1, 1, 1, dtype=dtype)
    return add_branch(nothing, torch.ones_like(pick(nothing, drawn)), drawn)


def factors(rates: tuple[float, ...], batch: int, draws: int) -> torch.Tensor:
    """What the branches of each image are multiplied with, ``(draws, blocks, 2, batch)``, drawn anew each time."""
    torch.manual_seed(0)
    drawn = []
    for _ in range(draws):
        branches = [drawn for block in draw_branches(rates, batch, CPU) for drawn in block]
        drawn.append(torch.stack([factors_of(d, batch) for d in branches]))
    return torch.stack(drawn).reshape(draws, len(rates), 2, batch)


@pytest.mark.parametrize("rates", [(0.3,), (0.1, 0.3, 0.65)])
@pytest.mark.parametrize("batch", [1, 4, 8])
def test_every_image_loses_every_branch_at_the_rate_of_its_block(rates, batch):
    """With the mean as it was; whether an image loses a branch says nothing of what else it loses."""
    draws = 3000
    is_dropped = torch.zeros(draws, len(rates), 2, batch, dtype=torch.float64)
    for i, (rate, scale) in enumerate(zip(rates, factors(rates, batch, draws).unbind(1), strict=True)):
        assert scale.unique().tolist() == pytest.approx([0, 1 / (1 - rate)])
        is_dropped[:, i] = scale == 0
        allowed = 5 * (rate * (1 - rate) / draws) ** 0.5  # five standard deviations
        assert is_dropped[:, i].mean(0).flatten().tolist() == pytest.approx([rate] * 2 * batch, abs=allowed)
    for of_an_image in is_dropped.flatten(1, 2).unbind(-1):
        correlation = of_an_image.mT.corrcoef() - torch.eye(2 * len(rates))
        assert correlation.abs().max() < 5 / draws**0.5


@pytest.mark.parametrize(("rate", "batch"), [(0.1, 4), (0.7, 4), (0.25, 8), (0.37, 50)])
def test_how_many_keep_a_branch(rate, batch):
    """The number is the expected one, rounded down or up."""
    kept = (factors((rate,), batch, 200) > 0).sum(-1)
    assert kept.float().mean().item() == pytest.approx(batch * (1 - rate), abs=0.15)
    assert (kept - batch * (1 - rate)).abs().max() < 1


def test_images_are_dropped_in_all_combinations():
    """Two of four images keep a branch at 0.5: each of the six pairs is as likely as the others."""
    pairs = (factors((0.5,), 4, 3000)[:, 0, 0] > 0).long() @ torch.tensor([1, 2, 4, 8])
    assert sorted(pairs.unique().tolist()) == [3, 5, 6, 9, 10, 12]
    assert pairs.bincount()[pairs.unique()].float().div(3000).tolist() == pytest.approx([1 / 6] * 6, abs=0.035)


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.1, 0.25, 0.5, 0.999])
@pytest.mark.parametrize("batch", [1, 2, 3, 8, 37, 64, 100, 256])
def test_few_images_are_computed_in_vain(rate, batch):
    computed, share = computed_images(rate, batch), max(1, batch // 32)
    assert 1 <= computed <= batch
    assert computed % share == 0 or computed == batch
    assert batch * (1 - rate) - 1e-6 <= computed < batch * (1 - rate) + share + 1e-3


def test_nothing_is_drawn_where_nothing_can_be_dropped():
    state = torch.get_rng_state()
    assert draw_branches((0.0, 0.0), 8, CPU) == [(None, None)] * 2
    assert torch.equal(torch.get_rng_state(), state)
    assert draw_branches((0.0, 0.3), 8, CPU)[0] == (None, None)


def test_blocks_that_are_not_trained_drop_nothing():
    blocks = timm.create_model("crossformer_micro", drop_path_rate=0.9).layers[1].blocks
    blocks[1].eval()
    x = torch.randn(4, 4, 4, 64)
    assert not torch.equal(blocks(x), blocks(x))
    blocks[0].eval()
    assert torch.equal(blocks(x), blocks(x))


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_adding_a_branch(batch):
    """What multiplying every image's branch with its factor gives, and the same derivatives, the second too."""
    drawn = draw_branches((0.4,), batch, CPU)[0][0]
    scale = factors_of(drawn, batch, torch.float64)

    def with_branch(x: torch.Tensor) -> torch.Tensor:
        return add_branch(x, pick(x, drawn).sin(), drawn)

    x = torch.randn(batch, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(with_branch(x), x + scale * x.sin())
    assert torch.autograd.gradcheck(with_branch, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(with_branch, x)


def test_under_autocast_as_cuda_has_it(monkeypatch):
    """There norms return single precision, so that within a stage the map goes from one precision to the other."""
    norm = F.layer_norm

    def layer_norm(x: torch.Tensor, shape: tuple[int, ...], *parameters) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return norm(x.float(), shape, *parameters)

    monkeypatch.setattr(F, "layer_norm", layer_norm)
    model = timm.create_model("crossformer_micro", depths=(1, 1, 5, 1), amplitude_cooling=True, drop_path_rate=0.5)
    for recompute in (dict(enable=False), dict(enable=True, selective=True), dict(enable=True)):
        model.set_grad_checkpointing(**recompute)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(torch.randn(8, 3, 64, 64)).float().sum()
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.slow
def test_compiled_for_any_batch():
    """One graph serves batches of several sizes where the user wants that; the trainer's are of one size."""
    torch._dynamo.reset()
    blocks = timm.create_model("crossformer_micro", drop_path_rate=0.9).layers[1].blocks
    blocks.compile(dynamic=True, fullgraph=True, backend="aot_eager")
    for batch in (8, 12):
        blocks(torch.randn(batch, 4, 4, 64)).sum().backward()


def test_what_is_dropped_is_not_computed():
    """At a rate of 0.5 on average a quarter of the blocks' work; what is kept for the backward pass shrinks too."""
    work, kept = [], []
    for rate in (0.0, 0.5):
        with torch.device("meta"):
            model, x = timm.create_model("crossformer_large", drop_path_rate=rate), torch.randn(64, 3, 224, 224)
            with FlopCounterMode(display=False) as counter:
                model(x).sum().backward()
            work.append(counter.get_total_flops())
            kept.append(saved_bytes(lambda model=model, x=x: model(x).sum(), model.parameters()))
    assert work[1] / work[0] < 0.79
    assert kept[1] / kept[0] < 0.85
