"""A diagnosis as tables and sentences for a terminal; nothing here finds anything out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from compress.doctor import risks
from compress.doctor.diagnosis import Diagnosis
from compress.doctor.kernels import Fallen, Kernels
from compress.doctor.widths import FREE, MOST_LAYERS, Width
from compress.doctor.words import counted

MOST_RISKS = 4
"""Layers shown of each kind of risk; `--json` has all."""
MOST_DAMAGED = 10
MOST_NAMES = 3

REASONS = {
    risks.PER_TENSOR: "steps per channel hold weights like these, but the layer's results share one grid",
    risks.NEAR_DEAD: "channels that compute next to nothing",
    risks.TINY_VARIANCE: "BatchNorm divides by a variance of almost nothing when it is folded",
    risks.ACTIVATION_SPREAD: "one grid serves all channels of a tensor, and the largest channel sets its steps",
    risks.ACTIVATION_OUTLIERS: "the grid reaches for a few values, and all others get the steps that are left",
    risks.BIAS: "the bias is an int32 in steps of input x weight",
}
"""Why each kind of risk matters."""

RUNTIME_NAMES = {"onnxruntime": "ONNX Runtime", "litert": "LiteRT"}


@dataclass(frozen=True)
class Section:
    """A heading, a table (the keys of a row are its columns; there may be no row) and sentences below it."""

    title: str
    rows: tuple[dict[str, str], ...] = ()
    lines: tuple[str, ...] = ()


def sections(diagnosis: Diagnosis) -> list[Section]:
    """The whole diagnosis in reading order; the verdict is the last section."""
    found = [
        _size(diagnosis),
        _kernels(diagnosis),
        _rewrite(diagnosis),
        _risks(diagnosis),
        _damage(diagnosis),
        _widths(diagnosis),
        _verdict(diagnosis),
    ]
    return [replace(section, rows=_filled(section.rows)) for section in found if section.rows or section.lines]


def _filled(rows: Sequence[dict[str, str]]) -> tuple[dict[str, str], ...]:
    """The rows without the columns that are empty in all of them."""
    filled = [key for key in rows[0] if any(row.get(key) for row in rows)] if rows else []
    return tuple({key: row.get(key, "") for key in filled} for row in rows)


def _size(diagnosis: Diagnosis) -> Section:
    rows = tuple(
        {
            "file": f"{size.kind}.{size.format}",
            "size": _bytes(size.size_bytes),
            "of which parameters": _bytes(size.stored_bytes),
            "peak activations": _bytes(size.peak_bytes) if size.peak_bytes is not None else "",
        }
        for size in diagnosis.files
    )
    head = f"{_millions(diagnosis.params)} parameters, {_millions(diagnosis.macs)} multiply-adds"
    side = diagnosis.input_size
    lines = [f"{head}, one image of {side} x {side}; training keeps these sizes"]
    if rows:
        lines.append("peak activations: the largest sum of results alive at once in the runtime's own plan (estimate)")
    return Section("Size", rows, tuple(lines))


def _bytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count >= 1e5 else f"{count:,}"


def _kernels(diagnosis: Diagnosis) -> Section:
    rows, lines = [], []
    for found in diagnosis.runtimes:
        name = RUNTIME_NAMES[found.runtime]
        rows += [_fallen_row(name, "in float", fallen) for fallen in found.in_float]
        rows += [_fallen_row(name, "not in XNNPACK", fallen) for fallen in found.not_delegated]
        lines.append(f"{name}: {_share(found)}")
    return Section("Integer kernels: what the runtimes made of the int8 files here", tuple(rows), tuple(lines))


def _fallen_row(runtime: str, how: str, fallen: Fallen) -> dict[str, str]:
    more = f" and {len(fallen.layers) - MOST_NAMES} more" if len(fallen.layers) > MOST_NAMES else ""
    return {
        "runtime": runtime,
        "operator": fallen.op,
        "how": how,
        "times": str(fallen.count),
        "MACs": _millions(fallen.macs) if fallen.macs else "",
        "moves": _bytes(fallen.moved_bytes),
        "layers": ", ".join(fallen.layers[:MOST_NAMES]) + more,
    }


def _share(found: Kernels) -> str:
    count = sum(fallen.count for fallen in found.in_float)
    text = (
        f"{count} of {found.operators} operators in float" if count else f"all {found.operators} operators in integers"
    )
    if found.conversions:
        text += f", with {counted(found.conversions, 'conversion')} to float and back between"
    if count or found.conversions:
        text += f": {found.float_macs:.1%} of the multiply-adds, {found.float_bytes:.0%} of the activation bytes moved"
    if found.runtime == "litert":
        if found.partitions == 0:
            text += "; XNNPACK took nothing: this LiteRT runs its slower built-in kernels"
        elif not found.not_delegated:
            text += "; XNNPACK took them all"
        elif found.partitions > 1:
            text += f"; XNNPACK got {found.partitions} separate stretches"
    return text


def _rewrite(diagnosis: Diagnosis) -> Section:
    rewrite = diagnosis.rewrite
    if rewrite is None:
        return Section("Offer")
    rows = tuple(
        {
            "runtime": RUNTIME_NAMES[runtime],
            "float": _ms(times.get("float")),
            "int8 as it is": _ms(times.get("int8")),
            "int8 rewritten": _ms(times.get("rewritten")),
            "gain": f"{times['int8'] / times['rewritten']:.1f}x" if {"int8", "rewritten"} <= times.keys() else "",
        }
        for runtime, times in rewrite.times_ms.items()
    )
    hard = " and ".join(f"{count} {kind}" for kind, count in rewrite.replaced.items())
    lines = [
        f"quantize.rewrite_activations: true puts ReLU6 and the sigmoid in the place of {hard}, which run in"
        " float between conversions; the network then computes something else and needs training (`epochs` above 0)"
    ]
    if rows:
        lines.append(
            f"measured on {rewrite.machine}, processor time of one thread at batch 1, untrained weights;"
            " no figure of an ARM board"
        )
    return Section("Offer: rewrite activations", rows, tuple(lines))


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3g} ms"


def _risks(diagnosis: Diagnosis) -> Section:
    rows, lines = [], []
    for kind, reason in REASONS.items():
        of_kind = [risk for risk in diagnosis.risks if risk.kind == kind]
        if not of_kind:
            continue
        rows += [
            {"risk": kind, "layer": risk.layer, "found": risk.finding, "what to do": risk.remedy}
            for risk in of_kind[:MOST_RISKS]
        ]
        more = f"; {counted(len(of_kind) - MOST_RISKS, 'layer')} more with --json" if len(of_kind) > MOST_RISKS else ""
        lines.append(f"{kind}: {reason}{more}")
    lines.append("keys belong to the recipe's `quantize` stage" if rows else "none above the thresholds")
    looked = diagnosis.damage is not None
    activations = f"activations are those of {diagnosis.images}"
    lines.append(activations if looked else "only weights were looked at: the network cannot be prepared for int8")
    return Section("Layers at risk under int8", tuple(rows), tuple(lines))


def _damage(diagnosis: Diagnosis) -> Section:
    ranking = diagnosis.damage
    if ranking is None:
        return Section("Damage")
    rows = tuple(
        {
            "layer": damage.layer,
            "output SQNR": _db(damage.sqnr_db),
            "KL": _nats(damage.kl),
            "top-1 moved": f"{damage.moved:.0%}",
            "if too much": f"keep_float: [{damage.layer}]" if damage.layer in diagnosis.keepable else "",
        }
        for damage in ranking.layers[:MOST_DAMAGED]
        if math.isfinite(damage.sqnr_db)
    )
    total = ranking.total
    what = f"{_db(total.sqnr_db)}, KL {_nats(total.kl)}, top-1 moved {total.moved:.0%}"
    lines = (f"all {len(ranking.layers)} together: {what}; calibrated and measured on {diagnosis.images}",)
    return Section("Damage after PTQ: each layer alone on its grids, all others in float, worst first", rows, lines)


def _nats(value: float) -> str:
    return f"{value:.2g}" if value > 1e-6 else "0"


def _db(value: float) -> str:
    return f"{value:.1f} dB" if math.isfinite(value) else "no error"


def _widths(diagnosis: Diagnosis) -> Section:
    widths = diagnosis.widths
    if widths is None:
        return Section("Channel counts")
    by_layer: dict[str, list[Width]] = {}
    for width in widths.measured:
        by_layer.setdefault(width.layer, []).append(width)
    rows = tuple(row for alike in by_layer.values() for row in _width_rows(alike))
    lines = []
    if not widths.odd_layers:
        lines.append("all channel counts are multiples of 16")
    else:
        lines.append(f"{widths.odd_layers} of {widths.of_layers} layers have channels that are no multiple of 16")
    if widths.machine:
        lines.append(
            f"measured on {widths.machine}, processor time of one thread: single int8 layers, from array to array"
        )
        if widths.left_out:
            lines.append(f"{counted(widths.left_out, 'shape')} not measured: the time is for {MOST_LAYERS} or fewer")
    lines += [f"rule for {machine}, not measured: {rule}" for machine, rule in widths.rules.items()]
    return Section("Channel counts: what the next multiples of 8 and 16 cost", rows, tuple(lines))


def _width_rows(runtimes: Sequence[Width]) -> list[dict[str, str]]:
    """One row per wider variant of a layer, with all runtimes beside each other."""
    first = runtimes[0]
    rows = []
    for number, wider in enumerate(first.times[1:], 1):
        row = {
            "layer": first.layer + (f" (+ {first.alike - 1} alike)" if first.alike > 1 else ""),
            "shape": first.shape,
            "channels": f"{first.times[0].channels} -> {wider.channels}",
        }
        verdicts = []
        for width in runtimes:
            own_us, wide_us = width.times[0].us, width.times[number].us
            row[RUNTIME_NAMES[width.runtime]] = f"{own_us:.1f} -> {wide_us:.1f} us ({wide_us / own_us - 1:+.0%})"
            verdicts.append("faster" if wide_us * FREE < own_us else "free" if wide_us <= FREE * own_us else "-")
        rows.append(row | {"wider is": " / ".join(verdicts) if set(verdicts) != {"-"} else ""})
    return rows


def _verdict(diagnosis: Diagnosis) -> Section:
    lines = [f"note: {note}" for note in diagnosis.notes]
    lines += [f"REFUSED {refusal.step}: {refusal}" for refusal in diagnosis.refusals]
    if diagnosis.refusals:
        lines.append(f"{diagnosis.network} cannot be quantized and exported as it is")
    else:
        lines.append(f"{diagnosis.network} can go on: it quantizes and exports" + _warnings(diagnosis))
    return Section("Verdict", (), tuple(lines))


def _warnings(diagnosis: Diagnosis) -> str:
    slow = {width.layer for width in diagnosis.widths.measured if width.slow} if diagnosis.widths else set()
    in_float = max((sum(f.count for f in found.in_float) for found in diagnosis.runtimes), default=0)
    parts: Sequence[tuple[int, str]] = (
        (len({risk.layer for risk in diagnosis.risks}), "layer at risk"),
        (in_float, "operator in float"),
        (len(slow), "layer whose width is wasteful"),
    )
    said = [counted(count, what) for count, what in parts if count]
    return f"; look at {', '.join(said)}" if said else ", and nothing stands out"
