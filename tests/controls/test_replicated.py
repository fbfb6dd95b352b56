"""Whether one of two ways to train is better: images and seeds, against brute force and other people's formulas."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from compress.gate.paired import mcnemar
from compress.gate.replicated import Replicated, replicated, sign_flip, students_t
from compress.pipeline.verdict import judge, sentence


def by_hand(differences: list[int]) -> float:
    """All signs in turn."""
    sums = [sum(sign * one for sign, one in zip(signs, differences, strict=True))
            for signs in itertools.product((-1, 1), repeat=len(differences))]  # fmt: skip
    return sum(abs(one) >= abs(sum(differences)) for one in sums) / len(sums)


@pytest.mark.parametrize("seed", range(6))
def test_sign_flip_is_all_signs_in_turn(seed):
    differences = np.random.default_rng(seed).integers(-3, 4, size=11)
    assert sign_flip(differences) == pytest.approx(by_hand(differences.tolist()), rel=1e-9)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (0, 5), (9, 4), (80, 121), (700, 640)])
def test_with_one_seed_it_is_mcnemars(lost, gained):
    differences = np.array([-1] * lost + [1] * gained + [0] * 50)
    assert sign_flip(differences) == pytest.approx(mcnemar(lost, gained), rel=1e-7)


@pytest.mark.parametrize("count", [2, 3, 5, 20])
def test_students_t_is_scipys(count):
    rng = np.random.default_rng(count)
    first, second = rng.normal(0.9, 0.01, count), rng.normal(0.905, 0.02, count)
    wanted = stats.ttest_ind(first, second).pvalue
    assert students_t(first.tolist(), second.tolist()) == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_series_without_spread():
    assert students_t([0.5, 0.5], [0.5, 0.5]) == 1
    assert students_t([0.5, 0.5], [0.6, 0.6]) == 0
    assert students_t([0.5], [0.6]) is None


def test_a_difference_has_to_be_larger_than_both_chances():
    rng = np.random.default_rng(0)
    base = rng.random((3, 2000)) < 0.8
    assert not replicated(base, base).real
    better = base | (rng.random((3, 2000)) < 0.3)
    found = replicated(better, base)
    assert found.real
    assert found.difference == pytest.approx(better.mean() - base.mean())
    # One lucky training of three moves the mean as far, and many images: the seeds say that it was luck.
    lucky = base.copy()
    lucky[0] = True
    found = replicated(lucky, base)
    assert found.images_p < 1e-6
    assert found.seeds_p is not None
    assert found.seeds_p > 0.05
    assert not found.real


def test_seeds_are_no_more_images():
    """The same answers three times are as sure as once."""
    rng = np.random.default_rng(1)
    first, second = rng.random((1, 500)) < 0.82, rng.random((1, 500)) < 0.8
    once = replicated(first, second)
    thrice = replicated(first.repeat(3, axis=0), second.repeat(3, axis=0))
    assert thrice.images_p == pytest.approx(once.images_p, rel=1e-9)


BETTER, WORSE, SAME = (
    Replicated(difference, p, None) for difference, p in ((0.02, 0.001), (-0.02, 0.001), (0.004, 0.4))
)


@pytest.mark.parametrize(
    ("difference", "ratio", "interval", "made_equal", "verdict"),
    [
        (BETTER, 1.01, [0.97, 1.05], True, "win"),
        (WORSE, 1.01, [0.97, 1.05], True, "lose"),
        (SAME, 1.01, [0.97, 1.05], True, "tie"),
        (SAME, 1.3, [1.2, 1.4], False, "win"),
        (SAME, 1.3, [1.2, 1.4], True, "tie"),  # how fast it is was our choice
        (SAME, 0.8, [0.75, 0.85], True, "lose"),
        (SAME, 0.8, [0.5, 1.1], True, "tie"),  # a time that was not measured well decides nothing
        (BETTER, 0.8, [0.75, 0.85], True, "trade"),
        (WORSE, 1.3, [1.2, 1.4], False, "trade"),
        (BETTER, 1.3, [1.2, 1.4], False, "win"),
        (WORSE, 0.8, [0.75, 0.85], False, "lose"),
        (WORSE, None, None, False, "lose"),
    ],
)
def test_verdicts(difference, ratio, interval, made_equal, verdict):
    assert judge(difference, ratio, interval, 0.02, made_equal=made_equal) == verdict
    said = sentence(verdict, difference, ratio, seeds=1, percent=True, score="accuracy")
    assert said.startswith({"win": "wins", "lose": "loses", "tie": "a tie", "trade": "a trade"}[verdict])
    assert ("slower" in said or "faster" in said) == (ratio is not None and abs(ratio - 1) > 0.02)
