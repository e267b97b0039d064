"""Static quantisation of an exported classifier: int8 weights and activations, calibrated on validation images."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import build_config, flatten
from engine.evaluate import evaluate
from engine.exported import Graph, open_onnx
from engine.precision import choose_precision
from models import load_weights
from tasks import build_task
from tasks.trained import TrainedModel
from utils import checkpoint
from utils.errors import UserError
from utils.silence import in_silence

CALIBRATION_IMAGES = 256
"""So many, evenly spread over the validation images, tell the ranges of the activations."""
CALIBRATION_BATCH = 16
PRODUCTS = "Conv", "MatMul", "Gemm"
MOST_POINTS_LOST = 5.0
"""With int8 that costs more something is wrong, and no file is written."""


class Sampled(Graph):
    """A graph that keeps some of the images that it is asked about, evenly spread over so many in all."""

    def __init__(self, run: Any, batch: int | None, images_in_all: int):
        super().__init__(run, batch)
        self.wanted = {i * images_in_all // CALIBRATION_IMAGES for i in range(CALIBRATION_IMAGES)}
        self.asked = 0
        self.kept: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        """As that of :class:`engine.exported.Graph`."""
        self.kept += [image.clone() for i, image in enumerate(images, start=self.asked) if i in self.wanted]
        self.asked += len(images)
        return super().forward(images)


class Validation:
    """The validation images of a classifier, to be asked about an exported graph of it.

    Args:
        trained: the model.
        path: of its checkpoint.
        data_path: where the data lies; empty for where the run had it.
        size: height and width that the graph takes.

    Raises:
        UserError: there is no such data, or it has other classes.
    """

    def __init__(self, trained: TrainedModel, path: str, data_path: str, size: tuple[int, int]):
        given = [(key, value, path) for key, value in flatten(trained.config).items()]
        given += [("DATA.IMG_SIZE", [*size], "--image-size"), ("AMP", "none", "--int8")]
        given += [("DATA.DATA_PATH", data_path, "--data-path")] if data_path else []
        config, cpu = build_config(flags=given), torch.device("cpu")
        self.task = build_task(config, cpu)
        weights = trained.model.state_dict()
        self.loader, self.notes = self.task.eval_loader(checkpoint.read(path), weights, path)
        load_weights(self.task.model(), weights, path, allow_new_head=False)
        self.precision = choose_precision(config, cpu)

    def score(self, graph: Graph) -> float:
        """The metric that the best weights go by, in percent."""
        return evaluate(graph, self.loader, self.precision, self.task.evaluator())[self.task.best_is]


def quantise(file: Path, to: Path, validation: Validation) -> str:
    """Write a classifier's ONNX graph with int8 products, after evaluating both; says in words what has come of it.

    Convolutions and products with weights are computed in int8, with one scale for each output channel and 7 bits of
    it in the weights, so that no sum saturates on processors without VNNI. What has no weights stays in float:
    attention, its position bias, norms and activation functions.

    Args:
        file: the graph in float.

    Raises:
        UserError: int8 loses more than MOST_POINTS_LOST.
    """
    index = validation.loader.dataset.index
    run, batch, _ = open_onnx(str(file))
    sampled = Sampled(run, batch, len(index))
    before = validation.score(sampled)
    images = torch.stack(sampled.kept)
    write_quantised(file, to, images, batch)
    after = validation.score(Graph(*open_onnx(str(to))[:2]))
    if after < before - MOST_POINTS_LOST:
        raise UserError(
            f"{validation.task.best_title} on {index.root}: int8 {after:.2f}, float {before:.2f}; more than "
            f"{MOST_POINTS_LOST:g} points are lost, so nothing is written; leave out --int8"
        )
    what = f"{validation.task.best_title} on {sampled.asked:,} images"
    return f"{what}: int8 {after:.2f}, float {before:.2f} (calibrated on {len(images):,} of them)"


def write_quantised(file: Path, to: Path, images: Tensor, batch: int | None) -> None:
    """Write a graph with int8 products whose ranges are those of ``images``, ``(N, 3, H, W)``."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Batches(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(images.split(batch or CALIBRATION_BATCH))

        def get_next(self) -> dict | None:
            return next(({"images": part.contiguous().numpy()} for part in self.left), None)

    folded = to.with_suffix(".folded.onnx")
    with in_silence():
        quant_pre_process(file, folded, skip_symbolic_shape=True)
        graph = onnx.load(folded).graph
        weights = {tensor.name for tensor in graph.initializer}
        in_float = [node.name for node in graph.node if node.op_type in PRODUCTS and node.input[1] not in weights]
        quantize_static(
            folded, to, Batches(), op_types_to_quantize=[*PRODUCTS], nodes_to_exclude=in_float, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, reduce_range=True,
        )  # fmt: skip
    folded.unlink()
