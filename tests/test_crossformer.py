"""The networks against the measured outputs of the published architecture (tests/data), and timm's model contract."""

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import quick
from torch import nn

from models.crossformer import position_bias
from models.crossformer.grouping import Grouping
from models.crossformer.position_bias import position_biases

DATA = Path(__file__).parent / "data"
CLASSIFICATION = json.loads((DATA / "classification.json").read_text())
DENSE = json.loads((DATA / "dense.json").read_text())


def timm_name(variant: str) -> str:
    return f"crossformerpp_{variant[3:]}" if variant.startswith("pp_") else f"crossformer_{variant}"


def fill(model: nn.Module) -> None:
    """Give each tensor the values that the reference derives from its key."""
    state_dict = {}
    for key, value in model.state_dict().items():
        r = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(tuple(value.shape)).astype(np.float32)
        if value.ndim >= 2:
            r *= np.float32(np.prod(value.shape[1:]) ** -0.5)
        else:
            r = np.float32(0.1) * r + np.float32(key.endswith(".weight"))
        state_dict[key] = torch.from_numpy(r)
    model.load_state_dict(state_dict)


def images(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


@pytest.mark.parametrize("variant", CLASSIFICATION)
def test_same_weights_as_published(variant):
    """Their names, order, shapes and number."""
    reference = CLASSIFICATION[variant]
    with torch.device("meta"):
        model = timm.create_model(timm_name(variant))
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == reference["keys"]
    assert list(model.state_dict()) == list(reference["keys"])
    assert sum(p.numel() for p in model.parameters()) == reference["parameters"]


@pytest.mark.parametrize("variant", quick(CLASSIFICATION, ("tiny", "pp_small")))
def test_same_function_and_gradients_as_published(variant):
    reference, arrays = CLASSIFICATION[variant], np.load(DATA / f"{variant}_224.npz")
    model = timm.create_model(timm_name(variant)).eval()
    fill(model)
    x = images(0, 2, 3, 224, 224)
    with torch.no_grad():
        tokens = model.forward_features(x)
        np.testing.assert_allclose(model.forward_head(tokens, pre_logits=True), arrays["pooled"], rtol=0, atol=1e-4)
        np.testing.assert_allclose(model(x), arrays["logits"], rtol=0, atol=1e-4)

    loss = F.cross_entropy(model.train()(x), torch.tensor([3, 977]))
    loss.backward()
    assert loss.item() == pytest.approx(reference["loss"], abs=1e-4)
    for name, parameter in model.named_parameters():
        expected = reference["grad_norms"][name]
        assert parameter.grad.norm().item() == pytest.approx(expected, rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("case", quick(DENSE, ("dense_tiny_as_trained_192x640", "dense_pp_small_group7_320x256")))
def test_same_dense_features_as_published(case):
    variant = case.removeprefix("dense_").split("_as_trained")[0].split("_group7")[0]
    reference, arrays = DENSE[case], np.load(DATA / f"{case}.npz")
    height, width = reference["height"], reference["width"]
    grouping = dict(group_size=reference["group_size"], interval=reference["interval"])
    model = timm.create_model(timm_name(variant), features_only=True, **grouping).eval()
    fill(model.model)
    with torch.no_grad():
        maps = model(images(height * 10000 + width, 1, 3, height, width))
    assert [list(m.shape) for m in maps] == reference["shapes"]
    for i, stage in enumerate(maps):
        at = torch.linspace(0, stage.numel() - 1, 512).long()
        np.testing.assert_allclose(stage.flatten()[at], arrays[f"stage{i}_samples"], rtol=0, atol=1e-3)
        spread = [stage.mean(), stage.std(correction=0), stage.abs().max()]
        np.testing.assert_allclose(spread, arrays[f"stage{i}_mean_std_absmax"], rtol=1e-3, atol=1e-3)


def micro(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("crossformer_micro", num_classes=10, **kwargs)


def test_grouping_is_the_papers():
    """On a 4 x 4 map with G = 2: neighbours for short distance, tokens two apart for long distance."""
    x = torch.arange(16).reshape(1, 4, 4, 1)
    assert Grouping.of(4, 4, 2, 1).group(x)[0].flatten().tolist() == [0, 1, 4, 5]
    assert Grouping.of(4, 4, 2, 2).group(x)[0].flatten().tolist() == [0, 2, 8, 10]
    assert Grouping.of(4, 4, 4, 2) == Grouping(4, 4, 4, 4, 1)
    assert Grouping.of(3, 9, 4, 2) == Grouping(3, 9, 3, 9, 1)


@pytest.mark.parametrize("shape", [(1, 1), (7, 7), (8, 6), (9, 30), (57, 57)])
@pytest.mark.parametrize("interval", [1, 2, 8])
def test_ungroup_inverts_group(shape, interval):
    """Which takes the tokens as attention leaves them, with the channels cut into heads."""
    x = torch.randn(2, *shape, 6)
    grouping = Grouping.of(*shape, 7, interval)
    heads = grouping.group(x).unflatten(-1, (2, 3)).transpose(1, 2)
    assert torch.equal(grouping.ungroup(heads), x)


def test_offsets_are_query_minus_key():
    grouping = Grouping.of(2, 3, 7, 1)
    of_pair = grouping.for_each_pair(grouping.offsets(torch.device("cpu")).mT)
    position = [(y, x) for y in range(2) for x in range(3)]
    for q, (qy, qx) in enumerate(position):
        for k, (ky, kx) in enumerate(position):
            assert of_pair[:, q, k].tolist() == [qy - ky, qx - kx]


def test_biases_of_a_stage_are_those_of_each_block():
    """Evaluated together they are what the paper's MLP gives for each block alone, at both group sizes of the stage."""
    model = micro(depths=(3, 1, 1, 1), group_size=([4, 2, 4], 4, 4, 4))
    fill(model)
    layers = [block.attn.pos for block in model.layers[0].blocks]
    groupings = [Grouping.of(8, 8, size, 1) for size in (4, 2, 4)]
    biases = position_biases(layers, groupings, torch.float32)
    for layer, grouping, bias in zip(layers, groupings, biases, strict=True):
        mlp = nn.Sequential(layer.pos_proj, layer.pos1, layer.pos2, layer.pos3)
        expected = grouping.for_each_pair(mlp(grouping.offsets(torch.device("cpu"))).mT)
        assert bias.shape == (1, 1, grouping.rows**2, grouping.rows**2)
        torch.testing.assert_close(bias[0], expected, rtol=0, atol=1e-5)


def test_a_key_is_masked_unless_its_whole_group_is_padding():
    """A 9 x 9 map with G = 2 and I = 4 is padded to 16 x 16: some groups hold no token, and keep finite logits."""
    grouping = Grouping.of(9, 9, 2, 4)
    tokens = grouping.group(torch.ones(1, 9, 9, 1))[..., 0] > 0
    masked = grouping.key_mask(torch.device("cpu"))[:, 0, 0] == float("-inf")
    empty = ~tokens.any(dim=1)
    assert 0 < empty.sum() < len(empty)
    assert not masked[empty].any()
    assert torch.equal(masked[~empty], ~tokens[~empty])


@pytest.mark.parametrize("height_width", [(32, 32), (33, 47), (36, 100), (228, 228)])
def test_padding_reaches_nothing(height_width):
    """Whatever the padded tokens hold, output and gradients are the same and finite (57 leaves groups of padding)."""
    model = micro(group_size=(7, 7, 7, 7), interval=(8, 4, 2, 1))
    x = torch.randn(1, 3, *height_width)
    out = model(x)
    out.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    attention = model.layers[0].blocks[0].attn

    def attend(tokens: torch.Tensor, grouping: Grouping) -> torch.Tensor:
        (bias,) = position_biases([attention.pos], [grouping], tokens.dtype)
        return attention(tokens, grouping, bias)

    tokens = torch.randn(1, 9, 10, 32)
    whole = attend(tokens, Grouping.of(9, 10, 7, 1))
    alone = attend(tokens[:, :7, :7], Grouping(7, 7, 7, 7, 1))
    assert torch.allclose(whole[:, :7, :7], alone, atol=1e-6)
    corner = attend(tokens[:, 7:, 7:], Grouping(2, 3, 2, 3, 1))
    assert torch.allclose(whole[:, 7:, 7:], corner, atol=1e-6)


def test_a_small_image_leaves_no_trace():
    """Fault 9: after an image that fits in one group, a large one is treated as before."""
    model = micro(group_size=(8, 4, 4, 4), interval=(2, 2, 2, 2)).eval()
    large, small = torch.randn(1, 3, 256, 320), torch.randn(1, 3, 32, 32)
    assert Grouping.of(8, 8, 8, 2).interval == 1  # which the small image's first stage has
    with torch.no_grad():
        before = model(large)
        model(small)
        assert torch.equal(model(large), before)


def test_too_small_an_image_is_refused():
    with pytest.raises(ValueError, match="31 x 40.*at least 32 x 32"):
        micro()(torch.zeros(1, 3, 31, 40))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.load_state_dict({k: v * 1.5 for k, v in m.state_dict().items()}),
        lambda m: torch.optim.SGD(m.parameters(), lr=1.0).step(),
        lambda m: m(torch.ones(1, 3, 32, 32)).sum().backward() or fused_step(m),
        lambda m: m.double().float(),
        lambda m: [p.data.mul_(1.5) for p in m.train().parameters()] and m.eval(),
        lambda m: [setattr(p, "data", p.data * 1.5) for p in m.parameters()],
    ],
    ids=["load_state_dict", "optimizer", "fused_optimizer", "dtype", "data_between_modes", "data_replaced"],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_cached_position_bias_follows_the_weights(change, mode):
    model, x = micro().eval(), torch.randn(1, 3, 64, 64)
    with mode():
        model(x)
    assert model.layers[0].blocks.bias_cache.entry is not None
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.1)
    change(model)
    with mode():
        after = model(x)
    fresh = micro().eval()
    fresh.load_state_dict(model.state_dict())
    with mode():
        assert torch.equal(after, fresh(x))


def fused_step(model: nn.Module) -> None:
    torch.optim.SGD(model.parameters(), lr=1.0, fused=True).step()


def test_position_bias_has_gradients_in_eval_mode():
    """Somebody may differentiate an evaluated model: the cache must stay out of it, before and after it is filled."""
    model, x = micro().eval(), torch.randn(1, 3, 32, 32)
    for _ in range(2):
        model.zero_grad()
        model(x).sum().backward()
        assert model.layers[0].blocks[0].attn.pos.pos_proj.weight.grad.abs().sum() > 0
        with torch.no_grad():
            model(x)


def test_position_biases_are_computed_once_a_stage_and_not_again_in_evaluation(monkeypatch):
    model, x, calls = micro(), torch.randn(1, 3, 32, 32), []
    monkeypatch.setattr(position_bias, "evaluate_together", counting(position_bias.evaluate_together, calls))
    model(x)
    assert len(calls) == 4  # stages of two blocks each
    model.eval()
    with torch.no_grad():
        for _ in range(3):
            model(x)
    assert len(calls) == 8


def counting(function: Callable, calls: list) -> Callable:
    """The same function, whose calls are noted."""

    def counted(*args):
        calls.append(args)
        return function(*args)

    return counted


def test_cached_position_biases_serve_images_of_several_sizes(monkeypatch):
    """Which have the same groups; what is masked in them is not cached."""
    model, calls = micro(group_size=(2, 2, 2, 2)).eval(), []
    fresh = micro(group_size=(2, 2, 2, 2)).eval()
    with torch.no_grad():
        expected = [fresh.train().eval()(torch.ones(1, 3, *size)) for size in ((128, 160), (160, 192))]
        monkeypatch.setattr(position_bias, "evaluate_together", counting(position_bias.evaluate_together, calls))
        for _ in range(2):
            for size, logits in zip(((128, 160), (160, 192)), expected, strict=True):
                assert torch.equal(model(torch.ones(1, 3, *size)), logits)
    assert len(calls) == 4


def test_replicas_and_reparametrised_weights():
    """They have weights as attributes that are no parameters."""
    model, x = micro(), torch.randn(1, 3, 64, 64)
    expected = model(x)
    linear = model.layers[0].blocks[0].attn.pos.pos1[2]
    torch.nn.utils.parametrizations.weight_norm(linear)
    torch.testing.assert_close(model(x), expected)
    torch.nn.utils.parametrize.remove_parametrizations(linear, "weight")
    replica = replicate(model)
    for mode in (True, False):
        replica.train(mode)
        with torch.set_grad_enabled(mode):
            torch.testing.assert_close(replica(x), model.train(mode)(x))


def replicate(module: nn.Module) -> nn.Module:
    """What torch.nn.DataParallel does for each GPU."""
    replica = module._replicate_for_data_parallel()
    for name, child in module.named_children():
        setattr(replica, name, replicate(child))
    for name, parameter in module.named_parameters(recurse=False):
        setattr(replica, name, parameter.view_as(parameter))
    return replica


def test_on_the_meta_device():
    """Which counts shapes and memory without computing."""
    with torch.device("meta"):
        model = micro(drop_path_rate=0.1)
        model(torch.zeros(2, 3, 64, 64)).sum().backward()
        assert model.eval()(torch.zeros(2, 3, 64, 64)).shape == (2, 10)


def test_gradients_of_each_image():
    """torch.func differentiates a model in evaluation, for each image on its own."""
    model, x = micro().eval(), torch.randn(3, 3, 64, 64)

    def loss(weights: dict, image: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, weights, (image[None],)).sum()

    weights = dict(model.named_parameters())
    of_each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
    model(x).sum().backward()
    for name, parameter in weights.items():
        torch.testing.assert_close(of_each[name].sum(0), parameter.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_its_end(dtype):
    """The cache must not carry one precision into the other."""
    model, x = micro().eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        with torch.autocast("cpu", dtype=dtype):
            assert torch.allclose(model(x).float(), before, atol=0.05)
        assert torch.equal(model(x), before)


@pytest.mark.parametrize("architecture", [{}, dict(group_size=(7, 7, 7, 7), interval=(8, 4, 2, 1))])
def test_checkpointing_gives_the_same_gradients(architecture):
    """On whole maps, and on those that are padded."""
    x, gradients = torch.randn(2, 3, 96, 160), []
    for how in (dict(enable=False), dict(enable=True), dict(enable=True, selective=True)):
        model = micro(drop_path_rate=0.5, **architecture)
        model.set_grad_checkpointing(**how)
        torch.manual_seed(1)
        model(x).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for others in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], others, strict=True))


def test_stochastic_depth_is_linear_over_all_blocks():
    model = timm.create_model("crossformer_tiny", drop_path_rate=0.3)
    rates = [block.drop_path_rate for stage in model.layers for block in stage.blocks]
    assert rates == pytest.approx(np.linspace(0, 0.3, 16).tolist())


def test_blocks_alternate_and_acl_is_where_the_paper_puts_it():
    model = timm.create_model("crossformerpp_huge")
    assert [block.interval for block in model.layers[0].blocks] == [1, 4, 1, 4, 1, 4]
    with_acl = [[j for j, b in enumerate(stage.blocks) if b.ex_conv is not None] for stage in model.layers]
    assert with_acl == [[2], [2], [2, 5, 8, 11, 14], []]


def test_group_size_for_each_block():
    """Nested lists give every progressive schedule: these are the constant one, written out."""
    plain, nested = micro(), micro(group_size=([4, 4], 4, [4, 4], 4), interval=([2, 2], 1, 1, 1))
    x = torch.randn(1, 3, 64, 96)
    assert torch.equal(plain(x), nested(x))
    other = micro(group_size=([4, 8], 4, 4, 4))
    assert [block.group_size for block in other.layers[0].blocks] == [4, 8]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(group_size=(0, 1, 1, 1)), "group_size .* at least 1"),
        (dict(group_size=(7, 7, 7)), "group_size .* 3 entries for 4 stages"),
        (dict(interval=([1, 2, 3], 1, 1, 1)), "interval gives stage 1 3 numbers for its 2 blocks"),
        (dict(num_heads=(5, 2, 4, 8)), "num_heads .* 5 heads do not divide the width 32 of stage 1.* is 4"),
        (dict(embed_dim=40), "embed_dim 40 is not a multiple of 16; the nearest is 32"),
        (dict(depths=(2, 2, 0, 2)), "depths"),
        (dict(global_pool="mean"), "global_pool"),
    ],
)
def test_arguments_that_describe_no_network(kwargs, message):
    with pytest.raises(ValueError, match=message):
        micro(**kwargs)


def test_fake_tensors_leave_no_trace():
    """Estimators of memory and operations run a model on tensors without values: none may stay in a cache."""
    from torch._subclasses import FakeTensorMode

    model = micro(group_size=(3, 3, 3, 3)).eval()
    x = torch.randn(1, 3, 64, 64)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    with torch.no_grad():
        assert type(model(x)) is torch.Tensor
