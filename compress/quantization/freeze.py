"""From fake quant to the integers that the exported files hold."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

# Registers torch.ops.quantized_decomposed.*, which torch.onnx.export writes as QuantizeLinear and DequantizeLinear.
from torch.ao.quantization.fx import _decomposed  # noqa: F401
from torch.nn import functional as F

from compress.errors import ModelError
from compress.quantization.fake_quant import (
    ActivationQuantizer,
    QuantizedConv2d,
    QuantizedConvTranspose2d,
    QuantizedLinear,
    swap_channels,
    weight_integers,
)
from compress.quantization.graph import (
    CALLS,
    insert_after,
    is_in,
    is_tensor,
    kind_of,
    layer_name,
    operands,
    set_module,
    shape_of,
)
from compress.quantization.joint_grids import Joint, settled_scale
from compress.quantization.operators import (
    ADD,
    AVERAGE,
    CONCATENATE,
    INTERPOLATE,
    MULTIPLY,
    PASS,
    QUANTIZED,
    SUBTRACT,
    Role,
    role_of,
)

JOINTS: dict[Joint, tuple[Any, ...]] = {
    "sum": ADD,
    "difference": SUBTRACT,
    "product": MULTIPLY,
    "concatenation": CONCATENATE,
}

TIES = 2**-10
"""How far a grid is moved to avoid them."""
LARGEST_BIAS = 2**30
"""Leaves as much of an int32 accumulator to the products."""


class Grid(nn.Module):
    """Rounds to a fixed grid of 256 steps, written as uint8: zero point 0..255."""

    def __init__(self, layer: str, scale: float, zero_point: int) -> None:
        super().__init__()
        self.layer, self.scale, self.zero_point = layer, scale, zero_point

    def forward(self, x: Tensor) -> Tensor:
        ops = torch.ops.quantized_decomposed
        grid = (self.scale, self.zero_point, 0, 255, torch.uint8)
        return ops.dequantize_per_tensor(ops.quantize_per_tensor(x, *grid), *grid)

    def extra_repr(self) -> str:
        return f"{self.layer}, scale={self.scale:g}, zero_point={self.zero_point}"


@dataclass(frozen=True)
class Integers:
    """What a file stores for one convolution or linear layer."""

    weight: Tensor
    """int8, in the layer's own layout."""
    axis: int
    """Of the output channels in `weight`."""
    weight_scale: Tensor
    """float32, one per output channel."""
    bias: Tensor
    """int32, on the grid `bias_scale`."""
    bias_scale: Tensor
    """float32: input scale x weight scale."""
    input_scale: float


@dataclass(frozen=True)
class Frozen:
    """A network on its integer grids: `module`, in float32, is what is exported; `run_integers` is exact."""

    module: fx.GraphModule
    integers: dict[str, Integers]
    """By layer name."""
    output: Grid | None
    """The grid of the logits; its scale is one LSB. None where the last layers compute in float."""

    def grids(self) -> list[Grid]:
        """In the order of execution; their `layer` names are unique."""
        modules = dict(self.module.named_modules())
        called = [modules[str(node.target)] for node in self.module.graph.nodes if node.op == "call_module"]
        return [module for module in called if isinstance(module, Grid)]

    def steps(self, logits_NK: Tensor) -> Tensor:
        """Logits as whole numbers of the output grid (int32); there must be one."""
        assert self.output is not None
        return torch.round(logits_NK / self.output.scale).to(torch.int32)


def freeze(prepared: fx.GraphModule) -> Frozen:
    """The eval-mode network with plain layers whose weights and biases are whole multiples of their scales.

    A tensor that is only rearranged is put on its grid again, so that each operator stands between two grids and a
    runtime can fuse it to an integer kernel. Grids are those of `prepared`, but for the scales of sums and their like,
    which move by up to 2**-10 of themselves to where runtimes agree (`joint_grids`). `prepared` is not changed.
    Raises ModelError for grids of fewer than 8 bits, which no runtime here computes with.
    """
    if any(getattr(layer, "bits", 8) != 8 for layer in prepared.modules()):
        raise ModelError("quantize", "fewer than 8 bits are simulated only", "set weight_bits and activation_bits to 8")
    module = copy.deepcopy(prepared).cpu().eval()
    modules = dict(module.named_modules())
    integers: dict[str, Integers] = {}
    grids: dict[fx.Node, Grid] = {}
    names: set[str] = {"image", "logits"}  # the file's own

    def unused(name: str) -> str:
        numbered = (f"{name}#{i}" for i in itertools.count(2))
        candidate = next(n for n in itertools.chain((name,), numbered) if n not in names)
        names.add(candidate)
        return candidate

    for node in list(module.graph.nodes):
        if node.op not in CALLS:
            continue
        kind = kind_of(node, modules)
        if isinstance(kind, ActivationQuantizer):
            scale = _scale(kind, node.args[0], grids, modules)
            grids[node] = _add_grid(module, node, Grid(unused(kind.layer), scale, kind.grid()[1]))
        elif isinstance(kind, QUANTIZED):
            layer = _plain(kind, grids[node.args[0]].scale)
            set_module(module, node.target, layer[0])
            integers[node.target] = layer[1]
            if isinstance(kind, QuantizedConv2d) and any(kind.pads):
                with module.graph.inserting_before(node):
                    padded = module.graph.call_function(F.pad, (node.args[0], kind.pads))
                padded.meta = dict(node.args[0].meta)
                node.args = (padded,)
        elif is_tensor(node) and node.all_input_nodes and node.all_input_nodes[0] in grids:
            was = grids[node.all_input_nodes[0]]
            if role_of(node, modules, set()) is not Role.MOVE:
                continue
            if shape_of(node) and not is_in(kind, PASS):
                # Rounding again changes no value, and tells a runtime that the operator may stay in int8.
                again = insert_after(module, node, "grids")
                grids[again] = _add_grid(module, again, Grid(unused(layer_name(node)), was.scale, was.zero_point))
            else:  # nothing happens at inference, or there are several tensors, each with a selection of its own
                grids[node] = was
    module.delete_all_unused_submodules()
    module.graph.lint()
    module.recompile()
    output = next(node for node in module.graph.nodes if node.op == "output").all_input_nodes[0]
    return Frozen(module.eval(), integers, grids.get(output))


def _scale(
    quantizer: ActivationQuantizer, source: fx.Node, grids: dict[fx.Node, Grid], modules: dict[str, nn.Module]
) -> float:
    """The quantizer's, moved a little where runtimes would round the result of `source` in ways of their own."""
    scale, zero_point = quantizer.grid()
    if quantizer.fixed or source in grids or source.op not in CALLS:
        return scale
    kind, read = kind_of(source, modules), [grids.get(operand) for operand in operands(source)]
    if is_in(kind, (*AVERAGE, *INTERPOLATE)):
        return _without_ties(scale, read[0])
    joint = next((joint for joint, table in JOINTS.items() if is_in(kind, table)), None)
    points = [(grid.scale, grid.zero_point) for grid in read if grid]
    if joint is None or len(points) < max(2, len(read)) or "alpha" in source.kwargs:
        return scale  # computed in float
    largest = float(np.float32(quantizer.limit / quantizer.last)) if quantizer.limit else None
    return settled_scale(joint, points, (scale, zero_point), largest=largest)


def _without_ties(scale: float, before: Grid | None) -> float:
    """`scale`, a little larger where it is that of the numbers averaged.

    Averages of two or four steps of one size fall half-way between them in many cases, where the last bit of a float
    decides, which differs among runtimes.
    """
    same = before is not None and abs(scale / before.scale - 1) < TIES
    return scale * (1 + TIES) if same else scale


def _add_grid(module: fx.GraphModule, node: fx.Node, grid: Grid) -> Grid:
    """Lets `node` call `grid`, by a name of its own: one quantizer may serve several nodes, each of which is named."""
    node.target = f"frozen.{node.name}"
    module.add_submodule(node.target, grid)
    return grid


def _plain(
    layer: QuantizedConv2d | QuantizedConvTranspose2d | QuantizedLinear, input_scale: float
) -> tuple[nn.Module, Integers]:
    """The layer as torch's own, with weights and bias snapped to their integers."""
    assert layer.bias is not None
    bias_real = layer.bias.detach()
    # A channel whose weights are all but zero has steps so small that its bias would not fit: it gets larger ones.
    scale = torch.maximum(layer.weight_scale.detach(), bias_real.abs() / (input_scale * LARGEST_BIAS))
    bias_scale = torch.tensor(input_scale, dtype=torch.float32) * scale
    bias = torch.round(bias_real.double() / bias_scale.double())
    by_output = weight_integers(layer.weight_by_output(), scale, layer.bits)
    snapped = by_output.float() * scale.view((-1,) + (1,) * (by_output.ndim - 1))
    axis = 0
    if isinstance(layer, QuantizedConvTranspose2d):
        axis = 1
        by_output, snapped = swap_channels(by_output, layer.groups), swap_channels(snapped, layer.groups)
    integers = Integers(by_output, axis, scale, bias.to(torch.int32), bias_scale, input_scale)
    plain = _rebuilt(layer)
    with torch.no_grad():
        plain.weight.copy_(snapped)
        assert plain.bias is not None
        plain.bias.copy_(integers.bias.float() * bias_scale)
    return plain, integers


def _rebuilt(layer: Any) -> Any:
    """A float layer of the same shape, with a bias."""
    if isinstance(layer, QuantizedLinear):
        return nn.Linear(layer.in_features, layer.out_features)
    how: dict[str, Any] = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
    sizes = (layer.in_channels, layer.out_channels, layer.kernel_size)
    if isinstance(layer, QuantizedConvTranspose2d):
        how["output_padding"] = layer.output_padding
        return nn.ConvTranspose2d(*sizes, **how)
    return nn.Conv2d(*sizes, **how)
