"""Channel counts that are slow here: single int8 layers, timed at their width and at the next multiples of 8 and 16.

A kernel computes a fixed number of channels at a time and pads the rest, so that a few channels more may cost nothing,
and less where they let it leave a slow path. Which widths are fast differs per machine and runtime: it is measured.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from compress.doctor.risks import is_depthwise
from compress.formats.onnx import OPSET
from compress.formats.tflite import to_tflite
from compress.targets import Runtime, open_model
from compress.targets.agent import Model, random_input

MULTIPLES = (8, 16)
MOST_LAYERS = 8
"""Distinct layers that are measured, those with most multiply-adds first."""
WARMUP_S, SAMPLE_S = 0.03, 0.09
"""For each width on each runtime."""
LEAST, STRETCH = 12, 3
"""Least samples of each width, and how many are taken before the next width has its turn."""
QUIET = 25
"""Percentile of the samples."""
FREE = 1.02
"""Two measurements of the same layer differ by about this much here; more channels within it cost nothing."""

RULES = {
    "x86": "multiples of 16. On an AMD EPYC with VNNI (ONNX Runtime 1.31, one thread) a depthwise layer of 88"
    " channels took 1058 us, of 96 took 659 us",
    "ARM": "multiples of 8, or of 16 on cores with dot-product instructions (Cortex-A76). So many output channels"
    " XNNPACK's aarch64 int8 kernels compute at once: 2x8c8__asm_aarch64_neon_mlal, 4x16c4__neondot",
}
"""By family of machines: what is known of widths where nothing was measured, and where it comes from."""


@dataclass(frozen=True)
class Shape:
    """What a single layer's time depends on."""

    kind: str
    """depthwise, grouped, conv or linear."""
    inputs: int
    outputs: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    size: tuple[int, int]
    """Height and width of its input; (1, 1) for a linear layer."""

    def at(self, multiple: int) -> Shape:
        """The same layer with its channels raised to the next multiples; the image's 3 stay."""
        outputs = _up(self.outputs, multiple)
        inputs = self.inputs if self.inputs <= 3 else _up(self.inputs, multiple)
        groups = outputs if self.kind == "depthwise" else self.groups
        return replace(self, inputs=outputs if self.kind == "depthwise" else inputs, outputs=outputs, groups=groups)

    @property
    def channels(self) -> str:
        return str(self.outputs) if self.kind == "depthwise" else f"{self.inputs} to {self.outputs}"

    def __str__(self) -> str:
        if self.kind == "linear":
            return "linear"
        stride = f" / {self.stride[0]}" if self.stride[0] > 1 else ""
        return f"{self.kind} {self.kernel[0]}x{self.kernel[1]}{stride}, {self.size[0]}x{self.size[1]}"


@dataclass(frozen=True)
class Timed:
    """A layer at one width."""

    multiple: int
    """1: as it is."""
    channels: str
    us: float
    """Processor time of a single inference, from array to array."""


@dataclass(frozen=True)
class Width:
    """A layer of the network at its own width and at wider ones, on one runtime."""

    layer: str
    alike: int
    """Layers of the network with the same shape."""
    shape: str
    runtime: str
    times: tuple[Timed, ...]

    @property
    def best(self) -> Timed:
        """The widest of those that take no longer than the layer as it is."""
        return max((t for t in self.times if t.us <= FREE * self.times[0].us), key=lambda t: t.multiple)

    @property
    def slow(self) -> bool:
        """More channels take no longer: those of the layer are used badly."""
        return self.best is not self.times[0]


@dataclass(frozen=True)
class Widths:
    """What was found out about channel counts."""

    measured: tuple[Width, ...]
    odd_layers: int
    """Layers whose channels are no multiples of 16."""
    of_layers: int
    left_out: int
    """Distinct shapes for which the time did not suffice."""
    machine: str
    """The CPU that was measured; empty if none was."""
    rules: dict[str, str]
    """Of `RULES`, those for machines that were not measured; empty where all widths are multiples of 16."""


@dataclass(frozen=True)
class Placed:
    """A layer of the network, with its shape and its multiply-adds."""

    name: str
    shape: Shape
    macs: int


def place_layers(module: nn.Module, input_size: int, channels: int = 3) -> list[Placed]:
    """Every convolution and linear layer with the size of what it reads, in the order of execution."""
    found: dict[str, Placed] = {}
    handles = []

    def watch(name: str, layer: nn.Module) -> None:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            shape = _shape(layer, inputs[0])
            elements = output[0].numel()
            per_element = layer.weight[0].numel()  # type: ignore[index]
            found.setdefault(name, Placed(name, shape, elements * per_element))

        handles.append(layer.register_forward_hook(hook))

    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            watch(name, layer)
    was_training = module.training
    try:
        with torch.no_grad():
            module.eval()(torch.zeros(1, channels, input_size, input_size))
    finally:
        for handle in handles:
            handle.remove()
        module.train(was_training)
    return list(found.values())


def _shape(layer: nn.Module, x: Tensor) -> Shape:
    if isinstance(layer, nn.Linear):
        return Shape("linear", layer.in_features, layer.out_features, (1, 1), (1, 1), (0, 0), (1, 1), 1, (1, 1))
    assert isinstance(layer, nn.Conv2d)
    kind = "depthwise" if is_depthwise(layer) else "grouped" if layer.groups > 1 else "conv"
    padding: Any = layer.padding
    if isinstance(padding, str):
        spans = [(k - 1) * d for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
        padding = tuple(span // 2 if layer.padding == "same" else 0 for span in spans)
    return Shape(
        kind,
        layer.in_channels,
        layer.out_channels,
        (layer.kernel_size[0], layer.kernel_size[1]),
        (layer.stride[0], layer.stride[1]),
        (padding[0], padding[1]),
        (layer.dilation[0], layer.dilation[1]),
        layer.groups,
        (x.shape[-2], x.shape[-1]),
    )


def candidates(layers: Sequence[Placed]) -> list[tuple[Placed, int]]:
    """One layer of each shape that is not wide by multiples of 16, with how many there are; most multiply-adds first.

    The last layer's outputs are the classes and the first one's inputs the image: neither can be changed. A grouped
    convolution is left out: its width cannot grow without its groups.
    """
    chosen: dict[Shape, list[Placed]] = {}
    for layer in layers[:-1]:
        if layer.shape.kind != "grouped" and layer.shape.at(16) != layer.shape:
            chosen.setdefault(layer.shape, []).append(layer)
    heaviest = sorted(chosen.values(), key=lambda alike: -sum(layer.macs for layer in alike))
    before: Counter[str] = Counter()
    rank: dict[str, int] = {}
    for alike in heaviest:  # depthwise layers have few multiply-adds and take long for them: the kinds take turns
        kind = alike[0].shape.kind
        rank[alike[0].name] = before[kind]
        before[kind] += 1
    return [(alike[0], len(alike)) for alike in sorted(heaviest, key=lambda alike: rank[alike[0].name])]


def measure_widths(
    layers: Sequence[Placed],
    runtimes: Sequence[Runtime],
    machine: str,
    *,
    budget_s: float = 20.0,
    advance: Callable[[str], None] = lambda text: None,
) -> Widths:
    """Times of the heaviest layers with odd widths, on this machine with one thread, within about `budget_s`."""
    chosen, found, began = candidates(layers), [], time.perf_counter()
    tried = 0
    for placed, alike in chosen[:MOST_LAYERS] if runtimes else []:
        spent = time.perf_counter() - began
        if tried and spent * (tried + 1) / tried > budget_s:
            break
        shapes = {1: placed.shape}
        for multiple in MULTIPLES:
            if placed.shape.at(multiple) not in shapes.values():
                shapes[multiple] = placed.shape.at(multiple)
        for runtime in runtimes:
            times_us = _times_us(list(shapes.values()), runtime)
            times = tuple(Timed(m, shape.channels, us) for (m, shape), us in zip(shapes.items(), times_us, strict=True))
            found.append(Width(placed.name, alike, str(placed.shape), runtime, times))
        tried += 1
        advance(f"{placed.name} ({placed.shape.channels})")
    odd = sum(layer.shape.at(16) != layer.shape for layer in layers[:-1])
    measured = machine if found else ""
    return Widths(tuple(found), odd, len(layers), len(chosen) - tried, measured, rules(measured) if odd else {})


def rules(measured: str) -> dict[str, str]:
    """What to go by on machines of another family than the one that was measured."""
    family = "x86" if "x86" in measured or "AMD64" in measured else "ARM" if measured else ""
    return {machine: rule for machine, rule in RULES.items() if machine != family}


def _times_us(shapes: Sequence[Shape], runtime: Runtime) -> list[float]:
    """Of each shape, as an int8 file of its own."""
    with tempfile.TemporaryDirectory() as folder:
        models = []
        for number, shape in enumerate(shapes):
            model = single_layer(shape)
            path = Path(folder) / (f"{number}.onnx" if runtime == "onnxruntime" else f"{number}.tflite")
            if runtime == "onnxruntime":
                path.write_bytes(_with_integers(model).SerializeToString())
            else:
                path.write_bytes(to_tflite(model, {}))
            models.append(open_model(path, runtime, threads=1))
        return in_turns(models, seconds=SAMPLE_S * len(models))


def in_turns(models: Sequence[Model], seconds: float) -> list[float]:
    """Microseconds of processor time per inference of each model: the samples' lower quartile.

    Samples are taken in turns, so that a slow moment falls on all models alike. Processor time and not the clock's:
    where more runs than there are cores, the clock tells of the scheduler. Each model must have one thread, this one.
    """
    arrays = [random_input(model.input) for model in models]
    samples_ns: list[list[int]] = [[] for _ in models]
    collects = gc.isenabled()
    gc.disable()  # a collection in the middle of a sample is Python's time, not the network's
    try:
        end = time.perf_counter() + seconds + WARMUP_S * len(models)
        while time.perf_counter() < end or len(samples_ns[0]) < LEAST:
            for model, array, taken in zip(models, arrays, samples_ns, strict=True):
                for _ in range(STRETCH):
                    began = time.thread_time_ns()
                    model.infer(array)
                    taken.append(time.thread_time_ns() - began)
    finally:
        if collects:
            gc.enable()
    return [float(np.percentile(taken, QUIET)) / 1000 for taken in samples_ns]


def single_layer(shape: Shape) -> onnx.ModelProto:
    """The layer between two grids, as our int8 files have it: image, grid, layer, grid."""
    rng = np.random.default_rng(0)
    linear = shape.kind == "linear"
    dims = (shape.outputs, shape.inputs // shape.groups, *(() if linear else shape.kernel))
    weight = rng.integers(-127, 128, dims).astype(np.int8)
    scales = np.full(shape.outputs, 1 / 512, np.float32)
    step = np.float32(1 / 64)
    out_step = np.float32(step * np.sqrt(np.prod(dims[1:])) / 4)  # three standard deviations of the sums
    arrays = {
        "step": step,
        "zero": np.uint8(128),
        "weight": weight,
        "weight_scale": scales,
        "weight_zero": np.zeros(shape.outputs, np.int8),
        "bias": np.zeros(shape.outputs, np.int32),
        "bias_scale": scales * step,
        "bias_zero": np.zeros(shape.outputs, np.int32),
        "out_step": out_step,
    }
    axis: dict[str, Any] = {"axis": 0}
    nodes = [
        helper.make_node("QuantizeLinear", ["image", "step", "zero"], ["x"], "quantize"),
        helper.make_node("DequantizeLinear", ["x", "step", "zero"], ["x/float"], "dequantize"),
        helper.make_node("DequantizeLinear", ["weight", "weight_scale", "weight_zero"], ["w/float"], "w", **axis),
        helper.make_node("DequantizeLinear", ["bias", "bias_scale", "bias_zero"], ["b/float"], "b", **axis),
    ]
    if linear:
        nodes.append(helper.make_node("Gemm", ["x/float", "w/float", "b/float"], ["y/exact"], "layer", transB=1))
    else:
        how: dict[str, Any] = {
            "kernel_shape": shape.kernel,
            "strides": shape.stride,
            "pads": shape.padding * 2,
            "dilations": shape.dilation,
            "group": shape.groups,
        }
        nodes.append(helper.make_node("Conv", ["x/float", "w/float", "b/float"], ["y/exact"], "layer", **how))
    nodes += [
        helper.make_node("QuantizeLinear", ["y/exact", "out_step", "zero"], ["y"], "round"),
        helper.make_node("DequantizeLinear", ["y", "out_step", "zero"], ["result"], "result"),
    ]
    size = (1, shape.inputs) if linear else (1, shape.inputs, *shape.size)
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, size)],
        [helper.make_tensor_value_info("result", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def _with_integers(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same with uint8 in and out, as LiteRT's files have it: ONNX Runtime's conversions are not to be timed."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    kept = [node for node in graph.node if node.name not in ("quantize", "result")]
    del graph.node[:]
    graph.node.extend(kept)
    graph.input[0].name, graph.output[0].name = "x", "y"
    for value in (graph.input[0], graph.output[0]):
        value.type.tensor_type.elem_type = TensorProto.UINT8
    described = [value for value in graph.value_info if value.name not in ("x", "y")]
    del graph.value_info[:]
    graph.value_info.extend(described)
    return changed


def runtimes_of(formats: Sequence[str]) -> Iterator[Runtime]:
    """The runtimes that the recipe's files are for."""
    if "onnx" in formats:
        yield "onnxruntime"
    if "tflite" in formats:
        yield "litert"


def _up(channels: int, multiple: int) -> int:
    return -(-channels // multiple) * multiple
