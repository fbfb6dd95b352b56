"""Reads a run folder and nothing else, and writes what it says: report.html, report.json, report.md."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from compress.report import charts, distilled, wording
from compress.report.board import board
from compress.report.folder import (
    Benchmark,
    Export,
    ExportedFile,
    Metrics,
    NetworkFigures,
    Pair,
    Pruning,
    RunDescription,
    RunFolder,
    RunFolderError,
    Stage,
    Timing,
    Verification,
    VerifiedFile,
    read_folder,
)
from compress.report.headline import headline, machine
from compress.report.wording import NOT_MEASURED

COMPRESSING = ("prune", "quantize")
"""Stages that take something away; the network before the first of them is the parent."""

KINDS = ("parent", "float", "float16", "int8_weights", "int8")
"""Of files, the more compressed the later."""

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
        "report.html": as_html(report),
    }
    for name, text in texts.items():
        temporary = run_folder / f".{name}.{os.getpid()}"
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(run_folder / name)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise RunFolderError(run_folder / name, f"cannot be written: {error.strerror}") from error
    return run_folder / "report.html"


def read_report(run_folder: Path) -> dict[str, Any]:
    """Everything the report says, as JSON. Raises RunFolderError.

    Figures keep the manifests' names, units and digits; what was not measured is None.
    """
    return _report(read_folder(Path(run_folder)))


def _report(folder: RunFolder) -> dict[str, Any]:
    stages, undistilled = folder.stages, folder.undistilled
    parent = _parent(folder)
    files, stale = _files(stages, parent)
    best, baseline = _best(files)
    verification, benchmark = _last(stages, Verification), _last(stages, Benchmark)
    networks = _stages(stages, parent, files, best)
    ablation = distilled.ablation(folder, networks, best, _report(undistilled) if undistilled else None)
    measured = board(benchmark[1]) if benchmark else None
    report = {
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
        ),
        "machine": benchmark and machine(benchmark[1].conditions),
        "run": folder.run.model_dump(mode="json", exclude={"name"}),
        "recipe": folder.recipe,
        "unfinished": folder.unfinished,
        "stale": stale,
        "parent": parent and _network(parent.figures, parent, parent.stage),
        "stages": networks,
        "files": files,
        "layers": _layers(stages, parent),
        "verify": verification and _verification(stages, *verification),
        "benchmark": benchmark and _benchmark(stages, *benchmark),
        "board": measured,
        "knowledge": distilled.knowledge(stages, undistilled.stages if undistilled else []),
        "ablation": ablation,
    }
    return report | {"warnings": _warnings(report), "conditions": _conditions(folder.run), "notes": _notes(folder)}


def summary_rows(report: dict[str, Any]) -> list[dict[str, str]]:
    """One row per network and exported file, in words, all with the same keys: the headings of a table.

    A network that was exported has a row per file and runtime, with figures measured on the file; one that was not
    has a single row with the torch figures. Print `report["machine"]["statement"]` below: latencies belong to it.
    Emulated cores have instructions in place of latencies.
    """
    rows = []
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
                    "accuracy": wording.percent(file["accuracy"]) + source,
                    "vs parent": "parent" if file["kind"] == "parent" else wording.points(file["difference"]),
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
    return [*rows, *_ablated_row(report["ablation"], rows)]


def _counted(file: dict[str, Any], board: dict[str, Any], absent: str) -> dict[str, str]:
    """Instructions and estimated cycles of a file, per emulated core."""
    own = [count for count in board["counts"] if count["file"] == file["file"]]

    def said(name: str) -> str:
        figures = [
            f"{wording.count(count[name])} ({wording.core(count['cpu'])})" for count in own if count[name] is not None
        ]
        return ", ".join(figures) or absent

    return {"instructions": said("instructions"), "cycles, estimated": said("cycles_estimated")}


def _ablated_row(ablation: dict[str, Any] | None, rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The network that had no teacher; only its accuracy is another."""
    if not ablation or not rows:
        return []
    what = "" if ablation["of"] in (None, "torch") else f", {ablation['of']}"
    row = dict.fromkeys(rows[0], NOT_MEASURED) | {"network": f"without distillation{what}"}
    if ablation["without"] is not None:
        source = " (torch)" if ablation["of"] == "torch" else ""
        row["accuracy"] = f"{wording.percent(ablation['without'])} ({wording.points(ablation['difference'])}){source}"
        row["vs parent"] = wording.points(ablation["from_parent"])
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


# --------------------------------------------------------------------------------------------------- stages and files

_M = TypeVar("_M", bound=Metrics)


def _last(stages: list[Stage], kind: type[_M]) -> tuple[int, _M] | None:
    """Position and metrics of the last stage with such metrics."""
    for at in reversed(range(len(stages))):
        metrics = stages[at].metrics
        if type(metrics) is kind:
            return at, metrics
    return None


@dataclass(frozen=True)
class _Parent:
    figures: NetworkFigures
    stage: str | None
    """None for a network that came with its weights."""


def _parent(folder: RunFolder) -> _Parent | None:
    """The network before anything was taken from it, None where the run does not say anything of it."""
    networks = {stage.manifest.folder: stage.manifest.network for stage in folder.stages if stage.manifest.network}
    for stage in reversed(folder.stages):
        named = stage.manifest.product.parent
        figures = networks.get(Path(named).parent.name) if named else None
        if named and figures:
            return _Parent(figures, Path(named).parent.name)
    found = None
    for stage in folder.stages:
        manifest = stage.manifest
        if manifest.stage in COMPRESSING:
            if not found and isinstance(stage.metrics, Pruning):
                return _Parent(NetworkFigures(macs=stage.metrics.macs_before), None)
            break
        if manifest.network:
            found = _Parent(manifest.network, manifest.folder)
    return found


def _exports(stages: list[Stage]) -> dict[str, tuple[int, ExportedFile]]:
    """Every exported file by name, the later one where two have the same, with its stage's position."""
    found: dict[str, tuple[int, ExportedFile]] = {}
    for at, stage in enumerate(stages):
        if isinstance(stage.metrics, Export):
            found |= {name: (at, file) for name, file in stage.metrics.files.items()}
    return found


def _unchanged(stages: list[Stage], at: int) -> Callable[[str], bool]:
    """Whether the stage at that position had before it the file that the run ends with."""
    before, now = _exports(stages[:at]), _exports(stages)

    def same(name: str) -> bool:
        if name not in now:
            return not now  # a run without an export stage: nothing to compare with
        if name not in before:
            return False
        (then_at, then), (now_at, file) = before[name], now[name]
        return then_at == now_at or (file.sha256 is not None and then.sha256 == file.sha256)

    return same


def _network_of(kind: str, stages: list[Stage], parent: _Parent | None) -> tuple[str | None, NetworkFigures | None]:
    """Stage and figures of the network that a file of that kind was made from, given the stages before its export."""
    if kind == "parent":
        return (parent.stage, parent.figures) if parent else (None, None)
    for stage in reversed(stages):
        manifest = stage.manifest
        network = manifest.network
        if network and not network.simulated and network.numbers.startswith("int8") == (kind == "int8"):
            return manifest.folder, manifest.network
    return None, None


def _files(stages: list[Stage], parent: _Parent | None) -> tuple[list[dict[str, Any]], list[str]]:
    """Every exported file in every runtime it was timed in, and a sentence per figure that a later export made void."""
    verification, benchmark = _last(stages, Verification), _last(stages, Benchmark)
    verified, timed, pairs, stale = {}, [], [], []
    if verification:
        at, same = verification[0], _unchanged(stages, verification[0])
        verified = {name: file for name, file in verification[1].files.items() if same(name)}
        stale += [_stale(stages[at], name) for name in verification[1].files if not same(name)]
    if benchmark:
        at, same = benchmark[0], _unchanged(stages, benchmark[0])
        timed = [row for row in benchmark[1].rows if same(row.file)]
        pairs = [pair for pair in benchmark[1].pairs if same(pair.baseline) and same(pair.candidate)]
        names = dict.fromkeys(row.file for row in benchmark[1].rows)
        stale += [_stale(stages[at], name) for name in names if not same(name)]

    exports = _exports(stages) or {row.file: (len(stages), _as_timed(row)) for row in timed}
    found: list[dict[str, Any]] = []
    for name, (at, file) in exports.items():
        own = [row for row in timed if row.file == name]
        entry = _file(name, file, verified.get(name), *_network_of(file.kind, stages[:at], parent))
        found += [entry | {"runtime": row.runtime, "timing": _timing(row)} for row in own] or [entry]
    found = [entry | _against_parent(entry, found, parent, pairs) for entry in found]
    order = {kind: place for place, kind in enumerate(KINDS)}
    found.sort(key=lambda file: (order.get(file["kind"], len(order)), file["runtime"] or "", file["file"]))
    return found, stale


def _as_timed(row: Timing) -> ExportedFile:
    """What a benchmark says of a file that no stage of the run exported."""
    return ExportedFile(format=Path(row.file).suffix.lstrip("."), kind=row.kind, size_bytes=row.size_bytes)


def _file(
    name: str, file: ExportedFile, verified: VerifiedFile | None, stage: str | None, network: NetworkFigures | None
) -> dict[str, Any]:
    """An exported file with its accuracy: measured on it, or else that of the torch network it was made from."""
    measured: VerifiedFile | NetworkFigures | None = None
    source = None
    if verified and verified.accuracy is not None:
        measured, source = verified, "file"
    elif network and network.accuracy is not None:
        measured, source = network, "torch"
    return {
        "file": name,
        "kind": file.kind,
        "format": file.format,
        "size_bytes": file.size_bytes,
        "sha256": file.sha256,
        "stage": stage,
        "numbers": _numbers(file.kind, network),
        "runtime": verified.runtime if verified else None,
        "accuracy": measured and measured.accuracy,
        "accuracy_of": source,
        "images": measured and measured.images,
        "timing": None,
    }


def _numbers(kind: str, network: NetworkFigures | None) -> str | None:
    """What the kind of a file does not say of the numbers it computes in."""
    if kind in wording.KINDS:
        return f"{wording.kind(kind)}, computes in float32"
    mixed = kind == "int8" and network is not None and network.numbers != "int8"
    return network.numbers if network and mixed else None


def _against_parent(
    file: dict[str, Any], files: list[dict[str, Any]], parent: _Parent | None, pairs: list[Pair]
) -> dict[str, Any]:
    """How far a file is from the parent's file, or in accuracy from the torch parent where only one was verified."""
    base = _counterpart(file, files)
    if base and base["accuracy_of"] == file["accuracy_of"]:
        origin, accuracy = base["file"], base["accuracy"]
    else:
        origin, accuracy = "torch parent", parent.figures.accuracy if parent else None
    difference = _minus(file["accuracy"], accuracy)
    alone = [(other["file"], other["runtime"]) for other in files].count((file["file"], file["runtime"])) == 1
    return {
        "difference": difference,
        "difference_from": None if difference is None else origin,
        "times_smaller": _over(base["size_bytes"], file["size_bytes"]) if base else None,
        "pair": _pair(file, base, pairs, any_threads=alone),
    }


def _stale(stage: Stage, name: str) -> str:
    return f"{stage.manifest.folder} measured {name} before it was exported anew: its figures are left out"


def _timing(row: Timing) -> dict[str, Any]:
    """A row's figures with its frames per second and its spread, (p90 - p50) / p50."""
    timing = row.model_dump(mode="json", exclude={"file", "kind", "runtime", "size_bytes", "sha256"})
    timing["fps"] = 1000 / row.p50_ms
    timing["spread"] = None if row.p90_ms is None else (row.p90_ms - row.p50_ms) / row.p50_ms
    return timing


def _counterpart(file: dict[str, Any], files: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The parent's file to compare with: the same format, and where both were timed the same runtime and threads."""
    same = [other for other in files if other["kind"] == "parent" and other["format"] == file["format"]]
    timed = [other for other in same if _session(other) == _session(file)]
    return next(iter(timed or same), None)


def _session(file: dict[str, Any]) -> tuple[Any, ...] | None:
    return file["timing"] and (file["runtime"], file["timing"]["threads"])


def _pair(
    file: dict[str, Any], base: dict[str, Any] | None, pairs: list[Pair], *, any_threads: bool
) -> dict[str, Any] | None:
    """The speed-up over the parent: measured in turns, or else the ratio of the medians, which has no interval.

    A pair that does not name its threads counts only where `any_threads` says that there is one row it can mean.
    """
    if file["kind"] == "parent" or not file["timing"] or not base or _session(base) != _session(file):
        return None
    wanted = (file["file"], base["file"], file["runtime"])
    threads = {file["timing"]["threads"], None} if any_threads else {file["timing"]["threads"]}
    for pair in pairs:
        if (pair.candidate, pair.baseline, pair.runtime) == wanted and pair.threads in threads:
            return pair.model_dump(mode="json", exclude={"candidate", "runtime", "threads"}) | {"by": "turns"}
    return {
        "baseline": base["file"],
        "speedup": base["timing"]["p50_ms"] / file["timing"]["p50_ms"],
        "interval": None,
        "aa_ratio": None,
        "verdict": None,
        "by": "ratio of medians",
    }


def _best(files: list[dict[str, Any]]) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The file the headline speaks of, and the parent's file beside it.

    The most compressed kind, in the runtime where it is fastest; without a benchmark, one whose accuracy was measured.
    """
    kinds = [kind for kind in reversed(KINDS) if any(file["kind"] == kind for file in files)]
    if not kinds:
        return None, None
    best = min(
        (file for file in files if file["kind"] == kinds[0]),
        key=lambda file: (file["timing"]["p50_ms"] if file["timing"] else math.inf, file["accuracy_of"] != "file"),
    )
    return best, _counterpart(best, files)


def _stages(
    stages: list[Stage], parent: _Parent | None, files: list[dict[str, Any]], best: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """Every stage with the network before and after it; frames per second in the headline's runtime and threads.

    Training changes no shape: a network that was only trained on before it was exported is as fast as its file.
    """
    fps: dict[str | None, float] = {}
    for file in files:
        if best and file["timing"] and _session(file) == _session(best):
            fps.setdefault(file["stage"], file["timing"]["fps"])
    shapes = {stage.manifest.folder: _shape(stage.manifest.network) for stage in stages if stage.manifest.network}
    by_shape = {shapes[name]: value for name, value in fps.items() if name in shapes}
    fps |= {name: by_shape[shape] for name, shape in shapes.items() if name not in fps and shape in by_shape}
    found = []
    before = None
    if parent and parent.stage is None:
        before = _network(parent.figures, parent, None) | {"fps": fps.get(None)}
    for stage in stages:
        manifest, metrics = stage.manifest, stage.metrics
        after = None
        if manifest.network:
            after = _network(manifest.network, parent, manifest.folder) | {"fps": fps.get(manifest.folder)}
        found.append(
            manifest.model_dump(mode="json", exclude={"network", "metrics"})
            | {
                "network": after,
                "before": before if after else None,
                "points": after and _minus(after["accuracy"], before["accuracy"] if before else None),
                "training": [
                    epoch.model_dump() | {"epoch": number}  # `prune` starts its count anew in every step
                    for number, epoch in enumerate(getattr(metrics, "history", []), start=1)
                ],
                "pruning": metrics.model_dump(mode="json", exclude={"history"})
                if isinstance(metrics, Pruning)
                else None,
            }
        )
        before = after or before
    return found


def _shape(network: NetworkFigures) -> tuple[Any, ...]:
    """What decides a network's speed: precision and layers. Equal for networks that differ in their weights alone."""
    layers = [(layer.name, layer.kind, layer.inputs, layer.outputs, layer.groups) for layer in network.layers]
    return network.precision, tuple(layers) or object()


def _network(figures: NetworkFigures, parent: _Parent | None, stage: str | None) -> dict[str, Any]:
    """A torch network's figures without its layers, and how far it is from the parent's."""
    origin = parent.figures if parent else NetworkFigures()
    return figures.model_dump(mode="json", exclude={"layers"}) | {
        "stage": stage,
        "is_parent": bool(parent and parent.stage == stage),
        "numbers": figures.numbers,
        "simulated": figures.simulated,
        "difference": _minus(figures.accuracy, origin.accuracy),
        "times_fewer_macs": _over(origin.macs, figures.macs),
        "times_fewer_params": _over(origin.params, figures.params),
    }


def _layers(stages: list[Stage], parent: _Parent | None) -> list[dict[str, Any]]:
    """The layers of the last pruned network beside those of the parent, in order of execution; [] without pruning."""
    pruned = [stage.manifest.network for stage in stages if stage.manifest.stage == "prune" and stage.manifest.network]
    if not pruned or not parent:
        return []
    after = {layer.name: layer for layer in pruned[-1].layers}
    return [
        {
            "name": layer.name,
            "kind": "depthwise" if 1 < layer.groups == layer.inputs else layer.kind,
            "kernel": layer.kernel,
            "channels": [layer.outputs, after[layer.name].outputs if layer.name in after else None],
            "macs": [layer.macs, after[layer.name].macs if layer.name in after else None],
            "params": [layer.params, after[layer.name].params if layer.name in after else None],
            "cut": layer.name not in after or after[layer.name].outputs < layer.outputs,
        }
        for layer in parent.figures.layers
    ]


def _verification(stages: list[Stage], at: int, metrics: Verification) -> dict[str, Any]:
    """With `costly`, the layers whose rounding costs most at the output, the worst first."""
    noise = metrics.sqnr
    by_name = {layer.layer: layer.model_dump() for layer in noise.layers} if noise else {}
    costly = [by_name[name] for name in (noise.worst if noise else []) if name in by_name]
    return {"stage": stages[at].manifest.folder, "costly": costly} | metrics.model_dump(mode="json")


def _benchmark(stages: list[Stage], at: int, metrics: Benchmark) -> dict[str, Any]:
    rows = [{"file": row.file, "kind": row.kind, "runtime": row.runtime} | _timing(row) for row in metrics.rows]
    own = metrics.model_dump(mode="json", include={"conditions", "pairs", "notes"})
    return {"stage": stages[at].manifest.folder} | own | {"rows": rows}


def _minus(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other


def _over(value: float | None, other: float | None) -> float | None:
    return None if not value or not other else value / other


# ---------------------------------------------------------------------------------------------------- what goes with it


def _conditions(run: RunDescription) -> dict[str, str]:
    """What the run's figures hold for, by name and in words; what the run does not say is left out."""
    data, preprocess = run.data, run.preprocess
    labels = ", ".join(data.labels[:12]) + (", …" if len(data.labels) > 12 else "")
    images = [
        f"{number:,} for {use}" for number, use in ((data.train, "training"), (data.evaluation, "evaluation")) if number
    ]
    found = {
        "Recipe hash": run.recipe_hash,
        "Seed": run.seed,
        "Data": ", ".join([data.use, *images] if data.use else images),
        "Data fingerprint": data.fingerprint,
        "Classes": f"{len(data.labels)}: {labels}" if data.labels else None,
        "Input": preprocess,
        "Model": run.model,
        "Trained on": run.device,
        "Host CPU": run.cpu,
        "Threads in training": run.threads,
        "Processes in training": run.processes if run.processes != 1 else None,
        "Platform": run.platform,
        "Versions": {
            **({"compress": run.compress} if run.compress else {}),
            **({"Python": run.python} if run.python else {}),
        }
        | run.versions,
        "Started": run.started and wording.moment(run.started),
        "Time taken": None if run.seconds is None else wording.duration(run.seconds),
    }
    return {name: wording.as_text(value) for name, value in found.items() if value not in (None, "", {})}


def _notes(folder: RunFolder) -> list[dict[str, Any]]:
    """What data and stages remarked, each sentence once per place."""
    found = [("data", folder.run.data.notes)]
    for stage in folder.stages:
        own = list(stage.manifest.notes)
        if isinstance(stage.metrics, (Verification, Benchmark)):
            own += stage.metrics.notes
        found.append((stage.manifest.folder, own))
    return [{"where": where, "texts": list(dict.fromkeys(texts))} for where, texts in found if texts]


def _warnings(report: dict[str, Any]) -> list[str]:
    """What a reader must not overlook, most important first."""
    found = []
    if report["verify"] and report["verify"]["verdict"] != "PASS":
        found.append(
            f"Parity {report['verify']['verdict']}: exported files do not agree with the network they were made from."
            f" Do not ship them. {report['verify']['reason']}".rstrip()
        )
    if report["machine"] and not report["machine"]["is_arm"]:
        found.append(report["machine"]["statement"])
    noisy = [pair for pair in (report["benchmark"] or {}).get("pairs", []) if pair["verdict"] == "NOISY"]
    if noisy:
        names = ", ".join(dict.fromkeys(pair["candidate"] for pair in noisy))
        found.append(
            f"Noisy measurement ({names}): take the speed-up for a rough figure and measure again on a quiet machine."
        )
    found += _board_warnings(report["board"])
    files = {file["file"]: file for file in report["files"]}
    best = files.get(report["headline"]["file"])
    if best and best["timing"]:
        quicker = [
            file
            for file in files.values()
            if _session(file) == _session(best) and file["timing"]["p50_ms"] < best["timing"]["p50_ms"]
        ]
        found += [
            f"{file['file']} is faster here than {best['file']}:"
            f" {wording.ms(file['timing']['p50_ms'])} against {wording.ms(best['timing']['p50_ms'])} at p50."
            for file in quicker
        ]
    found += _ablation_warnings(report["ablation"])
    if report["unfinished"]:
        found.append(f"Unfinished run: {', '.join(report['unfinished'])} left no result.")
    last, network = next(
        ((stage["folder"], stage["network"]) for stage in reversed(report["stages"]) if stage["network"]), (None, None)
    )
    if network and network["simulated"]:
        sentence = f"What {last} left is {network['numbers']}, simulated in training: no runtime here executes it."
        found.append(f"{sentence} There is no file of it, so no size and no latency.")
    elif last and best and best["stage"] not in (last, None):
        found.append(
            f"The network that {last} left was not exported: the headline speaks of {best['file']},"
            f" made from {best['stage']}."
        )
    return found + [f"{sentence[0].upper()}{sentence[1:]}." for sentence in report["stale"]]


def _board_warnings(board: dict[str, Any] | None) -> list[str]:
    if not board:
        return []
    found = []
    for sample in board["accuracy"]:
        if sample["exact"] and not sample["equal"]:
            largest = wording.apart(sample)
            found.append(
                f"{sample['file']} computes other outputs on the machine that measured than here:"
                f" {sample['differing']:,} of {sample['outputs']:,} differ, by at most {largest}"
                f" ({wording.runtime(sample['runtime'])} {sample['versions']})."
            )
    for entry in board["parity"]:
        if entry["exact"] and entry["differing"]:
            found.append(
                f"{entry['file']} computes other outputs on an emulated {wording.core(entry['cpu'])} than here:"
                f" {entry['differing']:,} of {entry['outputs']:,} differ, by at most {wording.apart(entry)}."
            )
    for series in board["sustained"]:
        if series["verdict"] not in (None, "OK"):
            end = f" takes {wording.ratio(series['slowdown'])} as long at the end as at the start of"
            during = f"{end if series['slowdown'] else ', during'} {wording.duration(60 * series['minutes'])}"
            found.append(f"The machine throttles: {series['file']}{during} without a pause.")
    return found


def _ablation_warnings(ablation: dict[str, Any] | None) -> list[str]:
    if not ablation:
        return []
    found = []
    if (ablation["difference"] or 0) > 0:
        images = round(ablation["difference"] * ablation["images"]) if ablation["images"] else None
        size = f"{images:,} of {ablation['images']:,} images, one seed" if images is not None else "one seed"
        found.append(f"{wording.distilled(ablation['with'], ablation['without'])} ({size}).")
    if not ablation["finished"] or ablation["without"] is None:
        found.append("The run without distillation did not finish: what distillation gained is not known.")
    if ablation["failed"]:
        found.append(f"Parity of the run without distillation failed: {ablation['failed']}.")
    return found


# ------------------------------------------------------------------------------------------------------------ as text


def as_html(report: dict[str, Any]) -> str:
    """One page without scripts or references to anything outside it."""
    environment = _environment(autoescape=True)
    drawings = {
        "tradeoff": charts.tradeoff(report["files"]),
        "channels": charts.channels(report["layers"]),
        "knowledge": {found["stage"]: charts.knowledge(found) for found in report["knowledge"]},
        "sustained": [(series, charts.sustained(series)) for series in (report["board"] or {}).get("sustained", [])],
        "lsb": [
            (item, charts.lsb_histogram(item, allowed=report["verify"]["tolerance_lsb"]))
            for item in (report["verify"] or {}).get("agreement", [])
            if any(item["histogram"].values())
        ],
        "training": {
            stage["folder"]: charts.training_curve(stage["folder"], stage["training"])
            for stage in report["stages"]
            if stage["training"]
        },
    }
    return environment.get_template("template.html").render(report=report, charts=drawings)


def as_markdown(report: dict[str, Any]) -> str:
    """The report's tables for a README or a pull request."""
    environment = _environment(autoescape=False, finalize=_escape_markdown)
    return environment.get_template("template.md").render(report=report)


@cache
def _environment(*, autoescape: bool, finalize: Callable[[Any], Any] | None = None) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=autoescape,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for name in (
        "percent",
        "points",
        "ms",
        "fps",
        "ratio",
        "size",
        "count",
        "duration",
        "runtime",
        "three_digits",
        "smaller",
        "agreement",
        "uncounted",
        "moment",
        "decibels",
        "measure",
        "group",
        "figure",
        "change",
        "looked_at",
        "as_text",
        "apart",
        "core",
        "span",
    ):
        environment.filters[name] = getattr(wording, name)
    environment.filters["verbatim"] = lambda text: Markup(" ".join(text.split()))
    return environment


def _escape_markdown(value: Any) -> Any:
    """Text that stays one cell of a table and starts no markup; Markup passes as it is."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "".join(f"\\{c}" if c in "\\|<*[]`" else c for c in " ".join(value.split()))
