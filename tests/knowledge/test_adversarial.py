"""Attacks on networks whose gradient is known by hand, and what no attack may do."""

import pytest
import torch
from conftest import PREPROCESS, SmallNet, randomized
from torch import nn

from compress.knowledge.adversarial import fgsm, fools_too, pgd, pixel_gradient
from compress.knowledge.pixels import normalized
from compress.product import Batch
from compress.quantization import Quantization, calibrate, prepare

EPS = 8 / 255


def images(count: int = 6, side: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def on_pixels(module: nn.Module):
    return lambda unit_NCHW: module(normalized(unit_NCHW, PREPROCESS))


class Linear(nn.Module):
    """Two classes, logits (0, w * x): the gradient of class 0's cross entropy is sigmoid(w * x) * w."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0, 0.0, 3.0]).view(1, 1, 2, 2))

    def forward(self, x):
        score = (x * self.weight).sum((1, 2, 3))
        return torch.stack([torch.zeros_like(score), score], 1)


def test_fgsm_of_a_linear_network_by_hand():
    x = torch.full((2, 1, 2, 2), 0.5)
    labels = torch.tensor([0, 1])  # class 1's gradient has the other sign
    network = Linear()
    score = 0.5 * (1 - 2 + 0 + 3)
    expected = torch.sigmoid(torch.tensor(score)) * network.weight[0]
    torch.testing.assert_close(pixel_gradient(network, x, labels)[0], expected)
    torch.testing.assert_close(pixel_gradient(network, x, labels)[1], expected - network.weight[0])
    sign = torch.tensor([1.0, -1.0, 0.0, 1.0]).view(1, 2, 2)
    attacked = fgsm(network, x, labels, eps=0.1)
    torch.testing.assert_close(attacked, torch.stack([0.5 + 0.1 * sign, 0.5 - 0.1 * sign]))
    assert network.weight.grad is None
    # From the image, PGD of a linear network goes to the same corner of the ball.
    torch.testing.assert_close(pgd(network, x, labels, eps=0.1, steps=5), attacked)


def test_normalisation_scales_the_gradient_and_not_the_step():
    """A network that sees (x - mean) / std moves pixels by eps all the same."""
    x = torch.full((1, 3, 2, 2), 0.5)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    for classify in (network, on_pixels(network)):
        moved = fgsm(classify, x, torch.tensor([1]), eps=EPS) - x
        assert moved.abs().unique().tolist() == pytest.approx([EPS], rel=1e-4)


def attacked_by_all(classify, x, labels, eps=EPS):
    start = 2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) - 1
    return {
        "fgsm": fgsm(classify, x, labels, eps=eps),
        "pgd": pgd(classify, x, labels, eps=eps, steps=10),
        "from elsewhere": pgd(classify, x, labels, eps=eps, steps=3, start_NCHW=start),
        "large steps": pgd(classify, x, labels, eps=eps, steps=4, step=10 * eps, start_NCHW=start),
        "no step": pgd(classify, x, labels, eps=eps, steps=0, start_NCHW=start),
    }


def test_attacks_stay_in_the_ball_and_in_valid_pixels():
    x = images()
    x[0], x[1] = 0, 1  # at the edges of what is valid
    module = randomized(SmallNet())
    labels = torch.arange(6) % 5
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for name, found in attacked_by_all(on_pixels(module), x, labels).items():
        assert (found - x).abs().max() <= EPS + 1e-6, name
        assert found.min() >= 0, name
        assert found.max() <= 1, name
        assert (found != x).any(), name
        assert not found.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_attacks_raise_the_loss_and_pgd_more_than_fgsm():
    x, labels = images(32), torch.arange(32) % 5
    classify = on_pixels(randomized(SmallNet()))

    def loss(found):
        return nn.functional.cross_entropy(classify(found), labels).item()

    found = attacked_by_all(classify, x, labels)
    assert loss(x) < loss(found["fgsm"]) < loss(found["pgd"])


def test_each_image_is_attacked_alone():
    x, labels = images(4), torch.arange(4)
    classify = on_pixels(randomized(SmallNet()))
    together = pgd(classify, x, labels, eps=EPS, steps=3)
    alone = torch.cat([pgd(classify, x[i : i + 1], labels[i : i + 1], eps=EPS, steps=3) for i in range(4)])
    assert (together - alone).abs().max() < EPS  # rounding may turn the sign of a gradient of zero
    assert ((together - alone).abs() < 1e-6).float().mean() > 0.99


def test_attacks_pass_the_rounding_of_a_fake_quantized_network():
    """Rounding has no slope; by the straight-through estimator the attack finds its way all the same."""
    x, labels = images(32), torch.arange(32) % 5
    prepared = prepare(randomized(SmallNet()), Quantization(), PREPROCESS)
    calibrate(prepared, [Batch(normalized(x, PREPROCESS), labels)], torch.device("cpu"), "minmax")
    classify = on_pixels(prepared.eval().requires_grad_(False))
    assert pixel_gradient(classify, x, labels).abs().sum() > 0
    attacked = pgd(classify, x, labels, eps=EPS, steps=5)
    losses = [nn.functional.cross_entropy(classify(found), labels).item() for found in (x, attacked)]
    assert losses[1] > 1.05 * losses[0]


def flags(text: str) -> torch.Tensor:
    return torch.tensor([letter == "1" for letter in text])


def test_who_is_fooled_too():
    """Images: fooled both, fooled the source alone, source unimpressed, target wrong before, source wrong before."""
    found = fools_too(
        source_before_N=flags("11110"),
        source_after_N=flags("00100"),
        target_before_N=flags("11101"),
        target_after_N=flags("01000"),
    )
    assert found == 0.5
    nothing = flags("11")
    assert (
        fools_too(source_before_N=nothing, source_after_N=nothing, target_before_N=nothing, target_after_N=~nothing)
        is None
    )
