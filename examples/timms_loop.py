"""Train a recipe of ours as timm's ``train.py`` would: with its loader, mixing, optimizer, schedule, average and saver.

    python examples/timms_loop.py --cfg configs/micro_cifar10.yaml --data-path cifar10_12k

That program is in no package, so this is written by its rules: in each step the loss, the backward pass, clipping, the
optimizer's step, the average's and the schedule's; every 50 steps the loss is read; after each epoch weights and
average are validated and saved. It prints a line for each epoch, to compare times with. On a CPU only.
"""

import argparse
import json
import sys
import time
from collections import OrderedDict
from pathlib import Path

import timm
import torch
from timm.data import Mixup, create_dataset, create_loader
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, CheckpointSaver, ModelEmaV3, accuracy, dispatch_clip_grad, random_seed
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import models  # noqa: F401  which registers CrossFormer with timm
from config import build_config

LOG_INTERVAL = 50


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cfg", default="configs/micro_cifar10.yaml", help="whose recipe it is")
    parser.add_argument("--data-path", required=True)
    parser.add_argument("--output", default="output/timms_loop")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--opts", nargs="*", default=[])
    given = parser.parse_args(arguments)
    config = build_config(given.cfg, [*given.opts, "DATA.DATA_PATH", given.data_path, "SEED", str(given.seed)])
    train(config, Path(given.output))


def train(config, folder: Path) -> None:
    """Train by the config's recipe; ``folder`` gets ``epochs.jsonl`` and the checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    random_seed(config.SEED, 0)
    device, start = torch.device("cpu"), time.perf_counter()
    model = timm.create_model(config.MODEL.NAME, num_classes=10, drop_path_rate=config.MODEL.DROP_PATH_RATE).to(
        memory_format=torch.channels_last
    )
    train_loader, val_loader = (loader(config, split, device) for split in ("train", "val"))
    batch = config.DATA.BATCH_SIZE
    scale = batch / config.TRAIN.LR_REFERENCE_BATCH
    optimizer = create_optimizer_v2(
        model, config.TRAIN.OPTIMIZER.NAME, lr=config.TRAIN.BASE_LR * scale, weight_decay=config.TRAIN.WEIGHT_DECAY
    )
    average = ModelEmaV3(model, decay=config.TRAIN.EMA_DECAY) if config.TRAIN.EMA_DECAY else None
    scheduler, epochs = create_scheduler_v2(
        optimizer,
        "cosine",
        num_epochs=config.TRAIN.EPOCHS,
        min_lr=config.TRAIN.MIN_LR * scale,
        warmup_lr=config.TRAIN.WARMUP_LR * scale,
        warmup_epochs=config.TRAIN.WARMUP_EPOCHS,
        step_on_epochs=False,
        updates_per_epoch=len(train_loader),
    )
    mixup = None
    if config.AUG.MIXUP or config.AUG.CUTMIX:
        mixup = Mixup(config.AUG.MIXUP, config.AUG.CUTMIX, label_smoothing=config.MODEL.LABEL_SMOOTHING, num_classes=10)
    criterion = SoftTargetCrossEntropy() if mixup else LabelSmoothingCrossEntropy(config.MODEL.LABEL_SMOOTHING)
    saver = CheckpointSaver(
        model, optimizer, model_ema=average, checkpoint_dir=str(folder), recovery_dir=str(folder), max_history=2
    )
    updates = 0
    for epoch in range(epochs):
        rate, updates = train_epoch(
            model, train_loader, optimizer, criterion, mixup, scheduler, average, config.TRAIN.CLIP_GRAD, epoch, updates
        )
        metrics = {"top1": validate(model, val_loader)}
        if average:
            metrics["ema_top1"] = validate(average.module, val_loader)
        saver.save_checkpoint(epoch, metric=max(metrics.values()))
        scheduler.step(epoch + 1, metrics["top1"])
        seconds = time.perf_counter() - start
        line = {"epoch": epoch + 1, "seconds": seconds, "images_per_second": rate, **metrics}
        print(json.dumps(line), flush=True)
        with open(folder / "epochs.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def loader(config, split: str, device: torch.device):
    """Give timm's loader of one split, with its prefetcher where there is a GPU, as the program has it."""
    training = split == "train"
    dataset = create_dataset(
        "", root=config.DATA.DATA_PATH, split=split, is_training=training, batch_size=config.DATA.BATCH_SIZE
    )
    aug = config.AUG
    more = dict(
        re_prob=aug.REPROB,
        re_mode=aug.REMODE,
        scale=aug.SCALE,
        ratio=aug.RATIO,
        hflip=aug.HFLIP,
        color_jitter=aug.COLOR_JITTER,
        auto_augment=None if aug.AUTO_AUGMENT == "none" else aug.AUTO_AUGMENT,
    )
    return create_loader(
        dataset,
        input_size=(3, config.DATA.IMG_SIZE, config.DATA.IMG_SIZE),
        batch_size=config.DATA.BATCH_SIZE,
        is_training=training,
        interpolation=config.DATA.INTERPOLATION,
        num_workers=config.DATA.NUM_WORKERS,
        crop_pct=1.0,
        device=device,
        use_prefetcher=device.type == "cuda",
        **(more if training else {}),
    )


def train_epoch(
    model, batches, optimizer, criterion, mixup, scheduler, average, clip: float, epoch: int, updates: int
) -> tuple[float, int]:
    """Take an epoch's steps; gives the images per second and the number of steps so far."""
    model.train()
    losses, start, images = AverageMeter(), time.perf_counter(), 0
    for number, (given, targets) in enumerate(batches):
        inputs = given.to(memory_format=torch.channels_last)
        if mixup:
            inputs, targets = mixup(inputs, targets)
        loss = criterion(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        if clip:
            dispatch_clip_grad(model.parameters(), clip)
        optimizer.step()
        if average:
            average.update(model, step=updates)
        updates += 1
        images += len(inputs)
        if number % LOG_INTERVAL == 0:
            losses.update(loss.item(), len(inputs))
        scheduler.step_update(num_updates=updates, metric=losses.avg)
    return images / (time.perf_counter() - start), updates


@torch.inference_mode()
def validate(model: nn.Module, batches) -> float:
    """Give the top-1 in percent."""
    model.eval()
    metrics: dict[str, AverageMeter] = OrderedDict(top1=AverageMeter())
    for inputs, targets in batches:
        output = model(inputs.to(memory_format=torch.channels_last))
        metrics["top1"].update(accuracy(output, targets)[0].item(), len(inputs))
    return metrics["top1"].avg


if __name__ == "__main__":
    main(sys.argv[1:])
