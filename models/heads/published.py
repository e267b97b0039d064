"""Weights of detectors as published files name and order them, and as they are here."""

import re

import torch
from torch import Tensor

NAMES = {
    r"bbox_head\.cls_convs\.(\d)\.conv": r"retinanet.head.classification_head.conv.\1.0",
    r"bbox_head\.reg_convs\.(\d)\.conv": r"retinanet.head.regression_head.conv.\1.0",
    r"bbox_head\.retina_cls": r"retinanet.head.classification_head.cls_logits",
    r"bbox_head\.retina_reg": r"retinanet.head.regression_head.bbox_reg",
    r"rpn_head\.rpn_conv": r"rpn.head.conv.0.0",
    r"rpn_head\.rpn_cls": r"rpn.head.cls_logits",
    r"rpn_head\.rpn_reg": r"rpn.head.bbox_pred",
    r"roi_head\.bbox_head\.shared_fcs\.0": r"roi_heads.box_head.fc6",
    r"roi_head\.bbox_head\.shared_fcs\.1": r"roi_heads.box_head.fc7",
    r"roi_head\.bbox_head\.fc_cls": r"roi_heads.box_predictor.cls_score",
    r"roi_head\.bbox_head\.fc_reg": r"roi_heads.box_predictor.bbox_pred",
    r"roi_head\.mask_head\.convs\.(\d)\.conv": r"roi_heads.mask_head.\1.0",
    r"roi_head\.mask_head\.upsample": r"roi_heads.mask_predictor.conv5_mask",
    r"roi_head\.mask_head\.conv_logits": r"roi_heads.mask_predictor.mask_fcn_logits",
    # Cascade: three of each
    r"roi_head\.bbox_head\.(\d)\.shared_convs\.(\d)\.conv": r"roi_heads.stages.\1.box_head.\2.0",
    r"roi_head\.bbox_head\.(\d)\.shared_convs\.(\d)\.bn": r"roi_heads.stages.\1.box_head.\2.1",
    r"roi_head\.bbox_head\.(\d)\.shared_fcs\.0": r"roi_heads.stages.\1.box_head.5",
    r"roi_head\.bbox_head\.(\d)\.fc_cls": r"roi_heads.stages.\1.box_predictor.cls_score",
    r"roi_head\.bbox_head\.(\d)\.fc_reg": r"roi_heads.stages.\1.box_predictor.bbox_pred",
    r"roi_head\.mask_head\.(\d)\.convs\.(\d)\.conv": r"roi_heads.stages.\1.mask_head.\2.0",
    r"roi_head\.mask_head\.(\d)\.upsample": r"roi_heads.stages.\1.mask_predictor.conv5_mask",
    r"roi_head\.mask_head\.(\d)\.conv_logits": r"roi_heads.stages.\1.mask_predictor.mask_fcn_logits",
}
"""Published names of modules, and what they are called here."""


def from_published(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give a detector's weights the names and the order that they have here; others stay as they are.

    The background is the last class in published files and the first here, where it has boxes and masks too, which
    nothing reads: they become zeros.
    """
    result = {}
    for key, value in state_dict.items():
        name = _renamed(key)
        if "box_predictor.cls_score." in name and name != key and len(value):
            value = torch.cat([value[-1:], value[:-1]])
        elif ("box_predictor.bbox_pred." in name or "mask_fcn_logits." in name) and name != key:
            rows = 4 if "bbox_pred" in name else 1
            value = torch.cat([value.new_zeros(rows, *value.shape[1:]), value])
        result[name] = value
    return result


def _renamed(key: str) -> str:
    for published, here in NAMES.items():
        renamed = re.sub(rf"(?:(?<=^)|(?<=\.)){published}(?=\.\w+$)", here, key)
        if renamed != key:
            return renamed
    return key
