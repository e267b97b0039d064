"""A process group that somebody else has brought together, as Ray Train does, is used and left as it is."""

import pytest
import torch
from commands import start
from conftest import TINY_RUN, assert_same_tensors
from torch.distributed.distributed_c10d import Backend, BackendConfig

from utils import distributed
from utils.errors import UserError

FLAGS = (*TINY_RUN, "TRAIN.STEPS", "2", "TRAIN.WARMUP_EPOCHS", "0", "DATA.BATCH_SIZE", "8")


@pytest.mark.slow
def test_the_wrapper_for_ray(digits, tmp_path):
    """It trains as the command line does, in two processes."""
    checkpoints = []
    for name, script in (("ours", "main.py"), ("ray", "tests/as_ray_does.py")):
        done = start(script, *FLAGS, "--data-path", digits, "--output", tmp_path / name, nproc=2)
        assert done.returncode == 0, done.stdout + done.stderr
        path = tmp_path / name / "crossformer_micro" / "run" / "checkpoints" / "last.pth"
        assert path.exists(), done.stdout + done.stderr
        checkpoints.append(torch.load(path, weights_only=True))
    for line in ("error: unknown flag --nonsense; did you mean --seed?\n", "threads: ['MainThread']\n"):
        assert done.stdout.count(line) == 2, done.stdout
    assert checkpoints[0]["step"] == 2
    assert_same_tensors(checkpoints[0]["model"], checkpoints[1]["model"])
    assert_same_tensors(checkpoints[0]["optimizer"], checkpoints[1]["optimizer"])


@pytest.fixture
def group(monkeypatch):
    """Let torch have a group of so many ranks with such a backend."""

    def pretend(backend: str, rank: int, size: int) -> None:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: size)
        monkeypatch.setattr(torch.distributed, "get_backend_config", lambda: str(BackendConfig(Backend(backend))))

    return pretend


def test_a_group_for_gpus_alone_is_refused(group, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    group("nccl", 1, 2)
    with pytest.raises(distributed.AgreedError, match=r"cannot send what is on the cpu \(its backend is cuda:nccl\)"):
        distributed.start()
    group("gloo", 0, 2)
    with pytest.raises(UserError, match=r"say rank 1 of 2, but the process group has it as rank 0 of 2"):
        distributed.start()


@pytest.mark.parametrize("backend", ["gloo", "cpu:gloo,cuda:nccl"])
def test_a_group_for_both_is_taken(group, backend):
    group(backend, 0, 1)
    for device in ("cpu", "cuda"):
        distributed._check_group_of_others(torch.device(device))
