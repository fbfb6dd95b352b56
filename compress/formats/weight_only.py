"""Smaller files of a float network: its weights as float16, or as int8 steps, turned to float32 before they are used.

Activations, biases and the arithmetic stay float32. What is stored is a constant in front of each layer:

    float16:  weight (float16) -> Cast -> layer
    int8:     weight (int8), scale (float32, one per output channel) -> DequantizeLinear -> layer
              the same weight -> Cast -> Mul by the scale -> layer, in ONNX files (see `multiplied`)
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import fx, nn
from torch.nn import functional as F

from compress.errors import ModelError
from compress.quantization.fake_quant import SMALLEST_SCALE, WEIGHT_QMAX

LEAST_VALUES = 256
"""Of a weight that is converted; for fewer, names and the further node take more bytes than the values save."""

LARGEST_FLOAT16 = float(np.finfo(np.float16).max)

OUTPUTS = {"Conv": 0, "ConvTranspose": 1, "MatMul": -1}
"""The axis of the output channels in a layer's weight; Gemm's depends on its transB."""

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)

FUNCTIONS: dict[Any, int] = {
    F.conv2d: 0,
    F.conv_transpose2d: 1,
    F.linear: 0,
    torch.matmul: -1,
    operator.matmul: -1,
    "matmul": -1,
}
"""The same of torch's functions, whose second operand is the weight."""


def float16_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose layers store their weights as float16, rounded to nearest even: half the size.

    Raises ModelError naming the layer whose weights float16 cannot hold.
    """

    def store(weight: _Weight) -> tuple[dict[str, np.ndarray], onnx.NodeProto]:
        values = weight.values.astype(np.float16)
        node = helper.make_node("Cast", [weight.name], [f"{weight.name}/float"], to=onnx.TensorProto.FLOAT)
        return {weight.name: values}, node

    def refuse(weight: _Weight) -> None:
        with np.errstate(over="ignore"):
            if np.isfinite(weight.values.astype(np.float16)).all():
                return
        raise ModelError(
            f"layer {weight.layer}",
            f"has a weight of {np.abs(weight.values).max():.6g}; float16 ends at {LARGEST_FLOAT16:.0f}",
            "leave float16 out of export's kinds",
        )

    return _converted(model, store, refuse)


def int8_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose layers store their weights as whole steps on [-127, 127], symmetric, per output channel.

    The step is the channel's largest absolute weight over 127. Raises ModelError naming the layer with a weight that
    is no finite number.
    """

    def store(weight: _Weight) -> tuple[dict[str, np.ndarray], onnx.NodeProto]:
        steps, scale = _steps(weight.values, weight.axis)
        stored = {
            weight.name: steps,
            f"{weight.name}_scale": scale,
            f"{weight.name}_zero_point": np.zeros(scale.shape, np.int8),
        }
        node = helper.make_node("DequantizeLinear", list(stored), [f"{weight.name}/float"], axis=weight.axis)
        return stored, node

    def refuse(weight: _Weight) -> None:
        if not np.isfinite(weight.values).all():
            raise ModelError(f"layer {weight.layer}", "has a weight that is no finite number", "train it again")

    return _converted(model, store, refuse)


def multiplied(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with the DequantizeLinear of each weight as Cast and Mul: the same product, to the bit.

    Those two ONNX Runtime computes once, when it loads the file. A DequantizeLinear it keeps for quantized kernels:
    1.31 then took 3 times as long for MobileNetV2, and put MatMulNBits in the place of MatMul, which rounds the
    activations to int8 as well (by 0.4% of the largest output of a network of three linear layers).
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    scales, unused, nodes = {}, set(), []
    for node in graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in weights:
            nodes.append(node)
            continue
        weight, scale, zero_point = node.input
        (axis,) = [attribute.i for attribute in node.attribute if attribute.name == "axis"]
        shape = [-1 if place == axis else 1 for place in range(len(weights[weight].dims))]
        scales[scale] = numpy_helper.to_array(weights[scale]).reshape(shape)
        unused.add(zero_point)
        nodes.append(
            helper.make_node("Cast", [weight], [f"{weight}/steps"], f"{weight}/cast", to=onnx.TensorProto.FLOAT)
        )
        nodes.append(helper.make_node("Mul", [f"{weight}/steps", scale], list(node.output), f"{weight}/multiply"))
    tensors = [
        numpy_helper.from_array(scales[tensor.name], tensor.name) if tensor.name in scales else tensor
        for tensor in graph.initializer
        if tensor.name not in unused
    ]
    _replace(graph, nodes, tensors)
    onnx.checker.check_model(changed, full_check=True)
    return changed


def rounded(module: nn.Module, kind: str) -> nn.Module:
    """A copy in torch whose layers have the weights that a file of this kind (float16, int8_weights) stores.

    What such a file is compared with. BatchNorm must be folded already, as it is in files.
    """
    module = copy.deepcopy(module)
    with torch.no_grad():
        for weight, outputs in _torch_weights(module):
            if weight.numel() < LEAST_VALUES:
                continue
            if kind == "float16":
                weight.copy_(weight.half().float())
                continue
            others = [axis for axis in range(weight.ndim) if axis != outputs % weight.ndim]
            scale = (weight.abs().amax(others, keepdim=True) / WEIGHT_QMAX).clamp_min(SMALLEST_SCALE)
            weight.copy_(torch.round(weight / scale) * scale)
    return module


def _torch_weights(module: nn.Module) -> Iterator[tuple[torch.Tensor, int]]:
    """Weights of layers, and of a graph's functions that a parameter is the second operand of; with output axes."""
    for layer in module.modules():
        if isinstance(layer, LAYERS):
            yield layer.weight, 0 if isinstance(layer, nn.Linear) or not layer.transposed else 1
    seen = set()
    for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
        weight = node.args[1] if node.target in FUNCTIONS and len(node.args) > 1 else None
        if isinstance(weight, fx.Node) and weight.op == "get_attr" and weight.target not in seen:
            seen.add(weight.target)
            values = operator.attrgetter(str(weight.target))(module)
            if values.ndim >= 2:
                yield values, FUNCTIONS[node.target]


def _steps(values: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 steps and the float32 scale of each channel along `axis`."""
    others = tuple(other for other in range(values.ndim) if other != axis)
    largest = np.abs(values).max(others, keepdims=True)
    scale = np.maximum(largest / np.float32(WEIGHT_QMAX), np.float32(SMALLEST_SCALE))
    steps = np.clip(np.rint(values / scale), -WEIGHT_QMAX, WEIGHT_QMAX).astype(np.int8)
    return steps, scale.reshape(-1)


@dataclass(frozen=True)
class _Weight:
    name: str
    layer: str
    values: np.ndarray
    """float32."""
    axis: int
    """Of the output channels."""


_Store = Callable[[_Weight], tuple[dict[str, np.ndarray], onnx.NodeProto]]
"""The constants that replace a weight, the first under its name, and the node that makes float32 of them."""


def _converted(model: onnx.ModelProto, store: _Store, refuse: Callable[[_Weight], None]) -> onnx.ModelProto:
    converted = onnx.ModelProto()
    converted.CopyFrom(model)
    graph = converted.graph
    weights = list(_weights(graph))
    for weight in weights:
        refuse(weight)
    nodes = list(graph.node)
    constants: dict[str, dict[str, np.ndarray]] = {}
    for weight in weights:
        constants[weight.name], node = store(weight)
        node.name = f"{weight.name}/{'cast' if node.op_type == 'Cast' else 'dequantize'}"
        users = [at for at, user in enumerate(nodes) if weight.name in user.input]
        for at in users:
            nodes[at].input[1] = node.output[0]
        nodes.insert(users[0], node)
    tensors = []
    for tensor in graph.initializer:
        arrays = constants.get(tensor.name)
        if arrays is None:
            tensors.append(tensor)
        else:
            tensors += [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    described = [value for value in graph.value_info if value.name not in constants]
    _replace(graph, nodes, tensors)
    del graph.value_info[:]
    graph.value_info.extend(described)
    onnx.checker.check_model(converted, full_check=True)
    return converted


def _replace(graph: onnx.GraphProto, nodes: list[onnx.NodeProto], tensors: list[onnx.TensorProto]) -> None:
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(tensors)


def _weights(graph: onnx.GraphProto) -> Iterator[_Weight]:
    """The weights of layers that are large enough, and are nothing else to any other node."""
    found: dict[str, set[int | None]] = {}
    for node in graph.node:
        for place, name in enumerate(node.input):
            found.setdefault(name, set()).add(_outputs(node) if place == 1 else None)
    results = {value.name for value in graph.output}
    for tensor in graph.initializer:
        axes = found.get(tensor.name, set())
        eligible = tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) >= 2
        if not eligible or len(axes) != 1 or None in axes or tensor.name in results:
            continue
        values, (axis,) = numpy_helper.to_array(tensor), axes
        if values.size >= LEAST_VALUES and axis is not None:
            yield _Weight(tensor.name, _layer_name(graph, tensor.name), values, axis % values.ndim)


def _outputs(node: onnx.NodeProto) -> int | None:
    """The axis of the output channels in the weight of a layer; None for other nodes."""
    if node.op_type == "Gemm":
        transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        return 0 if transposed else 1
    return OUTPUTS.get(node.op_type)


def _layer_name(graph: onnx.GraphProto, weight: str) -> str:
    """The layer a weight belongs to: from its own name, or from the bias that is added to its product.

    torch's exporter stores the transposed weight of a linear layer over tokens as `val_5`.
    """
    if weight.endswith(".weight"):
        return weight.removesuffix(".weight")
    products = {node.output[0] for node in graph.node if weight in node.input}
    for node in graph.node:
        if node.op_type == "Add" and products & set(node.input):
            for name in node.input:
                if name.endswith(".bias"):
                    return name.removesuffix(".bias")
    return weight
