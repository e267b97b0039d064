"""Classes of unequal size: balanced drawing, weights in the loss."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_layouts import config_of

from data.sampling import BalancedTrainBatches, TrainBatches
from tasks.classification import Classification, balanced_weights, weighted_cross_entropy
from utils.errors import UserError

LABELS = np.repeat([0, 1, 2, 4], [50, 7, 20, 3])


def test_each_class_is_drawn_equally_often():
    batches = BalancedTrainBatches(LABELS, 5, 2, 0, 1, seed=3)
    order = batches.order(0)
    assert len(order) == len(LABELS) == 80
    counts = np.bincount(LABELS[order], minlength=5)
    assert counts.tolist() == [20, 20, 20, 0, 20]
    for start in range(0, 80, 4):
        assert sorted(LABELS[order[start : start + 4]]) == [0, 1, 2, 4], "one of each in every round"
    times = np.bincount(order, minlength=80)
    assert times[:50].max() == 1, "of a large class no image comes twice"
    assert set(times[LABELS == 4]) <= {6, 7}
    assert set(times[LABELS == 1]) <= {2, 3}


def test_the_order_is_a_function_of_seed_and_epoch():
    def order(epoch, seed=3):
        return BalancedTrainBatches(LABELS, 5, 2, 0, 1, seed).order(epoch).tolist()

    assert order(2) == order(2)
    assert len({tuple(order(epoch)) for epoch in range(4)} | {tuple(order(0, seed=4))}) == 5
    assert order(0)[:8] == [77, 5, 75, 52, 4, 57, 56, 78], "the stream of numpy's older generator"


def test_ranks_share_the_order():
    alone = BalancedTrainBatches(LABELS, 10, 1, 0, 1, seed=0)
    two = [BalancedTrainBatches(LABELS, 5, 1, rank, 2, seed=0) for rank in (0, 1)]
    for batches in (alone, *two):
        batches.last_step = 12
    together = [a + b for a, b in zip(*two, strict=True)]
    assert [sorted(batch) for batch in alone] == [sorted(batch) for batch in together]
    assert alone.global_batch_of(9) == next(batch for i, batch in enumerate(alone) if i == 9)


def test_weights_are_one_on_average():
    counts = np.array([50, 7, 20, 0, 3])
    weights = balanced_weights(counts)
    assert np.isclose((weights * counts).sum(), counts.sum())
    assert np.allclose(weights[[0, 1, 2, 4]] * counts[[0, 1, 2, 4]], 20)


def test_the_loss_of_an_image_counts_as_its_class():
    torch.manual_seed(0)
    logits, targets, weights = torch.randn(6, 3), torch.tensor([0, 1, 2, 2, 1, 0]), torch.tensor([0.5, 1.0, 2.0])
    by_hand = sum(
        weights[t] * F.cross_entropy(logits[i : i + 1], targets[i : i + 1], label_smoothing=0.1)
        for i, t in enumerate(targets)
    )
    assert torch.isclose(weighted_cross_entropy(logits, targets, weights, 0.1), by_hand / 6)
    shares = F.one_hot(targets, 3).float()
    assert torch.isclose(
        weighted_cross_entropy(logits, shares, weights, 0.1), weighted_cross_entropy(logits, targets, weights, 0.0)
    )
    mixed = 0.3 * shares + 0.7 * shares.roll(1, 0)
    of_mixed = F.cross_entropy(logits, mixed, reduction="none") * (mixed * weights).sum(1)
    assert torch.isclose(weighted_cross_entropy(logits, mixed, weights, 0.1), of_mixed.mean())


@pytest.mark.parametrize("mixup", ["0", "0.8"])
def test_the_settings_do_so(layouts, mixup):
    """The loss of the task with weights, on data of which one class has few images."""
    opts = ("AUG.MIXUP", mixup, "AUG.CUTMIX", "0", "DATA.IMG_SIZE", "32", "MODEL.NAME", "crossformer_micro")
    plain, weighted = (
        Classification(config_of(layouts["folder"], *opts, "TRAIN.CLASS_WEIGHTS", how), torch.device("cpu"))
        for how in ("none", "balanced")
    )
    losses = []
    for task in (plain, weighted):
        batch = next(task.train_loaders().train.micro_batches(0, 1))
        torch.manual_seed(0)
        np.random.seed(0)
        batch = task.prepare(batch)
        model = task.model().eval()
        with torch.no_grad():
            model.get_classifier().bias.copy_(torch.arange(5.0))  # so that classes have other losses
            losses.append(task.loss(model, batch)[0])
    assert not torch.isclose(*losses)
    balanced = Classification(config_of(layouts["folder"], *opts, "DATA.SAMPLER", "balanced"), torch.device("cpu"))
    assert type(balanced.train_loaders().train.batches) is BalancedTrainBatches
    assert type(plain.train_loaders().train.batches) is TrainBatches


def test_not_for_data_that_does_not_list_its_classes(layouts):
    for setting in ("DATA.SAMPLER", "TRAIN.CLASS_WEIGHTS"):
        config = config_of(layouts["folder"], "DATA.FORMAT", "torch/image_folder", setting, "balanced")
        with pytest.raises(UserError, match=f"{setting} balanced is for folders and archives"):
            Classification(config, torch.device("cpu")).train_loaders()
