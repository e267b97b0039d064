"""Detectors against the outputs of the published ones (tests/data/dense_heads), and on backbones of others."""

import json
import zlib

import numpy as np
import pytest
import timm
import torch
from dense_reference import FOLDER, GROUPS, check, images, read
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from models import create_detector, load_detector
from models.heads import DETECTORS, FixedDetector, anchors, boxes, largest_differences, rcnn
from models.heads.boxes import paste
from models.heads.published import from_published
from models.heads.retinanet import match
from utils.errors import UserError

CASES = [
    (variant, head) if variant == "micro" else pytest.param(variant, head, marks=pytest.mark.slow)
    for variant in ("micro", "small")
    for head in ("retinanet", "mask_rcnn")
]
PARAMETERS = {
    ("retinanet", "crossformer_small"): 40_824_958, ("retinanet", "crossformerpp_small"): 33_044_904,
    ("retinanet", "crossformer_base"): 62_139_118, ("retinanet", "crossformerpp_base"): 62_162_158,
    ("mask_rcnn", "crossformer_small"): 50_165_119, ("mask_rcnn", "crossformerpp_small"): 42_966_697,
    ("mask_rcnn", "crossformer_base"): 71_479_279, ("mask_rcnn", "crossformerpp_base"): 71_502_319,
}  # fmt: skip
"""Counted with 81 outputs for the 80 classes of COCO and the background."""
SIZE = 160, 224
TERMS = {
    "retinanet": {"cls": "loss_cls", "box": "loss_bbox"},
    "mask_rcnn": {
        "rpn_cls": "loss_rpn_cls", "rpn_box": "loss_rpn_bbox", "cls": "loss_cls", "box": "loss_bbox",
        "mask": "loss_mask",
    },
}  # fmt: skip


def reference(variant: str, head: str, **kwargs):
    """What was measured, and the network with the reference's weights; its samplers take everything."""
    told, measured, weights = read(variant, head)
    model = create_detector(head, f"crossformer_{variant}", 80, **kwargs, **GROUPS if variant == "small" else {})
    model.load_state_dict(from_published(weights))
    if head == "mask_rcnn":
        for part in (model.rpn, model.roi_heads):
            part.fg_bg_sampler.batch_size_per_image = 1_000_000

    return told, measured, model


def ellipse(box: list[int], height: int, width: int) -> np.ndarray:
    x, y = np.arange(width)[None], np.arange(height)[:, None]
    left, top, right, bottom = box
    w, h = right - left, bottom - top
    inside = (x >= left) & (x < right) & (y >= top) & (y < bottom)
    round_ = ((2 * x + 1 - left - right) * h) ** 2 + ((2 * y + 1 - top - bottom) * w) ** 2 <= (w * h) ** 2
    return (inside & round_).astype(np.uint8)


def truth(head: str, empty: tuple[int, ...] = ()) -> list[dict[str, Tensor]]:
    told = json.loads((FOLDER / "ground_truth.json").read_text())["images"]
    targets = []
    for i, image in enumerate(told):
        masks = np.stack([ellipse(box, *SIZE) for box in image["boxes"]])
        assert [int(mask.sum()) for mask in masks] == image["mask_pixels"]
        assert [zlib.crc32(mask.tobytes()) for mask in masks] == image["mask_crc32"]
        count = 0 if i in empty else 4 if head == "retinanet" else 5
        targets.append(
            {
                "boxes": torch.tensor(image["boxes"], dtype=torch.float64)[:count],
                "labels": torch.tensor(image["labels"])[:count],
                "masks": torch.from_numpy(masks)[:count],
            }
        )
    return targets


def batch(x: Tensor) -> ImageList:
    return ImageList(x, [SIZE] * len(x))


def rows(measured: dict, level: int, anchors: Tensor) -> None:
    places = np.linspace(0, len(anchors) - 1, 64).astype(np.int64)
    torch.testing.assert_close(anchors[places], measured[f"anchors{level}_rows"], rtol=0, atol=1e-4)


def same_detections(measured: dict, name: str, found: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found["boxes"], measured[f"{name}_boxes"], rtol=0, atol=1e-3)
    torch.testing.assert_close(found["scores"], measured[f"{name}_scores"], rtol=0, atol=1e-4)
    assert torch.equal(found["labels"], measured[f"{name}_labels"])


def padded(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :, 150:], x[:, :, :, 200:] = 0, 0
    return x


@torch.no_grad()
@pytest.mark.parametrize(("variant", "head"), CASES)
def test_evaluation(variant, head):
    told, measured, model = reference(variant, head)
    x = images(1, 1)
    for i, each in enumerate(model.eval().maps(x), start=1):
        check(measured, f"eval_stage{i}", each)
    levels = model.levels(x)
    first = 3 if head == "retinanet" else 2
    for level, each in enumerate(levels, start=first):
        check(measured, f"eval_fpn{level}", each)
    dense = model.retinanet if head == "retinanet" else model.rpn
    counts = list(told["float32"]["anchors_per_level"].values())
    of_level = dense.anchor_generator(batch(x), levels)[0].split(counts)
    for i, (places, level) in enumerate(zip(of_level, range(first, first + 5), strict=True)):
        around_origin = dense.anchor_generator.cell_anchors[i]
        torch.testing.assert_close(around_origin, measured[f"anchors_base{level}"], rtol=0, atol=1e-4)
        rows(measured, level, places)
    if head == "retinanet":
        heads = dense.head
        for level, each in enumerate(levels, start=3):
            logits, deltas = heads.classification_head, heads.regression_head
            check(measured, f"eval_cls{level}", logits.cls_logits(logits.conv(each)))
            check(measured, f"eval_reg{level}", deltas.bbox_reg(deltas.conv(each)))
    else:
        for level, (logits, deltas) in enumerate(zip(*dense.head(levels), strict=True), start=2):
            check(measured, f"eval_rpn_cls{level}", logits)
            check(measured, f"eval_rpn_reg{level}", deltas)
    (found,) = model(x)
    same_detections(measured, "eval", found)
    (small,) = model(padded(x), [(150, 200)])
    small["boxes"] = small["boxes"] / 0.5
    same_detections(measured, "padded", small)
    if head == "mask_rcnn":
        masks = paste(found["masks"], found["boxes"], *SIZE)
        first10 = torch.from_numpy(np.unpackbits(measured["eval_masks_first10_packbits"].numpy()).reshape(10, *SIZE))
        assert (masks[:10] != first10).sum() <= 1
        off = (masks.sum((1, 2)) - measured["eval_mask_pixels"]).abs()
        assert off.max() <= 1
        assert off.sum() <= 2
        large = paste(small["masks"], small["boxes"], 300, 400).sum((1, 2)) - measured["padded_mask_pixels"]
        assert large.abs().max() <= 1
        assert large.abs().sum() <= 2
        torch.testing.assert_close(
            found["masks"][:10], measured["eval_mask_logits_first10"].sigmoid(), rtol=0, atol=1e-4
        )


@torch.no_grad()
@pytest.mark.parametrize("variant", ["micro", pytest.param("small", marks=pytest.mark.slow)])
def test_what_is_inside_of_proposals(variant):
    _, measured, model = reference(variant, "mask_rcnn")
    x = images(1, 1)
    features = {str(i): level for i, level in enumerate(model.eval().levels(x))}
    (proposals,), _ = model.rpn(batch(x), features)
    assert len(proposals) == len(measured["eval_proposals"])
    torch.testing.assert_close(proposals, measured["eval_proposals"][:, :4], rtol=0, atol=1e-3)
    heads = model.roi_heads
    assert torch.equal(heads.box_roi_pool.levels(proposals) + 2, measured["eval_roi_level"])
    rois = [measured["fixed_rois"]]
    assert torch.equal(heads.box_roi_pool.levels(rois[0]) + 2, measured["fixed_roi_level"])
    check(measured, "fixed_roi_feats", heads.box_roi_pool(features, rois))
    logits, deltas = heads.look(features, rois, [SIZE])
    logits = torch.cat([logits[:, 1:], logits[:, :1]], dim=1)
    torch.testing.assert_close(logits, measured["fixed_cls_score"], rtol=0, atol=1e-4)
    check(measured, "fixed_bbox_pred", deltas[:, 4:])
    check(measured, "fixed_mask_pred", heads.look_for_masks(features, rois, [SIZE])[:, 1:])


def losses(model, head: str, empty: tuple[int, ...] = ()) -> dict[str, Tensor]:
    return model(images(2, 2).double(), None, truth(head, empty))


@pytest.mark.parametrize(("variant", "head"), CASES)
def test_training_step(variant, head):
    """In float64: each term of the loss and the norm of each gradient, and with images that have no object."""
    told, _, model = reference(variant, head)
    expected, model = told["float64"], model.double().train()
    tolerance = 1e-6 if head == "retinanet" else 1e-5
    terms = losses(model, head)
    for name, published in TERMS[head].items():
        rel = 1e-4 if name == "mask" else tolerance
        assert terms[name].item() == pytest.approx(expected["train_losses"][published], rel=rel), name
    total = torch.stack([*terms.values()]).sum()
    assert total.item() == pytest.approx(expected["train_loss_total"], rel=1e-5)
    total.backward()
    norms = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    of_all = expected["grad_norm_groups"]["total"]
    t = 3e-3 if head == "retinanet" else 1e-3
    names = {key: next(iter(from_published({key: torch.zeros(1)}))) for key in expected["grad_norm"]}
    assert {*names.values()} == norms.keys()
    for name, norm in expected["grad_norm"].items():
        assert abs(norms[names[name]] - norm) <= t * (norm + 1e-5 * of_all), name
    for empty, key in (((1,), "second_image"), ((0, 1), "both_images")):
        for name, term in losses(model, head, empty).items():
            wanted = expected[f"train_losses_{key}_empty"][TERMS[head][name]]
            assert term.item() == pytest.approx(wanted, rel=1e-4 if name == "mask" else tolerance), (key, name)


@torch.no_grad()
@pytest.mark.parametrize(("variant", "head"), CASES)
def test_which_place_finds_what(variant, head):
    told, measured, model = reference(variant, head)
    x = images(2, 2)
    dense, name = (model.retinanet, "train_") if head == "retinanet" else (model.rpn, "train_rpn_")
    levels = model.train().levels(x)
    counts = told["float64"]["train_counts" if head == "retinanet" else "train_rpn_counts"]
    for i, (places, target) in enumerate(zip(dense.anchor_generator(batch(x), levels), truth(head), strict=True)):
        matched = match(dense.proposal_matcher, target["boxes"], places)
        found = torch.where(matched >= 0)[0]
        assert torch.equal(found, measured[f"{name}positive_anchors{i}"])
        assert (matched == -1).sum() == counts["negatives"][i]
        assert (matched == -2).sum() == counts["ignored"][i]
        labels = target["labels"] if head == "retinanet" else torch.zeros_like(target["labels"])
        assert torch.equal(labels[matched[found]], measured[f"{name}positive_labels{i}"])
        right = dense.box_coder.encode_single(target["boxes"][matched[found]].float(), places[found])
        torch.testing.assert_close(right, measured[f"{name}positive_targets{i}"], rtol=0, atol=1e-5)


def in_order(boxes: Tensor) -> Tensor:
    return boxes[np.lexsort(boxes.numpy().T)]


@torch.no_grad()
@pytest.mark.parametrize("variant", ["micro", pytest.param("small", marks=pytest.mark.slow)])
def test_what_is_drawn_of_proposals(variant):
    """Mask targets bit by bit: the loss hardly tells a soft one."""
    told, measured, model = reference(variant, "mask_rcnn")
    x, heads = images(2, 2), model.roi_heads
    features = {str(i): level for i, level in enumerate(model.train().levels(x))}
    targets = [{**each, "boxes": each["boxes"].float(), "labels": each["labels"] + 1} for each in truth("mask_rcnn")]
    proposals, _ = model.rpn(batch(x), features, targets)
    for i, each in enumerate(proposals):
        torch.testing.assert_close(in_order(each), in_order(measured[f"train_proposals{i}"][:, :4]), rtol=0, atol=1e-3)
    boxes, matched, labels, deltas = heads.select_training_samples(proposals, targets)
    counts = told["float64"]["train_roi_counts"]
    first, wrong_bits = 0, 0
    for i, (of_boxes, whose, of_labels, right) in enumerate(zip(boxes, matched, labels, deltas, strict=True)):
        found = torch.where(of_labels > 0)[0]
        assert [len(found), len(of_labels) - len(found)] == [counts["positives"][i], counts["negatives"][i]]
        expected = measured[f"train_roi_positive_boxes{i}"]
        near = (of_boxes[found][None] - expected[:, None]).abs().amax(2)
        assert near.amin(1).max() < 1e-3  # theirs begin with the objects, ours end with them
        found = found[near.argmin(1)]
        assert torch.equal(whose[found], measured[f"train_roi_positive_gt{i}"])
        rest = slice(first, first + len(found))
        assert torch.equal(of_labels[found] - 1, measured["train_roi_positive_labels"][rest])
        torch.testing.assert_close(right[found], measured["train_roi_positive_targets"][rest], rtol=0, atol=1e-3)
        masks = rcnn.mask_targets(targets[i]["masks"], of_boxes[found], whose[found], 28)
        bits = np.unpackbits(measured["train_mask_targets_packbits"].numpy()).reshape(-1, 28, 28)[rest]
        wrong_bits += int((masks != torch.from_numpy(bits)).sum())
        first += len(found)
    assert wrong_bits <= 3  # ties


@pytest.mark.parametrize(("head", "backbone"), PARAMETERS)
def test_parameters_as_published(head, backbone):
    with torch.device("meta"):
        model = create_detector(head, backbone, 80, **GROUPS)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[head, backbone]


def test_cascade_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = create_detector("cascade_mask_rcnn", "crossformer_small", 80, **GROUPS)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 88.0


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


@pytest.mark.parametrize("head", DETECTORS)
@pytest.mark.parametrize("backbone", ["resnet18", "convnext_atto", "crossformerpp_small"])
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
