"""Whole diagnoses: sizes are those of real files, refusals are named and do not end it, offers come with figures."""

import copy
import json

import pytest
import torch
from conftest import PREPROCESS, SmallNet, randomized
from torch import nn
from torch.nn import functional as F

from compress import doctor, measures
from compress.doctor.diagnosis import PTQ, hard_activations
from compress.formats.onnx import float_onnx, int8_onnx
from compress.formats.tflite import to_tflite
from compress.product import Batch
from compress.progress import Silent
from compress.quantization import calibrate, fold_batchnorm, freeze, prepare

IMAGES_NCHW = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


class HardNet(nn.Module):
    """Hard-swish as a module and as a function, and a squeeze with hard-sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.swish = nn.Hardswish()
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.gate = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.hardswish(self.second(self.swish(self.first(x))))
        x = x * F.hardsigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return self.head(x.mean((2, 3)))


class Refused(nn.Module):
    """Ends in an operator that no int8 file here has."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return torch.cumsum(self.head(F.relu(self.first(x)).mean((2, 3))), 1)


class Branches(nn.Module):
    """Cannot be traced, but exported."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.first(x)
        if x.mean() > 1e9:
            x = -x
        return self.head(x.mean((2, 3)))


def examined(module: nn.Module, **how):
    how = {"measure": False} | how
    return doctor.examine(module.eval(), PREPROCESS, IMAGES_NCHW, Silent(), name="net", **how)


@pytest.fixture(scope="module")
def small():
    module = randomized(SmallNet())
    before = copy.deepcopy(module.state_dict())
    found = examined(module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())  # it only looks
    return module, found


@pytest.fixture(scope="module")
def hard():
    torch.manual_seed(0)
    return examined(HardNet(), measure=True, budget_s=0.5)


def test_sizes_are_those_of_the_files(small):
    module, found = small
    prepared = prepare(module, PTQ.quantization(), PREPROCESS)
    calibrate(prepared, [Batch(IMAGES_NCHW, torch.zeros(4, dtype=torch.long))], torch.device("cpu"))
    models = {"float": float_onnx(fold_batchnorm(module), 16, {}), "int8": int8_onnx(freeze(prepared), 16, {})}
    sizes = {f"{file.kind}.{file.format}": file for file in found.files}
    for kind, model in models.items():
        assert sizes[f"{kind}.onnx"].size_bytes == len(model.SerializeToString())
        assert sizes[f"{kind}.tflite"].size_bytes == len(to_tflite(model, {}))
    weights = sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, (nn.Conv2d, nn.Linear)))
    biases = 16 + 16 + 16 + 24 + 5  # of the five layers, BatchNorm folded
    assert sizes["float.onnx"].stored_bytes == 4 * (weights + biases)
    assert sizes["int8.onnx"].stored_bytes == weights + 4 * biases
    assert all(file.size_bytes > file.stored_bytes for file in found.files)
    assert (found.params, found.macs) == (measures.params(module), measures.macs(module, 16))


def test_a_sound_network_can_go_on(small):
    _, found = small
    assert found.ok
    assert found.refusals == ()
    assert [kernels.in_float for kernels in found.runtimes] == [(), ()]
    assert found.rewrite is None
    assert found.damage is not None
    assert {"stem", "head"} <= set(found.keepable)
    assert doctor.sections(found)[-1].lines[-1].startswith("net can go on")


def test_hard_activations_are_offered_a_rewrite_with_its_measured_reason(hard):
    assert hard.ok
    assert hard.rewrite is not None
    assert hard.rewrite.replaced == {"hard-swish": 2, "hard-sigmoid": 1}
    for runtime in ("onnxruntime", "litert"):
        assert set(hard.rewrite.times_ms[runtime]) == {"float", "int8", "rewritten"}
        assert all(ms > 0 for ms in hard.rewrite.times_ms[runtime].values())
    (offer,) = [section for section in doctor.sections(hard) if section.title.startswith("Offer")]
    assert "quantize.rewrite_activations: true" in " ".join(offer.lines)
    assert "no figure of an ARM board" in " ".join(offer.lines)
    assert all(len(kernels.in_float) > 0 for kernels in hard.runtimes)


def test_a_recipe_that_rewrites_is_offered_nothing():
    torch.manual_seed(0)
    module = HardNet()
    found = examined(module, stage=PTQ.model_copy(update={"rewrite_activations": True}), formats=("tflite",))
    assert found.rewrite is None
    (kernels,) = found.runtimes
    assert "HARD_SWISH" not in {fallen.op for fallen in kernels.in_float}
    assert hard_activations(module) == {"hard-swish": 2, "hard-sigmoid": 1}


def test_a_refused_operator_is_named_and_the_rest_goes_on():
    found = examined(Refused())
    assert not found.ok
    said = [str(refusal) for refusal in found.refusals if refusal.step == "int8"]
    assert len(said) == 1
    assert "layer cumsum" in said[0]
    assert "operator cumsum" in said[0]
    assert "float.onnx" in {f"{file.kind}.{file.format}" for file in found.files}
    assert found.damage is None
    verdict = doctor.sections(found)[-1]
    assert verdict.lines[-1].startswith("net cannot be quantized and exported")
    assert any("REFUSED" in line and "cumsum" in line for line in verdict.lines)


def test_a_network_that_cannot_be_traced_still_gets_its_float_files():
    found = examined(Branches(), formats=("onnx",))
    assert not found.ok
    assert "cannot be traced" in str(found.refusals[0])
    assert found.damage is None


def test_a_layer_kept_in_float_is_found_in_float(small):
    module, _ = small
    found = examined(module, stage=PTQ.model_copy(update={"keep_float": ("down",)}), formats=("tflite",))
    assert found.ok
    (kernels,) = found.runtimes
    assert kernels.float_macs == pytest.approx(
        next(layer["macs"] for layer in measures.layers(module, 16) if layer["name"] == "down") / found.macs
    )
    assert "down" in {layer for fallen in kernels.in_float for layer in fallen.layers}


def test_bits_that_no_runtime_has_are_no_refusal(small):
    module, _ = small
    found = examined(module, stage=PTQ.model_copy(update={"weight_bits": 4}), formats=("tflite",))
    assert found.ok
    assert "int8" not in {file.kind for file in found.files}
    assert any("simulated" in note for note in found.notes)


@pytest.mark.parametrize("which", ["small", "hard"])
def test_a_diagnosis_is_plain_json_and_plain_tables(which, request):
    found = request.getfixturevalue(which)
    found = found[1] if isinstance(found, tuple) else found
    text = json.dumps(doctor.as_json(found), allow_nan=False)
    assert json.loads(text)["ok"] is True
    for section in doctor.sections(found):
        assert section.title
        assert section.rows or section.lines
        for row in section.rows:
            assert list(row) == list(section.rows[0])
            assert all(isinstance(cell, str) for cell in row.values())


def test_an_unexpected_failure_is_said_and_not_raised(monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("compress.doctor.diagnosis.to_tflite", broken)
    found = examined(HardNet(), formats=("tflite",))
    assert not found.ok
    assert "ZeroDivisionError" in str(found.refusals[0])
    assert found.damage is not None
