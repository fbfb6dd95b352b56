"""Numbers stored in files: every lie is found without running anything, and named."""

import numpy as np
import pytest
from corruption import change_onnx, change_onnx_grid, change_tflite, flipped, scaled

from compress.progress import Silent
from compress.quantization import freeze
from compress.verification import compare_facts, open_file, verify_files
from compress.verification.facts import Facts, Grid, Parameters
from compress.verification.torch_network import FROZEN, FrozenNetwork


def facts_of(exported, *names):
    return [open_file(exported.files[name], name=name).facts for name in names]


def compared(exported):
    """Torch, ONNX and TFLite side by side."""
    frozen = FrozenNetwork(freeze(exported.network.module)).facts
    return compare_facts([frozen, *facts_of(exported, "int8.onnx", "int8.tflite")])


def test_three_forms_of_one_network_hold_the_same_numbers(exported):
    found = compared(exported)
    assert found.witnesses == (FROZEN, "int8.onnx", "int8.tflite")
    assert found.problems == []
    assert found.layers == 5
    assert found.unmatched == 0
    assert found.grids == len(freeze(exported.network.module).grids())


LIES = {
    "onnx activation scale": (
        "int8.onnx",
        lambda path: change_onnx_grid(path, "depthwise", factor=1.01),
        ("depthwise", "scale"),
    ),
    "onnx zero point": ("int8.onnx", lambda path: change_onnx_grid(path, "point", shift=1), ("point", "zero point")),
    "onnx weight scale": (
        "int8.onnx",
        lambda path: change_onnx(path, "point.weight_scale", lambda s: s * np.where(np.arange(len(s)) == 3, 1.01, 1)),
        ("point", "weight scale"),
    ),
    "onnx weight": (
        "int8.onnx",
        lambda path: change_onnx(path, "down.weight", lambda w: w ^ (np.arange(w.size) == 7).reshape(w.shape)),
        ("down", "weights"),
    ),
    "onnx bias": ("int8.onnx", lambda path: change_onnx(path, "head.bias", lambda b: b + 1), ("head", "bias")),
    "tflite activation scale": (
        "int8.tflite",
        lambda path: change_tflite(path, "stem", scaled(1.01)),
        ("stem", "scale"),
    ),
    "tflite scale of the logits": (
        "int8.tflite",
        lambda path: change_tflite(path, "head", scaled(0.99)),
        ("head", "scale"),
    ),
    "tflite depthwise weight scale": (
        "int8.tflite",
        lambda path: change_tflite(path, "depthwise.weight", scaled(1.01, channel=5)),
        ("depthwise", "weight scale"),
    ),
    "tflite weight bit": (
        "int8.tflite",
        lambda path: change_tflite(path, "stem.weight", flipped(11, 2)),
        ("stem", "weights"),
    ),
    "tflite bias bit": (
        "int8.tflite",
        lambda path: change_tflite(path, "down.bias", flipped(8, 0)),
        ("down", "bias"),
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_with_three_witnesses_layer_number_and_file_are_named(exported, lie):
    name, tell, (layer, what) = LIES[lie]
    tell(exported.files[name])
    problems = compared(exported).problems
    told = [(problem.layer, problem.what, problem.wrong) for problem in problems]
    assert (layer, what, name) in told
    assert {wrong for *_, wrong in told} == {name}
    first = next(problem for problem in problems if (problem.layer, problem.what) == (layer, what))
    assert first.text.startswith(f"{name}: {what} of layer {layer}")
    if first.values:
        assert set(first.values) == {FROZEN, "int8.onnx", "int8.tflite"}
        assert first.values[FROZEN] != first.values[name]


@pytest.mark.parametrize("lie", LIES)
def test_two_files_by_themselves_fail_and_name_the_layer(exported, lie):
    name, tell, (layer, what) = LIES[lie]
    tell(exported.files[name])
    files = [exported.files[name] for name in ("int8.onnx", "int8.tflite")]
    found = verify_files(files, progress=Silent())
    assert not found.passed
    assert f"{what} of layer {layer}" in found.reason
    if what in ("scale", "weight scale") and layer != "head":  # biases tell which of the two files is wrong
        (problem,) = (p for p in found.static.problems if (p.layer, p.what) == (layer, what))
        assert problem.wrong == name


@pytest.mark.parametrize(
    "lie", ["onnx activation scale", "onnx weight scale", "tflite activation scale", "tflite depthwise weight scale"]
)
def test_one_file_alone_contradicts_itself(exported, lie):
    name, tell, (layer, what) = LIES[lie]
    assert facts_of(exported, name)[0].problems == []
    tell(exported.files[name])
    problems = facts_of(exported, name)[0].problems
    assert (layer, what) in [(problem.layer, problem.what) for problem in problems]
    assert not verify_files([exported.files[name]], progress=Silent()).passed


def test_an_activation_written_on_one_grid_and_read_on_another(exported):
    change_onnx_grid(exported.files["int8.onnx"], "stem", factor=1.02)
    import onnx

    model = onnx.load(exported.files["int8.onnx"])
    for node in model.graph.node:  # mend the reading side only
        if node.op_type == "DequantizeLinear" and node.input[0] == "stem":
            node.input[1] = next(n.input[1] for n in model.graph.node if n.output[0] == "depthwise")
    onnx.save(model, exported.files["int8.onnx"])
    (facts,) = facts_of(exported, "int8.onnx")
    assert any("it is written with scale" in problem.text and problem.layer == "stem" for problem in facts.problems)


def test_reference_files_of_others_do_not_contradict_themselves(mlperf):
    for name, layers in (("pretrainedResnet_quant.tflite", 10), ("vww_96_int8.tflite", 28)):
        facts = open_file(mlperf / name).facts
        assert facts.problems == []
        assert len(facts.parameters) == layers


def test_a_corrupted_scale_in_a_foreign_file_is_named(mlperf, tmp_path):
    path = tmp_path / "resnet.tflite"
    for name, layer, what in (
        ("model/activation_2/Relu;model/add/add", "model/activation_2/Relu;model/add/add", "scale"),
        ("model/conv2d_4/Conv2D", "", "weight scale"),
    ):
        path.write_bytes((mlperf / "pretrainedResnet_quant.tflite").read_bytes())
        change_tflite(path, name, scaled(1.01, channel=None if what == "scale" else 2))
        problems = open_file(path).facts.problems
        assert [problem.what for problem in problems] == [what]
        assert not layer or problems[0].layer == layer


def test_layers_of_foreign_files_are_matched_by_their_order():
    def facts(name: str, layers: list[str], scale: float) -> Facts:
        weight = np.ones((2, 3), np.int8)
        parameters = {layer: Parameters(layer, "in", weight, np.array([scale], np.float32)) for layer in layers}
        return Facts(name, {layer: Grid(np.float32(0.5), 3) for layer in layers}, parameters)

    found = compare_facts([facts("a", ["x", "y"], 0.1), facts("b", ["p", "q"], 0.1)])
    assert (found.layers, found.grids, found.problems) == (2, 2, [])
    found = compare_facts([facts("a", ["x", "y"], 0.1), facts("b", ["p", "q"], 0.2)])
    assert [(problem.layer, problem.what) for problem in found.problems] == [
        ("x", "weight scale"),
        ("y", "weight scale"),
    ]
