"""A trained model from whatever holds one."""

import pytest
import timm
import torch
from timm.models._hub import save_for_hf

from tasks.trained import load_trained
from utils.errors import UserError

CPU = torch.device("cpu")


def assert_same_model(trained, model) -> None:
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(trained.model(x), model.eval()(x), atol=1e-6)


def test_a_published_checkpoint_says_which_variant_it_is(tmp_path):
    model = timm.create_model("crossformerpp_small")
    torch.save({"model": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "x.pth")
    trained = load_trained(str(tmp_path / "x.pth"), CPU)
    assert trained.config.MODEL.NAME == "crossformerpp_small"
    assert trained.classes[0] == "tench, Tinca tinca"
    assert_same_model(trained, model)


def test_a_run_of_ours(run_main, digits, tmp_path):
    from conftest import TINY_RUN

    result = run_main(*TINY_RUN, "--data-path", digits, "--batch-size", "36", "--opts", "TRAIN.EMA_DECAY", "0.5")
    for name, weights in (("best", None), ("last", "ema")):
        trained = load_trained(str(result.results / "checkpoints" / f"{name}.pth"), CPU)
        assert trained.classes == list("0123456789")
        assert trained.config.DATA.IMG_SIZE == 32
        assert trained.config.TEST.CROP is False
        assert trained.facts["weights"] == (weights or result.checkpoint("best")["weights"])
    saved = result.checkpoint()
    assert all(torch.equal(value, saved["ema"][key]) for key, value in trained.model.state_dict().items())


@pytest.mark.parametrize("kind", [True, False])
def test_a_folder_of_timm(tmp_path, kind):
    arguments = dict(num_classes=3, group_size=[2, 2, 2, 2])
    model = timm.create_model("crossformer_micro", **arguments)
    config = dict(label_names=["a", "b", "c"])
    save_for_hf(model, tmp_path, model_config=config, model_args=arguments, safe_serialization=kind)
    trained = load_trained(str(tmp_path), CPU)
    assert trained.classes == ["a", "b", "c"]
    assert trained.config.MODEL.CROSSFORMER.GROUP_SIZE == [2, 2, 2, 2]
    assert_same_model(trained, model)


def test_files_that_hold_no_model_that_is_known(tmp_path):
    path = tmp_path / "x.pth"
    torch.save(timm.create_model("resnet10t", num_classes=5).state_dict(), path)
    assert load_trained(str(path), CPU, "resnet10t", image_size=64).config.DATA.IMG_SIZE == 64
    for arguments, message in (
        ((str(path), CPU), "does not say which model it holds: give its timm name with --model"),
        ((str(path), CPU, "resnet10"), "did you mean resnet10t?"),
        ((str(path), CPU, "resnet18"), "does not fit the model"),
        ((str(tmp_path), CPU), "without config.json"),
        ((str(tmp_path / "no.pth"), CPU), "is not a file"),
    ):
        with pytest.raises(UserError, match=message.replace("?", r"\?")):
            load_trained(*arguments)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="names no architecture"):
        load_trained(str(tmp_path), CPU)
