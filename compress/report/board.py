"""What has to be said of the machine that measured for its figures to be believed, in words and in the right order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.report import wording
from compress.report.parts import Benchmark, EmulatedParity, InstructionCount, OnTarget, Timing
from compress.report.wording import NOT_MEASURED, as_text
from compress.targets import is_emulated
from compress.targets.agent import UNAVAILABLE

MLPERF_SAMPLES, MLPERF_S = 1024, 60
"""Least samples and seconds of a latency, in MLPerf Mobile's rules."""

HIDDEN = ("is_arm", "notes", "machine", "venv", "disk_free_mb")
"""Conditions that other parts of the report say, and what only a set-up needs to know."""

Items = list[list[str]]
"""Pairs of a name and what is to be said of it."""


def board(benchmark: Benchmark) -> dict[str, Any]:
    """Machine, runtimes, files and how it was measured; its state before and after; whether MLPerf's least was met."""
    conditions = {
        name: value
        for name, value in benchmark.conditions.model_dump(mode="json").items()
        if value is not None and name not in HIDDEN
    }
    statement = conditions.pop("statement", "")
    changing = _changing(conditions)
    groups = [
        {"title": title, "items": items}
        for title, items in (
            ("The machine", _machine(conditions)),
            ("The runtimes", _runtimes(conditions, benchmark)),
            ("How it was measured", _method(conditions, benchmark)),
        )
        if items
    ]
    # Whatever else a benchmark says of itself is shown too: a condition left out may be the one that mattered.
    rest = [[condition(name), as_text(value)] for name, value in conditions.items()]
    if rest:
        groups.append({"title": "Also recorded", "items": rest})
    return {
        "title": _title(benchmark.conditions.target),
        "statement": statement,
        "groups": groups,
        "changing": changing,
        "files": _files(benchmark),
        "mlperf": _mlperf(benchmark),
        "accuracy": [_on_target(sample) for sample in benchmark.accuracy],
        "sustained": [_sustained(series.model_dump(mode="json")) for series in benchmark.sustained],
        "parity": [_emulated(entry) for entry in benchmark.parity],
        "counts": _counts(benchmark),
    }


def _title(target: str) -> str:
    if is_emulated(target):
        return "The emulated cores"
    return "The machine that measured" if target == "local" else "The board"


# ------------------------------------------------------------------------------------- what holds all the time

CONDITIONS = {
    "arch": "Architecture", "cpu": "CPU", "os": "System", "ram_gb": "RAM", "board": "Model of board",
    "libc": "C library", "numpy": "numpy", "python": "Python", "bits": "Bits of Python", "cores": "Cores",
    "agent": "SHA-256 of agent.py", "cores_used": "Affinity", "python_path": "Python at", "cpus": "Cores",
    "boards": "Found in", "llvm_mca": "llvm-mca", "qemu": "qemu",
}  # fmt: skip
"""Conditions whose name is not what a reader calls them."""

UNITS = {"gb": "GB", "mb": "MB", "mhz": "MHz", "c": "°C", "s": "s", "ms": "ms"}
"""What a condition's name may end with."""


def condition(name: str) -> str:
    """`min_mhz` as `Min`: its unit stands with the value."""
    if name in CONDITIONS:
        return CONDITIONS[name]
    words, _, unit = name.rpartition("_")
    words = words if words and unit in UNITS else name
    return f"{words[:1].upper()}{words[1:]}".replace("_", " ")


def _with_unit(name: str, value: Any) -> str:
    unit = UNITS.get(name.rpartition("_")[2], "") if "_" in name else ""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return f"{as_text(value)} {unit}" if unit and number else as_text(value)


def _take(conditions: dict[str, Any], *names: str) -> Items:
    """Those of the conditions that are there, in this order; they are gone from `conditions` afterwards."""
    return [[condition(name), _with_unit(name, conditions.pop(name))] for name in names if name in conditions]


def _machine(conditions: dict[str, Any]) -> Items:
    items = _take(conditions, "target", "board", "cpu", "arch", "emulator", "features")
    cores, allowed = conditions.pop("cores", None), conditions.pop("cores_allowed", None)
    if cores is not None:
        text = as_text(cores)
        if allowed not in (None, UNAVAILABLE, cores):
            text += f", {as_text(allowed)} of them allowed"
        fastest = conditions.pop("cores_fastest", None)
        if fastest not in (None, UNAVAILABLE, []):
            text += f"; fastest: {as_text(fastest)}"
        items.append([condition("cores"), text])
    items += _take(conditions, "cpus", "boards", "ram_gb", "os", "kernel", "libc", "governor")
    least, most = conditions.pop("min_mhz", None), conditions.pop("max_mhz", None)
    if (least, most) != (None, None):
        known = [as_text(value) for value in (least, most) if value not in (None, UNAVAILABLE)]
        items.append(["Clock, least to most", f"{' to '.join(known)} MHz" if known else UNAVAILABLE])
    return items


def _runtimes(conditions: dict[str, Any], benchmark: Benchmark) -> Items:
    versions = conditions.pop("runtimes", {})
    used = {row.runtime for row in benchmark.rows} or set(versions)
    items = [
        [wording.runtime(name), as_text(version) + ("" if name in used else ", not used")]
        for name, version in versions.items()
    ]
    return [*items, *_take(conditions, "settings", "python", "python_path", "bits", "numpy", "agent")]


def _method(conditions: dict[str, Any], benchmark: Benchmark) -> Items:
    if is_emulated(benchmark.conditions.target):
        return _take(conditions, "threads", "qemu", "llvm_mca", "cycle_models", "userland")
    rounds, tolerance = conditions.pop("rounds", None), conditions.pop("tolerance", None)
    runs, seconds = conditions.pop("runs", None), conditions.pop("min_s", None)
    items = _take(conditions, "threads", "cores_used", "batch")
    if rounds is not None:
        turns = ", in turns: parent, the others, parent again" if benchmark.pairs else ""
        items.append(["Processes", f"{as_text(rounds)} rounds of fresh ones{turns}"])
    if "warmup_s" in conditions:
        items.append(["Warm-up", f"{as_text(conditions.pop('warmup_s'))} s in each process, after the first inference"])
    least = [f"{as_text(runs)} samples"] if runs is not None else []
    least += [f"{as_text(seconds)} s"] if seconds else []
    if least:
        items.append(["Each process", f"at least {' and '.join(least)}"])
    if benchmark.pairs:
        ratios = {
            pair.runtime: f"{pair.aa_ratio:.3f}× in {wording.runtime(pair.runtime)}"
            for pair in benchmark.pairs
            if pair.aa_ratio is not None
        }
        allowed = f"; NOISY beyond {100 * tolerance:g}% from 1" if isinstance(tolerance, float) else ""
        items.append(["Parent against itself", (", ".join(ratios.values()) or NOT_MEASURED) + allowed])
    elif tolerance is not None:
        conditions["tolerance"] = tolerance
    return items


def _files(benchmark: Benchmark) -> Items:
    """SHA-256 of every file that was measured, as the machine computed it."""
    measured: list[Timing | InstructionCount] = [*benchmark.rows, *benchmark.counts]
    return [list(pair) for pair in dict.fromkeys((item.file, item.sha256) for item in measured if item.sha256)]


# ------------------------------------------------------------------------------------------------ what changes

CHANGING = {
    "temperature_c": "Temperature",
    "current_mhz": "Frequency",
    "throttle": "Throttling",
    "load_1min": "Load, 1 minute",
}


def _changing(conditions: dict[str, Any]) -> list[list[str]]:
    """Rows of name, before, during, after. Run folders of older versions have the first state among the conditions."""
    before, during, after = (conditions.pop(when, {}) for when in ("before", "during", "after"))
    reasons = conditions.pop("throttled", None)
    rows = []
    for name, label in CHANGING.items():
        first, last = conditions.pop(name, None), conditions.pop(name.replace("_", "_after_", 1), None)
        first, last = before.get(name, first), after.get(name, last)
        if (first, last) == (None, None):
            continue
        if name == "throttle":
            silent = "none seen" if during and UNAVAILABLE not in (first, last) else ""
            rows.append([label, throttling(first), "; ".join(reasons or []) or silent, throttling(last)])
        else:
            rows.append([label, _at(name, first), _over_time(name, during.get(name)), _at(name, last)])
    return rows


def _at(name: str, value: Any) -> str:
    return NOT_MEASURED if value is None else _with_unit(name, value)


def _over_time(name: str, ends: Any) -> str:
    return wording.span(ends, UNITS[name.rpartition("_")[2]]) if isinstance(ends, list) else ""


def throttling(found: Any) -> str:
    """The agent's findings on throttling in words; "none" only where something was looked at and was quiet."""
    if found is None:
        return NOT_MEASURED
    if not isinstance(found, Mapping):
        return as_text(found)
    parts = [f"{flag} now" for flag in found.get("now", [])]
    parts += [f"{flag} since boot" for flag in found.get("since_boot", []) if flag not in found.get("now", [])]
    parts += [f"{found['count']:,} events counted since boot"] if found.get("count") else []
    parts += [f"cooling state {found['cooling']}"] if found.get("cooling") else []
    return ", ".join(parts) or "none"


# ------------------------------------------------------------------------------------------------------ figures


def _mlperf(benchmark: Benchmark) -> str:
    """Whether the timings are as many and as long as MLPerf Mobile asks for; empty where nothing was timed."""
    if not benchmark.rows:
        return ""
    met = [row for row in benchmark.rows if (row.samples or 0) >= MLPERF_SAMPLES and (row.sampled_s or 0) >= MLPERF_S]
    missed = [row for row in benchmark.rows if row not in met]
    asked = f"MLPerf Mobile asks for at least {MLPERF_SAMPLES:,} samples and {MLPERF_S} s, and judges by p90"
    if not missed:
        return f"{asked}: met by every file."
    fewest = min(row.samples or 0 for row in missed)
    seconds = [row.sampled_s for row in missed if row.sampled_s is not None]
    shortest = f"{wording.duration(min(seconds))}" if len(seconds) == len(missed) else "an unrecorded time"
    least = (
        f"as few as {fewest:,} samples, as short as {shortest}"
        if len(missed) > 1
        else f"{fewest:,} samples, {shortest}"
    )
    who = "not met" if not met else f"met by {_names(met)}; not met by {_names(missed)}"
    return f"{asked}: {who} ({least})."


def _names(rows: list[Timing]) -> str:
    return ", ".join(dict.fromkeys(row.file for row in rows))


def _on_target(sample: OnTarget) -> dict[str, Any]:
    """With `versions`: of the runtime there and here, and `same_version`, without which no difference is a fault."""
    there, here = sample.board_version, sample.host_version
    return sample.model_dump(mode="json") | {
        "same_version": there == here,
        "versions": f"{there} on both" if there == here else f"{there or 'unknown'} there, {here or 'unknown'} here",
        "exact": _is_exact(sample),
    }


def _is_exact(sample: OnTarget | EmulatedParity) -> bool:
    """Whether its outputs should be equal to the last bit: integer sums do not depend on their order."""
    return sample.max_lsb is not None or sample.file.partition(".")[0] == "int8"


def _sustained(series: dict[str, Any]) -> dict[str, Any]:
    """With its length and the range of clock and temperature."""
    points = series["series"]

    def span(name: str) -> list[float] | None:
        values = [point[name] for point in points if point[name] is not None]
        return [min(values), max(values)] if values else None

    return series | {
        "minutes": max((point["t_s"] for point in points), default=0) / 60,
        "mhz": span("mhz"),
        "temperature_c": span("temperature_c"),
        "held_back": sum(bool(point["throttled"]) for point in points),
    }


def _emulated(entry: EmulatedParity) -> dict[str, Any]:
    return entry.model_dump(mode="json") | {"equal": entry.differing == 0, "exact": _is_exact(entry)}


def _counts(benchmark: Benchmark) -> list[dict[str, Any]]:
    """Instructions per inference; each file beside the parent's on the same core where both compute in one type.

    An int8 instruction works on four times as many numbers as a float one: only cycles compare the two.
    """
    counts = [count.model_dump(mode="json") for count in benchmark.counts]
    for count in counts:
        kind = count["file"].partition(".")[0]
        same = (other for other in counts if (other["runtime"], other["cpu"]) == (count["runtime"], count["cpu"]))
        parent = next((other for other in same if other["file"].partition(".")[0] == "parent"), None)
        compared = parent if parent is not count else None
        count["fewer_instructions"] = (
            compared["instructions"] / count["instructions"] if compared and kind != "int8" else None
        )
        cycles = count["cycles_estimated"], compared and compared["cycles_estimated"]
        count["fewer_cycles"] = cycles[1] / cycles[0] if cycles[0] and cycles[1] else None
        again = count["repeat_instructions"]
        count["repeat_ppm"] = 1e6 * abs(again / count["instructions"] - 1) if again else None
    return counts
