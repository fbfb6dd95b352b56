"""ONNX files: of convolutional networks by a table of operators, of all others by torch.onnx.export.

With the latter, the integers of a frozen network replace the float weights afterwards.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from compress.errors import ModelError
from compress.formats.convolutional import OPSET, NotInTableError, float_model, frozen_model
from compress.quantization import Frozen, Grid, Integers
from compress.quantization.names import named, value_names


def float_onnx(module: nn.Module, input_size: int, metadata: Mapping[str, str], channels: int = 3) -> onnx.ModelProto:
    """The network as float32 ONNX: input `image` (1, channels, size, size), output `logits` (1, K).

    Values of an fx graph are named for the layer that made them, as in the int8 file.
    Raises ModelError where torch.onnx cannot translate the network.
    """
    if not isinstance(module, fx.GraphModule):
        return _finish(_export(module, input_size, channels), metadata)
    with contextlib.suppress(NotInTableError):
        shaped = copy.deepcopy(module)
        ShapeProp(shaped).propagate(torch.zeros(1, channels, input_size, input_size))
        return _described(float_model(shaped, value_names(shaped), input_size, channels), metadata)
    layers = named(module)
    model = _export(layers.module, input_size, channels)
    _name_values(model, layers.values)
    return _finish(model, metadata)


def int8_onnx(frozen: Frozen, input_size: int, metadata: Mapping[str, str], channels: int = 3) -> onnx.ModelProto:
    """The frozen network as QDQ ONNX: uint8 activations, int8 weights per output channel, int32 biases.

    Quantized tensors are named for the layer that made them (`features.0.0`), so that runtimes can be compared layer by
    layer. Input and output stay float32.
    """
    with contextlib.suppress(NotInTableError):
        return _described(frozen_model(frozen, input_size, channels), metadata)
    model = _export(frozen.module, input_size, channels)
    _name_grids(model, frozen.grids())
    _share_nothing(model)
    for layer, integers in frozen.integers.items():
        _store_integers(model, layer, integers)
    return _finish(model, metadata)


def _export(module: nn.Module, input_size: int, channels: int) -> ir.Model:
    image = torch.zeros(1, channels, input_size, input_size)
    try:
        with _quiet():
            program = torch.onnx.export(
                module.eval(), (image,), dynamo=True, opset_version=OPSET, verbose=False, external_data=False
            )
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise ModelError(
            type(module).__name__,
            f"torch.onnx cannot export it ({reason[0] if reason else type(error).__name__})",
            "see the operator named there, and torch.onnx's list of supported ones",
        ) from error
    assert program is not None
    model = program.model
    if len(model.graph.inputs) != 1 or len(model.graph.outputs) != 1:
        raise ModelError(
            type(module).__name__,
            f"has {len(model.graph.inputs)} inputs and {len(model.graph.outputs)} outputs",
            "a network takes one image tensor and returns one tensor of logits",
        )
    model.graph.inputs[0].name, model.graph.outputs[0].name = "image", "logits"
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Holds back what torch's exporter says of itself: that torchvision is absent, and its own deprecations."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)


def _name_values(model: ir.Model, values: list[tuple[str, str]]) -> None:
    """Names the result of each module's call; the exporter notes modules' paths, and one operator's name per call."""
    calls: dict[str, dict[str, ir.Value]] = {}
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        if len(scopes) > 1 and node.outputs:
            calls.setdefault(scopes[-2], {})[scopes[-1]] = node.outputs[0]  # the last operator of the call stays
    names: dict[str, list[str]] = {}
    for path, name in values:
        names.setdefault(path, []).append(name)
    chosen: list[tuple[ir.Value, str]] = []
    for path, results in names.items():
        made = list(calls.get(path, {}).values())
        if len(made) > len(results) == 1:
            made = made[-1:]
        if len(made) == len(results):
            chosen += zip(made, results, strict=True)
    _clear(model, {name for _, name in chosen})
    for value, name in chosen:
        if not value.is_graph_output():
            value.name = name


def _clear(model: ir.Model, names: set[str]) -> None:
    """Gives other names to values that have one of `names`."""
    for value in (value for node in model.graph for value in node.outputs):
        if value.name in names and not value.is_graph_output():
            value.name = f"{value.name}/exact"


def _name_grids(model: ir.Model, grids: list[Grid]) -> None:
    """Names each quantized tensor for its layer; the exporter keeps the order of the frozen graph."""
    nodes = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    _clear(model, {grid.layer for grid in grids})
    if len(nodes) != len(grids):
        raise AssertionError(f"{len(nodes)} QuantizeLinear nodes for {len(grids)} grids")
    for node, grid in zip(nodes, grids, strict=True):
        _, scale, zero_point = node.inputs
        if (np.float32(grid.scale), grid.zero_point) != (_constant(scale), _constant(zero_point)):
            raise AssertionError(f"the grid of {grid.layer} moved during export")
        node.outputs[0].name = grid.layer
        for user in node.outputs[0].consumers():
            if user.op_type == "DequantizeLinear" and not user.outputs[0].is_graph_output():
                user.outputs[0].name = f"{grid.layer}/float"


def _constant(value: ir.Value | None) -> Any:
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def _share_nothing(model: ir.Model) -> None:
    """Gives each layer a weight and bias of its own: the exporter keeps one for layers whose numbers are the same."""
    for name, value in list(model.graph.initializers.items()):
        kind = name.rpartition(".")[2]
        for node in list(value.consumers()) if kind in ("weight", "bias") else ():
            scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
            own = f"{scopes[-2]}.{kind}" if len(scopes) > 1 else name
            if own == name or own in model.graph.initializers:
                continue
            copied = ir.Value(name=own, shape=value.shape, type=value.type, const_value=value.const_value)
            model.graph.register_initializer(copied)
            node.replace_input_with(list(node.inputs).index(value), copied)


def _store_integers(model: ir.Model, layer: str, integers: Integers) -> None:
    """Puts int8 weights and int32 biases, each behind a DequantizeLinear, in the place of the float ones."""
    weight = model.graph.initializers[f"{layer}.weight"]
    (node,) = weight.consumers()
    scales = integers.weight_scale.numpy()
    quantized = _dequantized(model, node, f"{layer}.weight", integers.weight.numpy(), scales, integers.axis)
    node.replace_input_with(1, quantized)
    bias = _dequantized(model, node, f"{layer}.bias", integers.bias.numpy(), integers.bias_scale.numpy())
    if len(node.inputs) > 2:
        node.replace_input_with(2, bias)
    else:  # the exporter drops a bias that is all zeros
        node.resize_inputs(3)
        node.replace_input_with(2, bias)


def _dequantized(
    model: ir.Model, before: ir.Node, name: str, integers: np.ndarray, scale: np.ndarray, axis: int = 0
) -> ir.Value:
    if name in model.graph.initializers:
        model.graph.initializers.pop(name).name = f"{name}/unused"
    constants = {
        name: integers,
        f"{name}_scale": scale.astype(np.float32),
        f"{name}_zero_point": np.zeros(scale.shape, integers.dtype),
    }
    values = []
    for key, array in constants.items():
        value = ir.Value(name=key, const_value=ir.tensor(array, name=key))
        value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
        model.graph.register_initializer(value)
        values.append(value)
    node = ir.node("DequantizeLinear", values, attributes={"axis": axis}, name=f"{name}/dequantize")
    node.outputs[0].name = f"{name}/float"
    model.graph.insert_before(before, node)
    return node.outputs[0]


def _finish(model: ir.Model, metadata: Mapping[str, str]) -> onnx.ModelProto:
    proto: onnx.ModelProto = ir.to_proto(model)
    del proto.metadata_props[:]
    proto.graph.ClearField("metadata_props")
    for node in proto.graph.node:
        node.ClearField("metadata_props")  # torch's stack traces: paths of the machine that exported
        node.ClearField("doc_string")
    for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output):
        value.ClearField("metadata_props")
    return _described(proto, metadata)


def _described(proto: onnx.ModelProto, metadata: Mapping[str, str]) -> onnx.ModelProto:
    onnx.helper.set_model_props(proto, dict(metadata))
    onnx.checker.check_model(proto, full_check=True)
    return proto
