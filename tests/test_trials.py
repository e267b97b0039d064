"""Many runs with other settings: which there are, that they carry on, and the table of them."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from commands import start
from conftest import ROOT

from trials.plan import Trial, read_plan, words_of
from trials.running import Outcome
from trials.table import spread, table_of, time_to
from utils.errors import UserError

FLAGS = "--cfg configs/micro.yaml --data-path {data} --batch-size 12 --opts DATA.NUM_WORKERS 0 TRAIN.EPOCHS 2 "
FLAGS += "TRAIN.WARMUP_EPOCHS 0 MODEL.CROSSFORMER.EMBED_DIM 16 MODEL.CROSSFORMER.DEPTHS [1,1,1,1]"


def plan_of(tmp_path: Path, **content):
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump({"flags": "--cfg x", **content}, sort_keys=False))
    return read_plan(path)


def test_which_trials_there_are(tmp_path):
    grid = plan_of(tmp_path, settings={"TRAIN.BASE_LR": [1.0, 2.0], "AUG.MIXUP": [0.0, 0.5]}).trials()
    assert [(trial.name, *trial.settings.values()) for trial in grid] == [
        ("trial_000", 1.0, 0.0), ("trial_001", 1.0, 0.5), ("trial_002", 2.0, 0.0), ("trial_003", 2.0, 0.5),
    ]  # fmt: skip
    named = plan_of(tmp_path, variants={"plain": {}, "muon": {"TRAIN.OPTIMIZER.NAME": "muon"}}).trials()
    assert named == [Trial("plain", {}), Trial("muon", {"TRAIN.OPTIMIZER.NAME": "muon"})]


def test_what_is_drawn_at_random(tmp_path):
    """A function of the file's seed and the trial's number; between the ends, evenly in the logarithm where asked."""
    settings = {
        "TRAIN.BASE_LR": {"from": 1e-4, "to": 1e-2, "log": True},
        "TRAIN.EPOCHS": {"from": 2, "to": 4, "whole": True},
        "AUG.MIXUP": {"from": 0.0, "to": 1.0},
        "TRAIN.OPTIMIZER.NAME": ["adamw", "lion"],
    }
    plan = plan_of(tmp_path, by="random", settings=settings, count=200)
    drawn = [trial.settings for trial in plan.trials()]
    assert drawn == [trial.settings for trial in plan_of(tmp_path, by="random", settings=settings, count=200).trials()]
    assert drawn != [t.settings for t in plan_of(tmp_path, by="random", settings=settings, count=200, seed=1).trials()]
    assert all(1e-4 <= one["TRAIN.BASE_LR"] <= 1e-2 for one in drawn)
    assert 70 < sum(one["TRAIN.BASE_LR"] < 1e-3 for one in drawn) < 130
    assert {one["TRAIN.EPOCHS"] for one in drawn} == {2, 3, 4}
    assert {one["TRAIN.OPTIMIZER.NAME"] for one in drawn} == {"adamw", "lion"}


def test_settings_become_words():
    settings = {"A": "text", "B": [0.5, 1], "C": True, "D": {"x": 1}, "E": [{"UNTIL": 0.4, "AUG.MIXUP": 0}]}
    words = words_of(settings)
    assert words[::2] == [*"ABCDE"]
    assert {key: yaml.safe_load(word) for key, word in zip(words[::2], words[1::2], strict=True)} == settings


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "say either variants"),
        ({"settings": {"TRAIN.BASE_LR": [1.0]}, "variants": {"a": {}}}, "say either variants"),
        ({"setings": {}}, "unknown setings; did you mean settings"),
        ({"settings": {"TRAIN.BASE_RL": [1]}}, "unknown setting TRAIN.BASE_RL; did you mean TRAIN.BASE_LR"),
        ({"settings": {"SEED": [1]}}, "SEED is each run's own"),
        ({"settings": {"TRAIN.BASE_LR": {"from": 1, "to": 2}}}, "has a range, and a grid takes lists"),
        ({"settings": {"TRAIN.BASE_LR": {"from": 2, "to": 1}}, "by": "random"}, "from 2 to 1 is no range"),
        ({"settings": {"TRAIN.BASE_LR": {"from": 0, "to": 1, "log": True}}, "by": "random"}, "is no range"),
        ({"settings": {"TRAIN.BASE_LR": {"from": 0.1, "to": 1, "whole": True}}, "by": "random"}, "is to be whole"),
        ({"settings": {"TRAIN.BASE_LR": {"low": 0, "to": 1}}, "by": "random"}, "is to be a list of values"),
        ({"settings": {"TRAIN.BASE_LR": [1]}, "by": "gird"}, "by gird is not one of .*did you mean grid"),
        ({"settings": {"TRAIN.BASE_LR": [1]}, "seeds": 3}, "seeds 3 is to be a list"),
        ({"settings": {"TRAIN.BASE_LR": [1]}, "count": 0}, "count 0 is to be a whole number"),
        ({"settings": {"TRAIN.BASE_LR": [1]}, "pruner": "best"}, "pruner best is not one of"),
        ({"settings": {"TRAIN.BASE_LR": [1]}, "flags": 5}, "flags is to say what main.py is started with"),
        ({"variants": {"a": 5}}, "variant a is to be a dict"),
        ({"variants": ["a"]}, "variants is to be a dict"),
        ({"variants": {"a/b": {}}}, "variant 'a/b' is to be a name for a folder"),
        ({"variants": {"a": {}}, "reach": "x"}, "reach x is to be a number"),
        ({"variants": {"a": {}}, "metric": "loss"}, "metric loss is not one of top1"),
        ({"variants": {"a": {}}, "flags": "--cfg 'x"}, "flags is to say what main.py is started with"),
    ],
)
def test_plans_that_are_wrong(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        plan_of(tmp_path, **content)


def test_the_table(tmp_path):
    """The best first; a mean and its deviation; the median of times, one that never got there being the slowest."""
    plan = plan_of(tmp_path, variants={"a": {}, "b": {}, "c": {}}, reach=60, metric="top1")
    outcomes = [
        Outcome("a", 0, {}, [], "done", 61.0, 60.0, 100.0, 90.0),
        Outcome("a", 1, {}, [], "done", 63.0, 62.0, 110.0, 70.0),
        Outcome("a", 2, {}, [], "done", 59.0, 58.0, 120.0, math.nan),
        Outcome("b", 0, {}, [], "done", 70.0, 70.0, 50.0, 20.0),
        Outcome("c", 0, {}, [], "error: it broke"),
    ]
    assert table_of(plan, outcomes).rows == [
        ["b", "1", "70.00", "70.00", "50", "20"],
        ["a", "3", "61.00 ± 2.00", "60.00 ± 2.00", "110 ± 10", "90 (70 to never)"],
        ["c", "0 of 1", "", "", "", ""],
    ]
    assert spread([], 1) == time_to([]) == ""


def write(tmp_path: Path, data: Path, **content) -> Path:
    path = tmp_path / "rates.yaml"
    path.write_text(yaml.safe_dump({"flags": FLAGS.format(data=data), **content}, sort_keys=False))
    return path


def test_a_trial_and_its_page(tmp_path, digits):
    """Done once: the same command again only shows the table. Runs of a name with other settings are not mixed up."""
    path = write(tmp_path, digits, variants={"slow": {"TRAIN.BASE_LR": 1e-5}}, reach=1)
    command = "scripts/trials.py", path, "--output", tmp_path / "out"
    done = start(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1/1  slow seed 0  TRAIN.BASE_LR 1e-05" in done.stdout
    (line,) = (tmp_path / "out" / "trials.jsonl").read_text().splitlines()
    one = json.loads(line)
    assert (one["trial"], one["status"], one["settings"]) == ("slow", "done", {"TRAIN.BASE_LR": 1e-5})
    assert 0 <= one["reached"] <= one["seconds"] < 600
    assert "slow_seed_0" in (tmp_path / "out" / "trials.html").read_text()
    table = (tmp_path / "out" / "trials.md").read_text()
    assert "| trial | runs | best metric | last metric | seconds | seconds to 1 |" in table

    again = start(*command)
    assert "seed 0" not in again.stdout
    assert start("scripts/trials.py", path, "--count").stdout.strip() == "1"
    write(tmp_path, digits, variants={"slow": {"TRAIN.BASE_LR": 1e-4}})
    refused = start(*command)
    assert refused.returncode == 2
    assert "has slow with other settings, {'TRAIN.BASE_LR': 1e-05}" in refused.stderr


def start_trials(path: Path, output: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "scripts/trials.py", str(path), "--output", str(output)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("by", ["grid", "tpe"])
def test_trials_that_are_stopped_carry_on(tmp_path, digits, by):
    """SIGTERM in the middle of a run: it is saved, and the same command goes on with it, and chooses nothing anew."""
    if by == "tpe":
        pytest.importorskip("optuna")
    rates = {"from": 1e-4, "to": 1e-2, "log": True} if by == "tpe" else [1e-4, 1e-3]
    content = {"settings": {"TRAIN.BASE_LR": rates}, "by": by, "count": 2}
    path = write(tmp_path, digits, **content)
    path.write_text(path.read_text().replace("TRAIN.EPOCHS 2", "TRAIN.EPOCHS 40 TRAIN.EVAL_EVERY_EPOCHS 20"))
    process = start_trials(path, tmp_path / "out")
    deadline = time.monotonic() + 120
    while not any(" step " in said.read_text() for said in (tmp_path / "out").glob("*.txt")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert said.splitlines()[-1] == "stopped; the same command carries on"
    process = start_trials(path, tmp_path / "out")
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    lines = [json.loads(line) for line in (tmp_path / "out" / "trials.jsonl").read_text().splitlines()]
    assert [(one["trial"], one["status"]) for one in lines] == [("trial_000", "done"), (lines[1]["trial"], "done")]
    events = [json.loads(line) for line in next((tmp_path / "out").rglob("trial_000_seed_0/metrics.jsonl")).open()]
    assert [event["step"] > 0 for event in events if event["event"] == "start"] == [False, True]


@pytest.mark.slow
def test_optuna_ends_what_does_not_look_promising(tmp_path, digits):
    pytest.importorskip("optuna")
    settings = {"TRAIN.BASE_LR": {"from": 1e-7, "to": 3e-3, "log": True}}
    path = write(tmp_path, digits, by="tpe", settings=settings, count=9, pruner="median")
    path.write_text(path.read_text().replace("TRAIN.EPOCHS 2", "TRAIN.EPOCHS 12"))
    process = start_trials(path, tmp_path / "out")
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said
    lines = [json.loads(line) for line in (tmp_path / "out" / "trials.jsonl").read_text().splitlines()]
    assert len(lines) == 9
    assert "pruned" in {one["status"] for one in lines}
