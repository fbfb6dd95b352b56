"""What other runtimes make of our int8 networks: the figures of docs/runtimes.md.

    python benchmarks/runtimes.py executorch mobilenet_v2 resnet18    # needs `pip install executorch==1.5.1`
    python benchmarks/runtimes.py grids mobilenet_v2 resnet18         # trained grids moved onto ncnn's

Networks are those of tests/networks.py, of random weights, calibrated on 32 images and asked about 64.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from networks import NETWORKS, images_of, settle, size_of

from compress.formats.onnx import int8_onnx
from compress.formats.tflite import to_tflite
from compress.product import Batch, Preprocess
from compress.quantization import Frozen, Grid, Integers, Quantization, calibrate, freeze, prepare, run_integers

OPS = torch.ops.quantized_decomposed


def frozen(name: str) -> tuple[Frozen, Tensor]:
    torch.manual_seed(0)
    size = size_of(name)
    images = images_of(64, size)
    module = settle(NETWORKS[name](10), images)
    half = (0.5, 0.5, 0.5)
    prepared = prepare(module, Quantization(), Preprocess(size=size, mean=half, std=half, crop=1.0))
    calibrate(prepared, [Batch(images[:32], torch.zeros(32, dtype=torch.long))], torch.device("cpu"))
    return freeze(prepared), images


def differing(answer: Tensor, expected: Tensor, lsb: float) -> str:
    steps = torch.round((answer - expected) / lsb).abs()
    return f"{int((steps > 0).sum())} of {steps.numel()} outputs differ, by {int(steps.max())} LSB at most"


# ---- ExecuTorch: the frozen network as XNNPACK wants it


class SignedGrid(nn.Module):
    """XNNPACK has no unsigned type: the same grid, numbered from -128."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = (grid.scale, grid.zero_point - 128, -128, 127, torch.int8)

    def forward(self, x: Tensor) -> Tensor:
        return OPS.dequantize_per_tensor(OPS.quantize_per_tensor(x, *self.grid), *self.grid)


class IntegerLayer(nn.Module):
    """A convolution or linear layer with its int8 weights; XNNPACK finds the int32 biases again by itself."""

    def __init__(self, layer: nn.Module, integers: Integers) -> None:
        super().__init__()
        self.axis = integers.axis
        self.register_buffer("weight", integers.weight)
        self.register_buffer("scale", integers.weight_scale)
        self.register_buffer("zero", torch.zeros(len(integers.weight_scale), dtype=torch.int64))
        self.register_buffer("bias", integers.bias.float() * integers.bias_scale)
        self.convolution = None
        if isinstance(layer, nn.Conv2d):
            self.convolution = (layer.stride, layer.padding, layer.dilation, layer.groups)
        elif not isinstance(layer, nn.Linear):
            raise SystemExit(f"{type(layer).__name__} is not tried here")

    def forward(self, x: Tensor) -> Tensor:
        weight = OPS.dequantize_per_channel(self.weight, self.scale, self.zero, self.axis, -127, 127, torch.int8)
        if self.convolution is None:
            return F.linear(x, weight, self.bias)
        return F.conv2d(x, weight, self.bias, *self.convolution)


def for_xnnpack(found: Frozen, image: Tensor) -> torch.export.ExportedProgram:
    module = copy.deepcopy(found.module)
    for node in list(module.graph.nodes):
        kind = module.get_submodule(node.target) if node.op == "call_module" else node.target
        if kind is F.dropout or isinstance(kind, (nn.Dropout, nn.Dropout2d, nn.Identity)):
            # Left in, it parts a linear layer from its grid, and the layer then computes nonsense without a word.
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    for name, layer in list(module.named_modules()):
        if isinstance(layer, Grid):
            module.set_submodule(name, SignedGrid(layer))
    for name, integers in found.integers.items():
        module.set_submodule(name, IntegerLayer(module.get_submodule(name), integers))
    module.recompile()
    exported = torch.export.export(module, (image,)).module()
    for node in list(exported.graph.nodes):
        if node.target is OPS.dequantize_per_tensor.default:
            for user in list(node.users)[1:]:  # shared, it ties partitions into a cycle: "found dependency cycles"
                with exported.graph.inserting_after(node):
                    user.replace_input_with(node, exported.graph.node_copy(node))
    exported.recompile()
    return torch.export.export(exported, (image,))


def executorch(name: str) -> str:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    found, images = frozen(name)
    lowered = to_edge_transform_and_lower(for_xnnpack(found, images[:1]), partitioner=[XnnpackPartitioner()])
    try:
        content = lowered.to_executorch().buffer  # the program reads it where it is, and does not keep it alive
        program = Runtime.get().load_program(content)
        method = program.load_method("forward")
    except RuntimeError as error:
        return f"does not load: {error}"
    answer = torch.cat([method.execute([image[None].contiguous()])[0].clone() for image in images])
    return differing(answer, litert(found, images), found.output.scale if found.output else 1.0)


def litert(found: Frozen, images: Tensor) -> Tensor:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=to_tflite(int8_onnx(found, images.shape[-1], {}), {}))
    interpreter.allocate_tensors()
    (source,), (sink, *_) = interpreter.get_input_details(), interpreter.get_output_details()
    rows = []
    for image in images.numpy():
        scale, zero = source["quantization"]
        steps = np.clip(np.rint(image.transpose(1, 2, 0) / np.float32(scale)) + zero, -128, 127).astype(np.int8)
        interpreter.set_tensor(source["index"], steps[None])
        interpreter.invoke()
        scale, zero = sink["quantization"]
        rows.append((interpreter.get_tensor(sink["index"])[0].astype(np.float32) - zero) * np.float32(scale))
    return torch.from_numpy(np.stack(rows))


# ---- ncnn: 255 steps, symmetric around zero


def grids(name: str) -> str:
    found, images = frozen(name)
    points = [grid.zero_point for grid in found.grids()]
    moved = copy.deepcopy(found)
    for grid in moved.grids():
        low, high = -grid.zero_point * grid.scale, (255 - grid.zero_point) * grid.scale
        step = max(-low, high) / 127
        grid.forward = lambda x, low=low, high=high, step=step: torch.round(x.clamp(low, high) / step) * step
    assert found.output is not None
    with torch.inference_mode():
        answer = moved.module(images)
    exact = run_integers(found, images).logits_NK
    same = (answer.argmax(1) == exact.argmax(1)).float().mean()
    return (
        f"{sum(point in (127, 128) for point in points)} of {len(points)} grids are symmetric; with all of them so, "
        f"{differing(answer, exact, found.output.scale)}, and {same:.0%} of the images keep their class"
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    tried: dict[str, Callable[[str], str]] = {"executorch": executorch, "grids": grids}
    for name in sys.argv[2:]:
        print(f"{name}: {tried[sys.argv[1]](name)}", flush=True)
