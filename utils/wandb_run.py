"""The same curves on Weights & Biases."""

import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import yaml

from utils.errors import UserError
from utils.names import printable


def start_wandb(folder: Path, config, first_step: int, keep: Callable[[str, str], None]):
    """The run on Weights & Biases that belongs to ``folder``: a new one, or that of the training that is carried on.

    Args:
        keep: writes a file of this name and content into the folder.

    Raises:
        UserError: wandb is missing, or cannot start.
    """
    try:
        import wandb  # only here: nobody else is to need it
    except ImportError as error:
        raise UserError("LOG.WANDB needs wandb: pip install wandb, or leave LOG.WANDB empty") from error
    name = ""
    with suppress(OSError, UnicodeDecodeError):
        name = (folder / "wandb_id.txt").read_text(encoding="utf-8").strip() if first_step else ""
    name = name or uuid.uuid4().hex[:8]
    keep("wandb_id.txt", name)
    try:
        run = wandb.init(
            project=config.LOG.WANDB,
            id=name,
            name=printable(f"{config.MODEL.NAME} {config.TAG}"),
            config=yaml.safe_load(config.dump()),
            dir=str(folder),
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
