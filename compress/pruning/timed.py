"""A network's widths as choices with times: what the solver is asked.

A layer's time depends on the sets of coupled channels that it makes and reads. A block that can be taken out is one
more choice, no units at all, of the sets that lie wholly inside it.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from compress.latency.predict import Predictor
from compress.latency.shapes import Placed, Shape
from compress.latency.solver import Problem
from compress.models.blocks import Block
from compress.models.coupled import Coupled, Side
from compress.pruning.goal import Cost

MOST = 14
"""Widths of a set among which the solver chooses."""
FORBIDDEN_US = 1e15
"""Of choices that exclude each other: a block of several sets is there or gone, not in part."""
TWO = 2
"""Sets on which one layer's time may depend, for the solver to know the structure."""


@dataclass(frozen=True)
class Choices:
    """A network's sets, their widths, and how long the network takes with each of them."""

    layers: Sequence[Placed]
    sets: Sequence[Coupled]
    widths: Sequence[Sequence[int]]
    """For each set how many units may stay, falling from all of them."""
    predictor: Predictor
    blocks: Sequence[Block] = ()
    """Those that may go."""
    _known_us: dict[Shape, float] = field(default_factory=dict)

    @cached_property
    def sides(self) -> Mapping[tuple[str, Side], Sequence[tuple[int, int]]]:
        """By layer and side, the sets there and how many of the layer's channels each of their units is."""
        found: defaultdict[tuple[str, Side], list[tuple[int, int]]] = defaultdict(list)
        for index, coupled in enumerate(self.sets):
            for place, channels_UC in coupled.places.items():
                found[place].append((index, channels_UC.shape[1]))
        return dict(found)

    def shapes(self, stay: Sequence[int], dropped: Sequence[str] = ()) -> list[Shape]:
        """The layers that are left, where so many units of each set stay."""
        gone = {layer for block in self.blocks if block.name in dropped for layer in block.layers}
        left = dict(enumerate(stay))
        return [self._narrowed(layer, left) for layer in self.layers if layer.name not in gone]

    def us(self, stay: Sequence[int], dropped: Sequence[str] = ()) -> float:
        """Predicted microseconds of the int8 file."""
        return self.predictor.fixed_us + sum(map(self._layer_us, self.shapes(stay, dropped)))

    @property
    def cost(self) -> Cost:
        """The time by how many units of each set stay, with all blocks."""
        return lambda stay: self.us(stay)

    def problem(
        self, losses: Sequence[np.ndarray], block_losses: Mapping[str, float]
    ) -> tuple[Problem, dict[str, list[int]]] | None:
        """What to solve, and by block that may go the sets whose last choice is that it is gone.

        `losses` are nats for each set at each of its widths. None where a layer's time depends on three sets or more,
        as behind a concatenation: the solver does not know such structures.
        """
        hidden = {block.name: self._hidden(block) for block in self.blocks if block.name in block_losses}
        hidden = {name: inside for name, inside in hidden.items() if inside}
        while True:
            wide = self._too_many(hidden)
            if wide is None:
                break
            if wide not in hidden:
                return None
            del hidden[wide]  # with all its layers the block is a choice too many, but it may stay
        block_of = {layer: block.name for block in self.blocks if block.name in hidden for layer in block.layers}
        owner = {index: name for name, inside in hidden.items() for index in inside}
        lengths = [len(widths) + (index in owner) for index, widths in enumerate(self.widths)]
        values = [np.concatenate([-loss, [0.0]]) if i in owner else -loss for i, loss in enumerate(losses)]
        for name, inside in hidden.items():
            values[inside[0]][-1] = -block_losses[name]
        costs = [np.zeros(length) for length in lengths]
        pairs: defaultdict[tuple[int, int], np.ndarray] = defaultdict(lambda: np.zeros((1, 1)))
        fixed = self.predictor.fixed_us

        def us(layer: Placed, chosen: Mapping[int, int]) -> float:
            inside = hidden.get(block_of.get(layer.name, ""), ())
            if any(chosen.get(index) == lengths[index] - 1 for index in inside):
                return 0.0
            left = {index: self.widths[index][choice] for index, choice in chosen.items()}
            return self._layer_us(self._narrowed(layer, left))

        for layer in self.layers:
            own = self._depends(layer)
            if layer.name in block_of and not own & set(hidden[block_of[layer.name]]):
                own = own | {hidden[block_of[layer.name]][0]}
            match sorted(own):
                case []:
                    fixed += us(layer, {})
                case [a]:
                    costs[a] += [us(layer, {a: choice}) for choice in range(lengths[a])]
                case [a, b]:
                    times = [[us(layer, {a: x, b: y}) for y in range(lengths[b])] for x in range(lengths[a])]
                    pairs[a, b] = pairs[a, b] + np.array(times)
        for inside in hidden.values():
            for first, second in itertools.pairwise(inside):
                both = np.zeros((lengths[first], lengths[second]))
                both[-1, :-1] = both[:-1, -1] = FORBIDDEN_US
                pairs[min(first, second), max(first, second)] = pairs[min(first, second), max(first, second)] + (
                    both if first < second else both.T
                )
        return Problem(values, costs, dict(pairs), fixed), hidden

    def answer(self, chosen: Sequence[int], hidden: Mapping[str, Sequence[int]]) -> tuple[list[int], list[str]]:
        """Choices of the solver as units that stay and blocks that go; what is inside those counts as whole."""
        dropped = [name for name, inside in hidden.items() if chosen[inside[0]] == len(self.widths[inside[0]])]
        stay = [
            widths[choice] if choice < len(widths) else widths[0]
            for widths, choice in zip(self.widths, chosen, strict=True)
        ]
        return stay, dropped

    def _layer_us(self, shape: Shape) -> float:
        if shape not in self._known_us:
            self._known_us[shape] = self.predictor.scale * self.predictor.layer_us(shape)
        return self._known_us[shape]

    def _hidden(self, block: Block) -> list[int]:
        """Sets that no layer outside of the block has."""
        layers = set(block.layers)
        return [index for index, coupled in enumerate(self.sets) if all(name in layers for name, _ in coupled.places)]

    def _depends(self, layer: Placed) -> set[int]:
        """The sets on which the layer's time depends."""
        return {index for side in ("outputs", "inputs") for index, _ in self.sides.get((layer.name, side), ())}

    def _narrowed(self, layer: Placed, left: Mapping[int, int]) -> Shape:
        """The layer's shape where so many units of its sets stay."""

        def gone(side: Side) -> int:
            places = self.sides.get((layer.name, side), ())
            return sum((self.sets[index].units - left[index]) * each for index, each in places)

        shape = layer.shape
        if shape.kind == "depthwise":
            outputs = shape.outputs - gone("outputs")
            return shape.with_channels(outputs, outputs)
        return shape.with_channels(shape.inputs - gone("inputs"), shape.outputs - gone("outputs"))

    def _too_many(self, hidden: Mapping[str, Sequence[int]]) -> str | None:
        """The block, or the layer of none, whose time depends on too many sets."""
        block_of = {layer: block.name for block in self.blocks if block.name in hidden for layer in block.layers}
        for layer in self.layers:
            own = self._depends(layer)
            block = block_of.get(layer.name)
            if len(own) > TWO:
                return layer.name
            if block is not None and not own & set(hidden[block]) and len(own) == TWO:
                return block
        return None


def few(widths: Sequence[int], most: int = MOST) -> list[int]:
    """Some of the widths, spread evenly: all units, the fewest, and between them multiples of as much as it takes."""
    step = max((width - after for width, after in itertools.pairwise(widths)), default=1)
    found = list(widths)
    while len(found) > max(most, 2):
        step *= 2
        found = [widths[0], *(width for width in widths[1:-1] if width % step == 0), widths[-1]]
    return found
