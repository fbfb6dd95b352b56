"""How long an int8 network takes, from a table of its layers: `fixed_us + scale * (the sum over its layers)`.

A layer whose channels are multiples of 16 lies between the measured ones, bilinear in inputs and outputs. Other widths
cost what was found out about their kind: kernels compute so many channels at once, and leave a fast path where they are
not filled (`Profile`). What the layers' files do not have, additions, pooling and the call of the runtime, and what
running one after the other changes, is in two numbers fitted to a few whole networks of the same architecture.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from compress.errors import TargetError
from compress.latency.shapes import Placed, Shape, up
from compress.latency.table import Key, Table, Whole
from compress.progress import Progress
from compress.targets import Runtime, open_target

Side = Literal["inputs", "outputs"]
UNIT = 16
"""Widths of the grid are multiples of it."""
WIDTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
"""Those that are no multiples of `UNIT` hold for themselves: what lies beside them is not interpolated from them."""
FEW = (1, 2, 4)
"""Besides, for the channels of a group."""
WIDE = 96
"""Where layers are no wider than this, 24 channels are measured too: many networks begin with them."""
NARROWEST = 10
"""A layer's grid goes down to this part of its width; below, the line is continued."""
BASES = (64, 256)
"""Widths beside which those between multiples are measured."""
OFFSETS = (0, 1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 32)
"""How far beside."""
FREE = (1.04, 1.01)
"""Widths whose time is no further above the line between multiples of 32 count as fast, beside each of the bases."""
STEPS = (4, 8, 16, 32)
BESIDE = 96
"""Channels of the other side, while one side's widths are measured."""
LEAST_SHARE = 0.2
"""Of the narrowest measured width's time: what a still narrower layer takes at least."""


@dataclass(frozen=True)
class Profile:
    """What widths between multiples of 16 cost, for one side of a family of layers (`conv 1x1`).

    A layer of n channels takes `factor` times as long as one of n + `more` channels would on the line between the
    multiples. Computing 16 channels at once is: factor 1, more = what is missing to 16. A slow path is a factor.
    """

    factor: Mapping[int, float] = field(default_factory=dict)
    """By n modulo 16."""
    more: Mapping[int, float] = field(default_factory=dict)
    step: int = UNIT
    """The fast multiple: the least of `STEPS` whose multiples cost no more than the line."""

    def at(self, channels: int) -> tuple[float, float]:
        """The width on the line and the factor. What was not measured is as the next width that was and fills no more
        of what kernels compute at once (4)."""
        rest = channels % UNIT
        if not rest or not self.factor:
            return channels, 1.0
        near = [rest] if rest % 2 == 0 else [rest, *(odd for odd in (rest - 1, rest + 1) if odd % 4)]
        later = min((other for other in self.factor if other > rest), default=UNIT)
        as_is = next((other for other in near if other in self.factor), later)
        return channels + as_is - rest + self.more.get(as_is, 0.0), self.factor.get(as_is, 1.0)


Box = tuple[tuple[int, ...], tuple[int, ...]]
"""The widths of inputs and of outputs at which a layer is measured, each with each; per group where it has groups."""


@dataclass(frozen=True)
class Grid:
    """Where layers of one signature are measured: a box for each width that such layers have in the network."""

    boxes: tuple[Box, ...]

    def cells(self, signature: Shape) -> list[Shape]:
        """The shapes of all boxes; those of a depthwise layer have as many outputs as inputs."""
        each = signature.groups if signature.kind == "grouped" else 1
        same = signature.kind == "depthwise"
        pairs = [(i, o) for inputs, outputs in self.boxes for i in inputs for o in outputs if i == o or not same]
        return [signature.with_channels(i * each, o * each) for i, o in dict.fromkeys(pairs)]

    def box(self, inputs: int, outputs: int) -> Box:
        """The box that these widths are in, or least outside of; of several the finest there."""

        def outside(box: Box) -> tuple[int, int]:
            spans = [(max(w[0] - n, 0) + max(n - w[-1], 0), w) for w, n in zip(box, (inputs, outputs), strict=True)]
            return sum(far for far, _ in spans), -len(box[0]) * len(box[1])

        return min(self.boxes, key=outside)


@dataclass(frozen=True)
class Plan:
    """Everything that is to be measured for a network."""

    grids: Mapping[Shape, Grid]
    """By signature."""
    profiles: Mapping[tuple[str, Side], Mapping[tuple[int, int], Shape]]
    """By family and side, the shape at (base, offset)."""
    own: frozenset[Shape]
    """The network's layers as they are."""

    @property
    def shapes(self) -> list[Shape]:
        """Each shape once."""
        found = dict.fromkeys(self.own)
        for signature, grid in self.grids.items():
            found |= dict.fromkeys(grid.cells(signature))
        for shapes in self.profiles.values():
            found |= dict.fromkeys(shapes.values())
        return list(found)

    @property
    def lines(self) -> list[list[Shape]]:
        """Shapes whose times are held against each other: those beside each base."""
        found: dict[tuple[str, Side, int], list[Shape]] = {}
        for (family, side), shapes in self.profiles.items():
            for (base, _), shape in shapes.items():
                found.setdefault((family, side, base), []).append(shape)
        return list(found.values())


@dataclass(frozen=True)
class Predictor:
    """Times of narrower versions of a network's layers on one device, in microseconds."""

    table: Table
    plan: Plan
    profiles: Mapping[tuple[str, Side], Profile] = field(default_factory=dict)
    fixed_us: float = 0.0
    scale: float = 1.0
    fitted: int = 0
    """Whole networks that the two numbers were fitted to; without any they are 0 and 1."""

    @property
    def estimated(self) -> bool:
        """Whether the times are estimated cycles of an emulated core, and not measured."""
        return self.table.estimated

    def layer_us(self, shape: Shape) -> float:
        """One layer; a measured width's time is the measured one. Raises TargetError for a kind that is not there."""
        known = self.table.cells.get(shape)
        return known if known is not None else self._between(shape)

    def network_us(self, shapes: Iterable[Shape]) -> float:
        """A whole network: `fixed_us + scale * sum(layer_us)`."""
        return self.fixed_us + self.scale * sum(map(self.layer_us, shapes))

    def step(self, kind: str) -> int:
        """The fast multiple of channels of `kind` (conv, depthwise, grouped, linear): 4, 8, 16 or 32."""
        own = [profile.step for (family, _), profile in self.profiles.items() if family.split()[0] == kind]
        return max(own, default=UNIT)

    def _between(self, shape: Shape) -> float:
        grid = self.plan.grids.get(shape.signature)
        if grid is None:
            grouped = [s for s in self.plan.grids if replace(s, groups=0) == replace(shape.signature, groups=0)]
            if shape.kind != "grouped" or not grouped:
                raise TargetError("latency", f"the table has no layer like {shape}", "build it for this network")
            groups = grouped[0].groups  # groups do not share work: as many of them, as much time
            alike = replace(
                shape,
                groups=groups,
                inputs=shape.inputs // shape.groups * groups,
                outputs=shape.outputs // shape.groups * groups,
            )
            return self.layer_us(alike) * shape.groups / groups
        each = shape.groups if shape.kind == "grouped" else 1
        columns, rows_at = grid.box(shape.inputs // each, shape.outputs // each)
        outputs, slow_out, right = self._place(shape, "outputs", rows_at, shape.outputs // each)
        if shape.kind == "depthwise":
            return slow_out * _on_line(right, [self._cell(shape, n, n) for n in right], outputs)
        inputs, slow_in, left = self._place(shape, "inputs", columns, shape.inputs // each)
        rows = [[self._cell(shape, a * each, b * each) for b in right] for a in left]
        return max(slow_in, slow_out) * _on_line(left, [_on_line(right, row, outputs) for row in rows], inputs)

    def _place(self, shape: Shape, side: Side, widths: Sequence[int], channels: int) -> tuple[float, float, list[int]]:
        """Where on the grid's line, how much slower, and the measured widths around it."""
        if channels in widths:
            return channels, 1.0, [channels]
        width, factor = self._profile(shape, side).at(channels)
        return width, factor, around([w for w in widths if w % unit_of(shape) == 0] or widths, width)

    def _profile(self, shape: Shape, side: Side) -> Profile:
        return self.profiles.get((shape.family, side), Profile())

    def _cell(self, shape: Shape, inputs: int, outputs: int) -> float:
        cell = shape.with_channels(inputs, outputs)
        if cell not in self.table.cells:
            raise TargetError("latency", f"the table lacks {cell}, {cell.channels}", "build it for this network")
        return self.table.cells[cell]


def around(widths: Sequence[int], width: float) -> list[int]:
    """The two of the rising widths between which it lies, or the nearest two; the only one."""
    place = min(max(bisect_left(widths, width), 1), len(widths) - 1)
    return list(widths[max(0, place - 1) : place + 1])


def _on_line(widths: Sequence[int], times_us: Sequence[float], width: float) -> float:
    """The time at a width on the line through one or two; beyond them not below a part of the least."""
    if len(widths) == 1:
        return times_us[0]
    (low, high), (below, above) = widths, times_us
    return max(below + (above - below) * (width - low) / (high - low), LEAST_SHARE * min(below, above))


# --------------------------------------------------------------------------------------------------------------- plan


def plan(layers: Sequence[Placed], *, sparse: bool = False) -> Plan:
    """What to measure so that every narrower version of the layers can be predicted; the same for the same layers.

    The first layer's inputs are the image's channels and the last one's outputs the classes: they stay. With `sparse`
    most widths are left out, and of those between multiples of 16 all but the multiples of 4 beside the first base.
    """
    boxes: dict[Shape, list[tuple[tuple[int, int], tuple[int, int]]]] = {}
    for place, layer in enumerate(layers):
        shape, each = layer.shape, layer.shape.groups if layer.shape.kind == "grouped" else 1
        inputs, outputs = shape.inputs // each, shape.outputs // each
        narrow = (
            inputs if place == 0 else max(1, inputs // NARROWEST),
            outputs if place == len(layers) - 1 else max(1, outputs // NARROWEST),
        )
        boxes.setdefault(shape.signature, []).append(((narrow[0], inputs), (narrow[1], outputs)))
    grids = {}
    for signature, own in boxes.items():
        unit = unit_of(signature)
        wide = [_widths([box[side] for box in own], unit, sparse) for side in (0, 1)]
        found = [(_within(wide[0], inputs, unit), _within(wide[1], outputs, unit)) for inputs, outputs in own]
        grids[signature] = Grid(tuple(dict.fromkeys(found)))
    return Plan(grids, _profile_shapes(layers, sparse), frozenset(layer.shape for layer in layers))


def unit_of(shape: Shape) -> int:
    """Of what the widths are multiples between which its time is interpolated; those of a group are few."""
    return 1 if shape.kind == "grouped" else UNIT


def _widths(ranges: Sequence[tuple[int, int]], unit: int, sparse: bool) -> tuple[int, ...]:
    """The grid's widths for layers of these ranges; a width that cannot change is its own."""
    fixed = {low for low, high in ranges if low == high}
    free = [(low, high) for low, high in ranges if low < high]
    if not free:
        return tuple(sorted(fixed))
    low, high = min(low for low, _ in free), up(max(high for _, high in free), unit)
    between = [width for width in (*(FEW if unit == 1 else ()), *WIDTHS) if width < high]
    if sparse:
        between = [width for width in between if width in (16, 64, 256, 1024, 4096)]
    least = max((width for width in between if width <= low and width % unit == 0), default=0)
    found = [width for width in between if width >= least and 1.15 * width < high and (width != 24 or high <= WIDE)]
    return tuple(sorted({*found, high, *fixed}))


def _within(widths: Sequence[int], span: tuple[int, int], unit: int) -> tuple[int, ...]:
    """Those that a range needs: from the last below its low end to the first above its high end."""
    low, high = span
    if low == high:
        return (low,)
    whole = [width for width in widths if width % unit == 0]
    first = max((width for width in whole if width <= low), default=0)
    last = max(next((width for width in whole if width >= high), whole[-1]), *whole[:2])
    return tuple(width for width in widths if first <= width <= last)


def _profile_shapes(layers: Sequence[Placed], sparse: bool) -> dict[tuple[str, Side], dict[tuple[int, int], Shape]]:
    """For each family the shapes that tell its fast widths: of its most frequent signature, stride 1 first."""
    families: dict[str, Counter[Shape]] = {}
    for layer in layers[:-1]:
        if layer.shape.kind != "grouped" and layer.shape.inputs > 4:
            families.setdefault(layer.shape.family, Counter())[layer.shape.signature] += 1
    found: dict[tuple[str, Side], dict[tuple[int, int], Shape]] = {}
    bases = BASES[:1] if sparse else BASES
    offsets = tuple(offset for offset in OFFSETS if offset % 4 == 0) if sparse else OFFSETS
    for family, signatures in families.items():
        signature = min(signatures, key=lambda s: (s.stride != (1, 1), -signatures[s], s.size))
        sides: tuple[Side, ...] = ("outputs",) if signature.kind == "depthwise" else ("inputs", "outputs")
        for side in sides:
            found[family, side] = {}
            for base in bases:
                for offset in offsets:
                    width = base + offset
                    pair = (width, BESIDE) if side == "inputs" else (BESIDE, width)
                    shape = signature.with_channels(*((width, width) if signature.kind == "depthwise" else pair))
                    found[family, side][base, offset] = shape
    return found


def profile_of(times_us: Mapping[tuple[int, int], float]) -> Profile:
    """The profile from times at (base, offset); the two bases tell a factor from so many channels more.

    On the line of base b, T(b + r) = factor * L_b(r + more), with L_b through the times at b and b + 32: two equations.
    With one base the factor is 1 where the channels that are missing to 16 explain the time, else all of it.
    """
    bases = sorted({base for base, _ in times_us})
    ends = {base: (times_us[base, 0], (times_us[base, 32] - times_us[base, 0]) / 32) for base in bases}
    rests = sorted({offset for _, offset in times_us if 0 < offset < UNIT})
    factor: dict[int, float] = {}
    more: dict[int, float] = {}

    def line(base: int, width: float) -> float:
        at, slope = ends[base]
        return at + slope * width

    for rest in rests:
        own = {base: times_us[base, rest] for base in bases}
        extra = float(UNIT - rest)
        if len(bases) == 2:
            (a, s), (b, t) = (ends[base] for base in bases)
            x, y = (own[base] for base in bases)
            if below := x * t - y * s:
                extra = min(max((y * a - x * b) / below - rest, 0.0), extra)
        elif not FREE[0] * line(bases[0], rest) < own[bases[0]] <= FREE[0] * line(bases[0], UNIT):
            extra = 0.0
        ratio = float(np.mean([own[base] / line(base, rest + extra) for base in bases]))
        factor[rest], more[rest] = max(ratio, 0.9), extra

    def slow(offset: int) -> bool:
        return all(times_us[base, offset] > FREE[number] * line(base, offset) for number, base in enumerate(bases))

    step = STEPS[-1]
    for candidate in STEPS[:-1]:
        beside = [offset for base, offset in times_us if base == bases[0] and offset % candidate == 0]
        if not any(slow(offset) for offset in beside):
            step = candidate
            break
    return Profile(factor, more, step)


# --------------------------------------------------------------------------------------------------------- predicting


def predictor_for(
    machine_name: str,
    runtime: Runtime,
    layers: Sequence[Placed],
    *,
    threads: int = 1,
    progress: Progress,
    cells: Iterable[Shape] | None = None,
    setup: bool = False,
    refresh: bool = False,
) -> Predictor:
    """A predictor for every narrower version of `layers`; measures what the cached table does not have of them.

    `cells` are measured besides, so that these shapes are exact. With `refresh` everything is measured anew. If the
    table holds whole networks of this architecture (`calibrated`), the predictor is fitted to them. What was measured
    before an interruption is kept. Raises TargetError for a machine that cannot measure.
    """
    from compress.latency.measure import forget, key_of, measure  # onnx is slow to import

    with open_target(machine_name, progress, setup=setup, runtimes=[runtime]) as machine:
        key = key_of(machine, runtime, threads)
        table = load_table(key, progress)
        if refresh:
            table = Table(key)
        wanted = plan(layers, sparse=key.estimated)
        missing = [shape for shape in dict.fromkeys([*wanted.shapes, *(cells or ())]) if shape not in table.cells]
        if missing:
            found = measure(machine, missing, runtime, key=key, progress=progress, together=wanted.lines)
            for reason in found.reasons:
                progress.note(f"latency table of {machine.name}: NOISY, {reason}")
            table = table.with_cells(found.cells, found.noise)
            table.save()
            forget(key)
    return predictor_of(table, layers)


def calibrated(
    machine_name: str,
    predictor: Predictor,
    networks: Sequence[tuple[Sequence[Placed], bytes]],
    *,
    progress: Progress,
    setup: bool = False,
) -> Predictor:
    """The predictor fitted to whole networks of its architecture: their layers, and their int8 files.

    They are measured on the machine unless the table has them, and kept there. Raises TargetError.
    """
    key = predictor.table.key
    known = {whole.shapes for whole in predictor.table.wholes}
    wanted = {tuple(layer.shape for layer in layers): (architecture(layers), file) for layers, file in networks}
    missing = {str(number): shapes for number, shapes in enumerate(wanted) if shapes not in known}
    if missing:
        files = {name: wanted[shapes][1] for name, shapes in missing.items()}
        times_us = times_of(machine_name, key, files, progress=progress, setup=setup, label="whole networks")
        wholes = [Whole(shapes, times_us[name], wanted[shapes][0]) for name, shapes in missing.items()]
        kept = load_table(key, progress)  # with what another process has added to it
        table = kept.with_cells(predictor.table.cells).with_wholes([*predictor.table.wholes, *wholes])
        table.save()
        predictor = replace(predictor, table=table)
    alike = {alike for alike, _ in wanted.values()}
    return calibrate(predictor, [(w.shapes, w.us) for w in predictor.table.wholes if w.architecture in alike])


def times_of(
    machine_name: str,
    key: Key,
    files: Mapping[str, bytes],
    *,
    progress: Progress,
    setup: bool = False,
    label: str = "networks",
) -> dict[str, float]:
    """Microseconds of whole int8 files on the machine, measured as the layers of its table are. Raises TargetError."""
    from compress.latency.measure import key_of, measure

    runtime: Runtime = key.runtime  # type: ignore[assignment]
    with open_target(machine_name, progress, setup=setup, runtimes=[runtime]) as machine:
        if key_of(machine, runtime, key.threads) != key:
            raise TargetError(machine_name, "is another device than the table's", "run the same command again")
        found = measure(machine, [], runtime, key=key, progress=progress, wholes=files, label=label)
    for reason in found.reasons:
        progress.note(f"{label} on {machine_name}: NOISY, {reason}")
    return found.wholes


def load_table(key: Key, progress: Progress) -> Table:
    """The cached table; an empty one, and a note, where the file is damaged, altered or of something else."""
    try:
        return Table.load(key)
    except TargetError as error:
        progress.note(f"{error.place}: {error.problem}; it is measured anew")
        return Table(key)


def predictor_of(table: Table, layers: Sequence[Placed]) -> Predictor:
    """The predictor for narrower versions of `layers` from a table that has their cells."""
    wanted = plan(layers, sparse=table.estimated)
    profiles = {
        at: profile_of({place: table.cells[shape] for place, shape in shapes.items()})
        for at, shapes in wanted.profiles.items()
    }
    predictor = Predictor(table, wanted, profiles)
    alike = architecture(layers)
    return calibrate(predictor, [(whole.shapes, whole.us) for whole in table.wholes if whole.architecture == alike])


def architecture(layers: Sequence[Placed]) -> str:
    """What networks have in common that differ in widths only: names and signatures of the layers, hashed."""
    text = json.dumps([[layer.name, str(layer.shape.signature), layer.shape.size] for layer in layers])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def calibrate(predictor: Predictor, measured: Sequence[tuple[Sequence[Shape], float]]) -> Predictor:
    """The same with `fixed_us` and `scale` fitted to whole networks: (their shapes, measured microseconds).

    Least squares of the relative errors. Fewer than three networks, or three of nearly the same time, give the scale
    alone. Without networks the predictor is returned as it is.
    """
    if not measured:
        return predictor
    sums = np.array([sum(map(predictor.layer_us, shapes)) for shapes, _ in measured])
    times = np.array([us for _, us in measured])
    if len(measured) >= 3 and sums.max() > 1.3 * sums.min():
        rows = np.stack([np.ones_like(sums), sums], 1) / times[:, None]
        fixed, scale = (float(value) for value in np.linalg.lstsq(rows, np.ones_like(times), rcond=None)[0])
        if scale > 0:
            return replace(predictor, fixed_us=fixed, scale=scale, fitted=len(measured))
    ratios = sums / times
    scale = float(ratios.sum() / (ratios**2).sum())
    return replace(predictor, fixed_us=0.0, scale=scale, fitted=len(measured))
