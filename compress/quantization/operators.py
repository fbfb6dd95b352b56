"""Which operators int8 kernels know, and what each does to the grids around it."""

from __future__ import annotations

import operator
from enum import Enum
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from compress.quantization.fake_quant import QuantizedConv2d, QuantizedConvTranspose2d, QuantizedLinear
from compress.quantization.graph import is_in, kind_of, operands, shape_of


class Role(Enum):
    """What a node is to its grids."""

    INPUT = "the image"
    CONSTANT = "a parameter, or made of parameters alone"
    LAYER = "has integer weights: what it reads and what it writes lies on grids"
    JOINT = "computes in integers where all it reads lies on grids anyway, else in float; its result has a grid"
    RECTIFIER = "its grid does the clipping"
    MOVE = "moves or selects numbers, which stay on their grid"
    ISLAND = "computes in float"


QUANTIZED = (QuantizedConv2d, QuantizedConvTranspose2d, QuantizedLinear)

RELU: tuple[Any, ...] = (nn.ReLU, F.relu, torch.relu, "relu", "relu_")
RELU6: tuple[Any, ...] = (nn.ReLU6, F.relu6)
CLAMP: tuple[Any, ...] = (torch.clamp, "clamp", "clamp_", torch.clip, "clip", F.hardtanh)

ADD: tuple[Any, ...] = (operator.add, operator.iadd, torch.add, "add", "add_")
SUBTRACT: tuple[Any, ...] = (operator.sub, operator.isub, torch.sub, "sub", "sub_")
MULTIPLY: tuple[Any, ...] = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
CONCATENATE: tuple[Any, ...] = (torch.cat, torch.concat)
SIGMOID: tuple[Any, ...] = (nn.Sigmoid, F.sigmoid, torch.sigmoid, "sigmoid", "sigmoid_")
MEAN: tuple[Any, ...] = (nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d, torch.mean, "mean")
AVERAGE: tuple[Any, ...] = (nn.AvgPool2d, F.avg_pool2d)
"""Like means, with a grid of their own: averages of four numbers on the grid of these numbers would fall half-way
between two steps in one case of four, and runtimes round that differently (up to 27 % of values, ONNX Runtime 1.31)."""
INTERPOLATE: tuple[Any, ...] = (nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, F.interpolate)
REARRANGE: tuple[Any, ...] = (
    *(nn.MaxPool2d, F.max_pool2d, torch.max_pool2d, nn.AdaptiveMaxPool2d, F.adaptive_max_pool2d),
    *(nn.Flatten, torch.flatten, "flatten", nn.Unflatten, "unflatten", torch.unflatten),
    *(torch.reshape, "reshape", "view", torch.squeeze, "squeeze", torch.unsqueeze, "unsqueeze"),
    *(torch.permute, "permute", torch.transpose, "transpose", torch.swapaxes, "swapaxes", torch.movedim, "movedim"),
    *(torch.chunk, "chunk", torch.split, "split", torch.unbind, "unbind", operator.getitem),
    *(torch.narrow, "narrow", torch.select, "select"),
    *(nn.PixelShuffle, F.pixel_shuffle, nn.PixelUnshuffle, F.pixel_unshuffle, nn.ChannelShuffle, F.channel_shuffle),
    *(torch.roll, "roll"),
)
"""Their results consist of values of their input (and zeros, which every grid holds), so they need no rounding."""
PAD: tuple[Any, ...] = (nn.ZeroPad2d, F.pad)
PASS: tuple[Any, ...] = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, F.dropout, F.dropout2d, nn.Identity)
PASS += ("contiguous", "detach", "clone")
"""They change nothing at inference."""
FLOAT: tuple[Any, ...] = (
    *(nn.Hardswish, F.hardswish, nn.Hardsigmoid, F.hardsigmoid, nn.SiLU, F.silu, nn.GELU, F.gelu, nn.Mish, F.mish),
    *(nn.LeakyReLU, F.leaky_relu, nn.PReLU, nn.ELU, F.elu, nn.Softplus, F.softplus, nn.Hardtanh),
    *(nn.Tanh, F.tanh, torch.tanh, "tanh", nn.Softmax, F.softmax, torch.softmax, "softmax"),
    *(nn.LogSoftmax, F.log_softmax, torch.log_softmax, "log_softmax"),
    *(nn.LayerNorm, F.layer_norm, nn.GroupNorm, F.group_norm, nn.InstanceNorm2d, nn.BatchNorm1d, nn.BatchNorm2d),
    *(nn.Conv2d, nn.ConvTranspose2d, nn.Linear, F.conv2d, F.linear),
    *(torch.matmul, operator.matmul, "matmul", torch.bmm, "bmm", F.scaled_dot_product_attention),
    *(torch.exp, "exp", torch.log, "log", torch.sqrt, "sqrt", torch.rsqrt, "rsqrt", torch.square, "square"),
    *(torch.pow, "pow", operator.pow, torch.div, "div", operator.truediv, operator.neg, torch.neg, "neg"),
    *(torch.abs, "abs", torch.reciprocal, "reciprocal", torch.maximum, torch.minimum),
    *(torch.sum, "sum", torch.stack, "expand", "repeat", F.normalize, "expand_as", "float", "type_as"),
)


def role_of(node: fx.Node, modules: dict[str, nn.Module], constants: set[fx.Node]) -> Role | None:
    """What the node is to its grids; None for an operator without a place here.

    `constants` are the nodes before it that depend on no image; shapes must have been propagated.
    """
    if node.op == "placeholder":
        return Role.INPUT
    kind, sources = kind_of(node, modules), operands(node)
    if node.op == "get_attr" or (sources and all(source in constants for source in sources)):
        return Role.CONSTANT
    alone = len(sources) == 1
    with_constant = any(source in constants for source in sources)
    if isinstance(kind, QUANTIZED):
        return None if with_constant else Role.LAYER
    if rectifier(node, modules) is not None and alone:
        return Role.RECTIFIER
    if is_in(kind, ADD) or is_in(kind, SUBTRACT) or is_in(kind, MULTIPLY) or is_in(kind, CONCATENATE):
        return Role.ISLAND if alone or with_constant or not _plain_sum(node) else Role.JOINT
    if is_in(kind, SIGMOID) or is_in(kind, AVERAGE):
        return Role.JOINT
    if is_in(kind, MEAN):
        return _role_of_mean(node, kind)
    if is_in(kind, INTERPOLATE):
        return Role.MOVE if _mode(node, kind) in ("nearest", "nearest-exact") else Role.ISLAND
    if is_in(kind, PAD):
        return Role.MOVE if zero_pads(node, modules) else Role.ISLAND
    if is_in(kind, REARRANGE) or is_in(kind, PASS):
        return Role.MOVE
    return Role.ISLAND if is_in(kind, FLOAT) or is_in(kind, CLAMP) else None


def rectifier(node: fx.Node, modules: dict[str, nn.Module]) -> dict[str, Any] | None:
    """How the grid behind a ReLU, ReLU6 or clamp from zero differs from a plain one; None for everything else."""
    kind = kind_of(node, modules)
    if is_in(kind, RELU):
        return {"nonnegative": True}
    if is_in(kind, RELU6):
        return {"nonnegative": True, "limit": 6.0}
    low: Any = None
    high: Any = None
    if type(kind) is nn.Hardtanh:
        low, high = kind.min_val, kind.max_val
    elif is_in(kind, CLAMP):
        names = ("input", "min_val", "max_val") if kind is F.hardtanh else ("input", "min", "max")
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        low, high = given.get(names[1]), given.get(names[2])
    bounded = high is None or (isinstance(high, (int, float)) and high > 0)
    if isinstance(low, (int, float)) and low == 0 and bounded:
        return {"nonnegative": True} | ({} if high is None else {"limit": float(high)})
    return None


def zero_pads(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[int, ...] | None:
    """(left, right, top, bottom) of a constant zero padding around the image; None for everything else."""
    if node.op == "call_function" and node.target is F.pad:
        arguments = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | dict(node.kwargs)
        pads = arguments["pad"]
        if arguments.get("mode", "constant") != "constant" or arguments.get("value") not in (None, 0, 0.0):
            return None
        if isinstance(pads, (tuple, list)) and len(pads) == 4 and all(isinstance(p, int) and p >= 0 for p in pads):
            return tuple(pads)
    layer = modules[str(node.target)] if node.op == "call_module" else None
    return tuple(layer.padding) if isinstance(layer, nn.ZeroPad2d) else None


def is_sigmoid(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    return is_in(kind_of(node, modules), SIGMOID)


def _plain_sum(node: fx.Node) -> bool:
    """torch.add and torch.sub may multiply their second operand by `alpha`."""
    return "alpha" not in node.kwargs


def _role_of_mean(node: fx.Node, kind: Any) -> Role:
    before = shape_of(operands(node)[0])
    if isinstance(kind, nn.AdaptiveAvgPool2d) or kind is F.adaptive_avg_pool2d:
        return Role.JOINT
    given: dict[str, Any] = dict(zip(("input", "dim", "keepdim"), node.args, strict=False)) | dict(node.kwargs)
    dims = given.get("dim", given.get("axis"))
    dims = (dims,) if isinstance(dims, int) else tuple(dims or range(len(before)))
    places = {dim % len(before) for dim in dims}
    # A mean over channels is part of a normalization, whose results would suffer from 8 bits.
    channels = 1 if len(before) == 4 else len(before) - 1
    return Role.ISLAND if places & {0, channels} else Role.JOINT


def _mode(node: fx.Node, kind: Any) -> str:
    if isinstance(kind, nn.Module):
        return str(getattr(kind, "mode", "nearest"))
    given = dict(zip(("input", "size", "scale_factor", "mode"), node.args, strict=False)) | dict(node.kwargs)
    return str(given.get("mode", "nearest"))
