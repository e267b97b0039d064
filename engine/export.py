"""Exports of a trained model: written, loaded again and compared with it."""

import io
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, cast

import timm
import torch
import yaml
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor, nn

from config import SETTINGS, WHERE_DATA_LIES, build_config, flatten, settings_in
from models.build import ARCHITECTURE
from models.heads import AtImageSize, Detector, FixedDetector, Segmenter, largest_differences
from tasks.trained import SAID_BESIDES, TrainedModel, build
from utils import checkpoint
from utils.checkpoint import SETTINGS_KEY
from utils.errors import UserError
from utils.files import writing
from utils.settings import get
from utils.timing import seconds

TOLERANCE = 1e-4
OPSET = 20
PIXELS_OF_A_BOX = 0.01
DETECTIONS_COMPARED = 5
"""So many images are compared of a detector."""
TIMED_BATCH, ROUNDS, SECONDS_PER_ROUND = 8, 5, 0.2


class Source(NamedTuple):
    """What to export, and an example of what it takes; without ``dynamic_shapes`` in batches of that size alone.

    Attributes:
        path: of the checkpoint.
        images: ``(B, 3, H, W)``.
    """

    trained: TrainedModel
    path: str
    images: Tensor
    dynamic_shapes: tuple | None

    @property
    def segments(self) -> bool:
        """Whether it tells the class of each pixel."""
        return isinstance(self.trained.model, Segmenter)

    @property
    def detects(self) -> bool:
        """Whether it finds objects."""
        return isinstance(self.trained.model, Detector)

    def graph(self) -> nn.Module:
        """What is to be computed."""
        return as_graph(self.trained.model)

    def outputs(self) -> list[str]:
        """The names of what it computes."""
        if not self.detects:
            return ["logits"]
        return ["boxes", "scores", "labels", "masks"][: 4 if cast(Detector, self.trained.model).finds_masks else 3]

    def preparation(self) -> dict[str, Any]:
        """How an image becomes the model's input, in timm's words."""
        data, test = self.trained.config.DATA, self.trained.config.TEST
        if self.segments or self.detects:
            size = dict(input_size=list(self.images.shape[1:]), interpolation="bilinear", crop_mode="none")
            return size | dict(mean=data.MEAN, std=data.STD)
        crop = dict(crop_pct=test.CROP_PCT, crop_mode="center") if test.CROP else dict(crop_pct=1.0, crop_mode="squash")
        size = dict(input_size=list(self.images.shape[1:]), interpolation=data.INTERPOLATION)
        return size | crop | dict(mean=data.MEAN, std=data.STD)

    def besides(self) -> dict[str, Any]:
        """What belongs to the preparation too, but timm has no words for.

        ``scale`` is what grey levels from 0 to 255 are multiplied by before mean and deviation are for them; ``resize``
        the height and width that an image is to cover before the crop, or to have where there is none.
        """
        said = {name: get(self.trained.config, key) for name, key in SAID_BESIDES.items()}
        said |= {"channels": "RGB", "scale": 1 / 255}
        if not self.segments and not self.detects:
            preparation = self.preparation()
            said["resize"] = [round(side / preparation["crop_pct"]) for side in preparation["input_size"][1:]]
        return said

    def settings(self) -> str:
        """Those of the run but for its paths, as a checkpoint has them: anchors, say, are in no weight."""
        kept = [(key, value, "") for key, value in flatten(self.trained.config).items() if key not in WHERE_DATA_LIES]
        return build_config(flags=kept).dump()

    def metadata(self) -> dict[str, str]:
        """What travels with the weights, each as JSON."""
        model, classes = self.trained.config.MODEL, self.trained.classes
        arguments = {name: model.CROSSFORMER[key] for key, name in ARCHITECTURE.items() if model.CROSSFORMER[key]}
        described = dict(architecture=model.NAME, model_args=arguments, classes=classes)
        described["class_ids"] = self.trained.class_ids
        described |= {"head": model.HEAD} if self.segments or self.detects else {}
        described |= self.preparation() | self.besides() | {SETTINGS_KEY: self.settings()}
        return {key: json.dumps(value) for key, value in (described | self.trained.facts).items()}


def as_graph(model: nn.Module) -> nn.Module:
    """A segmenter's logits have the size of the image, a detector's answers a fixed one."""
    if isinstance(model, Detector):
        return FixedDetector(model)
    return AtImageSize(model) if isinstance(model, Segmenter) else model


def torch_export(source: Source, path: Path) -> Callable:
    program = torch.export.export(source.graph(), (source.images,), dynamic_shapes=source.dynamic_shapes)
    torch.export.save(program, path, extra_files=source.metadata())
    return torch.export.load(path).module()


def onnx(source: Source, path: Path) -> Callable:
    import onnxruntime

    how: dict[str, Any] = dict(dynamo=True, opset_version=OPSET, input_names=["images"], output_names=source.outputs())
    program = torch.onnx.export(source.graph(), (source.images,), dynamic_shapes=source.dynamic_shapes, **how)
    assert program is not None
    program.model.metadata_props.update(source.metadata())
    program.save(path, external_data=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Any:
        found = [torch.from_numpy(part) for part in session.run(source.outputs(), {"images": images.numpy()})]
        return found[0] if len(found) == 1 else tuple(found)

    return run


def safetensors(source: Source, path: Path) -> Callable:
    save_file(source.trained.model.state_dict(), path, source.metadata())
    weights = load_file(path)
    model = build(source.trained.config, weights, str(path))
    model.load_state_dict(weights)
    return as_graph(model.eval())


def hf(source: Source, path: Path) -> Callable:
    if source.segments or source.detects:
        raise UserError("--format hf is for classifiers, as timm is; use onnx, torch_export or safetensors")
    said = {"label_names": source.trained.classes, "class_ids": source.trained.class_ids, **source.besides()}
    save_for_hf(source.trained.model, str(path), said, safe_serialization=True, data_config=source.preparation())
    (path / "README.md").write_text(model_card(source), encoding="utf-8")
    return timm.create_model(f"local-dir:{path}", pretrained=True).eval()


FORMATS = {"torch_export": torch_export, "onnx": onnx, "safetensors": safetensors, "hf": hf}
SUFFIXES = {"torch_export": ".pt2", "onnx": ".onnx", "safetensors": ".safetensors", "hf": "-hf"}
VIEWS_BY_HAND = {
    "flip": "average the probabilities of an image and its mirror image",
    "five_crop": "average the probabilities of the centre and the four corners of the resized square",
}
GRAPHS = ("torch_export", "onnx")
"""Formats that hold the computation too, for which the size of a batch has to be decided."""


def model_card(source: Source) -> str:
    trained, (height, width) = source.trained, source.images.shape[-2:]
    name, ours = trained.config.MODEL.NAME, trained.config.MODEL.NAME.startswith("crossformer")
    facts = trained.facts if "top1" in trained.facts else {"weights": trained.facts["weights"]}
    by_hand = "".join(f"- {line}\n" for line in left_to_the_caller(source))
    by_hand = f"What evaluation does besides, and the lines above do not:\n\n{by_hand}\n" if by_hand else ""
    metrics = "".join(f"- {key}: {value if key == 'weights' else round(value, 4)}\n" for key, value in facts.items())
    return f"""---
library_name: timm
pipeline_tag: image-classification
license: {cast(Any, trained.model).pretrained_cfg.get("license") or "mit"}
tags: [image-classification, timm{", crossformer" * ours}]
---

# {name}

An image classifier with {len(trained.classes)} classes, for images of {height} x {width} pixels.

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

{by_hand}## Metrics

{metrics}
## Settings that differ from the trainer's defaults

```yaml
{run_settings(source.path)}```
"""


def run_settings(path: str) -> str:
    """As a file for ``--cfg``."""
    saved = checkpoint.read(path).get("config")
    if not isinstance(saved, str):
        return "# the checkpoint does not name them\n"
    there = settings_in(saved, path)
    differing = {k: v for k, v in there.items() if k not in WHERE_DATA_LIES and v != SETTINGS[k].default}
    return yaml.safe_dump(differing, sort_keys=False)


def images_per_second(functions: list[Callable], images: Tensor) -> list[float]:
    """Medians of rounds in which each function has its turn."""
    turns = [partial(function, images) for function in functions]
    calls = max(1, round(SECONDS_PER_ROUND / max(map(seconds, turns))))
    rounds = [[len(images) / seconds(turn, calls) for turn in turns] for _ in range(ROUNDS)]
    return [median(speeds) for speeds in zip(*rounds, strict=True)]


@contextmanager
def in_silence() -> Iterator[None]:
    """Exporters tell their own story at length; what matters of it is raised."""
    with warnings.catch_warnings(action="ignore"), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def left_to_the_caller(source: Source) -> list[str]:
    """What evaluation does besides, and whoever uses the export has to do; its metadata says it too."""
    besides, lines, test = source.besides(), [], source.trained.config.TEST
    if source.segments:
        lines.append(
            f"it takes one size: evaluation brings images within {test.RESIZE[0]} x {test.RESIZE[1]} pixels, sides "
            f"up to multiples of {test.MULTIPLE} (bilinear), and resizes the logits to the image"
        )
        if test.WINDOW or test.SCALES != [1.0]:
            lines.append("TEST.WINDOW and TEST.SCALES are not in it: compute views and average their probabilities")
    if source.detects:
        lines.append(
            f"it takes one image of one size: evaluation brings images within {test.RESIZE[0]} x {test.RESIZE[1]} "
            f"pixels (bilinear) and pads right and bottom with 0 to multiples of {test.MULTIPLE}"
        )
        lines.append(
            "boxes are in pixels of what it takes; it looks into the padding too: fill its size as far as you can, and "
            "leave out what it finds there"
        )
        lines.append("low scores are not left out; masks are probabilities within the boxes, to be resized to them")
    if besides["views"] != "none":
        lines.append(f"TEST.VIEWS {besides['views']} is not in it: {VIEWS_BY_HAND[besides['views']]}")
    if besides["upright"]:
        lines.append("DATA.UPRIGHT is not in it: turn images as EXIF says (PIL.ImageOps.exif_transpose)")
    if besides["white"]:
        lines.append(f"DATA.WHITE is not in it: scale grey images of more than 8 bits by 255 / {besides['white']:g}")
    return lines


def make(name: str, source: Source, path: Path) -> None:
    """Write the format ``name``, compare and time it; what is found is printed."""
    model, (height, width) = source.graph(), source.images.shape[2:]
    any_batch = source.dynamic_shapes is not None
    sizes = (1,) * DETECTIONS_COMPARED if source.detects else (1, 2, 3) if any_batch else (1, 1)
    batches = [torch.randn(n, 3, height, width) for n in sizes]
    try:
        with in_silence():
            exported = FORMATS[name](source, path)
            differences = compare(source, [(model(images), exported(images)) for images in batches])
    except UserError:
        raise
    except ImportError as error:
        raise UserError(
            f"--format {name}: its packages do not fit torch {torch.__version__} ({error}); "
            "pip install --upgrade onnx onnxscript onnxruntime"
        ) from error
    except Exception as error:  # an exporter meets arbitrary models and fails in arbitrary ways
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{source.path} cannot be exported as {name}: {reason}") from error
    for line in left_to_the_caller(source):
        print(line)
    takes = f"{'batches of any size' if any_batch else 'one image'} of {height} x {width} pixels"
    print(f"{source.trained.config.MODEL.NAME} as {name} takes {takes}")
    for what, difference, allowed in differences:
        print(f"largest difference of a {what} to the model's own: {difference:.1e} (allowed: {allowed:.0e})")
        if not difference <= allowed:
            raise UserError(f"{name} gives other {what}s than the model: {difference:.1e} is above {allowed:.0e}")
    if name in GRAPHS:
        images = torch.randn(TIMED_BATCH if any_batch else 1, 3, height, width)
        there, here = images_per_second([exported, model], images)
        print(f"images/s, {len(images)} at a time: {there:.1f}, the model {here:.1f}, ratio {there / here:.2f}")


def compare(source: Source, answers: list[tuple[Any, Any]]) -> list[tuple[str, float, float]]:
    """Tell what of the model's and the export's answers differs the most, by how much, and by how much it may."""
    if not source.detects:
        return [("logit", torch.cat([own - other for own, other in answers]).abs().max().item(), TOLERANCE)]
    scores, boxes = zip(*(largest_differences(own, other) for own, other in answers), strict=True)
    return [("score", max(scores), TOLERANCE), ("box", max(boxes), PIXELS_OF_A_BOX)]


@torch.no_grad()
def export(
    trained: TrainedModel, path: str, form: str, image_size: tuple[int, int], any_batch: bool, target: Path
) -> None:
    """Write a model as ``target``, a file or for ``hf`` a folder, and print what there is to know of it.

    What was written is loaded again and must give the same logits as the model; only then does it get its name.

    Args:
        trained: the model, on the CPU.
        path: of its checkpoint.
        form: one of FORMATS.
        image_size: height and width.
        any_batch: take batches of any size and not of one image alone.

    Raises:
        UserError: it cannot be exported, gives other logits, or ``target`` cannot be written.
    """
    trained.model.to(memory_format=torch.contiguous_format)
    torch.manual_seed(0)
    if isinstance(trained.model, Detector):
        if any_batch and form in GRAPHS:
            raise UserError("--dynamic-batch is not for detectors, which take one image; leave it out")
        any_batch = False
    shapes = ({0: torch.export.Dim("batch")},) if any_batch else None
    source, as_folder = Source(trained, path, torch.randn(2 if any_batch else 1, 3, *image_size), shapes), form == "hf"
    with writing(target, "choose another --to"):
        if target.resolve() == Path(path).resolve() or not may_replace(target, as_folder):
            raise UserError(f"{target} is there and not to be replaced; choose another --to")
        with TemporaryDirectory(prefix=".export-", dir=target if target.is_dir() else target.parent) as folder:
            written = Path(folder, "exported" + SUFFIXES[form])
            make(form, source, written)
            if as_folder:
                target.mkdir(exist_ok=True)
            for file in written.iterdir() if as_folder else [written]:
                os.replace(file, target / file.name if as_folder else target)


def may_replace(target: Path, as_folder: bool) -> bool:
    """Whether nothing is lost: a file gives way to a file, a model's folder to another's files."""
    if target.is_dir():
        return as_folder and ((target / "config.json").is_file() or not any(target.iterdir()))
    return not (as_folder and target.exists())
