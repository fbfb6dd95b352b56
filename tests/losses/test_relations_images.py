"""Losses that compare images with images: RKD, PKT, information flow, correlation congruence, IRG."""

import itertools
import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from compress.errors import ModelError
from compress.losses.cc import (
    CorrelationCongruence,
    adjacent_congruence,
    bilinear_correlation,
    congruence,
    gaussian_correlation,
)
from compress.losses.embeddings import as_maps, distances, embedding
from compress.losses.information_flow import InformationFlow, critical_period, flow_divergence
from compress.losses.irg import IRG, edges, transformation
from compress.losses.lesson import Facts, Lesson
from compress.losses.pkt import EPS, PKT, probabilistic_transfer
from compress.losses.rkd import RKD, angle_loss, angles, distance_loss, relative_distances

rng = np.random.default_rng(0)
STUDENT, TEACHER = rng.normal(size=(5, 3)), rng.normal(size=(5, 4)) * 2
ON_VECTORS = [distance_loss, angle_loss, probabilistic_transfer, flow_divergence]


@pytest.fixture(autouse=True)
def seeded():
    """The same numbers whichever tests run before."""
    rng.bit_generator.state = np.random.default_rng(1).bit_generator.state
    torch.manual_seed(0)


def lesson(student, teacher, **known):
    count = len(student[0])
    logits = {"student_NK": torch.zeros(count, 3), "teacher_NK": torch.zeros(count, 3)} | known
    layers = tuple(f"layer{index}" for index in range(len(student)))
    labels_N = torch.zeros(count, dtype=torch.int64)
    return Lesson(labels_N=labels_N, student_maps=student, teacher_maps=teacher, layers=layers, **logits)


def facts(*shapes, teacher=None, images=10):
    names = tuple(f"layer{index}" for index in range(len(shapes)))
    return Facts(names, shapes, teacher or shapes, classes=3, images=images)


def huber(a, b):
    error = np.abs(a - b)
    return np.where(error < 1, 0.5 * error**2, error - 0.5)


def pairwise_distances(x):
    return np.array([[np.linalg.norm(a - b) for b in x] for a in x])


def cosines(x):
    return np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in x] for a in x])


def rows_to_one(x):
    return x / x.sum(1, keepdims=True)


def test_rkd_distance_against_numpy():
    def relative(x):
        d = pairwise_distances(x)
        return d / d[d > 0].mean()

    expected = huber(relative(STUDENT), relative(TEACHER)).mean()
    assert distance_loss(torch.tensor(STUDENT), torch.tensor(TEACHER)).item() == pytest.approx(expected, rel=1e-12)


def test_rkd_angle_against_numpy():
    def cosine(x, i, j, k):
        if i in (j, k):
            return 0.0
        a, b = x[j] - x[i], x[k] - x[i]
        return a @ b / np.linalg.norm(a) / np.linalg.norm(b)

    triples = list(itertools.product(range(5), repeat=3))
    expected = np.mean([huber(cosine(STUDENT, *t), cosine(TEACHER, *t)) for t in triples])
    assert angle_loss(torch.tensor(STUDENT), torch.tensor(TEACHER)).item() == pytest.approx(expected, rel=1e-12)


def test_rkd_of_an_equilateral_triangle():
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)]], dtype=torch.float64)
    torch.testing.assert_close(relative_distances(corners), (1 - torch.eye(3)).double())
    cosine = angles(corners)
    assert cosine[0, 1, 2].item() == pytest.approx(0.5)
    assert cosine[0, 1, 1].item() == pytest.approx(1)


def test_rkd_does_not_see_scale_shift_or_rotation():
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    moved = torch.tensor(STUDENT @ rotation * 7 - 3)
    for loss in (distance_loss, angle_loss):
        assert loss(moved, torch.tensor(STUDENT)).item() == pytest.approx(0, abs=1e-12)


def test_rkd_is_the_sum_of_both_with_their_factors():
    student, teacher = torch.tensor(STUDENT), torch.tensor(TEACHER)
    expected = 25 * distance_loss(student, teacher) + 50 * angle_loss(student, teacher)
    torch.testing.assert_close(RKD(use="rkd")(lesson([student], [teacher])), expected[None])
    alone = RKD(use="rkd", angle=0.0)(lesson([student], [teacher]))
    torch.testing.assert_close(alone, 25 * distance_loss(student, teacher)[None])


def numpy_neighbours(x):
    return rows_to_one((cosines(x) + 1) / 2)


def test_pkt_against_numpy():
    p, q = numpy_neighbours(TEACHER), numpy_neighbours(STUDENT)
    expected = (p * np.log((p + EPS) / (q + EPS))).mean()
    assert probabilistic_transfer(torch.tensor(STUDENT), torch.tensor(TEACHER)).item() == pytest.approx(expected)
    # EPS only guards: this is the KL divergence of the paper, divided by the number of entries.
    assert expected == pytest.approx((p * np.log(p / q)).sum() / 25, rel=1e-4)


def test_pkt_of_opposite_images_is_finite():
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    value = probabilistic_transfer(opposite, torch.ones(2, 2, dtype=torch.float64))
    value.backward()
    assert value.isfinite()
    assert value > 0
    assert opposite.grad.isfinite().all()


def test_information_flow_against_numpy():
    def jeffreys(p, q):
        return ((p - q) * np.log((p + EPS) / (q + EPS))).mean()

    def student_t(x):
        return rows_to_one(1 / (1 + pairwise_distances(x)))

    expected = jeffreys(numpy_neighbours(STUDENT), numpy_neighbours(TEACHER))
    expected += jeffreys(student_t(STUDENT), student_t(TEACHER))
    got = flow_divergence(torch.tensor(STUDENT), torch.tensor(TEACHER))
    assert got.item() == pytest.approx(expected, rel=1e-10)


def test_early_layers_count_less_and_less_and_the_last_always_once():
    student = [torch.tensor(rng.normal(size=(5, 3))) for _ in range(3)]
    teacher = [torch.tensor(rng.normal(size=(5, 3))) for _ in range(3)]
    plain = [flow_divergence(s, t).item() for s, t in zip(student, teacher, strict=True)]
    loss = InformationFlow(use="information_flow")
    for progress, factor in ((0.0, 100.0), (0.02, 70.0), (0.04, 49.0), (0.5, 100 * 0.7**25)):
        values = loss(lesson(student, teacher, progress=progress))
        np.testing.assert_allclose(values, [factor * plain[0], factor * plain[1], plain[2]])
    assert critical_period(0.99, 100, 1.0) == 100


def test_gaussian_correlation_is_the_taylor_series_of_the_gaussian():
    unit = TEACHER / np.linalg.norm(TEACHER, axis=1, keepdims=True)
    squared = pairwise_distances(unit) ** 2
    exact = np.exp(-0.4 * squared)
    np.testing.assert_allclose(gaussian_correlation(torch.tensor(TEACHER), 0.4, 20), exact, rtol=1e-12)
    x = unit @ unit.T
    second = math.exp(-0.8) * (1 + 0.8 * x + 0.32 * x**2)
    np.testing.assert_allclose(gaussian_correlation(torch.tensor(TEACHER), 0.4, 2), second, rtol=1e-12)
    np.testing.assert_allclose(bilinear_correlation(torch.tensor(TEACHER)), cosines(TEACHER), rtol=1e-12)


@pytest.mark.parametrize("kernel", ["gaussian", "bilinear", "adjacent"])
def test_cc_against_numpy(kernel):
    student, teacher = rng.normal(size=(5, 3)), rng.normal(size=(5, 4))
    loss = CorrelationCongruence(use="cc", kernel=kernel, embedding=6)
    torch.manual_seed(0)
    parts = loss.parts(facts((3,), teacher=[(4,)])).double()
    weight, bias = (p.detach().numpy() for p in (parts[0].student.weight, parts[0].student.bias))
    s, t = student @ weight.T + bias, teacher @ parts[0].teacher.numpy().T
    if kernel == "adjacent":
        error = np.abs(s - t)
        expected = np.mean([error[i] @ error[i + 1] for i in range(4)])
    elif kernel == "bilinear":
        expected = ((cosines(s) - cosines(t)) ** 2).mean()
    else:
        both = [math.exp(-0.8) * (1 + 0.8 * cosines(x) + 0.32 * cosines(x) ** 2) for x in (s, t)]
        expected = ((both[0] - both[1]) ** 2).mean()
    got = loss(lesson([torch.tensor(student)], [torch.tensor(teacher)], parts=parts))
    assert got.item() == pytest.approx(expected, rel=1e-12)


def test_ccs_teacher_keeps_its_correlations_and_is_not_trained():
    loss = CorrelationCongruence(use="cc", embedding=8)
    parts = loss.parts(facts((3,), teacher=[(4,)])).double()
    teacher = torch.tensor(TEACHER)
    torch.testing.assert_close(bilinear_correlation(teacher @ parts[0].teacher.T), bilinear_correlation(teacher))
    assert {name for name, _ in parts.named_parameters()} == {"0.student.weight", "0.student.bias"}


def test_cc_without_an_embedding():
    student, teacher = torch.tensor(STUDENT), torch.tensor(TEACHER)
    loss = CorrelationCongruence(use="cc", kernel="bilinear", embedding=None)
    assert loss.parts(facts((3,), teacher=[(4,)])) is None
    expected = congruence(bilinear_correlation(student), bilinear_correlation(teacher))
    torch.testing.assert_close(loss(lesson([student], [teacher])), expected[None])
    with pytest.raises(ValidationError, match="needs an `embedding`"):
        CorrelationCongruence(use="cc", kernel="adjacent", embedding=None)


def test_ccs_embedding_learns_what_a_linear_map_of_the_teacher_knows():
    torch.manual_seed(0)
    teacher = torch.randn(16, 6)
    student = teacher @ torch.randn(6, 6)
    loss = CorrelationCongruence(use="cc", embedding=8)
    parts = loss.parts(facts((6,)))
    optimizer = torch.optim.Adam(parts.parameters(), lr=0.05)
    seen = [_step(optimizer, loss(lesson([student], [teacher], parts=parts)).sum()) for _ in range(150)]
    assert seen[-1] < 0.1 * seen[0]


def _step(optimizer, value):
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    return value.item()


def numpy_edges(x):
    squared = pairwise_distances(x.reshape(len(x), -1)) ** 2
    return squared / squared.max()


def test_irg_against_numpy():
    early = [rng.normal(size=(4, 3, 4, 4)) for _ in range(2)]
    late = [rng.normal(size=(4, 6, 2, 2)) for _ in range(2)]
    logits = [rng.normal(size=(4, 3)) for _ in range(2)]

    def moves(first, second):
        first = first.reshape(4, 3, 2, 2, 2, 2).mean((3, 5))
        second = second.reshape(4, 3, 2, 2, 2).mean(2)
        squared = ((first - second) ** 2).sum((1, 2, 3))
        return squared / squared.max()

    def error(of):
        return ((of(0) - of(1)) ** 2).mean()

    def pooled(n):
        return numpy_edges(late[n].mean((2, 3)))

    among = error(lambda n: numpy_edges(early[n])) + error(lambda n: numpy_edges(late[n])) + error(pooled)
    expected = 0.1 * error(lambda n: logits[n]) + 5 * among / 3 + 5 * error(lambda n: moves(early[n], late[n]))
    student, teacher = ([torch.tensor(early[n]), torch.tensor(late[n])] for n in range(2))
    known = {"student_NK": torch.tensor(logits[0]), "teacher_NK": torch.tensor(logits[1])}
    values = IRG(use="irg")(lesson(student, teacher, **known))
    assert values.shape == (2,)
    assert values.sum().item() == pytest.approx(expected, rel=1e-10)
    first = 5 / 3 * error(lambda n: numpy_edges(early[n]))
    assert values[0].item() == pytest.approx(first, rel=1e-10)


def test_a_wider_layer_may_come_first():
    wide, narrow = torch.tensor(rng.normal(size=(3, 4, 2, 2))), torch.tensor(rng.normal(size=(3, 2, 4, 4)))
    pooled = wide.unflatten(1, (2, 2)).mean(2) - narrow.unflatten(3, (2, 2)).mean(4).unflatten(2, (2, 2)).mean(3)
    squared = pooled.square().sum((1, 2, 3))
    torch.testing.assert_close(transformation(wide, narrow), squared / squared.max())


def test_equal_images_have_no_edges_whatever_the_rounding():
    image = torch.randn(1, 1000) * 100
    features = image.expand(6, -1).clone().requires_grad_()
    value = edges(features)
    value.sum().backward()
    assert value.abs().max() < 1e-2
    assert features.grad.isfinite().all()


def test_distances_of_equal_rows_are_zero():
    rows = torch.randn(40, 300)
    rows[1] = rows[0]
    rows.requires_grad_()
    between = distances(rows)
    assert between[0, 1] == 0
    assert between.diagonal().abs().max() == 0
    between.sum().backward()
    assert rows.grad.isfinite().all()


def test_embeddings_are_means_over_positions():
    maps = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    tokens = maps.flatten(2).transpose(1, 2)
    torch.testing.assert_close(embedding(maps), maps.flatten(2).mean(2))
    torch.testing.assert_close(embedding(tokens), embedding(maps))
    assert embedding(maps[:, :, 0, 0]) is not None
    assert as_maps(tokens).shape == (2, 3, 20, 1)
    torch.testing.assert_close(as_maps(tokens)[..., 0], maps.flatten(2))
    assert as_maps(embedding(maps)).shape == (2, 3, 1, 1)


@pytest.mark.parametrize("loss", ON_VECTORS)
def test_equal_relations_cost_nothing_and_others_something(loss):
    student, teacher = torch.tensor(STUDENT), torch.tensor(TEACHER)
    assert loss(teacher, teacher).item() == pytest.approx(0, abs=1e-12)
    assert loss(student, teacher) > 1e-5


def test_pkt_has_roles():
    student, teacher = torch.tensor(STUDENT), torch.tensor(TEACHER)
    assert probabilistic_transfer(student, teacher) != probabilistic_transfer(teacher, student)
    assert flow_divergence(student, teacher) == pytest.approx(flow_divergence(teacher, student))


@pytest.mark.parametrize("loss", [*ON_VECTORS, adjacent_congruence], ids=lambda loss: loss.__name__)
def test_gradients_of_vectors(loss):
    student = torch.tensor(rng.normal(size=(4, 3)), requires_grad=True)
    teacher = torch.tensor(rng.normal(size=(4, 3)))
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), (student,))


ALL = [
    RKD(use="rkd"),
    PKT(use="pkt"),
    InformationFlow(use="information_flow"),
    IRG(use="irg"),
    CorrelationCongruence(use="cc", embedding=4),
    CorrelationCongruence(use="cc", kernel="bilinear", embedding=None),
    CorrelationCongruence(use="cc", kernel="adjacent", embedding=4),
]
SHAPES = [(2, 4, 4), (3, 2, 2)]


def parts_of(loss, shapes=SHAPES, teacher=None):
    torch.manual_seed(0)
    parts = loss.parts(facts(*shapes, teacher=teacher))
    return None if parts is None else parts.double()


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: f"{loss.use}-{getattr(loss, 'kernel', '')}")
def test_gradients_of_maps(loss):
    teacher = [torch.tensor(rng.normal(size=(3, *shape))) for shape in SHAPES]
    student = [torch.tensor(rng.normal(size=(3, *shape)), requires_grad=True) for shape in SHAPES]
    logits = torch.tensor(rng.normal(size=(3, 3)), requires_grad=True)
    parts = parts_of(loss)

    def value(logits, *maps):
        known = {"student_NK": logits, "teacher_NK": torch.zeros(3, 3, dtype=torch.float64)}
        return loss(lesson(maps, teacher, parts=parts, progress=0.1, **known))

    assert torch.autograd.gradcheck(value, (logits, *student))


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("loss", ALL, ids=lambda loss: f"{loss.use}-{getattr(loss, 'kernel', '')}")
def test_dead_maps_and_small_batches_have_finite_gradients(loss, count):
    alive = [torch.rand(count, *shape) for shape in SHAPES]
    dead = [torch.zeros(count, *shape) for shape in SHAPES]
    partly = [torch.cat([torch.zeros(1, *shape), torch.rand(count, *shape)])[:count] for shape in SHAPES]
    for student, teacher in itertools.product((alive, dead, partly), repeat=2):
        student = [maps.clone().requires_grad_() for maps in student]
        parts = parts_of(loss)
        value = loss(lesson(student, teacher, parts=None if parts is None else parts.float()))
        value.sum().backward()
        assert value.isfinite().all()
        assert all(maps.grad.isfinite().all() and maps.grad.abs().max() < 1e7 for maps in student)


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: f"{loss.use}-{getattr(loss, 'kernel', '')}")
@pytest.mark.parametrize("shapes", [[(5, 2), (5, 3)], [(4,), (3,)], [(2, 4, 4), (3,)]])
def test_widths_differ_and_tokens_and_vectors_are_taken(loss, shapes):
    wider = [(*shape[:-1], 7) if len(shape) == 2 else (7, *shape[1:]) for shape in shapes]
    student = [torch.tensor(rng.normal(size=(3, *shape))) for shape in shapes]
    teacher = [torch.tensor(rng.normal(size=(3, *shape))) for shape in wider]
    values = loss(lesson(student, teacher, parts=parts_of(loss, shapes, wider)))
    assert values.shape == (2,)
    assert values.isfinite().all()


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: f"{loss.use}-{getattr(loss, 'kernel', '')}")
def test_shapes_without_channels_are_refused_by_name(loss):
    with pytest.raises(ModelError, match=r"layer1.*needs \(C, H, W\)"):
        loss.parts(facts((3, 2, 2), (3, 2, 2, 2)))
    with pytest.raises(ModelError, match="there are none"):
        loss.parts(facts())


def test_a_graph_needs_two_layers():
    with pytest.raises(ModelError, match=r"layer0.*from one layer to the next"):
        IRG(use="irg").parts(facts((3, 2, 2)))
