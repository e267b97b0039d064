"""Settings files of the CrossFormer and Swin repositories and of timm, read as they are."""

from pathlib import Path

import pytest
import timm
import yaml
from conftest import ROOT

from config import SETTINGS, build_config, default_config, flatten
from models import build_model
from models.crossformer import VARIANTS
from models.crossformer.network import CrossFormer
from utils.errors import UserError
from utils.moving import OF_SWIN, OF_TIMM, SIZES, SIZES_PP, SWINS, SWINS_AT, listing
from utils.rules import CROSSFORMERS

PUBLISHED = [name for name in CROSSFORMERS if name != "crossformer_micro"]


def write(path: Path, settings: dict) -> str:
    path.write_text(yaml.safe_dump(settings))
    return str(path)


def architecture(name: str) -> dict:
    """Sizes of a variant as its class has them."""
    defaults = {"embed_dim": 96, "group_size": (7, 7, 7, 7), "interval": (8, 4, 2, 1)}
    pp = {"group_size": (4, 4, 14, 7), "interval": (4, 2, 1, 1)} if name.startswith("crossformerpp") else {}
    return defaults | pp | VARIANTS[name]


def as_published(name: str, called: str) -> dict:
    """What the repository has for a variant, in its own words."""
    sizes = architecture(name)
    cros = {key.upper(): list(value) if isinstance(value, tuple) else value for key, value in sizes.items()}
    cros |= {"MERGE_SIZE": [[2, 4], [2, 4], [2, 4]], "MLP_RATIO": 4.0, "QKV_BIAS": True, "QK_SCALE": "None"}
    cros |= {"PATCH_SIZE": [4, 8, 16, 32], "APE": False, "PATCH_NORM": True, "IN_CHANS": 3}
    if name.startswith("crossformerpp"):
        cros |= {"USE_ACL": True, "USE_CPE": False, "PAD_TYPE": 0, "NO_MASK": False, "ADAPT_INTERVAL": False}
    model = {"TYPE": "cross-scale", "NAME": called, "DROP_PATH_RATE": CROSSFORMERS[name], "CROS": cros}
    return {"BASE": [""], "MODEL": model, "AUG": {"CUTMIX_MINMAX": "None"}, "TRAIN": {"USE_CHECKPOINT": False}}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_files_of_crossformer(name, tmp_path):
    """The huge one is called large there."""
    called = "cross-scale-" + name.rpartition("_")[2].replace("huge", "large") + "-patch4-group7-224"
    config = build_config(write(tmp_path / "theirs.yaml", as_published(name, called)))
    ours = build_config(opts=["MODEL.NAME", name])
    assert name == config.MODEL.NAME
    assert f"MODEL.NAME {called} is {name} here, by its sizes" in config.notes[0]
    sizes = {f"MODEL.CROSSFORMER.{key}" for key in ("EMBED_DIM", "DEPTHS", "NUM_HEADS", "GROUP_SIZE", "INTERVAL")}
    here, there = flatten(config), flatten(ours)
    assert {key for key in here if here[key] != there[key]} <= sizes, "the recipe is the published one"
    with_sizes, plain = build_model(config, 10), build_model(ours, 10)
    assert isinstance(with_sizes, CrossFormer)
    assert str(with_sizes) == str(plain)
    assert {k: v.shape for k, v in with_sizes.state_dict().items()} == {
        k: v.shape for k, v in plain.state_dict().items()
    }


def test_sizes_are_those_of_the_variants():
    for prefix, sizes in (("crossformer", SIZES), ("crossformerpp", SIZES_PP)):
        of_names = {name: architecture(name) for name in PUBLISHED if name.startswith(f"{prefix}_")}
        assert {f"{prefix}_{size}": key for key, size in sizes.items()} == {
            name: (sizes["embed_dim"], tuple(sizes["depths"])) for name, sizes in of_names.items()
        }
    for (window, image), names in SWINS_AT.items():
        for size in names:
            assert timm.is_model(f"swin_{size}_patch4_window{window}_{image}")


def test_groups_of_ones_own(tmp_path):
    settings = as_published("crossformer_tiny", "mine")
    settings["MODEL"]["CROS"] |= {"GROUP_SIZE": [8, 8, 8, 8], "DEPTHS": [1, 1, 2, 2]}
    del settings["MODEL"]["DROP_PATH_RATE"]
    config = build_config(write(tmp_path / "mine.yaml", settings))
    assert config.MODEL.NAME == "crossformer_small"
    assert config.MODEL.CROSSFORMER.GROUP_SIZE == [8, 8, 8, 8]
    assert config.MODEL.CROSSFORMER.DEPTHS == [1, 1, 2, 2]
    assert config.MODEL.DROP_PATH_RATE == 0.1, "as their code has it where a file is silent"


def swin(**changes) -> dict:
    sizes = {"EMBED_DIM": 96, "DEPTHS": [2, 2, 6, 2], "NUM_HEADS": [3, 6, 12, 24], "WINDOW_SIZE": 7} | changes
    return {"MODEL": {"TYPE": "swin", "NAME": "swin_tiny", "DROP_PATH_RATE": 0.2, "SWIN": sizes}}


def test_a_file_of_swin(tmp_path):
    config = build_config(write(tmp_path / "swin.yaml", swin() | {"TRAIN": {"EPOCHS": 100}, "AMP_OPT_LEVEL": "O1"}))
    assert config.MODEL.NAME == "swin_tiny_patch4_window7_224"
    assert (config.MODEL.DROP_PATH_RATE, config.TRAIN.EPOCHS, config.AMP) == (0.2, 100, "auto")
    large = swin(EMBED_DIM=192, DEPTHS=[2, 2, 18, 2], NUM_HEADS=[6, 12, 24, 48], WINDOW_SIZE=12)
    at_384 = build_config(write(tmp_path / "large.yaml", large | {"DATA": {"IMG_SIZE": 384}}))
    assert at_384.MODEL.NAME == "swin_large_patch4_window12_384"
    own = build_config(write(tmp_path / "own.yaml", swin(EMBED_DIM=48, NUM_HEADS=[3, 3, 6, 6], DEPTHS=[1, 1, 2, 1])))
    model = build_model(own, 10)
    assert [len(stage.blocks) for stage in model.layers] == [1, 1, 2, 1]
    assert model.num_features == 8 * 48


def test_all_that_has_no_counterpart_is_named_at_once(tmp_path):
    settings = swin(MLP_RATIO=3.0, APE=True, QKV_BIAS=False, PATCH_NORM=False, QK_SCALE=0.5, PATCH_SIZE=2, IN_CHANS=1)
    settings["DATA"] = {"DATASET": "imagenet22K", "MASK_RATIO": 0.5, "MASK_PATCH_SIZE": 16}
    settings["TRAIN"] = {"START_EPOCH": 3, "MOE": {"SAVE_MASTER": True}, "LR_SCHEDULER": {"WARMUP_PREFIX": True}}
    settings["TEST"] = {"SHUFFLE": True}
    settings |= {"EVAL_MODE": True, "THROUGHPUT_MODE": True, "FUSED_LAYERNORM": True, "FUSED_WINDOW_PROCESS": True}
    settings |= {"NO_SUCH": 1, "TRAIN2": {"X": 1}}
    path = write(tmp_path / "swin.yaml", settings)
    with pytest.raises(UserError) as caught:
        build_config(path)
    text = str(caught.value)
    assert "\n" not in text
    assert f"{path} has 20 settings without a counterpart (docs/moving.md): " in text
    assert len(text.partition("): ")[2].split("; ")) >= 20
    for part in ("EVAL_MODE True (line", "the flag --eval", "NO_SUCH (line", "unknown", "MODEL.SWIN.APE True"):
        assert part in text


ARGS = {
    "aa": "rand-m9-mstd0.5-inc1", "amp": True, "amp_dtype": "bfloat16", "amp_impl": "native", "aug_repeats": 0,
    "aug_splits": 0, "batch_size": 64, "bce_loss": False, "bce_sum": False, "bce_target_thresh": None, "bn_eps": None,
    "bn_momentum": None, "channels_last": True, "checkpoint_hist": 10, "class_map": "", "clip_grad": None,
    "clip_mode": "norm", "color_jitter": 0.4, "color_jitter_prob": None, "cooldown_epochs": 0, "crop_pct": None,
    "cutmix": 1.0, "cutmix_minmax": None, "data": None, "data_dir": "/imagenet", "dataset": "",
    "decay_epochs": 90, "decay_milestones": [90, 180, 270], "decay_rate": 0.1, "device": "cuda", "dist_bn": "reduce",
    "drop": 0.0, "drop_block": None, "drop_connect": None, "drop_path": 0.1, "epoch_repeats": 0.0, "epochs": 100,
    "eval_metric": "top1", "experiment": "mine", "fast_norm": False, "gp": None, "grad_accum_steps": 2,
    "grad_checkpointing": False, "grayscale_prob": None, "hflip": 0.5, "img_size": 192, "in_chans": None,
    "initial_checkpoint": "", "input_size": None, "interpolation": "", "jsd_loss": False, "layer_decay": None,
    "local_rank": 0, "log_interval": 50, "log_wandb": False, "lr": 0.002, "lr_base": 0.1, "lr_base_scale": "",
    "lr_base_size": 256, "lr_cycle_decay": 0.5, "lr_cycle_limit": 1, "lr_cycle_mul": 1.0, "lr_k_decay": 1.0,
    "lr_noise": None, "lr_noise_pct": 0.67, "lr_noise_std": 1.0, "mean": None, "min_lr": 1e-6, "mixup": 0.2,
    "mixup_mode": "batch", "mixup_off_epoch": 0, "mixup_prob": 1.0, "mixup_switch_prob": 0.5, "model": "resnet10t",
    "model_ema": True, "model_ema_decay": 0.9999, "model_ema_force_cpu": False, "model_ema_warmup": False,
    "model_kwargs": {}, "momentum": 0.9, "no_aug": False, "num_classes": None, "opt": "adamw", "opt_betas": None,
    "opt_eps": None, "opt_kwargs": {}, "output": "", "patience_epochs": 10, "pin_mem": False, "pretrained": False,
    "ratio": [0.75, 1.3333333333333333], "recount": 1, "recovery_interval": 0, "remode": "pixel", "reprob": 0.25,
    "resplit": False, "resume": "", "scale": [0.08, 1.0], "sched": "cosine", "sched_on_updates": False, "seed": 42,
    "smoothing": 0.1, "split_bn": False, "start_epoch": None, "std": None, "sync_bn": False, "torchcompile": None,
    "torchscript": False, "train_interpolation": "random", "train_split": "train", "tta": 0,
    "use_multi_epochs_loader": False, "val_split": "validation", "validation_batch_size": None, "vflip": 0.0,
    "warmup_epochs": 5, "warmup_lr": 1e-5, "warmup_prefix": False, "weight_decay": 0.05, "worker_seeding": "all",
    "workers": 4,
}  # fmt: skip
"""What timm's train.py leaves beside its checkpoints."""


def test_args_yaml_of_timm(tmp_path):
    config = build_config(write(tmp_path / "args.yaml", ARGS))
    expected = {
        "MODEL.NAME": "resnet10t", "DATA.DATA_PATH": "/imagenet", "DATA.BATCH_SIZE": 64, "DATA.IMG_SIZE": 192,
        "DATA.NUM_WORKERS": 4, "TRAIN.EPOCHS": 100, "TRAIN.WARMUP_EPOCHS": 5, "TRAIN.BASE_LR": 0.002,
        "TRAIN.LR_REFERENCE_BATCH": 0, "TRAIN.WARMUP_LR": 1e-5, "TRAIN.MIN_LR": 1e-6, "TRAIN.CLIP_GRAD": 0.0,
        "TRAIN.ACCUMULATION_STEPS": 2, "TRAIN.EMA_DECAY": 0.9999, "AMP": "bf16", "AUG.MIXUP": 0.2, "SEED": 42,
        "TAG": "mine", "PRINT_FREQ": 50, "MODEL.DROP_PATH_RATE": 0.1, "TRAIN.LR_SCHEDULER.DECAY_AT": [90, 180, 270],
        "TRAIN.LR_SCHEDULER.DECAY_EPOCHS": 90,
    }  # fmt: skip
    here, default = flatten(config), flatten(default_config())
    assert {key: here[key] for key in expected} == expected
    others = {key for key in here if here[key] != default[key]} - expected.keys()
    assert others == {"MODEL.DROP_RATE", "TRAIN.OPTIMIZER.MOMENTUM"}
    assert any("sched_on_updates False" in note for note in config.notes)
    flagged = build_config(str(tmp_path / "args.yaml"), ["TRAIN.EPOCHS", "3", "TRAIN.WARMUP_EPOCHS", "0"])
    assert flagged.TRAIN.EPOCHS == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixup_off_epoch": 5}, "mixup_off_epoch 5 .*: TRAIN.CURRICULUM"),
        ({"mixup_off_epoch": 5, "jsd_loss": True}, "has 2 settings without a counterpart"),
        ({"lr": None}, "write the learning rate itself"),
        ({"sched": "plateau"}, "TRAIN.LR_SCHEDULER.NAME plateau"),
        ({"lamb_thing": 1}, "lamb_thing .*unknown"),
        ({"initial_checkpoint": "a.pth", "pretrained": True}, "keep one"),
    ],
)
def test_runs_of_timm_that_cannot_be_had(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        build_config(write(tmp_path / "args.yaml", ARGS | changes))


def test_a_rate_that_grows_with_the_batch(tmp_path):
    config = build_config(write(tmp_path / "args.yaml", ARGS | {"lr": None, "opt": "sgd", "lr_base": 0.05}))
    assert (config.TRAIN.BASE_LR, config.TRAIN.LR_REFERENCE_BATCH) == (0.05, 256)


def test_the_page_shows_the_tables():
    page = (ROOT / "docs" / "moving.md").read_text()
    for table in (OF_SWIN, OF_TIMM):
        assert "\n".join(f"| {theirs} | {here} |" for theirs, here in listing(table)) in page
        assert {known.to for known in table.values() if known.to} <= SETTINGS.keys()
        assert all(known.to or known.instead for known in table.values())
    assert len(SWINS) == 4
