"""Files against their baseline on one machine: fresh processes in turns, an A/A control, an interval.

A ratio of two timings is worth something only where equal files take equal times. So the baseline is measured
twice in every round, and the two series' ratio says how far the machine can be trusted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress.errors import TargetError
from compress.targets import Runtime, Target
from compress.targets.agent import SUFFIXES, UNAVAILABLE

RUNTIMES: tuple[Runtime, ...] = ("onnxruntime", "litert")

Rounds = list[list[float]]
"""Samples in ms, one list per round, which is one process."""


@dataclass(frozen=True)
class Slot:
    """One process of a comparison."""

    round: int
    runtime: str
    file: str
    control: bool = False
    """The baseline's second measurement of the round."""


@dataclass(frozen=True)
class Comparison:
    conditions: dict[str, Any]
    """The machine and how it was asked."""
    rows: list[dict[str, Any]]
    """Per file and runtime, over all rounds: times in ms, fps = 1000 / p50, memory in MiB."""
    pairs: list[dict[str, Any]]
    """Per candidate: speed-up over the baseline, its interval, the A/A ratio, OK or NOISY and why."""
    samples: list[dict[str, Any]]
    """The agent's whole answer for every process, in the order they ran."""


def by_name(paths: Iterable[Path]) -> dict[str, Path]:
    """The files under their names, or under their paths where two have the same name.

    Raises TargetError for a file that is missing, given twice, or of no kind that a runtime reads.
    """
    paths = list(paths)
    names = [path.name for path in paths]
    for path in paths:
        if not path.is_file():
            raise TargetError(path, "no such file")
        if path.suffix not in SUFFIXES:
            raise TargetError(path, f"no runtime reads this kind of file; known are {', '.join(SUFFIXES)}")
        if paths.count(path) > 1:
            raise TargetError(path, "given twice")
    return {path.name if names.count(path.name) == 1 else str(path): path for path in paths}


def schedule(files: Mapping[str, Path], *, runtimes: Sequence[str] = RUNTIMES, rounds: int = 4) -> list[Slot]:
    """The processes in the order they run: A B C A' per runtime and round, A being the runtime's first file.

    A runtime with one file gets no control, one without files nothing.
    """
    slots = []
    for number in range(rounds):
        for runtime in dict.fromkeys(runtimes):
            names = _of_runtime(files, runtime)
            slots += [Slot(number, runtime, name) for name in names]
            slots += [Slot(number, runtime, names[0], control=True)] if len(names) > 1 else []
    return slots


def compare(
    files: Mapping[str, Path],
    *,
    target: Target,
    runtimes: Sequence[str] = RUNTIMES,
    threads: int = 1,
    rounds: int = 4,
    runs: int = 50,
    warmup_s: float = 0.2,
    min_s: float = 0.0,
    tolerance: float = 0.05,
    seed: int = 0,
    on_process: Callable[[str], None] | None = None,
) -> Comparison:
    """Every file on the runtimes that read its kind; the first file of each runtime is the others' baseline.

    `runs` and `min_s` are the least samples and seconds of each process. A pair is NOISY when its A/A ratio
    is off 1 by more than `tolerance`, or the machine throttled. `on_process` hears a short text after each of
    the processes that `schedule` lists. Raises TargetError when the machine cannot measure, or no file fits.
    """
    slots = schedule(files, runtimes=runtimes, rounds=rounds)
    if not slots:
        raise TargetError("benchmark", f"no file for {', '.join(runtimes)}", "export the network first")
    machine = target.probe()
    answers = []
    for slot in slots:
        answer = target.time(
            files[slot.file],
            runtime=slot.runtime,
            threads=threads,
            runs=runs,
            warmup_s=warmup_s,
            min_s=min_s,
        )
        answers.append(answer)
        if on_process:
            on_process(f"{slot.file} {slot.runtime} {np.median(answer['samples_ms']):.2f} ms")

    rows, pairs = [], []
    for runtime in dict.fromkeys(slot.runtime for slot in slots):
        names = _of_runtime(files, runtime)
        found = {name: _answers(slots, answers, runtime, name) for name in names}
        rows += [_row(name, found[name], threads) for name in names]
        control = _answers(slots, answers, runtime, names[0], control=True)
        own = [answer for slot, answer in zip(slots, answers, strict=True) if slot.runtime == runtime]
        throttled = _distinct(reason for answer in own for reason in answer["throttled"])
        pairs += [
            {
                "runtime": runtime,
                "baseline": names[0],
                "candidate": name,
                "threads": threads,
                **judge(
                    _samples(found[names[0]]),
                    _samples(found[name]),
                    control=_samples(control),
                    throttled=throttled,
                    tolerance=tolerance,
                    seed=seed,
                ),
            }
            for name in names[1:]
        ]
    asked = {
        "threads": threads,
        "rounds": rounds,
        "runs": runs,
        "warmup_s": warmup_s,
        "min_s": min_s,
        "batch": 1,
        "tolerance": tolerance,
    }
    samples = [{**vars(slot), **answer, "file": slot.file} for slot, answer in zip(slots, answers, strict=True)]
    return Comparison(_conditions(target.name, machine, answers) | asked, rows, pairs, samples)


def judge(
    baseline: Rounds,
    candidate: Rounds,
    *,
    control: Rounds,
    throttled: Sequence[str] = (),
    tolerance: float = 0.05,
    seed: int = 0,
) -> dict[str, Any]:
    """Speed-up of `candidate` over `baseline` with its interval, and whether to believe it."""
    aa_ratio = _median(baseline) / _median(control)
    reasons = list(throttled)
    if max(aa_ratio, 1 / aa_ratio) > 1 + tolerance:
        reasons.insert(0, f"the baseline against itself gave {aa_ratio:.3f}")
    return {
        "speedup": _median(baseline) / _median(candidate),
        "interval": list(ratio_interval(baseline, candidate, seed=seed)),
        "aa_ratio": aa_ratio,
        "verdict": "NOISY" if reasons else "OK",
        "reasons": reasons,
    }


def ratio_interval(
    baseline: Rounds, candidate: Rounds, *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of median(baseline) / median(candidate).

    Samples of one process are not independent. So rounds are drawn first, the same for both files because
    they ran side by side, then samples within each (Davison & Hinkley, Bootstrap Methods, 1997, section 3.8).
    """
    rng = np.random.default_rng(seed)
    series = [[np.asarray(samples) for samples in rounds] for rounds in (baseline, candidate)]
    ratios = np.empty(resamples)
    for i in range(resamples):
        drawn = rng.integers(len(baseline), size=len(baseline))
        base, cand = (
            np.median(np.concatenate([rng.choice(rounds[r], size=rounds[r].size) for r in drawn])) for rounds in series
        )
        ratios[i] = base / cand
    low, high = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _of_runtime(files: Mapping[str, Path], runtime: str) -> list[str]:
    return [name for name, path in files.items() if SUFFIXES.get(path.suffix) == runtime]


def _answers(
    slots: Sequence[Slot],
    answers: Sequence[dict[str, Any]],
    runtime: str,
    file: str,
    *,
    control: bool = False,
) -> list[dict[str, Any]]:
    """Of one series, by round."""
    wanted = (runtime, file, control)
    pairs = zip(slots, answers, strict=True)
    return [answer for slot, answer in pairs if (slot.runtime, slot.file, slot.control) == wanted]


def _row(name: str, answers: Sequence[dict[str, Any]], threads: int) -> dict[str, Any]:
    samples_ms = np.concatenate(_samples(answers))
    p50_ms, p90_ms, p99_ms = (float(value) for value in np.percentile(samples_ms, [50, 90, 99]))
    return {
        "file": name,
        "kind": Path(name).stem,
        "runtime": answers[0]["runtime"],
        "threads": threads,
        "p50_ms": p50_ms,
        "p90_ms": p90_ms,
        "p99_ms": p99_ms,
        "min_ms": float(samples_ms.min()),
        "max_ms": float(samples_ms.max()),
        "spread": (p90_ms - p50_ms) / p50_ms,
        "rounds_p50_ms": [float(np.median(round_ms)) for round_ms in _samples(answers)],
        "fps": 1000 / p50_ms,
        "startup_ms": float(np.median([answer["startup_ms"] for answer in answers])),
        "first_ms": float(np.median([answer["first_ms"] for answer in answers])),
        "peak_rss_mb": _highest(answer["peak_rss_mb"] for answer in answers),
        "idle_rss_mb": _highest(answer["idle_rss_mb"] for answer in answers),
        "samples": len(samples_ms),
        "size_bytes": answers[0]["size_bytes"],
        "sha256": answers[0]["sha256"],
        "notes": answers[0]["notes"],
    }


def _conditions(name: str, machine: dict[str, Any], answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The probe's findings, what the runtimes were asked for, and what happened to the machine meanwhile."""
    settings = {
        answer["runtime"]: ", ".join(f"{key}={value}" for key, value in answer["settings"].items())
        for answer in answers
    }
    board, cpu = machine["board"], machine["cpu"]
    return {
        "target": name,
        "machine": cpu if board == UNAVAILABLE else f"{board}, {cpu}",
        **machine,
        "temperature_after_c": answers[-1]["after"]["temperature_c"],
        "settings": "; ".join(f"{runtime}: {text}" for runtime, text in settings.items()),
        "notes": _distinct(note for answer in answers for note in answer["notes"]),
        "throttled": _distinct(reason for answer in answers for reason in answer["throttled"]),
    }


def _samples(answers: Sequence[dict[str, Any]]) -> Rounds:
    return [answer["samples_ms"] for answer in answers]


def _median(rounds: Rounds) -> float:
    return float(np.median(np.concatenate(rounds)))


def _highest(values: Iterable[Any]) -> float | None:
    return max((value for value in values if value != UNAVAILABLE), default=None)


def _distinct(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))
