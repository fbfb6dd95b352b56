"""Networks of many families, from float through training to both int8 files.

Each is asked the same: do ONNX Runtime and LiteRT compute the integers, and has all that has weights an integer kernel?
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from networks import DENSE, NETWORKS, images_of, settle, size_of
from torch import Tensor, nn
from torch.nn import functional as F

from compress.errors import ModelError
from compress.formats.onnx import int8_onnx
from compress.formats.tflite import tensor_names, to_tflite, with_outputs
from compress.formats.tflite_file import unpack
from compress.product import Batch, Preprocess
from compress.quantization import Frozen, Quantization, calibrate, freeze, prepare, run_integers
from compress.verification.layers import compare_layers
from compress.verification.onnx_file import OnnxFile
from compress.verification.tflite_file import TFLiteFile
from compress.verification.torch_network import FrozenNetwork

CPU = torch.device("cpu")
OPERATORS = {code: name for name, code in vars(schema.BuiltinOperator).items() if isinstance(code, int)}
WEIGHTED = {"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV"}
MOVES = {"RESHAPE", "TRANSPOSE", "SLICE", "STRIDED_SLICE", "CONCATENATION"}

FAST = (
    "resnext50",
    "mobilenet_v3_small",
    "regnet_y",
    "densenet",
    "unet_bilinear",
    "unet_transposed",
    "vit",
    "shufflenet_v2",
    "ghostnet",
    "efficientnet_lite",
    "mixed",
)
"""One or more of each family; the others take about a minute together."""

HARD_SIGMOID = {"ADD", "MUL"}
SILU = {"LOGISTIC", "MUL"}
LAYER_NORM = {"MEAN", "SUB", "SQUARE", "ADD", "RSQRT", "MUL"}
MISH = {"ABS", "NEG", "EXP", "ADD", "LOG", "RELU", "MUL", "TANH"}
ATTENTION = {"MUL", "BATCH_MATMUL", "SOFTMAX"}

ISLANDS: dict[str, tuple[int, set[str]]] = {
    # Hard-swishes: stem, expansions of 8 blocks, classifier; with the average behind it, the last; one block's gate
    # (behind ReLU) by itself; 8 blocks' hard-swish with their gate.
    "mobilenet_v3_small": (1 + 8 + 1 + 1 + 1 + 8, {"HARD_SWISH", "MEAN"} | HARD_SIGMOID),
    # The same: 9 expansions, and 4 depthwise without a gate; 3 gates behind ReLU, 5 with their hard-swish.
    "mobilenet_v3_large": (1 + 9 + 4 + 1 + 1 + 3 + 5, {"HARD_SWISH", "MEAN"} | HARD_SIGMOID),
    # Stem and head, 9 expansions, 10 gates' SiLU inside the gate, 10 SiLUs with the gate's average and product.
    "efficientnet_b0": (2 + 9 + 10 + 10, {"MEAN"} | SILU),
    "ghostnet": (2, HARD_SIGMOID),
    "unet_bilinear": (2, {"RESIZE_BILINEAR"}),
    "unet_bilinear_corners": (2, {"RESIZE_BILINEAR"}),
    # Two blocks: attention, GELU; the residual stream with its norms is one.
    "vit": (2 + 2 + 1, {"GELU"} | LAYER_NORM | ATTENTION),
    "vit_timm": (2 + 2 + 1, {"GELU"} | LAYER_NORM | ATTENTION),
    "vit_explicit": (2 + 2 + 1, {"GELU"} | LAYER_NORM | ATTENTION),
    # Stem, between the stages, classifier; two blocks with norm and GELU apart.
    "convnext": (3 + 2 + 2, {"GELU"} | LAYER_NORM),
    "mixed": (7, {"LEAKY_RELU", "PRELU", "TANH", "GELU", "AVERAGE_POOL_2D"} | LAYER_NORM | SILU | MISH),
    # Six SiLUs, three norms, attention, GELU.
    "mobilevit": (6 + 3 + 1 + 1, {"GELU"} | LAYER_NORM | ATTENTION | SILU),
}
"""How many parts of the TFLite file compute in float, and with which operators; 0 where a network is not named."""

UNCOUNTED = ("swin", "swin_unshifted")
"""Windows are cut and joined in float, which ties islands together in ways that nobody counts by hand."""

AMPLIFIED = 24
"""Steps of the logits. Untrained deep networks amplify: a value in the first layers that one runtime rounds otherwise
moved the logits of MobileNetV2 by 19."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Layers as small as these take longer on two threads than on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Exported:
    module: nn.Module
    frozen: Frozen
    onnx: onnx.ModelProto
    tflite: bytes
    images: Tensor
    logits: Tensor
    """Of `run_integers`, in steps: (image, class, ...)."""
    steps: dict[str, Tensor]
    """The quantized values of each image, (image, 1, ...): in attention the first dimension is not the batch."""


@functools.cache
def exported(name: str, dense: bool = False) -> Exported:
    size = size_of(name)
    torch.manual_seed(0)
    seen, unseen = images_of(32, size), images_of(8, size, seed=1)
    module = settle((DENSE if dense else NETWORKS)[name](7), seen)
    preprocess = Preprocess(size=size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop=1.0)
    graph = prepare(module, Quantization(), preprocess)
    with torch.no_grad():
        labels = module(seen).argmax(1)
    calibrate(graph, [Batch(*batch) for batch in zip(seen.split(16), labels.split(16), strict=True)], CPU)
    graph.train()
    optimizer = torch.optim.AdamW(graph.parameters(), 1e-4)
    for images, targets in zip(seen.split(16), labels.split(16), strict=True):
        optimizer.zero_grad()
        loss = F.cross_entropy(graph(images), targets)
        assert torch.isfinite(loss)
        loss.backward()
        optimizer.step()
    frozen = freeze(graph)
    steps = [run_integers(frozen, image, keep_steps=True).steps for image in unseen.split(1)]
    model = int8_onnx(frozen, size, {})
    return Exported(
        module,
        frozen,
        model,
        to_tflite(model, {}),
        unseen,
        frozen.steps(run_integers(frozen, unseen).logits_NK),
        {name: torch.stack([row[name] for row in steps]) for name in steps[0]},
    )


def onnx_steps(made: Exported) -> dict[str, Tensor]:
    """Every quantized value that ONNX Runtime computes, in steps from zero."""
    zero_points = {grid.layer: grid.zero_point for grid in made.frozen.grids()}
    model = onnx.ModelProto()
    model.CopyFrom(made.onnx)
    del model.graph.output[:]
    for name in zero_points:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.UINT8, None))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    rows = [session.run(list(zero_points), {"image": image[None]}) for image in made.images.numpy()]
    return {
        name: torch.from_numpy(np.stack(values).astype(np.int32)) - zero_points[name]
        for name, values in zip(zero_points, zip(*rows, strict=True), strict=True)
    }


def tflite_steps(made: Exported) -> dict[str, Tensor]:
    """The same of LiteRT, as NCHW; without the values that its file folded into an operator or keeps in other order."""
    zero_points = {grid.layer: grid.zero_point - 128 for grid in made.frozen.grids()}
    names = [name for name in zero_points if name in tensor_names(made.tflite)]
    interpreter = Interpreter(model_content=with_outputs(made.tflite, names), num_threads=1)
    interpreter.allocate_tensors()
    (given,) = interpreter.get_input_details()
    assert given["dtype"] == np.int8
    scale, zero_point = given["quantization"]
    indices = {tensor["name"]: tensor["index"] for tensor in interpreter.get_tensor_details()}
    rows: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for image in made.images.permute(0, 2, 3, 1).numpy():
        steps = np.clip(np.rint(image / np.float32(scale)) + zero_point, -128, 127).astype(np.int8)
        interpreter.set_tensor(given["index"], steps[None])
        interpreter.invoke()
        for name, row in rows.items():
            row.append(interpreter.get_tensor(indices[name]).astype(np.int32))
    values = {name: torch.from_numpy(np.stack(row)) - zero_points[name] for name, row in rows.items()}
    values = {name: value.permute(0, 1, 4, 2, 3) if value.ndim == 5 else value for name, value in values.items()}
    return {name: value for name, value in values.items() if value.shape == made.steps[name].shape}


def assert_computes_the_integers(made: Exported, found: dict[str, Tensor]) -> None:
    """Nearly all logits are equal; where they are not, the cause is one rounding in a few hundred values or fewer."""
    (output,) = (grid.layer for grid in made.frozen.grids()[-1:])
    assert made.frozen.output is made.frozen.grids()[-1]
    assert made.frozen.integers.keys() <= found.keys() <= made.steps.keys()
    for name, steps in found.items():  # in the order of execution: what comes before the first difference was equal
        differences = (steps - made.steps[name]).abs()
        if differences.any():
            assert differences.max() == 1, name
            assert (differences > 0).float().mean() < 0.005, name
            break
    logits, expected = found[output].squeeze(1), made.logits
    assert (logits - expected).abs().max() <= AMPLIFIED
    assert (logits.argmax(1) == expected.argmax(1)).float().mean() >= 7 / 8


NAMES = [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in NETWORKS]


def test_every_table_names_networks_of_the_registry():
    assert set(FAST) | set(ISLANDS) <= NETWORKS.keys()
    assert DENSE.keys() <= NETWORKS.keys()


@pytest.mark.parametrize("name", NAMES)
def test_onnxruntime_computes_the_integers(name):
    assert_computes_the_integers(exported(name), onnx_steps(exported(name)))


@pytest.mark.parametrize("name", NAMES)
def test_litert_computes_the_integers(name):
    assert_computes_the_integers(exported(name), tflite_steps(exported(name)))


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_alone_is_within_a_step_of_the_integers(name, tmp_path):
    """On equal inputs, whatever grew on the way: a wrong layer behind an early rounding does not hide."""
    made = exported(name)
    (tmp_path / "a.onnx").write_bytes(made.onnx.SerializeToString())
    (tmp_path / "a.tflite").write_bytes(made.tflite)
    for file in (OnnxFile(tmp_path / "a.onnx"), TFLiteFile(tmp_path / "a.tflite")):
        found = compare_layers(FrozenNetwork(made.frozen), file, made.images[:2].numpy())
        assert made.frozen.integers.keys() <= {layer.layer for layer in found.layers}
        assert max(layer.alone_lsb for layer in found.layers) <= 1


@pytest.mark.parametrize(
    "name", ["unet_nearest", *(pytest.param(name, marks=pytest.mark.slow) for name in DENSE if name != "unet_nearest")]
)
def test_maps_of_classes_are_computed_alike(name):
    made = exported(name, dense=True)
    assert made.logits.shape == (8, 7, size_of(name), size_of(name))
    assert_computes_the_integers(made, onnx_steps(made))
    assert_computes_the_integers(made, tflite_steps(made))


@pytest.mark.parametrize("name", NAMES)
def test_the_tflite_file_has_an_int8_kernel_for_every_layer_with_weights(name):
    made = exported(name)
    layers = {
        name for name, layer in made.module.named_modules() if type(layer) in (nn.Conv2d, nn.Linear, nn.ConvTranspose2d)
    }
    assert layers
    assert layers <= made.frozen.integers.keys()
    model = unpack(made.tflite)
    graph = model.subgraphs[0]
    stored = set()
    for kind, operator in operators(made.tflite):
        if kind in WEIGHTED:
            read = [graph.tensors[index] for index in (*operator.inputs, *operator.outputs)]
            assert not any(tensor.type == schema.TensorType.FLOAT32 for tensor in read), kind
            stored.add(graph.tensors[operator.inputs[1]].name.decode())
    assert {f"{layer}.weight" for layer in made.frozen.integers} <= stored


@pytest.mark.parametrize("name", [name for name in NAMES if name.values[0] not in UNCOUNTED])
def test_what_computes_in_float_is_known(name):
    """Each island costs two conversions on the board, so that a new one should not go unseen."""
    expected_count, expected_kinds = ISLANDS.get(name, (0, set()))
    found = islands(exported(name).tflite)
    assert set().union(*found) - MOVES == expected_kinds
    assert len(found) == expected_count


@pytest.mark.parametrize("name", NAMES)
def test_onnxruntime_has_an_integer_kernel_for_every_layer_with_weights(name, tmp_path):
    made = exported(name)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1")
    onnxruntime.InferenceSession(made.onnx.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kinds = collections.Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert not {"Conv", "FusedConv", "Gemm", "FusedGemm"} & kinds.keys()
    # It has no integer kernel for transposed convolutions.
    transposed = sum(isinstance(layer, nn.ConvTranspose2d) for layer in made.module.modules())
    assert kinds["ConvTranspose"] == transposed
    integer = kinds["QLinearConv"] + kinds["QGemm"] + kinds["QLinearMatMul"]
    assert integer + transposed == len(made.frozen.integers)


def test_what_has_no_place_is_refused_by_operator_and_layer():
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 7)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x).flatten(2).sort(dim=2).values[..., -1])

    preprocess = Preprocess(size=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop=1.0)
    with pytest.raises(ModelError, match=r"layer sort.*operator sort"):
        prepare(Sorted(), Quantization(), preprocess)


def operators(data: bytes) -> list[tuple[str, schema.OperatorT]]:
    """Kind and contents of each operator of a TFLite file, in the order of execution."""
    model = unpack(data)
    codes = [OPERATORS[max(code.builtinCode, code.deprecatedBuiltinCode)] for code in model.operatorCodes]
    return [(codes[operator.opcodeIndex], operator) for operator in model.subgraphs[0].operators]


def islands(data: bytes) -> list[set[str]]:
    """The parts of a TFLite file that compute in float and hang together by float values: each part's operators."""
    model = unpack(data)
    tensors = model.subgraphs[0].tensors
    parts: list[tuple[set[int], set[str]]] = []
    for kind, operator in operators(data):
        if kind in ("QUANTIZE", "DEQUANTIZE"):
            continue
        joined = {
            index
            for index in (*operator.inputs, *operator.outputs)
            if index >= 0
            and tensors[index].type == schema.TensorType.FLOAT32
            and model.buffers[tensors[index].buffer].data is None
        }
        if joined:
            touched = [part for part in parts if part[0] & joined]
            parts = [part for part in parts if not part[0] & joined]
            parts.append((joined.union(*(p[0] for p in touched)), {kind}.union(*(p[1] for p in touched))))
    return [kinds for _, kinds in parts]
