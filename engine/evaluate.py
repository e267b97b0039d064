"""Evaluation: every image counts exactly once, on any number of processes and any batch size."""

import torch
import torch.nn.functional as F
from torch import nn

from config import output_dir
from data import build_loaders
from data.loading import EvalLoader, naming_dead_workers
from engine.model import compile_in_place, giga_macs, prepare_model, set_training_mode
from engine.precision import Precision, choose_precision
from models import load_weights
from utils import checkpoint
from utils.distributed import agreement, sum_over_ranks
from utils.errors import UserError
from utils.logger import RunLog


@torch.inference_mode()
def evaluate(model: nn.Module, loader: EvalLoader, precision: Precision) -> dict[str, float]:
    """Top-1 and top-5 in percent, mean cross entropy, and how many images they are of.

    Counts are summed over images and ranks and divided once; the device is not waited for before the end.
    A collective: every rank must call it, with the plain model (not DDP: ranks may have different batch counts).
    """
    was_training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=loader.device)  # images, top-1, top-5, loss
    for images, targets in loader:
        with precision.autocast():
            logits = model(images).float()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
        loss = F.cross_entropy(logits, targets, reduction="none").double()
        count = torch.full_like(sums[0], len(targets))
        sums += torch.stack([count, best[:, 0].sum(), best.sum(), loss.sum()])
    if was_training:
        set_training_mode(model)
    images, top1, top5, loss = sum_over_ranks(sums).tolist()
    if images == 0:
        raise UserError(f"no validation image of {loader.dataset.index.root} can be decoded")
    return {"top1": 100 * top1 / images, "top5": 100 * top5 / images, "loss": loss / images, "images": int(images)}


def run_evaluation(config, device: torch.device) -> None:
    """``--eval``: evaluate the weights of MODEL.RESUME, and the moving average in it where there is one."""
    with agreement():
        path = config.MODEL.RESUME
        if not path:
            example = output_dir(config) / "checkpoints" / "best.pth"
            raise UserError(f"--eval evaluates a checkpoint: give --resume FILE, for example {example}")
        loaders = build_loaders(config, device, training=False)
        content = checkpoint.read(path)
        model = prepare_model(config, len(loaders.classes), device)
        giga_macs(model, config.DATA.IMG_SIZE, device)  # refuses an image size that the model does not take
        check_classes(content, loaders.classes, path)
        candidates = {content.get("weights", "model"): checkpoint.state_dict_of(content, path)}
        if content.get("ema"):
            candidates["ema"] = content["ema"]
        precision = choose_precision(config, device)
        log = RunLog(output_dir(config), config, "evaluate")
    if config.DATA.ON_BAD_IMAGE == "skip":
        loaders.val.on_bad_image = log.bad_image
    compile_in_place(config, model)
    with log, naming_dead_workers():
        for weights, state_dict in candidates.items():
            with agreement():
                load_weights(model, state_dict, path, allow_new_head=False)
            result = evaluate(model, loaders.val, precision)
            values = {"step": content.get("step"), "epoch": content.get("epoch"), "weights": weights, **result}
            log.evaluation(values, f"{weights} of {path}", checkpoint=path)


def check_classes(content: dict, classes: list[str], path: str) -> None:
    """Refuse a checkpoint of ours that was trained on other classes than the data has."""
    trained_on = content.get("classes", classes)
    if trained_on != classes and len(trained_on) == len(classes):
        i = next(i for i, (a, b) in enumerate(zip(trained_on, classes, strict=True)) if a != b)
        raise UserError(
            f"{path} was trained on other classes: its class {i} is {trained_on[i]!r}, the data's {classes[i]!r}"
        )
