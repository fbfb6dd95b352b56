"""The numbers a quantized network is made of (grids, weights, biases), and whether two forms of it hold the same.

Everything is brought to one convention: activations on 256 steps numbered 0..255 (a TFLite zero point is 128 lower),
weights as (outputs, inputs / groups, height, width), scales as float32. Then equal means equal to the last bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Grid:
    """real = scale * (step - zero_point)."""

    scale: np.float32
    zero_point: int
    """As for steps numbered from 0, whatever the file's own type."""
    steps: int = 256

    @property
    def low(self) -> float:
        return float(self.scale) * -self.zero_point

    @property
    def high(self) -> float:
        return float(self.scale) * (self.steps - 1 - self.zero_point)

    def real(self, steps: np.ndarray) -> np.ndarray:
        """The numbers that steps, counted from zero, stand for."""
        return steps.astype(np.float32) * self.scale

    def nearest(self, real: np.ndarray) -> np.ndarray:
        """Steps from zero (int32), halves to even, clipped to the grid."""
        steps = np.rint(real.astype(np.float32) / self.scale)
        return np.clip(steps, -self.zero_point, self.steps - 1 - self.zero_point).astype(np.int32)


@dataclass(frozen=True)
class Parameters:
    """What is stored for one convolution or linear layer."""

    layer: str
    source: str
    """The tensor that the layer reads."""
    weight: np.ndarray
    """Outputs first; axes of one element at the end are gone."""
    weight_scale: np.ndarray
    """One per output, or one."""
    bias: np.ndarray | None = None
    bias_scale: np.ndarray | None = None


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong in the numbers, in one line; `layer` is where."""

    layer: str
    what: str
    """scale, zero point, weights, weight scale, bias, bias scale, layer."""
    text: str
    wrong: str = ""
    """Who is wrong, where that can be told."""
    values: Mapping[str, str] = field(default_factory=dict)
    """What each says."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "layer": self.layer,
            "what": self.what,
            "wrong": self.wrong,
            "values": dict(self.values),
            "text": self.text,
        }


@dataclass(frozen=True)
class Facts:
    """All numbers of one form of a network."""

    name: str
    grids: Mapping[str, Grid]
    """By the quantized tensor's name, in the order of execution."""
    parameters: Mapping[str, Parameters]
    """By the name of the layer, in the order of execution."""
    problems: Sequence[Problem] = ()
    """What contradicts itself in this form alone."""


@dataclass(frozen=True)
class Comparison:
    """What several forms of one network say of themselves, side by side."""

    witnesses: tuple[str, ...]
    grids: int
    """Tensors whose grid at least two of them have."""
    layers: int
    """Layers whose weights at least two of them have."""
    unmatched: int
    """Layers with weights that only one of them has, or that have another shape there."""
    problems: list[Problem]

    def as_dict(self) -> dict[str, Any]:
        return {
            "witnesses": list(self.witnesses),
            "grids": self.grids,
            "layers": self.layers,
            "unmatched": self.unmatched,
            "differing": len({problem.layer for problem in self.problems}),
            "differences": [problem.as_dict() for problem in self.problems],
        }


def compare_facts(facts: Sequence[Facts]) -> Comparison:
    """Every grid, weight and bias that two or more have, compared exactly; and what contradicts itself in one alone.

    Where names do not match, layers are matched by their order, if their weights have the same shapes.
    """
    facts = _aligned(facts)
    problems: list[Problem] = []
    order: dict[str, int] = {}
    grids = layers = unmatched = 0
    for one in facts:
        for name in (*one.grids, *one.parameters):
            order.setdefault(name, len(order))
    for name in order:
        found_grids = {one.name: one.grids[name] for one in facts if name in one.grids}
        if len(found_grids) > 1:
            grids += 1
            scales = {who: grid.scale for who, grid in found_grids.items()}
            problems += _differing(name, "scale", scales, facts)
            zero_points = {who: grid.zero_point for who, grid in found_grids.items()}
            problems += _differing(name, "zero point", zero_points, facts)
        found = {one.name: one.parameters[name] for one in facts if name in one.parameters}
        if len(found) > 1:
            shapes = {who: parameters.weight.shape for who, parameters in found.items()}
            if len(set(shapes.values())) > 1:
                unmatched += 1
                continue
            layers += 1
            problems += _compare_parameters(name, found, facts)
        elif found and len(facts) > 1:
            unmatched += 1
    alone = [problem for one in facts for problem in one.problems]
    said = {(problem.layer, problem.what) for problem in problems}
    problems += [problem for problem in alone if (problem.layer, problem.what) not in said]
    problems.sort(key=lambda problem: order.get(problem.layer, len(order)))
    return Comparison(tuple(one.name for one in facts), grids, layers, unmatched, problems)


def merged(comparisons: Sequence[Comparison]) -> Comparison:
    """Those of several kinds of files as one."""
    return Comparison(
        witnesses=tuple(name for one in comparisons for name in one.witnesses),
        grids=sum(one.grids for one in comparisons),
        layers=sum(one.layers for one in comparisons),
        unmatched=sum(one.unmatched for one in comparisons),
        problems=[problem for one in comparisons for problem in one.problems],
    )


def _compare_parameters(name: str, found: Mapping[str, Parameters], facts: Sequence[Facts]) -> list[Problem]:
    problems = []
    widest = max(len(parameters.weight_scale) for parameters in found.values())
    rows = {
        "weights": {who: p.weight for who, p in found.items()},
        "weight scale": {who: np.broadcast_to(p.weight_scale, (widest,)) for who, p in found.items()},
    }
    biases = {who: p.bias for who, p in found.items() if p.bias is not None}
    for who, parameters in found.items():  # a file may leave out a bias of zeros
        if parameters.bias is None and biases:
            biases[who] = np.zeros_like(next(iter(biases.values())))
    if len(biases) > 1:
        rows["bias"] = biases
    scales = {who: p.bias_scale for who, p in found.items() if p.bias_scale is not None}
    if len(scales) > 1:
        widest = max(map(len, scales.values()))
        rows["bias scale"] = {who: np.broadcast_to(scale, (widest,)) for who, scale in scales.items()}
    for what, arrays in rows.items():
        problems += _differing_arrays(name, what, arrays, facts)
    return problems


def _differing(name: str, what: str, values: Mapping[str, Any], facts: Sequence[Facts]) -> list[Problem]:
    if len({float(value) for value in values.values()}) == 1:
        return []
    shown = {who: _number(value) for who, value in values.items()}
    return [_problem(name, what, "", shown, values, facts)]


def _differing_arrays(name: str, what: str, arrays: Mapping[str, np.ndarray], facts: Sequence[Facts]) -> list[Problem]:
    """At most one problem: it shows the first element that differs and counts the others."""
    first = next(iter(arrays.values()))
    if len({array.shape for array in arrays.values()}) > 1:
        shown = {who: "x".join(map(str, array.shape)) for who, array in arrays.items()}
        return [_problem(name, what, " shape", shown, shown, facts)]
    differs = np.zeros(first.shape, bool)
    for array in arrays.values():
        differs |= array != first
    if not differs.any():
        return []
    index = tuple(int(axis[0]) for axis in np.nonzero(differs))
    count = int(differs.sum())
    place = f" {'channel' if first.ndim == 1 else 'at'} {', '.join(map(str, index))}"
    if count > 1:
        place += f" (and {count - 1} more)"
    shown = {who: _number(array[index]) for who, array in arrays.items()}
    return [_problem(name, what, place, shown, {who: array.tobytes() for who, array in arrays.items()}, facts)]


def _problem(
    name: str, what: str, place: str, shown: Mapping[str, str], values: Mapping[str, Any], facts: Sequence[Facts]
) -> Problem:
    wrong = _odd_one(values) or _contradicts_itself(name, what, values, facts)
    said = ", ".join(f"{value} in {who}" for who, value in sorted(shown.items(), key=lambda item: item[0] != wrong))
    text = f"{what} of layer {short(name)}{place} is {said}"
    return Problem(name, what, f"{wrong}: {text}" if wrong else text, wrong, dict(shown))


def _odd_one(values: Mapping[str, Any]) -> str:
    """The one witness that all others contradict, if there are three or more; else an empty string."""
    counts = Counter(values.values())
    if len(values) < 3 or len(counts) != 2:
        return ""
    rare = min(counts, key=lambda value: counts[value])
    return next(who for who, value in values.items() if value == rare) if counts[rare] == 1 else ""


def _contradicts_itself(name: str, what: str, values: Mapping[str, Any], facts: Sequence[Facts]) -> str:
    """Of two witnesses, the one whose other numbers contradict this one."""
    doubtful = [
        one.name
        for one in facts
        if one.name in values and any(problem.layer == name and problem.what == what for problem in one.problems)
    ]
    return doubtful[0] if len(doubtful) == 1 else ""


def bias_problems(name: str, grids: Mapping[str, Grid], parameters: Mapping[str, Parameters]) -> list[Problem]:
    """Scales of one form that contradict each other: a bias lies on the grid input scale x weight scale.

    One channel that is off points at its weight scale; all channels off by one factor, at the scale of the input.
    """
    problems: dict[tuple[str, str], Problem] = {}
    for layer, own in parameters.items():
        if own.bias_scale is None or own.source not in grids:
            continue
        scale = grids[own.source].scale
        implied = own.bias_scale.astype(np.float64) / own.weight_scale.astype(np.float64)
        off = np.abs(implied / float(scale) - 1) > 1e-5  # products are rounded to float32 once or twice
        if not off.any():
            continue
        usual = float(np.median(implied))
        if len(implied) > 1 and abs(usual / float(scale) - 1) <= 1e-5:
            channel = int(np.flatnonzero(off)[0])
            expected = float(own.bias_scale[channel]) / float(scale)
            text = (
                f"weight scale of layer {short(layer)} channel {channel} is {_number(own.weight_scale[channel])},"
                f" its bias was made for {_number(np.float32(expected))}"
            )
            problems[layer, "weight scale"] = Problem(layer, "weight scale", f"{name}: {text}", name)
            continue
        same = bool((np.abs(implied / usual - 1) <= 1e-5).all()) and len(implied) > 1
        where, what = (own.source, "scale") if same else (layer, "bias scale")
        if same:
            text = f"scale of layer {short(where)} is {_number(scale)}, {short(layer)} was made for {usual:.7g}"
        else:
            text = (
                f"bias scale of layer {short(layer)} is {_number(own.bias_scale[0])},"
                f" input scale x weight scale is {float(scale) * float(own.weight_scale[0]):.7g}"
            )
        problems.setdefault((where, what), Problem(where, what, f"{name}: {text}", name))
    return list(problems.values())


def _aligned(facts: Sequence[Facts]) -> list[Facts]:
    """The same facts with the layers of foreign files renamed to those of the first, where order and shapes allow."""
    if len(facts) < 2:
        return list(facts)
    first, *others = facts
    aligned = [first]
    for other in others:
        common = set(first.parameters) & set(other.parameters)
        ours, theirs = list(first.parameters.values()), list(other.parameters.values())
        if common or [p.weight.shape for p in ours] != [p.weight.shape for p in theirs]:
            aligned.append(other)
            continue
        names = {b.layer: a.layer for a, b in zip(ours, theirs, strict=True)}
        grids = {names.get(name, name): grid for name, grid in other.grids.items()}
        parameters = {names[p.layer]: p for p in theirs}
        aligned.append(Facts(other.name, grids, parameters, other.problems))
    return aligned


def short(name: str) -> str:
    """The last part of the names that TensorFlow's converter strings together with `;`."""
    return name.rpartition(";")[2] or name


def _number(value: Any) -> str:
    """As many digits as tell two float32 apart."""
    return str(int(value)) if isinstance(value, (int, np.integer)) else f"{float(value):.9g}"


def trimmed(weight: np.ndarray) -> np.ndarray:
    """Without trailing axes of one element, so that a 1x1 convolution equals a linear layer."""
    shape = list(weight.shape)
    while len(shape) > 2 and shape[-1] == 1:
        shape.pop()
    return np.ascontiguousarray(weight.reshape(shape))
