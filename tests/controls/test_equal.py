"""The search for a setting of equal time, on curves that are known."""

from __future__ import annotations

import math

import pytest

from compress.pipeline.equal import nearest, search


def counted(curve):
    calls: list[float] = []

    def ratio_of(at: float) -> tuple[float, bool] | None:
        calls.append(at)
        return curve(at), True

    return ratio_of, calls


@pytest.mark.parametrize("wanted", [0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("power", [0.4, 1.0, 1.6])
@pytest.mark.parametrize("fixed", [0.0, 0.02])
def test_it_finds_the_share_in_a_few_measurements(wanted, power, fixed):
    def time_of(share: float) -> float:
        return fixed + share**power

    ratio_of, calls = counted(lambda share: time_of(share) / time_of(wanted))
    tried = search(ratio_of, start=0.3, low=0.01, high=1, power=1.3, tolerance=0.02, most=6)
    best = nearest(tried)
    assert abs(best.ratio - 1) <= 0.02
    assert len(calls) == len(tried) <= 6
    assert len(set(calls)) == len(calls)


def test_a_start_that_is_right_is_measured_once():
    ratio_of, calls = counted(lambda share: share / 0.3)
    assert len(search(ratio_of, start=0.3, low=0.01, high=1, power=1.3, tolerance=0.02, most=6)) == len(calls) == 1


def test_times_in_steps_give_the_nearest_one():
    """As of widths in multiples of 16: no share is right, the nearest step is found."""
    ratio_of, _ = counted(lambda share: max(1, math.floor(share * 10)) / 4.4)
    best = nearest(search(ratio_of, start=0.8, low=0.01, high=1, power=1.3, tolerance=0.02, most=8))
    assert best.ratio == pytest.approx(4 / 4.4)


def test_whole_settings_and_impossible_ones():
    """Sizes of images of which only multiples of 32 make a network."""
    measured = []

    def ratio_of(at: float) -> tuple[float, bool] | None:
        assert at == int(at)
        if at % 32:
            return None
        measured.append(at)
        return (at / 130) ** 2, True

    tried = search(ratio_of, start=110, low=8, high=223, power=0.5, tolerance=0.02, most=6, whole=True)
    assert nearest(tried).at == 128
    assert len(measured) == len(set(measured)) <= 6


def test_what_cannot_be_reached_gives_the_nearest_end():
    ratio_of, calls = counted(lambda size: (size / 8) ** 2 * 3)  # always three times too slow, at least
    tried = search(ratio_of, start=20, low=8, high=31, power=0.5, tolerance=0.02, most=6, whole=True)
    assert nearest(tried).at == 8
    assert len(calls) <= 6


def test_nothing_possible_is_nothing_found():
    assert search(lambda at: None, start=20, low=8, high=31, power=0.5, tolerance=0.02, most=3, whole=True) == []
    assert nearest([]) is None


def test_the_same_widths_again_are_not_measured_again():
    """Shares that round to one network: the search goes on to others, within what it may measure."""
    known: dict[int, float] = {}

    def ratio_of(share: float) -> tuple[float, bool] | None:
        width = max(1, round(share * 8))
        fresh = width not in known
        known[width] = width / 5.4
        return known[width], fresh

    best = nearest(search(ratio_of, start=0.9, low=0.01, high=1, power=1.3, tolerance=0.02, most=6))
    assert best.ratio == pytest.approx(5 / 5.4)
    assert len(known) <= 6
