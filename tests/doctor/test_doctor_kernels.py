"""What the runtimes are found to do, on networks and files of which it is known."""

import numpy as np
import pytest
import torch
from conftest import PREPROCESS, SmallNet, randomized
from torch import nn
from torch.nn import functional as F

from compress import measures
from compress.doctor.kernels import kernels
from compress.doctor.program import Operator, Program, Value, litert_program, onnxruntime_program
from compress.errors import ModelError
from compress.formats.onnx import float_onnx, int8_onnx
from compress.formats.tflite import to_tflite
from compress.formats.tflite_file import TFLiteFile
from compress.product import Batch
from compress.quantization import Quantization, calibrate, fold_batchnorm, freeze, prepare


class Islands(nn.Module):
    """Two convolutions with a hard-swish between them, which no runtime has as an int8 kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1, stride=2)
        self.head = nn.Linear(8 * 8 * 8, 5)

    def forward(self, x):
        return self.head(F.relu(self.second(F.hardswish(self.first(x)))).flatten(1))


def files_of(module: nn.Module):
    prepared = prepare(module, Quantization(), PREPROCESS)
    images_NCHW = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    calibrate(prepared, [Batch(images_NCHW, torch.zeros(4, dtype=torch.long))], torch.device("cpu"))
    model = int8_onnx(freeze(prepared), 16, {})
    return onnxruntime_program(model), litert_program(to_tflite(model, {}))


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return randomized(SmallNet())


@pytest.fixture(scope="module")
def small_files(small):
    return files_of(small)


@pytest.fixture(scope="module")
def island_files():
    torch.manual_seed(0)
    return files_of(Islands().eval())


def test_an_integer_network_computes_in_integers(small_files):
    for program in small_files:
        found = kernels(program)
        assert found.operators >= 6
        assert (found.in_float, found.float_macs, found.float_bytes, found.conversions) == ((), 0.0, 0.0, 0)
    assert kernels(small_files[1]).not_delegated == ()
    assert kernels(small_files[1]).partitions == 1


def test_multiply_adds_are_those_of_the_network(small, small_files):
    expected = measures.macs(small, 16)
    model = float_onnx(fold_batchnorm(small), 16, {})
    programs = (*small_files, onnxruntime_program(model), litert_program(to_tflite(model, {})))
    assert [program.macs for program in programs] == [expected] * 4


def test_layers_keep_their_names(small_files):
    for program in small_files:
        named = {operator.layer for operator in program.operators if operator.macs}
        assert named == {"stem", "depthwise", "point", "down", "head"}


def test_an_island_is_found_in_both_runtimes_with_its_layer(island_files):
    for program in island_files:
        found = kernels(program)
        layers = {layer for fallen in found.in_float for layer in fallen.layers}
        assert layers == {"hardswish"}
        assert found.float_macs == 0.0  # a hard-swish has none
        assert 0.2 < found.float_bytes < 1.0
        assert found.conversions == 2


def test_a_float_network_is_all_float_and_its_conversions_none():
    model = float_onnx(Islands().eval(), 16, {})
    for program in (onnxruntime_program(model), litert_program(to_tflite(model, {}))):
        found = kernels(program)
        assert (found.float_macs, found.float_bytes, found.conversions) == (1.0, 1.0, 0)
        assert sum(fallen.count for fallen in found.in_float) == found.operators


def test_what_xnnpack_leaves_is_seen():
    file = TFLiteFile()
    names = [file.tensor(name, (1, 4)) for name in "xabc"]
    for op, source, result in zip(("RELU", "SIGN", "RELU6"), names, names[1:], strict=False):
        file.operator(op, [source], result)
    program = litert_program(file.to_bytes(inputs=names[:1], outputs=names[-1:], metadata={}))
    assert [operator.delegated for operator in program.operators] == [True, False, True]
    found = kernels(program)
    assert [(fallen.op, fallen.layers) for fallen in found.not_delegated] == [("SIGN", ("b",))]
    assert found.partitions == 2


def test_peak_is_the_largest_sum_of_values_alive():
    def value(name: str, elements: int, dtype: str = "float32") -> Value:
        return Value(name, (1, elements), dtype)

    def step(reads: list[Value], result: Value) -> Operator:
        return Operator("Add", result.name, tuple(reads), (result,), 0)

    image, a, b, c = value("image", 10), value("a", 100), value("b", 30, "int8"), value("c", 5)
    weight = Value("w", (1000,), "float32", constant=True)
    straight = Program("", (step([image, weight], a), step([a], b), step([b], c)), (image,), (c,))
    assert straight.peak_bytes() == 40 + 400  # a while the image is still read; then a with b: 430
    skipped = Program("", (step([image], a), step([a], b), step([b, image], c)), (image,), (c,))
    assert skipped.peak_bytes() == 40 + 400 + 30
    kept = Program("", (step([image], a), step([image], c)), (image,), (a, c))
    assert kept.peak_bytes() == 40 + 400 + 20


def test_peak_of_a_chain_is_that_of_its_largest_step(island_files):
    _, program = island_files
    maps = {"first": 8 * 256, "hardswish": 8 * 256}
    # int8 image and map; the map with its float copy; two float maps; and so on: the two float maps are largest.
    assert program.peak_bytes() == 4 * sum(maps.values())


@pytest.mark.parametrize("read", [litert_program])
def test_a_file_the_runtime_refuses_is_a_model_error(read):
    file = TFLiteFile()
    x, y = file.tensor("x", (1, 4)), file.tensor("y", (1, 5))
    file.operator("ADD", [x, file.constant("c", np.zeros((2, 3), np.float32))], y)  # shapes that do not fit
    with pytest.raises(ModelError, match="litert: cannot open the file"):
        read(file.to_bytes(inputs=[x], outputs=[y], metadata={}))


class Transposed(nn.Module):
    """ONNX Runtime has no integer kernel for a transposed convolution; LiteRT has."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.up(F.relu(self.first(x))).mean((2, 3)))


def test_the_runtimes_are_asked_one_by_one():
    torch.manual_seed(0)
    module = Transposed().eval()
    ort, litert = map(kernels, files_of(module))
    up = next(layer["macs"] for layer in measures.layers(module, 16) if layer["name"] == "up")
    assert ort.float_macs == pytest.approx(up / measures.macs(module, 16))
    assert "up" in {layer for fallen in ort.in_float for layer in fallen.layers}
    assert litert.float_macs == 0


def test_from_one_grid_to_another_is_no_float():
    rows = tuple(Value(name, (1, 4), "int8") for name in "ab")
    assert not Operator("QUANTIZE", "b", rows[:1], rows[1:], 0).is_boundary
    assert not Operator("QUANTIZE", "b", rows[:1], rows[1:], 0).in_float
    real = Value("x", (1, 4), "float32")
    assert Operator("QUANTIZE", "a", (real,), rows[:1], 0).is_boundary
    assert not Operator("QUANTIZE", "a", (real,), rows[:1], 0).in_float


def test_parts_of_an_operator_are_named_for_it():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GELU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(8 * 256, 5))
    for program in files_of(module.eval()):
        assert {layer for fallen in kernels(program).in_float for layer in fallen.layers} == {"1"}
