"""Losses that compare layer with layer: hints, attention, channel divergence, boundaries, similarities, flows, SAD."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from torch.nn import functional as F

from compress.errors import ModelError
from compress.losses.activation_boundary import ActivationBoundary, boundary
from compress.losses.attention import Attention, attention_map, attention_transfer
from compress.losses.cwd import CWD, channel_divergence
from compress.losses.fitnets import FitNets, hint
from compress.losses.fsp import FSP, flow, flow_difference
from compress.losses.lesson import Facts, Lesson
from compress.losses.maps import channels_by_positions, unit
from compress.losses.nst import NST
from compress.losses.self_attention import SelfAttention, attention_from_above, spatial_attention
from compress.losses.similarity import Similarity, image_similarities, similarity_preserving

rng = np.random.default_rng(0)
STUDENT, TEACHER = rng.normal(size=(3, 4, 5, 2)), rng.normal(size=(3, 4, 5, 2)) * 2
WIDE = rng.normal(size=(3, 7, 5, 2))
TOKENS = rng.normal(size=(3, 10, 4))

NARROW = [Attention(use="attention"), Similarity(use="similarity"), NST(use="nst")]
EQUAL = [FitNets(use="fitnets"), CWD(use="cwd"), ActivationBoundary(use="activation_boundary")]
PAIRED = [FSP(use="fsp"), SelfAttention(use="self_attention")]
ALL = NARROW + EQUAL + PAIRED


def t(array: np.ndarray, *, trained: bool = False) -> torch.Tensor:
    return torch.tensor(array, requires_grad=trained)


def lesson(student: list[torch.Tensor], teacher: list[torch.Tensor]) -> Lesson:
    empty = torch.zeros(len(student[0]), 2)
    layers = tuple(f"layer{number}" for number in range(len(student)))
    return Lesson(
        empty, empty, empty.argmax(1), student_maps=student, teacher_maps=teacher, layers=layers, progress=0.5
    )


def facts(*shapes: tuple[int, ...], teacher: tuple[tuple[int, ...], ...] | None = None) -> Facts:
    return Facts([f"layer{number}" for number in range(len(shapes))], shapes, teacher or shapes, 10, 100)


# ---------------------------------------------------------------------------------------------------------------------
# Each formula against numpy


def test_hint_against_numpy():
    assert hint(t(STUDENT), t(TEACHER)).item() == pytest.approx(0.5 * ((STUDENT - TEACHER) ** 2).mean())


def attention_rows(maps: np.ndarray, power: float, over: str) -> np.ndarray:
    strength = np.abs(maps) ** power
    rows = (strength.sum(1) if over == "sum" else strength.max(1)).reshape(len(maps), -1)
    return rows / np.sqrt((rows**2).sum(1, keepdims=True))


@pytest.mark.parametrize("over", ["sum", "max"])
@pytest.mark.parametrize("power", [1.0, 2.0, 3.5])
def test_attention_against_numpy(power, over):
    difference = attention_rows(STUDENT, power, over) - attention_rows(WIDE, power, over)
    got = attention_transfer(t(STUDENT), t(WIDE), power, over)
    assert got.item() == pytest.approx((difference**2).sum() / 30, rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_channel_divergence_against_numpy(temperature):
    student = softmax(STUDENT.reshape(3, 4, 10) / temperature, axis=2)
    teacher = softmax(TEACHER.reshape(3, 4, 10) / temperature, axis=2)
    expected = temperature**2 * rel_entr(teacher, student).sum(2).mean()
    assert channel_divergence(t(STUDENT), t(TEACHER), temperature).item() == pytest.approx(expected, rel=1e-10)


def test_boundary_against_the_reference_formula():
    """RepDistiller's two cases, number by number, and its scale: a sum over a layer."""
    total = 0.0
    for s, target in zip(STUDENT.flat, TEACHER.flat, strict=True):
        total += (s + 1.5) ** 2 * (s > -1.5 and target <= 0) + (s - 1.5) ** 2 * (s <= 1.5 and target > 0)
    assert boundary(t(STUDENT), t(TEACHER), 1.5).item() * STUDENT.size == pytest.approx(total, rel=1e-12)


def test_similarity_against_numpy():
    def rows(maps: np.ndarray) -> np.ndarray:
        gram = np.array([[(a * b).sum() for b in maps] for a in maps])
        return gram / np.linalg.norm(gram, axis=1, keepdims=True)

    expected = ((rows(WIDE) - rows(STUDENT)) ** 2).sum() / 9
    assert similarity_preserving(t(STUDENT), t(WIDE)).item() == pytest.approx(expected, rel=1e-12)


def test_flow_against_numpy():
    """Between maps of different sizes: the larger is averaged over blocks."""
    large = rng.normal(size=(3, 2, 10, 6))
    small = rng.normal(size=(3, 4, 5, 2))
    blocks = large.reshape(3, 2, 5, 2, 2, 3).mean((3, 5))
    expected = np.einsum("nchw,ndhw->ncd", blocks, small) / 10
    np.testing.assert_allclose(flow(t(large), t(small)).numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(flow(t(small), t(large)).numpy(), expected.transpose(0, 2, 1), rtol=1e-12)
    other_large, other_small = rng.normal(size=large.shape), rng.normal(size=small.shape)
    other = np.einsum("nchw,ndhw->ncd", other_large.reshape(3, 2, 5, 2, 2, 3).mean((3, 5)), other_small) / 10
    got = flow_difference([t(large), t(small)], [t(other_large), t(other_small)])
    assert got.tolist() == pytest.approx([((expected - other) ** 2).mean()])


def test_self_attention_against_numpy():
    """Of two layers of one size, and of a deeper one of half the size: bilinear upsampling by 2 mixes 3/4 with 1/4."""

    def rows(strength: np.ndarray) -> np.ndarray:
        return softmax(strength.reshape(len(strength), -1), axis=1)

    deep = rng.normal(size=(3, 6, 1, 2))
    a, b = (deep**2).sum(1)[:, 0].T
    wide = np.stack([a, 0.75 * a + 0.25 * b, 0.25 * a + 0.75 * b, b], 1)
    shallow = rng.normal(size=(3, 2, 2, 4))
    upsampled = np.stack([wide, wide], 1)
    same = rng.normal(size=(3, 5, 2, 4))
    expected = [
        ((rows((same**2).sum(1)) - rows((shallow**2).sum(1))) ** 2).sum(1).mean(),
        ((rows((shallow**2).sum(1)) - rows(upsampled)) ** 2).sum(1).mean(),
    ]
    got = attention_from_above([t(same), t(shallow), t(deep)])
    assert got.tolist() == pytest.approx(expected, rel=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Identities and limits


@pytest.mark.parametrize("loss", NARROW + EQUAL + [PAIRED[0]], ids=lambda loss: loss.use)
def test_equal_maps_cost_nothing_but_at_the_boundary_margin(loss):
    maps = [t(TEACHER), t(TEACHER) + 1]
    values = loss(lesson(maps, maps))
    assert values.shape == (1 if loss.use == "fsp" else 2,)
    if loss.use == "activation_boundary":
        assert values.min() > 0  # the teacher itself is nearer to 0 than the margin here and there
        far = [3 * m.sign() for m in maps]
        values = loss(lesson(far, maps))
    torch.testing.assert_close(values, torch.zeros_like(values), atol=1e-15, rtol=0)


@pytest.mark.parametrize("loss", NARROW + EQUAL + [PAIRED[0]], ids=lambda loss: loss.use)
def test_one_value_for_each_layer_and_only_the_student_learns(loss):
    student = [t(STUDENT, trained=True), t(STUDENT + 1, trained=True)]
    teacher = [t(TEACHER), t(TEACHER)]
    values = loss(lesson(student, teacher))
    assert values.shape == (1 if loss.use == "fsp" else 2,)
    assert (values > 0).all()
    values.sum().backward()
    assert all(maps.grad is not None and maps.grad.abs().sum() > 0 for maps in student)


def test_attention_sees_neither_widths_nor_order_nor_scale():
    teacher = t(TEACHER)
    again = torch.cat([teacher[:, [2, 0, 3, 1]], torch.zeros(3, 5, 5, 2)], 1) * 7
    assert attention_transfer(again, teacher, 2.0).item() == pytest.approx(0, abs=1e-15)
    assert attention_transfer(again, teacher, 1.0, "max").item() == pytest.approx(0, abs=1e-15)


def test_a_high_power_of_the_sum_tends_to_the_max():
    torch.testing.assert_close(
        attention_map(t(TEACHER), 200.0), attention_map(t(TEACHER), 200.0, "max"), atol=0.01, rtol=0
    )


def test_channel_divergence_sees_no_constant_and_roles_matter():
    student, teacher = t(STUDENT), t(TEACHER)
    shifted = teacher + torch.arange(4)[:, None, None]
    assert channel_divergence(shifted, teacher, 4.0).item() == pytest.approx(0, abs=1e-14)
    assert channel_divergence(student, teacher, 1.0) != channel_divergence(teacher, student, 1.0)


def test_channel_divergence_at_high_temperature_matches_centred_values():
    """As for logits: for T to infinity, KL * T**2 is half the mean square of centred differences."""
    difference = (STUDENT - TEACHER).reshape(3, 4, 10)
    expected = 0.5 * ((difference - difference.mean(2, keepdims=True)) ** 2).mean()
    assert channel_divergence(t(STUDENT), t(TEACHER), 1e4).item() == pytest.approx(expected, rel=1e-3)


def test_boundary_pushes_only_where_the_margin_is_missed():
    student = torch.tensor([[2.0, 0.5, -2.0, -0.5]], requires_grad=True)
    boundary(student, torch.tensor([[1e-3, 1e-3, 0.0, -5.0]]), 1.0).backward()
    assert student.grad.tolist() == [[0.0, 2 * -0.5 / 4, 0.0, 2 * 0.5 / 4]]


def test_similarity_sees_no_rotation_of_channels():
    rotation, _ = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    turned = torch.einsum("nchw,cd->ndhw", t(WIDE), rotation) * 3
    assert similarity_preserving(turned, t(WIDE)).item() == pytest.approx(0, abs=1e-15)


def test_similarity_of_one_image_is_nothing():
    assert similarity_preserving(t(STUDENT[:1]), t(WIDE[:1])).item() == pytest.approx(0, abs=1e-15)


def test_flow_does_not_see_where_things_are():
    """The same permutation of the positions of both layers leaves the Gram matrix alone."""
    first, second, order = t(STUDENT), t(WIDE), torch.randperm(5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(flow(first[:, :, order], second[:, :, order]), flow(first, second))


def test_self_attention_moves_the_shallow_layer_towards_the_deep_one():
    shallow, deep = t(STUDENT, trained=True), t(WIDE, trained=True)
    (value,) = attention_from_above([shallow, deep])
    value.backward()
    assert deep.grad is None
    assert attention_from_above([shallow.detach() - 0.1 * shallow.grad, deep])[0] < value
    assert spatial_attention(deep, (7, 3)).sum(1).tolist() == pytest.approx([1, 1, 1])


# ---------------------------------------------------------------------------------------------------------------------
# Gradients, dead maps, tokens, shapes that are refused


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: loss.use)
def test_gradients(loss):
    second = t(TEACHER)
    student = t(STUDENT[:2, :2, :3], trained=True)

    def value(maps: torch.Tensor) -> torch.Tensor:
        return loss(lesson([maps, maps * 2 + 1], [second[:2, :2, :3], second[1:, 1:3, :3]]))

    assert loss.use == "self_attention" or torch.autograd.gradcheck(value, (student,))
    above = t(WIDE[:2, :2, :3])
    assert torch.autograd.gradcheck(lambda maps: loss(lesson([maps, above], [above, second[:2, :2, :3]])), (student,))


@pytest.mark.parametrize("which", ["student", "teacher", "both"])
@pytest.mark.parametrize("loss", [*ALL, NST(use="nst", kernel="linear"), NST(use="nst", kernel="gaussian")])
def test_dead_maps_give_finite_values_and_gradients(loss, which):
    """ReLU networks have channels, and maps, that are 0 everywhere."""
    student = torch.randn(4, 3, 4, 4)
    teacher = torch.randn(4, 3, 4, 4)
    student[:, 1] = 0
    if which != "teacher":
        student = torch.zeros(4, 3, 4, 4)
    if which != "student":
        teacher = torch.zeros(4, 3, 4, 4)
    student.requires_grad_()
    values = loss(lesson([student, student * 0.5], [teacher, teacher]))
    values.sum().backward()
    assert values.isfinite().all()
    assert student.grad.abs().max() < 1e3


def test_a_dead_row_has_no_direction_and_no_gradient():
    rows = torch.tensor([[0.0, 0.0], [1e-9, 0.0], [3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    scaled = unit(rows, dim=1)
    assert scaled.tolist() == [[0, 0], [0, 0], [pytest.approx(0.6), pytest.approx(0.8)]]
    scaled[:, 0].sum().backward()
    assert rows.grad.tolist() == [[0, 0], [0, 0], [pytest.approx(16 / 125), pytest.approx(-12 / 125)]]


@pytest.mark.parametrize("loss", [loss for loss in ALL if loss.use != "self_attention"], ids=lambda loss: loss.use)
def test_tokens_are_positions(loss):
    """A transformer's (N, tokens, C) costs what the same numbers cost as a map."""
    as_map = t(TOKENS.transpose(0, 2, 1).reshape(3, 4, 5, 2))
    assert channels_by_positions(t(TOKENS)).equal(channels_by_positions(as_map))
    loss.parts(facts((10, 4), (10, 4)))
    tokens = loss(lesson([t(TOKENS), t(TOKENS)], [t(TOKENS) ** 2 - 1, t(TOKENS) * 3]))
    maps = loss(lesson([as_map, as_map], [as_map**2 - 1, as_map * 3]))
    torch.testing.assert_close(tokens, maps)


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: loss.use)
def test_maps_that_fit_need_no_parts(loss):
    assert loss.parts(facts((4, 5, 2), (8, 3, 1))) is None


@pytest.mark.parametrize("loss", [Attention(use="attention"), NST(use="nst"), CWD(use="cwd"), *PAIRED])
def test_vectors_are_refused_by_the_layers_name(loss):
    with pytest.raises(ModelError, match=rf"^layer1: `{loss.use}` needs a map .* not \(10,\)"):
        loss.parts(facts((4, 5, 2), (10,)))


@pytest.mark.parametrize("loss", [FSP(use="fsp"), *EQUAL], ids=lambda loss: loss.use)
def test_different_widths_are_refused_by_the_layers_name(loss):
    with pytest.raises(ModelError, match=r"^layer1: .*\(4, 5, 2\).*\(7, 5, 2\).*adaptor"):
        loss.parts(facts((4, 5, 2), (4, 5, 2), teacher=((4, 5, 2), (7, 5, 2))))


@pytest.mark.parametrize("loss", [Attention(use="attention"), NST(use="nst"), CWD(use="cwd"), PAIRED[1]])
def test_maps_of_one_pixel_are_refused_only_where_there_are_no_others(loss):
    loss.parts(facts((4, 2, 2), (8, 1, 1)))
    with pytest.raises(ModelError, match=r"layer0, layer1: .*only one"):
        loss.parts(facts((4, 1, 1), (8, 1, 1)))


@pytest.mark.parametrize("loss", PAIRED, ids=lambda loss: loss.use)
def test_a_single_layer_is_no_pair(loss):
    with pytest.raises(ModelError, match=r"^layer0: .*name two"):
        loss.parts(facts((4, 5, 2)))


def test_flows_need_two_layers_of_one_kind():
    for shapes in [((4, 5, 2), (10, 4)), ((10, 4), (5, 4))]:
        with pytest.raises(ModelError, match=r"^layer0, layer1: "):
            FSP(use="fsp").parts(facts(*shapes))


def test_self_attention_resizes_no_tokens():
    with pytest.raises(ModelError, match=r"^layer0, layer1: .*\(C, H, W\), not"):
        SelfAttention(use="self_attention").parts(facts((10, 4), (10, 4)))


def test_values_after_an_activation_have_no_boundary():
    term = ActivationBoundary(use="activation_boundary")
    after = F.relu(t(TEACHER))
    first_step = Lesson(*[torch.zeros(3, 2)] * 3, student_maps=[t(STUDENT)], teacher_maps=[after], layers=["relu"])
    with pytest.raises(ModelError, match=r"^relu: the teacher returns nothing below 0"):
        term(first_step)


def test_image_similarities_are_cosines_of_a_kind():
    found = image_similarities(t(WIDE))
    torch.testing.assert_close(found.square().sum(1), torch.ones(3, dtype=torch.float64))
