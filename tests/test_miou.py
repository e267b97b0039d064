"""The mean IoU against what the published code gives, whole images, and label maps that do not fit."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from data.augmentation.pairs import VOID
from tasks.miou import confusion_matrix, scores
from tasks.pixel_report import Album
from tasks.whole_image import WholeImage, starts

CASES = json.loads((ROOT / "tests/data/dense_heads/miou.json").read_text())


def drawn(i: int) -> tuple[np.ndarray, np.ndarray]:
    """Label map and answers of image ``i``, by the reference's rule."""
    size, r = (20 + i, 30 + 2 * i), np.random.RandomState(200 + i)
    label, noise, wrong = r.randint(0, 6, size), r.randint(0, 5, size), r.uniform(size=size) < 0.4
    label[label == 5] = VOID
    return label, np.where(wrong | (label == VOID), noise, label)


@pytest.mark.parametrize("name", CASES)
def test_reference(name):
    expected = CASES[name]
    total = torch.zeros(expected["classes"], expected["classes"], dtype=torch.long)
    for i in range(20):
        label, answer = drawn(i)
        if name == "class_predicted_only":
            answer[0] = 5
        if name == "reduce_zero_label":
            answer = (answer - 1) % 5
            label = np.where((label == 0) | (label == VOID), VOID, label - 1)
        total += confusion_matrix(torch.tensor(answer), torch.tensor(label).to(torch.uint8), len(total))
    found = scores(total.numpy())
    assert total.diagonal().tolist() == expected["intersect"]
    assert total.sum(1).tolist() == expected["label"]
    assert (total.sum(0) + total.sum(1) - total.diagonal()).tolist() == expected["union"]
    numbers = [None if np.isnan(x) else x for x in found.iou]
    assert numbers == pytest.approx(expected["IoU"], abs=1e-6)
    assert [None if np.isnan(x) else x for x in found.accuracy] == pytest.approx(expected["Acc"], abs=1e-6)
    assert found[2:] == pytest.approx([expected[key] for key in ("mIoU", "mAcc", "aAcc")], abs=1e-6)
    assert round(100 * found.miou, 2) == expected["mIoU_percent_rounded"]


def brightness(images: torch.Tensor) -> torch.Tensor:
    """A model of two classes, bright and dark."""
    return F.avg_pool2d(torch.cat([images[:, :1], -images[:, :1]], dim=1), 4)


def test_sides_are_multiples_and_answers_have_the_size_of_the_label():
    seen = []
    whole = WholeImage((2048, 64), 32)
    logits = whole(lambda x: seen.append(x.shape) or brightness(x), torch.randn(3, 50, 77), (50, 77))
    assert (seen, logits.shape) == ([(1, 3, 64, 128)], (2, 50, 77))


def test_windows_cover_the_image_and_agree_with_the_whole():
    ramp = torch.linspace(-1, 1, 96).expand(3, 64, 96).contiguous()
    seen = []
    windows = WholeImage((96, 64), 32, window=32, stride=24)(
        lambda x: seen.append(x.shape) or brightness(x), ramp, (64, 96)
    )
    assert set(seen) == {(1, 3, 32, 32)}
    assert len(seen) == 3 * 4
    assert torch.equal(
        windows.argmax(0)[:, ::4], WholeImage((96, 64), 32)(brightness, ramp, (64, 96)).argmax(0)[:, ::4]
    )
    assert starts(96, 32, 24) == [0, 24, 48, 64]
    assert starts(20, 32, 24) == [0]


def test_mirrored_views_are_turned_back():
    image = torch.randn(3, 64, 64)
    alone, both = (WholeImage((64, 64), 32, flip=flip)(brightness, image, (64, 64)) for flip in (False, True))
    torch.testing.assert_close(alone.softmax(0), both.exp())


def test_scales_are_averaged():
    seen = []
    whole = WholeImage((64, 64), 32, scales=(0.5, 1.0, 1.5))
    logits = whole(lambda x: seen.append(x.shape[2]) or brightness(x), torch.randn(3, 64, 64), (64, 64))
    assert seen == [32, 64, 96]
    torch.testing.assert_close(logits.exp().sum(0), torch.ones(64, 64))


def test_classes_are_the_largest_logits_however_many_there_are():
    torch.manual_seed(0)
    weights, image = torch.randn(37, 3, 4, 4), torch.randn(3, 50, 70)
    whole, ask = WholeImage((2048, 64), 32), lambda x: F.conv2d(x, weights, stride=4)
    assert torch.equal(whole.classes(ask, image, (50, 70)), whole(ask, image, (50, 70)).argmax(0))


@pytest.mark.parametrize("order", [range(20), range(19, -1, -1), [(7 * i) % 20 for i in range(20)]])
def test_the_album_keeps_the_images_with_the_lowest_iou(order):
    album, image = Album([0.0] * 3, [1.0] * 3, ["a", "b"], lowest=True), torch.zeros(3, 8, 8)
    labels = torch.zeros(8, 8, dtype=torch.uint8)
    for number in order:  # the higher the number, the more pixels are right
        answers = torch.ones(8, 8, dtype=torch.long)
        answers.view(-1)[: 3 * number + 1] = 0
        album.add(number, image, labels, answers, confusion_matrix(answers, labels, 2))
    assert [seen.number for seen in album.lowest_of_all()] == list(range(8))
    assert [seen.number for seen in album.first] == list(order)[:4]
