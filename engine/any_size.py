"""One graph for images of many sizes: which sizes can share one, and a check in the file that refuses others."""

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.export import Dim

from models.crossformer.block import CrossFormerBlock
from models.crossformer.embedding import PATCH_STRIDE, REDUCTION_STRIDE
from models.crossformer.network import CrossFormer
from utils.errors import UserError

STEP = 32
"""Sides are multiples of it, so that every map of every stage is a whole number of tokens."""
LEAST_OF_OTHERS = 64
"""For models of others, which are tried from here on: below, maps of one token are a kind of their own."""
COMPARED = 5
"""So many sizes are compared with the model."""


class SizeRange(NamedTuple):
    """Images whose sides are multiples of 32 pixels from ``least`` to ``most``; without ``most`` there is no end."""

    least: int
    most: int | None = None

    def describe(self) -> str:
        if self.most == self.least:
            return f"{self.least} alone"
        return f"{self.least} to {self.most}" if self.most else f"{self.least} and more"

    def holds(self, size: tuple[int, int]) -> bool:
        """Whether an image of this height and width is among them."""
        most = self.most or max(size)
        return all(side % STEP == 0 and self.least <= side <= most for side in size)

    def dynamic_shape(self) -> dict[int, Any]:
        """Height and width as torch.export wants them."""
        most = self.most // STEP if self.most else None
        return {2 + i: STEP * Dim(name, min=self.least // STEP, max=most) for i, name in enumerate(("rows", "columns"))}

    def examples(self) -> list[tuple[int, int]]:
        """Heights and widths to compare, the corners among them; the first is one to trace: no square, and inside."""
        most = self.most or self.least + 8 * STEP
        sides = [*range(self.least, most + 1, STEP)]
        inside = sides[1:-1] or sides
        corners = [(self.least, most), (most, self.least), (self.least, self.least), (most, most)]
        return [*dict.fromkeys([(inside[0], inside[-1]), *corners, (inside[-1], inside[len(inside) // 2])])][:COMPARED]

    def said(self) -> dict[str, int | None]:
        """What the file says of it."""
        return dict(multiple_of=STEP, least=self.least, most=self.most)


def ranges_of(model: nn.Module) -> list[SizeRange]:
    """Tell which sizes have a graph in common.

    A map that is no larger than a group on its short side is one group and else it is cut, which are other operations:
    a new range begins where some stage's map becomes larger than some block's group.
    """
    networks = [module for module in model.modules() if isinstance(module, CrossFormer)]
    borders = {
        block.group_size * PATCH_STRIDE * REDUCTION_STRIDE**i // STEP * STEP
        for network in networks
        for i, stage in enumerate(network.layers)
        for block in stage.modules()
        if isinstance(block, CrossFormerBlock)
    }
    if not networks:
        return [SizeRange(LEAST_OF_OTHERS)]
    starts = sorted({0, *borders})
    ends = [*starts[1:], None]
    return [SizeRange(start + STEP, end) for start, end in zip(starts, ends, strict=True)]


def range_around(model: nn.Module, name: str, size: tuple[int, int]) -> SizeRange:
    """The range with the height and width ``size``.

    Raises:
        UserError: it is in none, or alone in its range.
    """
    ranges = ranges_of(model)
    found = next((one for one in ranges if one.holds(size)), None)
    if found is None or found.least == found.most:
        several = "; ".join(one.describe() for one in ranges if one.least != one.most)
        raise UserError(
            f"--dynamic-size: one graph of {name} takes images with both sides multiples of {STEP} from the same one "
            f"of these: {several}; choose --image-size among them, not {size[0]} x {size[1]}, or leave the flag out"
        )
    return found


class OfMultiples(nn.Module):
    """A network that fails for images whose sides are no multiples of 32, which torch.export takes on trust."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """As that of the network."""
        height, width = images.shape[2:]
        cut = images.unflatten(3, (width // STEP, STEP)).unflatten(2, (height // STEP, STEP))
        return self.network(cut.flatten(2, 3).flatten(3, 4))


CHECK = """
<ir_version: {ir}, opset_import: ["": {opset}]>
check (float[{batch}, 3, height, width] images) => (float[{batch}, 3, height, width] of_right_size)
<int64[2] sides = {{2, 3}}, int64[1] step = {{{step}}}, int64[1] least = {{{least}}}, int64[1] most = {{{most}}},
 int64[1] zero = {{0}}>
{{
  shape = Shape (images)
  size = Gather (shape, sides)
  rest = Mod (size, step)
  below = Sub (least, size)
  above = Sub (size, most)
  wrong = Max (rest, below, above)
  worst = ReduceMax <keepdims = 1> (wrong)
  nothing = Gather (zero, worst)
  same_shape = Add (shape, nothing)
  of_right_size = Reshape (images, same_shape)
}}
"""
"""ONNX has no assertion: this reads from a list of one zero, at a place that is there only if both sides are right."""
NO_END = 1 << 30


def check_in_onnx(path: Path, sizes: SizeRange) -> None:
    """Let the graph in a file begin with a node that fails, with what is wanted as its name, for images of other sizes.

    Args:
        path: of an ONNX file whose input is ``images``.
    """
    import onnx

    model = onnx.load(path)
    dims = model.graph.input[0].type.tensor_type.shape.dim
    how = dict(ir=model.ir_version, opset=model.opset_import[0].version, batch=dims[0].dim_value or "batch", step=STEP)
    check = onnx.parser.parse_model(CHECK.format(**how, least=sizes.least, most=sizes.most or NO_END))
    (reads,) = [node for node in check.graph.node if "nothing" in node.output]
    until = f"_to_{sizes.most}" if sizes.most else ""
    reads.name = f"height_and_width_must_be_multiples_of_{STEP}_from_{sizes.least}{until}"
    joined = onnx.compose.merge_models(
        onnx.compose.add_prefix(check, "size_", rename_inputs=False, rename_nodes=False), model,
        io_map=[("size_of_right_size", "images")],
    )  # fmt: skip
    del joined.opset_import[:]
    joined.opset_import.extend(model.opset_import)  # of both: the same one twice
    onnx.save(joined, path)
