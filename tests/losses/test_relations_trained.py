"""Losses with parts that are trained along: VID, factor transfer, CRD, adversarial."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from scipy.special import expit

from compress.errors import DataError, ModelError
from compress.losses import LossSettings
from compress.losses.adversarial import (
    Adversarial,
    discriminator_loss,
    features_discriminator,
    game,
    logits_discriminator,
    student_loss,
)
from compress.losses.crd import CRD, drawn, log_norm, noise_contrastive
from compress.losses.factor_transfer import FactorTransfer, factor_distance
from compress.losses.lesson import NO_LABEL, Facts, Lesson
from compress.losses.vid import EPS, VID, gaussian_information

rng = np.random.default_rng(0)
SHAPES, WIDER = [(2, 4, 4), (3, 2, 2)], [(4, 4, 4), (5, 2, 2)]


@pytest.fixture(autouse=True)
def seeded():
    """The same numbers whichever tests run before."""
    rng.bit_generator.state = np.random.default_rng(1).bit_generator.state
    torch.manual_seed(0)


def lesson(student, teacher, parts, *, logits=None, **known):
    student_NK, teacher_NK = logits or (torch.zeros(len(student[0]), 3), torch.zeros(len(student[0]), 3))
    known.setdefault("labels_N", torch.zeros(len(student_NK), dtype=torch.int64))
    return Lesson(student_NK, teacher_NK, student_maps=student, teacher_maps=teacher, parts=parts, **known)


def facts(student=SHAPES, teacher=WIDER, images=10):
    return Facts(tuple(f"layer{n}" for n in range(len(student))), student, teacher, classes=3, images=images)


def built(loss, *args, **known):
    torch.manual_seed(0)
    return loss.parts(facts(*args, **known)).double()


def drawn_maps(count, shapes):
    return [torch.tensor(rng.normal(size=(count, *shape))) for shape in shapes]


def gradients(value, tensors):
    return torch.autograd.grad(value, tensors, allow_unused=True, materialize_grads=True, retain_graph=True)


def trained(parameters, loss, steps, lr):
    """The loss in each step of training `parameters` alone."""
    optimizer, seen = torch.optim.Adam(parameters, lr=lr), []
    for _ in range(steps):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        seen.append(value.item())
    return seen


# VID


def test_vid_is_the_gaussian_log_likelihood():
    mean, teacher = rng.normal(size=(2, 2, 3, 4, 4))
    variance = rng.uniform(0.5, 2, size=3)
    density = np.exp(-((teacher - mean) ** 2) / 2 / variance[:, None, None]) / np.sqrt(
        2 * np.pi * variance[:, None, None]
    )
    expected = -np.log(density).mean() - 0.5 * math.log(2 * math.pi)
    got = gaussian_information(torch.tensor(mean), torch.tensor(teacher), torch.tensor(variance))
    assert got.item() == pytest.approx(expected, rel=1e-12)


def test_vids_regressor_against_numpy():
    loss = VID(use="vid", variance=3.0)
    parts = built(loss)
    student, teacher = drawn_maps(2, SHAPES), drawn_maps(2, WIDER)
    got = loss(lesson(student, teacher, parts))
    for layer in range(2):
        weights = [m.weight.detach().numpy()[:, :, 0, 0] for m in parts[layer].mean if isinstance(m, torch.nn.Conv2d)]
        hidden = student[layer].numpy()
        for number, weight in enumerate(weights):
            hidden = np.einsum("oi,nihw->nohw", weight, hidden)
            hidden = np.maximum(hidden, 0) if number < 2 else hidden
        # The variance begins at 3, in float32.
        expected = (0.5 * ((teacher[layer].numpy() - hidden) ** 2 / 3 + np.log(3))).mean()
        assert got[layer].item() == pytest.approx(expected, rel=1e-6)


def test_vid_learns_what_the_student_tells_about_the_teacher():
    torch.manual_seed(0)
    student = [torch.rand(8, 2, 4, 4)]
    teacher = [torch.cat([student[0], -student[0]], 1) + torch.tensor([0.0, 0, 0, 1])[:, None, None] * torch.randn(1)]
    teacher[0][:, 3] = torch.randn(8, 4, 4)  # what it cannot tell
    loss = VID(use="vid")
    parts = loss.parts(facts(SHAPES[:1], WIDER[:1]))
    seen = trained(parts.parameters(), lambda: loss(lesson(student, teacher, parts)).sum(), steps=150, lr=0.05)
    assert seen[-1] < seen[0] - 0.5
    variances = torch.nn.functional.softplus(parts[0].scale_C) + EPS
    assert variances[3] > 5 * variances[:3].max()


# Factor transfer


def test_factor_distance_against_numpy():
    student, teacher = rng.normal(size=(2, 3, 2, 4, 4))

    def unit(x):
        return x / np.sqrt((x**2).sum((1, 2, 3), keepdims=True))

    error = np.abs(unit(student) - unit(teacher))
    got = [factor_distance(torch.tensor(student), torch.tensor(teacher), power).item() for power in (1, 2)]
    assert got == pytest.approx([error.mean(), (error**2).mean()], rel=1e-12)
    assert factor_distance(torch.tensor(student), torch.tensor(student) * 3).item() == pytest.approx(0, abs=1e-15)


def parts_of_factor_transfer(loss):
    parts = built(loss, SHAPES[:1], WIDER[:1])
    return parts, list(parts[0].paraphraser.parameters()), list(parts[0].translator.parameters())


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_translator_and_paraphraser_are_moved_by_their_own_loss_only(kernel_size):
    loss = FactorTransfer(use="factor_transfer", kernel_size=kernel_size, alone=0.0)
    parts, paraphraser, translator = parts_of_factor_transfer(loss)
    student, teacher = drawn_maps(2, SHAPES[:1]), drawn_maps(2, WIDER[:1])
    student[0].requires_grad_()
    teacher[0].requires_grad_()
    value = loss(lesson(student, teacher, parts)).sum()

    factor, rebuilt = parts[0].paraphraser(teacher[0].detach())
    assert factor.shape == (2, 2, 4, 4)
    assert rebuilt.shape == teacher[0].shape
    distance = factor_distance(parts[0].translator(student[0]), factor.detach())
    error = 0.005 * ((rebuilt - teacher[0].detach()) ** 2).mean()
    torch.testing.assert_close(value, distance + error)
    everything = [student[0], teacher[0], *translator, *paraphraser]
    expected = [*gradients(distance, everything[: 2 + len(translator)]), *gradients(error, paraphraser)]
    torch.testing.assert_close(list(gradients(value, everything)), expected)
    assert not gradients(value, [teacher[0]])[0].any()
    # Without the two `detach`, these would be moved too:
    assert any(
        g.abs().max() > 1e-9 for g in gradients(factor_distance(factor, distance.detach() + factor * 0), [factor])
    )


def test_at_first_only_the_paraphraser_is_trained():
    loss = FactorTransfer(use="factor_transfer", active=(0.2, 0.7))
    parts, paraphraser, translator = parts_of_factor_transfer(loss)
    student, teacher = drawn_maps(2, SHAPES[:1]), drawn_maps(2, WIDER[:1])
    student[0].requires_grad_()
    for progress, moves in ((0.2, False), (0.24, False), (0.26, True), (0.6, True)):
        value = loss(lesson(student, teacher, parts, progress=progress)).sum()
        assert any(g.any() for g in gradients(value, paraphraser))
        assert any(g.any() for g in gradients(value, [student[0], *translator])) == moves


def test_the_paraphraser_learns_to_rebuild_and_the_translator_to_translate():
    torch.manual_seed(0)
    teacher = [torch.rand(8, 2, 4, 4).repeat(1, 2, 1, 1)]  # half the channels say it all
    student = [teacher[0][:, :2] * 2]
    loss = FactorTransfer(use="factor_transfer", reconstruction=1.0)
    parts = loss.parts(facts(SHAPES[:1], WIDER[:1]))
    first = trained(parts.parameters(), lambda: loss(lesson(student, teacher, parts)).sum(), steps=150, lr=0.03)
    assert first[-1] < 0.25 * first[0]

    def distance():
        return factor_distance(parts[0].translator(student[0]), parts[0].paraphraser(teacher[0])[0]).item()

    before = distance()
    trained(parts.parameters(), lambda: loss(lesson(student, teacher, parts, progress=0.5)).sum(), steps=150, lr=0.01)
    assert distance() < 0.5 * before


# CRD


def test_nce_against_numpy():
    positive, negative = rng.normal(size=4), rng.normal(size=(4, 6))
    counts = rng.random((4, 6)) < 0.7
    expected = 0.0
    for p, row, real in zip(positive, negative, counts, strict=True):
        noise = real.sum() / 20
        expected -= math.log(math.exp(p) / (math.exp(p) + noise))
        expected -= sum(math.log(noise / (math.exp(n) + noise)) for n in row[real])
    got = noise_contrastive(torch.tensor(positive), torch.tensor(negative), torch.tensor(counts), 20)
    assert got.item() == pytest.approx(expected / 4, rel=1e-12)


def test_nce_without_any_negative_is_zero():
    positive, negative = torch.zeros(2, requires_grad=True), torch.zeros(2, 3, requires_grad=True)
    value = noise_contrastive(positive, negative, torch.zeros(2, 3, dtype=torch.bool), 3)
    value.backward()
    assert value == 0
    assert not positive.grad.any()
    assert not negative.grad.any()


def test_negatives_are_drawn_among_the_allowed_ones_without_repetition():
    torch.manual_seed(0)
    allowed = torch.rand(3, 40) < 0.5
    allowed[2, 5:] = False
    allowed[2, :5] = True
    seen = torch.zeros(40)
    for _ in range(400):
        columns, counts = drawn(allowed, 8)
        for row in range(3):
            chosen = columns[row][counts[row]].tolist()
            assert len(chosen) == len(set(chosen)) == min(8, int(allowed[row].sum()))
            assert allowed[row][chosen].all()
        seen.scatter_add_(0, columns[0], torch.ones(8))
    share = seen[allowed[0]] / 400 * allowed[0].sum() / 8
    assert share.min() > 0.6  # a standard deviation is below 0.1
    assert share.max() < 1.4
    assert drawn(allowed, 39)[0] is None


def crd_and_batch(count=4, images=7, **settings):
    loss = CRD(use="crd", embedding=3, **settings)
    parts = built(loss, [(2,)], [(5,)], images=images)
    student, teacher = drawn_maps(count, [(2,)]), drawn_maps(count, [(5,)])
    return loss, parts, student, teacher


def test_crd_against_numpy_over_two_batches():
    loss, parts, _, _ = crd_and_batch(temperature=0.5, momentum=0.25)
    contrast = parts[0]
    banks = [contrast.student_bank_MD.numpy().copy(), contrast.teacher_bank_MD.numpy().copy()]
    known, norms = np.full(7, NO_LABEL), [None, None]
    batches = [([0, 3, 6], [1, NO_LABEL, 1]), ([3, 1, 0], [0, 1, 1])]
    for indices, labels in batches:
        student, teacher = drawn_maps(3, [(2,)])[0], drawn_maps(3, [(5,)])[0]
        got = loss(lesson([student], [teacher], parts, indices_N=torch.tensor(indices), labels_N=torch.tensor(labels)))
        for index, label in zip(indices, labels, strict=True):
            known[index] = label if label != NO_LABEL else known[index]
        embedded = []
        for side, features in ((contrast.student, student), (contrast.teacher, teacher)):
            x = features.numpy() @ side.weight.detach().numpy().T + side.bias.detach().numpy()
            embedded.append(x / np.linalg.norm(x, axis=1, keepdims=True))
        expected = 0.0
        for direction, bank in enumerate((banks[1], banks[0])):
            scores = np.exp(embedded[direction] @ bank.T / 0.5)
            negatives = [
                [m for m in range(7) if m != i and (label == NO_LABEL or known[m] != label)]
                for i, label in zip(indices, labels, strict=True)
            ]
            if norms[direction] is None:
                used = [scores[n, i] for n, i in enumerate(indices)]
                used += [scores[n, m] for n, row in enumerate(negatives) for m in row]
                norms[direction] = np.mean(used) * 7
            scores = scores / norms[direction]
            for n, (index, row) in enumerate(zip(indices, negatives, strict=True)):
                noise = len(row) / 7
                expected -= math.log(scores[n, index] / (scores[n, index] + noise)) / 3
                expected -= sum(math.log(noise / (scores[n, m] + noise)) for m in row) / 3
        for bank, latest in zip(banks, embedded, strict=True):
            mixed = 0.25 * bank[indices] + 0.75 * latest
            bank[indices] = mixed / np.linalg.norm(mixed, axis=1, keepdims=True)
        assert got.shape == (1,)
        assert got.item() == pytest.approx(expected, rel=1e-6)  # the constant is kept in float32 until `double`


def test_crds_gradients():
    loss, parts, student, teacher = crd_and_batch(temperature=0.5)
    indices_N = torch.arange(4)
    loss(lesson(student, teacher, parts, indices_N=indices_N))  # finds the constants
    student[0].requires_grad_()
    state = copy.deepcopy(parts)

    def value(features):
        return loss(lesson([features], teacher, copy.deepcopy(state), indices_N=indices_N))

    assert torch.autograd.gradcheck(value, student)
    parts.zero_grad()
    loss(lesson(student, teacher, parts, indices_N=indices_N)).sum().backward()
    assert all(parameter.grad.any() for parameter in parts.parameters())


def test_crds_banks_do_not_change_under_its_gradient():
    loss, parts, student, teacher = crd_and_batch()
    indices_N = torch.arange(4)
    loss(lesson(student, teacher, parts, indices_N=indices_N))  # finds the constants
    before = copy.deepcopy(parts)
    # Twice before the gradient, as for what two networks say of a batch; autograd refuses what was overwritten.
    first, second = (loss(lesson(student, teacher, parts, indices_N=indices_N)).sum() for _ in range(2))
    weights = list(parts.parameters())
    alone = loss(lesson(student, teacher, before, indices_N=indices_N)).sum()
    torch.testing.assert_close(gradients(first, weights), gradients(alone, list(before.parameters())))
    second.backward()
    assert parts[0].student_bank_MD[:4].norm(dim=1).tolist() == pytest.approx([1] * 4)
    torch.testing.assert_close(parts[0].student_bank_MD[4:], before[0].student_bank_MD[4:], rtol=0, atol=0)


def test_crd_learns_to_tell_images_apart():
    torch.manual_seed(0)
    teacher = torch.randn(24, 6)
    student = teacher @ torch.randn(6, 5)
    loss = CRD(use="crd", embedding=8, negatives=12)
    parts = loss.parts(facts([(5,)], [(6,)], images=24))
    labels_N = torch.arange(24)
    batches = itertools.cycle(torch.arange(24).split(8))

    def step():
        chosen = next(batches)
        known = {"indices_N": chosen, "labels_N": labels_N[chosen]}
        return loss(lesson([student[chosen]], [teacher[chosen]], parts, **known)).sum()

    seen = trained(parts.parameters(), step, steps=240, lr=0.02)
    assert np.mean(seen[-12:]) < 0.3 * np.mean(seen[:12])


def test_images_of_the_same_class_are_no_negatives():
    loss, parts, student, teacher = crd_and_batch(images=4)
    values = []
    for labels in ([1, 1, 1, 1], [NO_LABEL] * 4):
        copied = copy.deepcopy(parts)
        known = {"indices_N": torch.arange(4), "labels_N": torch.tensor(labels)}
        for _ in range(2):
            value = loss(lesson(student, teacher, copied, **known))
        values.append((value.item(), copied[0].log_norms))
    assert values[0][0] < values[1][0]  # four of one class have nothing to be told from


def test_log_norm_is_the_mean_times_the_images():
    positive, negative = torch.tensor([0.1, 0.2]), torch.tensor([[0.3, 9.0], [0.5, 0.6]])
    counts = torch.tensor([[True, False], [True, True]])
    expected = np.log(np.mean(np.exp([0.1, 0.2, 0.3, 0.5, 0.6])) * 50)
    assert log_norm(positive, negative, counts, 50).item() == pytest.approx(expected, rel=1e-6)


def test_crd_refuses_data_without_numbers():
    loss, parts, student, teacher = crd_and_batch()
    with pytest.raises(DataError, match="does not number them"):
        loss(lesson(student, teacher, parts))
    with pytest.raises(DataError, match="one numbered 7"):
        loss(lesson(student, teacher, parts, indices_N=torch.tensor([0, 1, 2, 7])))
    with pytest.raises(DataError, match="tells images apart"):
        loss.parts(facts(images=1))


# Adversarial


def test_both_players_losses_against_numpy():
    student, teacher = rng.normal(size=(2, 9))
    expected = -np.log(expit(teacher)).mean() - np.log(1 - expit(student)).mean()
    assert discriminator_loss(torch.tensor(student), torch.tensor(teacher)).item() == pytest.approx(expected)
    assert student_loss(torch.tensor(student)).item() == pytest.approx(-np.log(expit(student)).mean())
    blind = torch.zeros(4)
    assert (discriminator_loss(blind, blind) + student_loss(blind)).item() == pytest.approx(3 * math.log(2))


PLAYERS = [(logits_discriminator(3, 8), (3,)), (features_discriminator(3, 8), (3, 4, 4))]


@pytest.mark.parametrize(("discriminator", "shape"), PLAYERS)
def test_each_player_is_moved_by_its_own_loss_only(discriminator, shape):
    discriminator = discriminator.double()
    student, teacher = (maps[0].requires_grad_() for maps in (drawn_maps(4, [shape]), drawn_maps(4, [shape])))
    weights = list(discriminator.parameters())
    value = game(discriminator, student, teacher)
    of_discriminator = discriminator_loss(discriminator(student), discriminator(teacher))
    of_student = student_loss(discriminator(student))
    torch.testing.assert_close(value, of_discriminator + of_student)
    torch.testing.assert_close(gradients(value, weights), gradients(of_discriminator, weights))
    torch.testing.assert_close(gradients(value, [student]), gradients(of_student, [student]))
    assert not gradients(value, [teacher])[0].any()
    # Each loss would move the other player too:
    assert gradients(of_discriminator, [student])[0].any()
    assert any(g.any() for g in gradients(of_student, weights))


def test_the_student_gets_a_correct_gradient():
    discriminator = features_discriminator(3, 4).double()
    student, teacher = drawn_maps(2, [(3, 3, 3)])[0].requires_grad_(), drawn_maps(2, [(3, 3, 3)])[0]
    copied = copy.deepcopy(discriminator)
    # The value has the discriminator's loss too, which is constant for the student: its own part is compared.
    expected = torch.autograd.functional.jacobian(lambda s: student_loss(copied(s)), student.detach())
    torch.testing.assert_close(gradients(game(discriminator, student, teacher), [student])[0], expected)
    assert torch.autograd.gradcheck(lambda s: student_loss(copied(s)), (student,))


@pytest.mark.parametrize("on", ["logits", "features"])
def test_the_discriminator_separates_and_the_student_follows(on):
    torch.manual_seed(0)
    teacher = torch.randn(64, 3) * 0.3 + torch.tensor([1.0, 0.0, -1.0])
    student = (torch.randn(64, 3) * 0.3).requires_grad_()
    if on == "features":
        loss = Adversarial(use="adversarial", on="features", layers="auto", hidden=16)
        parts = loss.parts(facts([(3,)], [(3,)]))
    else:
        loss = Adversarial(use="adversarial", hidden=16)
        parts = loss.parts(facts())
    known = lesson([student], [teacher], parts, logits=(student, teacher))
    trained(parts.parameters(), lambda: loss(known).sum(), steps=100, lr=0.015)
    features = [x if on == "logits" else x[:, :, None, None] for x in (student, teacher)]
    scores = [parts[0](x).flatten() for x in features]
    assert (scores[0] < 0).float().mean() > 0.9
    assert (scores[1] > 0).float().mean() > 0.9
    away = (student.mean(0) - teacher.mean(0)).norm().item()
    trained([student, *parts.parameters()], lambda: loss(known).sum(), steps=100, lr=0.015)
    assert (student.mean(0) - teacher.mean(0)).norm().item() < 0.5 * away


def test_what_the_discriminator_sees_is_said_once():
    with pytest.raises(ValidationError, match="add `layers: auto`"):
        Adversarial(use="adversarial", on="features")
    with pytest.raises(ValidationError, match="looks at no layers"):
        Adversarial(use="adversarial", layers=("a",))
    assert Adversarial(use="adversarial").layers == ()


# All of them

LOSSES = [
    VID(use="vid"),
    FactorTransfer(use="factor_transfer", alone=0.0),
    CRD(use="crd", embedding=4),
    Adversarial(use="adversarial", hidden=4),
    Adversarial(use="adversarial", on="features", layers="auto", hidden=4),
]
NAMES = ["vid", "factor_transfer", "crd", "adversarial-logits", "adversarial-features"]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_dead_maps_and_small_batches_have_finite_gradients(loss, count):
    shapes = WIDER
    torch.manual_seed(0)
    parts = loss.parts(facts(shapes, shapes)).train()
    for maps in itertools.product((torch.rand, torch.zeros), repeat=2):
        student, teacher = ([make(count, *shape) for shape in shapes] for make in maps)
        logits = (student[0].mean((2, 3))[:, :3].requires_grad_(), teacher[0].mean((2, 3))[:, :3])
        for features in student:
            features.requires_grad_()
        value = loss(lesson(student, teacher, parts, logits=logits, indices_N=torch.arange(count)))
        parts.zero_grad()
        value.sum().backward()
        seen = [x for x in [*student, logits[0], *parts.parameters()] if x.grad is not None]
        assert len(seen) > len(list(parts.parameters()))
        assert value.isfinite().all()
        assert all(x.grad.isfinite().all() for x in seen)


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_parts_are_drawn_from_the_callers_seed(loss):
    def state(seed):
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in loss.parts(facts(WIDER)).parameters()])

    torch.testing.assert_close(state(1), state(1), rtol=0, atol=0)
    assert (state(1) != state(2)).any()


@pytest.mark.parametrize("loss", LOSSES[:2], ids=NAMES[:2])
def test_other_positions_are_refused_by_name(loss):
    assert loss.parts(facts()) is not None
    with pytest.raises(ModelError, match=r"layer1: .*position by position"):
        loss.parts(facts(teacher=[(4, 4, 4), (5, 1, 1)]))


def test_tokens_and_vectors_are_maps_to_vid_and_a_discriminator_and_nothing_to_a_paraphraser():
    shapes = [(5, 2), (3,)]
    student, teacher = drawn_maps(2, shapes), drawn_maps(2, shapes)
    for loss in (VID(use="vid"), Adversarial(use="adversarial", on="features", layers="auto")):
        assert loss(lesson(student, teacher, built(loss, shapes, shapes))).isfinite().all()
    with pytest.raises(ModelError, match=r"needs a map \(C, H, W\)"):
        FactorTransfer(use="factor_transfer").parts(facts(shapes, shapes))


def test_a_discriminator_of_features_needs_equal_widths():
    with pytest.raises(ModelError, match=r"layer0: .*compares equal shapes"):
        Adversarial(use="adversarial", on="features", layers="auto").parts(facts())


@pytest.mark.parametrize(
    "use",
    ["rkd", "cc", "pkt", "information_flow", "vid", "factor_transfer", "kd_svd", "irg", "crd", "adversarial"],
)
def test_every_loss_has_a_name_in_the_recipe(use):
    assert TypeAdapter(LossSettings).validate_python({"use": use}).use == use
