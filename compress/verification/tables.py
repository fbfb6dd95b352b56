"""A verification as rows of text, for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from compress.tasks import Rules, task_of
from compress.verification.differences import Pair
from compress.verification.facts import short
from compress.verification.layers import LayerComparison
from compress.verification.noise import Noise
from compress.verification.verify import Verification

SHOWN = 8
"""Layers per table; JSON has them all."""


@dataclass(frozen=True)
class Rows:
    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def tables(verification: Verification) -> list[Rows]:
    """Files, outputs, stored numbers, layers and SQNR, as far as there is something to say."""
    found = [_files(verification), _outputs(verification)]
    if verification.static is not None:
        found.append(_static(verification))
    found.append(_layer_comparisons(verification.layers))
    found += [_layers(comparison) for comparison in verification.layers]
    if verification.noise is not None and verification.noise.layers:
        found.append(_noise(verification.noise))
    return [table for table in found if table.rows]


def _files(verification: Verification) -> Rows:
    labelled, rules = any("accuracy" in file for file in verification.files.values()), task_of(verification.task)
    rows = [
        (
            name,
            file["kind"],
            f"{file['runtime']} {file['version']}",
            *((_score(file["accuracy"], rules),) if labelled else ()),
        )
        for name, file in verification.files.items()
    ]
    columns = ("file", "kind", "runtime", *((rules.score_name,) if labelled else ()))
    return Rows(f"Files, on {verification.inputs}", columns, rows)


def _score(value: float, rules: Rules) -> str:
    return f"{100 * value:.2f}%" if rules.percent else f"{value:.4f}"


def _outputs(verification: Verification) -> Rows:
    same = "top-1 agreement" if verification.task == "classification" else "agreement"
    columns = ("a", "b", "outputs differ", "how far", same, "SQNR", "verdict")
    rows = []
    for pair in (*verification.agreement, *verification.quantization):
        decibels = f"{pair['sqnr_db']:.1f} dB" if pair.get("sqnr_db") is not None else ""
        count = f"{pair['differing']:,} of {pair['logits']:,}" if "differing" in pair else ""
        verdict = pair.get("verdict", "not judged")
        rows.append((pair["a"], pair["b"], count, _far(pair), _percent(pair["top1_agreement"]), decibels, verdict))
    return Rows("Outputs", columns, rows)


def _far(pair: Pair) -> str:
    if "histogram" in pair:
        return (
            ", ".join(f"{size} LSB: {count:,}" for size, count in pair["histogram"].items() if size != "0") or "equal"
        )
    return f"{pair['max_relative']:.1e} of the largest" if "max_relative" in pair else ""


def _static(verification: Verification) -> Rows:
    static = verification.static
    assert static is not None
    several = len(static.witnesses) > 1
    if static.problems:
        rows = [
            (short(problem.layer), problem.what, problem.wrong or "cannot be told", problem.text)
            for problem in static.problems
        ]
        rows = rows[:SHOWN]
        more = f", {len(static.problems) - SHOWN} more in --json" if len(static.problems) > SHOWN else ""
        return Rows(f"Stored numbers that differ{more}", ("layer", "what", "wrong in", "in words"), rows)
    compared = f"{static.grids} grids and {static.layers} layers' weights, biases and scales"
    said = f"equal to the last bit: {compared}" if several else "the scales of one file do not contradict each other"
    if static.unmatched:
        said += f"; {static.unmatched} layers have no counterpart"
    return Rows("Stored numbers", ("of", "result"), [(", ".join(static.witnesses), said)])


def _layer_comparisons(comparisons: Sequence[LayerComparison]) -> Rows:
    rows = [
        (
            comparison.a,
            comparison.b,
            str(comparison.images),
            str(len(comparison.layers)),
            f"{max((layer.max_lsb for layer in comparison.layers), default=0)} LSB",
            f"{comparison.worst_alone} LSB",
            f"{comparison.tolerance_lsb} LSB",
            short(comparison.first_wrong.layer) if comparison.first_wrong else "none",
        )
        for comparison in comparisons
    ]
    columns = ("a", "b", "images", "layers", "differ by", "on equal inputs", "allowed", "first wrong layer")
    return Rows("Layer by layer", columns, rows)


def _layers(comparison: LayerComparison) -> Rows:
    columns = ("layer", "values", "differ", "at most", "differ on equal inputs", "at most on equal inputs")
    ranked = sorted(comparison.layers, key=lambda layer: (layer.alone_lsb, layer.alone_differing), reverse=True)
    shown = {layer.layer for layer in ranked[:SHOWN] if layer.differing or layer.alone_differing}
    rows = [
        (
            short(layer.layer),
            f"{layer.values:,}",
            _share(layer.differing, layer.values),
            f"{layer.max_lsb} LSB",
            _share(layer.alone_differing, layer.values),
            f"{layer.alone_lsb} LSB",
        )
        for layer in comparison.layers
        if layer.layer in shown
    ]
    title = (
        f"{comparison.b} against {comparison.a}: {len(rows)} of {len(comparison.layers)} layers, those that differ most"
    )
    return Rows(title, columns, rows)


def _noise(noise: Noise) -> Rows:
    columns = ("layer", "costs at the output", "its own error", "with what it inherits", "")
    worst = {layer.layer: rank for rank, layer in enumerate(noise.worst, 1)}
    costly = [layer for layer in noise.layers if math.isfinite(layer.output_db)]
    ranked = sorted(costly, key=lambda layer: layer.output_db)[:SHOWN]
    rows = [
        (
            short(layer.layer),
            *(
                f"{value:.1f} dB" if math.isfinite(value) else "no error"
                for value in (layer.output_db, layer.own_db, layer.sqnr_db)
            ),
            f"costs most, number {worst[layer.layer]}" if layer.layer in worst else "",
        )
        for layer in ranked
    ]
    title = (
        f"SQNR of {noise.rounded} against {noise.exact} ({noise.images} images): output {noise.output_db:.1f} dB;"
        f" {len(noise.layers)} of {noise.tensors} tensors matched, the {len(rows)} that cost most"
    )
    return Rows(title, columns, rows)


def _share(part: int, whole: int) -> str:
    return "none" if part == 0 else f"{part:,} ({100 * part / whole:.2g}%)"


def _percent(fraction: float) -> str:
    """Never rounded up to 100 %."""
    return "100%" if fraction == 1 else f"{min(100 * fraction, 99.99):.2f}%"


def headline(verification: Verification) -> Sequence[str]:
    """The last lines: notes, then the verdict."""
    lines = [f"note: {note}" for note in verification.notes]
    return [*lines, f"{verification.verdict}: {verification.reason or 'within the tolerances'}"]
