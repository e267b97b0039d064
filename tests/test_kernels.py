"""The Triton kernels without a GPU; test_gpu.py has them on one."""

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from models.crossformer import fusion
from models.crossformer.embedding import PatchEmbed
from models.crossformer.grouping import Grouping

SCRIPT = Path(__file__).with_name("interpret_kernels.py")


def test_kernels_compute_what_torch_does():
    """In Triton's interpreter: outputs and gradients of all, with padding, empty groups and dropped branches."""
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert done.stdout == "all kernels agree\n", done.stderr


@pytest.mark.parametrize("size", [(64, 64), (50, 71)])
@pytest.mark.parametrize("embed_dim", [32, 96, 128])
def test_the_first_embedding_all_at_once(embed_dim, size):
    embed = PatchEmbed(3, embed_dim).double()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    outputs = torch.cat([proj(images) for proj in embed.projs], dim=1), embed.project_together(images)
    torch.testing.assert_close(*outputs)
    weights = list(embed.projs.parameters())
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), weights) for out in outputs))


def test_groups_that_do_not_fit_into_a_program():
    fits = pytest.importorskip("models.crossformer.fused_attention").fits
    assert fits(Grouping.of(28, 28, 8, 1), 32)
    assert not fits(Grouping.of(28, 28, 14, 1), 32)
    assert not fits(Grouping.of(28, 28, 7, 1), 24)


def test_precision_of_norms(monkeypatch):
    """Half where a product follows; else single, as torch has it under autocast."""
    pytest.importorskip("triton")
    asked = []

    def layer_norm(x, weight, bias, eps, dtype, *indexes):
        asked.append((x.shape[-1], dtype))
        return torch.nn.functional.layer_norm(x.float(), weight.shape, weight, bias, eps).to(dtype)

    model = timm.create_model("crossformerpp_small", depths=(4,), num_heads=(2,), group_size=(7,), interval=(8,))
    monkeypatch.setattr(fusion.fused_residual, "layer_norm", layer_norm)
    monkeypatch.setattr(fusion, "is_fused", lambda x: True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.eval()(torch.randn(1, 3, 64, 64))
    halves = [dtype for _, dtype in asked].count(torch.bfloat16)
    assert halves == 2 * 4
    assert len(asked) - halves == 2  # of the first embedding and of the amplitude cooling layer
