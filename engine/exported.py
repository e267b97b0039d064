"""Classifiers as scripts/export.py has written them, ONNX or torch.export, to be asked like any other model."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from config import CLASSES, build_config, settings_in
from tasks.trained import TrainedModel
from utils.checkpoint import SETTINGS_KEY
from utils.errors import UserError

SUFFIXES = ".onnx", ".pt2"
SAID = "architecture", "classes", "class_ids", "input_size", "mean", "std", SETTINGS_KEY
"""What is read of all that a file says of itself."""


class Opened(NamedTuple):
    """A graph in a file: what computes it, the size of its batches (None for any), and what the file says of itself."""

    run: Callable[[Tensor], Any]
    batch: int | None
    texts: dict[str, Any]


class Graph(nn.Module):
    """Answers batches of any size; a graph for one image at a time is asked as often as it takes."""

    def __init__(self, run: Callable[[Tensor], Tensor], batch: int | None):
        super().__init__()
        self.run, self.batch = run, batch

    def forward(self, images: Tensor) -> Tensor:
        """From ``(B, 3, H, W)`` to logits ``(B, classes)``."""
        parts = images.split(self.batch) if self.batch else (images,)
        return torch.cat([self.run(part) for part in parts])


def is_exported(path: str) -> bool:
    """Tell whether a file's name is that of an export that holds the computation."""
    return path.endswith(SUFFIXES)


def load_exported(path: str) -> TrainedModel:
    """Load an exported classifier, on the CPU.

    Raises:
        UserError: it is not there or damaged, its package is missing, or it does not say what it needs.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} is not a file; expected an export (.onnx, .pt2)")
    run, batch, texts = open_onnx(path) if path.endswith(".onnx") else _torch_export(path)
    try:
        said = {key: json.loads(texts[key]) for key in SAID}
        settings = settings_in(said[SETTINGS_KEY], path)
        size, classes = [int(side) for side in said["input_size"][1:]], [str(name) for name in said["classes"]]
        ids = [str(name) for name in said["class_ids"]]
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path} does not say how it is to be used; write it with scripts/export.py") from error
    config = build_config(
        flags=[*((key, value, path) for key, value in settings.items()), ("DATA.IMG_SIZE", size, path)]
    )
    if config.TASK != CLASSES:
        raise UserError(f"{path} is for {config.TASK} and takes one size; give the checkpoint that it was made of")
    return TrainedModel(Graph(run, batch), config, classes, ids, {}, [])


def open_onnx(path: str) -> Opened:
    """Open an ONNX file; of several outputs it gives a tuple.

    Raises:
        UserError: it is damaged, or its package is missing.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"{path} needs a package that is missing: pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # it fails in arbitrary ways on arbitrary bytes
        raise UserError(f"{path} is damaged or not ONNX: onnxruntime cannot read it") from error
    (images,) = session.get_inputs()
    batch = images.shape[0] if isinstance(images.shape[0], int) else None

    def run(part: Tensor) -> Any:
        found = [torch.from_numpy(one) for one in session.run(None, {images.name: part.contiguous().numpy()})]
        return found[0] if len(found) == 1 else tuple(found)

    return Opened(run, batch, session.get_modelmeta().custom_metadata_map)


def _torch_export(path: str) -> Opened:
    texts: dict[str, Any] = dict.fromkeys(SAID, "")
    logging.disable(logging.CRITICAL)  # torch tells of a file that it cannot read at length
    try:
        program = torch.export.load(path, extra_files=texts)
        inputs = program.graph_signature.user_inputs
        (images,) = [node.meta["val"] for node in program.graph.nodes if node.name in inputs]
        run = program.module()
    except Exception as error:
        reason = f"torch {torch.__version__} cannot read it"
        raise UserError(f"{path} is damaged or not of torch.export: {reason}") from error
    finally:
        logging.disable(logging.NOTSET)
    batch = images.shape[0] if isinstance(images.shape[0], int) else None
    return Opened(lambda part: run(part.contiguous()), batch, {key: text for key, text in texts.items() if text})
