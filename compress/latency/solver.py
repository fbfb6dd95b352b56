"""How wide each set of coupled channels stays: the most importance that a bounded time can hold.

A layer's time depends on at most two sets, the one that it reads and the one that it makes. The sets are the nodes of a
graph whose edges are these layers: a chain for plain networks, a chain of stages with the hidden widths of their blocks
as leaves for residual ones. On trees the multiple-choice knapsack is solved by one dynamic programme from the leaves to
the root, whose states are a set's choice and the Pareto front of (time, importance) of what hangs on it. In other
graphs, the sets that close cycles are fixed and improved in turns until none gains (coordinate descent).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

MOST_ENTRIES = 3000
"""Of a front. A longer one keeps the best of so many equal intervals of time: each of its sums is then exact, and what
an interval's time could have bought is lost at most. Fronts of small networks stay whole, and the answer is exact."""
MOST_OF_TWO = 300
"""The same for two long fronts that are to be combined, where a tree branches into two long parts."""
FEW = 256
"""Combinations of choices of the sets that close cycles that are all tried; where there are more, descent has to do."""
ENOUGH = 1e-12
"""Sums in another order differ in the last bits: what fits by a hair, fits."""


@dataclass(frozen=True)
class Problem:
    """Times and importance of every choice."""

    values: Sequence[np.ndarray]
    """For each set, the importance that each of its choices keeps."""
    costs: Sequence[np.ndarray]
    """For each set, the time that depends on its choice alone; of the same lengths, zero or more."""
    pairs: Mapping[tuple[int, int], np.ndarray]
    """By two sets (the smaller number first) the time that depends on both: (choices of one, choices of the other)."""
    fixed: float = 0.0
    """The time that no choice changes."""

    def cost(self, chosen: Sequence[int]) -> float:
        """The whole network's time."""
        own = sum(float(costs[choice]) for costs, choice in zip(self.costs, chosen, strict=True))
        return self.fixed + own + sum(float(times[chosen[a], chosen[b]]) for (a, b), times in self.pairs.items())

    def value(self, chosen: Sequence[int]) -> float:
        """The importance that is kept."""
        return sum(float(values[choice]) for values, choice in zip(self.values, chosen, strict=True))

    def between(self, a: int, b: int) -> np.ndarray:
        """The time that depends on both: (choices of `a`, choices of `b`)."""
        return self.pairs[a, b] if a < b else self.pairs[b, a].T


def solve(problem: Problem, most: float) -> list[int] | None:
    """The choice for each set that keeps the most importance within the time `most`; None where nothing is that fast.

    Of equal importance the fastest. Exact on trees (see `MOST_ENTRIES`) and where `FEW` suffices; elsewhere no change
    of a single one of the sets that close cycles improves it. Deterministic.
    """
    fixed = cycle_breakers(problem)
    if not fixed:
        return _on_trees(problem, most)
    seen: dict[tuple[int, ...], tuple[float, float, list[int]] | None] = {}

    def at(choices: tuple[int, ...]) -> tuple[float, float, list[int]] | None:
        if choices not in seen:
            held = dict(zip(fixed, choices, strict=True))
            chosen = _on_trees(_holding(problem, held), most)
            full = None if chosen is None else [held.get(node, choice) for node, choice in enumerate(chosen)]
            seen[choices] = None if full is None else (problem.value(full), -problem.cost(full), full)
        return seen[choices]

    ranges = [range(len(problem.values[node])) for node in fixed]
    if math.prod(map(len, ranges)) <= FEW:
        tried = [found for choices in itertools.product(*ranges) if (found := at(choices))]
        return max(tried)[2] if tried else None
    best: tuple[float, float, list[int]] | None = None
    for start in _beginnings(problem, fixed):
        here, found = start, at(start)
        improved = found is not None
        while improved:
            improved = False
            for place, node in enumerate(fixed):
                for choice in range(len(problem.values[node])):
                    there = (*here[:place], choice, *here[place + 1 :])
                    other = at(there)
                    if other is not None and (found is None or other[:2] > found[:2]):
                        here, found, improved = there, other, True
        if found is not None and (best is None or found[:2] > best[:2]):
            best = found
    return best[2] if best else None


def least_time(problem: Problem) -> float:
    """The time of the fastest choice: exact on trees, elsewhere as far as changes of one set at a time find it."""
    return problem.cost(_fastest(problem))


def cycle_breakers(problem: Problem) -> list[int]:
    """Sets without which the graph has no cycle, few of them: again and again the one with most neighbours."""
    neighbours = _neighbours(problem)
    chosen: list[int] = []
    while True:
        while leaves := [node for node, near in neighbours.items() if len(near) <= 1]:
            for leaf in leaves:
                _remove(neighbours, leaf)
        if not neighbours:
            return sorted(chosen)
        node = min(neighbours, key=lambda node: (-len(neighbours[node]), len(problem.values[node]), node))
        chosen.append(node)
        _remove(neighbours, node)


@dataclass(frozen=True)
class _Front:
    """Choices of a part of the network none of which is beaten in both time and importance, by rising time."""

    costs: np.ndarray
    values: np.ndarray
    before: np.ndarray
    """int64: the entry of the front that this one was made from."""
    other: np.ndarray
    """int64: the entry of the front that was added to that one."""


@dataclass(frozen=True)
class _Message:
    """The front of a child for one choice of its parent: `front.before` are choices of the child."""

    child: int
    front: _Front


@dataclass
class _Node:
    """The fronts of a set with all that hangs on it."""

    merged: list[list[_Front]]
    """For each choice, the front after each child."""
    messages: list[list[_Message]]
    """For each choice, what each child said."""


def _on_trees(problem: Problem, most: float) -> list[int] | None:
    """`solve` where the graph has no cycle."""
    parents, order = _rooted(problem)
    children: dict[int, list[int]] = {}
    for node in order:
        children.setdefault(parents[node], []).append(node)
    nodes: dict[int, _Node] = {}
    for node in [*reversed(order), ROOT]:
        choices = range(len(problem.values[node])) if node != ROOT else range(1)
        made = _Node([], [])
        # The longest front first: what is added to it afterwards is a few entries each.
        near = sorted(children.get(node, []), key=lambda child: -max(len(f[-1].costs) for f in nodes[child].merged))
        for choice in choices:
            own = (problem.costs[node][choice], problem.values[node][choice]) if node != ROOT else (problem.fixed, 0.0)
            fronts = [_Front(np.array([own[0]]), np.array([own[1]]), np.zeros(1, np.int64), np.zeros(1, np.int64))]
            messages = []
            for child in near:
                between = problem.between(node, child)[choice] if node != ROOT else np.zeros(len(problem.values[child]))
                message = _Message(child, _said(nodes[child], between, most))
                messages.append(message)
                fronts.append(_both(fronts[-1], message.front, most))
            made.merged.append(fronts)
            made.messages.append(messages)
        nodes[node] = made
    last = nodes[ROOT].merged[0][-1]
    if not len(last.costs) or last.costs[-1] > most * (1 + ENOUGH):  # the latter where there is nothing to choose
        return None
    chosen = [0] * len(problem.values)
    _follow(nodes, ROOT, 0, len(last.costs) - 1, chosen)
    return chosen


ROOT = -1


def _follow(nodes: Mapping[int, _Node], root: int, choice: int, place: int, chosen: list[int]) -> None:
    """Writes into `chosen` what led to entry `place` of a node's last front."""
    todo = [(root, choice, place)]
    while todo:
        node, choice, place = todo.pop()
        if node != ROOT:
            chosen[node] = choice
        merged, messages = nodes[node].merged[choice], nodes[node].messages[choice]
        for front, message in zip(reversed(merged[1:]), reversed(messages), strict=True):
            said = int(front.other[place])
            todo.append((message.child, int(message.front.before[said]), int(message.front.other[said])))
            place = int(front.before[place])


def _said(child: _Node, between: np.ndarray, most: float) -> _Front:
    """The child's fronts of all its choices as one, with the time that its choice and its parent's take."""
    last = [fronts[-1] for fronts in child.merged]
    lengths = [len(front.costs) for front in last]
    return _pareto(
        np.concatenate([front.costs + time for front, time in zip(last, between, strict=True)]),
        np.concatenate([front.values for front in last]),
        np.repeat(np.arange(len(last)), lengths),
        np.concatenate([np.arange(length) for length in lengths]),
        most,
    )


def _both(one: _Front, other: _Front, most: float) -> _Front:
    """All sums of an entry of one front and an entry of the other."""
    if len(one.costs) * len(other.costs) > MOST_OF_TWO**2 and min(len(one.costs), len(other.costs)) > MOST_OF_TWO:
        places, others = _thin(one, most, MOST_OF_TWO), _thin(other, most, MOST_OF_TWO)
    else:
        places, others = np.arange(len(one.costs)), np.arange(len(other.costs))
    return _pareto(
        (one.costs[places][:, None] + other.costs[others]).ravel(),
        (one.values[places][:, None] + other.values[others]).ravel(),
        np.repeat(places, len(others)),
        np.tile(others, len(places)),
        most,
    )


def _pareto(costs: np.ndarray, values: np.ndarray, before: np.ndarray, other: np.ndarray, most: float) -> _Front:
    """Of all entries those that no other beats and that cost at most `most`."""
    fits = np.flatnonzero(costs <= most * (1 + ENOUGH))
    order = fits[np.lexsort((-values[fits], costs[fits]))]
    if len(order):
        best = np.maximum.accumulate(np.concatenate([[-np.inf], values[order]]))
        order = order[values[order] > best[:-1]]
    front = _Front(costs[order], values[order], before[order], other[order])
    if len(order) <= MOST_ENTRIES:
        return front
    kept = _thin(front, most, MOST_ENTRIES)
    return _Front(front.costs[kept], front.values[kept], front.before[kept], front.other[kept])


def _thin(front: _Front, most: float, entries: int) -> np.ndarray:
    """The best entry of each of so many intervals of time, and the fastest of all."""
    interval = np.floor(front.costs * (entries / min(most, front.costs[-1])))
    last = np.append(interval[1:] != interval[:-1], True)  # values rise with time
    last[0] = True
    return np.flatnonzero(last)


def _holding(problem: Problem, held: Mapping[int, int]) -> Problem:
    """The problem with some sets' choices made: they have one choice left, and share no layer with others."""
    costs = [each[[held[node]]] if node in held else each.copy() for node, each in enumerate(problem.costs)]
    values = [each[[held[node]]] if node in held else each for node, each in enumerate(problem.values)]
    pairs, fixed = {}, problem.fixed
    for (a, b), times in problem.pairs.items():
        if a in held and b in held:
            fixed += float(times[held[a], held[b]])
        elif a in held:
            costs[b] += times[held[a]]
        elif b in held:
            costs[a] += times[:, held[b]]
        else:
            pairs[a, b] = times
    return Problem(values, costs, pairs, fixed)


def _rooted(problem: Problem) -> tuple[dict[int, int], list[int]]:
    """Each set's parent, and the sets in an order in which parents come first.

    A tree's root is an end of its longest path, so that the stages of a residual network are a chain.
    """
    neighbours = _neighbours(problem)
    parents: dict[int, int] = {}
    order: list[int] = []
    for node in range(len(problem.values)):
        if node not in parents:
            root = _walk(neighbours, node)[-1][0]
            for here, parent in _walk(neighbours, root):
                parents[here] = parent
                order.append(here)
    return parents, order


def _walk(neighbours: Mapping[int, set[int]], start: int) -> list[tuple[int, int]]:
    """(set, the one before it) of a tree, nearest first."""
    found = [(start, ROOT)]
    for node, parent in found:
        found.extend((near, node) for near in sorted(neighbours.get(node, ())) if near != parent)
    return found


def _neighbours(problem: Problem) -> dict[int, set[int]]:
    neighbours: dict[int, set[int]] = {node: set() for node in range(len(problem.values))}
    for a, b in problem.pairs:
        neighbours[a].add(b)
        neighbours[b].add(a)
    return neighbours


def _remove(neighbours: dict[int, set[int]], node: int) -> None:
    for near in neighbours.pop(node):
        neighbours[near].discard(node)


def _beginnings(problem: Problem, fixed: Sequence[int]) -> list[tuple[int, ...]]:
    """Choices of the fixed sets to descend from: equal shares of each one's choices, and the fastest."""
    shares = np.linspace(0, 1, 5)
    even = [tuple(round(share * (len(problem.values[node]) - 1)) for node in fixed) for share in shares]
    least = _fastest(problem)
    return list(dict.fromkeys([*even, tuple(least[node] for node in fixed)]))


def _fastest(problem: Problem) -> list[int]:
    flat = Problem([np.zeros_like(values) for values in problem.values], problem.costs, problem.pairs, problem.fixed)
    fixed = cycle_breakers(problem)
    held = {node: int(np.argmin(problem.costs[node])) for node in fixed}
    while True:
        chosen = _on_trees(_holding(flat, held), np.inf) or []
        chosen = [held.get(node, choice) for node, choice in enumerate(chosen)]
        better = dict(held)
        for node in fixed:
            others = [[*chosen[:node], choice, *chosen[node + 1 :]] for choice in range(len(flat.costs[node]))]
            fastest = min(others, key=flat.cost)
            if flat.cost(fastest) < flat.cost(chosen):
                better, chosen = better | {node: fastest[node]}, fastest
        if better == held:
            return chosen
        held = better
