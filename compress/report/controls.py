"""What came of the controls: simpler networks that are as fast as the run's own, from `equal_latency` of run.json."""

from __future__ import annotations

from typing import Any

from compress.recipe.controlled import worded
from compress.report import wording
from compress.report.headline import machine
from compress.report.parts import Conditions, ControlNetwork, RunDescription

OURS = "ours"
VERDICTS = ("lose", "trade", "tie", "win")
"""What a reader must know first comes first."""
LOSES = "It loses to the control"
SAID = {"win": "wins", "tie": "tie", "lose": "loses", "trade": "trade"}


def controls(run: RunDescription) -> dict[str, Any] | None:
    """Rows in words and figures, how many of each verdict, and what they were measured by; None where nobody asked."""
    found = run.equal_latency
    if found is None:
        return None
    score = wording.score_of(run.data.task)
    rows = [_row(network, score) for network in found.networks if not network.left_out]
    return {
        "finished": found.finished and bool(rows),
        "file": found.file,
        "runtime": found.runtime,
        "tolerance": found.tolerance,
        "seeds": found.seeds,
        "machine": machine(Conditions.model_validate(found.conditions)) if found.conditions else None,
        "rows": rows,
        "left_out": [{"name": worded(one.name), "why": one.left_out} for one in found.networks if one.left_out],
        "counts": {verdict: [row["name"] for row in rows if row["verdict"] == verdict] for verdict in VERDICTS},
        "noisy": [row["name"] for row in rows if row["noisy"]],
    }


def _row(network: ControlNetwork, score: wording.Score) -> dict[str, Any]:
    ours = network.name == OURS
    accuracy = score.said(network.mean)
    if network.sd is not None:
        accuracy += f" ± {_spread(network.sd, score)}"
    return network.model_dump(mode="json", exclude={"folders", "search"}) | {
        "name": "this network" if ours else worded(network.name),
        "ours": ours,
        "seeds": len(network.accuracy),
        "accuracy_said": accuracy if network.accuracy else wording.NOT_MEASURED,
        "accuracies": network.accuracy,
        "against": "" if ours else score.change(None if network.difference is None else -network.difference),
        "of_our_time": "" if ours else wording.NOT_MEASURED if network.ratio is None else f"{network.ratio:.3f}×",
        "verdict_said": "" if ours else SAID.get(network.verdict or "", wording.NOT_MEASURED),
        "set": _setting(network.setting),
        "why": "; ".join(network.failed),
    }


def _spread(value: float, score: wording.Score) -> str:
    return f"{100 * value:.1f}" if score.percent else f"{value:.3f}"


def _setting(setting: dict[str, float]) -> str:
    """What the search found, in words."""
    if "macs" in setting:
        return f"{100 * setting['macs']:.0f}% of the multiply-adds"
    return f"{setting['size']:.0f} px" if "size" in setting else ""


def said(found: dict[str, Any]) -> str:
    """What belongs into the headline: to whom the network loses, or that it does not."""
    lost, won, judged = found["counts"]["lose"], found["counts"]["win"], sum(map(len, found["counts"].values()))
    if lost:
        return f"loses to {' and '.join(filter(None, (', '.join(lost[:-1]), lost[-1])))}"
    if not judged:
        return ""
    return f"beats {len(won)} of {judged} controls" if won else f"beats none of {judged} controls"


def warnings(found: dict[str, Any] | None) -> list[str]:
    """What a reader must not overlook: losses first, then what is not settled."""
    if not found:
        return []
    if not found["finished"]:
        return ["The controls are not finished: whether a simpler network of this speed is as good is not known."]
    by_name = {row["name"]: row for row in found["rows"]}
    lost = [f"{LOSES} {name}{by_name[name]['said'].removeprefix('loses')}." for name in found["counts"]["lose"]]
    other = [f"Against the control {name} it is {by_name[name]['said']}." for name in found["counts"]["trade"]]
    ties = found["counts"]["tie"]
    if ties:
        other.append(f"Against {', '.join(ties)} it is a tie: the differences are within the noise.")
    if found["seeds"] == 1:
        other.append("Each control was trained once: what chance does to a training is not in these verdicts.")
    if found["noisy"]:
        other.append(f"Noisy times of controls: {', '.join(found['noisy'])}. Measure again on a quiet machine.")
    failed = [f"The control {row['name']} failed: {row['why']}." for row in found["rows"] if row["why"]]
    return lost + other + failed


def fact(found: dict[str, Any]) -> dict[str, str]:
    """The figure among those at the top."""
    counts = {verdict: len(names) for verdict, names in found["counts"].items()}
    judged = sum(counts.values())
    label = "Controls of equal latency"
    empty = {"label": label, "value": wording.NOT_MEASURED, "detail": "", "condition": "", "phrase": "", "tone": ""}
    if not found["finished"] or not judged:
        return empty | {"detail": "the controls did not finish"}
    words = [f"{number} {word}" for word, number in _counted(counts) if number]
    lost = found["counts"]["lose"]
    phrase = said(found)
    seeds = f"{found['seeds']} seeds each" if found["seeds"] > 1 else "one seed each"
    measured = f"{found['file']} in {wording.runtime(found['runtime'])}"
    return empty | {
        "value": phrase,
        "detail": ", ".join(words),
        "condition": f"{measured}, {seeds}; a difference counts with p < 0.05",
        "tone": "bad" if lost else "good" if counts["win"] else "",
    }


def _counted(counts: dict[str, int]) -> list[tuple[str, int]]:
    def of(number: int, one: str, many: str) -> str:
        return one if number == 1 else many

    return [
        (of(counts["win"], "win", "wins"), counts["win"]),
        (of(counts["tie"], "tie", "ties"), counts["tie"]),
        (of(counts["trade"], "trade", "trades"), counts["trade"]),
        (of(counts["lose"], "loss", "losses"), counts["lose"]),
    ]


def names(found: dict[str, Any] | None, control: str) -> bool:
    """Whether that control was judged, so that nobody else has to say what came of it."""
    return bool(found) and any(row["name"] == worded(control) and row["verdict"] for row in (found or {})["rows"])
