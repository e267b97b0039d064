"""What ``torch.hub.load(REPOSITORY, "crossformer_small", ...)`` finds: every variant by its name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "models"))
import crossformer

sys.path.pop(0)

dependencies = ["torch", "timm", "einops"]
globals().update({name: getattr(crossformer.network, name) for name in crossformer.VARIANTS})
