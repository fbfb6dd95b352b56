"""Soft targets, soft cross entropy, L2 and standardization: against numpy, at their limits, and among each other."""

import math

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from scipy.special import log_softmax, softmax

from compress.losses import LossSettings
from compress.losses.kd import SoftTargets, soft_targets
from compress.losses.l2 import LogitsL2, logits_l2, probabilities_l2
from compress.losses.lesson import Lesson
from compress.losses.soft_cross_entropy import SoftCrossEntropy, soft_cross_entropy
from compress.losses.standardization import standardized

N, K = 6, 7
rng = np.random.default_rng(0)
STUDENT, TEACHER = rng.normal(size=(N, K)), rng.normal(size=(N, K)) * 2
LABELS = torch.tensor(rng.integers(0, K, N))


def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(STUDENT, requires_grad=True), torch.tensor(TEACHER)


def of_lesson(loss, student: torch.Tensor, teacher: torch.Tensor, progress: float = 0.5) -> torch.Tensor:
    return loss(Lesson(student_NK=student, teacher_NK=teacher, labels_N=LABELS, progress=progress))


def kl(p: np.ndarray, log_q: np.ndarray) -> float:
    return (p * (np.log(p) - log_q)).sum(1).mean()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_soft_targets_and_soft_cross_entropy_against_numpy(temperature):
    p, log_q = softmax(TEACHER / temperature, axis=1), log_softmax(STUDENT / temperature, axis=1)
    student, teacher = tensors()
    assert soft_targets(student, teacher, temperature).item() == pytest.approx(temperature**2 * kl(p, log_q), rel=1e-12)
    assert soft_cross_entropy(student, teacher, temperature).item() == pytest.approx(
        -(temperature**2) * (p * log_q).sum(1).mean(), rel=1e-12
    )


def test_soft_cross_entropy_trains_like_soft_targets_and_costs_the_teachers_entropy_more():
    student, teacher = tensors()
    (by_kl,) = torch.autograd.grad(soft_targets(student, teacher, 3.0), student)
    (by_ce,) = torch.autograd.grad(soft_cross_entropy(student, teacher, 3.0), student)
    torch.testing.assert_close(by_kl, by_ce, rtol=1e-12, atol=1e-15)
    p = softmax(TEACHER / 3, axis=1)
    more = soft_cross_entropy(student, teacher, 3.0) - soft_targets(student, teacher, 3.0)
    assert more.item() == pytest.approx(-9 * (p * np.log(p)).sum(1).mean(), rel=1e-12)


def test_the_gradient_is_the_difference_of_probabilities():
    """Hinton et al., equation 2, times temperature**2: T * (q - p), here over the batch."""
    student, teacher = tensors()
    soft_targets(student, teacher, 5.0).backward()
    expected = 5 * (softmax(STUDENT / 5, axis=1) - softmax(TEACHER / 5, axis=1)) / N
    np.testing.assert_allclose(student.grad.numpy(), expected, rtol=1e-10)


def test_high_temperature_is_matching_centred_logits():
    """Hinton et al., section 2.1: the gradient is that of half the squared distance of centred logits, divided by K."""
    student, teacher = tensors()
    value = soft_targets(student, teacher, 1e5)
    value.backward()
    difference = (STUDENT - STUDENT.mean(1, keepdims=True)) - (TEACHER - TEACHER.mean(1, keepdims=True))
    np.testing.assert_allclose(student.grad.numpy(), difference / K / N, rtol=1e-3, atol=1e-6)
    assert value.item() == pytest.approx(0.5 * (difference**2).sum(1).mean() / K, rel=1e-3)
    centred = [torch.tensor(logits - logits.mean(1, keepdims=True)) for logits in (STUDENT, TEACHER)]
    assert value.item() == pytest.approx(logits_l2(*centred).item() / K, rel=1e-3)


def test_low_temperature_is_the_margin_to_the_teachers_first_class():
    """The teacher becomes its first class, and what remains is how far the student's own first class is above it."""
    student, teacher = tensors()
    temperature = 1e-3
    margin = STUDENT.max(1) - STUDENT[np.arange(N), TEACHER.argmax(1)]
    assert (margin > 0).any()
    assert soft_targets(student, teacher, temperature).item() / temperature == pytest.approx(margin.mean(), rel=1e-9)
    soft_targets(student, teacher, temperature).backward()
    assert student.grad.isfinite().all()


def test_l2_against_numpy():
    student, teacher = tensors()
    assert logits_l2(student, teacher).item() == pytest.approx(0.5 * ((STUDENT - TEACHER) ** 2).sum(1).mean())
    expected = ((softmax(STUDENT, axis=1) - softmax(TEACHER, axis=1)) ** 2).sum(1).mean()
    assert probabilities_l2(student, teacher).item() == pytest.approx(expected)


def test_l2_of_certain_and_opposite_networks_is_2():
    sure = torch.tensor([[200.0, 0.0], [0.0, 200.0]])
    assert probabilities_l2(sure, -sure).item() == pytest.approx(2)
    assert probabilities_l2(sure, sure).item() == 0


def test_standardized_against_numpy():
    got = standardized(torch.tensor(TEACHER)).numpy()
    expected = (TEACHER - TEACHER.mean(1, keepdims=True)) / TEACHER.std(1, keepdims=True)
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    np.testing.assert_allclose(got.mean(1), 0, atol=1e-14)
    np.testing.assert_allclose(got.var(1), 1)


def test_standardized_soft_targets_ignore_shift_and_scale_of_each_image():
    """The point of the paper: a student that has the teacher's relations in a narrower range has nothing to learn."""
    teacher = torch.tensor(TEACHER)
    student = teacher * torch.linspace(0.1, 3, N)[:, None] + torch.linspace(-5, 5, N)[:, None]
    plain, z_score = SoftTargets(use="kd"), SoftTargets(use="kd", standardize=True)
    assert of_lesson(z_score, student, teacher).item() == pytest.approx(0, abs=1e-12)
    assert of_lesson(plain, student, teacher) > 0.1
    assert of_lesson(z_score, -student, teacher) > 0.1  # a negative factor is another order of the classes


def test_standardize_against_numpy():
    def z(logits):
        return (logits - logits.mean(1, keepdims=True)) / logits.std(1, keepdims=True)

    p, log_q = softmax(z(TEACHER) / 2, axis=1), log_softmax(z(STUDENT) / 2, axis=1)
    loss = SoftTargets(use="kd", standardize=True, temperature=2.0)
    assert of_lesson(loss, *tensors()).item() == pytest.approx(4 * kl(p, log_q), rel=1e-12)


def test_the_authors_deviation_is_another_temperature():
    """Their code divides by the deviation with K - 1: the same values at a slightly lower temperature."""
    student, teacher = tensors()
    z_scores = [(logits - logits.mean(1, keepdim=True)) / logits.std(1, keepdim=True) for logits in (student, teacher)]
    theirs = soft_targets(*z_scores, 2.0)
    factor = math.sqrt(K / (K - 1))
    ours = of_lesson(SoftTargets(use="kd", standardize=True, temperature=2.0 * factor), student, teacher)
    assert ours.item() / factor**2 == pytest.approx(theirs.item(), rel=1e-12)


LOSSES = [
    SoftTargets(use="kd", temperature=3.0),
    SoftTargets(use="kd", temperature=2.0, standardize=True),
    SoftCrossEntropy(use="ce", temperature=3.0),
    LogitsL2(use="l2"),
    LogitsL2(use="l2", on="probabilities"),
]
NAMES = ["kd", "kd standardized", "ce", "l2 logits", "l2 probabilities"]


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_gradients(loss):
    student, teacher = tensors()
    assert torch.autograd.gradcheck(lambda s: of_lesson(loss, s, teacher), (student,))


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_equal_logits_are_the_minimum(loss):
    """Zero, but for the cross entropy, and no gradient in any."""
    teacher = torch.tensor(TEACHER)
    student = teacher.clone().requires_grad_(True)
    value = of_lesson(loss, student, teacher)
    value.backward()
    torch.testing.assert_close(student.grad, torch.zeros_like(student), rtol=0, atol=1e-12)
    if loss.use != "ce":
        assert value.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_who_teaches_whom(loss):
    """Swapping the roles changes all but a distance."""
    student, teacher = tensors()
    there, back = of_lesson(loss, student, teacher), of_lesson(loss, teacher, student)
    if loss.use == "l2":
        assert there.item() == pytest.approx(back.item(), rel=1e-12)
    else:
        assert abs(there - back).item() > 0.01 * there.item()


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_constant_logits_have_a_finite_gradient(loss):
    """A network with a dead head, as float32."""
    student = torch.zeros(N, K, requires_grad=True)
    value = of_lesson(loss, student, torch.tensor(TEACHER, dtype=torch.float32))
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()
    assert student.grad.any()


def test_recipes_name_them():
    settings = TypeAdapter(LossSettings)
    for text, kind in [
        ('{"use": "kd", "standardize": true, "temperature": 2, "weight": 9}', SoftTargets),
        ('{"use": "ce", "temperature": 1}', SoftCrossEntropy),
        ('{"use": "l2", "on": "probabilities"}', LogitsL2),
    ]:
        assert type(settings.validate_json(text)) is kind
    for text in ('{"use": "kd", "temperature": 0}', '{"use": "l2", "on": "images"}', '{"use": "ce", "beta": 1}'):
        with pytest.raises(ValidationError):
            settings.validate_json(text)
