"""Losses on the gradient of the labels' loss with respect to the pixels."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compress.errors import ModelError
from compress.losses.attention_gradient import AttentionGradient, GradientSymmetry, gradient_distance, input_gradient
from compress.losses.lesson import NO_LABEL, Lesson

LABELS = torch.tensor([1, 0, NO_LABEL, 2])
TRANSFER = AttentionGradient(use="attention_gradient")
SYMMETRY = GradientSymmetry(use="gradient_symmetry")


def network(seed: int, activation: type[nn.Module] = nn.Tanh) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), activation(), nn.AdaptiveAvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(12, 4)).double()


def images(seed: int = 0) -> torch.Tensor:
    return torch.randn(4, 2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def lesson(student: nn.Module, teacher: nn.Module, pixels: torch.Tensor, labels: torch.Tensor = LABELS) -> Lesson:
    pixels = pixels.detach().clone().requires_grad_()
    return Lesson(student(pixels), teacher(pixels), labels, images_NCHW=pixels, student=student, teacher=teacher)


def test_input_gradient_of_a_linear_network_is_known():
    """For logits W x it is W' (p - y), for each image by itself."""
    weight = torch.randn(4, 60, dtype=torch.float64)
    pixels = images().requires_grad_()
    logits = pixels.flatten(1) @ weight.T
    expected = (F.softmax(logits, 1) - F.one_hot(LABELS.clamp(min=0), 4)) @ weight
    expected[LABELS == NO_LABEL] = 0
    found = input_gradient(logits, LABELS, pixels, differentiable=False)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected.detach().view_as(pixels))


def test_distance_is_by_hand():
    one, other = torch.zeros(4, 1, 1, 2), torch.tensor([[3.0, 4.0], [1.0, 0.0], [100.0, 0.0], [0.0, 2.0]])
    assert gradient_distance(one, other.view(4, 1, 1, 2), LABELS).item() == pytest.approx((25 + 1 + 4) / 2 / 3)
    assert gradient_distance(one, one + 1, torch.full((4,), NO_LABEL)).item() == 0


@pytest.mark.parametrize("loss", [TRANSFER, SYMMETRY], ids=lambda loss: loss.use)
def test_a_loss_for_labels_that_do_not_exist_is_nothing(loss):
    value = loss(lesson(network(0), network(1), images(), torch.full((4,), NO_LABEL)))
    value.backward()
    assert value.item() == 0


def test_a_network_is_as_sensitive_as_itself():
    same = network(0).eval()
    assert TRANSFER(lesson(same, same, images())).item() == pytest.approx(0, abs=1e-20)
    assert TRANSFER(lesson(same, network(1), images())).item() > 1e-4


def test_a_symmetric_network_is_symmetric():
    """Logits of a network plus those for the mirrored image: the same for both, so the gradients are mirror images."""

    class Symmetric(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network(0).eval()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) + self.inner(x.flip(3))

    assert SYMMETRY(lesson(Symmetric(), network(1), images())).item() == pytest.approx(0, abs=1e-20)
    assert SYMMETRY(lesson(network(0).eval(), network(1), images())).item() > 1e-4


@pytest.mark.parametrize("loss", [TRANSFER, SYMMETRY], ids=lambda loss: loss.use)
def test_parameters_get_the_derivative_of_the_value(loss):
    """Double backward, against finite differences of the whole loss."""
    student, teacher = network(0), network(1).eval()
    weight = student[0].weight
    loss(lesson(student, teacher, images())).backward()
    found = weight.grad.clone()
    for place in [(0, 0, 0, 0), (1, 1, 2, 0), (2, 0, 1, 1)]:
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                weight[place] += step
            values.append(loss(lesson(student, teacher, images())).item())
            with torch.no_grad():
                weight[place] -= step
        assert found[place].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


def test_the_teacher_does_not_learn():
    student, teacher = network(0), network(1).eval()
    TRANSFER(lesson(student, teacher, images())).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert student[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("loss", [TRANSFER, SYMMETRY], ids=lambda loss: loss.use)
def test_training_makes_it_smaller(loss):
    student, teacher = network(0, nn.ReLU), network(1, nn.ReLU).eval()
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    values = []
    for _ in range(30):
        optimizer.zero_grad()
        value = loss(lesson(student, teacher, images()))
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < values[0] / 2


@pytest.mark.parametrize("loss", [TRANSFER, SYMMETRY], ids=lambda loss: loss.use)
def test_two_losses_can_share_the_graphs(loss):
    given = lesson(network(0), network(1).eval(), images())
    (loss(given) + loss(given) + F.cross_entropy(given.student_NK, LABELS, ignore_index=NO_LABEL)).backward()


@pytest.mark.parametrize("loss", [TRANSFER, SYMMETRY], ids=lambda loss: loss.use)
def test_pixels_without_a_gradient_are_refused(loss):
    logits = torch.zeros(4, 4)
    for pixels in (None, images()):
        with pytest.raises(ModelError, match=f"^{loss.use}: the images carry no gradient"):
            loss(Lesson(logits, logits, LABELS, images_NCHW=pixels))
