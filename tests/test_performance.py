"""What makes the networks fast, counted: kernels, tensors that are kept, compilations. Times: scripts/benchmark.py."""

from functools import partialmethod

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import quick
from test_crossformer import fill, images
from torch import nn
from torch._dynamo.utils import counters

from config import build_config
from engine.train import train
from models.crossformer import VARIANTS
from models.reference import plain
from utils.counting import count_kernels, saved_bytes

CPU = torch.device("cpu")
TARGETS = torch.arange(2)


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x), TARGETS[: len(x)])


@pytest.mark.parametrize(
    ("name", "inference", "training"), [("crossformer_small", 161, 884), ("crossformer_base", 305, 1484)]
)
def test_kernels_of_a_pass(name, inference, training):
    """A forward pass in evaluation, and a forward and a backward pass: not one more than there were, on a CPU."""
    model = timm.create_model(name, drop_path_rate=0.2).eval()
    x = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        assert count_kernels(lambda: model(x), CPU) <= inference
    model.train()

    def forward_and_backward() -> None:
        model.zero_grad()
        loss_of(model, x).backward()

    assert count_kernels(forward_and_backward, CPU) <= training


@pytest.mark.parametrize("name", quick(["crossformer_small", "crossformerpp_small"], ["crossformerpp_small"]))
def test_what_is_kept_for_the_backward_pass(name):
    model, reference = timm.create_model(name, drop_path_rate=0.2), plain(name, drop_path_rate=0.2)
    x = torch.randn(2, 3, 224, 224)

    def kept(model: nn.Module) -> int:
        return saved_bytes(lambda: loss_of(model, x), model.parameters())

    limit = kept(reference)
    assert kept(model) <= limit
    model.set_grad_checkpointing(selective=True)
    assert kept(model) <= 0.6 * limit
    model.set_grad_checkpointing()
    assert kept(model) <= 0.25 * limit
    model.set_grad_checkpointing(False)
    assert kept(model) > 0.9 * limit


def compiled_equals_eager(name: str, backend: str, selective: bool = False, **architecture) -> None:
    """In training, its gradients too, and in evaluation, without a graph break.

    Most maps are padded, and in the last blocks one of the two images loses a branch or both do.
    """
    x, results = images(0, 2, 3, 96, 160), []
    for compile in (False, True):
        torch._dynamo.reset()
        model = timm.create_model(name, num_classes=10, drop_path_rate=0.6, **architecture)
        fill(model)
        model.set_grad_checkpointing(selective, selective=True)
        if compile:
            model.compile(fullgraph=True, dynamic=False, backend=backend)
        torch.manual_seed(0)
        with torch._inductor.config.patch(fallback_random=True):  # the same random numbers as in eager mode
            out = model.train()(x)
        out.square().mean().backward()
        with torch.inference_mode():
            evaluated = model.eval()(x)
        results.append((out.detach(), evaluated.clone(), {n: p.grad for n, p in model.named_parameters()}))
    for a, b in zip(results[0][:2], results[1][:2], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    for parameter, gradient in results[0][2].items():
        allowed = 1e-4 * gradient.abs().max().item() + 1e-6
        torch.testing.assert_close(results[1][2][parameter], gradient, rtol=0, atol=allowed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "selective", "depths"), [("crossformer_micro", True, (1, 1)), ("crossformerpp_small", False, (1, 4))]
)
def test_a_graph_without_a_break(name, selective, depths):
    """As far as the backend, which is the part of torch.compile that takes minutes; with an amplitude cooling layer."""
    stages = slice(len(depths))
    heads = VARIANTS[name]["num_heads"][stages]
    groups = dict(group_size=(4, 14, 7)[stages], interval=(4, 2, 1)[stages])
    compiled_equals_eager(name, "aot_eager", selective, depths=depths, num_heads=heads, **groups)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["crossformer_micro", "crossformer_small", "crossformerpp_small"])  # minutes each
def test_compiled_computes_the_same(name):
    compiled_equals_eager(name, "inductor")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_run_is_compiled_once_for_training_and_once_for_evaluation(digits, tmp_path, monkeypatch, backend):
    """Two epochs, each evaluated on batches of 24 and 13: no change of mode and no last batch compiles again.

    A backend that takes the graph as it is changes nothing of that, and is there at once.
    """
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
    torch._dynamo.reset()
    counters.clear()
    opts = f"DATA.DATA_PATH {digits} OUTPUT {tmp_path} DATA.BATCH_SIZE 24 DATA.NUM_WORKERS 0 TRAIN.COMPILE default"
    opts += " TRAIN.EPOCHS 2 TRAIN.WARMUP_EPOCHS 0 MODEL.CROSSFORMER.DEPTHS [1,1,1,1]"
    train(build_config("configs/micro.yaml", opts.split()), CPU)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
