"""What TensorBoard shows of a run."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def check_tensorboard(result) -> None:
    """Its curves are those of metrics.jsonl; with the config, the settings and images of the first batch."""
    events = EventAccumulator(str(result.results / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()
    curves = {name: {point.step: point.value for point in events.Scalars(name)} for name in tags["scalars"]}
    assert {name.partition("/")[0] for name in curves} == {"train", "val", "val_ema", "system"}
    for event in result.events("train"):
        for name in (
            "train/loss",
            "train/lr",
            "system/images_per_second",
            "system/memory_bytes",
            "system/skipped_steps",
        ):
            assert curves[name][event["step"]] == pytest.approx(event[name.partition("/")[2]], rel=1e-6)
    for event in result.events("eval"):
        group = {"model": "val", "ema": "val_ema"}[event["weights"]]
        assert curves[f"{group}/top1"][event["step"]] == pytest.approx(event["top1"], rel=1e-6)
    assert "first_batch" in tags["images"]
    (text,) = (event.tensor_proto.string_val[0].decode() for event in events.Tensors("config/text_summary"))
    assert "    NAME: crossformer_micro\n" in text
    settings = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    assert b"TRAIN.EMA_DECAY" in settings
    assert b"TRAIN.KEEP_LAST" not in settings  # is at its default
