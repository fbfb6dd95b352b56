"""Judgements and comparisons for people and for programs: tables, Markdown, JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compress.gate.goals import GROUPS, METRICS, Goal, parse
from compress.gate.record import DEVICE, SETTINGS, Record, compared
from compress.gate.timing import NOW, between_recordings, median_ms
from compress.gate.verdict import Judgement, Line
from compress.labels import Task
from compress.targets.agent import UNAVAILABLE
from compress.tasks import task_of

Rows = list[dict[str, str]]
"""A table: equal keys, its header."""

MEANING = {
    "NOISY": "cannot be judged",
    "INFEASIBLE": "not as good as asked for, and not provably worse than before",
    "REGRESSION": "worse than the goal allows",
}


def headline(judgement: Judgement) -> str:
    """The verdict on one line, with what it rests on."""
    verdict = judgement.verdict
    if verdict == "ACCEPT":
        judged = {METRICS[line.metric].group if line.metric in METRICS else line.metric for line in judgement.lines}
        left_out = [group for group in GROUPS if group not in judged]
        return "ACCEPT: every goal holds" + (f" ({', '.join(left_out)} not judged)" if left_out else "")
    guilty = [line for line in judgement.lines if line.verdict == verdict]
    told = ", ".join(
        f"{line.metric} of {line.file}" + (f" ({moved})" if (moved := change(line, judgement.run.task)) else "")
        for line in guilty
    )
    return f"{verdict}: {told} {MEANING[verdict]}"


def delta_rows(judgement: Judgement) -> Rows:
    """Each judged file: accuracy, speed and size now, and what changed; the speed's header names what was timed on."""
    run, baseline = judgement.run, judgement.baseline
    arch, emulated = judgement.conditions.get("arch", ""), _emulator(judgement.conditions)
    found = []
    for name in baseline.shipped:
        before, now = baseline.files[name], run.files[name]
        difference, bytes_ = now.accuracy - before.accuracy, now.size_bytes / before.size_bytes
        comparable = any(line.metric == "accuracy" for line in judgement.lines)
        row = {"file": name, "runtime": f"{now.runtime} {now.version}"}
        score, moved = _score(now.accuracy, run.task), _score_change(difference, run.task)
        row[task_of(run.task).score_name] = score + (f" ({moved})" if comparable else "")
        if name in judgement.times:
            timed = judgement.times[name]
            p50_ms = median_ms(timed.candidate)
            if not emulated:
                row[f"fps on {arch}"] = f"{1000 / p50_ms:,.1f} ({100 * (1 / timed.ratio - 1):+.1f} %)"
            row["median, emulated" if emulated else "median"] = (
                f"{shown('latency', p50_ms)} ({100 * (timed.ratio - 1):+.1f} %)"
            )
        row["size"] = f"{shown('size', float(now.size_bytes))} ({100 * (bytes_ - 1):+.1f} %)"
        found.append(row)
    return found


def rows(judgement: Judgement) -> Rows:
    return [
        {
            "verdict": line.verdict,
            "metric": line.metric,
            "file": line.file,
            "baseline": shown(line.metric, line.baseline, judgement.run.task),
            "this run": shown(line.metric, line.value, judgement.run.task),
            "change": change(line, judgement.run.task),
            "95 % interval": interval(line, judgement.run.task),
            "goal": goal_text(line, judgement.run.task),
        }
        for line in judgement.lines
    ]


def reasons(judgement: Judgement) -> list[str]:
    """A sentence for each line, those that are not ACCEPT first."""
    order = sorted(judgement.lines, key=lambda line: line.verdict == "ACCEPT")
    return [f"{line.verdict}: {line.metric} of {line.file}: {line.reason}" for line in order]


def markdown(judgement: Judgement, command: str) -> str:
    """For a job's summary: the verdict, the changes, why, under which conditions, and how to repeat it."""
    run, baseline = judgement.run, judgement.baseline
    parts = [
        f"## {headline(judgement)}",
        f"Recipe `{run.name}`, against the baseline of {baseline.made[:10] or 'unknown date'}"
        f" (`{baseline.place}`, recipe `{baseline.name}`).",
        table(delta_rows(judgement)),
        "In brackets: the change against the baseline.",
        "### Goals",
        table(rows(judgement)),
        "### Why",
        "\n".join(f"- {reason}" for reason in reasons(judgement)),
        "### Conditions",
        "\n".join(f"- {line}" for line in conditions(judgement)),
        "### To repeat it",
        f"```bash\n{command}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def conditions(judgement: Judgement) -> list[str]:
    """Under what the judgement holds, in sentences."""
    run, baseline, found = judgement.run, judgement.baseline, judgement.conditions
    judged = f"{task_of(run.task).score_name} and {_test(run)}"
    lines = [f"images: {run.images}, data {run.fingerprint[:12]}; {judged} on the exported files"]
    if judgement.timed == NOW:
        lines.append(f"times: baseline's files and this run's in turns, now, on {_machine(found)}")
    elif judgement.timed:
        lines.append(f"times: {judgement.timed} of {_machine(found)}")
    else:
        lines.append("times: not compared")
    if judgement.timed:
        asked = {key.replace("_", " "): found[key] for key in (*SETTINGS, "rounds") if key in found}
        lines.append("asked: " + ", ".join(f"{key} {value}" for key, value in asked.items()))
        aa = [line.facts["aa_ratio"] for line in judgement.lines if line.facts.get("aa_ratio")]
        if aa:
            control = "A/A control" if judgement.timed == NOW else "unchanged file, this recording over the baseline's"
            lines.append(f"{control} (1 is perfect): " + ", ".join(f"{value:.3f}" for value in dict.fromkeys(aa)))
    used = dict.fromkeys((run.files[file].runtime, run.files[file].version) for file in baseline.shipped)
    lines.append("runtimes: " + ", ".join(f"{runtime} {version}" for runtime, version in used))
    lines += [f"note: {note}" for note in judgement.notes]
    return lines


def as_json(judgement: Judgement, command: str) -> dict[str, Any]:
    run, baseline = judgement.run, judgement.baseline
    return {
        "verdict": judgement.verdict,
        "exit_status": judgement.exit_status,
        "lines": [line.as_dict() for line in judgement.lines],
        "reasons": reasons(judgement),
        "timed": judgement.timed,
        "conditions": dict(judgement.conditions),
        "notes": list(judgement.notes),
        "run": _identity(run),
        "baseline": _identity(baseline),
        "command": command,
    }


def comparison_rows(a: Record, b: Record) -> Rows:
    """Every file that both have, b against a; what cannot be compared has no change, and `comparison_notes` say why."""
    names = [name for name in a.files if name in b.files]
    return [_comparison_row(a, b, name) for name in names]


def comparison_notes(a: Record, b: Record) -> list[str]:
    notes = []
    if not _same_images(a, b):
        notes.append("accuracy was measured on different images: no test of the difference")
    if not a.timings or not b.timings:
        notes.append(f"{(a if not a.timings else b).place} has no times")
    elif not _same_machine(a, b):
        notes.append(f"times are of different machines or settings ({a.machine}; {b.machine}): no ratio of them")
    elif a.timings != b.timings:
        notes.append(
            "times are of two recordings, where a slower day looks like a slower file;"
            " `compress gate --measure` times both in turns"
        )
    for one, other in ((a, b), (b, a)):
        alone = [name for name in one.files if name not in other.files]
        if alone:
            notes.append(f"only {one.place} has {', '.join(alone)}")
    return notes


def comparison_markdown(a: Record, b: Record) -> str:
    """For a pull request."""
    parts = [f"### {a.place} → {b.place}", table(comparison_rows(a, b))]
    parts += ["\n".join(f"- {note}" for note in comparison_notes(a, b))] if comparison_notes(a, b) else []
    if b.conditions:
        parts.append(f"Times of `{b.place}`: {_machine(b.conditions)}. In brackets: 95 % intervals. p: {_test(b)}.")
    return "\n\n".join(parts) + "\n"


def comparison_json(a: Record, b: Record) -> dict[str, Any]:
    found = []
    for name in a.files:
        if name not in b.files:
            continue
        timings = [record.timing(name) for record in (a, b)]
        entry: dict[str, Any] = {
            "file": name,
            "runtime": b.files[name].runtime,
            "accuracy": [a.files[name].accuracy, b.files[name].accuracy],
            "size_bytes": [a.files[name].size_bytes, b.files[name].size_bytes],
            "p50_ms": [median_ms(timing.rounds_ms) if timing else None for timing in timings],
        }
        if _same_images(a, b):
            entry["paired"] = compared(a, b, name).as_dict()
        ratio = _ratio(a, b, name)
        if ratio:
            entry["latency_ratio"], entry["latency_ratio_interval"] = ratio[0], list(ratio[1])
        found.append(entry)
    return {"a": _identity(a), "b": _identity(b), "files": found, "notes": comparison_notes(a, b)}


def table(found: Sequence[Mapping[str, str]]) -> str:
    """In Markdown; empty for no rows."""
    if not found:
        return ""
    lines = [[*found[0]], ["---"] * len(found[0]), *([*row.values()] for row in found)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def shown(metric: str, value: float | None, task: Task = "classification") -> str:
    """With its unit."""
    if value is None:
        return ""
    return {
        "accuracy": _score(value, task),
        "size": f"{value:,.0f} B",
        "latency": f"{value:.4g} ms",
        "fps": f"{value:.1f} fps",
        "speedup": f"{value:.2f}x",
        "parity": f"{value:.0f} differ",
    }[metric]


def _score(value: float, task: Task) -> str:
    return f"{100 * value:.2f} %" if task_of(task).percent else f"{value:.4f}"


def _score_change(difference: float, task: Task) -> str:
    return f"{100 * difference:+.2f} points" if task_of(task).percent else f"{difference:+.4f}"


def _test(record: Record) -> str:
    return "McNemar's test" if record.task == "classification" else "a bootstrap over the images"


def change(line: Line, task: Task = "classification") -> str:
    if line.value is None or line.baseline is None:
        return ""
    if line.metric == "accuracy":
        return _score_change(line.value - line.baseline, task)
    if line.metric == "parity":
        return f"{line.value - line.baseline:+.0f}"
    return f"{100 * (line.value / line.baseline - 1):+.1f} %"


def interval(line: Line, task: Task = "classification") -> str:
    """Of the change, as `change` words it."""
    if line.interval is None or line.baseline is None:
        return ""
    low, high = line.interval
    if line.metric == "accuracy":
        least = _score_change(low - line.baseline, task).removesuffix(" points")
        return f"{least} to {_score_change(high - line.baseline, task)}"
    return f"{100 * (low / line.baseline - 1):+.1f} to {100 * (high / line.baseline - 1):+.1f} %"


def goal_text(line: Line, task: Task = "classification") -> str:
    if not line.goal:
        return "verify passes" if line.file == "all" else "the recorded outputs"
    goal: Goal = parse(line.goal)
    sign = "≥" if goal.about.more_is_better else "≤"
    bound = f" ({sign} {shown(line.metric, line.bound, task)})" if line.bound is not None else ""
    return f"{goal.type} {goal.value:g}{bound}"


def _comparison_row(a: Record, b: Record, name: str) -> dict[str, str]:
    before, now = a.files[name], b.files[name]
    row = {"file": name, "runtime": now.runtime}
    rules = task_of(b.task)
    factor, digits, unit = (100, 2, "points") if rules.percent else (1, 4, rules.score_name)
    score = f"{rules.score_name} %" if rules.percent else rules.score_name
    row[score] = f"{factor * before.accuracy:.{digits}f} → {factor * now.accuracy:.{digits}f}"
    row[f"Δ {unit}"] = row["p"] = ""
    if _same_images(a, b):
        pair = compared(a, b, name)
        moved = [f"{factor * value:+.{digits}f}" for value in (pair.difference, *pair.interval())]
        row[f"Δ {unit}"] = f"{moved[0]} ({moved[1]} to {moved[2]})"
        row["p"] = f"{pair.p_value:.2g}"
    timings = [record.timing(name) for record in (a, b)]
    medians = [median_ms(timing.rounds_ms) if timing else None for timing in timings]
    row["median ms"] = " → ".join(f"{value:.4g}" if value else "–" for value in medians)
    if not (_emulator(a.conditions) or _emulator(b.conditions)):
        row["fps"] = " → ".join(f"{1000 / value:.0f}" if value else "–" for value in medians)
    ratio = _ratio(a, b, name)
    row["Δ ms %"] = ""
    if ratio:
        value, (low, high) = ratio
        row["Δ ms %"] = f"{100 * (value - 1):+.1f} ({100 * (low - 1):+.1f} to {100 * (high - 1):+.1f})"
    row["bytes"] = f"{before.size_bytes:,} → {now.size_bytes:,}"
    row["Δ bytes %"] = f"{100 * (now.size_bytes / before.size_bytes - 1):+.1f}"
    return row


def _ratio(a: Record, b: Record, name: str) -> tuple[float, tuple[float, float]] | None:
    before, now = a.timing(name), b.timing(name)
    if before is None or now is None or not _same_machine(a, b) or before.version != now.version:
        return None
    same = between_recordings(before.rounds_ms, now.rounds_ms, control=None, tolerance=1.0)
    return same.ratio, same.interval


def _same_images(a: Record, b: Record) -> bool:
    same = a.fingerprint == b.fingerprint and a.task == b.task
    same = same and a.answers.labels_N.shape == b.answers.labels_N.shape
    return same and bool((a.answers.labels_N == b.answers.labels_N).all())


def _same_machine(a: Record, b: Record) -> bool:
    keys = (*DEVICE, *SETTINGS)
    return all(a.conditions.get(key, UNAVAILABLE) == b.conditions.get(key, UNAVAILABLE) for key in keys)


def _machine(found: Mapping[str, Any]) -> str:
    name = found.get("machine") or found.get("cpu") or "an unnamed machine"
    told = f"{name} ({found.get('arch', 'unknown')})"
    if _emulator(found):
        return f"{told}, emulated by {_emulator(found)}: no board's times, not ARM fps"
    return told if found.get("is_arm") else f"{told}, which is no ARM machine"


def _emulator(found: Mapping[str, Any]) -> str:
    """Empty for a machine that is one."""
    name = str(found.get("emulator") or UNAVAILABLE)
    return "" if name == UNAVAILABLE else name


def _identity(record: Record) -> dict[str, Any]:
    return {
        "place": record.place,
        "recipe": record.name,
        "recipe_hash": record.recipe_hash,
        "made": record.made,
        "data": record.fingerprint,
        "images": record.images,
        "machine": record.conditions.get("machine"),
        "files": {
            name: {
                "sha256": file.sha256,
                "size_bytes": file.size_bytes,
                "accuracy": file.accuracy,
                "runtime": file.runtime,
                "version": file.version,
            }
            for name, file in record.files.items()
        },
    }
