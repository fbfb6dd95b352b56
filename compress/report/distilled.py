"""What distillation gave the network: the stages `knowledge`, and the control run that had no teacher."""

from __future__ import annotations

from typing import Any

from compress.report.folder import RunFolder, Stage
from compress.report.parts import Knowledge

BETTER_LOW = ("ece", "nll", "brier", "kl", "js")
"""Measures of which less is better."""
NEITHER = ("invariance", "_fools_")
"""In names of measures that say how a network is, not how good: digits mirrored are no digits."""


def ablation(
    folder: RunFolder,
    networks: list[dict[str, Any]],
    best: dict[str, Any] | None,
    control: dict[str, Any] | None,
) -> dict[str, Any] | None:
    """Accuracy with and without distillation, None where no control was asked for.

    Of the file `best` that the headline speaks of, where it was measured on both; else of the last torch networks.
    `control` is the report of the run without teachers.
    """
    if not folder.run.controls:
        return None
    run = folder.undistilled.run if folder.undistilled else None
    found: dict[str, Any] = {"finished": bool(run and run.finished), "failed": None}
    found |= dict.fromkeys(("of", "stage", "images", "with", "without", "difference", "from_parent", "macs", "params"))
    if not control:
        return found
    if control["verify"] and control["verify"]["verdict"] != "PASS":
        found["failed"] = control["verify"]["reason"] or control["verify"]["verdict"]
    mine, its = _last_network(networks), _last_network(control["stages"])
    file = next((file for file in control["files"] if best and file["file"] == best["file"]), None)
    if best and file and best["accuracy_of"] == file["accuracy_of"] == "file":
        one, other, found["of"] = best, file, best["file"]
    elif mine and its and mine["folder"][:2] == its["folder"][:2]:
        one, other, found["of"] = mine["network"], its["network"], "torch"
    else:  # stopped before its last network
        return found | {"finished": False}
    if one["accuracy"] is None or other["accuracy"] is None:
        return found
    return found | {
        "stage": its and its["folder"],
        "images": one["images"],
        "with": one["accuracy"],
        "without": other["accuracy"],
        "difference": other["accuracy"] - one["accuracy"],
        "from_parent": other["difference"],
        "macs": its and its["network"]["macs"],
        "params": its and its["network"]["params"],
    }


def knowledge(stages: list[Stage], undistilled: list[Stage]) -> list[dict[str, Any]]:
    """The figures of every `knowledge` stage, each with that of the control's network at the same place."""
    theirs = {stage.manifest.folder: stage.metrics for stage in undistilled if isinstance(stage.metrics, Knowledge)}
    found = []
    for stage in stages:
        if not isinstance(stage.metrics, Knowledge):
            continue
        other = theirs.get(stage.manifest.folder)
        without = {measure.name: measure.student for measure in other.measures} if other else {}
        measures = [
            measure.model_dump(mode="json")
            | {"without": without.get(measure.name)}
            | _changed(measure.name, measure.student, without.get(measure.name))
            for measure in stage.metrics.measures
        ]
        found.append(
            {"stage": stage.manifest.folder}
            | stage.metrics.model_dump(mode="json", exclude={"measures"})
            | {"compared": bool(other), "measures": measures}
        )
    return found


def _changed(name: str, student: float | None, without: float | None) -> dict[str, Any]:
    """What distillation changed, and whether that made it worse."""
    if student is None or without is None:
        return {"change": None, "worse": False}
    change = student - without
    worse = change > 0 if name in BETTER_LOW else change < 0
    return {"change": change, "worse": worse and not any(word in name for word in NEITHER)}


def _last_network(networks: list[dict[str, Any]]) -> dict[str, Any] | None:
    return next((stage for stage in reversed(networks) if stage["network"]), None)
