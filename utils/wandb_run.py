"""The same curves on Weights & Biases."""

import uuid
from pathlib import Path

import yaml

from utils.errors import UserError
from utils.names import printable


def start_wandb(folder: Path, config, first_step: int):
    """The run on Weights & Biases that belongs to ``folder``: a new one, or that of the training that is carried on.

    Raises:
        UserError: wandb is missing, or cannot start.
    """
    try:
        import wandb  # only here: nobody else is to need it
    except ImportError as error:
        raise UserError("LOG.WANDB needs wandb: pip install wandb, or leave LOG.WANDB empty") from error
    named = folder / "wandb_id.txt"
    if first_step == 0 or not named.exists():
        named.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
    try:
        run = wandb.init(
            project=config.LOG.WANDB,
            id=named.read_text(encoding="utf-8").strip(),
            name=printable(f"{config.MODEL.NAME} {config.TAG}"),
            config=yaml.safe_load(config.dump()),
            dir=folder,
            resume="allow",
            settings=wandb.Settings(console="off", silent=True),
        )
    except wandb.Error as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"LOG.WANDB {config.LOG.WANDB}: {reason}; log in with `wandb login`, or set WANDB_MODE=offline"
        ) from error
    run.define_metric("*", step_metric="step")  # its own counter only moves forward; a restart goes back
    return run
