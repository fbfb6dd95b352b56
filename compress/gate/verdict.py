"""Whether a run may replace its baseline, metric by metric.

    ACCEPT      every goal holds
    NOISY       a goal on times or accuracy cannot be judged: chance explains it, or the machine was restless
    INFEASIBLE  a threshold or an improvement that was asked for is not reached, though nothing got worse
    REGRESSION  something got worse than a goal allows

in this order: the worst line is the verdict of all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from compress.gate.goals import THRESHOLD, Goal
from compress.gate.paired import CONFIDENCE
from compress.gate.record import File, Record, compared
from compress.gate.timing import Rounds, Timed, interval_of, median_ms, resampled_medians
from compress.targets.outputs import HUGE, output_step

Verdict = Literal["ACCEPT", "NOISY", "INFEASIBLE", "REGRESSION"]
ORDER: tuple[Verdict, ...] = ("ACCEPT", "NOISY", "INFEASIBLE", "REGRESSION")
EXIT_STATUS: Mapping[Verdict, int] = {"ACCEPT": 0, "REGRESSION": 3, "INFEASIBLE": 4, "NOISY": 5}
"""1 is an error (also a baseline that is refused), 2 a wrong command line."""

SIGNIFICANT = 1 - CONFIDENCE
PARITY_LSB = 1
"""How far an int8 output may be from the recorded one on another machine: what verify allows two runtimes."""


@dataclass(frozen=True)
class Line:
    """One metric of one file against one goal."""

    metric: str
    file: str
    runtime: str
    verdict: Verdict
    goal: str
    """As on the command line; empty for parity."""
    reason: str
    """One sentence."""
    baseline: float | None = None
    value: float | None = None
    """In the metric's unit, as `baseline`."""
    bound: float | None = None
    """The worst value that holds."""
    interval: tuple[float, float] | None = None
    """Of `value`, at 95 %, as far as chance can move it against the baseline; None for what is exact."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the verdict rests on."""

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "interval": list(self.interval) if self.interval else None, "facts": dict(self.facts)}


@dataclass(frozen=True)
class Judgement:
    lines: Sequence[Line]
    run: Record
    baseline: Record
    times: Mapping[str, Timed] = field(default_factory=dict)
    """By file, as far as times were compared."""
    conditions: Mapping[str, Any] = field(default_factory=dict)
    """Of the machine that timed both, or the run alone."""
    notes: Sequence[str] = ()

    @property
    def verdict(self) -> Verdict:
        return worst([line.verdict for line in self.lines])

    @property
    def timed(self) -> str:
        """How times were compared; empty where they were not."""
        return next((found.how for found in self.times.values()), "")

    @property
    def exit_status(self) -> int:
        return EXIT_STATUS[self.verdict]


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict of all; ACCEPT for none."""
    return max(verdicts, key=ORDER.index, default="ACCEPT")


def judged(value: float, interval: tuple[float, float] | None, baseline: float, goal: Goal) -> Verdict:
    """Of a metric whose `value` chance can move within `interval`.

    Good or bad on the whole interval is a verdict, else it is NOISY. What misses a threshold or an improvement is a
    regression only where the whole interval is worse than the baseline.
    """
    sign, bound = goal.about.sign, goal.bound(baseline)
    low, high = interval or (value, value)
    least, most = (low, high) if goal.about.more_is_better else (high, low)
    if sign * least >= sign * bound:
        return "ACCEPT"
    if sign * most >= sign * bound:
        return "NOISY"
    return "REGRESSION" if goal.allows_loss or sign * most < sign * baseline else "INFEASIBLE"


def accuracy(baseline: Record, run: Record, file: str, goal: Goal) -> Line:
    """On the same images, in the same order: the caller has made sure.

    A loss beyond the bound is a REGRESSION where McNemar's test (in tasks without classes a bootstrap) finds it
    significant, else NOISY: a few images more or less happen by chance; so an improvement that was asked for must be
    significant, too. What misses a threshold or an improvement without a significant loss is INFEASIBLE.
    """
    pair = compared(baseline, run, file)
    before, now, bound = pair.baseline, pair.candidate, goal.bound(pair.baseline)
    low, high = pair.interval()
    interval = (before + low, before + high)
    significant = pair.p_value < SIGNIFICANT
    told = pair.told
    verdict: Verdict
    if now >= bound and goal.type.endswith("min-improvement") and not significant:
        verdict, reason = "NOISY", f"reached, but {pair.images} images cannot tell it from chance: {told}"
    elif now >= bound:
        verdict, reason = "ACCEPT", told
    elif significant and pair.difference < 0:
        verdict, reason = "REGRESSION", f"beyond the goal, and the loss is not chance: {told}"
    elif goal.allows_loss:
        verdict = "NOISY"
        reason = f"worse than the goal allows, but {pair.images} images cannot tell it from chance: {told}"
    else:
        verdict, reason = "INFEASIBLE", f"not reached: {told}"
    return Line(
        "accuracy",
        file,
        run.files[file].runtime,
        verdict,
        str(goal),
        reason,
        before,
        now,
        bound,
        interval,
        pair.as_dict(),
    )


def size(baseline: Record, run: Record, file: str, goal: Goal) -> Line:
    before, now = baseline.files[file].size_bytes, run.files[file].size_bytes
    verdict = judged(now, None, before, goal)
    words = {"ACCEPT": "within the goal", "INFEASIBLE": "not reached", "REGRESSION": "larger than the goal allows"}
    reason = f"{words[verdict]}: {now:,} bytes, {_percent(now / before)}"
    return Line(
        "size", file, run.files[file].runtime, verdict, str(goal), reason, float(before), float(now), goal.bound(before)
    )


def times(timed: Timed, file: str, runtime: str, goal: Goal) -> Line:
    """Latency (the median) or fps, against the baseline or against a number."""
    before, now = median_ms(timed.baseline), median_ms(timed.candidate)
    low, high = (before * ratio for ratio in timed.interval)
    if goal.type == THRESHOLD:  # the baseline has no part in it
        low, high = interval_of(resampled_medians(timed.candidate, seed=0))
    if goal.metric == "fps":
        before, now, low, high = 1000 / before, 1000 / now, 1000 / high, 1000 / low
    facts = {"ratio": timed.ratio, "ratio_interval": list(timed.interval), "aa_ratio": timed.aa_ratio, "how": timed.how}
    return _timed_line(
        goal, file, runtime, before, now, (low, high), timed.restless if goal.type == THRESHOLD else timed.noisy, facts
    )


def speedup(
    baseline: tuple[Rounds, Rounds], run: tuple[Rounds, Rounds], file: str, runtime: str, goal: Goal, timed: Timed
) -> Line:
    """Over the parent, each in its own recording: (the parent's samples, the file's)."""
    before, now = (median_ms(parent) / median_ms(own) for parent, own in (baseline, run))
    found = [
        resampled_medians(parent, seed=2 * place) / resampled_medians(own, seed=2 * place + 1)
        for place, (parent, own) in enumerate((baseline, run))
    ]
    values = found[1] if goal.type == THRESHOLD else before * found[1] / found[0]
    interval = (now, now) if baseline == run and goal.type != THRESHOLD else interval_of(values)
    noisy = timed.restless if goal.type == THRESHOLD else timed.unsteady
    return _timed_line(goal, file, runtime, before, now, interval, noisy, {"how": "each against its own parent"})


def parity(run: Record, baseline: Record) -> Line:
    """What verify found: the files compute what was trained, or they do not."""
    differing, counted, before = 0, 0, 0
    for record in (run, baseline):
        pairs = record.parity["agreement"]
        found = sum(pair["differing"] for pair in pairs)
        if record is run:
            differing, counted = found, sum(pair["logits"] for pair in pairs)
        else:
            before = found
    passed = run.parity["verdict"] == "PASS"
    reason = f"{differing} of {counted} int8 outputs differ by a rounding (baseline {before})"
    if not passed:
        reason = f"verify failed: {run.parity['reason']}"
    verdict: Verdict = "ACCEPT" if passed else "REGRESSION"
    facts = {
        "verdict": run.parity["verdict"],
        "differing": differing,
        "compared": counted,
        "baseline_differing": before,
    }
    return Line("parity", "all", "", verdict, "", reason, float(before), float(differing), facts=facts)


def target_parity(file: str, runtime: str, found: Mapping[str, Any], target: str) -> Line:
    """What the run's benchmark saw when the target and the host computed the same images with one file."""
    differing, outputs = int(found["differing"]), int(found["outputs"])
    largest = float(found.get("max_lsb", found.get("largest_steps", 0)))
    if "cpu" in found:
        target = f"emulated {found['cpu']}"
    reason = f"{differing} of {outputs} outputs on {target} differ from the host's"
    reason += f", by up to {largest:.3g} LSB" if largest else ""
    verdict: Verdict = "ACCEPT" if largest <= PARITY_LSB + 1e-3 else "REGRESSION"
    facts = {"differing": differing, "outputs": outputs, "largest": largest}
    return Line("parity", file, runtime, verdict, "", reason, 0.0, float(differing), facts=facts)


def same_outputs(file: File, computed_NK: np.ndarray, where: str, *, classes: bool = True) -> Line:
    """Whether a baseline's file computes on a machine what was recorded with it; int8 may be a step off.

    `classes` says that the largest output is an image's class, so that it can be told how many changed.
    """
    recorded_NK = file.outputs_NK
    assert recorded_NK is not None
    if recorded_NK.shape != computed_NK.shape or recorded_NK.dtype.kind != computed_NK.dtype.kind:
        found, wanted = ((array.dtype, array.shape) for array in (computed_NK, recorded_NK))
        reason = f"{where} gives {found[0]} {found[1]}, recorded {wanted[0]} {wanted[1]}"
        return Line("parity", file.name, file.runtime, "REGRESSION", "", reason)
    step, unit = _step(file.kind, recorded_NK)
    apart = np.abs(recorded_NK.astype(np.float64) - computed_NK.astype(np.float64)) / step
    largest = float(np.nan_to_num(apart, nan=HUGE, posinf=HUGE).max())
    differing = int((recorded_NK != computed_NK).sum())
    moved = int((recorded_NK.reshape(len(apart), -1).argmax(1) != computed_NK.reshape(len(apart), -1).argmax(1)).sum())
    told = f"{differing} of {apart.size} outputs differ from the recorded ones on {where}"
    if differing:
        told += f", by up to {largest:.3g} {unit}"
        told += f", {moved} of {len(apart)} images change class" if classes else ""
    facts = {
        "differing": differing,
        "outputs": int(apart.size),
        "largest": largest,
        "unit": unit,
        **({"classes_changed": moved} if classes else {}),
    }
    # Float files are rounded by each CPU's kernels in its own way: verify's 1e-3 of the largest logit.
    allowed = PARITY_LSB + 1e-3 if unit == "LSB" else 1e-3
    verdict: Verdict = "ACCEPT" if largest <= allowed else "REGRESSION"
    return Line("parity", file.name, file.runtime, verdict, "", told, 0.0, float(differing), facts=facts)


def _step(kind: str, outputs_NK: np.ndarray) -> tuple[float, str]:
    """In what differences of outputs are told: steps of an int8 grid, or parts of the largest float."""
    if kind == "int8" or outputs_NK.dtype.kind != "f":
        return output_step(outputs_NK), "LSB"
    return max(float(np.abs(outputs_NK).max()), 1e-30), "of the largest"


def _timed_line(
    goal: Goal,
    file: str,
    runtime: str,
    before: float,
    now: float,
    interval: tuple[float, float],
    noisy: Sequence[str],
    facts: Mapping[str, Any],
) -> Line:
    verdict: Verdict = "NOISY" if noisy else judged(now, interval, before, goal)
    change = _percent(now / before)
    words = {
        "ACCEPT": f"within the goal: {change}",
        "NOISY": f"the interval holds both good and bad: {change}",
        "INFEASIBLE": f"not reached, without a proven loss: {change}",
        "REGRESSION": f"worse than the goal allows on the whole interval: {change}",
    }
    reason = "; ".join(noisy) or words[verdict]
    return Line(
        goal.metric, file, runtime, verdict, str(goal), reason, before, now, goal.bound(before), interval, facts
    )


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f} %"
