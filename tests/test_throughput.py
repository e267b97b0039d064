"""``--throughput``."""

import json

import pytest
from conftest import Result

from engine import throughput
from engine.model import giga_macs
from engine.throughput import print_table
from main import main

FLAGS = ("--cfg", "configs/micro.yaml", "--tag", "run", "--throughput", "--batch-size", "2")


def test_throughput_needs_no_data(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(throughput, "SECONDS_PER_REPEAT", 0.02)
    assert main([*FLAGS, "--output", str(tmp_path)]) == 0
    check(Result(0, capsys.readouterr().out, "", tmp_path / "crossformer_micro" / "run"))


@pytest.mark.slow
def test_throughput_on_the_command_line(run_main):
    check(run_main(*FLAGS, fresh=True))


def check(result: Result) -> None:
    values = json.loads((result.results / "throughput.json").read_text())
    assert values["model"] == "crossformer_micro"
    assert values["batch_size"] == 2
    for name in ("forward", "training_step"):
        row = values[name]
        assert row["milliseconds"]["min"] <= row["milliseconds"]["median"] <= row["milliseconds"]["max"]
        assert row["images_per_second"] == 2e3 / row["milliseconds"]["median"]
        assert row["tflops"] > 0
        assert row["peak_memory_bytes"] > 0
    assert "images/s" in result.stdout
    assert "training step" in result.stdout


def test_no_figure_is_cut_off(capsys):
    """A step of hours makes the table wider than the 80 columns that a file has."""
    milliseconds = {"median": 12345678.9, "min": 12345678.9, "max": 12345678.9}
    row = {"images_per_second": 0.1, "milliseconds": milliseconds, "tflops": 0.000123, "peak_memory_bytes": 9e8}
    about = {"model": "m", "parameters": 1, "gmac": 1, "image_size": 32, "precision": "fp32", "batch_size": 1}
    print_table({**about, "compile": "none", "device": "CPU", "forward": row, "training_step": row})
    printed = capsys.readouterr().out
    assert "images/s" in printed
    assert "12,345,678.9 - 12,345,678.9" in printed


def test_under_torchrun_it_is_refused(run_main):
    result = run_main("--cfg", "configs/micro.yaml", "--throughput", nproc=2, ok=False)
    assert "--throughput times one device: start it without torchrun" in result.stderr


def test_multiply_accumulates():
    """A published figure: 4.91 for small at 224."""
    import timm
    import torch

    model = timm.create_model("crossformer_small")
    assert abs(giga_macs(model, 224, torch.device("cpu")) - 4.91) < 0.01
