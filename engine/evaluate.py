"""Evaluation: every image counts exactly once, on any number of processes and any batch size."""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from timm.data import ImageNetInfo
from torch import Tensor, nn
from torchvision.transforms.v2.functional import five_crop

from config import output_dir
from data import Loaders, build_loaders
from data.index import ImageIndex
from data.loading import EvalLoader, TrainLoader, naming_dead_workers
from engine.model import check_image_size, compile_in_place, prepare_model, set_training_mode
from engine.precision import Precision, choose_precision
from engine.real_labels import RealLabels, describe_real
from engine.report import Report
from engine.trained import as_ids, named_classes, prepared_otherwise
from engine.validation import facts_of
from models import load_weights
from models.weights import classes_in
from utils import checkpoint
from utils.compat import is_compiled
from utils.distributed import agreement, sum_over_ranks
from utils.errors import UserError
from utils.image_size import height_and_width
from utils.logger import RunLog

IMAGENET = ImageNetInfo("imagenet-1k").label_names()
NUMBERS = set(map(str, range(len(IMAGENET))))
"""The WordNet ids of its 1,000 classes, in order, and these numbers as names."""

NAMES = {"model": "", "ema": "the moving average in "}
"""Weights of a file, in words before its name."""

Views = Callable[[Tensor], list[Tensor]]
"""From images ``(B, 3, H, W)`` to what the model sees of them."""


class Listener(Protocol):
    """Is told every answer of an evaluation."""

    def add(self, logits: Tensor, targets: Tensor, numbers: Tensor) -> None:
        """One batch: ``(B, classes)``, ``(B,)``, and which images these are, ``(B,)``."""


def build_views(config) -> Views:
    """The views that ``TEST.VIEWS`` names, over whose probabilities an evaluation averages."""
    size = list(height_and_width(config.DATA.IMG_SIZE))
    return {
        "none": lambda images: [images],
        "flip": lambda images: [images, images.flip(-1)],
        "five_crop": lambda images: list(five_crop(images, size)),
    }[config.TEST.VIEWS]


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: EvalLoader,
    precision: Precision,
    views: Views,
    among: Tensor | None = None,
    listeners: Sequence[Listener] = (),
) -> dict[str, float]:
    """Top-1 and top-5 in percent, mean cross entropy, and how many images they are of.

    Args:
        model: the plain model, not DDP: ranks may have different batch counts.
        loader: the images; its classes are numbered as the model's.
        precision: of the model.
        views: see :func:`build_views`.
        among: which classes may be answered, ``(classes,)``; all for None.
        listeners: what else wants to know the answers.

    Counts are summed over images and ranks and divided once; the device is not waited for before the end.
    A collective: every rank must call it.
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=loader.device)  # images, top-1, top-5, loss
    ask = in_whole_batches(model, loader.batches.batch_size) if is_compiled(model) else model
    for images, targets, numbers in loader:
        with precision.autocast():
            answers = [ask(view).float() for view in views(images)]
        if among is not None:
            answers = [logits.masked_fill(~among, -math.inf) for logits in answers]
        logits = mean_of_probabilities(answers)
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
        loss = F.cross_entropy(logits, targets, reduction="none").double()
        for listener in listeners:
            listener.add(logits, targets, numbers)
        count = torch.full_like(sums[0], len(targets))
        sums += torch.stack([count, best[:, 0].sum(), best.sum(), loss.sum()])
    if was_training:
        set_training_mode(model)
    images, top1, top5, loss = sum_over_ranks(sums).tolist()
    if images == 0:
        raise UserError(f"no validation image of {loader.dataset.index.root} can be decoded")
    return {"top1": 100 * top1 / images, "top5": 100 * top5 / images, "loss": loss / images, "images": int(images)}


def in_whole_batches(model: Callable[[Tensor], Tensor], batch_size: int) -> Callable[[Tensor], Tensor]:
    """The same for batches of any size up to this one, which is what the model gets to see: images ``(B, 3, H, W)``."""

    def ask(images: Tensor) -> Tensor:
        filled = F.pad(images, (0, 0, 0, 0, 0, 0, 0, batch_size - len(images)))
        return model(filled)[: len(images)].clone()  # the next answer of a CUDA graph is written over this one

    return ask


def mean_of_probabilities(answers: list[Tensor]) -> Tensor:
    """Logits whose probabilities are the mean of those of several ``(B, classes)``."""
    if len(answers) == 1:
        return answers[0]
    return torch.stack([logits.log_softmax(dim=1) for logits in answers]).logsumexp(dim=0) - math.log(len(answers))


def run_evaluation(config, device: torch.device) -> None:
    """``--eval``: evaluate the weights of MODEL.RESUME, and the moving average in it where there is one."""
    with agreement():
        path = config.MODEL.RESUME
        if not path:
            example = output_dir(config) / "checkpoints" / "best.pth"
            raise UserError(f"--eval evaluates a checkpoint: give --resume FILE, for example {example}")
        loaders = build_loaders(config, device, training=False)
        content = checkpoint.read(path)
        candidates = checkpoint.weights_in(content, path)
        if config.MODEL.WEIGHTS != "auto":
            candidates = dict([checkpoint.choose(candidates, config.MODEL.WEIGHTS, path)])
        facts = facts_of(content, path)
        weights = next(iter(candidates.values()))
        classes, present = number_as_the_model(loaders, content, weights, config.MODEL.NAME, path)
        model = prepare_model(config, len(classes), device)
        check_image_size(model, config.DATA.IMG_SIZE, device)
        check_classes(content, classes, path)
        precision, views = choose_precision(config, device), build_views(config)
        among = torch.tensor([name in present for name in classes], device=device) if present else None
        report = Report(classes, device) if config.TEST.REPORT else None
        real = RealLabels(loaders.val.dataset.index, classes, device) if config.TEST.REAL_LABELS else None
        log = RunLog(output_dir(config), config, "evaluate")
    if config.DATA.ON_BAD_IMAGE == "skip":
        loaders.val.on_bad_image = log.bad_image
    compile_in_place(config, model)
    with log, naming_dead_workers():
        if left_out := loaders.left_out():
            log.message(left_out)
        if line := prepared_otherwise(content, config, path):
            log.message(line)
        if classes != loaders.classes:
            log.message(f"the classes are numbered as in {path}")
        if present:
            log.message(f"only the {len(present)} of the model's {len(classes)} classes that the data has are answers")
        turned = ""
        for weights, state_dict in candidates.items():
            with agreement():
                loaded = load_weights(model, state_dict, f"{NAMES[weights]}{path}", allow_new_head=False)
            for line in loaded.notes:
                log.message(f"{weights} of {path}: {line}")
            result = evaluate(model, loaders.val, precision, views, among, [x for x in (report, real) if x])
            with agreement():
                if not math.isfinite(result["loss"]):
                    where = f"{NAMES[weights]}{path}"
                    raise UserError(f"{where} gives answers that are not finite; take an earlier one, or try AMP none")
            turned = turned or describe_turned(loaders.val, config)  # the first pass over the images has told it
            note = f"{weights} of {path}"
            if real:
                result |= real.read()
                note = f"{describe_real(result)}  {note}"
            values = {"step": facts.get("step"), "epoch": facts.get("epoch"), "weights": weights, **result}
            log.evaluation(values, note, checkpoint=path)
            if report:
                log.message(report.write(output_dir(config) / f"report_{weights}"))
        if turned:
            log.message(turned)


def describe_turned(loader: EvalLoader | TrainLoader, config) -> str:
    """A line that says how many images of the first pass EXIF says are turned; empty for none. A collective."""
    counts = sum_over_ranks(torch.tensor([loader.looked_at, loader.turned]))
    looked_at, turned = counts.tolist()
    if not turned:
        return ""
    done = "they were" if config.DATA.UPRIGHT else "they were not: DATA.UPRIGHT True does so"
    return f"EXIF says of {turned:,} of {looked_at:,} images that they are to be turned or mirrored; {done}"


def number_as_the_model(
    loaders: Loaders, content: dict, weights: dict[str, Tensor], name: str, path: str
) -> tuple[list[str], set[str]]:
    """Number the images' classes like the model ``name`` where the data has some of its classes only, or in disorder.

    So a model of ImageNet's 1,000 classes is evaluated on ImageNet-A and -R, which have 200 of them, and on
    ImageNet-V2, whose folders are named by their numbers. What a file says of its classes goes before their order on
    disk.

    Returns:
        the classes of the model, and those that the data has if it has not all of them.
    """
    images, num_classes = loaders.val.dataset.index, classes_in(weights, name)
    known = named_classes(content, num_classes, path)
    if known is None and num_classes == len(IMAGENET):
        known = IMAGENET
    if known is None or known == loaders.classes:
        return loaders.classes, set()
    if not isinstance(images, ImageIndex):  # where it does not name its classes, their numbers are the model's
        return known if images.classes is None else loaders.classes, set()
    present = loaders.classes
    if as_ids(known) == IMAGENET and set(present) == NUMBERS:  # fewer of them are most likely something else
        known, present = IMAGENET, images.rename_classes([IMAGENET[int(number)] for number in present]).classes
    if not set(present) <= set(known):
        ids = as_ids(known), as_ids(present)
        if None in ids or not set(ids[1]) <= set(ids[0]):
            return loaders.classes, set()
        known, present = ids[0], images.rename_classes(ids[1]).classes  # words in one place, WordNet ids in the other
    if len(set(known)) < len(known):
        twice = next(name for name in known if known.count(name) > 1)
        raise UserError(f"{path}: two of its classes are called {twice!r}, so that the data's cannot be told apart")
    images.with_classes(known)
    return known, set(present) if len(present) < len(known) else set()


def check_classes(content: dict, classes: list[str], path: str) -> None:
    """Refuse a checkpoint that was trained on other classes than the data has."""
    trained_on = named_classes(content, None, path) or classes
    if classes not in (trained_on, as_ids(trained_on)) and len(trained_on) == len(classes):
        i = next(i for i, (a, b) in enumerate(zip(trained_on, classes, strict=True)) if a != b)
        raise UserError(
            f"{path} was trained on other classes: its class {i} is {trained_on[i]!r}, the data's {classes[i]!r}"
        )
