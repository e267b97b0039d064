"""``--throughput`` on the real command line."""

import json

from engine.model import giga_macs


def test_throughput_needs_no_data(run_main):
    result = run_main("--cfg", "configs/micro.yaml", "--tag", "run", "--throughput", "--batch-size", "2")
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


def test_under_torchrun_it_is_refused(run_main):
    result = run_main("--cfg", "configs/micro.yaml", "--throughput", nproc=2, ok=False)
    assert "--throughput times one device: start it without torchrun" in result.stderr


def test_multiply_accumulates():
    """A published figure: 4.91 for small at 224."""
    import timm
    import torch

    model = timm.create_model("crossformer_small")
    assert abs(giga_macs(model, 224, torch.device("cpu")) - 4.91) < 0.01
