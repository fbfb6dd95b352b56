"""Decoupled KD: against numpy written from the paper's definitions, and equal to KD at the beta that KD has inside."""

import numpy as np
import pytest
import torch
from scipy.special import softmax

from compress.losses.dkd import DKD, decoupled, dkd
from compress.losses.kd import soft_targets
from compress.losses.lesson import Lesson

N, K = 8, 6
rng = np.random.default_rng(1)
STUDENT, TEACHER = rng.normal(size=(N, K)), rng.normal(size=(N, K)) * 3
LABELS = np.array([0, 5, 2, 2, 1, 4, 3, 5])
T = 4.0


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.tensor(STUDENT, requires_grad=True), torch.tensor(TEACHER), torch.tensor(LABELS)


def by_hand(student: np.ndarray, teacher: np.ndarray, labels: np.ndarray, temperature: float) -> tuple[list, list]:
    """Image by image, with probabilities as the paper writes them."""
    target, rest = [], []
    for z_s, z_t, label in zip(student / temperature, teacher / temperature, labels, strict=True):
        q, p = softmax(z_s), softmax(z_t)
        target.append(p[label] * np.log(p[label] / q[label]) + (1 - p[label]) * np.log((1 - p[label]) / (1 - q[label])))
        q_hat, p_hat = softmax(np.delete(z_s, label)), softmax(np.delete(z_t, label))
        rest.append((p_hat * np.log(p_hat / q_hat)).sum())
    return target, rest


@pytest.mark.parametrize("temperature", [1.0, T])
def test_both_parts_against_numpy(temperature):
    target, rest = by_hand(STUDENT, TEACHER, LABELS, temperature)
    got_target, got_rest = decoupled(*tensors(), temperature)
    np.testing.assert_allclose(got_target.detach().numpy(), target, rtol=1e-11)
    np.testing.assert_allclose(got_rest.detach().numpy(), rest, rtol=1e-11)
    value = dkd(*tensors(), alpha=1.5, beta=8.0, temperature=temperature)
    expected = temperature**2 * (1.5 * np.mean(target) + 8 * np.mean(rest))
    assert value.item() == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("temperature", [0.7, 1.0, T, 20.0])
def test_it_is_kd_where_beta_is_the_teachers_doubt(temperature):
    """Equation 6: KD = TCKD + (1 - p) * NCKD, so KD listens to the other classes the less, the surer the teacher."""
    student, teacher, labels = tensors()
    p_N = torch.tensor(softmax(TEACHER / temperature, axis=1)[np.arange(N), LABELS])
    value = dkd(student, teacher, labels, alpha=1.0, beta=1 - p_N, temperature=temperature)
    kd = soft_targets(student, teacher, temperature)
    assert value.item() == pytest.approx(kd.item(), rel=1e-11)
    of_dkd, of_kd = torch.autograd.grad(value, student)[0], torch.autograd.grad(kd, student)[0]
    torch.testing.assert_close(of_dkd, of_kd, rtol=1e-9, atol=1e-13)


def test_the_parts_see_different_things():
    """A shift of the label's logit leaves NCKD alone; reordering the others leaves TCKD alone."""
    student, teacher, labels = tensors()
    shifted = student + 3.0 * torch.nn.functional.one_hot(labels, K)
    assert decoupled(shifted, teacher, labels, T)[1].tolist() == pytest.approx(
        decoupled(student, teacher, labels, T)[1].tolist(), rel=1e-11
    )
    assert (decoupled(shifted, teacher, labels, T)[0] - decoupled(student, teacher, labels, T)[0]).abs().min() > 1e-3
    first = torch.zeros(N, dtype=torch.int64)
    reordered = torch.cat([student[:, :1], student[:, 1:].flip(1)], 1)
    assert decoupled(reordered, teacher, first, T)[0].tolist() == pytest.approx(
        decoupled(student, teacher, first, T)[0].tolist(), rel=1e-11
    )


def test_equal_logits_cost_nothing_and_roles_matter():
    student, teacher, labels = tensors()
    how = {"alpha": 1.0, "beta": 8.0, "temperature": T}
    assert dkd(teacher, teacher, labels, **how).item() == pytest.approx(0, abs=1e-12)
    there, back = dkd(student, teacher, labels, **how), dkd(teacher, student, labels, **how)
    assert abs(there - back).item() > 0.01 * there.item()


def test_two_classes_have_no_others_to_compare():
    student, teacher = torch.tensor(STUDENT[:, :2]), torch.tensor(TEACHER[:, :2])
    labels = torch.tensor(LABELS % 2)
    target_N, rest_N = decoupled(student, teacher, labels, 1.0)
    assert rest_N.tolist() == [0] * N
    assert target_N.mean().item() == pytest.approx(soft_targets(student, teacher, 1.0).item(), rel=1e-11)


@pytest.mark.parametrize("standardize", [False, True])
def test_gradients(standardize):
    student, teacher, labels = tensors()
    loss = DKD(use="dkd", standardize=standardize)
    assert torch.autograd.gradcheck(
        lambda s: loss(Lesson(student_NK=s, teacher_NK=teacher, labels_N=labels, progress=0.5)), (student,)
    )


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (0, 300, np.log(K)),
        (0, -300, np.log(K / (K - 1))),
        (300, -300, 300 - np.log(K - 1)),
        (-300, 300, 300 + np.log(K - 1)),
    ],
)
def test_certain_networks_and_constant_logits_stay_finite(student, teacher, expected):
    """float32, where a doubt of exp(-300) is zero; the numbers are the label's logit above all others."""
    labels = torch.tensor(LABELS)
    right = torch.nn.functional.one_hot(labels, K).float()
    student_NK = (student * right).requires_grad_(True)
    value = dkd(student_NK, teacher * right, labels, alpha=1.0, beta=8.0, temperature=1.0)
    value.backward()
    assert value.item() == pytest.approx(expected, rel=1e-5)
    assert student_NK.grad.isfinite().all()


def test_standardized_is_blind_to_scale():
    _, teacher, labels = tensors()
    loss = DKD(use="dkd", standardize=True)
    scaled = Lesson(student_NK=teacher * 0.2 - 1, teacher_NK=teacher, labels_N=labels, progress=0.5)
    assert loss(scaled).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("settings", "progress", "part"),
    [
        ({}, 0.0, 0.0),
        ({}, 10 / 240, 0.5),
        ({}, 20 / 240, 1.0),
        ({}, 0.9, 1.0),
        ({"warmup": 0.0}, 0.0, 1.0),
        ({"warmup": 0.2, "active": (0.5, 1.0)}, 0.6, 0.5),
    ],
)
def test_the_warm_up_is_a_line_from_where_the_loss_becomes_active(settings, progress, part):
    student, teacher, labels = tensors()
    value = DKD(use="dkd", **settings)(
        Lesson(student_NK=student, teacher_NK=teacher, labels_N=labels, progress=progress)
    )
    whole = dkd(student, teacher, labels, alpha=1.0, beta=8.0, temperature=4.0)
    assert value.item() == pytest.approx(part * whole.item(), rel=1e-12, abs=1e-15)


def test_it_asks_for_labels_only():
    assert DKD.needs_labels
    assert not DKD.needs_networks
