"""The report as a table of a few columns, for a terminal."""

from __future__ import annotations

from typing import Any

from compress.report import wording
from compress.report.controls import names
from compress.report.folder import NO_DISTILLATION
from compress.report.wording import NOT_MEASURED


def summary_rows(report: dict[str, Any]) -> list[dict[str, str]]:
    """One row per network and exported file, in words, all with the same keys: the headings of a table.

    A network that was exported has a row per file and runtime, with figures measured on the file; one that was not
    has a single row with the torch figures. Print `report["machine"]["statement"]` below: latencies belong to it.
    Emulated cores have instructions in place of latencies.
    """
    rows = []
    score = wording.score_of(report["run"]["data"]["task"])
    emulated = bool(report["machine"] and report["machine"]["emulated"])
    networks = [stage for stage in report["stages"] if stage["network"]]
    if report["parent"] and report["parent"]["stage"] is None:
        networks.insert(0, {"folder": None, "network": report["parent"]})
    for stage in networks:
        network = stage["network"]
        files: list[dict[str, Any]] = [file for file in report["files"] if file["stage"] == stage["folder"]]
        absent = wording.SIMULATED if network["simulated"] else NOT_MEASURED
        for file in files or [_without_file(network)]:
            timing, pair = file["timing"] or {}, file["pair"] or {}
            source = f" ({file['accuracy_of']})" if file["accuracy_of"] == "torch" else ""
            rows.append(
                {
                    "network": _label(file, files, stage["folder"] or "as loaded", network),
                    score.name: score.said(file["accuracy"]) + source,
                    "vs parent": "parent" if file["kind"] == "parent" else score.change(file["difference"]),
                    "MACs": wording.count(network["macs"]),
                    "params": wording.count(network["params"]),
                    "size": wording.size(file["size_bytes"]) if file["file"] else absent,
                }
                | (
                    _counted(file, report["board"], absent)
                    if emulated
                    else {
                        "p50": wording.ms(timing["p50_ms"]) if timing else absent,
                        "fps": wording.three_digits(timing["fps"]) if timing else absent,
                        "speed-up": "parent"
                        if file["kind"] == "parent"
                        else wording.ratio(pair["speedup"])
                        if pair
                        else absent,
                    }
                )
            )
    ablated = [] if names(report["controls"], NO_DISTILLATION) else _ablated_row(report["ablation"], rows, score)
    return [*rows, *ablated, *_control_rows(report, rows, score)]


def _control_rows(report: dict[str, Any], rows: list[dict[str, str]], score: wording.Score) -> list[dict[str, str]]:
    """A row for each control, timed in a session of their own; who wins stands behind its name."""
    controls = report["controls"]
    if not controls or not rows:
        return []
    found = []
    for control in controls["rows"]:
        if control["ours"]:
            continue
        told = {"win": "beaten", "lose": "better", "tie": "a tie", "trade": "a trade"}.get(control["verdict"])
        row = dict.fromkeys(rows[0], NOT_MEASURED)
        row["network"] = f"control {control['name']}" + (f": {told}" if told else "")
        row |= {score.name: control["accuracy_said"], "MACs": wording.count(control["macs"])}
        row |= {"params": wording.count(control["params"]), "size": wording.size(control["size_bytes"])}
        parent = next((file for file in report["files"] if file["file"] == f"parent.{_format(controls['file'])}"), None)
        if parent and parent["accuracy_of"] == "file" and control["mean"] is not None:
            row["vs parent"] = score.change(control["mean"] - parent["accuracy"])
        if control["latency_ms"] is not None and "p50" in row:
            row["p50"], row["fps"] = (
                wording.ms(control["latency_ms"]),
                wording.three_digits(1000 / control["latency_ms"]),
            )
            row["speed-up"] = wording.ratio(control["speedup"])
        found.append(row)
    return found


def _format(file: str) -> str:
    return file.rpartition(".")[2]


def _counted(file: dict[str, Any], board: dict[str, Any], absent: str) -> dict[str, str]:
    """Instructions and estimated cycles of a file, per emulated core."""
    own = [count for count in board["counts"] if count["file"] == file["file"]]

    def said(name: str) -> str:
        figures = [
            f"{wording.count(count[name])} ({wording.core(count['cpu'])})" for count in own if count[name] is not None
        ]
        return ", ".join(figures) or absent

    return {"instructions": said("instructions"), "cycles, estimated": said("cycles_estimated")}


def _ablated_row(
    ablation: dict[str, Any] | None, rows: list[dict[str, str]], score: wording.Score
) -> list[dict[str, str]]:
    """The network that had no teacher; only its score is another."""
    if not ablation or not rows:
        return []
    what = "" if ablation["of"] in (None, "torch") else f", {ablation['of']}"
    row = dict.fromkeys(rows[0], NOT_MEASURED) | {"network": f"without distillation{what}"}
    if ablation["without"] is not None:
        source = " (torch)" if ablation["of"] == "torch" else ""
        row[score.name] = f"{score.said(ablation['without'])} ({score.change(ablation['difference'])}){source}"
        row["vs parent"] = score.change(ablation["from_parent"])
        row |= {"MACs": wording.count(ablation["macs"]), "params": wording.count(ablation["params"])}
    return [row]


def _label(file: dict[str, Any], files: list[dict[str, Any]], stage: str, network: dict[str, Any]) -> str:
    """Stage and file; the runtime and its threads only where they tell two rows of one file apart."""
    if not file["file"]:
        return f"{stage}, {network['precision']}" if network["simulated"] else stage
    label = f"{stage} {file['file']}"
    if file["kind"] == "int8" and file["numbers"]:
        label += f", {file['numbers']}"
    if len([other for other in files if other["file"] == file["file"]]) > 1:
        label += f", {wording.runtime(file['runtime'])}, threads {file['timing']['threads']}"
    return label


def _without_file(network: dict[str, Any]) -> dict[str, Any]:
    return {
        "file": None,
        "kind": "parent" if network["is_parent"] else None,
        "runtime": None,
        "accuracy": network["accuracy"],
        "accuracy_of": None if network["accuracy"] is None else "torch",
        "difference": network["difference"],
        "size_bytes": None,
        "timing": None,
        "pair": None,
    }
