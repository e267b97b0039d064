"""Evaluation on the real command line: the same number on any number of processes and any batch size."""

import pytest
import timm
import torch
from conftest import TINY_RUN

from config import build_config
from data.augmentation import DeviceStage, Plan, build_eval_transform
from data.decoding import decode
from data.folder import FolderLayout
from data.index import open_index


@pytest.fixture
def weights(tmp_path):
    """Random weights that spread their answers over the classes."""
    torch.manual_seed(0)
    model = timm.create_model("crossformer_micro", num_classes=10)
    torch.nn.init.normal_(model.head.weight)
    path = tmp_path / "weights.pth"
    torch.save(model.state_dict(), path)
    return path


def exact_accuracy(weights, digits) -> tuple[float, float]:
    """Top-1 and top-5 in percent, image by image."""
    model = timm.create_model("crossformer_micro", num_classes=10, checkpoint_path=str(weights)).eval()
    index = open_index(FolderLayout(digits, "val"), "")
    config = build_config("configs/micro.yaml")
    transform, stage = build_eval_transform(config), DeviceStage(torch.device("cpu"), config.DATA.MEAN, config.DATA.STD)
    with torch.inference_mode():
        logits = torch.cat(
            [model(stage(transform(decode(index.read(i)))[0][None], [Plan()])) for i in range(len(index))]
        )
    ranked = logits.argsort(descending=True) == torch.from_numpy(index.labels).long()[:, None]
    return 100 * ranked[:, 0].sum().item() / len(index), 100 * ranked[:, :5].sum().item() / len(index)


def test_every_image_counts_once(run_main, digits, weights):
    """Fault 3: 37 images do not divide by any batch or world size here, so a padded or dropped one shows."""
    events = []
    for nproc, batch_size in ((1, 8), (2, 8), (3, 8), (1, 37), (2, 5)):
        run = run_main(
            *TINY_RUN, "--data-path", digits, "--eval", "--resume", weights, "--batch-size", batch_size, nproc=nproc
        )
        events.append(run.events("eval")[-1])
    top1, top5 = exact_accuracy(weights, digits)
    assert 0 < top1 < top5 < 100
    for event in events:
        assert (event["images"], event["top1"], event["top5"]) == (37, top1, top5)
        assert event["loss"] == pytest.approx(events[0]["loss"], rel=1e-6)


def test_images_that_cannot_be_decoded_count_nowhere(run_main, digits, weights, tmp_path):
    import shutil

    shutil.copytree(digits / "val", tmp_path / "data" / "val")
    (tmp_path / "data" / "val" / "3" / "9999.png").write_bytes(b"no image")
    flags = (*TINY_RUN, "--data-path", tmp_path / "data", "--eval", "--resume", weights)
    stopped = run_main(*flags, ok=False)
    assert stopped.status == 2
    assert "9999.png: cannot identify image file" in stopped.error
    assert "--opts DATA.ON_BAD_IMAGE skip" in stopped.error
    skipping = run_main(*flags, "--opts", "DATA.ON_BAD_IMAGE", "skip")
    assert skipping.events("eval")[-1]["images"] == 37
    assert "skipped image" in skipping.stdout
    assert "9999.png" in skipping.stdout
