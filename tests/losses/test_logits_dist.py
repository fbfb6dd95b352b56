"""DIST: against numpy's own correlation, its invariances, and rows without variation."""

import numpy as np
import pytest
import torch
from scipy.special import softmax

from compress.losses.dist import DIST, dist, pearson
from compress.losses.lesson import Lesson

N, K = 9, 5
rng = np.random.default_rng(2)
STUDENT, TEACHER = rng.normal(size=(N, K)), rng.normal(size=(N, K)) * 2
LABELS = torch.zeros(N, dtype=torch.int64)


def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(STUDENT, requires_grad=True), torch.tensor(TEACHER)


def expected(student: np.ndarray, teacher: np.ndarray, temperature: float) -> tuple[float, float]:
    q, p = softmax(student / temperature, axis=1), softmax(teacher / temperature, axis=1)
    inter = 1 - np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)])
    intra = 1 - np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T, strict=True)])
    return inter, intra


def test_pearson_against_numpy():
    got = pearson(torch.tensor(STUDENT), torch.tensor(TEACHER)).numpy()
    np.testing.assert_allclose(got, [np.corrcoef(a, b)[0, 1] for a, b in zip(STUDENT, TEACHER, strict=True)])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(("beta", "gamma"), [(1.0, 1.0), (2.0, 0.5), (1.0, 0.0), (0.0, 1.0)])
def test_against_numpy(temperature, beta, gamma):
    inter, intra = expected(STUDENT, TEACHER, temperature)
    got = dist(*tensors(), beta=beta, gamma=gamma, temperature=temperature)
    assert got.item() == pytest.approx(temperature**2 * (beta * inter + gamma * intra), rel=1e-10)


def test_pearson_is_blind_to_shift_and_scale_and_ends_at_1_and_minus_1():
    rows = torch.tensor(TEACHER)
    torch.testing.assert_close(pearson(3 * rows - 2, rows), torch.ones(N, dtype=torch.float64))
    torch.testing.assert_close(pearson(-0.1 * rows + 7, rows), -torch.ones(N, dtype=torch.float64))


def test_equal_logits_cost_nothing_and_the_order_is_what_counts():
    """A less certain student of two classes ranks them alike, so the relation between classes is met already."""
    _, teacher = tensors()
    assert dist(teacher, teacher, beta=1.0, gamma=1.0, temperature=1.0).item() == pytest.approx(0, abs=1e-12)
    pair = teacher[:, :2]
    assert dist(0.3 * pair, pair, beta=1.0, gamma=0.0, temperature=1.0).item() == pytest.approx(0, abs=1e-12)
    assert dist(-0.3 * pair, pair, beta=1.0, gamma=0.0, temperature=1.0).item() == pytest.approx(2, abs=1e-12)


def test_correlation_has_no_direction():
    """The one loss on probabilities here that stays the same when teacher and student swap."""
    student, teacher = tensors()
    how = {"beta": 1.0, "gamma": 2.0, "temperature": 2.0}
    assert dist(student, teacher, **how).item() == pytest.approx(dist(teacher, student, **how).item(), rel=1e-12)


def test_gradients():
    student, teacher = tensors()
    loss = DIST(use="dist", beta=2.0, gamma=0.5, temperature=3.0)
    assert torch.autograd.gradcheck(
        lambda s: loss(Lesson(student_NK=s, teacher_NK=teacher, labels_N=LABELS)), (student,)
    )


def test_rows_that_do_not_vary_have_no_correlation():
    """A dead head, a batch of one, and a teacher that gives a class nothing: finite, with a correlation of 0."""
    teacher = torch.tensor(TEACHER, dtype=torch.float32)
    dead = torch.zeros(N, K, requires_grad=True)
    value = dist(dead, teacher, beta=1.0, gamma=1.0, temperature=1.0)
    value.backward()
    assert value.item() == pytest.approx(2)
    assert dead.grad.isfinite().all()

    one = torch.tensor(STUDENT[:1], dtype=torch.float32, requires_grad=True)
    value = dist(one, teacher[:1], beta=0.0, gamma=1.0, temperature=1.0)
    value.backward()
    assert value.item() == 1
    assert not one.grad.any()

    never = teacher.clone()
    never[:, 0] = -1000
    student = torch.tensor(STUDENT, dtype=torch.float32, requires_grad=True)
    value = dist(student, never, beta=1.0, gamma=1.0, temperature=1.0)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()
