"""The solver against every possible choice, on networks small enough to try them all."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.latency import solver
from compress.latency.solver import Problem, cycle_breakers, least_time, solve


def everything(problem: Problem):
    return itertools.product(*(range(len(values)) for values in problem.values))


def brute(problem: Problem, most: float) -> float | None:
    values = [problem.value(chosen) for chosen in everything(problem) if problem.cost(chosen) <= most]
    return max(values, default=None)


@st.composite
def knapsacks(draw):
    number = draw(st.integers(0, 5))
    sizes = [draw(st.integers(1, 4)) for _ in range(number)]
    cost = st.integers(0, 20).map(float)  # whole numbers: the sums are exact in any order
    costs = [np.array(draw(st.lists(cost, min_size=n, max_size=n))) for n in sizes]
    values = [np.array(draw(st.lists(cost, min_size=n, max_size=n))) for n in sizes]
    return costs, values, float(draw(st.integers(-1, 60)))


@settings(max_examples=300, deadline=None)
@given(knapsacks())
def test_the_knapsack_is_exact(case) -> None:
    costs, values, most = case
    problem = Problem(values, costs, {})
    best = brute(problem, most)
    chosen = solve(problem, most)
    if best is None:
        assert chosen is None
    else:
        assert problem.value(chosen) == best
        assert problem.cost(chosen) <= most
        same = [problem.cost(other) for other in everything(problem) if problem.value(other) == best]
        assert problem.cost(chosen) == min(same)


def residual(rng: np.random.Generator, blocks: list[int], choices: int) -> Problem:
    """Stages with so many blocks: each block's hidden width touches the width of its stage, stages touch each other."""
    values, costs, pairs, stages = [], [], {}, []
    for number in blocks:
        stage = len(values)
        if stages:
            pairs[(stages[-1], stage)] = np.outer(np.arange(1, choices + 1), np.arange(1, choices + 1)) * rng.random()
        stages.append(stage)
        for _ in range(number + 1):
            values.append(np.sort(rng.random(choices)))
            costs.append(np.sort(rng.random(choices)))
        for hidden in range(stage + 1, stage + number + 1):
            pairs[(stage, hidden)] = np.outer(np.arange(1, choices + 1), np.arange(1, choices + 1)) * rng.random()
    return Problem(values, costs, pairs, fixed=0.5)


def plain(rng: np.random.Generator, layers: int, choices: int) -> Problem:
    widths = np.arange(1, choices + 1)
    pairs = {(layer, layer + 1): np.outer(widths, widths) * rng.random() for layer in range(layers - 1)}
    return Problem(
        [np.sort(rng.random(choices)) for _ in range(layers)],
        [np.sort(rng.random(choices)) for _ in range(layers)],
        pairs,
    )


@pytest.mark.parametrize("kind", ["residual", "plain"])
@pytest.mark.parametrize("seed", range(12))
def test_small_networks_against_every_choice(kind: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    problem = residual(rng, [2, 2], 3) if kind == "residual" else plain(rng, 6, 3)
    costs = [problem.cost(chosen) for chosen in everything(problem)]
    for share in (0.05, 0.3, 0.6, 1.0):
        most = min(costs) + share * (max(costs) - min(costs))
        chosen = solve(problem, most)
        assert problem.cost(chosen) <= most * (1 + 1e-9)
        assert problem.value(chosen) == pytest.approx(brute(problem, most), rel=1e-9)


def test_what_is_out_of_reach_is_said() -> None:
    problem = plain(np.random.default_rng(3), 5, 3)
    least = min(problem.cost(chosen) for chosen in everything(problem))
    assert solve(problem, 0.999 * least) is None
    assert problem.cost(solve(problem, 1.001 * least)) <= 1.001 * least
    assert least_time(problem) == pytest.approx(least)


def cyclic(rng: np.random.Generator, choices: int) -> Problem:
    """A ring of five sets with two chords and a tail."""
    edges = [(0, 1), (1, 2), (2, 3), (3, 4), (0, 4), (1, 3), (0, 2), (4, 5)]
    return Problem(
        [np.sort(rng.random(choices)) for _ in range(6)],
        [np.sort(rng.random(choices)) for _ in range(6)],
        {edge: np.outer(np.arange(1, choices + 1), np.arange(1, choices + 1)) * rng.random() for edge in edges},
    )


@pytest.mark.parametrize("few", [0, solver.FEW])
@pytest.mark.parametrize("seed", range(12))
def test_cycles_are_broken(seed: int, few: int, monkeypatch) -> None:
    monkeypatch.setattr(solver, "FEW", few)
    problem = cyclic(np.random.default_rng(seed), 3)
    assert len(cycle_breakers(problem)) == 2
    costs = [problem.cost(chosen) for chosen in everything(problem)]
    assert least_time(problem) == pytest.approx(min(costs))
    for share in (0.1, 0.3, 0.6, 1.0):
        most = min(costs) + share * (max(costs) - min(costs))
        chosen = solve(problem, most)
        assert problem.cost(chosen) <= most * (1 + 1e-9)
        if few:
            assert problem.value(chosen) == pytest.approx(brute(problem, most), rel=1e-9)
        for node in cycle_breakers(problem):  # what descent promises
            rivals = ([*chosen[:node], choice, *chosen[node + 1 :]] for choice in range(3))
            assert problem.value(chosen) >= max(problem.value(r) for r in rivals if problem.cost(r) <= most)


def test_long_fronts_lose_little() -> None:
    """Against the bound of the Lagrangian relaxation, which no choice exceeds."""
    problem = residual(np.random.default_rng(5), [1, 2, 3, 4, 3, 3, 1], 8)
    full = problem.cost([len(values) - 1 for values in problem.values])
    for share in (0.2, 0.4, 0.7):
        chosen = solve(problem, share * full)
        assert problem.cost(chosen) <= share * full
        bound = min(relaxed(problem, share * full, price) for price in np.geomspace(1e-3, 10, 120))
        assert problem.value(chosen) >= 0.99 * bound


def relaxed(problem: Problem, most: float, price: float) -> float:
    """max of value - price * (cost - most) over all choices: message passing on the tree, without any fronts."""
    best = {node: problem.values[node] - price * problem.costs[node] for node in range(len(problem.values))}
    pairs = dict(problem.pairs)
    while pairs:
        degrees = [node for pair in pairs for node in pair]
        pair = next(pair for pair in pairs if min(degrees.count(node) for node in pair) == 1)
        leaf, parent = sorted(pair, key=degrees.count)
        times = pairs.pop(pair) if leaf == pair[0] else pairs.pop(pair).T
        best[parent] = best[parent] + (best.pop(leaf)[:, None] - price * times).max(axis=0)
    return sum(float(scores.max()) for scores in best.values()) + price * (most - problem.fixed)


def test_a_network_of_mobilenets_size_takes_less_than_a_second() -> None:
    problem = residual(np.random.default_rng(5), [1, 2, 3, 4, 3, 3, 1], 8)
    most = 0.3 * problem.cost([len(values) - 1 for values in problem.values])
    began = time.process_time()
    chosen = solve(problem, most)
    assert time.process_time() - began < 1
    assert problem.cost(chosen) <= most
    assert solve(problem, most) == chosen
