"""What timm's programs do with a model that they know by its name alone, by timm's own functions: ``... DATA FOLDER``.

Train with mixing, an average, a schedule and saves; carry on; validate; average the saves; export. Nothing of this
project is imported: what torch does for TORCH_BACKEND=crossformer, where the package is installed, comes first.
"""

# ruff: noqa: E402
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "models"))
sys.path.append(str(Path(__file__).resolve().parent.parent))
import crossformer_backend

crossformer_backend.autoload()

import timm
import torch
from timm.data import Mixup, create_dataset, create_loader, resolve_data_config
from timm.loss import SoftTargetCrossEntropy
from timm.models import load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from timm.utils import AverageMeter, CheckpointSaver, ModelEmaV3, NativeScaler, accuracy
from timm.utils.onnx import onnx_export

NAME = "crossformer_micro"


def load(data: str, split: str, config: dict):
    """A loader as train.py and validate.py make it."""
    images = create_dataset("", root=data, split=split)
    return create_loader(
        images, batch_size=16, is_training=split == "train", use_prefetcher=False, num_workers=0, **config
    )


def create(**kwargs):
    return timm.create_model(NAME, num_classes=10, drop_path_rate=0.1, **kwargs)


def train(data: str, folder: Path, epochs: range, resume: str = "") -> float:
    torch.manual_seed(0)
    model = create()
    config = {
        key: value
        for key, value in resolve_data_config({}, model=model).items()
        if key in ("input_size", "mean", "std", "interpolation", "crop_pct")
    }
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.9)
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=4, warmup_epochs=1)
    average, scaler = ModelEmaV3(model, decay=0.5), NativeScaler(device="cpu")
    task = ClassificationTask(model, criterion=SoftTargetCrossEntropy(), verbose=False)
    mix = Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, num_classes=10)
    if resume:
        assert resume_checkpoint(model, resume, optimizer, log_info=False) == epochs[0]
        load_checkpoint(average.module, resume, use_ema=True)
    saver = CheckpointSaver(model, optimizer, model_ema=average, amp_scaler=scaler, checkpoint_dir=str(folder))
    for epoch in epochs:
        model.train()
        for images, labels in load(data, "train", config):
            if len(images) % 2:
                continue
            with torch.autocast("cpu", torch.bfloat16):
                loss = task(*mix(images, labels))["loss"]
            scaler(loss, optimizer, clip_grad=5.0, parameters=model.parameters())
            optimizer.zero_grad()
            average.update(model)
        scheduler.step(epoch + 1)
        saver.save_checkpoint(epoch, metric=validate(model, load(data, "val", config)))
    return validate(average.module, load(data, "val", config))


@torch.no_grad()
def validate(model, images_and_labels) -> float:
    model.eval()
    meter = AverageMeter()
    for images, labels in images_and_labels:
        meter.update(accuracy(model(images), labels)[0].item(), len(images))
    return meter.avg


def mean_of(files: list[Path]) -> dict:
    """As avg_checkpoints.py: of the averages in saves, in double precision."""
    states = [torch.load(file, weights_only=False)["state_dict_ema"] for file in files]
    return {key: torch.stack([state[key].double() for state in states]).mean(0).float() for key in states[0]}


if __name__ == "__main__":
    data, folder = sys.argv[1], Path(sys.argv[2])
    assert NAME in timm.list_models("crossformer*")
    train(data, folder, range(2))
    last = folder / "last.pth.tar"
    told = train(data, folder, range(2, 4), resume=str(last))
    model = create(checkpoint_path=str(last)).eval()
    files = sorted(folder.glob("checkpoint-*.pth.tar"))
    assert len(files) == 4, files
    model.load_state_dict(mean_of(files))
    for program, use_dynamo in (("legacy", False), ("dynamo", True)):
        onnx_export(
            model, str(folder / f"{program}.onnx"), batch_size=2, use_dynamo=use_dynamo, check_forward=True, opset=18
        )
    print(f"{told:.2f}")
