"""Neuron selectivity transfer: kernels and their maximum mean discrepancies."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compress.losses.nst import (
    NST,
    gaussian_kernel,
    gaussian_mmd,
    linear_kernel,
    linear_mmd,
    neuron_selectivity,
    pair_variance,
    polynomial_kernel,
    polynomial_mmd,
)

rng = np.random.default_rng(0)
STUDENT, TEACHER = rng.normal(size=(3, 4, 2, 3)), rng.normal(size=(3, 6, 2, 3)) * 2
KERNELS = [("linear", 2, 0.0), ("polynomial", 2, 0.0), ("polynomial", 3, 0.5), ("gaussian", 2, 0.0)]


def rows(maps: np.ndarray) -> np.ndarray:
    flat = maps.reshape(len(maps), maps.shape[1], -1)
    return flat / np.linalg.norm(flat, axis=2, keepdims=True)


def discrepancy(x: np.ndarray, y: np.ndarray, kernel: str, degree: int, offset: float) -> float:
    """The definition, pair by pair, for one image."""
    variance = np.mean([[((a - b) ** 2).sum() for b in y] for a in x])
    k = {
        "linear": lambda a, b: a @ b,
        "polynomial": lambda a, b: (a @ b + offset) ** degree,
        "gaussian": lambda a, b: np.exp(-((a - b) ** 2).sum() / (2 * variance)),
    }[kernel]

    def mean(one: np.ndarray, other: np.ndarray) -> float:
        return np.mean([[k(a, b) for b in other] for a in one])

    return mean(x, x) + mean(y, y) - 2 * mean(x, y)


@pytest.mark.parametrize(("kernel", "degree", "offset"), KERNELS)
def test_selectivity_against_numpy(kernel, degree, offset):
    each = [discrepancy(x, y, kernel, degree, offset) for x, y in zip(rows(STUDENT), rows(TEACHER), strict=True)]
    got = neuron_selectivity(torch.tensor(STUDENT), torch.tensor(TEACHER), kernel, degree, offset)
    assert got.item() == pytest.approx(np.mean(each), rel=1e-10)


@pytest.mark.parametrize(("kernel", "degree", "offset"), KERNELS)
def test_the_set_of_channels_is_what_counts(kernel, degree, offset):
    """Neither their order, nor their strength, nor how often each of them is there."""
    teacher = torch.tensor(TEACHER)
    again = torch.cat([teacher.flip(1), teacher * 3], 1)
    assert neuron_selectivity(again, teacher, kernel, degree, offset).item() == pytest.approx(0, abs=1e-14)
    assert neuron_selectivity(teacher[:, :4], teacher, kernel, degree, offset).item() > 1e-3


def test_both_ways_to_the_polynomial_mmd_are_the_same():
    """Through pairs of channels and through pairs of positions, whichever are fewer."""
    student, teacher = torch.tensor(rows(STUDENT)), torch.tensor(rows(TEACHER))
    many = torch.tensor(rng.normal(size=(3, 12, 6)))
    for other, fewer in [(teacher, "channels"), (many, "positions")]:
        assert (student.shape[2] ** 2 < student.shape[1] * other.shape[1]) == (fewer == "positions")
        within = polynomial_kernel(student, student).mean() + polynomial_kernel(other, other).mean()
        torch.testing.assert_close(
            polynomial_mmd(student, other), within - 2 * polynomial_kernel(student, other).mean()
        )


def test_linear_mmd_is_a_distance_of_means():
    student, teacher = torch.tensor(rows(STUDENT)), torch.tensor(rows(TEACHER))
    pairs = linear_kernel(student, student).mean() + linear_kernel(teacher, teacher).mean()
    torch.testing.assert_close(linear_mmd(student, teacher), pairs - 2 * linear_kernel(student, teacher).mean())


def test_a_wide_gaussian_is_the_linear_kernel():
    """exp(-d / 2v) is 1 - d / 2v for a large v, and the distances' MMD is -2 times that of the products."""
    x, y = torch.tensor(rows(STUDENT)), torch.tensor(rows(TEACHER))
    v = torch.full((3,), 1e5, dtype=torch.float64)
    mmd = gaussian_kernel(x, x, v).mean() + gaussian_kernel(y, y, v).mean() - 2 * gaussian_kernel(x, y, v).mean()
    assert (mmd * 1e5).item() == pytest.approx(linear_mmd(x, y).item(), rel=1e-4)


def test_the_gaussian_and_its_variance_against_numpy():
    x, y = rows(STUDENT), rows(TEACHER)
    expected = ((x[:, :, None] - y[:, None]) ** 2).sum(3)
    v = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
    kernel = gaussian_kernel(torch.tensor(x), torch.tensor(y), v)
    np.testing.assert_allclose(kernel.numpy(), np.exp(-expected / 2 / v.numpy()[:, None, None]), rtol=1e-12)
    np.testing.assert_allclose(pair_variance(torch.tensor(x), torch.tensor(y)).numpy(), expected.mean((1, 2)))


def test_the_variance_gets_no_gradient():
    x = torch.tensor(rows(STUDENT), requires_grad=True)
    y = torch.tensor(rows(TEACHER))
    assert not pair_variance(x, y).requires_grad
    (found,) = torch.autograd.grad(gaussian_mmd(x, y), x)
    v = pair_variance(x, y)
    fixed = gaussian_kernel(x, x, v).mean() - 2 * gaussian_kernel(x, y, v).mean()
    torch.testing.assert_close(found, torch.autograd.grad(fixed, x)[0])


@pytest.mark.parametrize(("kernel", "degree", "offset"), KERNELS[:3])
def test_gradients(kernel, degree, offset):
    student = torch.tensor(STUDENT[:2], requires_grad=True)
    teacher = torch.tensor(TEACHER[:2])
    assert torch.autograd.gradcheck(lambda s: neuron_selectivity(s, teacher, kernel, degree, offset), (student,))


def test_gradients_of_the_gaussian_at_a_given_variance():
    x, y = torch.tensor(rows(STUDENT)[:2], requires_grad=True), torch.tensor(rows(TEACHER)[:2])
    v = torch.tensor([0.7, 1.3], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: gaussian_kernel(x, y, v), (x,))


def test_settings_reach_the_kernel():
    from compress.losses.lesson import Lesson

    empty = torch.zeros(3, 2)
    maps = {"student_maps": [torch.tensor(STUDENT)], "teacher_maps": [torch.tensor(TEACHER)]}
    for kernel, degree, offset in KERNELS:
        term = NST(use="nst", kernel=kernel, degree=degree, offset=offset)
        expected = neuron_selectivity(torch.tensor(STUDENT), torch.tensor(TEACHER), kernel, degree, offset)
        assert term(Lesson(empty, empty, empty, **maps)).tolist() == [expected.item()]
