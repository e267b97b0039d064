"""The parts of detectors: anchors, boxes, masks; backbones of others; weights from files; answers of fixed sizes."""

import itertools

import pytest
import timm
import torch
from dense_reference import read
from test_detectors import TERMS
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator

from models import create_detector, load_detector
from models.heads import DETECTORS, FixedDetector, anchors, boxes, largest_differences
from models.heads.published import from_published
from utils.errors import UserError


def test_each_object_gets_its_best_places():
    """Even where another object fits them better, and of two that claim a place the last has it."""
    overlaps = torch.tensor([[0.8, 0.45, 0.0, 0.2, 0.6], [0.65, 0.3, 0.0, 0.1, 0.7], [0.2, 0.1, 0.0, 0.25, 0.1]])
    assert anchors.BestToEach(0.5, 0.4)(overlaps).tolist() == [0, -2, -1, 2, 1]
    assert anchors.BestToEach(0.5, 0.4, least=0.3)(overlaps).tolist() == [0, -2, -1, -1, 1]
    overlaps[1, 4] = 0.55  # now the first place is the best of two objects
    assert anchors.BestToEach(0.5, 0.4)(overlaps).tolist() == [1, -2, -1, 2, 0]
    nowhere = torch.zeros(1, 3)
    assert anchors.BestToEach(0.5, 0.4)(nowhere).tolist() == [-1, -1, -1]


def test_a_box_grows_and_shrinks_by_the_same_factor_at_most():
    coder = boxes.BoundedBoxCoder((1.0, 1.0, 5.0, 5.0))
    place = torch.tensor([[0.0, 0.0, 10.0, 20.0]])
    for deltas, factor in ((1e3, 62.5), (-1e3, 0.016)):
        left, top, right, bottom = coder.decode_single(torch.tensor([[0.0, 0.0, deltas, deltas]]), place)[0].tolist()
        assert (right - left, bottom - top) == pytest.approx((10 * factor, 20 * factor), rel=1e-4)
    moved = coder.encode_single(torch.tensor([[2.0, 3.0, 9.0, 33.0]]), place)
    torch.testing.assert_close(coder.decode_single(moved, place), torch.tensor([[2.0, 3.0, 9.0, 33.0]]))


def test_masks_are_pasted_at_the_centres_of_pixels():
    whole = torch.ones(3, 28, 28)
    at = torch.tensor([[1.0, 2.0, 4.0, 5.0], [-3.0, -3.0, 2.0, 2.0], [7.0, 7.0, 7.0, 9.0]])
    first, second, third = boxes.paste(whole, at, 6, 8)
    assert torch.where(first)[0].unique().tolist() == [2, 3, 4]
    assert torch.where(first)[1].unique().tolist() == [1, 2, 3]
    assert second.sum() == 4  # what lies in the image
    assert not third.any()  # a box of no width


def test_features_come_from_the_level_that_fits():
    pool = boxes.AlignedRoIAlign((4, 8, 16, 32), 7)
    sides = torch.tensor([1.0, 55, 57, 111, 113, 223, 225, 447, 449, 5000])
    rois = torch.stack([torch.zeros(10), torch.zeros(10), sides, sides], dim=1)
    assert pool.levels(rois).tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3]


def some_targets(*counts: int, side: int = 96) -> list[dict[str, Tensor]]:
    return [
        {
            "boxes": torch.tensor([[8.0, 8.0, 60.0, 70.0]]).repeat(count, 1),
            "labels": torch.arange(count) % 5,
            "masks": torch.ones(count, side, side, dtype=torch.uint8),
        }
        for count in counts
    ]


def small_detector(head: str, backbone: str = "crossformer_micro", classes: int = 5, **kwargs):
    return create_detector(head, backbone, classes, head_channels=32, **kwargs)


QUICK = [("resnet18", "mask_rcnn"), ("convnext_atto", "retinanet")]


@pytest.mark.parametrize(
    ("backbone", "head"),
    [
        pair if pair in QUICK else pytest.param(*pair, marks=pytest.mark.slow)
        for pair in itertools.product(["resnet18", "convnext_atto", "crossformerpp_small"], DETECTORS)
    ],
)
def test_other_backbones(backbone, head):
    """Every parameter gets a gradient, for which DDP would wait, even where no image has an object."""
    model = small_detector(head, backbone)
    for counts in ((2, 0), (0, 0)):
        terms = model.train()(torch.randn(2, 3, 96, 96), None, some_targets(*counts))
        assert all(torch.isfinite(term) for term in terms.values())
        model.zero_grad()
        torch.stack([*terms.values()]).sum().backward()
        assert not [name for name, p in model.named_parameters() if p.grad is None]
    with torch.no_grad():
        found = model.eval()(torch.randn(2, 3, 96, 96), [(96, 96), (64, 80)])
    assert all(len(each["boxes"]) == len(each["labels"]) == len(each["scores"]) <= 100 for each in found)
    assert all((each["boxes"][:, 2:] <= torch.tensor([80.0, 64.0])).all() for each in found[1:])
    classifier = timm.create_model(backbone)
    line, *_ = load_detector(model, classifier.state_dict(), "a file")
    assert "weights of the backbone matched, the head is new" in line


@pytest.mark.parametrize("head", ["retinanet", "mask_rcnn"])
def test_as_torchvision_does_it(head):
    model = small_detector(head, style="torchvision")
    theirs = (model.retinanet if head == "retinanet" else model.rpn).anchor_generator
    assert type(theirs) is AnchorGenerator
    terms = model.train()(torch.randn(2, 3, 96, 96), None, some_targets(2, 1))
    assert terms.keys() == TERMS[head].keys()
    with torch.no_grad():
        model.eval()(torch.randn(1, 3, 96, 96))


@pytest.mark.parametrize("head", DETECTORS)
def test_files_of_ours_load(head):
    model, twin, other = (small_detector(head, classes=count) for count in (5, 5, 7))
    saved = {f"module.{key}": value for key, value in model.state_dict().items()}
    line, *notes = load_detector(twin, saved, "a file")
    assert line == f"{len(saved)} weights matched, the head too"
    assert notes == ["the prefix module. was taken off"]
    assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), model.state_dict().values(), strict=True))
    line, *_ = load_detector(other, saved, "a file")
    outputs = {"retinanet": 2, "mask_rcnn": 6, "cascade_mask_rcnn": 18}[head]
    assert line == f"{len(saved) - outputs} weights matched, the last layers are new (5 classes in the file)"


@pytest.mark.parametrize("head", ["retinanet", "mask_rcnn"])
def test_published_files_load(head):
    _, _, weights = read("micro", head)
    published = {f"module.{key}": value for key, value in weights.items()}
    same, fewer = (create_detector(head, "crossformer_micro", count) for count in (80, 3))
    line, *notes = load_detector(same, published, "a file")
    assert (line, notes) == (f"{len(weights)} weights matched, the head too", ["the prefix module. was taken off"])
    line, *_ = load_detector(fewer, published, "a file")
    outputs = {"retinanet": 2, "mask_rcnn": 6}[head]
    assert line == f"{len(weights) - outputs} weights matched, the last layers are new (80 classes in the file)"
    assert torch.equal(fewer.neck.fpn_convs[0].conv.weight, weights["neck.fpn_convs.0.conv.weight"])


def test_a_cascade_as_published_files_have_it_loads():
    """No such file was published; its names are those of the library that the others are of."""
    model = small_detector("cascade_mask_rcnn")
    own, found = model.state_dict(), {}
    parts = {f"shared_convs.{i}.conv": f"box_head.{i}.0" for i in range(4)}
    parts |= {f"shared_convs.{i}.bn": f"box_head.{i}.1" for i in range(4)} | {"shared_fcs.0": "box_head.5"}
    of_boxes = parts | {"fc_cls": "box_predictor.cls_score", "fc_reg": "box_predictor.bbox_pred"}
    of_masks = {f"convs.{i}.conv": f"mask_head.{i}.0" for i in range(4)}
    of_masks |= {"upsample": "mask_predictor.conv5_mask", "conv_logits": "mask_predictor.mask_fcn_logits"}
    for stage in range(3):
        for kind, names in (("bbox_head", of_boxes), ("mask_head", of_masks)):
            for published, here in names.items():
                for key in [key for key in own if key.startswith(f"roi_heads.stages.{stage}.{here}.")]:
                    found[key] = f"roi_head.{kind}.{stage}.{published}.{key.rpartition('.')[2]}"
    assert {key for key in own if key.startswith("roi_heads.")} == found.keys()
    for key, published in found.items():
        assert [*from_published({published: torch.zeros(3, 1)})] == [key]


@pytest.mark.parametrize("keep", ["neck.", "backbone.layers.0"])
def test_a_file_that_matches_little_is_refused(keep):
    model = small_detector("retinanet")
    part = {key: value for key, value in model.state_dict().items() if key.startswith(keep)}
    with pytest.raises(UserError, match="does not fit the model: it lacks"):
        load_detector(model, part, "a file")


@torch.no_grad()
@pytest.mark.parametrize("head", DETECTORS)
def test_answers_of_a_fixed_size(head):
    """The same objects as the detector finds; what is missing to a hundred has a score of 0."""
    torch.manual_seed(0)
    model = small_detector(head).eval()
    if head == "retinanet":
        heads = model.retinanet.head
        torch.nn.init.normal_(heads.classification_head.cls_logits.weight, std=0.2)
        torch.nn.init.normal_(heads.regression_head.bbox_reg.weight, std=0.02)
        torch.nn.init.constant_(heads.classification_head.cls_logits.bias, -1)
    image = torch.randn(1, 3, 64, 96)
    (found,) = model(image)
    answer = FixedDetector(model)(image)
    count = len(found["scores"])
    assert count > 50
    known = tuple(part[:count] for part in answer)
    expected = tuple(found[key] for key in ("boxes", "scores", "labels"))
    scores, sides = largest_differences(expected, known)
    assert scores < 1e-6
    assert sides < 1e-3
    if head != "retinanet":
        torch.testing.assert_close(answer[3][:count], found["masks"], rtol=0, atol=1e-5)
    nothing = model(torch.zeros(1, 3, 64, 96), [(1, 1)])
    assert len(nothing) == 1


def test_differences_of_answers_are_told():
    boxes = torch.tensor([[0.0, 0, 4, 4], [1, 1, 9, 9], [2, 2, 3, 3]])
    scores, labels = torch.tensor([0.9, 0.9, 0.1]), torch.tensor([1, 0, 2])
    swapped = boxes[[1, 0, 2]], scores, labels[[1, 0, 2]]
    assert largest_differences((boxes, scores, labels), swapped) == (0.0, 0.0)
    assert largest_differences((boxes, scores, labels), (boxes + 0.5, scores, labels))[1] == 0.5
    assert largest_differences((boxes, scores, labels), (boxes, scores - 0.2, labels))[0] == pytest.approx(0.2)
    assert largest_differences((boxes, scores, labels), (boxes, scores, labels + 1))[1] == float("inf")


def test_smaller_anchors_for_smaller_objects():
    sides = []
    for head, scale in (("retinanet", 0), ("retinanet", 2), ("mask_rcnn", 0), ("mask_rcnn", 4)):
        model = small_detector(head, anchor_scale=scale)
        sides.append((model.retinanet if head == "retinanet" else model.rpn).anchor_generator.sizes[0][0])
    assert sides == [32, 16, 32, 16]


def test_what_does_not_go_is_refused():
    with pytest.raises(ValueError, match="head 'fcos' is not one of retinanet, mask_rcnn, cascade_mask_rcnn"):
        create_detector("fcos", "crossformer_micro", 5)
    with pytest.raises(ValueError, match="style 'torchvision' is not one of cascade_mask_rcnn's"):
        create_detector("cascade_mask_rcnn", "crossformer_micro", 5, style="torchvision")
    with pytest.raises(ValueError, match="backbone gives maps of one size only"):
        create_detector("retinanet", "vit_tiny_patch16_224", 5)
    with pytest.raises(ValueError, match="targets are needed in training mode"):
        small_detector("retinanet")(torch.zeros(1, 3, 64, 64))


def test_under_autocast_boxes_stay_exact():
    model = small_detector("mask_rcnn").eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (found,) = model(torch.randn(1, 3, 96, 96))
    assert {value.dtype for value in found.values()} == {torch.float32, torch.int64}
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        terms = model(torch.randn(1, 3, 96, 96), None, some_targets(2))
    assert all(term.dtype == torch.float32 for term in terms.values())


@pytest.mark.parametrize("head", DETECTORS)
def test_numbers_that_are_not_finite_end_nothing(head):
    """Neither a step, which the trainer then skips, nor an evaluation."""
    model = small_detector(head)
    with torch.no_grad():
        model.neck.fpn_convs[0].conv.weight.fill_(float("nan"))
    for counts in ((2, 1), (0, 0)):
        terms = model.train()(torch.randn(2, 3, 64, 64), None, some_targets(*counts, side=64))
        assert any(not torch.isfinite(term) for term in terms.values())
        torch.stack([*terms.values()]).sum().backward()
    with torch.no_grad():
        assert len(model.eval()(torch.randn(2, 3, 64, 64))) == 2
