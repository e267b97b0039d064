"""The networks are models of timm: its contract for classification, features and checkpoints."""

import pytest
import timm
import torch
from conftest import quick
from timm.layers import get_notrace_modules
from torchvision.models.feature_extraction import create_feature_extractor

from models.crossformer import VARIANTS, checkpoint_filter_fn


@pytest.mark.parametrize("name", quick(VARIANTS, ("crossformer_micro", "crossformerpp_small")))
def test_timm_contract(name):
    model = timm.create_model(name, num_classes=7, in_chans=4, drop_path_rate=0.1, drop_rate=0.1)
    x = torch.randn(2, 4, 64, 96)
    for how in (dict(enable=False), dict(enable=True), dict(enable=True, selective=True)):
        model.set_grad_checkpointing(**how)
        model(x).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        model.zero_grad()
    model.eval()
    with torch.no_grad():
        tokens = model.forward_features(x)
        assert tokens.shape == (2, 2, 3, model.num_features)
        assert model.forward_head(tokens, pre_logits=True).shape == (2, model.head_hidden_size)
        assert model(x).shape == (2, 7)
        final, maps = model.forward_intermediates(x)
        assert torch.equal(final, tokens)
        assert [m.shape[1] for m in maps] == [info["num_chs"] for info in model.feature_info]
        assert [64 // m.shape[2] for m in maps] == [4, 8, 16, 32] == [i["reduction"] for i in model.feature_info]
        (normed,) = model.forward_intermediates(
            x, indices=[3], norm=True, output_fmt="NHWC", stop_early=True, intermediates_only=True
        )
        assert torch.equal(normed, tokens)
        assert model.get_classifier() is model.head
        model.reset_classifier(3)
        assert model(x).shape == (2, 3) == (2, model.num_classes)
        model.reset_classifier(0, "")
        assert torch.equal(model(x), tokens)
    assert model.no_weight_decay() == set()
    assert model.default_cfg["classifier"] == "head"
    assert model.default_cfg["crop_pct"] == 0.875
    config = timm.data.resolve_data_config({}, model=model)
    assert config["interpolation"] == "bicubic"
    for coarse in (False, True):
        groups = timm.models.group_parameters(model, model.group_matcher(coarse), reverse=True)
        assert groups.keys() == {n for n, _ in model.named_parameters()}
        assert groups["patch_embed.norm.weight"] == 0
        assert groups["norm.weight"] == max(groups.values())


@pytest.mark.parametrize("name", quick(VARIANTS, ("crossformer_micro", "crossformerpp_small")))
def test_every_way_to_get_features_gives_the_same(name):
    """timm's getter, hooks and torch.fx graphs, and torchvision's graphs."""
    x = torch.randn(1, 3, 64, 96)
    models = []
    for feature_cls in ("getter", "hook", "fx"):
        torch.manual_seed(0)
        models.append(timm.create_model(name, features_only=True, out_indices=(1, 3), feature_cls=feature_cls).eval())
    with torch.no_grad():
        expected = models[0](x)
        assert [f.shape[1] for f in expected] == models[0].feature_info.channels()
        for model in models[1:]:
            features = [f.permute(0, 3, 1, 2) for f in model(x)]
            assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(expected, features, strict=True))
        whole = timm.create_model(name, num_classes=2).eval()
        nodes = {info["module"]: str(i) for i, info in enumerate(whole.feature_info)} | {"head": "logits"}
        graph = create_feature_extractor(whole, nodes, tracer_kwargs={"leaf_modules": get_notrace_modules()})
        out = graph(x)
        assert torch.equal(out["logits"], whole(x))
        maps = whole.forward_intermediates(x, intermediates_only=True, output_fmt="NHWC")
        assert all(torch.equal(out[str(i)], m) for i, m in enumerate(maps))


@pytest.mark.parametrize("name", quick(VARIANTS, ("crossformer_micro", "crossformerpp_small")))
def test_head_as_the_default_config_says(name):
    """What timm's tests ask of a model and its default_cfg: shapes, names of layers, and the mode of a new head."""
    model = timm.create_model(name, num_classes=5).eval()
    cfg, tensors = model.default_cfg, model.state_dict()
    assert all(f"{layer}.weight" in tensors for layer in (cfg["classifier"], *cfg["first_conv"]))
    image = torch.randn(1, *(cfg["input_size"] if name == "crossformer_micro" else cfg["min_input_size"]))
    with torch.no_grad():
        tokens = model.forward_features(image)
        assert tokens.shape == (1, 1, 1, model.num_features)
        assert [side // 32 for side in cfg["input_size"][1:]] == [*cfg["pool_size"]]
        model.reset_classifier(0)
        assert model(image).shape == (1, model.num_features)
        for mode in (True, False):
            model.train(mode).reset_classifier(4, "max")
            assert all(module.training == mode for module in model.modules())
        for headless, shape in ((dict(num_classes=0), (1, model.num_features)), (dict(global_pool=""), (1, 1, 1, 3))):
            made = timm.create_model(name, **{"num_classes": 3, **headless}).eval()
            assert made(image).shape == shape


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax"])
def test_pools(pool):
    """The published one is the mean; the others are what timm's pools do to the token map."""
    model = timm.create_model("crossformer_micro", num_classes=5, global_pool=pool).eval()
    tokens = model.forward_features(torch.randn(2, 3, 64, 96)).flatten(1, 2)
    mean, largest = tokens.mean(1), tokens.amax(1)
    expected = {
        "avg": mean, "max": largest, "avgmax": (mean + largest) / 2, "catavgmax": torch.cat([mean, largest], 1)
    }[pool]  # fmt: skip
    seen = model.forward_head(tokens.unflatten(1, (2, 3)), pre_logits=True)
    torch.testing.assert_close(seen, expected)
    assert seen.shape[1] == model.head_hidden_size == model.head.in_features


@pytest.mark.parametrize("name", quick(VARIANTS, ("crossformer_micro", "crossformerpp_small")))
def test_device_and_dtype(name):
    """Parameters are made where and as it is asked for; on meta they get their values later, as drawn the usual way."""
    assert {p.dtype for p in timm.create_model(name, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    with torch.device("cpu"):
        model = timm.create_model(name, num_classes=5, device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float64)}
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    torch.manual_seed(0)
    model.init_weights()
    usual = timm.create_model(name, num_classes=5).double()
    for (key, drawn), other in zip(model.named_parameters(), usual.parameters(), strict=True):
        if drawn.numel() > 256:
            assert torch.allclose(drawn.std(), other.std(), rtol=0.2, atol=1e-3), key
        assert torch.equal(drawn, other) == (drawn.unique().numel() == 1), key
    assert model.eval()(torch.randn(1, 3, 32, 32).double()).isfinite().all()


@pytest.mark.parametrize("name", quick(VARIANTS, ("crossformer_micro", "crossformerpp_small")))
@pytest.mark.parametrize("output_stride", [8, 16])
def test_output_stride(name, output_stride):
    """Of a finer map every second token, or fourth, is what it is with 32; also where groups are padded."""
    usual = timm.create_model(name, features_only=True).eval()
    fine = timm.create_model(name, features_only=True, output_stride=output_stride).eval()
    fine.load_state_dict(usual.state_dict())
    assert fine.feature_info.reduction() == [min(r, output_stride) for r in (4, 8, 16, 32)]
    for size in ((64, 96), (256, 288)):
        image = torch.randn(1, 3, *size)
        with torch.no_grad():
            pairs = list(zip(usual(image), fine(image), usual.feature_info.reduction(), strict=True))
        for expected, found, reduction in pairs:
            step = max(1, reduction // output_stride)
            assert found.shape[2:] == tuple(side // min(reduction, output_stride) for side in size)
            torch.testing.assert_close(found[..., ::step, ::step], expected, atol=3e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="output_stride 4 is not one of 8, 16, 32"):
        timm.create_model(name, output_stride=4)


def test_features_only_prunes_what_it_does_not_need():
    """Every parameter that is left gets a gradient, so DDP takes the pruned model as it is."""
    model = timm.create_model("crossformer_micro", features_only=True, out_indices=(1, 2))
    maps = model(torch.randn(1, 3, 64, 96))
    assert [m.shape for m in maps] == [(1, 64, 8, 12), (1, 128, 4, 6)]
    assert model.feature_info.reduction() == [8, 16]
    sum(m.sum() for m in maps).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_head_for_what_is_left():
    """Where stages are removed the old head goes too, and a new one is as wide as the last map that is kept."""
    model, images = timm.create_model("crossformer_micro", num_classes=7).eval(), torch.randn(2, 3, 64, 96)
    logits = model(images)
    assert model.prune_intermediate_layers([3], prune_head=False) == [3]
    assert torch.equal(model(images), logits)
    assert model.prune_intermediate_layers([1], prune_head=False) == [1]
    assert (model.num_features, model.head_hidden_size, model.num_classes) == (64, 64, 0)
    assert torch.equal(model(images), model.forward_features(images))
    for pool, width in (("avg", 64), ("catavgmax", 128)):
        model.reset_classifier(5, pool)
        assert (model(images).shape, model.head_hidden_size) == ((2, 5), width)


def test_filter_takes_off_prefixes_and_computed_buffers():
    tensor = torch.zeros(1)
    keys = ["module.norm.weight", "backbone.norm.bias", "layers.0.blocks.0.attn.biases", "module.backbone.head.bias"]
    keys.append("backbone.layers.0.blocks.1.attn.relative_position_index")
    assert list(checkpoint_filter_fn(dict.fromkeys(keys, tensor))) == ["norm.weight", "norm.bias", "head.bias"]
