"""What is told of runs afterwards: a page, a table, a picture."""

import csv
import json
import re
import shutil

import pytest
import yaml
from commands import start
from PIL import Image

from reports.results import facts_of, names_of, read_runs

EVIL = "<script>document.title='run'</script>\"'&"
"""A name that would do something if it were not shown as it is."""


def write_run(folder, *, seed=0, steps=30, starts=(0,), report=False, **settings):
    """A results folder as a run of so many steps leaves it; it began again after the steps of ``starts``."""
    folder.mkdir(parents=True)
    events, now = [], 1_000_000
    for number, first in enumerate(starts):
        events.append({"event": "start", "step": first, "processes": 2, "time": now})
        last = starts[number + 1] if number + 1 < len(starts) else steps
        for step in range(first + 1, last + 1):
            now += 36
            values = {"lr": 1e-3, "grad_norm": 2.0, "images_per_second": 100 + step, "data_wait": 0.25}
            counts = {"memory_bytes": 2_000_000_000, "skipped_images": 0, "skipped_steps": 3, "time": now}
            loss = None if step == 7 else 3 - step / steps - seed / 10
            events.append({"event": "train", "step": step, "epoch": 1 + step // 10, "loss": loss, **values, **counts})
            for weights in ("model", "ema") if step % 10 == 0 else ():
                top1 = 50.123456 + step - 2 * step * (step > 20) + (weights == "ema")
                figures = {"top1": top1, "top5": 99.0, "loss": 1.5, "images": 40, "time": now}
                events.append({"event": "eval", "step": step, "epoch": step // 10, "weights": weights, **figures})
        now += 3600  # of waiting in a queue
    events.append(
        {"event": "eval", "step": None, "checkpoint": "other.pth", "weights": "model", "top1": 99.9, "time": now}
    )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"event": "tra')
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"TAG": folder.name, "TRAIN": {"EPOCHS": 3, "BASE_LR": 1e-3, **settings}})
    )
    Image.new("RGB", (40, 20), "red").save(folder / "first_batch.png")
    if report:
        write_report(folder / "report_model")
    return folder


def write_report(folder):
    tables = {
        "per_class": [["class", "images", "correct", "accuracy"], [EVIL, 30, 27, 0.9], ["'=b", 10, 10, 1.0]],
        "confusion_matrix": [["true class", EVIL, "'=b"], [EVIL, 27, 3], ["'=b", 0, 10]],
        "calibration": [["confidence", "accuracy", "images"], [0.55, 0.5, 10], [0.9, 0.95, 30]],
        "mistakes": [["image", "class", "answer", "confidence"], [f"val/a/{EVIL}.png", EVIL, "'=b", 0.875]],
    }
    (folder / "mistakes").mkdir(parents=True)
    for name, rows in tables.items():
        with open(folder / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows(rows)
    Image.new("RGB", (16, 16), "blue").save(folder / "mistakes" / "0001.jpg")


def report(*words):
    done = start("scripts/report.py", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_a_run_comes_to(tmp_path):
    """Of a run that began again after step 20; an evaluation of another file and half a line are not of it."""
    (run,), _ = read_runs([write_run(tmp_path / "net" / "run", starts=(0, 20))])
    facts = facts_of(run)
    assert (facts["run"], facts["metric"], facts["restarts"], facts["processes"]) == ("net/run", "top-1", 1, 2)
    assert (facts["best"], facts["best_step"], facts["best_weights"]) == (pytest.approx(71.123456), 20, "ema")
    assert facts["last"] == pytest.approx(50.123456 - 30)
    assert facts["hours"] == pytest.approx(0.3)  # 30 steps of 36 s; the hour between the starts is not of them
    assert facts["images_per_second"] == 115.5
    assert (facts["step"], facts["epoch"], facts["skipped_steps"], facts["data_wait"]) == (30, 4, 3, 0.25)


def test_names_are_as_short_as_they_can_be(tmp_path):
    folders = [tmp_path / "one" / "net" / "a", tmp_path / "two" / "net" / "a"]
    assert names_of(folders) == ["one/net/a", "two/net/a"]
    assert names_of(folders[:1]) == ["net/a"]


def test_a_page_of_one_run(tmp_path):
    run = write_run(tmp_path / "net" / "run", report=True, BASE_LR=5e-4)
    assert report(run) == f"report in {run / 'report.html'}\n"
    page = (run / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)=["'](?!data:)[^#]|url\((?!#)|@import""", page)  # nothing is fetched
    assert page.count("<script>") == 1
    assert EVIL not in page
    assert "&lt;script&gt;" in page
    assert 'data-value="71.123456"' in page  # the figures of metrics.jsonl, not rounded
    assert "TRAIN.EPOCHS" in page
    assert "TRAIN.BASE_LR" not in page  # is at its default
    assert page.count("data:image/jpeg") == 1
    assert page.count("data:image/png") == 1
    shutil.rmtree(run / "report_model")
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "best.pth").touch()
    report(run)
    hint = f"--cfg {run / 'config.yaml'} --eval --report --resume {run / 'checkpoints' / 'best.pth'}"
    assert hint in (run / "report.html").read_text(encoding="utf-8")


def test_several_runs(tmp_path):
    """A page, a table, a CSV file and a picture of the same figures, and only the settings that differ."""
    first = write_run(tmp_path / "net" / "first", BASE_LR=1e-3)
    second = write_run(tmp_path / "net" / "second", seed=1, BASE_LR=5e-4, WARMUP_EPOCHS=7)
    report(first, second, "--to", tmp_path / "runs.html")
    page = (tmp_path / "runs.html").read_text(encoding="utf-8")
    settings = page[page.index('id="settings"') :]
    assert "TRAIN.BASE_LR" in settings
    assert "TRAIN.WARMUP_EPOCHS" in settings
    assert "TRAIN.EPOCHS" not in settings
    assert "TAG" not in settings
    table = report(first, second, "--table")
    assert "net/first" in table
    assert "71.12" in table
    report(first, second, "--to", tmp_path / "runs.csv")
    with open(tmp_path / "runs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["net/first", "net/second"]
    assert float(rows[1]["best"]) == pytest.approx(71.123456)
    report(first, second, "--to", tmp_path / "runs.png")
    assert Image.open(tmp_path / "runs.png").width > 1000


def test_the_figures_of_a_detector(tmp_path):
    events = [
        {"event": "train", "epoch": 1, "step": 1, "lr": 0.1, "loss": 2.0},
        {"event": "eval", "epoch": 1, "step": 1, "weights": "model", "box_ap": 10.0, "box_ap50": 20.0, "mask_ap": 9.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    report(tmp_path)  # of an earlier version, which told no time
    assert "box AP (%)" in (tmp_path / "report.html").read_text(encoding="utf-8")
    report(tmp_path, "--to", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_bad_folders(tmp_path):
    done = start("scripts/report.py", tmp_path)
    assert done.returncode == 2
    assert f"error: {tmp_path / 'metrics.jsonl'} is not there; give the results folder" in done.stderr
    (tmp_path / "metrics.jsonl").write_text("[1]\n7\nnull\n")
    assert "has no line about training yet" in start("scripts/report.py", tmp_path).stderr
    run = write_run(tmp_path / "net" / "run")
    assert "is to end with one of .html, .csv, .png" in start("scripts/report.py", run, "--to", "x.pdf").stderr
    (run / "config.yaml").write_text("a: [")
    done = start("scripts/report.py", run)
    assert done.returncode == 2
    assert f"error: {run} cannot be read: " in done.stderr


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_in_a_browser(tmp_path, browser, width, scheme):
    """It is as wide as the window, sorts and enlarges, runs nothing that a name says, and complains of nothing."""
    run = write_run(tmp_path / "net" / EVIL.replace("/", ""), report=True)
    report(run)
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto((run / "report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.title().startswith("net/<script>")

    charts = page.locator(".by-step svg")
    assert charts.first.is_visible()
    page.get_by_label("over hours of training").check()
    assert not charts.first.is_visible()
    assert page.locator(".by-hours svg").first.is_visible()

    names = page.locator(".classes tbody td:first-child")
    assert names.all_inner_texts() == [EVIL, "=b"]
    page.locator(".classes th button", has_text="accuracy").click()
    assert names.all_inner_texts() == ["=b", EVIL]
    page.locator(".classes th button", has_text="accuracy").click()
    assert names.all_inner_texts() == [EVIL, "=b"]

    small = page.locator("figure img").bounding_box()["width"]
    page.get_by_role("button", name="enlarge").click()
    assert page.locator("dialog img").bounding_box()["width"] > 2 * small
    assert EVIL in page.locator("dialog p").inner_text()
    assert said == []
