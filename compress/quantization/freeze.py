"""From fake quant to the integers that the exported files hold."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

# Registers torch.ops.quantized_decomposed.*, which torch.onnx.export writes as QuantizeLinear and DequantizeLinear.
from torch.ao.quantization.fx import _decomposed  # noqa: F401
from torch.nn import functional as F

from compress.quantization.fake_quant import ActivationQuantizer, QuantizedConv2d, QuantizedLinear, weight_integers
from compress.quantization.graph import CALLS, insert_after, is_in, is_tensor, kind_of, set_module
from compress.quantization.prepare import PAD, PASS, REARRANGE, rectifier

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
    """int8, output channels first."""
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
    output: Grid
    """The grid of the logits; its scale is one LSB."""

    def grids(self) -> list[Grid]:
        """In the order of execution; their `layer` names are unique."""
        modules = dict(self.module.named_modules())
        called = [modules[str(node.target)] for node in self.module.graph.nodes if node.op == "call_module"]
        return [module for module in called if isinstance(module, Grid)]

    def steps(self, logits_NK: Tensor) -> Tensor:
        """Logits as whole numbers of the output grid (int32)."""
        return torch.round(logits_NK / self.output.scale).to(torch.int32)


def freeze(prepared: fx.GraphModule) -> Frozen:
    """The eval-mode network with plain layers whose weights and biases are whole multiples of their scales.

    Rectifiers are gone (their grid clips), and a tensor that is only rearranged is put on its grid again, so that each
    operator stands between two grids and a runtime can fuse it to an integer kernel. `prepared` is not changed.
    """
    module = copy.deepcopy(prepared).cpu().eval()
    modules = dict(module.named_modules())
    integers: dict[str, Integers] = {}
    grids: dict[fx.Node, Grid] = {}
    names: set[str] = set()

    def unused(name: str) -> str:
        candidate = next(n for n in (name, *(f"{name}#{i}" for i in range(2, 10_000))) if n not in names)
        names.add(candidate)
        return candidate

    for node in list(module.graph.nodes):
        if node.op not in CALLS:
            continue
        kind = kind_of(node, modules)
        if isinstance(kind, ActivationQuantizer):
            scale, zero_point = kind.grid()
            grids[node] = _add_grid(module, node, Grid(unused(kind.layer), scale, zero_point))
            source = node.args[0]
            if source.op in CALLS and rectifier(kind_of(source, modules)) is not None:
                source.replace_all_uses_with(source.args[0], delete_user_cb=lambda user, node=node: user is node)
                if not source.users:
                    module.graph.erase_node(source)
        elif isinstance(kind, (QuantizedConv2d, QuantizedLinear)):
            layer = _plain(kind, grids[node.args[0]].scale)
            set_module(module, node.target, layer[0])
            integers[node.target] = layer[1]
            if isinstance(kind, QuantizedConv2d) and any(kind.pads):
                with module.graph.inserting_before(node):
                    node.args = (module.graph.call_function(F.pad, (node.args[0], kind.pads)),)
        elif is_tensor(node) and node.all_input_nodes:
            source = node.all_input_nodes[0]
            if source in grids and (is_in(kind, REARRANGE) or is_in(kind, PAD)):
                # Rounding again changes no value, and tells a runtime that the operator may stay in int8.
                again = insert_after(module, node, "grids")
                was = grids[source]
                grids[again] = _add_grid(module, again, Grid(unused(node.name), was.scale, was.zero_point))
            elif source in grids and is_in(kind, PASS):
                grids[node] = grids[source]
    module.delete_all_unused_submodules()
    module.graph.lint()
    module.recompile()
    output = next(node for node in module.graph.nodes if node.op == "output").all_input_nodes[0]
    return Frozen(module.eval(), integers, grids[output])


def _add_grid(module: fx.GraphModule, node: fx.Node, grid: Grid) -> Grid:
    """Lets `node` call `grid`, by a name of its own: one quantizer may serve several nodes, each of which is named."""
    node.target = f"frozen.{node.name}"
    module.add_submodule(node.target, grid)
    return grid


def _plain(layer: QuantizedConv2d | QuantizedLinear, input_scale: float) -> tuple[nn.Module, Integers]:
    """The layer as torch's own, with weights and bias snapped to their integers."""
    assert layer.bias is not None
    bias_real = layer.bias.detach()
    # A channel whose weights are all but zero has steps so small that its bias would not fit: it gets larger ones.
    scale = torch.maximum(layer.weight_scale.detach(), bias_real.abs() / (input_scale * LARGEST_BIAS))
    bias_scale = torch.tensor(input_scale, dtype=torch.float32) * scale
    bias = torch.round(bias_real.double() / bias_scale.double())
    integers = Integers(weight_integers(layer.weight, scale), scale, bias.to(torch.int32), bias_scale, input_scale)
    plain: nn.Conv2d | nn.Linear
    if isinstance(layer, QuantizedConv2d):
        plain = nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]
            stride=layer.stride,  # type: ignore[arg-type]
            padding=layer.padding,  # type: ignore[arg-type]
            dilation=layer.dilation,  # type: ignore[arg-type]
            groups=layer.groups,
        )
    else:
        plain = nn.Linear(layer.in_features, layer.out_features)
    with torch.no_grad():
        shape = (-1,) + (1,) * (layer.weight.ndim - 1)
        plain.weight.copy_(integers.weight.float() * scale.view(shape))
        assert plain.bias is not None
        plain.bias.copy_(integers.bias.float() * bias_scale)
    return plain, integers
