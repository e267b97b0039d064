"""What is easy to get wrong in a detector: each of these, put in alone, is noticed by tests/test_detectors.py."""

from collections.abc import Callable
from functools import partial

import pytest
import test_detectors as of
import torch
import torch.nn.functional as F
import torchvision
from torchvision.models.detection.anchor_utils import AnchorGenerator

from models.heads import anchors, boxes, detector, rcnn, retinanet
from models.heads.fpn import FPN

l1_loss, max_pool2d, interpolate = F.l1_loss, F.max_pool2d, F.interpolate


def put(place, name: str, value) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda monkeypatch: monkeypatch.setattr(place, name, value)


class OtherP6(FPN):
    def forward(self, maps):
        levels = super().forward(maps)[: len(maps)]
        for conv in list(self.fpn_convs)[len(maps) :]:
            levels.append(conv(levels[-1]))
        return levels


def with_relu(*args, extra, relu):
    return FPN(*args, extra, not relu)


def rounded(self, *args, generate=anchors.ExactAnchors.generate_anchors, **kwargs):
    return generate(self, *args, **kwargs).round()


def smooth(x, y, reduction):
    return F.smooth_l1_loss(x, y, beta=1 / 9, reduction=reduction)


def of_all_kinds_together(found, scores, idxs, threshold):
    return torchvision.ops.nms(found, scores, threshold)


def soft_targets(masks, inside, matched, side):
    rois = torch.cat([matched[:, None].to(inside), inside], dim=1)
    return torchvision.ops.roi_align(masks[:, None].to(inside.dtype), rois, side, 1.0, aligned=True)[:, 0]


def twice_the_difference(self, *args, encode=boxes.BoundedBoxCoder.encode_single):
    return 2 * encode(self, *args)


def bilinear(x, size, mode):
    return interpolate(x, size, mode="bilinear")


only_by_threshold = put(anchors.BestToEach, "set_low_quality_matches_", lambda *_: None)
together = put(torchvision.ops.boxes, "batched_nms", of_all_kinds_together)
smooth_l1 = put(F, "l1_loss", smooth)
DEVIATIONS = {
    "ReLU before P7": ("retinanet", of.test_evaluation, put(detector, "FPN", with_relu)),
    "P6 of the pyramid": ("retinanet", of.test_evaluation, put(detector, "FPN", OtherP6)),
    "P6 by averages": ("mask_rcnn", of.test_evaluation, put(F, "max_pool2d", lambda x, *_, **__: F.avg_pool2d(x, 2))),
    "bilinear top-down path": ("mask_rcnn", of.test_evaluation, put(F, "interpolate", bilinear)),
    "rounded anchors": ("retinanet", of.test_evaluation, put(anchors.ExactAnchors, "generate_anchors", rounded)),
    "strides of the map": (
        "retinanet",
        of.test_evaluation,
        put(anchors.ExactAnchors, "forward", AnchorGenerator.forward),
    ),
    "300 detections": ("retinanet", of.test_evaluation, put(retinanet, "DETECTIONS", 300)),
    "NMS over classes together": ("retinanet", of.test_evaluation, together),
    "NMS over levels together": ("mask_rcnn", of.test_what_is_inside_of_proposals, together),
    "smooth L1 (RetinaNet)": ("retinanet", of.test_training_step, smooth_l1),
    "smooth L1 (Mask R-CNN)": ("mask_rcnn", of.test_training_step, smooth_l1),
    "no low-quality matches (RetinaNet)": ("retinanet", of.test_which_place_finds_what, only_by_threshold),
    "no low-quality matches (RPN)": ("mask_rcnn", of.test_which_place_finds_what, only_by_threshold),
    "matches of any overlap": (
        "mask_rcnn",
        of.test_which_place_finds_what,
        put(rcnn, "BestToEach", lambda high, low, least: anchors.BestToEach(high, low)),
    ),
    "RoIAlign is not aligned": (
        "mask_rcnn",
        of.test_what_is_inside_of_proposals,
        put(boxes, "roi_align", lambda *args, aligned: torchvision.ops.roi_align(*args)),
    ),
    "RoIAlign with 2 x 2 samples": (
        "mask_rcnn",
        of.test_what_is_inside_of_proposals,
        put(boxes, "roi_align", partial(torchvision.ops.roi_align, sampling_ratio=2)),
    ),
    "2000 proposals": (
        "mask_rcnn",
        of.test_what_is_drawn_of_proposals,
        put(rcnn, "PROPOSALS", {"training": 2000, "testing": 1000}),
    ),
    "objects are not among the proposals": (
        "mask_rcnn",
        of.test_what_is_drawn_of_proposals,
        put(rcnn.RoIHeads, "add_gt_proposals", lambda self, proposals, gt_boxes: proposals),
    ),
    "differences scaled otherwise": (
        "mask_rcnn",
        of.test_what_is_drawn_of_proposals,
        put(boxes.BoundedBoxCoder, "encode_single", twice_the_difference),
    ),
    "soft mask targets": ("mask_rcnn", of.test_what_is_drawn_of_proposals, put(rcnn, "mask_targets", soft_targets)),
    "divided by something else (RetinaNet)": (
        "retinanet",
        of.test_training_step,
        put(retinanet, "mean_over_ranks", lambda count: count + 2),
    ),
    "divided by something else (Mask R-CNN)": (
        "mask_rcnn",
        of.test_training_step,
        put(rcnn, "mean_over_ranks", lambda count: count + 2),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DEVIATIONS)
def test_a_deviation_shows(name, monkeypatch):
    head, test, deviate = DEVIATIONS[name]
    deviate(monkeypatch)
    takes_head = test not in (of.test_what_is_inside_of_proposals, of.test_what_is_drawn_of_proposals)
    with pytest.raises(AssertionError):
        test("micro", head) if takes_head else test("micro")
