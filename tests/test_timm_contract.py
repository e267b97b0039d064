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


def test_features_only_prunes_what_it_does_not_need():
    """Every parameter that is left gets a gradient, so DDP takes the pruned model as it is."""
    model = timm.create_model("crossformer_micro", features_only=True, out_indices=(1, 2))
    maps = model(torch.randn(1, 3, 64, 96))
    assert [m.shape for m in maps] == [(1, 64, 8, 12), (1, 128, 4, 6)]
    assert model.feature_info.reduction() == [8, 16]
    sum(m.sum() for m in maps).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_filter_takes_off_prefixes_and_computed_buffers():
    tensor = torch.zeros(1)
    keys = ["module.norm.weight", "backbone.norm.bias", "layers.0.blocks.0.attn.biases", "module.backbone.head.bias"]
    keys.append("backbone.layers.0.blocks.1.attn.relative_position_index")
    assert list(checkpoint_filter_fn(dict.fromkeys(keys, tensor))) == ["norm.weight", "norm.bias", "head.bias"]
