"""What was made to go wrong is named, with its channel, and what is sound is not."""

import pytest
import torch
from conftest import PREPROCESS, SmallNet, randomized
from torch import nn

from compress.doctor import risks
from compress.product import Batch
from compress.quantization import Quantization, calibrate, fold_batchnorm, prepare
from compress.quantization.equalize import find_pairs

IMAGES_NCHW = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


class Depthwise(nn.Module):
    """expand, depthwise, project: what cross-layer equalization is for."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(3, 16, 1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.project = nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.bn(self.expand(x)).relu()
        return self.head(self.project(self.depthwise(x).relu()).mean((2, 3)))


def network(seed: int = 0) -> Depthwise:
    generator = torch.Generator().manual_seed(seed)
    module = Depthwise().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) * 0.2 + 0.1)
            else:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) * 0.1)
        module.bn.weight.fill_(1.0)
    return module


def prepared_of(module: nn.Module):
    prepared = prepare(module, Quantization(), PREPROCESS)
    calibrate(prepared, [Batch(IMAGES_NCHW, torch.zeros(8, dtype=torch.long))], torch.device("cpu"))
    return prepared


def pairs_of(module: nn.Module) -> list[tuple[str, str]]:
    return [(pair.first, pair.second) for pair in find_pairs(fold_batchnorm(module))]


def test_a_sound_network_has_no_risk():
    module = network()
    found = risks.norm_risks(module) + risks.weight_risks(fold_batchnorm(module))
    prepared = prepared_of(module)
    assert found + risks.activation_risks(prepared, IMAGES_NCHW) + risks.bias_risks(prepared) == []


def test_a_channel_a_thousand_times_larger_is_named():
    module = network()
    with torch.no_grad():
        module.depthwise.weight[5] *= 1000
    (risk,) = risks.weight_risks(fold_batchnorm(module), pairs_of(module))
    assert (risk.kind, risk.layer, risk.remedy) == (risks.PER_TENSOR, "depthwise", "equalize: true")
    assert "channel 5 is" in risk.finding
    assert "(depthwise)" in risk.finding
    assert risk.severity * risks.SPREAD == pytest.approx(1000, rel=0.5)
    spread = [r for r in risks.activation_risks(prepared_of(module), IMAGES_NCHW) if r.kind == risks.ACTIVATION_SPREAD]
    assert [r.layer for r in spread] == ["depthwise"]
    assert "channel 5 " in spread[0].finding
    assert spread[0].remedy.startswith("keep_float: [depthwise]")  # no pairs given: the recipe equalizes already


def test_the_file_keeps_weights_that_one_step_per_layer_would_lose():
    module = network()
    with torch.no_grad():
        module.project.weight[3] *= 2000
    (risk,) = risks.weight_risks(fold_batchnorm(module))
    # All but one channel are far below half of the shared step: nothing of them is left, 0 dB.
    assert "keep 0 dB on one step for the layer" in risk.finding


def test_channels_of_nearly_no_weight_are_counted():
    module = network()
    with torch.no_grad():
        module.project.weight[2] *= 1e-5
        module.project.weight[6] = 0
    (risk,) = risks.weight_risks(fold_batchnorm(module))
    assert (risk.kind, risk.layer, risk.severity) == (risks.NEAR_DEAD, "project", 2 / 8)


def test_a_layer_of_dead_channels_is_said_to_be_one():
    module = network()
    with torch.no_grad():
        module.project.weight.zero_()
    assert [(r.kind, r.layer) for r in risks.weight_risks(fold_batchnorm(module))] == [(risks.NEAR_DEAD, "project")]


def test_a_batchnorm_that_saw_no_variance_is_named():
    module = network()
    with torch.no_grad():
        module.bn.running_var.fill_(4.0)
        module.bn.running_var[3] = 1e-9
    (risk,) = risks.norm_risks(module)
    assert (risk.kind, risk.layer) == (risks.TINY_VARIANCE, "bn")
    assert risk.severity * risks.BLOWN_UP == pytest.approx(2 / 1e-5**0.5, rel=0.01)  # sqrt(4) / sqrt(eps)
    with torch.no_grad():
        module.bn.weight[3] = 1e-3  # gamma takes back what the variance blows up
    assert risks.norm_risks(module) == []


def test_few_values_far_out_are_outliers():
    module = network()
    images_NCHW = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    images_NCHW[0, :, 4, 4] = 500.0
    found = risks.activation_risks(prepared_of(module), images_NCHW)
    outliers = [risk for risk in found if risk.kind == risks.ACTIVATION_OUTLIERS]
    # One pixel of 2,048 is rarer than one in 1,000; the nine that the depthwise layer makes of it are not.
    assert [risk.layer for risk in outliers] == ["expand"]
    assert "percentile" in outliers[0].remedy


def test_a_bias_that_int32_cannot_hold_is_named():
    module = network()
    with torch.no_grad():
        module.project.weight[1] *= 1e-8
        module.project.bias[1] = 50.0
    prepared = prepared_of(module)
    (risk,) = risks.bias_risks(prepared)
    assert (risk.kind, risk.layer) == (risks.BIAS, "project")
    assert "1 channel" in risk.finding


def test_transposed_convolutions_count_their_own_outputs():
    layer = nn.ConvTranspose2d(4, 6, 3, groups=2)
    with torch.no_grad():
        layer.weight.uniform_(0.1, 0.2)
        layer.weight[2:, 1] = 7.0  # inputs 2 and 3 are of the second group: output 3 + 1
    assert risks.output_ranges(layer).argmax() == 4
    assert len(risks.output_ranges(layer)) == 6
    x = torch.rand(1, 4, 5, 5)
    assert layer(x).abs().amax((0, 2, 3)).argmax() == 4


def test_looking_changes_nothing():
    module = randomized(SmallNet())
    prepared = prepared_of(module)
    state = {name: value.clone() for name, value in prepared.state_dict().items()}
    risks.activation_risks(prepared, IMAGES_NCHW)
    risks.bias_risks(prepared)
    assert all(torch.equal(state[name], value) for name, value in prepared.state_dict().items())
    assert not any(module._forward_hooks for module in prepared.modules())
