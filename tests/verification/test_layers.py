"""Which layer computes something else, asked of the runtimes."""

import numpy as np
import pytest
import torch
from corruption import change_onnx, change_onnx_grid, change_tflite, scaled
from torch import nn

from compress.errors import CompressError, ModelError
from compress.product import Network, Product
from compress.progress import Silent
from compress.quantization import freeze
from compress.stages.export import Export
from compress.stages.quantize import Quantize
from compress.stages.verify import Verify
from compress.verification import open_file, verify_files
from compress.verification.layers import compare_layers
from compress.verification.torch_network import FrozenNetwork


@pytest.fixture
def images(run) -> np.ndarray:
    return run.data.splits["evaluation"][0][:6].numpy()


@pytest.mark.parametrize("name", ["int8.onnx", "int8.tflite"])
def test_layers_alone_on_their_own_inputs_compute_what_they_did_together(exported, images, name):
    file = open_file(exported.files[name])
    steps = file.steps(images)
    alone = file.alone(images, steps)
    assert set(alone) == set(steps)
    for layer, values in steps.items():
        np.testing.assert_array_equal(alone[layer], values)


@pytest.mark.parametrize("name", ["int8.onnx", "int8.tflite"])
def test_a_layer_alone_sees_only_what_it_is_given(exported, images, name):
    """Other numbers in one tensor change the layers that read it, and no others."""
    file = open_file(exported.files[name])
    steps = file.steps(images)
    given = steps | {"depthwise": np.flip(steps["depthwise"], axis=2)}
    alone = file.alone(images, given)
    changed = {layer for layer in steps if not np.array_equal(alone[layer], steps[layer])}
    assert changed == {"point"}


def test_all_three_read_the_same_tensors_in_one_layout(exported, images):
    frozen = FrozenNetwork(freeze(exported.network.module))
    ours = frozen.steps(images)
    for name in ("int8.onnx", "int8.tflite"):
        found = compare_layers(frozen, open_file(exported.files[name]), images)
        assert len(found.layers) >= len(ours) - 1  # LiteRT has the image as its input
        assert {layer.layer for layer in found.layers} <= set(ours)
        assert found.worst_alone <= 1
        assert found.first_wrong is None


@pytest.mark.parametrize(
    ("name", "layer", "tell"),
    [
        ("int8.onnx", "point", lambda path: change_onnx(path, "point.bias", lambda b: b + 40 * np.abs(b).max())),
        ("int8.onnx", "depthwise", lambda path: change_onnx_grid(path, "depthwise", factor=1.05)),
        ("int8.onnx", "stem", lambda path: change_onnx(path, "stem.weight_scale", lambda s: s * 1.2)),
        ("int8.tflite", "point", lambda path: change_tflite(path, "point", scaled(1.05))),
        ("int8.tflite", "down", lambda path: change_tflite(path, "down.weight", scaled(0.8))),
    ],
)
def test_the_first_layer_that_is_wrong_on_its_own_is_named(exported, images, name, layer, tell):
    tell(exported.files[name])
    frozen = FrozenNetwork(freeze(exported.network.module))
    found = compare_layers(frozen, open_file(exported.files[name]), images)
    assert found.first_wrong.layer == layer
    other = {"int8.onnx": "int8.tflite", "int8.tflite": "int8.onnx"}[name]
    assert compare_layers(frozen, open_file(exported.files[other]), images).first_wrong is None


def test_a_file_that_the_runtime_refuses_is_still_read(exported):
    """XNNPACK wants one grid before and behind a PAD, so it does not open this file at all."""
    change_tflite(exported.files["int8.tflite"], "add", scaled(1.01))
    files = [exported.files[name] for name in ("int8.onnx", "int8.tflite")]
    with pytest.raises(CompressError, match=r"int8.tflite: scale of layer add is .* litert cannot open it") as raised:
        verify_files(files, progress=Silent())
    assert "\n" not in str(raised.value)
    with pytest.raises(CompressError, match=r"int8.tflite: scale and zero point of layer add are"):
        verify_files(files[1:], progress=Silent())


def test_a_file_whose_layers_are_right_but_that_differs_is_said_to_round(exported, images):
    """Equal layers on another image: everything differs, and no layer is wrong on its own."""
    file = open_file(exported.files["int8.tflite"])
    others = open_file(exported.files["int8.onnx"])

    class Another:
        name = "another image"

        def steps(self, _):
            return others.steps(np.flip(images, axis=0).copy())

    class Fed:
        """Runs alone with the image that the other form had."""

        name = file.name

        def steps(self, given):
            return file.steps(given)

        def alone(self, _, given):
            return file.alone(np.flip(images, axis=0).copy(), given)

    found = compare_layers(Another(), Fed(), images)
    assert found.first_wrong is None
    assert found.first_differing.layer == "stem"
    assert max(layer.max_lsb for layer in found.layers) > 10
    assert "no layer is wrong: each on its own is within" in found.sentence()


def test_reference_kernels_of_foreign_files_are_not_failed_blindly(mlperf):
    found = verify_files([mlperf / "vww_96_int8.tflite"], limit=4, progress=Silent())
    (comparison,) = found.layers
    assert len(comparison.layers) == 31
    assert 0 < comparison.worst_alone <= 3  # they do round otherwise, and that is all
    assert found.passed
    assert any("plainer kernels" in note for note in found.notes)
    assert sum(found.agreement[0]["histogram"].values()) == 4 * 2


def test_unoptimized_onnx_is_the_partner_of_a_lone_onnx(exported):
    found = verify_files([exported.files["int8.onnx"]], limit=4, progress=Silent())
    assert found.passed
    (comparison,) = found.layers
    assert comparison.a == "int8.onnx, unoptimized graph"
    assert comparison.tolerance_lsb == 1


class Tokens(nn.Module):
    """A linear layer over tokens, which freezing runs as rows of a matrix: tensors whose first axis is no batch."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.mix = nn.Linear(8, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(torch.relu(self.mix(tokens)).mean(1))


def test_tensors_whose_first_axis_is_no_batch(product, run):
    torch.manual_seed(0)
    small = Product(Network(Tokens().eval(), product.network.structure))
    quantized = Quantize(use="quantize", epochs=0).apply(small, run)
    made = Export(use="export", kinds=("int8",)).apply(quantized, run)
    found = Verify(use="verify").verify(made, run.data, run.progress)
    assert found.passed, found.reason
    for comparison in found.layers:
        mixed = next(layer for layer in comparison.layers if layer.layer == "mix")
        assert mixed.values == comparison.images * 16 * 12
    assert {"patches", "mix", "head"} <= {layer.layer for layer in found.noise.layers}
    change_onnx(made.files["int8.onnx"], "mix.bias", lambda b: b + 40 * np.abs(b).max())
    found = Verify(use="verify").verify(made, run.data, run.progress)
    assert [comparison.first_wrong and comparison.first_wrong.layer for comparison in found.layers] == ["mix", None]


def test_layers_that_a_runtime_will_not_run_alone_are_said(exported, monkeypatch):
    from compress.verification.tflite_file import LiteSession

    def refuse(self, arrays):
        raise ModelError("layers", "the runtime refuses to run them one by one (no reason)")

    monkeypatch.setattr(LiteSession, "run", refuse)
    found = verify_files([exported.files["int8.onnx"], exported.files["int8.tflite"]], limit=2, progress=Silent())
    assert found.passed
    assert found.layers == []
    assert any("int8.tflite: layers are not compared" in note for note in found.notes)
