"""Settings that change on the way: when each holds, what it does, and that a run carries on exactly with them."""

import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from conftest import TINY_RUN, assert_same_tensors

from config import build_config, phases, settings_in
from data.sampling import TrainBatches
from engine.curriculum import Curriculum
from engine.state import step_after
from lr_scheduler import build_scheduler, total_steps
from models import set_drop_path_rate
from tasks import build_task
from utils.calendar import Calendar, Span
from utils.errors import UserError


def config_with(curriculum: str, *opts: str):
    return build_config(opts=["TRAIN.EPOCHS", "10", "TRAIN.WARMUP_EPOCHS", "0", "TRAIN.CURRICULUM", curriculum, *opts])


def test_a_calendar_by_hand():
    """Two epochs of 3 steps, two of 5, then epochs of 4."""
    calendar = Calendar(Span(0, 3, 8), Span(2, 5, 4), Span(4, 4, 6))
    epochs = [epoch for epoch, count in ((0, 3), (1, 3), (2, 5), (3, 5), (4, 4), (5, 4)) for _ in range(count)]
    assert [calendar.epoch_of(step)[0] for step in range(24)] == epochs
    assert [step for step in range(25) if calendar.ends_epoch(step)] == [0, 3, 6, 11, 16, 20, 24]
    assert [calendar.first_step(epoch) for epoch in range(7)] == [0, 3, 6, 11, 16, 20, 24]
    assert [calendar.global_batch_at(step) for step in (0, 5, 6, 15, 16, 99)] == [8, 8, 4, 4, 6, 6]
    assert (calendar.global_batch, calendar.is_even) == (6, False)
    assert Calendar(Span(0, 3, 8), Span(2, 3, 8)).is_even


def test_when_each_setting_holds():
    """Shares of the epochs are rounded; the later entry of two that change the same wins."""
    config = config_with(
        "[{UNTIL: 0.44, DATA.IMG_SIZE: 64}, {FROM: 2, UNTIL: 6, AUG.MIXUP: 0.1}, {FROM: 5, AUG.MIXUP: 0}]"
    )
    found = [(epoch, phase.DATA.IMG_SIZE, phase.AUG.MIXUP) for epoch, phase in phases(config)]
    assert found == [(0, 64, 0.8), (2, 64, 0.1), (4, 224, 0.1), (5, 224, 0.0)]
    assert [epoch for epoch, _ in phases(build_config())] == [0]
    assert phases(config)[-1][1].TRAIN.BASE_LR == config.TRAIN.BASE_LR


@pytest.mark.parametrize(
    ("curriculum", "opts", "message"),
    [
        ("[{UNTIL: 11, AUG.MIXUP: 0}]", [], "has UNTIL 11, which must be an epoch, at most TRAIN.EPOCHS 10"),
        ("[{UNTIL: 1.5, AUG.MIXUP: 0}]", [], "has UNTIL 1.5"),
        ("[{FROM: 5, UNTIL: 3, AUG.MIXUP: 0}]", [], "has FROM after UNTIL"),
        ("[{FROM: 5}]", [], "must have FROM or UNTIL, and a setting"),
        ("[{AUG.MIXUP: 0}]", [], "must have FROM or UNTIL, and a setting"),
        ("[{UNTIL: 5, AUG.MIXUPP: 0}]", [], "has AUG.MIXUPP, which cannot change on the way; did you mean AUG.MIXUP"),
        ("[{UNTIL: 5, TRAIN.BASE_LR: 0}]", [], "has TRAIN.BASE_LR, which cannot change"),
        ("[{UNTIL: 5, AUG.MIXUP: -1}]", [], "AUG.MIXUP -1.0 .TRAIN.CURRICULUM.: must be at least 0"),
        ("[{UNTIL: 5, AUG.MIXUP: x}]", [], "AUG.MIXUP must be a number"),
        ("[{UNTIL: 5, 7: 3}]", [], "has 7, which cannot change"),
        ("[{UNTIL: 5, AUG.SCALE: [0.9, 0.1]}]", [], "AUG.SCALE .*must be a smallest value"),
        ("[{UNTIL: 5, AUG.REPEATS: 3}]", ["DATA.SAMPLER", "balanced"], "AUG.REPEATS 3 .*does not go with DATA.SAMPLER"),
        ("[{UNTIL: 5, TRAIN.EMA_DECAY: 0}]", ["TRAIN.EMA_DECAY", "0.9"], "needs a decay above 0"),
        ("[]", ["TRAIN.LR_SCHEDULER.COOLDOWN_EPOCHS", "4"], "COOLDOWN_EPOCHS .*is read by .* constant, not by cosine"),
        ("[]", ["TRAIN.LR_SCHEDULER.CYCLE_EPOCHS", "4"], "CYCLE_EPOCHS .*is read by .* restarts, not by cosine"),
        ("[5]", [], "TRAIN.CURRICULUM .*must be a list of dicts"),
        ("[{UNTIL: 5, AUG.MIXUP: 0}]", ["TRAIN.STEPS", "9"], "TRAIN.CURRICULUM .*counts in epochs"),
        ("[{UNTIL: 5, AUG.MIXUP: 0}]", ["TRAIN.AUTO_MICRO_BATCH", "True"], "TRAIN.AUTO_MICRO_BATCH"),
        ("[{UNTIL: 5, DATA.BATCH_SIZE: 4}]", ["TRAIN.LR_SCHEDULER.NAME", "step"], "use cosine or multistep"),
        ("[{UNTIL: 5, TRAIN.EMA_DECAY: 0.9}]", [], "changes TRAIN.EMA_DECAY, which is 0"),
        ("[{UNTIL: 5, AUG.MIXUP: 0}]", ["TASK", "segmentation"], "is read by classification only"),
    ],
)
def test_what_a_curriculum_cannot_be(curriculum, opts, message):
    with pytest.raises(UserError, match=message):
        config_with(curriculum, *opts)


def rates(name: str, steps: list[int], *opts: str, calendar: Calendar | None = None) -> list[float]:
    settings = (
        "TRAIN.LR_SCHEDULER.NAME", name, "TRAIN.EPOCHS", "10", "TRAIN.WARMUP_EPOCHS", "0", "TRAIN.BASE_LR", "1.0",
        "TRAIN.MIN_LR", "0.1", "TRAIN.WARMUP_LR", "0.2", "TRAIN.LR_REFERENCE_BATCH", "0", *opts,
    )  # fmt: skip
    config = build_config(opts=settings)
    schedule = build_scheduler(config, calendar or Calendar(Span(0, 10, 8)))
    return [schedule(step) for step in steps]


def test_schedules_by_hand():
    """100 steps. One minus the root of the share gone; half cosines; and cosines of 10, 20 and 40 steps."""
    cooling = "TRAIN.LR_SCHEDULER.COOLDOWN_EPOCHS", "4"
    expected = [1, 1, 1, 1 - 0.9 * math.sqrt(0.25), 1 - 0.9 * math.sqrt(0.5), 1 - 0.9 * math.sqrt(39 / 40)]
    assert rates("constant", [0, 30, 60, 70, 80, 99], *cooling) == pytest.approx(expected)
    assert rates("constant", [0, 99]) == [1, 1]
    assert rates("constant", [89, 95], "TRAIN.LR_SCHEDULER.COOLDOWN_STEPS", "10") == pytest.approx(
        [1, 1 - 0.9 * math.sqrt(0.5)]
    )
    up = "TRAIN.WARMUP_STEPS", "20"
    assert rates("constant", [0, 10, 20], *up) == pytest.approx([0.2, 0.6, 1])
    assert rates("one_cycle", [0, 10, 20, 60, 100], *up) == pytest.approx([0.2, 0.6, 1, 0.55, 0.1])
    again = "TRAIN.LR_SCHEDULER.CYCLE_EPOCHS", "1", "TRAIN.LR_SCHEDULER.CYCLE_GROWTH", "2"
    assert rates("restarts", [0, 5, 10, 20, 30, 50], *again) == pytest.approx([1, 0.55, 1, 0.55, 1, 0.55])
    lower = *again, "TRAIN.LR_SCHEDULER.CYCLE_DECAY", "0.5"
    assert rates("restarts", [10, 30], *lower) == pytest.approx([0.5, 0.25])


def test_cooling_takes_no_longer_than_the_run():
    with pytest.raises(UserError, match="warm-up and cool-down take 80 and 40 steps"):
        rates("constant", [0], "TRAIN.LR_SCHEDULER.COOLDOWN_EPOCHS", "4", "TRAIN.WARMUP_STEPS", "80")


def test_the_rate_follows_the_batch():
    """Half the batch, half the rate, where rates are for so many images a step."""
    calendar = Calendar(Span(0, 10, 4), Span(5, 5, 8))
    by_batch = "TRAIN.LR_REFERENCE_BATCH", "8"
    assert rates("constant", [0, 49, 50], *by_batch, calendar=calendar) == [0.5, 0.5, 1]
    assert rates("constant", [0, 49, 50], calendar=calendar) == [1, 1, 1]
    config = build_config(opts=["TRAIN.EPOCHS", "10", "TRAIN.WARMUP_EPOCHS", "0"])
    assert total_steps(config, calendar) == 75


@pytest.mark.parametrize("ranks", [1, 2])
def test_each_image_comes_several_times(ranks):
    """10 images, 3 times each: a global batch of 6 has two of them, an epoch of 10 places three whole and a bit."""
    batches = [TrainBatches(10, 6 // ranks, 1, rank, ranks, seed=0, repeats=3) for rank in range(ranks)]
    for one in batches:
        one.first_step, one.last_step = 0, 2
    steps = [[key for keys in of_ranks for key in keys] for of_ranks in zip(*batches, strict=True)]
    assert [batches[0].global_batch_of(step) for step in (0, 1)] == steps
    for epoch, keys in enumerate(steps):
        order = TrainBatches(10, 6, 1, 0, 1, seed=0).order(epoch).tolist()
        assert keys == [(epoch, i, *n) for i in order[:2] for n in ((), (1,), (2,))]


def test_stochastic_depth_as_if_built_with_it():
    config, other = (build_config(opts=["MODEL.DROP_PATH_RATE", rate]) for rate in ("0.3", "0.1"))
    model, expected = (timm.create_model("crossformer_micro", drop_path_rate=rate) for rate in (0.3, 0.1))
    set_drop_path_rate(model, other, config)
    found = [[b.drop_path_rate for stage in m.layers for b in stage.blocks] for m in (model, expected)]
    assert found[0] == found[1]
    config, other = (
        build_config(opts=["MODEL.NAME", "swin_tiny_patch4_window7_224", "MODEL.DROP_PATH_RATE", rate])
        for rate in ("0.3", "0.1")
    )
    with torch.device("meta"):
        model, expected = (timm.create_model("swin_tiny_patch4_window7_224", drop_path_rate=r) for r in (0.3, 0.1))
    for _ in range(2):
        set_drop_path_rate(model, other, config)
    rates_of = [[m.drop_prob for m in net.modules() if hasattr(m, "drop_prob")] for net in (model, expected)]
    assert rates_of[0] == pytest.approx(rates_of[1])
    none = build_config(opts=["MODEL.NAME", "swin_tiny_patch4_window7_224", "MODEL.DROP_PATH_RATE", "0"])
    with pytest.raises(UserError, match="is built without stochastic depth"):
        set_drop_path_rate(model, other, none)


CHANGING = (
    "[{UNTIL: 1, DATA.IMG_SIZE: 32, DATA.BATCH_SIZE: 18}, {UNTIL: 2, DATA.IMG_SIZE: 48, AUG.REPEATS: 2}, "
    "{FROM: 2, AUG.MIXUP: 0, MODEL.DROP_PATH_RATE: 0.3, TRAIN.EMA_DECAY: 0.7}]"
)


def test_a_run_with_phases_carries_on_exactly(run_main, digits):
    """72 images: an epoch of 4 steps of 18, then epochs of 6 of 12. From before a border, and from one."""
    flags = (
        *TINY_RUN, "TRAIN.EPOCHS", "3", "DATA.IMG_SIZE", "64", "AUG.MIXUP", "0.8", "MODEL.DROP_PATH_RATE", "0.1",
        "TRAIN.EMA_DECAY", "0.5", "TRAIN.SAVE_EVERY_STEPS", "1", "TRAIN.KEEP_LAST", "30", "DATA.NUM_WORKERS", "1",
        "MODEL.CROSSFORMER.EMBED_DIM", "16", "MODEL.CROSSFORMER.DEPTHS", "[1, 1, 1, 1]",
        "TRAIN.CURRICULUM", CHANGING, "--data-path", digits, "--batch-size", "12",
    )  # fmt: skip
    whole = run_main(*flags, "--tag", "whole", tag="whole")
    trained = whole.events("train")
    assert [event["epoch"] for event in trained] == [1] * 4 + [2] * 6 + [3] * 6
    assert [event["epoch"] for event in whole.events("eval") if event["weights"] == "model"] == [1, 2, 3]
    assert "from epoch 3 on: DATA.BATCH_SIZE 12, DATA.IMG_SIZE 64, MODEL.DROP_PATH_RATE 0.3, " in whole.stdout
    assert trained[4]["lr"] / trained[3]["lr"] < 1  # the smaller batch takes the smaller rate
    saves = {torch.load(path, weights_only=True)["step"]: path for path in whole.results.rglob("[lp]*.pth")}
    for step in (3, 10):
        resumed = run_main(*flags, "--tag", step, "--resume", saves[step], tag=str(step))
        for part in ("model", "ema", "optimizer"):
            assert_same_tensors(whole.checkpoint()[part], resumed.checkpoint()[part])
        losses = [event["loss"] for event in resumed.events("train")]
        assert losses == [event["loss"] for event in trained[step:]]


def test_another_batch_is_refused_where_it_changes_on_the_way():
    content = {"global_batch": 12, "step": 9, "images": 72, "calendar": [[0, 4, 18], [1, 6, 12]]}
    others = (
        Calendar(Span(0, 4, 18), Span(1, 12, 6)),
        Calendar(Span(0, 4, 18), Span(2, 6, 12)),
        Calendar(Span(0, 6, 12)),
    )
    assert step_after(content, Calendar(Span(0, 4, 18), Span(1, 6, 12)), Path("last.pth")) == 9
    assert step_after({**content, "step": 4}, others[1], Path("last.pth")) == 4  # the border lies ahead
    for calendar in others:
        with pytest.raises(UserError, match="last.pth has trained with batches that TRAIN.CURRICULUM now has in other"):
            step_after(content, calendar, Path("last.pth"))
    even = {**content, "calendar": [[0, 6, 12]]}
    assert step_after(even, Calendar(Span(0, 12, 6)), Path("last.pth")) == 18


def test_each_phase_goes_through_the_data(digits):
    """72 images: an epoch of 4 steps of 18, two of 6 steps of 12; each epoch has every image once."""
    opts = ["DATA.DATA_PATH", str(digits), "DATA.BATCH_SIZE", "12", "DATA.NUM_WORKERS", "0", "TRAIN.EPOCHS", "3"]
    opts += ["TRAIN.WARMUP_EPOCHS", "0", "TRAIN.CURRICULUM", "[{UNTIL: 1, DATA.BATCH_SIZE: 18}]"]
    config = build_config("configs/micro.yaml", opts)
    train = build_task(config, torch.device("cpu")).train_loaders().train
    seen = [train.global_batch_of(step) for step in range(16)]
    assert [keys[0][0] for keys in seen] == [0] * 4 + [1] * 6 + [2] * 6
    for steps in (slice(0, 4), slice(4, 10), slice(10, 16)):
        assert sorted(i for keys in seen[steps] for _, i, *_ in keys) == list(range(72))
    batches = list(train.micro_batches(3, 6))
    assert [batch.numbers.tolist() for batch in batches] == [[i for _, i, *_ in keys] for keys in seen[3:6]]


def test_what_a_phase_changes():
    """Forth and back, as when a run is carried on."""
    curriculum = "[{FROM: 2, AUG.MIXUP: 0, TRAIN.EMA_DECAY: 0.7, MODEL.DROP_PATH_RATE: 0.3}]"
    opts = ["TRAIN.EPOCHS", "3", "TRAIN.WARMUP_EPOCHS", "0", "TRAIN.EMA_DECAY", "0.5", "TRAIN.CURRICULUM", curriculum]
    config = build_config("configs/micro.yaml", [*opts, "AUG.MIXUP", "0.8"])
    task, ema, model = SimpleNamespace(phase=config), SimpleNamespace(decay=0.5), timm.create_model("crossformer_micro")
    entered = Curriculum(config, Calendar(Span(0, 4, 8)), task, model, ema)
    found = []
    for step in (0, 7, 8, 7):
        entered.enter(step)
        found.append((ema.decay, task.phase.AUG.MIXUP, round(model.layers[-1].blocks[-1].drop_path_rate, 3)))
    assert found == [(0.5, 0.8, 0.1), (0.5, 0.8, 0.1), (0.7, 0.0, 0.3), (0.5, 0.8, 0.1)]


def test_what_stands_twice_in_a_file_is_read_again(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text(
        "TRAIN:\n  CURRICULUM:\n  - {UNTIL: 0.4, AUG.SCALE: &s [0.2, 1.0]}\n  - {FROM: 0.6, AUG.SCALE: *s}\n"
    )
    config = build_config(str(path))
    assert settings_in(config.dump(), "x")["TRAIN.CURRICULUM"] == config.TRAIN.CURRICULUM


@pytest.mark.slow
def test_two_processes_go_through_phases_like_one(run_main, digits):
    """Without anything that ranks draw apart; the batch of 12 is two of 6."""
    opts = "MODEL.DROP_PATH_RATE", "0", "TRAIN.CURRICULUM", "[{UNTIL: 1, DATA.IMG_SIZE: 32, AUG.REPEATS: 3}]"
    losses = [
        run_main(
            *TINY_RUN, "DATA.IMG_SIZE", "48", *opts, "--data-path", digits, "--batch-size", batch, "--tag", nproc,
            nproc=nproc, tag=str(nproc),
        ).losses()
        for nproc, batch in ((1, 12), (2, 6))
    ]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_copies_of_an_image_are_augmented_apart(digits):
    opts = ["DATA.DATA_PATH", str(digits), "AUG.REPEATS", "3", "DATA.BATCH_SIZE", "12", "DATA.NUM_WORKERS", "0"]
    config = build_config("configs/micro.yaml", [*opts, "AUG.AUTO_AUGMENT", "rand-m9-mstd0.5-inc1"])
    batch = next(build_task(config, torch.device("cpu")).train_loaders().train.micro_batches(0, 1))
    assert Counter(Counter(batch.numbers.tolist()).values()) == {3: 4}
    assert len({image.numpy().tobytes() for image in batch.images}) == 12
