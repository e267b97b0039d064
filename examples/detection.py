"""Object detection: torchvision's Faster R-CNN with a feature pyramid on a CrossFormer.

    pip install . torchvision
    python examples/detection.py

Group sizes and intervals fit images of any size. Here it looks for bright squares; put your own images and boxes in
place of ``draw_squares``.
"""

from collections import OrderedDict

import crossformer  # noqa: F401  (registers the backbones)
import timm
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, box_iou
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

STEPS, SIZE, SIDE = 40, 96, 32


class PyramidBackbone(nn.Module):
    """The maps of all stages, at reductions 4, 8, 16 and 32, and one at 64, each of ``out_channels`` channels."""

    def __init__(self, name: str, out_channels: int, **arguments):
        super().__init__()
        self.body = timm.create_model(name, features_only=True, **arguments)
        channels = self.body.feature_info.channels()
        self.fpn = FeaturePyramidNetwork(channels, out_channels, extra_blocks=LastLevelMaxPool())
        self.out_channels = out_channels

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        return self.fpn(OrderedDict((str(i), features) for i, features in enumerate(self.body(images))))


def draw_squares(count: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Noisy images ``(3, H, W)`` with one bright square each, and its box as torchvision's detectors take it."""
    images, targets = [], []
    for _ in range(count):
        image = 0.1 * torch.rand(3, SIZE, SIZE)
        x, y = torch.randint(0, SIZE - SIDE, (2,)).tolist()
        image[:, y : y + SIDE, x : x + SIDE] += 0.8
        images.append(image)
        boxes = torch.tensor([[x, y, x + SIDE, y + SIDE]], dtype=torch.float32)
        targets.append({"boxes": boxes, "labels": torch.tensor([1])})
    return images, targets


def main() -> None:
    torch.manual_seed(0)
    backbone = PyramidBackbone("crossformer_micro", out_channels=64, drop_path_rate=0.0)
    anchors = AnchorGenerator(sizes=((16,), (24,), (32,), (48,), (64,)), aspect_ratios=((1.0,),) * 5)
    few = dict(rpn_post_nms_top_n_train=100, rpn_post_nms_top_n_test=50, box_batch_size_per_image=32)  # for a CPU
    model = FasterRCNN(backbone, num_classes=2, rpn_anchor_generator=anchors, min_size=SIZE, max_size=SIZE, **few)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    for step in range(STEPS):
        loss = sum(model(*draw_squares(4)).values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 19:
            print(f"step {step + 1}  loss {loss:.3f}")
    model.eval()
    images, targets = draw_squares(16)
    with torch.inference_mode():
        found = model(images)
    best = [f["boxes"][:1] if len(f["boxes"]) else torch.zeros(1, 4) for f in found]
    overlaps = torch.cat([box_iou(b, t["boxes"])[0] for b, t in zip(best, targets, strict=True)])
    print(f"mean overlap of the best box with the square: {overlaps.mean():.2f}")


if __name__ == "__main__":
    main()
