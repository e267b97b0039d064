"""Exports of a trained model: written, loaded again and compared with it."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, cast

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor, nn

from config import CLASSES, WHERE_DATA_LIES, build_config, flatten
from engine.any_size import COMPARED, STEP, OfMultiples, SizeRange, check_in_onnx, range_around
from engine.exported import open_onnx
from engine.int8 import Validation, quantise
from engine.model_card import model_card
from models.build import ARCHITECTURE
from models.heads import AtImageSize, Detector, FixedDetector, Segmenter, largest_differences
from tasks.trained import SAID_BESIDES, TrainedModel, build
from utils.checkpoint import SETTINGS_KEY
from utils.errors import UserError
from utils.files import writing
from utils.settings import get
from utils.silence import in_silence
from utils.timing import seconds

TOLERANCE = 1e-4
OPSET = 20
PIXELS_OF_A_BOX = 0.01
DETECTIONS_COMPARED = 5
"""So many images are compared of a detector."""
TIMED_BATCH, ROUNDS, SECONDS_PER_ROUND = 8, 5, 0.2


class Wanted(NamedTuple):
    """What an export is to be.

    Attributes:
        form: one of FORMATS.
        image_size: height and width.
        any_batch: take batches of any size and not of one image alone.
        any_size: take images of other sizes too, as far as one graph can.
        licence: as the hub calls it; empty where nobody has chosen one.
        int8: compute in int8 what can be; for ``onnx``.
        data_path: where the data for that lies; empty for where the run had it.
    """

    form: str
    image_size: tuple[int, int]
    any_batch: bool = False
    any_size: bool = False
    licence: str = ""
    int8: bool = False
    data_path: str = ""


class Source(NamedTuple):
    """What to export, and how.

    Attributes:
        path: of the checkpoint.
        sizes: of the images; None for the one size alone.
    """

    trained: TrainedModel
    path: str
    wanted: Wanted
    sizes: SizeRange | None

    def example(self) -> Tensor:
        """Images as it takes them, ``(B, 3, H, W)``."""
        size = self.sizes.examples()[0] if self.sizes else self.wanted.image_size
        return torch.randn(2 if self.wanted.any_batch else 1, 3, *size)

    def dynamic_shapes(self) -> tuple | None:
        """What of that may differ, as torch.export wants it."""
        shapes = {0: torch.export.Dim("batch")} if self.wanted.any_batch else {}
        shapes |= self.sizes.dynamic_shape() if self.sizes else {}
        return (shapes,) if shapes else None

    def input_size(self) -> list[int]:
        """Channels, height and width, as timm has them."""
        return [3, *self.wanted.image_size]

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
            size = dict(input_size=self.input_size(), interpolation="bilinear", crop_mode="none")
            return size | dict(mean=data.MEAN, std=data.STD)
        crop = dict(crop_pct=test.CROP_PCT, crop_mode="center") if test.CROP else dict(crop_pct=1.0, crop_mode="squash")
        size = dict(input_size=self.input_size(), interpolation=data.INTERPOLATION)
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
        described |= {"sizes": self.sizes.said()} if self.sizes else {}
        return {key: json.dumps(value) for key, value in (described | self.trained.facts).items()}


def as_graph(model: nn.Module) -> nn.Module:
    """A segmenter's logits have the size of the image, a detector's answers a fixed one."""
    if isinstance(model, Detector):
        return FixedDetector(model)
    return AtImageSize(model) if isinstance(model, Segmenter) else model


def torch_export(source: Source, path: Path) -> Callable:
    graph = OfMultiples(source.graph()) if source.sizes else source.graph()
    program = torch.export.export(graph, (source.example(),), dynamic_shapes=source.dynamic_shapes())
    torch.export.save(program, path, extra_files=source.metadata())
    return torch.export.load(path).module()


def onnx(source: Source, path: Path) -> Callable:
    how: dict[str, Any] = dict(dynamo=True, opset_version=OPSET, input_names=["images"], output_names=source.outputs())
    program = torch.onnx.export(source.graph(), (source.example(),), dynamic_shapes=source.dynamic_shapes(), **how)
    assert program is not None
    program.save(path, external_data=False)
    if source.sizes:
        check_in_onnx(path, source.sizes)
    add_metadata(path, source.metadata())
    return open_onnx(str(path)).run


def add_metadata(path: Path, metadata: dict[str, str]) -> None:
    """Let an ONNX file say these."""
    import onnx

    model = onnx.load(path)
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, path)


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
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    config["model_args"].pop("num_classes", None)  # it is said besides, and transformers would give it twice
    config["pretrained_cfg"].pop("license", None)
    config["pretrained_cfg"] |= {"license": source.wanted.licence} if source.wanted.licence else {}
    (path / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    by_hand = left_to_the_caller(source)
    card = model_card(source.trained, source.path, source.wanted.image_size, source.wanted.licence, by_hand)
    (path / "README.md").write_text(card, encoding="utf-8")
    return timm.create_model(f"local-dir:{path}", pretrained=True).eval()


FORMATS = {"torch_export": torch_export, "onnx": onnx, "safetensors": safetensors, "hf": hf}
SUFFIXES = {"torch_export": ".pt2", "onnx": ".onnx", "safetensors": ".safetensors", "hf": "-hf"}
VIEWS_BY_HAND = {
    "flip": "average the probabilities of an image and its mirror image",
    "five_crop": "average the probabilities of the centre and the four corners of the resized square",
}
GRAPHS = ("torch_export", "onnx")
"""Formats that hold the computation too, for which the size of a batch has to be decided."""


def images_per_second(functions: list[Callable], images: Tensor) -> list[float]:
    """Medians of rounds in which each function has its turn."""
    turns = [partial(function, images) for function in functions]
    calls = max(1, round(SECONDS_PER_ROUND / max(map(seconds, turns))))
    rounds = [[len(images) / seconds(turn, calls) for turn in turns] for _ in range(ROUNDS)]
    return [median(speeds) for speeds in zip(*rounds, strict=True)]


def left_to_the_caller(source: Source) -> list[str]:
    """What evaluation does besides, and whoever uses the export has to do; its metadata says it too."""
    besides, lines, test = source.besides(), [], source.trained.config.TEST
    if source.segments:
        lines.append(
            f"{'' if source.sizes else 'it takes one size: '}evaluation brings images within "
            f"{test.RESIZE[0]} x {test.RESIZE[1]} pixels, sides up to multiples of {test.MULTIPLE} (bilinear), and "
            "resizes the logits to the image"
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


def batches_to_compare(source: Source) -> list[Tensor]:
    """Random images of all the kinds of batches and sizes that the export says it takes."""
    if source.sizes:
        counts = (1, 2, 3, 1, 2) if source.wanted.any_batch else (1,) * COMPARED
        return [torch.randn(n, 3, *size) for n, size in zip(counts, source.sizes.examples(), strict=False)]
    counts = (1,) * DETECTIONS_COMPARED if source.detects else (1, 2, 3) if source.wanted.any_batch else (1, 1)
    return [torch.randn(n, 3, *source.wanted.image_size) for n in counts]


def describe_taken(source: Source, batches: list[Tensor]) -> str:
    """Say which images it takes."""
    number = "batches of any size" if source.wanted.any_batch else "one image"
    if not source.sizes:
        height, width = source.wanted.image_size
        return f"{number} of {height} x {width} pixels"
    seen = ", ".join(f"{images.shape[2]} x {images.shape[3]}" for images in batches)
    return f"{number} with sides of {source.sizes.describe()} pixels, multiples of {STEP}; compared at {seen}"


def make(source: Source, path: Path) -> None:
    """Write the format that is wanted, compare and time it; what is found is printed."""
    name, model, batches = source.wanted.form, source.graph(), batches_to_compare(source)
    with in_silence():
        exported = FORMATS[name](source, path)
        differences = compare(source, [(model(images), exported(images)) for images in batches])
    for line in left_to_the_caller(source):
        print(line)
    print(f"{source.trained.config.MODEL.NAME} as {name} takes {describe_taken(source, batches)}")
    for what, difference, allowed in differences:
        print(f"largest difference of a {what} to the model's own: {difference:.1e} (allowed: {allowed:.0e})")
        if not difference <= allowed:
            raise UserError(f"{name} gives other {what}s than the model: {difference:.1e} is above {allowed:.0e}")
    if name in GRAPHS:
        images = torch.randn(TIMED_BATCH if source.wanted.any_batch else 1, 3, *source.wanted.image_size)
        print_speeds(len(images), images_per_second([exported, model], images), "the model")


@contextmanager
def naming_failures(source: Source) -> Iterator[None]:
    """Raise a :class:`UserError` for whatever goes wrong in the block."""
    name = source.wanted.form
    try:
        yield
    except (UserError, OSError):
        raise
    except ImportError as error:
        raise UserError(
            f"--format {name}: its packages do not fit torch {torch.__version__} ({error}); "
            "pip install --upgrade onnx onnxscript onnxruntime"
        ) from error
    except Exception as error:  # an exporter meets arbitrary models and fails in arbitrary ways
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{source.path} cannot be exported as {name}: {reason}") from error


def print_speeds(batch: int, speeds: list[float], other: str) -> None:
    there, here = speeds
    print(f"images/s, {batch} at a time: {there:.1f}, {other} {here:.1f}, ratio {there / here:.2f}")


def make_int8(source: Source, path: Path, validation: Validation) -> None:
    """Let the ONNX file at ``path`` give way to one that computes in int8; what is found is printed."""
    wanted, in_float = source.wanted, path.with_name("float.onnx")
    os.replace(path, in_float)
    print(*validation.notes, quantise(in_float, path, validation), sep="\n")
    add_metadata(path, source.metadata() | {"quantisation": json.dumps("int8")})
    sizes = [file.stat().st_size / 2**20 for file in (path, in_float)]
    print(f"the file has {sizes[0]:.1f} MiB, in float {sizes[1]:.1f} MiB")
    images = torch.randn(TIMED_BATCH if wanted.any_batch else 1, 3, *wanted.image_size)
    speeds = images_per_second([open_onnx(str(file)).run for file in (path, in_float)], images)
    print_speeds(len(images), speeds, "in float")


def compare(source: Source, answers: list[tuple[Any, Any]]) -> list[tuple[str, float, float]]:
    """Tell what of the model's and the export's answers differs the most, by how much, and by how much it may."""
    if not source.detects:
        differences = [(own - other).abs().max() for own, other in answers]
        return [("logit", torch.stack(differences).max().item(), TOLERANCE)]
    scores, boxes = zip(*(largest_differences(own, other) for own, other in answers), strict=True)
    return [("score", max(scores), TOLERANCE), ("box", max(boxes), PIXELS_OF_A_BOX)]


@torch.no_grad()
def export(trained: TrainedModel, path: str, wanted: Wanted, target: Path) -> None:
    """Write a model as ``target``, a file or for ``hf`` a folder, and print what there is to know of it.

    What was written is loaded again and must give the same logits as the model; only then does it get its name. What
    computes in int8 must answer about as many of the validation images right.

    Args:
        trained: the model, on the CPU.
        path: of its checkpoint.

    Raises:
        UserError: it cannot be exported, gives other logits, or ``target`` cannot be written.
    """
    trained.model.to(memory_format=torch.contiguous_format)
    torch.manual_seed(0)
    detects, classifies = isinstance(trained.model, Detector), trained.config.TASK == CLASSES
    if detects and wanted.form in GRAPHS and (wanted.any_batch or wanted.any_size):
        flag = "--dynamic-batch" if wanted.any_batch else "--dynamic-size"
        raise UserError(f"{flag} is not for detectors, which take one image of one size; leave it out")
    if wanted.int8 and not classifies:
        raise UserError(f"--int8 is for classifiers; {path} is for {trained.config.TASK}")
    wanted = wanted._replace(any_batch=wanted.any_batch and not detects)
    sizes = range_around(trained.model, trained.config.MODEL.NAME, wanted.image_size) if wanted.any_size else None
    source, as_folder = Source(trained, path, wanted, sizes), wanted.form == "hf"
    with writing(target, "choose another --to"):
        if target.resolve() == Path(path).resolve() or not may_replace(target, as_folder):
            raise UserError(f"{target} is there and not to be replaced; choose another --to")
        validation = Validation(trained, path, wanted.data_path, wanted.image_size) if wanted.int8 else None
        near = target if target.is_dir() else next(folder for folder in target.parents if os.path.lexists(folder))
        with TemporaryDirectory(prefix=".export-", dir=near) as folder:
            written = Path(folder, "exported" + SUFFIXES[wanted.form])
            with naming_failures(source):
                make(source, written)
                if validation:
                    make_int8(source, written, validation)
            (target if as_folder else target.parent).mkdir(parents=True, exist_ok=True)
            for file in [*written.iterdir()] if as_folder else [written]:
                let_others_read(file)
                os.replace(file, target / file.name if as_folder else target)


def let_others_read(file: Path) -> None:
    """Give a file the mode that new ones have here; safetensors are for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    file.chmod(0o666 & ~mask)


def may_replace(target: Path, as_folder: bool) -> bool:
    """Whether nothing is lost: a file gives way to a file, a model's folder to another's files."""
    if target.is_dir():
        return as_folder and ((target / "config.json").is_file() or not any(target.iterdir()))
    return not (as_folder and target.exists())
