"""Models of others: every module of timm, and what a user may ask of one."""

import json
import multiprocessing
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import TINY_RUN
from PIL import Image

from config import build_config
from data.augmentation import build_eval_transform
from engine.model import check_image_size, check_smallest_batch, giga_macs, prepare_model
from engine.train import train
from main import main
from models import build_model, left_out
from models.crossformer import VARIANTS
from tasks.trained import load_trained
from utils.errors import UserError
from utils.rules import CROSSFORMERS

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def model_of(config) -> torch.nn.Module:
    """With three classes."""
    return prepare_model(config, lambda: build_model(config, 3), CPU)


CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def config_of(name: str, *opts, cfg: str = str(ROOT / "configs" / "small.yaml")):
    return build_config(cfg, ["MODEL.NAME", name, *map(str, opts)])


@pytest.mark.parametrize("path", [path for path in CONFIGS if "micro" not in path.stem], ids=lambda path: path.stem)
@pytest.mark.parametrize("name", ["test_resnet", "ghostnet_050"])
def test_a_model_of_others_with_any_of_our_configs(name, path):
    """ghostnet has no stochastic depth; a resnet has. Groups of 12 are those of the file's own model."""
    config = config_of(name, cfg=str(path))
    build_model(config, 10)
    lines = left_out(config)
    wanted = name == "ghostnet_050" and "linear_probe" not in path.stem
    assert any("has no drop_path_rate: trained without stochastic depth" in line for line in lines) == wanted
    assert any("MODEL.CROSSFORMER.GROUP_SIZE" in line for line in lines) == ("384" in path.stem)


def test_a_rate_is_the_model_s_the_recipe_s_or_what_was_asked_for():
    assert CROSSFORMERS.keys() == VARIANTS.keys()

    def last_rate(name: str, *opts) -> float:
        config = config_of(name, *opts)
        model = build_model(config, 10)
        assert left_out(config) == []
        return (
            model.layers[-1].blocks[-1].drop_path_rate
            if "cross" in name
            else max(getattr(module, "drop_prob", None) or 0.0 for module in model.modules())
        )

    assert last_rate("crossformer_base") == pytest.approx(0.3)
    assert last_rate("crossformer_base", "MODEL.DROP_PATH_RATE", 0.1) == pytest.approx(0.1)
    assert last_rate("fasternet_t0", "MODEL.DROP_PATH_RATE", 0) == 0  # whose own is not 0
    assert last_rate("test_convnext") == pytest.approx(0.2)
    assert build_model(config_of("ghostnet_050"), 10).drop_rate == 0.2  # its own
    assert build_model(config_of("ghostnet_050", "MODEL.DROP_RATE", 0), 10).drop_rate == 0


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (
            "MODEL.NAME hrnet_w18_small MODEL.DROP_PATH_RATE 0.1",
            "MODEL.NAME hrnet_w18_small has no drop_path_rate: set MODEL.DROP_PATH_RATE 0",
        ),
        (
            "MODEL.NAME ghostnet_050 MODEL.DROP_PATH_RATE 0.1",
            "MODEL.NAME ghostnet_050 has no drop_path_rate: set MODEL.DROP_PATH_RATE 0",
        ),
        (
            "MODEL.NAME test_resnet MODEL.CROSSFORMER.GROUP_SIZE [4,4,4,4]",
            "MODEL.CROSSFORMER.GROUP_SIZE is set, but MODEL.NAME test_resnet is no CrossFormer",
        ),
        (
            "MODEL.NAME test_vit MODEL.KWARGS {imgsize:\\ 96}",
            "MODEL.KWARGS imgsize: MODEL.NAME test_vit has no such argument; did you mean img_size?",
        ),
        (
            "MODEL.NAME test_vit MODEL.KWARGS {num_heads:\\ 5}",
            "MODEL.KWARGS num_heads 5: MODEL.NAME test_vit does not take it: dim should be divisible by num_heads",
        ),
        ("MODEL.NAME test_vit MODEL.KWARGS {num_classes:\\ 5}", "it is MODEL.NUM_CLASSES"),
        ("MODEL.NAME test_vit MODEL.KWARGS {checkpoint_path:\\ x}", "weights to start from are MODEL.PRETRAINED"),
        ("MODEL.NAME test_vit MODEL.KWARGS {in_chans:\\ 1}", "MODEL.KWARGS in_chans is not to be set here: images are"),
        ("MODEL.KWARGS {embed_dim:\\ 32}", "it is MODEL.CROSSFORMER.EMBED_DIM"),
        ("MODEL.KWARGS 3", "MODEL.KWARGS must be a dict, not 3"),
        ("MODEL.KWARGS {1:\\ 2}", "1 is not the name of an argument"),
        ("DATA.IMG_SIZE [224]", "must be a whole number, or a height and a width"),
        ("DATA.IMG_SIZE [224,0]", "must be a whole number, or a height and a width"),
        ("MODEL.DROP_RATE -0.5", "MODEL.DROP_RATE -0.5 .* must lie between 0 and 0.999"),
    ],
)
def test_a_mistake_is_one_line(opts, message):
    words = [word.replace("\0", " ") for word in opts.replace("\\ ", "\0").split()]
    with pytest.raises(UserError, match=message if ".*" in message else re.escape(message)):
        build_model(build_config("", words), 10)


def test_the_rate_of_a_file_was_asked_for(capsys):
    opts = "MODEL.NAME hrnet_w18_small DATA.IMG_SIZE 64 MODEL.NUM_CLASSES 3"
    assert main(["--cfg", "configs/micro.yaml", "--throughput", "--opts", *opts.split()]) == 2
    assert capsys.readouterr().err == (
        "error: MODEL.NAME hrnet_w18_small has no drop_path_rate: set MODEL.DROP_PATH_RATE 0\n"
    )


@pytest.mark.parametrize("name", ["cait_xxs24_224", "pit_ti_224"])
def test_counting_refuses_no_model(name):
    """A parameter that enters a module, as their class tokens do, is what torch's counter stumbles over."""
    model = model_of(config_of(name, "MODEL.KWARGS", "{depth: 2}" if "cait" in name else "{}"))
    assert 0.1 < giga_macs(model, 224, CPU) < 3
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_count_that_fails_is_unknown():
    class Counted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.pretrained_cfg = {"input_size": (3, 32, 32)}

        def forward(self, x):
            return torch.full((1, 1), x.sum().item())

    assert np.isnan(giga_macs(Counted(), 32, CPU))


@pytest.mark.parametrize("size", [64, [96, 224]])
def test_a_model_of_a_fixed_size(size):
    """It says which size it takes; with KWARGS it takes another."""
    with pytest.raises(UserError, match=r"DATA.IMG_SIZE .* does not take it: .*; it takes 224, or .*img_size: "):
        check_image_size(model_of(config_of("pit_ti_224")), size, CPU)
    model = model_of(config_of("pit_ti_224", "MODEL.KWARGS", f"{{img_size: {size}}}"))
    check_image_size(model, size, CPU)


def test_batchnorm_on_one_image():
    """Where it has one value for a channel it cannot be trained; elsewhere it can, and others always."""
    with pytest.raises(UserError, match="normalises over the batch .* use --batch-size 2"):
        check_smallest_batch(config := config_of("test_resnet", "DATA.IMG_SIZE", 32), model_of(config), 1)
    config = config_of("test_resnet", "DATA.IMG_SIZE", 160)
    model = model_of(config)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    check_smallest_batch(config, model, 1)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_one_image_is_refused_before_training(capsys, tmp_path, digits):
    flags = ("--data-path", digits, "--output", tmp_path, "--batch-size", 1)
    opts = ("MODEL.NAME", "test_resnet")
    assert main([*map(str, (*TINY_RUN, *opts, *flags))]) == 2
    assert "cannot be trained on one image at a time: use --batch-size 2 or more" in capsys.readouterr().err


def test_the_centre_of_images_that_are_no_squares():
    """Neither stretched nor padded: what is cropped is covered by the resized image. Squares stay as they were."""
    ramp = torch.arange(200, dtype=torch.uint8).expand(3, 100, 200)
    image, _ = build_eval_transform(build_config(opts="DATA.IMG_SIZE [50,60] TEST.CROP_PCT 1.0".split()))(ramp)
    assert image.shape == (3, 50, 60)
    assert image[0, 0, 0].item() == pytest.approx(40, abs=1)  # 100 x 200 is halved, and 20 of 100 columns are cut off
    assert image[0, 0, -1].item() == pytest.approx(159, abs=1)
    image, _ = build_eval_transform(build_config(opts="DATA.IMG_SIZE [20,60] TEST.CROP_PCT 1.0".split()))(ramp)
    assert image.shape == (3, 20, 60)
    assert (image[0, 0, 0].item(), image[0, 0, -1].item()) == pytest.approx((1, 198), abs=2)
    image, _ = build_eval_transform(build_config(opts="DATA.IMG_SIZE [20,60] TEST.CROP False".split()))(ramp)
    assert image.shape == (3, 20, 60)


def test_a_run_on_images_that_are_no_squares(run_main, digits, tmp_path, capsys):
    """With all that knows of the size: views, erasing, mixing, workers. It carries on, is evaluated and predicts."""
    opts = "DATA.IMG_SIZE [32,48] TEST.CROP True TEST.VIEWS five_crop AUG.REPROB 1 AUG.MIXUP 0.8 AUG.CUTMIX 1.0"
    opts += " AUG.AUTO_AUGMENT rand-m9-mstd0.5-inc1 DATA.NUM_WORKERS 1 MODEL.KWARGS {mlp_ratio:\0002}"
    words = [word.replace("\0", " ") for word in opts.split()]
    run = (*TINY_RUN, *words, "--data-path", digits, "--batch-size", "12")
    first = run_main(*run, "--opts", "TRAIN.EPOCHS", "2")
    assert "GMAC at 32 x 48" in first.stdout
    assert "DATA.IMG_SIZE" not in run_main(*run, "--opts", "TRAIN.EPOCHS", "3").stdout  # it did not change
    best = first.results / "checkpoints" / "best.pth"
    again = run_main(*run, "--eval", "--resume", best)
    assert again.events("eval")[-1]["top1"] == first.checkpoint("best")["top1"]
    trained = load_trained(str(best), CPU)
    assert trained.config.DATA.IMG_SIZE == [32, 48]
    assert trained.config.MODEL.KWARGS == {"mlp_ratio": 2}
    assert (
        trained.model.layers[0].blocks[0].mlp.fc1.out_features
        == 2 * trained.model.layers[0].blocks[0].norm2.weight.numel()
    )
    config = build_config(str(first.results / "config.yaml"))
    assert (config.DATA.IMG_SIZE, dict(config.MODEL.KWARGS)) == ([32, 48], {"mlp_ratio": 2})


# ---- The smallest model of each of timm's modules

SMALLEST = json.loads((ROOT / "tests" / "data" / "smallest_models.json").read_text())
"""For each module of timm the name of its model with the fewest parameters."""
ARGUMENTS = dict.fromkeys(("deepseek_vit_412m", "gemma4_vit_167m", "qwen3_vit_88m"), "{depth: 1}")
"""Of models that would take minutes for each image on a CPU, with their depth."""
CANNOT = {"fastvit_t8": "torch 2.15 crashes"}
"""What is not tried, and the words with which docs/models.md says why."""


@pytest.fixture(scope="session")
def noise(tmp_path_factory) -> Path:
    """4 training and 2 validation images of two classes."""
    root, rng = tmp_path_factory.mktemp("noise"), np.random.RandomState(0)
    for split, count in (("train", 2), ("val", 1)):
        for i in range(2 * count):
            path = root / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.randint(0, 256, (48, 64, 3), np.uint8)).save(path)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST.values())
def test_the_smallest_model_of_a_module_trains_and_is_evaluated(name, noise, tmp_path):
    """Two steps at its own size, in a process of its own: a crash of torch's kernels ends one model's test."""
    if name in CANNOT:
        pytest.skip(CANNOT[name])
    size = list(timm.get_pretrained_cfg(name).input_size[1:])
    opts = ["MODEL.NAME", name, "DATA.IMG_SIZE", str(size), "MODEL.KWARGS", ARGUMENTS.get(name, "{}")]
    opts += f"DATA.BATCH_SIZE 2 DATA.NUM_WORKERS 0 DATA.DATA_PATH {noise} OUTPUT {tmp_path}".split()
    opts += "TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0 AMP none".split()
    process = multiprocessing.get_context("fork").Process(
        target=train, args=(build_config(str(ROOT / "configs" / "small.yaml"), opts), CPU)
    )
    process.start()
    process.join()
    assert process.exitcode == 0
    lines = (tmp_path / name / "default" / "metrics.jsonl").read_text().splitlines()
    events = {event["event"]: event for event in map(json.loads, lines)}
    assert events["train"]["step"] == 2
    assert np.isfinite(events["train"]["loss"])
    assert events["eval"]["images"] == 2


@pytest.mark.slow
def test_every_module_of_timm_is_in_the_table():
    modules = {timm.models.model_entrypoint(name).__module__ for name in timm.list_models()}
    known = {f"timm.models.{module}" for module in SMALLEST}
    assert {module for module in modules if module.startswith("timm.")} == known


def test_the_page_names_what_cannot():
    page = (ROOT / "docs" / "models.md").read_text()
    for name, reason in CANNOT.items():
        assert re.search(f"`{name}`.*{reason}", page)
    assert all(f"`{name}`" in page for name in ARGUMENTS)
