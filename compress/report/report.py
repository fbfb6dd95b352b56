"""Reads a run folder and nothing else, and writes what it says: report.html, report.json, report.md."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from compress.report import classes, distilled, wording
from compress.report import controls as compared
from compress.report.board import board
from compress.report.files import best_of, files_of, last, parent_of
from compress.report.folder import RunFolder, RunFolderError, read_folder
from compress.report.headline import headline, machine
from compress.report.outputs import outputs
from compress.report.pages import as_html, as_markdown
from compress.report.parts import Benchmark, Verification
from compress.report.remarks import conditions, notes, warnings
from compress.report.sensitivity import sensitivity_of
from compress.report.speed import speed_of
from compress.report.stages import benchmark_of, layers_of, network_of, stages_of, verification_of
from compress.report.wording import score_of
from compress.shown import without_secrets

FORMAT = 1
"""Of report.json; goes up when a field changes its meaning."""


def write_report(run_folder: Path) -> Path:
    """Path of report.html, written into the run folder together with report.json and report.md.

    Each file is replaced in one step. The same folder gives the same bytes. Raises RunFolderError.
    """
    run_folder = Path(run_folder)
    report = read_report(run_folder)
    texts = {
        "report.json": json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        "report.md": as_markdown(report),
        "report.html": as_html(report, run_folder),
    }
    for name, text in texts.items():
        temporary = run_folder / f".{name}.{os.getpid()}"
        try:
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
            temporary.replace(run_folder / name)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise RunFolderError(run_folder / name, f"cannot be written: {error.strerror}") from error
    return run_folder / "report.html"


def read_report(run_folder: Path) -> dict[str, Any]:
    """Everything the report says, as JSON. Raises RunFolderError.

    Figures keep the manifests' names, units and digits; what was not measured is None.
    """
    found: dict[str, Any] = without_secrets(_report(read_folder(Path(run_folder))))
    return found


def _report(folder: RunFolder) -> dict[str, Any]:
    stages, undistilled = folder.stages, folder.undistilled
    parent = parent_of(folder)
    files, stale = files_of(stages, parent)
    best, baseline = best_of(files)
    verification, benchmark = last(stages, Verification), last(stages, Benchmark)
    networks = stages_of(stages, parent, files, best)
    ablation = distilled.ablation(folder, networks, best, _report(undistilled) if undistilled else None)
    measured = board(benchmark[1]) if benchmark else None
    controls = compared.controls(folder.run)
    verify = verification and verification_of(stages, *verification)
    report: dict[str, Any] = {
        "format": FORMAT,
        "name": folder.run.name,
        "headline": headline(
            networks,
            parent.figures if parent else None,
            best,
            baseline,
            verification=verification and verification[1],
            benchmark=benchmark and benchmark[1],
            board=measured,
            ablation=ablation,
            controls=(compared.fact(controls), compared.said(controls)) if controls else None,
            score=score_of(folder.run.data.task),
        ),
        "machine": benchmark and machine(benchmark[1].conditions),
        "run": folder.run.model_dump(mode="json", exclude={"name"}),
        "recipe": folder.recipe,
        "unfinished": folder.unfinished,
        "missing": folder.planned,
        "stopped": _stopped(folder),
        "stale": stale,
        "parent": parent and network_of(parent.figures, parent, parent.stage),
        "stages": networks,
        "files": files,
        "outputs": outputs(
            folder.run.data.task,
            best,
            baseline,
            verification and verification[1],
            next((stage.manifest.network for stage in reversed(stages) if stage.manifest.network), None),
        ),
        "layers": layers_of(stages, parent),
        "verify": verify,
        "recall": classes.recall(verify, folder.run.data.labels),
        "data": classes.data(folder.run, stages, verify),
        "benchmark": benchmark and benchmark_of(stages, *benchmark),
        "board": measured,
        "knowledge": distilled.knowledge(stages, undistilled.stages if undistilled else []),
        "ablation": ablation,
        "controls": controls,
        "speed": speed_of(stages),
        "sensitivity": sensitivity_of(stages),
    }
    _not_reached(report["headline"]["facts"], folder.planned)
    return report | {"warnings": warnings(report), "conditions": conditions(folder.run), "notes": notes(folder)}


def _stopped(folder: RunFolder) -> dict[str, Any] | None:
    """How far a run came that has not come to its end; None for one that has."""
    if folder.run.finished:
        return None
    log = folder.log
    return {
        "ended": log.ended,
        "when": log.when,
        "running": log.running,
        "training": [epoch.model_dump() for epoch in log.epochs] if log.running else [],
    }


def _not_reached(facts: dict[str, dict[str, str]], missing: list[str]) -> None:
    """Where a stage has not ended, a figure is not "not in this run"."""
    for name, use in (("speed", "benchmark"), ("size", "export"), ("parity", "verify")):
        stage = next((stage for stage in missing if stage.endswith(f"-{use}")), None)
        if stage and facts[name]["value"] == wording.NOT_MEASURED:
            facts[name]["detail"] = f"not reached: {stage} has not ended"
