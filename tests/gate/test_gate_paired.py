"""McNemar's test and the interval of a paired difference against scipy, by hand and by simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from compress.gate.paired import Paired, difference_interval, mcnemar, paired, wilson


@pytest.mark.parametrize(("lost", "gained"), list(itertools.product((0, 1, 2, 5, 9, 30, 200), repeat=2)))
def test_mcnemar_is_the_exact_binomial_test(lost, gained):
    expected = stats.binomtest(lost, lost + gained, 0.5).pvalue if lost + gained else 1.0
    assert mcnemar(lost, gained) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_by_hand():
    # Ten discordant images, two of them gained: 2 (C(10,0) + C(10,1) + C(10,2)) / 2^10 = 112 / 1024.
    assert mcnemar(8, 2) == pytest.approx(112 / 1024)
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(6, 0) == pytest.approx(2 / 64)


def test_mcnemar_of_thousands_of_images_neither_overflows_nor_vanishes():
    expected = stats.binomtest(2400, 5000, 0.5).pvalue
    assert mcnemar(2600, 2400) == pytest.approx(expected, rel=1e-6)
    assert 0 <= mcnemar(20_000, 0) < 1e-300 or mcnemar(20_000, 0) == 0


@given(lost=st.integers(0, 300), gained=st.integers(0, 300))
def test_mcnemar_does_not_care_which_is_which(lost, gained):
    assert mcnemar(lost, gained) == mcnemar(gained, lost)
    assert 0 < mcnemar(lost, gained) <= 1


@pytest.mark.parametrize(("right", "n"), [(0, 10), (1, 10), (7, 10), (10, 10), (345, 359)])
def test_wilson_is_scipys(right, n):
    expected = stats.binomtest(right, n).proportion_ci(method="wilson")
    assert wilson(right, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def newcombe_10(e, f, g, h):
    """Method 10 written once more from the paper's text, with scipy's Wilson limits."""
    n = e + f + g + h
    p1, p2 = (e + f) / n, (e + g) / n
    ci1 = stats.binomtest(e + f, n).proportion_ci(method="wilson")
    ci2 = stats.binomtest(e + g, n).proportion_ci(method="wilson")
    a = (e + f) * (g + h) * (e + g) * (f + h)
    b = e * h - f * g
    c = b - n / 2 if b > n / 2 else (0 if 0 <= b <= n / 2 else b)
    phi = 0 if a == 0 else c / math.sqrt(a)
    dl1, du1, dl2, du2 = p1 - ci1.low, ci1.high - p1, p2 - ci2.low, ci2.high - p2
    delta = math.sqrt(dl1**2 - 2 * phi * dl1 * du2 + du2**2)
    epsilon = math.sqrt(du1**2 - 2 * phi * du1 * dl2 + dl2**2)
    return p1 - p2 - delta, p1 - p2 + epsilon


@pytest.mark.parametrize("table", [(36, 12, 2, 0), (20, 12, 2, 16), (345, 3, 8, 3), (100, 0, 0, 0), (98, 0, 2, 0)])
def test_the_interval_is_newcombes(table):
    assert difference_interval(*table) == pytest.approx(newcombe_10(*table), abs=1e-12)


def test_the_interval_turns_over_with_the_two():
    low, high = Paired(both=300, lost=20, gained=7, neither=32).interval()
    other_low, other_high = Paired(both=300, lost=7, gained=20, neither=32).interval()
    assert (low, high) == pytest.approx((-other_high, -other_low))


@pytest.mark.parametrize(
    ("images", "shares"), [(359, (0.93, 0.03, 0.02, 0.02)), (359, (0.6, 0.15, 0.05, 0.2)), (60, (0.7, 0.1, 0.1, 0.1))]
)
def test_the_interval_covers_the_truth_as_often_as_it_says(images, shares):
    rng = np.random.default_rng(1)
    truth = shares[2] - shares[1]
    tables = rng.multinomial(images, shares, size=2000)
    hits = [low <= truth <= high for low, high in (Paired(*map(int, table)).interval() for table in tables)]
    assert 0.93 <= np.mean(hits) <= 0.985


def test_mcnemar_rejects_equal_networks_no_more_often_than_it_says():
    rng = np.random.default_rng(2)
    tables = rng.multinomial(359, (0.9, 0.04, 0.04, 0.02), size=4000)
    assert np.mean([mcnemar(int(lost), int(gained)) < 0.05 for _, lost, gained, _ in tables]) <= 0.05


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80))
def test_counts_add_up_and_the_difference_is_that_of_the_accuracies(pairs):
    baseline, candidate = np.array(pairs).T
    found = paired(baseline=baseline, candidate=candidate)
    assert found.images == len(pairs)
    assert found.baseline == pytest.approx(baseline.mean())
    assert found.difference == pytest.approx(candidate.mean() - baseline.mean())
    low, high = found.interval()
    assert -1 <= low <= found.difference + 1e-12
    assert found.difference - 1e-12 <= high <= 1


def test_other_images_are_refused():
    with pytest.raises(ValueError, match="not the same images"):
        paired(baseline=np.array([True]), candidate=np.array([True, False]))
