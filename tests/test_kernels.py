"""The Triton kernels without a GPU; test_gpu.py has them on one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models.crossformer.embedding import PatchEmbed

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
