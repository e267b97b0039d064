"""Training on the real command line: exactness, resuming, precision, and what a run leaves behind."""

import json
import os
import signal
import subprocess
import sys

import pytest
import timm
import torch
from conftest import ROOT, TINY_RUN, assert_same_tensors
from event_files import check_tensorboard
from timm.models._hub import save_for_hf
from torch.utils._python_dispatch import TorchDispatchMode

from config import build_config
from engine.checkpoints import Checkpoints

PLAIN = ("MODEL.DROP_PATH_RATE", "0", "AUG.SCALE", "[1.0,1.0]", "AUG.RATIO", "[1.0,1.0]")
"""Neither dropout nor mixing: the ranks then draw nothing at random that differs between them."""

RANDOM = ("MODEL.DROP_PATH_RATE", "0.2", "AUG.MIXUP", "0.8", "AUG.CUTMIX", "1.0", "AUG.REPROB", "0.25")
"""Everything random is on (and RandAugment)."""


def test_two_processes_train_like_one(run_main, digits):
    """72 images make 5 steps an epoch at a global batch of 14: ten steps, a remainder left out."""
    losses = []
    for nproc, batch_size in ((1, 14), (2, 7)):
        result = run_main(
            *TINY_RUN,
            *PLAIN,
            "--data-path",
            digits,
            "--batch-size",
            batch_size,
            "--tag",
            nproc,
            nproc=nproc,
            tag=str(nproc),
        )
        losses.append(result.losses())
    assert len(losses[0]) == 10
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][0] != losses[0][1]


def train_with(run_main, digits, accumulation: int, batch_size: int, *opts):
    flags = (
        "--data-path",
        digits,
        "--tag",
        accumulation,
        "--accumulation-steps",
        accumulation,
        "--batch-size",
        batch_size,
    )
    opts = ("TRAIN.OPTIMIZER.NAME", "sgd", "TRAIN.EPOCHS", "4", *opts)
    return run_main(*TINY_RUN, *PLAIN, *opts, *flags, tag=str(accumulation))


def test_accumulation_is_one_large_batch(run_main, digits):
    """4 x 8 against 32, while the loss falls: a plain SGD step would show a wrong scale or count at once."""
    large, accumulated = (
        train_with(run_main, digits, *shape, "AMP", "none", "TRAIN.BASE_LR", "0.05") for shape in ((1, 32), (4, 8))
    )
    assert len(large.losses()) == 8
    assert large.losses() == pytest.approx(accumulated.losses(), abs=1e-6)
    assert large.losses()[-1] < large.losses()[0] - 1


@pytest.mark.parametrize("amp", [pytest.param("bf16", marks=pytest.mark.slow), "fp16"])
def test_accumulation_in_mixed_precision(run_main, digits, amp):
    """Fault 4: with weights that stay, gradients in low precision are those of one large batch in fp32, unscaled."""
    still = ("TRAIN.BASE_LR", "0", "TRAIN.WARMUP_LR", "0", "TRAIN.MIN_LR", "0")
    large = train_with(run_main, digits, 1, 32, *still, "TRAIN.EPOCHS", "2", "AMP", "none")
    accumulated = train_with(run_main, digits, 4, 8, *still, "TRAIN.EPOCHS", "2", "AMP", amp)
    norms = [[event["grad_norm"] for event in result.events("train")] for result in (large, accumulated)]
    overflows = norms[1].count(None)
    assert overflows <= 2  # fp16 begins with a scale that is too large
    expected, found = zip(*[pair for pair in zip(*norms, strict=True) if pair[1] is not None], strict=True)
    assert found == pytest.approx(expected, rel=0.02)
    if amp == "fp16":
        scaler = accumulated.checkpoint()["scaler"]
        assert scaler["scale"] == 65536.0 / 2**overflows
        assert scaler["_growth_tracker"] == 4 - overflows  # one update a step, not one a micro-batch


def stop_at(text: str, signal_number: int, *arguments) -> tuple[int, str]:
    """Send a signal to ``main.py`` when it has printed ``text``; returns its exit status and what stderr said."""
    process = subprocess.Popen(
        [sys.executable, "main.py", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # as run_main: sums depend on the number of threads
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell in the background ignores it
    )
    try:
        for line in process.stdout:
            if text in line:
                process.send_signal(signal_number)
                break
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, stderr


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_run_that_is_stopped_carries_on_exactly(run_main, digits, workers):
    """Fault 5: killed in the middle of the second of three epochs, with everything random on."""
    flags = (
        *TINY_RUN, *RANDOM, "AUG.AUTO_AUGMENT", "rand-m9-mstd0.5-inc1", "TRAIN.EPOCHS", "3",
        "TRAIN.SAVE_EVERY_STEPS", "1", "TRAIN.EMA_DECAY", "0.9", "DATA.NUM_WORKERS", workers,
        "PRINT_FREQ", "3", "--data-path", digits, "--batch-size", "12",
    )  # fmt: skip
    whole = run_main(*flags, "--tag", "whole", tag="whole")

    stop_at("step 9/18", signal.SIGKILL, *flags, "--output", whole.results.parent.parent)
    newest, _ = Checkpoints(whole.results.parent / "run" / "checkpoints").newest()  # the kill may fall between renames
    stopped_at = torch.load(newest, weights_only=True)["step"]
    assert 6 < stopped_at < 12
    resumed = run_main(*flags)
    assert f"after step {stopped_at}" in resumed.stdout
    assert [event["step"] for event in resumed.events("start")] == [0, stopped_at]

    for name in ("last", "best"):
        a, b = whole.checkpoint(name), resumed.checkpoint(name)
        assert a.pop("config") != b.pop("config")  # their tags differ
        assert_same_tensors(a, b)
    untimed = ("images_per_second", "data_wait", "memory_bytes", "time")
    for kind in ("train", "eval"):
        events = [[{k: v for k, v in e.items() if k not in untimed} for e in r.events(kind)] for r in (whole, resumed)]
        assert events[0] == events[1]

    again = run_main(*flags)
    assert "after step 18" in again.stdout
    assert_same_tensors(again.checkpoint()["model"], resumed.checkpoint()["model"])


def test_what_a_run_leaves_behind(run_main, digits):
    result = run_main(*TINY_RUN, "TRAIN.EMA_DECAY", "0.5", "--data-path", digits, "--batch-size", "8")
    assert {p.name for p in result.results.iterdir()} == {
        "config.yaml", "log.txt", "metrics.jsonl", "tensorboard", "checkpoints", "first_batch.png",
    }  # fmt: skip
    resolved = build_config(str(result.results / "config.yaml"))
    assert (8, 2, str(digits)) == (resolved.DATA.BATCH_SIZE, resolved.TRAIN.EPOCHS, resolved.DATA.DATA_PATH)
    train, evaluations = result.events("train"), result.events("eval")
    assert [event["step"] for event in train] == list(range(1, 19))
    assert [event["epoch"] for event in train] == [1] * 9 + [2] * 9
    assert {"event", "step", "epoch", "loss", "lr", "grad_norm", "images_per_second", "data_wait"} < train[0].keys()
    assert [(event["epoch"], event["step"], event["weights"]) for event in evaluations] == [
        (1, 9, "model"), (1, 9, "ema"), (2, 18, "model"), (2, 18, "ema"),
    ]  # fmt: skip
    assert all({"top1", "top5", "loss", "images"} < event.keys() for event in evaluations)
    best, last = result.checkpoint("best"), result.checkpoint("last")
    assert best["top1"] == max(event["top1"] for event in evaluations) == last["best"]
    assert best["model"].keys() == last["model"].keys()
    assert "patch_embed.projs.0.weight" in best["model"]
    check_tensorboard(result)
    log = (result.results / "log.txt").read_text()
    assert "crossformer_micro  2.6 M parameters" in log
    assert "global batch 8" in log
    assert "epoch 2/2  step 18/18" in log

    evaluated = run_main(
        "--cfg", result.results / "config.yaml", "--eval", "--resume", result.results / "checkpoints" / "best.pth"
    )
    assert evaluated.events("eval")[-1]["top1"] == best["top1"]
    assert (result.results / "config.yaml").read_text() == resolved.dump()


def test_learning_rates_of_the_steps(run_main, digits):
    """The rate of each step, and that the file's setting holds where no flag is given (fault 1)."""
    result = run_main(*TINY_RUN, "TRAIN.LR_REFERENCE_BATCH", "0", "--data-path", digits, "--batch-size", "24")
    rates = [event["lr"] for event in result.events("train")]
    warm_up = [1e-5 + (1e-3 - 1e-5) * step / 3 for step in range(3)]
    assert rates[:3] == pytest.approx(warm_up, rel=1e-6)
    assert rates[3] == pytest.approx((1e-3 + 1e-5) / 2, rel=1e-6)  # half of the cosine is over


def test_another_batch_size_carries_on_at_the_same_image(run_main, digits):
    """72 images: after 8 steps of 12 it is 24 images into the second epoch, which are 3 of its 9 steps of 8."""
    saving = ("TRAIN.SAVE_EVERY_STEPS", "8", "TRAIN.KEEP_LAST", "9")
    first = run_main(*TINY_RUN, *saving, "--data-path", digits, "--batch-size", "12")
    saves = {torch.load(path, weights_only=True)["step"]: path for path in first.results.rglob("[lp]*.pth")}
    flags = ("--data-path", digits, "--batch-size", "8", "--tag", "other", "--resume", saves[8])
    resumed = run_main(*TINY_RUN, *flags, tag="other")
    assert "the global batch was 12, is now 8: step 8 is now 12" in resumed.stdout
    assert [event["step"] for event in resumed.events("train")] == list(range(13, 19))


def test_what_must_not_change_when_a_run_carries_on(run_main, digits, tmp_path):
    """Other settings or images end with a line; more epochs are welcome, and forced changes are named, and hold.

    The weights stay as they are, so that no later epoch is better than the first, which must remain the best.
    """
    import shutil

    data = shutil.copytree(digits, tmp_path / "data")
    still = ("TRAIN.BASE_LR", "0", "TRAIN.WARMUP_LR", "0", "TRAIN.MIN_LR", "0")
    flags = (*TINY_RUN, *still, "--data-path", data, "--batch-size", "12")
    done = run_main(*flags)
    assert done.stdout.count("best.pth") == 1
    result = run_main(*flags, "--optim", "sgd", ok=False)
    assert result.status == 2
    assert "was trained with TRAIN.OPTIMIZER.NAME adamw, this run has sgd" in result.error
    before = {path: path.read_bytes() for path in done.results.rglob("*") if path.is_file()}
    changed = ("--opts", "TRAIN.WEIGHT_DECAY", "0.3", "AUG.HFLIP", "0.1")
    result = run_main(*flags, *changed, ok=False)
    assert result.status == 2
    assert "TRAIN.WEIGHT_DECAY was 0.05, is now 0.3" in result.error
    assert "AUG.HFLIP was 0.0, is now 0.1" in result.error
    assert all(way in result.error for way in ("another --tag", "give the old values", "--force-resume"))
    result = run_main(*flags, *changed, "--force-resume", ok=False)
    assert "nothing is left to train with other settings" in result.error
    assert {path: path.read_bytes() for path in done.results.rglob("*") if path.is_file()} == before
    result = run_main(*flags, "--pretrained", done.results / "checkpoints" / "best.pth", ok=False)
    assert "MODEL.PRETRAINED was ''" in result.error
    assert "done: best top-1" in run_main(*flags, "--resume", done.results / "checkpoints" / "last.pth").stdout
    result = run_main(*flags, *changed, "TRAIN.EPOCHS", "3", "--force-resume")
    assert "TRAIN.WEIGHT_DECAY was 0.05, is now 0.3" in result.stdout
    assert "TRAIN.EPOCHS was 2, is now 3" in result.stdout
    assert "the learning rate goes on from 0.00e+00 to 0.00e+00" in result.stdout
    assert [event["epoch"] for event in result.events("eval")] == [1, 2, 3]
    assert result.checkpoint("best")["epoch"] == 1
    assert [g["weight_decay"] for g in result.checkpoint()["optimizer"]["param_groups"]] == [0.3, 0.0]
    flags = (*flags, *changed, "TRAIN.EPOCHS", "4")
    next(data.glob("train/*/*.png")).unlink()
    result = run_main(*flags, ok=False)
    assert "was trained on 72 images, DATA.DATA_PATH has 71, which changes their order" in result.error
    assert "--force-resume" in result.error
    result = run_main(*flags, "--force-resume")
    assert "was trained on 72 images, DATA.DATA_PATH has 71" in result.stdout
    assert result.events("eval")[-1]["epoch"] == 4


def test_more_epochs_say_at_which_learning_rate(run_main, digits):
    """A run at the end of its cosine goes on at a rate in the middle of the longer one."""
    flags = (*TINY_RUN, "TRAIN.LR_REFERENCE_BATCH", "0", "--data-path", digits, "--batch-size", "36")
    first = run_main(*flags).events("train")[-1]["lr"]
    longer = run_main(*flags, "--opts", "TRAIN.EPOCHS", "4")
    second = longer.events("train")[4]["lr"]
    assert second > first
    assert f"the learning rate goes on from {first:.2e} to {second:.2e}" in longer.stdout
    shorter = run_main(*flags, "--opts", "TRAIN.EPOCHS", "3", ok=False)
    assert "TRAIN.EPOCHS was 4, is now 3" in shorter.error


def test_a_failed_evaluation_costs_no_step_and_is_made_up_for(run_main, digits, tmp_path):
    import shutil

    data = shutil.copytree(digits, tmp_path / "data")
    (data / "val" / "3" / "bad.png").write_bytes(b"no image")
    flags = (*TINY_RUN, "--data-path", data, "--batch-size", "12")
    stopped = run_main(*flags, ok=False)
    assert "bad.png" in stopped.error
    assert stopped.checkpoint()["step"] == 6
    (data / "val" / "3" / "bad.png").unlink()
    result = run_main(*flags)
    assert "after step 6" in result.stdout
    assert [event["epoch"] for event in result.events("eval")] == [1, 2]
    again = run_main(*flags)
    assert [event["epoch"] for event in again.events("eval")] == [1, 2]


@pytest.mark.slow
def test_damaged_checkpoints_on_several_ranks(run_main, digits):
    """Only rank 0 looks for them; the others must not wait for it when it finds none that is whole."""
    flags = (*TINY_RUN, "--data-path", digits, "--batch-size", "6")
    folder = run_main(*flags, nproc=2).results / "checkpoints"
    (folder / "last.pth").write_bytes(b"cut off")
    result = run_main(*flags, nproc=2)
    assert "last.pth is damaged" in result.stdout
    assert "carrying on from" in result.stdout
    for name in ("last.pth", "previous.pth"):
        (folder / name).write_bytes(b"")
    result = run_main(*flags, nproc=2, ok=False)
    assert result.stderr.count("error: ") == 1
    assert "previous.pth is damaged" in result.stderr


def test_all_ranks_evaluate_the_same_batch_norm(run_main, digits, tmp_path):
    """Each rank has statistics of its own until rank 0's are shared: what is logged must be what is saved."""
    model = ("--opts", "MODEL.NAME", "resnet10t", "MODEL.DROP_PATH_RATE", "0")
    flags = (*TINY_RUN, "--data-path", digits, "--batch-size", "9", *model)
    run_main(*flags, nproc=2)
    results = tmp_path / "output" / "resnet10t" / "run"
    run_main(*flags, "--eval", "--resume", results / "checkpoints" / "last.pth")
    losses = [json.loads(line).get("loss") for line in (results / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] == pytest.approx(losses[-2], rel=1e-6)


STILL = ("TRAIN.BASE_LR", "0", "TRAIN.WARMUP_LR", "0", "TRAIN.MIN_LR", "0")
"""Learning rates with which a run ends with the weights it has started from."""


@pytest.fixture(params=["published", "safetensors folder"])
def with_1000_classes(request, tmp_path):
    """Micro with a head of 1,000 classes: the model, and the path of its weights."""
    model = timm.create_model("crossformer_micro", num_classes=1000)
    if request.param == "published":
        path = tmp_path / "pretrained.pth"
        state = {f"module.backbone.{key}": value for key, value in model.state_dict().items()}
        state["module.backbone.layers.0.blocks.0.attn.biases"] = torch.zeros(49, 2)
        torch.save({"model": state, "max_accuracy": 80.0, "epoch": 299, "optimizer": {}, "lr_scheduler": {}}, path)
    else:
        path = tmp_path / "folder"
        save_for_hf(model, str(path), safe_serialization=True)
    return model, path


def test_fine_tuning_starts_from_the_trunk(run_main, digits, with_1000_classes):
    """At another image size and with other groups too: at the old ones the trunk's features are what they were."""
    source, path = with_1000_classes
    result = run_main(
        *TINY_RUN, *STILL, "DATA.IMG_SIZE", "64", "MODEL.CROSSFORMER.GROUP_SIZE", "[8, 8, 4, 2]",
        "TRAIN.LAYER_DECAY", "0.8", "--data-path", digits, "--batch-size", "36", "--pretrained", path,
    )  # fmt: skip
    assert "the head is new (1000 classes in the file, 10 in the data)" in result.stdout
    trained = result.checkpoint()["model"]
    assert trained["head.weight"].shape == (10, 256)
    trunk = {key: value for key, value in source.state_dict().items() if not key.startswith("head")}
    assert f"{len(trunk)} weights matched" in result.stdout
    tuned = timm.create_model("crossformer_micro", num_classes=10)
    tuned.load_state_dict(trained)
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(tuned.eval().forward_features(image), source.eval().forward_features(image))


def test_a_linear_probe_trains_the_head_alone(run_main, digits, tmp_path):
    """On any model: statistics of a frozen BatchNorm stay too, and evaluations in between do not wake it up."""
    torch.manual_seed(0)
    source = timm.create_model("resnet10t", num_classes=3)
    torch.save(source.state_dict(), tmp_path / "resnet.pth")
    flags = (
        "--cfg", "configs/linear_probe.yaml", "--tag", "run", "--data-path", digits, "--batch-size", "12",
        "--pretrained", tmp_path / "resnet.pth", "--opts", "MODEL.NAME", "resnet10t", "DATA.IMG_SIZE", "64",
        "DATA.NUM_WORKERS", "0", "TRAIN.EPOCHS", "2", "PRINT_FREQ", "1",
    )  # fmt: skip
    run_main(*flags, "--opts", "TRAIN.SAVE_EVERY_STEPS", "1")
    path = tmp_path / "output" / "resnet10t" / "run" / "checkpoints" / "last.pth"
    trained = torch.load(path, weights_only=True)["model"]
    for key, value in source.state_dict().items():
        assert key.startswith("fc.") or torch.equal(value, trained[key]), key
    assert trained["fc.weight"].abs().sum() > 0
    changed = run_main(*flags, "--opts", "TRAIN.FREEZE_TRUNK", "False", ok=False)
    assert "was trained with TRAIN.FREEZE_TRUNK True, this run has False" in changed.error


@pytest.mark.slow
def test_compile_checkpointing_and_accumulation_on_two_processes(run_main, digits):
    """What is switched on together in earnest."""
    opts = ("TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0", "DATA.IMG_SIZE", "64")
    flags = (*TINY_RUN, *PLAIN, *opts, "--data-path", digits)
    plain = run_main(*flags, "--batch-size", "24", "--tag", "a", tag="a")
    everything = ("--use-checkpoint", "--accumulation-steps", "2", "--opts", "TRAIN.COMPILE", "default")
    both = run_main(*flags, *everything, "--batch-size", "6", "--tag", "b", nproc=2, tag="b")
    assert plain.losses() == pytest.approx(both.losses(), abs=1e-4)


def test_another_models_run(run_main, digits, tmp_path):
    """Any hierarchical model of timm trains with the same loop."""
    flags = ("MODEL.NAME", "resnet18", "MODEL.DROP_PATH_RATE", "0", "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0")
    run_main(*TINY_RUN, *flags, "--data-path", digits, "--batch-size", "36")
    lines = (tmp_path / "output" / "resnet18" / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["images"] == 37


def test_weights_that_are_not_finite_end_the_run(run_main, digits):
    flags = (
        "TRAIN.SAVE_EVERY_STEPS", "1", "PRINT_FREQ", "1000", "TRAIN.BASE_LR", "1e30", "TRAIN.WARMUP_EPOCHS", "0",
        "TRAIN.CLIP_GRAD", "0", "TRAIN.MAX_SKIPPED_STEPS", "5",
    )  # fmt: skip
    result = run_main(*TINY_RUN, *flags, "--data-path", digits, "--batch-size", "8", ok=False)
    assert result.status == 2
    assert "5 steps in a row had gradients that are not finite" in result.error
    assert "lower TRAIN.BASE_LR" in result.error
    assert all(torch.isfinite(value).all() for value in result.checkpoint()["model"].values())


@pytest.mark.slow  # tests/faults/test_signals.py has it by a launcher
def test_ctrl_c_with_loader_processes(digits, tmp_path):
    flags = (*TINY_RUN, "TRAIN.EPOCHS", "1000", "DATA.NUM_WORKERS", "2", "--data-path", digits, "--batch-size", "8")
    status, stderr = stop_at("step 12/", signal.SIGINT, *flags, "--output", tmp_path)
    assert (status, stderr) == (130, "")


class CountSynchronisations(TorchDispatchMode):
    """Counts what would wait for a device: reading a tensor's value on the host."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("amp", [pytest.param("none", marks=pytest.mark.slow), "bf16"])
def test_no_step_waits_for_the_device(digits, tmp_path, amp):
    """Fault 8: a run with twice the steps and as many log lines reads no more values."""
    from engine.train import train

    counts = []
    for batch_size in ("24", "12"):
        opts = ["DATA.BATCH_SIZE", batch_size, "DATA.DATA_PATH", str(digits), "OUTPUT", str(tmp_path / batch_size)]
        opts += ["TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0", "PRINT_FREQ", "1000", "DATA.NUM_WORKERS", "1"]
        opts += ["TRAIN.EMA_DECAY", "0.9", "TRAIN.ACCUMULATION_STEPS", "1", "AMP", amp, *RANDOM]
        with CountSynchronisations() as counter:
            train(build_config("configs/micro.yaml", opts), torch.device("cpu"))
        counts.append(counter.count)
    assert counts[0] == counts[1]
