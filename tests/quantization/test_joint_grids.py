"""Sums and their like on settled grids: exact arithmetic, ONNX Runtime and LiteRT agree on all pairs of steps."""

from __future__ import annotations

import math
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import pytest
import torch
from conftest import PREPROCESS, SmallNet, randomized
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from compress.formats.onnx import int8_onnx
from compress.formats.tflite import to_tflite
from compress.quantization import ActivationQuantizer, Quantization, calibrate, freeze, prepare
from compress.quantization.joint_grids import LARGEST_NUDGE, disputed, settled_scale
from compress.targets import open_model
from compress.verification.layers import compare_layers
from compress.verification.onnx_file import OnnxFile
from compress.verification.tflite_file import TFLiteFile
from compress.verification.torch_network import FrozenNetwork

F32 = np.float32
OPERATORS = {"sum": "Add", "difference": "Sub", "product": "Mul", "concatenation": "Concat"}
STEPS = np.arange(256)
few = settings(max_examples=60, deadline=None, derandomize=True, database=None)
many = settings(max_examples=250, deadline=None, derandomize=True, database=None)


def exact(joint, a, b, c):
    """Steps of the result for all pairs, (256, 256), or of both operands one after the other."""
    (scale_a, zero_a), (scale_b, zero_b), (scale_c, zero_c) = a, b, c
    x, y = (STEPS - zero_a)[:, None] * scale_a, (STEPS - zero_b)[None, :] * scale_b
    values = {
        "sum": lambda: x + y,
        "difference": lambda: x - y,
        "product": lambda: x * y,
        "concatenation": lambda: np.concatenate([x + 0 * y, 0 * x + y], 1),
    }[joint]()
    return np.clip(np.rint(values / scale_c) + zero_c, 0, 255)


def computed(joint, a, b, c):
    """The same in ONNX Runtime and in LiteRT, opened as the project opens every file."""
    constants = {}
    for name, (scale, zero_point) in {"a": a, "b": b, "c": c}.items():
        constants |= {f"{name}_scale": np.asarray(scale, F32), f"{name}_zero": np.asarray(zero_point, np.uint8)}

    def on_grid(value, name):
        grid = [f"{name}_scale", f"{name}_zero"]
        quantize = helper.make_node("QuantizeLinear", [value, *grid], [f"{name}_steps"])
        return [quantize, helper.make_node("DequantizeLinear", [f"{name}_steps", *grid], [f"{name}_real"])]

    attributes = {"axis": 3} if joint == "concatenation" else {}
    nodes = [
        helper.make_node("Split", ["image"], ["a", "b"], axis=1, num_outputs=2),
        *on_grid("a", "a"),
        *on_grid("b", "b"),
        helper.make_node(OPERATORS[joint], ["a_real", "b_real"], ["c"], **attributes),
        *on_grid("c", "c"),
    ]
    graph = helper.make_graph(
        nodes,
        joint,
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 2, 256, 256])],
        [helper.make_tensor_value_info("c_real", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    rows = (STEPS - a[1])[:, None] * a[0] * np.ones((1, 256))
    columns = (STEPS - b[1])[None, :] * b[0] * np.ones((256, 1))
    images = np.stack([rows, columns])[None].astype(F32)
    with TemporaryDirectory() as folder:
        paths = [Path(folder) / "joint.onnx", Path(folder) / "joint.tflite"]
        onnx.save(model, paths[0])
        paths[1].write_bytes(to_tflite(model, {}))
        if joint != "concatenation":
            assert OPERATORS[joint].upper() in TFLiteFile(paths[1]).ops
        found = [open_model(path).predict(images).squeeze() for path in paths]
    return [np.rint(real / F32(c[0])) + c[1] for real in found]


def points(low, high):
    """Grids, of which every third or so has a scale of few bits, which makes exact halves."""
    scales = st.floats(low, high, width=32) | st.integers(1, 24).map(lambda n: n / 2**8 * high)
    return st.tuples(scales.map(lambda scale: float(F32(scale))), st.sampled_from([0, 128, 255]) | st.integers(0, 255))


@st.composite
def joints(draw, names=tuple(OPERATORS)):
    joint = draw(st.sampled_from(names))
    a, b = draw(points(0.0625, 1)), draw(points(0.0625, 1))
    width = {"product": 255 * a[0] * b[0], "concatenation": max(a[0], b[0])}.get(joint, a[0] + b[0])
    scale, zero_point = draw(points(0.25, 1))
    return joint, a, b, (float(F32(scale * width)), zero_point)


def settled(joint, a, b, c):
    return settled_scale(joint, [a, b], c), c[1]


@few
@given(joints(("sum",)))
def test_all_sums_agree_on_a_settled_grid(case):
    joint, a, b, c = case
    c = settled(*case)
    for found in computed(joint, a, b, c):
        np.testing.assert_array_equal(found, exact(joint, a, b, c))


@few
@given(joints(("difference", "product", "concatenation")))
def test_all_differences_products_and_concatenations_agree_on_a_settled_grid(case):
    joint, a, b, c = case
    c = settled(*case)
    if disputed(joint, [a, b], c):
        assert joint == "concatenation"
        assert c in (a, b)
        return
    for found in computed(joint, a, b, c):
        np.testing.assert_array_equal(found, exact(joint, a, b, c))


@many
@given(joints(("sum", "difference", "product")))
@example(("sum", (0.25, 100), (0.25, 3), (0.5, 7)))
def test_a_scale_without_disputes_is_near(case):
    joint, a, b, c = case
    scale, _ = settled(*case)
    assert disputed(joint, [a, b], (scale, c[1])) == 0
    assert abs(scale / c[0] - 1) < LARGEST_NUDGE
    assert scale == float(F32(scale))
    assert settled(joint, a, b, (scale, c[1])) == (scale, c[1])  # settling twice changes nothing


@few
@given(joints())
def test_whatever_the_runtimes_dispute_is_counted(case):
    joint, a, b, c = case
    expected = exact(*case)
    wrong = np.any([found != expected for found in computed(*case)], axis=0)
    if joint == "concatenation":  # each value of one operand stands there 256 times
        wrong = np.concatenate([wrong[:, 0], wrong[0, 256:]])
    assert wrong.sum() <= disputed(joint, [a, b], c)


@pytest.mark.parametrize("zero_point", [0, 7, 128])
def test_ties_are_mended(zero_point):
    """(a + b) / 2 is half-way between two steps for half of all pairs.

    ONNX Runtime rounds it to an even number counted from the lowest step, we to one counted from zero, LiteRT up.
    """
    a, b, c = (0.25, 100), (0.25, 30), (0.5, zero_point)
    expected = exact("sum", a, b, c)
    apart = [int((found != expected).sum()) for found in computed("sum", a, b, c)]
    assert apart[1] > 1000
    assert (apart[0] > 1000) == (zero_point % 2 == 1)
    c = settled("sum", a, b, c)
    for found in computed("sum", a, b, c):
        np.testing.assert_array_equal(found, exact("sum", a, b, c))


def test_a_grid_that_ends_where_relu6_clips_is_never_widened():
    six = float(F32(6 / 255))
    a, b = (six / 2, 0), (six / 2, 0)
    scale = settled_scale("sum", [a, b], (six, 0), largest=six)
    assert scale < six
    assert disputed("sum", [a, b], (scale, 0)) == 0


def test_a_concatenation_keeps_the_grid_of_what_it_only_moves():
    a, b = (float(F32(0.1)), 10), (float(F32(0.1) * F32(1.5)), 20)
    assert disputed("concatenation", [a, b], a) > 0
    assert settled_scale("concatenation", [a, b], a) == a[0]
    scale = settled_scale("concatenation", [b, b], a)
    assert scale != a[0]
    assert disputed("concatenation", [b, b], (scale, 10)) == 0


class Joints(nn.Module):
    """A sum, a difference, a product and a concatenation, a ReLU6 behind one of them, a move behind another."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.relu6, self.pool = nn.ReLU6(), nn.MaxPool2d(2)
        self.inner = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(16 * 8 * 8, 5)

    def forward(self, x):
        x, y = self.left(x), self.right(x)
        x, y = self.pool(self.relu6(x + y)), self.pool(x - y)
        x = self.inner(x) * y
        return self.head(torch.cat([x, y], 1).flatten(1))


@pytest.mark.parametrize(("network", "names"), [(SmallNet, {"add"}), (Joints, {"add", "sub", "mul", "cat"})])
def test_frozen_joints_are_settled_in_both_files(network, names, stripes, tmp_path):
    torch.manual_seed(0)  # for the biases, which `randomized` leaves
    prepared = prepare(randomized(network()), Quantization(), PREPROCESS)
    calibrate(prepared, stripes.batches("train", batch_size=16), torch.device("cpu"))
    quantizers = {m.layer: m for m in prepared.modules() if isinstance(m, ActivationQuantizer) and not m.fixed}
    with torch.no_grad():
        for name, quantizer in quantizers.items():  # powers of two, large ones of joints: halves everywhere
            exponent = (quantizer.log_scale / math.log(2)).round() + (name in names)
            quantizer.log_scale.copy_(exponent * math.log(2))
    before = {name: quantizer.grid() for name, quantizer in quantizers.items()}
    frozen = freeze(prepared.eval())
    assert before == {name: quantizer.grid() for name, quantizer in quantizers.items()}

    after = {grid.layer: (grid.scale, grid.zero_point) for grid in frozen.grids() if grid.layer in before}
    moved = {name for name in after if after[name] != before[name]}
    assert moved
    assert moved <= names <= set(after)
    assert all(abs(after[name][0] / before[name][0] - 1) < LARGEST_NUDGE for name in moved)

    model = int8_onnx(frozen, 16, {})
    onnx.save(model, tmp_path / "int8.onnx")
    (tmp_path / "int8.tflite").write_bytes(to_tflite(model, {}))
    images = stripes.splits["evaluation"][0].numpy()
    for file in (OnnxFile(tmp_path / "int8.onnx"), TFLiteFile(tmp_path / "int8.tflite")):
        layers = compare_layers(FrozenNetwork(frozen), file, images).layers
        assert names <= {layer.layer for layer in layers}
        assert [layer.layer for layer in layers if layer.layer in names and layer.alone_differing] == []
