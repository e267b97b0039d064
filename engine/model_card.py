"""The card of an exported model, README.md of a folder for the hub."""

import yaml

from config import SETTINGS, WHERE_DATA_LIES, settings_in
from tasks.trained import TrainedModel
from utils import checkpoint


def model_card(trained: TrainedModel, path: str, size: tuple[int, int], licence: str, by_hand: list[str]) -> str:
    """Write it.

    Args:
        path: of the checkpoint.
        size: height and width that the model takes.
        licence: as the hub calls it; empty where nobody has chosen one.
        by_hand: what evaluation does besides, and whoever uses the model has to do.
    """
    name, ours = trained.config.MODEL.NAME, trained.config.MODEL.NAME.startswith("crossformer")
    facts = trained.facts if "top1" in trained.facts else {"weights": trained.facts["weights"]}
    lines = "".join(f"- {line}\n" for line in by_hand)
    besides = f"What evaluation does besides, and the lines above do not:\n\n{lines}\n" if lines else ""
    metrics = "".join(f"- {key}: {value if key == 'weights' else round(value, 4)}\n" for key, value in facts.items())
    return f"""---
library_name: timm
pipeline_tag: image-classification
{yaml.safe_dump({"license": licence}) if licence else ""}tags: [image-classification, timm{", crossformer" * ours}]
---

# {name}

An image classifier with {len(trained.classes)} classes, for images of {size[0]} x {size[1]} pixels.
{"" if licence else f"{NO_LICENCE}{chr(10)}"}
```python
import timm, torch
from PIL import Image
{"import crossformer  # after pip install of the CrossFormer trainer's folder" if ours else ""}
model = timm.create_model("local-dir:.", pretrained=True).eval()  # this folder; on the hub "hf-hub:OWNER/NAME"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
with torch.inference_mode():
    logits = model(transform(Image.open("image.png").convert("RGB")).unsqueeze(0))
print(model.pretrained_cfg["label_names"][logits.argmax()])
```

{besides}## Metrics

{metrics}
## Settings that differ from the trainer's defaults

```yaml
{run_settings(path)}```
"""


NO_LICENCE = "Its author has not said under which licence it may be used."


def run_settings(path: str) -> str:
    """The settings of a checkpoint, but for its paths, as a file for ``--cfg``."""
    saved = checkpoint.read(path).get("config")
    if not isinstance(saved, str):
        return "# the checkpoint does not name them\n"
    there = settings_in(saved, path)
    differing = {k: v for k, v in there.items() if k not in WHERE_DATA_LIES and v != SETTINGS[k].default}
    return yaml.safe_dump(differing, sort_keys=False)
