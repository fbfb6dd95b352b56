"""The bootstrap of two networks' scores."""

from __future__ import annotations

import numpy as np
import pytest

from compress.gate.resampled import resampled
from compress.tasks import multi_label, regression

RNG = np.random.default_rng(11)
NUMBERS_NK = RNG.normal(size=(120, 2))


def noisy(size: float, seed: int) -> np.ndarray:
    return NUMBERS_NK + size * np.random.default_rng(seed).normal(size=NUMBERS_NK.shape)


def compared(baseline: np.ndarray, candidate: np.ndarray):
    return resampled(baseline=baseline, candidate=candidate, labels=NUMBERS_NK, score=regression.r2)


def test_a_network_against_itself_differs_by_nothing_in_every_draw():
    same = compared(noisy(0.3, 1), noisy(0.3, 1))
    assert same.difference == 0
    assert same.interval() == (0, 0)
    assert same.p_value == 1


def test_scores_are_those_of_the_task():
    pair = compared(noisy(0.2, 1), noisy(0.6, 2))
    assert pair.baseline == pytest.approx(regression.r2(noisy(0.2, 1), NUMBERS_NK))
    assert pair.candidate == pytest.approx(regression.r2(noisy(0.6, 2), NUMBERS_NK))
    assert pair.images == 120


def test_a_clear_loss_is_significant_and_turned_round_a_clear_gain():
    loss, gain = compared(noisy(0.2, 1), noisy(0.6, 2)), compared(noisy(0.6, 2), noisy(0.2, 1))
    assert loss.p_value < 0.01
    assert loss.interval()[1] < 0
    assert gain.interval() == pytest.approx(tuple(-edge for edge in reversed(loss.interval())))
    assert gain.p_value == loss.p_value
    assert "< 0.002" in loss.told


def test_chance_is_not_significant():
    pair = compared(noisy(0.3, 1), noisy(0.3, 2))
    low, high = pair.interval()
    assert low < 0 < high
    assert pair.p_value > 0.05


def test_the_interval_is_about_that_of_the_mean_for_a_score_that_is_one():
    """For a mean over images the standard error is known: the spread of differences over the root of their number."""

    def mean(outputs: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> float:
        return float((counts * outputs[:, 0]).sum() / counts.sum())

    a, b = NUMBERS_NK, NUMBERS_NK + RNG.normal(0.1, 1, NUMBERS_NK.shape)
    pair = resampled(baseline=a, candidate=b, labels=NUMBERS_NK, score=mean)
    differences = (b - a)[:, 0]
    half = 1.96 * differences.std() / np.sqrt(len(differences))
    assert pair.interval() == pytest.approx((differences.mean() - half, differences.mean() + half), abs=0.15 * half)


def test_mean_average_precision():
    labels = (RNG.random((80, 3)) < 0.4).astype(np.float32)
    good, bad = labels + RNG.normal(0, 0.4, labels.shape), labels + RNG.normal(0, 3, labels.shape)
    pair = resampled(baseline=good, candidate=bad, labels=labels, score=multi_label.mean_average_precision)
    assert pair.p_value < 0.01
    assert set(pair.as_dict()) == {"images", "difference", "interval", "bootstrap_p", "draws"}


def test_other_images_are_refused():
    with pytest.raises(ValueError, match="not the same images"):
        compared(NUMBERS_NK, NUMBERS_NK[:50])
