"""Whole networks: the float TFLite file computes what torch computes, and keeps constants stored as the ONNX does."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from networks import DENSE, NETWORKS, images_of, settle, size_of
from onnx_nets import nhwc, run_onnx, run_onnx_all, run_tflite

from compress.formats.onnx import float_onnx
from compress.formats.tflite import axis_orders, tensor_names, to_tflite, with_outputs
from compress.formats.tflite_file import unpack
from compress.formats.weight_only import float16_weights, int8_weights, multiplied

QUICK = ("shufflenet_v2", "squeezenet", "unet_transposed", "vit")
"""Exporting all takes torch two minutes."""


def close(got: np.ndarray, expected: np.ndarray) -> None:
    """Deep networks of random weights enlarge rounding: torch and ONNX Runtime are as far apart."""
    expected = nhwc(expected)
    assert got.shape == expected.shape
    assert expected.std() > 0.01 * np.abs(expected).max(), "a constant would prove nothing"
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


exported: dict[str, tuple[onnx.ModelProto, np.ndarray, np.ndarray]] = {}


def network(name: str) -> tuple[onnx.ModelProto, np.ndarray, np.ndarray]:
    """The float ONNX of a network, an image, and torch's answer."""
    if name not in exported:
        torch.manual_seed(0)
        size = size_of(name.removeprefix("dense "))
        build = DENSE[name.removeprefix("dense ")] if name.startswith("dense ") else NETWORKS[name]
        images = images_of(8, size)
        module = build(10)
        module = (module if name.startswith("dense ") else settle(module, images)).eval()
        with torch.inference_mode():
            answer = module(images[:1]).numpy()
        exported[name] = float_onnx(module, size, {}), images[:1].numpy(), answer
    return exported[name]


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in (*NETWORKS, *(f"dense {name}" for name in DENSE))
    ],
)
def test_a_network_of_torch(name):
    model, image, answer = network(name)
    data = to_tflite(model, {})
    close(run_tflite(data, image)[0], answer)


# ---- what is in between, and how constants are stored --------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "shufflenet_v2"])
def test_values_in_between_can_be_compared_whatever_their_order(name):
    model, image, _ = network(name)
    data = to_tflite(model, {})
    orders, names = axis_orders(data), tensor_names(data)
    values = {
        key: array for key, array in run_onnx_all(renamed(model), image).items() if key in names and array.ndim > 1
    }
    assert len(values) > 20
    layered = with_outputs(data, list(values))
    graph = unpack(layered).subgraphs[0]
    found = dict(
        zip([graph.tensors[index].name.decode() for index in graph.outputs], run_tflite(layered, image), strict=True)
    )
    for key, expected in values.items():
        usual = (0, 2, 3, 1) if expected.ndim == 4 else tuple(range(expected.ndim))
        got = found[key].transpose(np.argsort(orders.get(key, usual)))
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max(), err_msg=key)


def renamed(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its input named as in the other tests."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.input[0].name = "images"
    for node in copy.graph.node:
        node.input[:] = ["images" if name == "image" else name for name in node.input]
    return copy


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize(
    ("store", "kind", "share"), [(float16_weights, np.float16, 0.65), (int8_weights, np.int8, 0.55)]
)
def test_weights_stay_stored_as_in_the_onnx(name, store, kind, share):
    model, image, _ = network(name)
    plain, small = to_tflite(model, {}), store(model)
    data = to_tflite(small, {})
    assert len(data) < share * len(plain)
    file = unpack(data)
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in small.graph.initializer}
    compared = 0
    for tensor in file.subgraphs[0].tensors:
        weight = stored.get(tensor.name.decode())
        if weight is None or weight.dtype != kind or weight.ndim < 2:
            continue
        content = file.buffers[tensor.buffer].data.view(kind)
        np.testing.assert_array_equal(np.sort(content), np.sort(weight.reshape(-1)))
        if kind == np.int8:
            scales = stored[f"{tensor.name.decode()}_scale"]
            np.testing.assert_array_equal(np.asarray(tensor.quantization.scale, np.float32), scales)
            assert tensor.shape[tensor.quantization.quantizedDimension] == len(scales)
        compared += 1
    assert compared >= 5
    # onnxruntime would quantize activations too where it meets a DequantizeLinear of weights: see `multiplied`.
    reference = renamed(multiplied(small) if kind == np.int8 else small)
    close(run_tflite(data, image)[0], run_onnx(reference, image)[0])
