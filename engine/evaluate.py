"""Evaluation: every sample counts exactly once, on any number of processes and any batch size."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config, output_dir
from data.files import describe_left_out
from data.loading import EvalLoader, describe_turned, naming_dead_workers
from engine.model import check_image_size, compile_in_place, prepare_model, set_training_mode
from engine.precision import Precision, choose_precision
from engine.resume import read_on_main
from models import load_weights
from tasks import Evaluator, Task, build_task
from utils import checkpoint
from utils.bar import bar
from utils.compat import is_compiled
from utils.distributed import agreement, count_over_ranks
from utils.errors import UserError
from utils.fields import facts_of
from utils.logger import RunLog

NAMES = {"model": "", "ema": "the moving average in "}
"""Weights of a file, in words before its name."""


@torch.inference_mode()
def evaluate(model: nn.Module, loader: EvalLoader, precision: Precision, evaluator: Evaluator) -> dict[str, float]:
    """Give the evaluator's metrics of a model. A collective: every rank must call it.

    Args:
        model: the plain model, not DDP: ranks may have different batch counts.
        loader: the samples of this rank.
    """
    was_training = model.training
    model.eval()
    ask = for_any_batch(model, loader)
    samples = 0
    for done, batch in enumerate(loader):
        bar.doing("evaluating", f"{100 * done // len(loader)} %")
        with precision.autocast():
            evaluator.add(ask, batch)
        samples += len(batch.images)
    if was_training:
        set_training_mode(model)
    if count_over_ranks(samples) == 0:
        raise UserError(f"no validation image of {loader.dataset.index.root} can be decoded")
    return evaluator.result()


def for_any_batch(model: nn.Module, loader: EvalLoader) -> Callable[[Tensor], Tensor]:
    """What takes the loader's batches: a compiled model would be compiled anew for each size of batch or image."""
    if not is_compiled(model):
        return model
    return in_whole_batches(model, loader.batches.batch_size) if loader.size else model.forward


def in_whole_batches(model: Callable[[Tensor], Tensor], batch_size: int) -> Callable[[Tensor], Tensor]:
    """The same for batches of any size up to this one, which is what the model gets to see: images ``(B, 3, H, W)``."""

    def ask(images: Tensor) -> Tensor:
        filled = F.pad(images, (0, 0, 0, 0, 0, 0, 0, batch_size - len(images)))
        return model(filled)[: len(images)].clone()  # the next answer of a CUDA graph is written over this one

    return ask


def run_evaluation(config: Config, device: torch.device, choose_task: Callable[..., Task] = build_task) -> None:
    """``--eval``: evaluate the weights of MODEL.RESUME, and the moving average in it where there is one."""
    path = config.MODEL.RESUME
    with agreement():
        if not path:
            example = output_dir(config) / "checkpoints" / "best.pth"
            raise UserError(f"--eval evaluates a checkpoint: give --resume FILE, for example {example}")
        task = choose_task(config, device)
    path, content = read_on_main(path, config.MODEL.NAME)
    with agreement():
        candidates = checkpoint.weights_in(content, path)
        if config.MODEL.WEIGHTS != "auto":
            candidates = dict([checkpoint.choose(candidates, config.MODEL.WEIGHTS, path)])
        facts = facts_of(content, path)
        bar.doing("looking through the data")
        loader, lines = task.eval_loader(content, next(iter(candidates.values())), path)
        model = prepare_model(config, task.model, device)
        check_image_size(model, config.DATA.IMG_SIZE, device)
        precision = choose_precision(config, device)
        log = RunLog(output_dir(config), config, "evaluate")
    if config.DATA.ON_BAD_IMAGE == "skip":
        loader.on_bad_image = log.bad_image
    compile_in_place(config, model)
    with log, naming_dead_workers():
        for line in filter(None, [describe_left_out({"val": loader.dataset.index}), *config.notes, *lines]):
            log.message(line)
        turned = ""
        for weights, state_dict in candidates.items():
            named = f"{NAMES[weights]}{path}"
            with agreement():
                loaded = load_weights(model, state_dict, named, allow_new_head=False)
                evaluator = task.evaluator(report=config.TEST.REPORT)
            for line in loaded.notes:
                log.message(f"{weights} of {path}: {line}")
            result = evaluate(model, loader, precision, evaluator)
            with agreement():
                if not all(map(math.isfinite, result.values())):
                    raise UserError(f"{named} gives answers that are not finite; take an earlier one, or try AMP none")
            turned = turned or describe_turned(loader, config.DATA.UPRIGHT)  # the first pass has told it
            values = {"step": facts.get("step"), "epoch": facts.get("epoch"), "weights": weights, **result}
            log.evaluation(values, f"{evaluator.describe(result)}  {weights} of {path}", checkpoint=path)
            if config.TEST.REPORT:
                log.message(evaluator.write(output_dir(config) / f"report_{weights}"))
        if turned:
            log.message(turned)
