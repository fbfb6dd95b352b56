"""Weights stored in 16 or 8 bits, against the rounding written out here and a torch network so rounded."""

from __future__ import annotations

import io

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import SmallNet, Stripes, randomized
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from compress.errors import ModelError
from compress.formats.onnx import float_onnx
from compress.formats.weight_only import float16_weights, int8_weights, multiplied, rounded
from compress.quantization import fold_batchnorm
from compress.targets import open_model

SIZE = 16
KINDS = {"float16": float16_weights, "int8_weights": lambda model: multiplied(int8_weights(model))}


class Tokens(nn.Module):
    """Linear layers over tokens (MatMul), a matrix of its own, a grouped transposed convolution, and small layers."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, stride=4)
        self.widen, self.narrow = nn.Linear(32, 64), nn.Linear(64, 32)
        self.mixing = nn.Parameter(torch.randn(32, 32) / 6)
        self.up = nn.ConvTranspose2d(32, 24, 2, stride=2, groups=2)
        self.small = nn.Conv2d(24, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.narrow(torch.relu(self.widen(tokens))) @ self.mixing
        x = self.up(tokens.transpose(1, 2).reshape(x.shape))
        return self.head(torch.relu(self.small(x)).mean((2, 3)))


def one_layer(operator: str, weight: np.ndarray, image: list[int], **attributes: int) -> onnx.ModelProto:
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(operator, ["image", "layer.weight"], ["logits"], **attributes)],
        "one",
        [onnx.helper.make_tensor_value_info("image", 1, image)],
        [onnx.helper.make_tensor_value_info("logits", 1, list("abcd")[: len(image)])],
        [numpy_helper.from_array(weight.astype(np.float32), "layer.weight")],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)


def a_convolution(outputs: int = 16) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((outputs, 3, 5, 5)).astype(np.float32)


@pytest.fixture(scope="module", params=["small net", "tokens"])
def network(request):
    torch.manual_seed(0)
    return fold_batchnorm(randomized(SmallNet())) if request.param == "small net" else fold_batchnorm(Tokens().eval())


@pytest.fixture(scope="module")
def model(network):
    return float_onnx(network, SIZE, {})


def stored(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def in_front(model: onnx.ModelProto) -> dict[str, str]:
    """What makes float32 of each constant, by the constant's name."""
    constants = stored(model)
    return {node.input[0]: node.op_type for node in model.graph.node if node.input[0] in constants}


def output_axis(model: onnx.ModelProto, weight: str) -> int:
    (user,) = (node for node in model.graph.node if weight in node.input)
    attributes = {attribute.name: attribute.i for attribute in user.attribute}
    if user.op_type == "Gemm":
        return 0 if attributes.get("transB") else 1
    return {"Conv": 0, "ConvTranspose": 1, "MatMul": 1}[user.op_type]


def test_large_weights_are_float16_rounded_to_nearest_even(model):
    before, made = stored(model), float16_weights(model)
    after = stored(made)
    assert before.keys() == after.keys()
    converted = {name for name in after if after[name].dtype == np.float16}
    large = {name for name, array in before.items() if array.ndim >= 2 and array.size >= 256}
    assert converted == large == {name for name, op in in_front(made).items() if op == "Cast"}
    assert len(large) >= 4
    for name, array in before.items():
        if name in large:
            # torch's rounding is another implementation than numpy's
            assert (after[name] == torch.from_numpy(array.copy()).half().numpy()).all()
        else:
            assert after[name].dtype == array.dtype
            assert (after[name] == array).all()


def test_int8_weights_are_whole_steps_of_the_largest_over_127(model):
    before, made = stored(model), int8_weights(model)
    after = stored(made)
    converted = {name for name, array in before.items() if after[name].dtype != array.dtype}
    assert converted == {name for name, array in before.items() if array.ndim >= 2 and array.size >= 256}
    for name in converted:
        axis = output_axis(model, name)
        rows = np.moveaxis(before[name], axis, 0).reshape(before[name].shape[axis], -1)
        steps = np.moveaxis(after[name], axis, 0).reshape(rows.shape)
        scale = after[f"{name}_scale"]
        assert steps.dtype == np.int8
        assert (scale == np.abs(rows).max(1) / np.float32(127)).all()
        assert (steps == np.round(rows / scale[:, None])).all()
        assert (np.abs(steps.astype(int)).max(1) == 127).all()
        assert (np.abs(steps * scale[:, None] - rows) <= scale[:, None] * (0.5 + 1e-5)).all()
        assert (after[f"{name}_zero_point"] == 0).all()
        (node,) = (node for node in made.graph.node if node.input[0] == name)
        assert node.op_type == "DequantizeLinear"
        assert [attribute.i for attribute in node.attribute if attribute.name == "axis"] == [axis]
    biases = [name for name in after if name.endswith(".bias")]
    assert len(biases) >= 4
    assert all(after[name].dtype == np.float32 and (after[name] == before[name]).all() for name in biases)


@pytest.mark.parametrize("kind", KINDS)
def test_onnxruntime_computes_what_torch_does_with_rounded_weights(network, model, kind, tmp_path):
    images = Stripes().splits["evaluation"][0]
    (tmp_path / "m.onnx").write_bytes(KINDS[kind](model).SerializeToString())
    logits = open_model(tmp_path / "m.onnx").predict(images.numpy())
    with torch.no_grad():
        expected, unrounded = rounded(network, kind)(images).numpy(), network(images).numpy()
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    # The weights that were rounded are the difference: the test would notice a file of the original ones.
    assert np.abs(unrounded - expected).max() > 5 * np.abs(logits - expected).max()


def test_the_torch_copy_has_the_stored_weights_and_the_original_keeps_its_own(network, model):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for kind in KINDS:
        state = rounded(network, kind).state_dict()
        constants = stored(KINDS[kind](model))
        for name, array in constants.items():
            if name in state and array.dtype != np.float32:
                values = array.astype(np.float32) * constants.get(f"{name}_scale", np.float32(1))
                assert (state[name].numpy() == values).all(), name
    assert all((value == before[name]).all() for name, value in network.state_dict().items())


def test_the_same_product_as_dequantize_linear_to_the_bit(model):
    """By ONNX's own definition of the operators."""

    def weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
        made = [node for node in model.graph.node if node.output[0].split("/")[-1] in ("float", "steps")]
        names = [node.output[0] for node in made if node.output[0].endswith("/float")]
        graph = onnx.helper.make_graph(
            made, "weights", [], [onnx.helper.make_tensor_value_info(name, 1, None) for name in names],
            list(model.graph.initializer),
        )  # fmt: skip
        # Opset 19 is the first that the evaluator knows DequantizeLinear of.
        alone = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 19)])
        return dict(zip(names, ReferenceEvaluator(alone).run(None, {}), strict=True))

    made = int8_weights(model)
    before, after = weights(made), weights(multiplied(made))
    assert before.keys() == after.keys()
    assert len(before) >= 4
    assert all((before[name] == after[name]).all() for name in before)
    assert "DequantizeLinear" not in {node.op_type for node in multiplied(made).graph.node}


@pytest.mark.parametrize("kind", KINDS)
def test_onnxruntime_makes_float32_of_the_weights_once_when_it_loads(model, kind, tmp_path):
    """So the file takes the time and the memory of a float32 one, and no kernel rounds activations."""
    (tmp_path / "m.onnx").write_bytes(KINDS[kind](model).SerializeToString())
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(tmp_path / "optimized.onnx").graph
    operators = {node.op_type for node in optimized.node}
    assert not operators & {"Cast", "Mul", "DequantizeLinear", "MatMulNBits", "MatMulIntegerToFloat"}
    assert {tensor.data_type for tensor in optimized.initializer} <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}


def test_files_shrink_by_the_bytes_of_the_weights():
    model = one_layer("Conv", a_convolution(512), [1, 3, SIZE, SIZE])
    weights = 512 * 75
    size = model.ByteSize()
    # Beside the weights: a node and its name, and for int8 a scale and a zero point per channel.
    assert 2 * weights - 300 < size - float16_weights(model).ByteSize() < 2 * weights
    assert 3 * weights - 5 * 512 - 400 < size - int8_weights(model).ByteSize() < 3 * weights - 5 * 512


@pytest.mark.parametrize(("largest", "refused"), [(65_519.0, False), (65_520.0, True), (float("inf"), True)])
def test_a_weight_that_float16_cannot_hold_is_named(largest, refused):
    """65,504 is the largest; what rounds to it is fine."""
    weight = a_convolution()
    weight[3, 1, 2, 2] = largest
    model = one_layer("Conv", weight, [1, 3, SIZE, SIZE])
    if not refused:
        assert stored(float16_weights(model))["layer.weight"].max() == 65_504
        return
    with pytest.raises(ModelError, match=r"^layer layer: has a weight of .*; float16 ends at 65504; leave float16 out"):
        float16_weights(model)
    if largest == float("inf"):
        with pytest.raises(ModelError, match=r"^layer layer: has a weight that is no finite number"):
            int8_weights(model)


def test_a_layer_over_tokens_is_named_though_its_weight_is_not():
    torch.manual_seed(0)
    network = Tokens().eval()
    with torch.no_grad():
        network.narrow.weight[0, 0] = 1e6
    with pytest.raises(ModelError, match=r"^layer narrow: "):
        float16_weights(float_onnx(network, SIZE, {}))


def test_a_matrix_that_is_more_than_a_weight_stays_float32():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 32, 4, stride=4)
            self.table = nn.Parameter(torch.randn(32, 32))

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.patches(x).flatten(2).transpose(1, 2).mean(1, keepdim=True)
            return (tokens @ self.table + self.table).mean(1)

    model = float_onnx(Tied().eval(), SIZE, {})
    for convert in (float16_weights, int8_weights):
        kinds = {name: array.dtype for name, array in stored(convert(model)).items()}
        assert kinds["table"] == np.float32
        assert kinds["patches.weight"] != np.float32


def test_a_channel_of_zeros_stays_zeros():
    weight = a_convolution()
    weight[3], weight[4] = 0, 1e-30
    constants = stored(int8_weights(one_layer("Conv", weight, [1, 3, SIZE, SIZE])))
    assert (constants["layer.weight"][3] == 0).all()
    assert np.isfinite(constants["layer.weight_scale"]).all()
    assert (constants["layer.weight_scale"] > 0).all()


def test_the_model_that_was_given_is_not_changed(model):
    before = model.SerializeToString(deterministic=True)
    multiplied(int8_weights(model))
    float16_weights(model)
    assert model.SerializeToString(deterministic=True) == before
    assert onnx.load(io.BytesIO(float16_weights(model).SerializeToString())).opset_import[0].version == 18


@settings(max_examples=20, deadline=None)
@given(
    operator=st.sampled_from(["Conv", "ConvTranspose", "Gemm", "MatMul"]),
    outputs=st.integers(1, 6).map(lambda n: 8 * n),
    groups=st.sampled_from([1, 2, 4]),
    transposed=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_any_layer(operator, outputs, groups, transposed, seed):
    """onnxruntime on the converted file against onnxruntime on a float file of the weights rounded here."""
    rng = np.random.default_rng(seed)
    shape, image, attributes = {
        "Conv": ((outputs, 16 // groups, 5, 5), [1, 16, 8, 8], {"group": groups}),
        "ConvTranspose": ((16, outputs // groups, 5, 5), [1, 16, 8, 8], {"group": groups}),
        "Gemm": ((outputs, 64) if transposed else (64, outputs), [3, 64], {"transB": int(transposed)}),
        "MatMul": ((64, outputs), [1, 7, 64], {}),
    }[operator]
    weight = (rng.standard_normal(shape) * 10 ** rng.uniform(-3, 3)).astype(np.float32)
    axis = {"Conv": 0, "ConvTranspose": 1, "Gemm": 0 if transposed else 1, "MatMul": 1}[operator]

    def run(model: onnx.ModelProto) -> np.ndarray:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return session.run(None, {"image": values})[0]

    def layer(weight: np.ndarray) -> onnx.ModelProto:
        return one_layer(operator, weight, image, **attributes)

    values = rng.standard_normal(image).astype(np.float32)
    others = tuple(place for place in range(weight.ndim) if place != axis)
    scale = np.abs(weight).max(others, keepdims=True) / np.float32(127)
    steps = np.round(weight / scale) * scale
    for made, same in (
        (float16_weights(layer(weight)), weight.astype(np.float16).astype(np.float32)),
        (multiplied(int8_weights(layer(weight))), steps),
    ):
        assert {tensor.data_type for tensor in made.graph.initializer} & {
            onnx.TensorProto.FLOAT16,
            onnx.TensorProto.INT8,
        }
        expected = run(layer(same))
        np.testing.assert_allclose(run(made), expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
