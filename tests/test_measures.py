import pytest
import torch
from conftest import SmallNet, randomized
from torch import nn

from compress.measures import layers, macs, params, score


def test_macs_by_hand():
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),  # 8x8 outputs: 64 * 8 * 3 * 9
        nn.Conv2d(8, 8, 3, padding=1, groups=8),  # depthwise: 64 * 8 * 9
        nn.Flatten(),
        nn.Linear(512, 10),
    )
    expected = [64 * 8 * 27, 64 * 8 * 9, 5120]
    assert [layer["macs"] for layer in layers(module, 16)] == expected
    assert macs(module, 16) == sum(expected)
    assert params(module) == 8 * 27 + 8 + 8 * 9 + 8 + 5120 + 10 == sum(layer["params"] for layer in layers(module, 16))


def test_transposed_convolution_by_hand():
    assert macs(nn.ConvTranspose2d(3, 4, 2, stride=2), 8) == 64 * 3 * 4 * 4


def test_accuracy_is_the_share_of_right_answers_and_leaves_the_mode(stripes):
    module = randomized(SmallNet()).train()
    images, labels = stripes.splits["evaluation"]
    expected = (module.eval()(images).argmax(1) == labels).float().mean().item()
    module.train()
    measured = score(module, stripes.batches("evaluation", batch_size=7), torch.device("cpu"))
    assert measured == pytest.approx(expected)
    assert module.training
