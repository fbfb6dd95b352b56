"""Losses, scores and decisions of each task, against scikit-learn, numpy and what must hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, r2_score

from compress.product import NO_LABEL, Scale
from compress.tasks import RULES, agreement, classification, multi_label, regression, task_of
from compress.training import outputs_loss

RNG = np.random.default_rng(5)
LOGITS_NK = RNG.normal(size=(40, 6)).round(1)  # rounded, so that some are equal
LABELS_NK = (RNG.random((40, 6)) < 0.3).astype(np.float32)
COUNTS_N = RNG.integers(0, 4, 40)


def test_every_task_has_rules():
    assert set(RULES) == {"classification", "multi_label", "regression"}
    assert [task_of(name).name for name in RULES] == list(RULES)


# Several labels


def test_mean_average_precision_is_that_of_scikit_learn():
    assert len(np.unique(LOGITS_NK[:, 0])) < 40
    expected = average_precision_score(LABELS_NK, LOGITS_NK, average="macro")
    assert multi_label.mean_average_precision(LOGITS_NK, LABELS_NK) == pytest.approx(expected, abs=1e-12)
    weighted = average_precision_score(LABELS_NK, LOGITS_NK, average="macro", sample_weight=COUNTS_N)
    assert multi_label.mean_average_precision(LOGITS_NK, LABELS_NK, COUNTS_N) == pytest.approx(weighted, abs=1e-12)
    repeated = np.repeat(np.arange(40), COUNTS_N)
    again = multi_label.mean_average_precision(LOGITS_NK[repeated], LABELS_NK[repeated])
    assert again == pytest.approx(weighted, abs=1e-12)


def test_labels_that_hold_nowhere_are_left_out_of_the_mean():
    labels_NK = LABELS_NK.copy()
    labels_NK[:, 2] = 0
    others = [0, 1, 3, 4, 5]
    expected = average_precision_score(labels_NK[:, others], LOGITS_NK[:, others], average="macro")
    assert multi_label.mean_average_precision(LOGITS_NK, labels_NK) == pytest.approx(expected, abs=1e-12)
    rows = multi_label.details(LOGITS_NK, labels_NK, tuple("abcdef"), None)
    assert rows[2]["average_precision"] is None
    assert rows[2]["positives"] == 0
    assert [row["name"] for row in rows] == list("abcdef")
    assert rows[0]["right"] == ((LOGITS_NK[:, 0] > 0) == (labels_NK[:, 0] == 1)).mean()
    assert multi_label.mean_average_precision(LOGITS_NK, np.zeros_like(labels_NK)) == 0


@pytest.mark.parametrize("weights", [None, (1.0, 2.0, 0.5, 3.0, 1.0, 1.0)])
def test_binary_cross_entropy_by_hand(weights):
    logits = torch.from_numpy(LOGITS_NK)
    labels = torch.from_numpy(LABELS_NK.copy())
    labels[3] = torch.nan  # its labels are not known
    yes = 1 / (1 + np.exp(-np.delete(LOGITS_NK, 3, 0)))
    holds, factor = np.delete(LABELS_NK, 3, 0), np.array(weights or 1.0)
    expected = -(factor * holds * np.log(yes) + (1 - holds) * np.log(1 - yes)).mean()
    given = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    assert multi_label.binary_cross_entropy(logits, labels, given).item() == pytest.approx(expected, rel=1e-12)


def test_a_label_is_decided_by_the_sign_of_its_logit():
    a, b = np.array([[1.0, -2.0], [3.0, 4.0]]), np.array([[0.1, -9.0], [-1.0, 4.0]])
    assert multi_label.same(a, b).tolist() == [[True, True], [False, True]]
    assert agreement(task_of("multi_label"), a, b) == 0.75


# Numbers


def test_r2_is_that_of_scikit_learn():
    answers, numbers = RNG.normal(size=(30, 3)), RNG.normal(size=(30, 3)) * (1, 100, 0.01)
    answers = numbers + 0.3 * answers * numbers.std(0)
    assert regression.r2(answers, numbers) == pytest.approx(r2_score(numbers, answers), abs=1e-12)
    counts = RNG.integers(0, 3, 30)
    weighted = r2_score(numbers, answers, sample_weight=counts)
    assert regression.r2(answers, numbers, counts) == pytest.approx(weighted, abs=1e-12)
    mean = np.broadcast_to(numbers.mean(0), numbers.shape)
    assert regression.r2(mean, numbers) == pytest.approx(0, abs=1e-12)


def test_what_is_no_number_has_a_score_that_is_one():
    numbers = RNG.normal(size=(5, 2))
    outputs = numbers.copy()
    outputs[2] = np.nan, np.inf
    assert -np.inf < regression.r2(outputs, numbers) < -1e30
    assert -np.inf < regression.r2(outputs, np.ones((5, 2))) <= 0


@pytest.mark.parametrize("off", [0.0, 1.0])
def test_r2_of_a_number_that_never_varies(off):
    numbers = np.full((5, 1), 3.0)
    assert regression.r2(numbers + off, numbers) == r2_score(numbers, numbers + off)


def test_errors_are_told_in_the_unit_of_the_data():
    numbers = (RNG.normal(size=(50, 2)) * (40, 0.2) + (170, 0.5)).astype(np.float32)
    scale = regression.scale_of(numbers)
    labels = regression.standardized(numbers, scale)
    assert labels.mean(0) == pytest.approx([0, 0], abs=1e-5)
    assert labels.std(0) == pytest.approx([1, 1], abs=1e-5)
    assert labels * scale.std + scale.mean == pytest.approx(numbers, rel=1e-5)
    outputs = labels + np.float32(0.5) / np.float32(scale.std)  # half a unit off everywhere
    rows = regression.details(outputs, labels, ("height", "part"), scale)
    assert [row["mae"] for row in rows] == pytest.approx([0.5, 0.5], rel=1e-5)
    assert [row["rmse"] for row in rows] == pytest.approx([0.5, 0.5], rel=1e-5)
    errors = r2_score(numbers, outputs * scale.std + scale.mean, multioutput="raw_values")
    assert [row["r2"] for row in rows] == pytest.approx(errors, rel=1e-4)


def test_scale_leaves_out_what_is_not_known_and_what_never_varies():
    numbers = np.array([[1.0, 5.0], [3.0, 5.0], [np.nan, 9.0]], np.float32)
    assert regression.scale_of(numbers) == Scale(mean=(2.0, 5.0), std=(1.0, 1.0))
    assert regression.scale_of(numbers[2:]) == Scale(mean=(0.0, 0.0), std=(1.0, 1.0))


def test_squared_error_by_hand():
    outputs, labels = torch.from_numpy(LOGITS_NK), torch.from_numpy(RNG.normal(size=(40, 6)))
    labels[7, 2] = torch.nan  # the whole row is left out
    errors = np.delete((outputs - labels).numpy(), 7, 0)
    assert regression.squared_error(outputs, labels).item() == pytest.approx((errors**2).mean(), rel=1e-12)
    size = np.abs(errors)
    huber = np.where(size <= 0.5, size**2, 0.5 * (2 * size - 0.5)).mean()
    assert regression.squared_error(outputs, labels, 0.5).item() == pytest.approx(huber, rel=1e-12)
    far = regression.squared_error(outputs, labels, 1e6).item()
    assert far == pytest.approx((errors**2).mean(), rel=1e-12)


def test_huber_pulls_no_harder_than_its_width():
    outputs = torch.tensor([[0.1], [5.0], [-80.0]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(regression.squared_error(outputs, torch.zeros(3, 1), 1.0), outputs)
    assert (3 * gradient).flatten().tolist() == pytest.approx([0.2, 2.0, -2.0])


def test_answers_agree_within_a_tenth_of_their_spread():
    a = np.array([[0.0, 0.0], [2.0, 200.0]])  # standard deviations 1 and 100
    b = a + np.array([[0.09, 9.0], [0.11, -11.0]])
    assert regression.same(a, b).tolist() == [[True, True], [False, False]]
    assert regression.same(a[1:], a[1:] * 1.09).all()
    assert not regression.same(a[1:], a[1:] * 1.11).any()


# What all share


LOSSES = {
    "classification": (classification.cross_entropy, torch.full((4,), NO_LABEL)),
    "multi_label": (multi_label.binary_cross_entropy, torch.full((4, 3), torch.nan)),
    "regression": (regression.squared_error, torch.full((4, 3), torch.nan)),
}


@pytest.mark.parametrize("task", LOSSES)
def test_images_without_labels_cost_nothing_and_leave_gradients_finite(task):
    loss, labels = LOSSES[task]
    outputs = torch.randn(4, 3, requires_grad=True)
    value = loss(outputs, labels)
    value.backward()
    assert value.item() == 0
    assert not outputs.grad.any()


@pytest.mark.parametrize("task", LOSSES)
def test_losses_have_the_gradients_of_their_values(task):
    loss, _ = LOSSES[task]
    outputs = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(5) % 3 if task == "classification" else torch.rand(5, 3).round()
    assert torch.autograd.gradcheck(lambda values: loss(values, labels), (outputs,))


@pytest.mark.parametrize("task", RULES)
def test_perfect_answers_score_one(task):
    rules = task_of(task)
    labels = np.arange(12) % 4 if task == "classification" else LABELS_NK[:12]
    outputs = np.eye(4)[labels] if task == "classification" else labels * 2 - 1 if task == "multi_label" else labels
    assert rules.score(rules.kept(outputs), labels) == 1
    assert agreement(rules, outputs, outputs) == 1


def test_the_accuracy_of_classes():
    outputs = RNG.normal(size=(40, 6))
    labels = RNG.integers(0, 6, 40)
    rules = task_of("classification")
    assert rules.score(rules.kept(outputs), labels) == (outputs.argmax(1) == labels).sum() / 40
    assert rules.details(rules.kept(outputs), labels, tuple("abcdef"), None) == []


# What is drawn from answers

DISTRIBUTIONS = {
    "classification": lambda outputs: torch.distributions.Categorical(logits=outputs),
    "multi_label": lambda outputs: torch.distributions.Independent(torch.distributions.Bernoulli(logits=outputs), 1),
    "regression": lambda outputs: torch.distributions.Independent(
        torch.distributions.Normal(outputs, torch.ones_like(outputs)), 1
    ),
}


@pytest.mark.parametrize("task", DISTRIBUTIONS)
def test_surprise_is_the_log_probability_of_what_was_drawn(task):
    rules, outputs = task_of(task), torch.from_numpy(LOGITS_NK)
    labels = rules.drawn(outputs, torch.Generator().manual_seed(1))
    expected = -DISTRIBUTIONS[task](outputs).log_prob(labels)
    torch.testing.assert_close(rules.surprise(outputs, labels), expected)
    again = rules.drawn(outputs, torch.Generator().manual_seed(1))
    assert torch.equal(labels, again)
    assert not torch.equal(labels, rules.drawn(outputs, torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("task", DISTRIBUTIONS)
def test_draws_have_the_distributions_mean_and_variance(task):
    outputs = torch.from_numpy(LOGITS_NK[:1]).expand(20000, 6)
    labels = task_of(task).drawn(outputs, torch.Generator().manual_seed(1))
    if task == "classification":
        values, mean = torch.nn.functional.one_hot(labels, 6).double(), outputs[0].softmax(0)
        variance = mean * (1 - mean)
    else:
        one = DISTRIBUTIONS[task](outputs[0]).base_dist
        values, mean, variance = labels, one.mean, one.variance
    # Five standard errors of 20,000 draws, for six values.
    assert ((values.mean(0) - mean).abs() < 5 * (variance / 20000).sqrt()).all()
    torch.testing.assert_close(values.var(0), variance, rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("task", DISTRIBUTIONS)
def test_the_surprises_gradient_is_that_of_the_tasks_loss_up_to_a_factor(task, stripes):
    # The loss of one image is its surprise, over the number of labels, or for squared errors over half of it.
    stripes.task = task
    outputs = torch.from_numpy(LOGITS_NK[:1]).requires_grad_()
    labels = task_of(task).drawn(outputs.detach(), torch.Generator().manual_seed(1))
    (own,) = torch.autograd.grad(task_of(task).surprise(outputs, labels).sum(), outputs)
    (taught,) = torch.autograd.grad(outputs_loss(stripes)(outputs, labels), outputs)
    torch.testing.assert_close(own, {"classification": 1.0, "multi_label": 6.0, "regression": 3.0}[task] * taught)
