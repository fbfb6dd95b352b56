"""What compares outputs where there are no classes."""

import numpy as np
import pytest
import torch

from compress.losses.binary_kd import BinarySoftTargets, binary_soft_targets
from compress.losses.kd import soft_targets
from compress.losses.lesson import Lesson
from compress.losses.mse import SquaredError, squared_distance

GENERATOR = torch.Generator().manual_seed(3)
STUDENT, TEACHER = (torch.randn(6, 4, dtype=torch.float64, generator=GENERATOR) * 3 for _ in range(2))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_binary_soft_targets_against_numpy(temperature):
    p, q = (1 / (1 + np.exp(-logits.numpy() / temperature)) for logits in (TEACHER, STUDENT))
    divergence = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    expected = divergence.mean() * temperature**2
    assert binary_soft_targets(STUDENT, TEACHER, temperature).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_one_label_is_a_choice_of_two_classes(temperature):
    """A softmax over (z, 0) is the sigmoid of z."""
    student, teacher = (torch.stack([logits[:, 0], torch.zeros(6)], 1) for logits in (STUDENT, TEACHER))
    as_classes = soft_targets(student, teacher, temperature)
    as_label = binary_soft_targets(STUDENT[:, :1], TEACHER[:, :1], temperature)
    assert as_label.item() == pytest.approx(as_classes.item(), rel=1e-10)


def test_at_high_temperature_it_is_an_eighth_of_the_squared_distance():
    distance = squared_distance(STUDENT, TEACHER).item()
    assert binary_soft_targets(STUDENT, TEACHER, 1e4).item() == pytest.approx(distance / 8, rel=1e-4)


def test_equal_logits_cost_nothing_and_large_ones_stay_finite():
    large = torch.tensor([[200.0, -200.0]], requires_grad=True)
    value = binary_soft_targets(large, -large.detach(), 1.0)
    value.backward()
    assert value.item() == pytest.approx(200)
    assert large.grad.isfinite().all()
    assert binary_soft_targets(TEACHER, TEACHER, 2.0).item() == 0


@pytest.mark.parametrize("loss", [lambda s, t: binary_soft_targets(s, t, 2.0), squared_distance])
def test_gradients(loss):
    assert torch.autograd.gradcheck(lambda student: loss(student, TEACHER), (STUDENT.clone().requires_grad_(),))


def test_squared_distance_against_numpy():
    expected = ((STUDENT.numpy() - TEACHER.numpy()) ** 2).mean()
    assert squared_distance(STUDENT, TEACHER).item() == pytest.approx(expected, rel=1e-12)


def test_as_terms():
    lesson = Lesson(STUDENT, TEACHER, torch.full((6, 4), torch.nan))
    assert BinarySoftTargets(use="binary_kd", temperature=2)(lesson) == binary_soft_targets(STUDENT, TEACHER, 2.0)
    assert SquaredError(use="mse")(lesson) == squared_distance(STUDENT, TEACHER)
