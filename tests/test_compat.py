"""The private parts of libraries that the project uses are there, and do what it uses them for."""

import copy
import io
import random
import tarfile

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from utils.compat import (
    compile_ddp_whole,
    compile_many_models,
    end_of_member,
    forget_members,
    is_compiled,
    move_towards,
    name_in_python_3,
    replace_operations,
    skips_by_itself,
    tar_number,
    tell_found_inf,
    timm_converter,
)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_a_fused_optimizer_skips_a_step_when_told(kind, scaled):
    weight = nn.Parameter(torch.ones(3))
    optimizer, scaler = kind([weight], lr=0.1, fused=True), torch.amp.GradScaler("cpu", enabled=scaled)
    assert skips_by_itself(optimizer)
    assert not skips_by_itself(kind([weight], lr=0.1, fused=False))
    for gradient in (torch.inf, 1.0):
        scaler.scale((weight * gradient).sum()).backward()
        scaler.unscale_(optimizer)
        tell_found_inf(optimizer, ~torch.isfinite(weight.grad).all())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(weight, torch.ones(3)) == (gradient == torch.inf)


def test_many_averages_move_as_each_would():
    averages, values = ([torch.randn(n, 3) for n in (1, 5, 2)] for _ in range(2))
    expected = [a + (v - a) * torch.tensor(0.3) for a, v in zip(averages, values, strict=True)]
    move_towards(averages, values, torch.tensor(0.3))
    assert all(map(torch.equal, averages, expected))


def test_a_compiled_model_is_known():
    model = nn.Linear(2, 2)
    assert not is_compiled(model)
    model.compile(backend="eager")
    assert is_compiled(model)
    assert not is_compiled(copy.deepcopy(model))


@torch._dynamo.config.patch(optimize_ddp=True)
class Layers(nn.Sequential):
    """Layers one after another; torch 2.11 does not compile the forward of a class of its own."""

    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x


def test_a_compiled_model_inside_ddp_stays_whole():
    """Two layers that each fill a bucket: left to itself, torch.compile makes two graphs of them."""
    graphs = []
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for setting in (lambda: None, compile_ddp_whole):
            setting()
            model = Layers(nn.Linear(600, 600), nn.Linear(600, 600))
            model.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward)
            DistributedDataParallel(model, bucket_cap_mb=1)(torch.ones(1, 600)).sum().backward()
            assert len(graphs) == (2 if setting is not compile_ddp_whole else 1)
            graphs.clear()
            torch.compiler.reset()
    finally:
        dist.destroy_process_group()


@torch._dynamo.config.patch(recompile_limit=8)
def test_more_models_than_usual_are_compiled():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compile_many_models(12)
    for size in range(1, 11):
        model = Layers(nn.Linear(size, 1))
        model.compile(backend=backend, dynamic=False)
        model(torch.ones(1, size))
    assert len(graphs) == 10


def test_models_bring_what_renames_the_weights_of_their_authors():
    with torch.device("meta"):
        model = timm.create_model("swin_tiny_patch4_window7_224")
    assert timm_converter(nn.Linear(2, 2)) is None
    renamed = timm_converter(model)({"layers.0.downsample.reduction.weight": torch.zeros(1)}, model)
    assert list(renamed) == ["layers.1.downsample.reduction.weight"]


@pytest.mark.parametrize("make", [rand_augment_transform, auto_augment_transform])
def test_policies_call_what_stands_in_for_their_operations(make):
    policy = make("rand-m9-n3" if make is rand_augment_transform else "v0", {})
    names = replace_operations(policy, lambda name: lambda done, *arguments, **_: [*done, (name, len(arguments))])
    random.seed(0)
    np.random.seed(0)
    done = {operation for _ in range(300) for operation in policy([])}
    assert done >= {("Equalize", 0), ("Rotate", 1), ("Color", 1)}
    assert {name for name, _ in done} == names


def test_a_policy_that_blends_is_refused():
    with pytest.raises(TypeError, match="AugMixAugment does not consist of operations"):
        replace_operations(augment_and_mix_transform("augmix-m3", {}), lambda name: name)


def test_a_tar_file_is_read_member_by_member():
    """An image of 600 bytes takes two blocks of 512 and a header of one; in the header 600 is octal 1130."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for size in (3, 600):
            member = tarfile.TarInfo("image.jpg")
            member.size = size
            tar.addfile(member, io.BytesIO(bytes(size)))
    archive.seek(0)
    with tarfile.open(fileobj=archive) as tar:
        for end, size in ((1024, 3), (2560, 600)):
            member = tar.next()
            assert end_of_member(tar) == end
            assert tar_number(archive.getvalue()[member.offset :][124:136]) == size
            forget_members(tar)
        assert tar.next() is None
        assert tar.getmembers() == []


def test_a_field_of_a_tar_file_holds_a_number_or_none():
    assert tar_number(b"00000001130\0") == 600
    assert tar_number(b"\x80" + bytes(10) + b"\x07") == 7  # as GNU tar writes numbers that are large
    with pytest.raises(tarfile.HeaderError):
        tar_number(b"a picture of")


def test_names_of_python_2_are_known():
    assert name_in_python_3("__builtin__", "set") == ("builtins", "set")
    assert name_in_python_3("__builtin__", "xrange") == ("builtins", "range")
    assert name_in_python_3("copy_reg", "anything") == ("copyreg", "anything")
    assert name_in_python_3("torch._utils", "_rebuild_tensor_v2") == ("torch._utils", "_rebuild_tensor_v2")


@pytest.mark.parametrize("write", ["in place", "with others", "from a checkpoint"])
def test_a_tensor_counts_the_writes_to_it(write):
    """``models.crossformer.position_bias`` goes by that; without it a cache would outlive its weights."""
    layer = nn.Linear(2, 2)
    before, place = layer.weight._version, layer.weight.data_ptr()
    match write:
        case "in place":
            with torch.no_grad():
                layer.weight.mul_(2)
        case "with others":
            move_towards([layer.weight.detach()], [torch.ones(2, 2)], torch.tensor(0.5))
        case "from a checkpoint":
            layer.load_state_dict(nn.Linear(2, 2).state_dict())
    assert layer.weight._version > before
    assert layer.weight.data_ptr() == place
