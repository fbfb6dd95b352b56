"""What came of the controls, as run.json says it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from compress import manifest
from compress.gate import answers
from compress.gate.replicated import Replicated, replicated, students_t
from compress.gate.resampled import resampled
from compress.pipeline.compared import OURS, Compared, Shipped, figure
from compress.pipeline.fold import CONTROLS_FOLDER, Fold
from compress.pipeline.verdict import judge, sentence
from compress.recipe.controlled import Controls, worded
from compress.tasks import task_of
from compress.written import read_json, write_json


def verdicts(found: Mapping[str, Any]) -> list[str]:
    """A sentence for each control, from what run.json says."""
    return [f"against {worded(one['name'])}: {one['said']}" for one in found.get("networks", []) if one.get("said")]


def record(
    run: Fold, asked: Controls, shipped: Shipped, compared: list[Compared], times: dict[str, Any] | None
) -> None:
    """Writes `equal_latency` and the controls' folders into run.json; without `times`, that they are being made."""
    if run.rank != 0:
        return
    facts = read_json(run.folder / "run.json")
    found: dict[str, Any] = {
        "finished": times is not None,
        "file": shipped.name,
        "runtime": shipped.runtime,
        "target": run.recipe.target,
        "threads": shipped.measuring.threads,
        "tolerance": asked.tolerance,
        "seeds": asked.seeds,
        "conditions": {},
        "networks": [],
    }
    if times is not None:
        found["conditions"] = times["conditions"]
        ours = compared[0]
        judged = [_judged(one, ours, run, asked, shipped, times) for one in compared]
        found["networks"] = judged
        known = [fold.folder.name for one in compared for fold in one.folds if fold is not run]
        facts["controls"] = list(dict.fromkeys([*facts.get("controls", []), *known]))
    write_json(run.folder / "run.json", facts | {"equal_latency": found})


def _judged(
    one: Compared, ours: Compared, run: Fold, asked: Controls, shipped: Shipped, times: Mapping[str, Any]
) -> dict[str, Any]:
    """A row of `equal_latency.networks`."""
    scores = [score for fold in one.folds if (score := _score(fold, shipped)) is not None]
    found: dict[str, Any] = {
        "name": one.name,
        "folders": ["." if fold is run else f"{CONTROLS_FOLDER}/{fold.folder.name}" for fold in one.folds],
        "left_out": one.left_out,
        "failed": one.failed,
        "setting": one.setting,
        "search": [{"at": tried.at, "ratio": tried.ratio} for tried in one.search],
        "accuracy": scores,
        "mean": fmean(scores) if scores else None,
        "sd": stdev(scores) if len(scores) > 1 else None,
        "size_bytes": _bytes(one, shipped),
        "macs": figure(one.folds[0], "macs") if one.folds else None,
        "params": figure(one.folds[0], "params") if one.folds else None,
    } | _latency(one, run, shipped, times)
    if one.name == OURS or not scores:
        return found | {"verdict": None, "said": "", "difference": None, "images_p": None, "seeds_p": None}
    difference = _difference(ours, one, shipped, run)
    name = task_of(run.data.task)
    made_equal = bool(one.search)
    verdict = judge(difference, found["ratio"], found["ratio_interval"], asked.tolerance, made_equal=made_equal)
    return found | difference.as_dict() | {
        "verdict": verdict,
        "said": sentence(
            verdict, difference, found["ratio"], seeds=len(scores), percent=name.percent, score=name.score_name
        ),
    }  # fmt: skip


def _difference(ours: Compared, control: Compared, shipped: Shipped, run: Fold) -> Replicated:
    """Of the seeds that both have, on the same images."""
    pairs = list(zip(ours.folds, control.folds, strict=False))
    read = [[_answers(fold) for fold in pair] for pair in pairs]
    rules = task_of(run.data.task)
    if rules.name == "classification":
        right = [np.stack([pair[side].top1[shipped.name] == pair[side].labels_N for pair in read]) for side in (0, 1)]
        return replicated(*right)
    each = [
        resampled(
            baseline=control.top1[shipped.name],
            candidate=ours.top1[shipped.name],
            labels=ours.labels_N,
            score=rules.score,
        )
        for ours, control in read
    ]
    seeds_p = students_t([one.candidate for one in each], [one.baseline for one in each])
    return Replicated(fmean(one.difference for one in each), max(one.p_value for one in each), seeds_p)


def _answers(fold: Fold) -> answers.Answers:
    return answers.from_dict(read_json(_verified(fold) / answers.NAME))


def _verified(fold: Fold) -> Path:
    """The folder of the fold's last `verify`."""
    labels = [label for label in read_json(fold.folder / "run.json")["stages"] if label.endswith("-verify")]
    return fold.folder / "stages" / labels[-1]


def _score(fold: Fold, shipped: Shipped) -> float | None:
    files = read_json(_verified(fold) / manifest.NAME)["metrics"]["files"]
    found: float | None = files.get(shipped.name, {}).get("accuracy")
    return found


def _latency(one: Compared, run: Fold, shipped: Shipped, times: Mapping[str, Any]) -> dict[str, Any]:
    """Median over the seeds' networks of what was timed; speed-ups over the parent's file, ratios to ours."""
    labels = [f"{OURS if fold is run else fold.folder.name}/{shipped.name}" for fold in one.folds]
    timed = [times["of"][label] for label in labels if label in times["of"]]
    rows = {row["file"]: row for row in times["rows"]}
    pairs = {pair["candidate"]: pair for pair in times["pairs"]}
    own = f"{OURS}/{shipped.name}"
    found: dict[str, Any] = dict.fromkeys(("latency_ms", "ratio", "ratio_interval", "speedup", "noisy"))
    if not timed or timed[0] not in rows:
        return found
    latencies = [rows[name]["p50_ms"] for name in timed]
    middle = sorted(range(len(timed)), key=latencies.__getitem__)[len(timed) // 2]
    found["latency_ms"] = latencies[middle]
    parent = pairs.get(f"parent/parent.{shipped.format}")
    pair = pairs.get(timed[middle])
    found["ratio"] = 1.0 if timed[middle] == own else 1 / pair["speedup"] if pair else None
    if pair:
        found["ratio_interval"] = [1 / pair["interval"][1], 1 / pair["interval"][0]]
        found["noisy"] = pair["verdict"] == "NOISY"
    if parent and found["ratio"]:
        found["speedup"] = 1 / parent["speedup"] / found["ratio"]
    return found


def _bytes(one: Compared, shipped: Shipped) -> int | None:
    for fold in one.folds:
        if place := fold.refs["files"].get(shipped.name):
            return (fold.folder / place).stat().st_size
    return None
