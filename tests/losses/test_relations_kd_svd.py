"""KD-SVD: the formula, and a gradient that an SVD does not have everywhere."""

import itertools

import numpy as np
import pytest
import torch

from compress.errors import ModelError
from compress.losses.kd_svd import KDSVD, aligned_vector, first_vector, radial_basis, singular_vector_flow
from compress.losses.lesson import Facts, Lesson

rng = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def seeded():
    """The same numbers whichever tests run before."""
    rng.bit_generator.state = np.random.default_rng(1).bit_generator.state
    torch.manual_seed(0)


def with_values(values, positions, channels):
    """A matrix (1, P, C) with the given singular values."""
    left, _ = np.linalg.qr(rng.normal(size=(positions, len(values))))
    right, _ = np.linalg.qr(rng.normal(size=(channels, len(values))))
    return torch.tensor(left * values @ right.T)[None]


def lesson(student, teacher):
    count = len(student[0])
    zeros_NK = torch.zeros(count, 3)
    return Lesson(zeros_NK, zeros_NK, torch.zeros(count), student, teacher, layers=("a", "b", "c")[: len(student)])


def test_against_numpy():
    shapes = [(3, 4, 4), (5, 2, 2), (4, 2, 3)]
    student, teacher = ([rng.normal(size=(2, *shape)) for shape in shapes] for _ in range(2))

    def svd_vectors(maps):
        return np.linalg.svd(maps.reshape(len(maps), -1).T)[2]

    expected = np.zeros(3)
    for n in range(2):
        before = None
        for layer, (s, t) in enumerate(zip(student, teacher, strict=True)):
            goal = svd_vectors(t[n])[0]
            goal = goal * np.sign(goal.sum())
            candidates = svd_vectors(s[n])[:4]
            nearest = max(candidates, key=lambda v: abs(v @ goal))
            nearest = nearest * np.sign(nearest @ goal)
            if before is not None:
                ours = np.exp(-((nearest[:, None] - before[0][None]) ** 2) / 8)
                theirs = np.exp(-((goal[:, None] - before[1][None]) ** 2) / 8)
                expected[layer] += ((ours - theirs) ** 2).sum() / 2
            before = nearest, goal
    got = KDSVD(use="kd_svd")(lesson([torch.tensor(s) for s in student], [torch.tensor(t) for t in teacher]))
    np.testing.assert_allclose(got, expected, rtol=1e-10)
    assert (expected[1:] > 1e-4).all()


def test_first_vector_is_what_the_map_is_made_of():
    channels = torch.tensor([3.0, -4.0], dtype=torch.float64)
    positions = torch.rand(6, dtype=torch.float64)
    found = first_vector((positions[:, None] * channels)[None])
    torch.testing.assert_close(found[0], torch.tensor([-0.6, 0.8], dtype=torch.float64))


def test_the_teachers_sign_is_the_students():
    features = with_values([3.0, 1.0], 6, 4)
    goal = first_vector(features)
    torch.testing.assert_close(aligned_vector(features, goal), goal)
    torch.testing.assert_close(aligned_vector(features, -goal), -goal)


def test_a_later_vector_is_chosen_where_it_is_nearer():
    features = with_values([3.0, 2.0, 1.0], 6, 4)
    second = torch.linalg.svd(features)[2][:, 1]
    torch.testing.assert_close(aligned_vector(features, second), second)
    first = torch.linalg.svd(features)[2][:, 0]
    assert (aligned_vector(features, second, candidates=1) * first).sum().abs().item() == pytest.approx(1)


def test_vectors_without_a_singular_value_are_not_chosen():
    features = with_values([2.0], 6, 4)
    nothing = torch.linalg.svd(features)[2][:, 1]
    chosen = aligned_vector(features, nothing + 0.1 * first_vector(features))
    torch.testing.assert_close(chosen.abs(), first_vector(features).abs())


@pytest.mark.parametrize(("positions", "channels"), [(6, 3), (3, 6), (4, 4)])
@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_gradient_of_a_vector(positions, channels, chosen):
    features = with_values([3.0, 2.0, 1.0], positions, channels).requires_grad_()
    goal = torch.linalg.svd(features.detach())[2][:, chosen]
    # The broadened 1 / d is off by BROADENING / d**2 of itself: by 8e-5 for the smallest gap, from 1 / 9 to 0.
    assert torch.autograd.gradcheck(lambda x: aligned_vector(x, goal), (features,))


def test_gradient_of_the_loss():
    teacher = [torch.tensor(rng.normal(size=(2, 4, 3))) for _ in range(2)]
    student = [torch.cat([with_values([3.0, 2.0, 1.0], 4, 3) for _ in range(2)]).requires_grad_() for _ in range(2)]
    assert torch.autograd.gradcheck(lambda *maps: singular_vector_flow(maps, teacher), student)


@pytest.mark.parametrize("values", [[1.0, 1.0, 1.0], [1.0, 1.0], [1.0, 1.0 - 1e-9, 0.5], [1.0], [1e-9, 1e-9], [0.0]])
def test_gradient_is_finite_for_repeated_and_vanishing_values(values):
    teacher = [torch.tensor(rng.normal(size=(1, 5, 4))) for _ in range(2)]
    student = [with_values(values, 5, 4).requires_grad_() for _ in range(2)]
    singular_vector_flow(student, teacher).sum().backward()
    for maps in student:
        scale = max(*values, 1e-9)
        assert maps.grad.isfinite().all()
        assert maps.grad.abs().max() * scale < 1e4


@pytest.mark.parametrize("count", [1, 2])
def test_dead_maps(count):
    shapes = [(2, 4, 4), (3, 2, 2)]
    alive = [torch.rand(count, *shape) for shape in shapes]
    dead = [torch.zeros(count, *shape) for shape in shapes]
    for student, teacher in itertools.product((alive, dead), repeat=2):
        student = [maps.clone().requires_grad_() for maps in student]
        value = KDSVD(use="kd_svd")(lesson(student, teacher))
        value.sum().backward()
        assert value.isfinite().all()
        assert all(maps.grad.isfinite().all() for maps in student)
    assert all((maps.grad == 0).all() for maps in student)  # the last: both dead


def test_a_dead_map_has_no_vector_and_asks_for_none():
    alive, dead = torch.rand(2, 5, 3), torch.zeros(2, 5, 3)
    assert not first_vector(dead).any()
    assert not aligned_vector(dead, first_vector(alive)).any()
    assert not aligned_vector(alive, first_vector(dead)).any()


def test_not_a_number_stays_one():
    student = [torch.rand(2, 2, 3, 3), torch.full((2, 3, 2, 2), torch.nan)]
    teacher = [torch.rand(2, 2, 3, 3), torch.rand(2, 3, 2, 2)]
    assert KDSVD(use="kd_svd")(lesson(student, teacher)).sum().isnan()


def test_equal_maps_cost_nothing_whatever_their_size_and_roles_matter():
    student, teacher = ([torch.tensor(rng.normal(size=(2, c, 3, 3))) for c in (3, 5)] for _ in range(2))
    loss = KDSVD(use="kd_svd")
    torch.testing.assert_close(loss(lesson(teacher, teacher)), torch.zeros(2, dtype=torch.float64))
    scaled = [maps * factor for maps, factor in zip(teacher, (3, 0.1), strict=True)]
    torch.testing.assert_close(loss(lesson(scaled, teacher)), torch.zeros(2, dtype=torch.float64))
    assert loss(lesson(student, teacher)).sum() != loss(lesson(teacher, student)).sum()


def test_radial_basis_is_one_on_equal_numbers():
    numbers = torch.tensor([[0.3, -0.8]])
    torch.testing.assert_close(radial_basis(numbers, numbers)[0].diagonal(), torch.ones(2))


def test_tokens_and_vectors():
    tokens = [torch.randn(2, 5, 3), torch.randn(2, 4)]
    assert KDSVD(use="kd_svd")(lesson(tokens, [torch.randn_like(t) for t in tokens])).isfinite().all()


def test_what_cannot_be_compared_is_refused_by_name():
    def facts(student, teacher):
        return Facts(("a", "b")[: len(student)], student, teacher, 3, 10)

    loss = KDSVD(use="kd_svd")
    assert loss.parts(facts([(2, 4, 4), (3, 2, 2)], [(2, 4, 4), (3, 2, 2)])) is None
    with pytest.raises(ModelError, match="b: `kd_svd` compares equal shapes"):
        loss.parts(facts([(2, 4, 4), (3, 2, 2)], [(2, 4, 4), (4, 2, 2)]))
    with pytest.raises(ModelError, match=r"a: .*from one layer to the next"):
        loss.parts(facts([(2, 4, 4)], [(2, 4, 4)]))
