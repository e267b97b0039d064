"""Semantic segmentation: a U-Net of segmentation-models-pytorch on a CrossFormer.

    pip install . segmentation-models-pytorch
    python examples/segmentation.py

Here it learns to tell a bright disc from its background; put your own images and masks in place of ``draw_discs``.
"""

import crossformer  # noqa: F401  (registers the encoders)
import segmentation_models_pytorch as smp
import torch
from torch import Tensor

STEPS, SIZE = 30, 64


def draw_discs(count: int) -> tuple[Tensor, Tensor]:
    """Noisy images ``(B, 3, H, W)`` with one disc each, and masks ``(B, H, W)`` that are 1 on it."""
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    centre_y, centre_x = torch.randint(16, SIZE - 16, (2, count, 1, 1))
    masks = ((y - centre_y) ** 2 + (x - centre_x) ** 2 < 12**2).long()
    return masks[:, None] + 0.3 * torch.randn(count, 3, SIZE, SIZE), masks


def main() -> None:
    torch.manual_seed(0)
    # any variant; encoder_weights="imagenet" is for models whose weights can be downloaded, load a file's instead:
    # model.encoder.model.model.load_state_dict(crossformer.checkpoint_filter_fn(weights), strict=False)
    model = smp.Unet("tu-crossformer_micro", encoder_weights=None, classes=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(STEPS):
        images, masks = draw_discs(8)
        loss = torch.nn.functional.cross_entropy(model(images), masks)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            print(f"step {step + 1}  loss {loss:.3f}")
    model.eval()
    images, masks = draw_discs(32)
    with torch.inference_mode():
        found = model(images).argmax(dim=1)
    overlap = (found & masks).sum() / (found | masks).sum()
    print(f"intersection over union of the discs: {overlap:.2f}")


if __name__ == "__main__":
    main()
