"""Where a detector looks, and which object each of these places is to find.

The classes are torchvision's, made to compute what was published (arXiv 1708.02002, 1506.01497).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

CPU = torch.device("cpu")
RATIOS = 0.5, 1.0, 2.0
"""Height over width."""


class ExactAnchors(AnchorGenerator):
    """Anchors that are not rounded, as far apart as the strides say whatever the size of the image.

    Args:
        strides: of each level, in pixels.
        scales: sides of its square anchors, in strides.
    """

    def __init__(self, strides: Sequence[int], scales: Sequence[float]):
        self.strides = tuple(strides)
        self.cell_anchors: list[Tensor]
        super().__init__(
            tuple(tuple(stride * scale for scale in scales) for stride in strides), (RATIOS,) * len(strides)
        )

    def generate_anchors(self, scales, aspect_ratios, dtype=torch.float32, device=CPU) -> Tensor:
        """Give the anchors around the origin, ``(ratios * scales, 4)``."""
        sides = [(side / ratio**0.5 / 2, side * ratio**0.5 / 2) for ratio in aspect_ratios for side in scales]
        return torch.tensor([[-x, -y, x, y] for x, y in sides], dtype=dtype, device=device)

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        """Have the anchors around the origin on a device; made anew, as a model may have been built without memory."""
        now = self.cell_anchors[0]
        if (now.dtype, now.device) != (dtype, device):
            kinds = zip(self.sizes, self.aspect_ratios, strict=True)
            self.cell_anchors = [self.generate_anchors(sides, ratios, dtype, device) for sides, ratios in kinds]

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Give the anchors of all levels for each image, ``(N, 4)`` in pixels: by level, y, x, ratio, scale."""
        first = feature_maps[0]
        self.set_cell_anchors(torch.promote_types(first.dtype, torch.float32), first.device)
        sizes = [list(each.shape[-2:]) for each in feature_maps]
        anchors = torch.cat(self.grid_anchors(sizes, [[stride, stride] for stride in self.strides]))
        return [anchors for _ in image_list.image_sizes]


class BestToEach(Matcher):
    """Gives each object those places besides that overlap with it the most, even where another one fits them better.

    Args:
        high: overlap (IoU) from which a place has to find the object that it overlaps with the most.
        low: overlap below which it is background; between both it is left out.
        least: overlap that an object's best places must have.
    """

    def __init__(self, high: float, low: float, least: float = 0.0):
        super().__init__(high, low, allow_low_quality_matches=True)
        self.least = least

    def set_low_quality_matches_(self, matches: Tensor, all_matches: Tensor, match_quality_matrix: Tensor) -> None:
        """Change ``matches`` ``(N,)`` by what is best in ``match_quality_matrix`` ``(objects, N)``."""
        best = match_quality_matrix.amax(dim=1, keepdim=True)
        objects, places = torch.where((match_quality_matrix == best) & (best >= self.least) & (best > 0))
        taken = torch.full_like(matches, -1).scatter_reduce(0, places, objects, "amax")  # of several objects the last
        matches.copy_(torch.where(taken >= 0, taken, matches))
