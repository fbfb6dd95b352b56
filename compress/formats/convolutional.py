"""ONNX of convolutional networks, written operator by operator from their graph.

torch.onnx.export takes seconds for what takes hundredths of a second here, and every run, check and test exports
several networks. It remains the way for all networks with an operator that this table does not have, and the measure of
this one: both give the same operators, and the same numbers to the last bit.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import fx, nn
from torch.nn import functional as F

from compress.quantization import Frozen, Grid, Integers
from compress.quantization.graph import CALLS, is_tensor

OPSET = 18
"""onnxruntime 1.31 fails on type agreement at full optimization with the quantize operators of opset 21."""
IR_VERSION = 10
"""The oldest that knows this opset's features; older runtimes on boards refuse newer ones."""

NUMPY_NAMES = {"axis": "dim", "keepdims": "keepdim"}
PASS = (nn.Dropout, nn.Dropout2d, nn.Identity)
FLATTEN = (nn.Flatten, torch.flatten, "flatten", torch.reshape, "reshape", "view")
JOINTS = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add"), "Add"),
    **dict.fromkeys((operator.sub, torch.sub, "sub"), "Sub"),
    **dict.fromkeys((operator.mul, torch.mul, "mul"), "Mul"),
}
POINTWISE = {
    **dict.fromkeys((nn.ReLU, F.relu, torch.relu, "relu"), "Relu"),
    **dict.fromkeys((nn.Sigmoid, F.sigmoid, torch.sigmoid, "sigmoid"), "Sigmoid"),
    **dict.fromkeys((nn.Hardswish, F.hardswish), "HardSwish"),
}


@dataclass(frozen=True)
class _Padded:
    """A value with zeros around it, which the convolutions behind it take into their own padding."""

    value: str
    pads: tuple[int, int, int, int]
    """Left, right, top, bottom."""


class NotInTableError(Exception):
    """An operator that torch.onnx has to write."""


def frozen_model(frozen: Frozen, input_size: int, channels: int = 3) -> onnx.ModelProto:
    """The frozen network as QDQ ONNX, named as `int8_onnx` says. Raises NotInTableError."""
    names = {node: f"{node.name}/exact" for node in frozen.module.graph.nodes}
    return _Writer(frozen.module, names, frozen.integers).model(input_size, channels)


def float_model(
    graph_module: fx.GraphModule, names: dict[fx.Node, str], input_size: int, channels: int = 3
) -> onnx.ModelProto:
    """A float network whose shapes were propagated, with `names` of its values. Raises NotInTableError."""
    return _Writer(graph_module, names, {}).model(input_size, channels)


class _Writer(fx.Interpreter):
    """Runs a graph on names of values instead of tensors."""

    def __init__(self, module: fx.GraphModule, names: dict[fx.Node, str], integers: dict[str, Integers]) -> None:
        super().__init__(module)
        self.ends = next(node for node in module.graph.nodes if node.op == "output").all_input_nodes
        self.names, self.integers = names, integers
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.current: fx.Node

    def model(self, size: int, channels: int) -> onnx.ModelProto:
        with torch.no_grad():
            self.run("image")
        ends = [("image", [1, channels, size, size]), ("logits", list(self.ends[0].meta["tensor_meta"].shape))]
        infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in ends]
        weights = [numpy_helper.from_array(array, name) for name, array in self.constants.items()]
        graph = helper.make_graph(self.nodes, "main_graph", infos[:1], infos[1:], weights)
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="compress")
        try:
            return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
        except onnx.shape_inference.InferenceError as error:
            raise NotInTableError(str(error)) from error

    def run_node(self, n: fx.Node) -> Any:
        self.current = n
        if n.op in CALLS and not is_tensor(n):
            return None  # sizes, which stand in the shapes of those that ask for them
        return super().run_node(n)

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return "image"

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        raise NotInTableError(target)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        layer = self.fetch_attr(target)
        if isinstance(layer, Grid):
            return self._grid(layer, args[0])
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            return self._layer(target, layer, args[0])
        return self._operator(type(layer), layer, args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._operator(target, None, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._operator(target, None, args, kwargs)

    def output(self, target: Any, args: Any, kwargs: Any) -> Any:
        if not self.nodes or not isinstance(args[0], str) or self.nodes[-1].output[0] != args[0]:
            raise NotInTableError("an output that others read")
        self.nodes[-1].output[0] = "logits"

    def _shape(self) -> list[int]:
        return [int(size) for size in self.current.meta["tensor_meta"].shape]

    def _add(self, op: str, inputs: list[str], output: str = "", **attributes: Any) -> str:
        output = output or self.names[self.current]
        self.nodes.append(helper.make_node(op, inputs, [output], name=f"{output}/{op}", **attributes))
        return output

    def _constant(self, name: str, array: np.ndarray) -> str:
        self.constants[name] = array
        return name

    def _own_constant(self, name: str, values: Any, kind: type = np.int64) -> str:
        return self._constant(f"{self.names[self.current]}/{name}", np.asarray(values, kind))

    def _grid(self, grid: Grid, x: str) -> str:
        scale = self._constant(f"{grid.layer}/scale", np.asarray(grid.scale, np.float32))
        zero_point = self._constant(f"{grid.layer}/zero_point", np.asarray(grid.zero_point, np.uint8))
        self._add("QuantizeLinear", [x, scale, zero_point], grid.layer)
        return self._add("DequantizeLinear", [grid.layer, scale, zero_point], f"{grid.layer}/float")

    def _stored(self, name: str, integers: np.ndarray, scales: np.ndarray) -> str:
        inputs = [
            self._constant(name, integers),
            self._constant(f"{name}_scale", scales.astype(np.float32)),
            self._constant(f"{name}_zero_point", np.zeros(scales.shape, integers.dtype)),
        ]
        return self._add("DequantizeLinear", inputs, f"{name}/float", axis=0)

    def _layer(self, name: str, layer: nn.Conv2d | nn.Linear, x: str | _Padded) -> str:
        x, (left, right, top, bottom) = (x.value, x.pads) if isinstance(x, _Padded) else (x, (0, 0, 0, 0))
        if name in self.integers:
            integers = self.integers[name]
            weight = self._stored(f"{name}.weight", integers.weight.numpy(), integers.weight_scale.numpy())
            inputs = [x, weight, self._stored(f"{name}.bias", integers.bias.numpy(), integers.bias_scale.numpy())]
        else:
            inputs = [x, self._constant(f"{name}.weight", layer.weight.detach().numpy())]
            if layer.bias is not None:
                inputs.append(self._constant(f"{name}.bias", layer.bias.detach().numpy()))
        if isinstance(layer, nn.Linear):
            if len(self._shape()) != 2:
                raise NotInTableError("a product of more than a matrix")
            return self._add("Gemm", inputs, transB=1)
        if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
            raise NotInTableError("padding by name")
        (vertical, horizontal), (height, width) = layer.padding, layer.kernel_size
        return self._add(
            "Conv",
            inputs,
            group=layer.groups,
            pads=[top + vertical, left + horizontal, bottom + vertical, right + horizontal],
            strides=list(layer.stride),
            dilations=list(layer.dilation),
            kernel_shape=[height, width],
        )

    def _operator(self, kind: Any, layer: Any, args: Any, kwargs: Any) -> Any:
        if not args:
            raise NotInTableError("keywords alone")
        kwargs = {NUMPY_NAMES.get(name, name): value for name, value in kwargs.items()}
        if kind in PASS:
            return str(args[0])
        if kind in JOINTS and not kwargs and all(isinstance(argument, str) for argument in args):
            return self._add(JOINTS[kind], list(args))
        if kind in POINTWISE:
            return self._add(POINTWISE[kind], [args[0]])
        if kind in (nn.ReLU6, F.relu6):
            bounds = [self._own_constant("low", 0, np.float32), self._own_constant("high", 6, np.float32)]
            return self._add("Clip", [args[0], *bounds])
        if kind in (nn.Hardsigmoid, F.hardsigmoid):
            return self._add("HardSigmoid", [args[0]], alpha=1 / 6, beta=0.5)
        if kind in FLATTEN:
            return self._add("Reshape", [args[0], self._own_constant("shape", self._shape())])
        if kind in (torch.cat, torch.concat) and all(isinstance(part, str) for part in args[0]):
            axis = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            return self._add("Concat", list(args[0]), axis=axis % len(self._shape()))
        if kind in (F.adaptive_avg_pool2d, nn.AdaptiveAvgPool2d) and self._shape()[2:] == [1, 1]:
            return self._add("ReduceMean", [args[0], self._own_constant("axes", [2, 3])], keepdims=1)
        if kind in (torch.mean, "mean"):
            return self._mean(args, kwargs)
        if kind is nn.MaxPool2d and not layer.ceil_mode and not layer.return_indices:
            return self._pool("MaxPool", layer, args[0], dilations=_pair(layer.dilation))
        if kind is nn.AvgPool2d and not layer.ceil_mode and layer.divisor_override is None:
            return self._pool("AveragePool", layer, args[0], count_include_pad=int(layer.count_include_pad))
        if kind is F.pad and not kwargs.get("value") and kwargs.get("mode", "constant") == "constant":
            return self._pad(args)
        raise NotInTableError(kind)

    def _mean(self, args: Any, kwargs: Any) -> str:
        given = dict(zip(("input", "dim", "keepdim"), args, strict=False)) | kwargs
        dims = given.get("dim")
        if not isinstance(dims, (tuple, list)):
            raise NotInTableError("a mean over other than several axes")
        axes = self._own_constant("axes", list(dims))
        return self._add("ReduceMean", [given["input"], axes], keepdims=int(given.get("keepdim", False)))

    def _pool(self, op: str, layer: Any, x: str, **attributes: Any) -> str:
        pads = _pair(layer.padding)
        strides = _pair(layer.stride or layer.kernel_size)
        return self._add(
            op, [x], kernel_shape=_pair(layer.kernel_size), strides=strides, pads=pads + pads, **attributes
        )

    def _pad(self, args: Any) -> str | _Padded:
        if len(args) != 2 or len(args[1]) != 4 or any(not isinstance(pad, int) or pad < 0 for pad in args[1]):
            raise NotInTableError("a padding of another kind")
        users = self.current.users
        if all(user.op == "call_module" and isinstance(self.fetch_attr(str(user.target)), nn.Conv2d) for user in users):
            return _Padded(args[0], tuple(args[1]))
        left, right, top, bottom = args[1]
        return self._add("Pad", [args[0], self._own_constant("pads", [0, 0, top, left, 0, 0, bottom, right])])


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)
