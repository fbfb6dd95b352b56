"""Channel counts that are slow here: single int8 layers, timed at their width and at the next multiples of 8 and 16.

A kernel computes a fixed number of channels at a time and pads the rest, so that a few channels more may cost nothing,
and less where they let it leave a slow path. Which widths are fast differs per machine and runtime: it is measured.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compress.latency.shapes import Placed, Shape
from compress.latency.single import layer_file
from compress.targets import Runtime, agent, open_model
from compress.targets.agent import QUIET, Model

MULTIPLES = (8, 16)
MOST_LAYERS = 8
"""Distinct layers that are measured, those with most multiply-adds first."""
SAMPLE_S = 0.12
"""For each width on each runtime."""
FREE = 1.02
"""Two measurements of the same layer differ by about this much here; more channels within it cost nothing."""

RULES = {
    "x86": "multiples of 16. On an AMD EPYC with VNNI (ONNX Runtime 1.31, one thread) a depthwise layer of 88"
    " channels took 1058 us, of 96 took 659 us",
    "ARM": "multiples of 8, or of 16 on cores with dot-product instructions (Cortex-A76). So many output channels"
    " XNNPACK's aarch64 int8 kernels compute at once: 2x8c8__asm_aarch64_neon_mlal, 4x16c4__neondot",
}
"""By family of machines: what is known of widths where nothing was measured, and where it comes from."""


@dataclass(frozen=True)
class Timed:
    """A layer at one width."""

    multiple: int
    """1: as it is."""
    channels: str
    us: float
    """Processor time of a single inference, from array to array."""


@dataclass(frozen=True)
class Width:
    """A layer of the network at its own width and at wider ones, on one runtime."""

    layer: str
    alike: int
    """Layers of the network with the same shape."""
    shape: str
    runtime: str
    times: tuple[Timed, ...]

    @property
    def best(self) -> Timed:
        """The widest of those that take no longer than the layer as it is."""
        return max((t for t in self.times if t.us <= FREE * self.times[0].us), key=lambda t: t.multiple)

    @property
    def slow(self) -> bool:
        """More channels take no longer: those of the layer are used badly."""
        return self.best is not self.times[0]


@dataclass(frozen=True)
class Widths:
    """What was found out about channel counts."""

    measured: tuple[Width, ...]
    odd_layers: int
    """Layers whose channels are no multiples of 16."""
    of_layers: int
    left_out: int
    """Distinct shapes for which the time did not suffice."""
    machine: str
    """The CPU that was measured; empty if none was."""
    rules: dict[str, str]
    """Of `RULES`, those for machines that were not measured; empty where all widths are multiples of 16."""


def candidates(layers: Sequence[Placed]) -> list[tuple[Placed, int]]:
    """One layer of each shape that is not wide by multiples of 16, with how many there are; most multiply-adds first.

    The last layer's outputs are the classes and the first one's inputs the image: neither can be changed. A grouped
    convolution is left out: its width cannot grow without its groups.
    """
    chosen: dict[Shape, list[Placed]] = {}
    for layer in layers[:-1]:
        if layer.shape.kind != "grouped" and layer.shape.at(16) != layer.shape:
            chosen.setdefault(layer.shape, []).append(layer)
    heaviest = sorted(chosen.values(), key=lambda alike: -sum(layer.macs for layer in alike))
    before: Counter[str] = Counter()
    rank: dict[str, int] = {}
    for alike in heaviest:  # depthwise layers have few multiply-adds and take long for them: the kinds take turns
        kind = alike[0].shape.kind
        rank[alike[0].name] = before[kind]
        before[kind] += 1
    return [(alike[0], len(alike)) for alike in sorted(heaviest, key=lambda alike: rank[alike[0].name])]


def measure_widths(
    layers: Sequence[Placed],
    runtimes: Sequence[Runtime],
    machine: str,
    *,
    budget_s: float = 20.0,
    advance: Callable[[str], None] = lambda text: None,
) -> Widths:
    """Times of the heaviest layers with odd widths, on this machine with one thread, within about `budget_s`."""
    chosen, found, began = candidates(layers), [], time.perf_counter()
    tried = 0
    for placed, alike in chosen[:MOST_LAYERS] if runtimes else []:
        spent = time.perf_counter() - began
        if tried and spent * (tried + 1) / tried > budget_s:
            break
        shapes = {1: placed.shape}
        for multiple in MULTIPLES:
            if placed.shape.at(multiple) not in shapes.values():
                shapes[multiple] = placed.shape.at(multiple)
        for runtime in runtimes:
            times_us = _times_us(list(shapes.values()), runtime)
            times = tuple(Timed(m, shape.channels, us) for (m, shape), us in zip(shapes.items(), times_us, strict=True))
            found.append(Width(placed.name, alike, str(placed.shape), runtime, times))
        tried += 1
        advance(f"{placed.name} ({placed.shape.channels})")
    odd = sum(layer.shape.at(16) != layer.shape for layer in layers[:-1])
    measured = machine if found else ""
    return Widths(tuple(found), odd, len(layers), len(chosen) - tried, measured, rules(measured) if odd else {})


def rules(measured: str) -> dict[str, str]:
    """What to go by on machines of another family than the one that was measured."""
    family = "x86" if "x86" in measured or "AMD64" in measured else "ARM" if measured else ""
    return {machine: rule for machine, rule in RULES.items() if machine != family}


def _times_us(shapes: Sequence[Shape], runtime: Runtime) -> list[float]:
    """Of each shape, as an int8 file of its own."""
    with tempfile.TemporaryDirectory() as folder:
        models = []
        for number, shape in enumerate(shapes):
            path = Path(folder) / f"{number}.{'onnx' if runtime == 'onnxruntime' else 'tflite'}"
            path.write_bytes(layer_file(shape, runtime))
            models.append(open_model(path, runtime, threads=1))
        return in_turns(models, sample_s=SAMPLE_S)


def in_turns(models: Sequence[Model], sample_s: float) -> list[float]:
    """Microseconds of processor time per inference of each model, measured in turns: the samples' lower quartile."""
    return [float(np.percentile(taken, QUIET)) for taken in agent.in_turns(models, sample_s=sample_s)]


def runtimes_of(formats: Sequence[str]) -> Iterator[Runtime]:
    """The runtimes that the recipe's files are for."""
    if "onnx" in formats:
        yield "onnxruntime"
    if "tflite" in formats:
        yield "litert"
