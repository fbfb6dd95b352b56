import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax

from compress.losses.kd import SoftTargets, soft_targets
from compress.losses.l2 import LogitsL2, logits_l2

rng = np.random.default_rng(0)
STUDENT, TEACHER = rng.normal(size=(6, 7)), rng.normal(size=(6, 7)) * 2


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_soft_targets_against_numpy(temperature):
    p = softmax(TEACHER / temperature, axis=1)
    log_ratio = np.log(p) - log_softmax(STUDENT / temperature, axis=1)
    expected = temperature**2 * (p * log_ratio).sum(1).mean()
    got = soft_targets(torch.tensor(STUDENT), torch.tensor(TEACHER), temperature)
    assert got.item() == pytest.approx(expected, rel=1e-12)


def test_equal_logits_cost_nothing_and_roles_matter():
    student, teacher = torch.tensor(STUDENT), torch.tensor(TEACHER)
    assert soft_targets(teacher, teacher, 4.0).item() == pytest.approx(0, abs=1e-12)
    assert soft_targets(student, teacher, 1.0) != soft_targets(teacher, student, 1.0)


def test_high_temperature_is_matching_centred_logits():
    """Hinton et al., section 2.1: for T to infinity the gradient is that of squared centred logits, divided by K."""
    student = torch.tensor(STUDENT, requires_grad=True)
    centred = torch.tensor(STUDENT - STUDENT.mean(1, keepdims=True))
    centred_teacher = torch.tensor(TEACHER - TEACHER.mean(1, keepdims=True))
    soft_targets(student, torch.tensor(TEACHER), 1e5).backward()
    torch.testing.assert_close(student.grad, (centred - centred_teacher) / 7 / 6, rtol=1e-3, atol=1e-6)


def test_l2_against_numpy():
    expected = 0.5 * ((STUDENT - TEACHER) ** 2).sum(1).mean()
    assert logits_l2(torch.tensor(STUDENT), torch.tensor(TEACHER)).item() == pytest.approx(expected)


@pytest.mark.parametrize("loss", [SoftTargets(use="kd", temperature=3.0), LogitsL2(use="l2")])
def test_gradients(loss):
    student = torch.tensor(STUDENT, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: loss(student_NK=s, teacher_NK=torch.tensor(TEACHER)), (student,))
