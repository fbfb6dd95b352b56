"""Files measured without a run: what `compress bench` prints.

Imports nothing but what the image for boards has: numpy and a runtime, typer and rich.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from compress.errors import CompressError
from compress.progress import Progress
from compress.targets import Comparison, Machine, Measuring, Runtime, asking, is_emulated, open_target
from compress.targets.agent import SUFFIXES, UNAVAILABLE
from compress.targets.asking import RUNTIMES, Threads
from compress.targets.cache import cache_folder

Table = list[dict[str, str]]


@dataclass(frozen=True)
class Asked:
    """What the command line says."""

    files: Sequence[Path]
    target: str = "local"
    threads: str = "1"
    cores: str = "auto"
    rounds: int = 4
    runs: int = 50
    min_s: float = 0.0
    sustain_minutes: float = 0.0
    setup: bool = False


@dataclass(frozen=True)
class Found:
    """What was measured, as values and as one would read it."""

    values: dict[str, Any]
    tables: list[Table] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def bench(asked: Asked, progress: Progress) -> Found:
    """Times the files on the target: interleaved, or without a pause, or counted where the target is emulated.

    Raises CompressError for files, options or a target that cannot be measured.
    """
    files = asking.by_name(asked.files)
    threads = _threads(asked.threads)
    if is_emulated(asked.target):
        return _counted(asked, files, progress)
    runtimes = tuple(r for r in RUNTIMES if any(SUFFIXES[path.suffix] == r for path in files.values()))
    with open_target(asked.target, progress, setup=asked.setup, runtimes=runtimes) as machine:
        if asked.sustain_minutes:
            return _sustained(asked, machine, files, threads, progress)
        measuring = Measuring(
            runtimes=runtimes,
            threads=threads,
            cores=asked.cores,
            rounds=asked.rounds,
            runs=asked.runs,
            min_s=asked.min_s,
        )
        return _compared(machine, files, measuring, runtimes, progress)


def _threads(text: str) -> Threads:
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise CompressError("--threads", f"must be auto or a number from 1 on, not {text!r}")
    return int(text)


def _compared(
    machine: Machine, files: Mapping[str, Path], measuring: Measuring, runtimes: Sequence[Runtime], progress: Progress
) -> Found:
    names = "\0".join([machine.name, *(str(path.absolute()) for path in files.values())])
    journal = cache_folder() / "interrupted" / f"{hashlib.sha256(os.fsencode(names)).hexdigest()[:16]}.jsonl"
    with progress.steps("benchmark", len(measuring.slots(files))) as advance:
        result = asking.compare(machine, files, measuring, journal=journal, on_process=advance, on_note=progress.note)
    emulated = result.conditions["emulator"] != UNAVAILABLE
    rows = [row | {"fps": None} for row in result.rows] if emulated else result.rows
    values = {"conditions": result.conditions, "rows": rows, "pairs": result.pairs}
    table = _times(result)
    if emulated:  # an emulator's times, which nobody should take for a board's
        table = [
            {key.replace(" ms", " emulated ms"): cell for key, cell in row.items() if key != "fps"} for row in table
        ]
    return Found(values, [table], [*_reasons(result), *_machine_lines(result.conditions)])


def _times(result: Comparison) -> Table:
    pairs = {(pair["runtime"], pair["candidate"]): pair for pair in result.pairs}
    table = []
    for row in result.rows:
        pair = pairs.get((row["runtime"], row["file"]))
        low, high = pair["interval"] if pair else (0, 0)
        table.append(
            {
                "file": row["file"],
                "runtime": row["runtime"],
                "threads": str(row["threads"]),
                "first ms": f"{row['first_ms']:.2f}",
                **{f"{name} ms": f"{row[f'{name}_ms']:.3f}" for name in ("p50", "p90", "p99")},
                "fps": f"{row['fps']:.1f}",
                "peak MiB": "" if row["peak_rss_mb"] is None else f"{row['peak_rss_mb']:.0f}",
                "speed-up": f"{pair['speedup']:.2f}x ({low:.2f}-{high:.2f})" if pair else "",
                "A/A": f"{pair['aa_ratio']:.3f}" if pair else "",
                "verdict": pair["verdict"] if pair else "baseline",
            }
        )
    return table


def _reasons(result: Comparison) -> list[str]:
    noisy = [pair for pair in result.pairs if pair["verdict"] != "OK"]
    return [f"{pair['candidate']} on {pair['runtime']}: NOISY, {'; '.join(pair['reasons'])}" for pair in noisy]


def _machine_lines(found: Mapping[str, Any]) -> list[str]:
    after = found.get("temperature_after_c", "unavailable")
    state = [
        f"governor {found['governor']}",
        f"{found['min_mhz']}-{found['max_mhz']} MHz",
        f"temperature {found['temperature_c']} -> {after} C",
        f"cores {found['cores_used']}" if "cores_used" in found else "",
    ]
    runtimes = ", ".join(f"{name} {version}" for name, version in found["runtimes"].items())
    return [
        *(f"note: {note}" for note in found["notes"]),
        *([_not_a_board(found)] if found["emulator"] != UNAVAILABLE else []),
        f"measured on {found['machine']} ({found['arch']}), {found['os']}, kernel {found['kernel']}",
        f"{runtimes}; {', '.join(part for part in state if part)}",
    ]


def _not_a_board(found: Mapping[str, Any]) -> str:
    return f"timed under {found['emulator']}, which emulates {found['cpu']}: this is not ARM fps"


def _sustained(
    asked: Asked, machine: Machine, files: Mapping[str, Path], threads: Threads, progress: Progress
) -> Found:
    every_s = min(5.0, asked.sustain_minutes * 6)
    span = "minute" if asked.sustain_minutes >= 2 else "half"
    values: dict[str, Any] = {"conditions": asking.probe(machine), "sustained": {}}
    table: Table = []
    for name, path in files.items():
        with progress.steps(f"sustain {name}", max(1, round(asked.sustain_minutes * 60 / every_s))) as advance:

            def heard(point: dict[str, Any], advance: Any = advance) -> None:
                heat = point["temperature_c"]
                advance(f"{point['p50_ms']:.2f} ms" + (f" {heat} C" if heat != "unavailable" else ""))

            found = asking.sustain(
                machine,
                path,
                minutes=asked.sustain_minutes,
                every_s=every_s,
                threads=threads,
                cores=asked.cores,
                on_point=heard,
            )
        values["sustained"][name] = found
        table.append(
            {
                "file": name,
                f"first {span} p50 ms": f"{found['first_minute_p50_ms']:.3f}",
                f"last {span} p50 ms": f"{found['last_minute_p50_ms']:.3f}",
                "slow-down": f"{found['slowdown']:.3f}x",
                "MHz": _from_to(found["series"], "mhz"),
                "C": _from_to(found["series"], "temperature_c"),
                "verdict": found["verdict"],
                "why": "; ".join(found["throttled"]),
            }
        )
    found = values["conditions"]
    machine_line = f"measured on {found['board']}, {found['cpu']} ({found['arch']}), governor {found['governor']}"
    return Found(values, [table], [_not_a_board(found)] if found["emulator"] != UNAVAILABLE else [machine_line])


def _from_to(series: Sequence[Mapping[str, Any]], key: str) -> str:
    first, last = series[0][key], series[-1][key]
    return UNAVAILABLE if UNAVAILABLE in (first, last) else f"{first:.0f} to {last:.0f}"


def _counted(asked: Asked, files: Mapping[str, Path], progress: Progress) -> Found:
    from compress.targets import emulated

    if asked.sustain_minutes or asked.threads != "1":
        raise CompressError(f"target {asked.target}", "emulated time is not ARM time", "it counts one thread")
    found = emulated.examine(files, None, cpus=emulated.parse(asked.target), progress=progress)
    counts = [
        {
            "file": row["file"],
            "runtime": row["runtime"],
            "core": row["cpu"],
            "instructions / inference": f"{row['instructions']:,}",
            "cycles / inference (estimated)": _thousands(row["cycles_estimated"]),
        }
        for row in found["counts"]
    ]
    parity = [
        {
            "file": row["file"],
            "runtime": row["runtime"],
            "core": row["cpu"],
            "images": f"{row['images']} random",
            "outputs": str(row["outputs"]),
            "differing from the host": str(row["differing"]),
            "by at most": _apart(row),
        }
        for row in found["parity"]
    ]
    statement = found["conditions"]["statement"]
    return Found(found, [counts, parity], [statement])


def _apart(row: Mapping[str, Any]) -> str:
    if row["max_lsb"] is not None:
        return f"{row['max_lsb']} LSB"
    return "no number" if row["max_difference"] is None else f"{row['max_difference']:.2g}"


def _thousands(value: Any) -> str:
    return f"{value:,.0f}" if isinstance(value, int | float | np.number) else str(value)
