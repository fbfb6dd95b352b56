"""A run against its baseline: what is compared, what is refused, and the judgement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.errors import CompressError
from compress.gate import verdict
from compress.gate.baseline import read_baseline
from compress.gate.goals import GROUPS, METRICS, Goal, chosen, parse
from compress.gate.record import DEVICE, SETTINGS, BaselineError, Record, Timing, read_run
from compress.gate.timing import NOW, SELF, Timed, between_recordings, median_ms
from compress.gate.verdict import Judgement, Line
from compress.targets.agent import UNAVAILABLE

if TYPE_CHECKING:
    from compress.progress import Progress
    from compress.targets.asking import Measuring
    from compress.targets.machine import Machine

TOLERANCE = 0.05
"""How far what did not change may be from 1 before times are called NOISY."""


@dataclass(frozen=True)
class Now:
    """What was measured for this judgement, baseline and run in turns."""

    timed: Mapping[str, Timed]
    """By file."""
    outputs: Mapping[str, np.ndarray]
    """What the baseline's files compute on the machine for its sample, by file."""
    conditions: Mapping[str, Any]
    machine: str


@dataclass(frozen=True)
class Asked:
    """What a gate is to judge, checked."""

    goals: Sequence[Goal] = ()
    """Of the command line; they come before the baseline's."""
    only: Sequence[str] = GROUPS
    named: bool = False
    """Whether the command line named `only`: then a metric that cannot be judged is an error."""
    tolerance: float = TOLERANCE
    notes: list[str] = field(default_factory=list)


def asked(goals: Sequence[str], only: str | None, tolerance: float = TOLERANCE) -> Asked:
    """From the command line's words. Raises CompressError for what they do not mean."""
    groups = GROUPS if only is None else tuple(dict.fromkeys(word.strip() for word in only.split(",") if word.strip()))
    for group in groups:
        if group not in GROUPS:
            hint = f"{group} is judged with {METRICS[group].group}; " if group in METRICS else ""
            raise CompressError("--only", f"no such part {group!r}", f"{hint}known: {', '.join(GROUPS)}")
    if not groups:
        raise CompressError("--only", "names nothing", f"known: {', '.join(GROUPS)}")
    return Asked([parse(goal) for goal in goals], groups, only is not None, tolerance)


def gate(
    run: Path,
    baseline: Path,
    what: Asked,
    *,
    machine: Machine | None = None,
    measuring: Measuring | None = None,
    progress: Progress,
) -> Judgement:
    """The judgement on a run's folder.

    With a `machine`, entered, the baseline's files and the run's are timed on it in turns; without one the two
    recordings are compared. Raises BaselineError where the two cannot be compared: other data, another device, another
    version of a runtime, other threads, files that are missing or were changed.
    """
    ours, theirs = read_run(run), read_baseline(baseline)
    goals = chosen(what.goals, theirs.goals, what.only)
    _refuse_other_files(ours, theirs)
    if "accuracy" in what.only:
        _refuse_other_data(ours, theirs, what)
    timed, notes = _recorded(ours, theirs, what) if machine is None else ({}, [])
    if machine is not None and any(goal.metric == "speedup" for goal in goals):
        raise CompressError("--measure", "times no parent, so there is no speedup", "give goals on latency or fps")
    now = _measured(ours, theirs, what, machine, measuring, progress) if machine is not None else None
    lines = _parity(ours, theirs, now) if "parity" in what.only else []
    for goal in goals:
        for file in theirs.shipped:
            lines += _line(ours, theirs, file, goal, now.timed if now else timed)
    if not lines:
        raise BaselineError(baseline, "has nothing to judge this run by", "name other parts with --only")
    if ours.recipe_hash != theirs.recipe_hash:
        notes.append("the recipe is not the one that made the baseline")
    notes += _versions(ours, theirs)
    judged = now.timed if now else timed
    return Judgement(
        lines=lines,
        run=ours,
        baseline=theirs,
        times=judged,
        conditions=now.conditions if now else (ours.conditions if judged else {}),
        notes=notes,
    )


def _line(ours: Record, theirs: Record, file: str, goal: Goal, timed: Mapping[str, Timed]) -> list[Line]:
    """None where times were left out, with a note on it elsewhere."""
    runtime = theirs.files[file].runtime
    if goal.metric == "accuracy":
        return [verdict.accuracy(theirs, ours, file, goal)]
    if goal.metric == "size":
        return [verdict.size(theirs, ours, file, goal)]
    if file not in timed:
        return []
    if goal.metric != "speedup":
        return [verdict.times(timed[file], file, runtime, goal)]
    series = []
    for record in (theirs, ours):
        parent, own = record.parent_of(runtime), record.timing(file)
        if parent is None or own is None:
            raise BaselineError(record.place, f"has no time of the parent on {runtime}, so no speedup", "drop the goal")
        series.append((parent.rounds_ms, own.rounds_ms))
    return [verdict.speedup(series[0], series[1], file, runtime, goal, timed[file])]


def _parity(ours: Record, theirs: Record, now: Now | None) -> list[Line]:
    lines = [verdict.parity(ours, theirs)]
    for found in ours.parity["target"]:
        if found["file"] in theirs.shipped:
            runtime = ours.files[found["file"]].runtime
            lines.append(verdict.target_parity(found["file"], runtime, found, ours.machine))
    for file, computed_NK in (now.outputs if now else {}).items():
        assert now is not None
        where, classes = f"{now.machine} (baseline's file)", theirs.task == "classification"
        lines.append(verdict.same_outputs(theirs.files[file], computed_NK, where, classes=classes))
    return lines


def _refuse_other_files(ours: Record, theirs: Record) -> None:
    missing = [file for file in theirs.shipped if file not in ours.files]
    if missing:
        raise BaselineError(
            ours.place,
            f"has no {', '.join(missing)}, which {theirs.place} judges",
            "export it, or write another baseline",
        )


def _refuse_other_data(ours: Record, theirs: Record, what: Asked) -> None:
    rest = ",".join(group for group in what.only if group != "accuracy")
    way_out = f"write a baseline on this data, or leave accuracy out: --only {rest or 'size,parity,latency'}"
    if ours.fingerprint != theirs.fingerprint:
        told = f"made on other data (fingerprint {theirs.fingerprint[:12]}, the run's {ours.fingerprint[:12]})"
        raise BaselineError(theirs.place, told, way_out)
    if ours.task != theirs.task:
        raise BaselineError(theirs.place, f"is for {theirs.task}, the run for {ours.task}", way_out)
    if not np.array_equal(ours.answers.labels_N, theirs.answers.labels_N):
        raise BaselineError(theirs.place, f"judged {theirs.images} images, not the run's {ours.images}", way_out)


def _recorded(ours: Record, theirs: Record, what: Asked) -> tuple[dict[str, Timed], list[str]]:
    """Times of two recordings by file, and notes; nothing where neither has any."""
    if "latency" not in what.only:
        return {}, []
    rest = ",".join(group for group in what.only if group != "latency")
    way_out = f"--measure times both now, --only {rest or 'accuracy,size,parity'} leaves times out"
    if not theirs.timings or not ours.timings:
        without = theirs if not theirs.timings else ours
        if ours.parity["verdict"] != "PASS":
            return {}, ["no times: the run ended at verify"]
        if not theirs.timings and not ours.timings and not what.named:
            return {}, ["neither the run nor the baseline has times"]
        raise BaselineError(without.place, "has no times", way_out)
    differing = _differing(ours, theirs)
    if differing:
        raise BaselineError(theirs.place, f"times are not comparable: {'; '.join(differing)}", way_out)
    found = {}
    for file in theirs.shipped:
        before, now = theirs.timing(file), ours.timing(file)
        if before is None or now is None:
            raise BaselineError((theirs if before is None else ours).place, f"has no times of {file}", way_out)
        timed = between_recordings(
            before.rounds_ms, now.rounds_ms, control=_control(ours, theirs, file), tolerance=what.tolerance
        )
        own = _restless(ours, file, what.tolerance)
        either = () if timed.how == SELF else (*_restless(theirs, file, what.tolerance), *own)
        found[file] = replace(timed, noisy=(*timed.noisy, *either), restless=own, unsteady=either)
    return found, []


def _differing(ours: Record, theirs: Record) -> list[str]:
    """Why times of two recordings say nothing about files, in short sentences."""
    found = []
    keys = [key for key in DEVICE if _said(ours, key) != _said(theirs, key)]
    if keys:
        found.append(f"the baseline is of {theirs.machine}, the run of {ours.machine}")
        if ours.machine == theirs.machine:
            found[-1] += f" (other {', '.join(keys)})"
    for key in SETTINGS:
        before, now = _said(theirs, key), _said(ours, key)
        if before != now:
            found.append(f"{key} {before} and {now}")
    for file in theirs.shipped:
        before_, now_ = theirs.timing(file), ours.timing(file)
        if before_ and now_ and before_.version != now_.version:
            found.append(f"{before_.runtime} {before_.version} and {now_.version}")
        elif before_ and now_ and before_.settings != now_.settings:
            found.append(f"{before_.runtime} with {before_.settings} and with {now_.settings}")
    return list(dict.fromkeys(found))


def _said(record: Record, key: str) -> Any:
    return record.conditions.get(key, UNAVAILABLE)


def _control(ours: Record, theirs: Record, judged: str) -> tuple[Any, Any] | None:
    """A file that both recordings timed and that did not change: the parent if it can be had."""
    runtime = theirs.files[judged].runtime
    common: list[tuple[Timing, Timing]] = []
    for timing in theirs.timings:
        other = ours.timing(timing.file)
        same = other is not None and ours.files[timing.file].sha256 == theirs.files[timing.file].sha256
        if same and other is not None and timing.runtime == runtime and timing.file != judged:
            common.append((timing, other))
    return (common[0][0].rounds_ms, common[0][1].rounds_ms) if common else None


def _restless(record: Record, file: str, tolerance: float) -> tuple[str, ...]:
    """Why a recording's machine is not to be believed."""
    timing = record.timing(file)
    assert timing is not None
    found = [f"{reason} ({record.place})" for reason in timing.throttled]
    parent = record.parent_of(timing.runtime)
    if parent is not None and parent.control_ms:
        aa_ratio = median_ms(parent.rounds_ms) / median_ms(parent.control_ms)
        if max(aa_ratio, 1 / aa_ratio) > 1 + tolerance:
            found.append(f"the parent against itself gave {aa_ratio:.3f} ({record.place})")
    return tuple(found)


def _measured(
    ours: Record, theirs: Record, what: Asked, machine: Machine, measuring: Measuring | None, progress: Progress
) -> Now:
    """Each shipped file of the baseline and the run's of the same name, in turns, and the baseline's outputs."""
    from compress.targets import is_emulated
    from compress.targets.asking import Measuring, answers, compare, probe

    timed: dict[str, Timed] = {}
    outputs: dict[str, np.ndarray] = {}
    conditions: Mapping[str, Any] = {}
    if "latency" in what.only:
        if is_emulated(machine.name):
            way_out = "measure on a board, or --only accuracy,size,parity"
            raise BaselineError(f"target {machine.name}", "an emulated machine has no times", way_out)
        how = measuring or Measuring(tolerance=what.tolerance)
        pairs = {file: _both(ours, theirs, file) for file in theirs.shipped}
        with progress.steps("gate", sum(len(how.slots(pair)) for pair in pairs.values())) as advance:
            for file, pair in pairs.items():
                found = compare(machine, pair, how, on_process=advance)
                conditions = found.conditions
                before, now = ([s["samples_ms"] for s in found.samples if _own(s, name)] for name in pair)
                row = found.pairs[0]
                low, high = row["interval"]
                noisy = tuple(row["reasons"]) if row["verdict"] == "NOISY" else ()
                timed[file] = Timed(before, now, (1 / high, 1 / low), row["aa_ratio"], NOW, noisy, noisy)
    if "parity" in what.only:
        assert theirs.sample is not None
        images_NCHW = np.load(theirs.sample, allow_pickle=False)
        for file in theirs.shipped:
            path = theirs.files[file].path
            assert path is not None
            outputs[file] = answers(machine, path, images_NCHW).outputs_NK
    if not conditions and outputs:
        conditions = {"target": machine.name, **probe(machine)}
    name = str(conditions.get("machine") or conditions.get("cpu") or machine.name)
    return Now(timed, outputs, conditions, name)


def _both(ours: Record, theirs: Record, file: str) -> dict[str, Path]:
    before, now = theirs.files[file].path, ours.files[file].path
    assert before is not None
    assert now is not None
    return {f"baseline {file}": before, f"this run {file}": now}


def _own(sample: Mapping[str, Any], name: str) -> bool:
    return sample["file"] == name and not sample["control"]


def _versions(ours: Record, theirs: Record) -> list[str]:
    """Runtimes whose version changed: their arithmetic may have, too."""
    found = []
    for file in theirs.shipped:
        before, now = theirs.files[file], ours.files[file]
        if (before.runtime, before.version) != (now.runtime, now.version):
            found.append(f"{file}: verified with {before.runtime} {before.version}, now {now.runtime} {now.version}")
    return found
