"""What a classifier minimises: its labels, each class by itself, and what a teacher says."""

import math
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import TINY_RUN, assert_same_tensors
from torch import nn

from config import build_config
from data.loading import Batch
from tasks.classification import Classification
from tasks.distillation import Distillation, Teacher, similarity, soft_loss
from tasks.trained import TrainedModel
from utils.errors import UserError

CPU = torch.device("cpu")


class Says(nn.Module):
    """A network whose logits are a number for each channel's mean, with what is asked of timm's."""

    num_classes = 3

    def __init__(self, size: int = 0):
        super().__init__()
        self.head = nn.Linear(3, 3)
        self.pretrained_cfg = {"input_size": (3, size, size), "fixed_input_size": bool(size)}
        self.seen = torch.empty(0)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, images):
        self.seen = images
        return self.head(images.mean((2, 3)))


def loss_of(logits: list[list[float]], targets: torch.Tensor, *opts: str) -> float:
    task = Classification(build_config(opts=["MODEL.LABEL_SMOOTHING", "0", *opts]), CPU)
    batch = Batch(torch.tensor(logits), targets, torch.arange(len(logits)))
    return float(task.loss(nn.Identity(), batch)[0])


def test_binary_cross_entropy_by_hand():
    """-log(sigmoid) of the class that it is, -log(1 - sigmoid) of the others."""
    logits = [[2.0, -1.0, 0.5]]
    no = [math.log1p(math.exp(x)) for x in logits[0]]
    expected = [no[0], math.log1p(math.exp(1.0)), no[2]]
    one = torch.tensor([1])
    assert loss_of(logits, one, "TRAIN.LOSS.NAME", "bce") == pytest.approx(sum(expected) / 3, rel=1e-6)
    bce = "TRAIN.LOSS.NAME", "bce", "TRAIN.LOSS.SUM", "True"
    assert loss_of(logits, one, *bce) == pytest.approx(sum(expected), rel=1e-6)
    mixed = torch.tensor([[0.3, 0.7, 0.0]])
    with_both = [math.log1p(math.exp(-2.0)), expected[1], no[2]]
    assert loss_of(logits, mixed, *bce, "TRAIN.LOSS.THRESHOLD", "0.2") == pytest.approx(sum(with_both), rel=1e-6)
    shares = 0.3 * with_both[0] + 0.7 * no[0] + 0.7 * expected[1] + 0.3 * no[1] + no[2]
    assert loss_of(logits, mixed, *bce) == pytest.approx(shares, rel=1e-6)


def test_soft_answers():
    """By hand: sum of p log(p / q) of the softened answers; the gradient keeps its size at a high temperature."""
    student, teacher = torch.tensor([[1.0, 0.0]], requires_grad=True), torch.tensor([[0.0, 3.0]])
    p, q = (torch.softmax(x / 2.0, dim=1) for x in (teacher, student))
    assert torch.allclose(soft_loss(student, teacher, 2.0), 4 * (p * (p / q).log()).sum())
    assert float(soft_loss(teacher, teacher, 2.0)) == pytest.approx(0, abs=1e-6)
    sizes = [float(torch.autograd.grad(soft_loss(student, teacher, t), student)[0].norm()) for t in (50.0, 100.0)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)


def test_networks_that_see_alike():
    """Turned, scaled and shifted features are alike; those of other images are not."""
    torch.manual_seed(0)
    features = torch.randn(64, 8)
    turn, _ = torch.linalg.qr(torch.randn(8, 8))
    assert float(similarity(features, 3 * features @ turn + 5)) == pytest.approx(1, abs=1e-5)
    assert float(similarity(features, torch.randn(64, 8))) < 0.3
    x, y = features - features.mean(0), torch.randn(64, 5)
    centred = y - y.mean(0)
    by_paper = (centred.T @ x).norm() ** 2 / ((x.T @ x).norm() * (centred.T @ centred).norm())
    assert torch.allclose(similarity(features, y), by_paper, atol=1e-6)


def teacher_of(network: nn.Module, columns: list[int], opts: list[str]) -> Teacher:
    trained = TrainedModel(network, build_config(opts=opts), ["a", "b", "c"], ["a", "b", "c"], {}, [])
    return Teacher(trained, columns, [0.5] * 3, [0.25] * 3)


def test_a_teacher_is_asked_in_its_own_words():
    """Its own normalising, its own order of classes, its own size where it has one; and it stays as it is."""
    network = Says(size=8)
    teacher = teacher_of(
        network, [2, 0], ["DATA.IMG_SIZE", "8", "DATA.MEAN", "[0.1, 0.2, 0.3]", "DATA.STD", "[0.5, 0.5, 0.5]"]
    )
    pixels = torch.rand(2, 3, 16, 16)
    answers = teacher.train()((pixels - 0.5) / 0.25)
    assert tuple(network.seen.shape) == (2, 3, 8, 8)
    expected = (
        F.interpolate(pixels, (8, 8), mode="bicubic", antialias=True) - torch.tensor([0.1, 0.2, 0.3])[:, None, None]
    ) / 0.5
    torch.testing.assert_close(network.seen, expected)
    torch.testing.assert_close(answers, network.head(expected.mean((2, 3)))[:, [2, 0]].detach())
    assert not answers.requires_grad
    assert not any(module.training for module in teacher.modules())


def test_shares_of_labels_and_teacher():
    task = Classification(build_config(opts=["TRAIN.TEACHER.FROM", "x", "TRAIN.TEACHER.WEIGHT", "0.9"]), CPU)
    task._distillation = SimpleNamespace(watch=lambda _: None, loss=lambda logits, images: torch.tensor(100.0))
    loss, terms = task.loss(nn.Identity(), Batch(torch.tensor([[2.0, 0.0]]), torch.tensor([0]), torch.arange(1)))
    assert float(loss) == pytest.approx(0.1 * float(terms["loss_labels"]) + 0.9 * 100)


def test_alike_in_half_precision_too():
    torch.manual_seed(0)
    x, y = torch.randn(64, 768) * 30, torch.randn(64, 512) * 30
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.allclose(similarity(x.half(), y.half()), similarity(x, y), atol=0.01)


@pytest.mark.parametrize("kind", ["soft", "hard", "features"])
def test_a_student_comes_nearer_to_its_teacher(kind):
    torch.manual_seed(0)
    arguments = {"num_classes": 3, "embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
    network, student = (timm.create_model("crossformer_micro", **arguments) for _ in range(2))
    same = ["DATA.MEAN", "[0.5, 0.5, 0.5]", "DATA.STD", "[0.25, 0.25, 0.25]"]
    distillation = Distillation(teacher_of(network, [0, 1, 2], same), kind, 1.0)
    before = [p.clone() for p in network.parameters()]
    optimizer, losses, images = torch.optim.AdamW(student.parameters(), lr=1e-3), [], torch.randn(16, 3, 32, 32)
    for _ in range(8):
        distillation.watch(student)
        loss = distillation.loss(student(images), images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, value) for p, value in zip(network.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["TRAIN.LOSS.SUM", "True"], "TRAIN.LOSS.SUM .*goes with TRAIN.LOSS.NAME bce"),
        (["TRAIN.LOSS.NAME", "bce", "TRAIN.CLASS_WEIGHTS", "balanced"], "TRAIN.CLASS_WEIGHTS .*does not go with"),
        (["TRAIN.TEACHER.WEIGHT", "0.9"], "TRAIN.TEACHER.WEIGHT .*goes with TRAIN.TEACHER.FROM, which is not set"),
        (["TRAIN.TEACHER.FROM", "x", "TRAIN.TEACHER.KIND", "hard", "TRAIN.TEACHER.TEMPERATURE", "2"], "TEMPERATURE"),
        (["TRAIN.TEACHER.FROM", "x", "TRAIN.TEACHER.KIND", "features", "TRAIN.COMPILE", "default"], "TEACHER.KIND"),
        (["TASK", "segmentation", "TRAIN.LOSS.NAME", "bce"], "TRAIN.LOSS.NAME .*is read by classification only"),
    ],
)
def test_what_does_not_go_together(opts, message):
    with pytest.raises(UserError, match=message):
        build_config(opts=opts)


def test_learning_from_an_earlier_run(run_main, digits):
    """The results folder is enough; its accuracy is told first, and asked for; a resumed run has the same bits."""
    flags = *TINY_RUN, "--data-path", digits, "--batch-size", "12"
    taught_by = run_main(*flags, "--tag", "teacher", tag="teacher")
    flags = (
        *flags, "--opts", "TRAIN.TEACHER.FROM", taught_by.results, "TRAIN.TEACHER.AT_LEAST", "0.1",
        "AUG.CUTMIX", "1.0", "TRAIN.SAVE_EVERY_STEPS", "7", "TRAIN.KEEP_LAST", "9",
    )  # fmt: skip
    whole = run_main(*flags, "--tag", "whole", tag="whole")
    top1 = taught_by.checkpoint("best")["top1"]
    assert f"learning from {taught_by.results}, whose top-1 is {top1:.2f}" in whole.stdout
    assert {"loss_labels", "loss_teacher"} <= whole.events("train")[0].keys()
    first = whole.events("train")[0]
    assert first["loss"] == pytest.approx((first["loss_labels"] + first["loss_teacher"]) / 2, rel=1e-5)

    saves = {torch.load(path, weights_only=True)["step"]: path for path in whole.results.rglob("[lp]*.pth")}
    resumed = run_main(*flags, "--resume", saves[7])
    assert "learning from" not in resumed.stdout
    assert_same_tensors(whole.checkpoint()["model"], resumed.checkpoint()["model"])

    refused = run_main(*flags, "--opts", "TRAIN.TEACHER.AT_LEAST", "99.5", "--tag", "strict", ok=False)
    assert refused.status == 2
    assert f"has top-1 {top1:.2f} on the validation images, where 99.50 is the least" in refused.error


def test_a_teacher_that_cannot_be_read_ends_all_processes(run_main, digits, tmp_path):
    flags = *TINY_RUN, "TRAIN.TEACHER.FROM", tmp_path / "none.pth", "--data-path", digits, "--batch-size", "6"
    refused = run_main(*flags, nproc=2, ok=False, timeout=60)
    assert refused.status != 0
    assert "none.pth" in refused.stderr


def test_a_teacher_of_other_classes(run_main, digits, tmp_path):
    names = [f"class_{i}" for i in range(5)]
    model = timm.create_model("crossformer_micro", num_classes=5)
    torch.save({"model": model.state_dict(), "classes": names}, tmp_path / "other.pth")
    refused = run_main(
        *TINY_RUN, "--data-path", digits, "--opts", "TRAIN.TEACHER.FROM", tmp_path / "other.pth", ok=False
    )
    assert refused.status == 2
    assert "does not know 10 of the 10 classes, the first is '0'" in refused.error
