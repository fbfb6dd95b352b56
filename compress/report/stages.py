"""The torch networks of a run stage by stage, and what its verify and benchmark stages found."""

from __future__ import annotations

from typing import Any

from compress.report import wording
from compress.report.files import Parent, minus, over, session, timing_of
from compress.report.folder import Stage
from compress.report.parts import Benchmark, NetworkFigures, Pruning, Verification


def stages_of(
    stages: list[Stage], parent: Parent | None, files: list[dict[str, Any]], best: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """Every stage with the network before and after it; frames per second in the headline's runtime and threads.

    Training changes no shape: a network that was only trained on before it was exported is as fast as its file.
    """
    fps: dict[str | None, float] = {}
    for file in files:
        if best and file["timing"] and session(file) == session(best):
            fps.setdefault(file["stage"], file["timing"]["fps"])
    sizes: dict[str | None, int | None] = {}
    for file in files:
        if best and file["format"] == best["format"]:
            sizes[file["stage"]] = file["size_bytes"]  # of several kinds the most compressed, which comes last
    shapes = {stage.manifest.folder: _shape(stage.manifest.network) for stage in stages if stage.manifest.network}
    by_shape = {shapes[name]: value for name, value in fps.items() if name in shapes}
    fps |= {name: by_shape[shape] for name, shape in shapes.items() if name not in fps and shape in by_shape}
    found = []
    before = None
    if parent and parent.stage is None:
        before = network_of(parent.figures, parent, None) | {"fps": fps.get(None)}
    for stage in stages:
        manifest, metrics = stage.manifest, stage.metrics
        after = None
        if manifest.network:
            after = network_of(manifest.network, parent, manifest.folder) | {"fps": fps.get(manifest.folder)}
        found.append(
            manifest.model_dump(mode="json", exclude={"network", "metrics"})
            | {
                "key_settings": key_settings(manifest.stage, manifest.settings),
                "size_bytes": sizes.get(manifest.folder),
                "network": after,
                "before": before if after else None,
                "points": after and minus(after["accuracy"], before["accuracy"] if before else None),
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


def network_of(figures: NetworkFigures, parent: Parent | None, stage: str | None) -> dict[str, Any]:
    """A torch network's figures without its layers, and how far it is from the parent's."""
    origin = parent.figures if parent else NetworkFigures()
    return figures.model_dump(mode="json", exclude={"layers"}) | {
        "stage": stage,
        "is_parent": bool(parent and parent.stage == stage),
        "numbers": figures.numbers,
        "simulated": figures.simulated,
        "difference": minus(figures.accuracy, origin.accuracy),
        "times_fewer_macs": over(origin.macs, figures.macs),
        "times_fewer_params": over(origin.params, figures.params),
    }


def layers_of(stages: list[Stage], parent: Parent | None) -> list[dict[str, Any]]:
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


KEY_SETTINGS = (
    *("goal", "criterion", "round_to", "steps", "scheme", "teacher", "losses", "epochs", "lr", "batch_size"),
    *("weights", "activations", "calibration_images", "formats", "files", "tolerance_lsb", "runtimes", "threads"),
    "rounds",
)
"""Settings that a reader asks for first, in their order."""
SHOWN_SETTINGS = 5


def key_settings(stage: str, settings: dict[str, Any]) -> str:
    """What was asked of a stage, in a few words; everything is in the recipe."""
    if stage == "load":
        settings = {}
    found = []
    for name in KEY_SETTINGS:
        value = settings.get(name)
        if value in (None, [], {}, (), ""):
            continue
        if name in ("criterion", "scheme", "teacher", "losses"):
            found.append(" + ".join(map(_used, value if isinstance(value, list) else [value])))
        elif name == "goal":
            found.append(f"goal {_goal(value)}")
        else:
            found.append(f"{name.replace('_', ' ')} {wording.as_text(value)}")
    return ", ".join(found[:SHOWN_SETTINGS])


def _used(value: Any) -> str:
    """A component by its name, a loss with its weight."""
    if not isinstance(value, dict):
        return wording.as_text(value)
    name = wording.as_text(value.get("use", value))
    weight = value.get("weight")
    return f"{name} × {weight:g}" if isinstance(weight, (int, float)) else name


def _goal(value: Any) -> str:
    if not isinstance(value, dict):
        return wording.as_text(value)
    where = {name: value[name] for name in ("runtime", "threads") if name in value}
    asked = {name: part for name, part in value.items() if name not in where}
    text = ", ".join(f"{name} {wording.as_text(part)}" for name, part in asked.items() if part is not None)
    if where:
        text += f" in {wording.runtime(where.get('runtime'))}"
        text += f" with {where['threads']} threads" if where.get("threads", 1) != 1 else ""
    return text


def verification_of(stages: list[Stage], at: int, metrics: Verification) -> dict[str, Any]:
    """With `costly`, the layers whose rounding costs most at the output, the worst first."""
    noise = metrics.sqnr
    by_name = {layer.layer: layer.model_dump() for layer in noise.layers} if noise else {}
    costly = [by_name[name] for name in (noise.worst if noise else []) if name in by_name]
    return {"stage": stages[at].manifest.folder, "costly": costly} | metrics.model_dump(mode="json")


def benchmark_of(stages: list[Stage], at: int, metrics: Benchmark) -> dict[str, Any]:
    rows = [{"file": row.file, "kind": row.kind, "runtime": row.runtime} | timing_of(row) for row in metrics.rows]
    own = metrics.model_dump(mode="json", include={"conditions", "pairs", "notes"})
    manifest = stages[at].manifest
    when = {"measured": manifest.finished, "earlier": manifest.resumed, "how": _how(metrics, manifest.finished)}
    return {"stage": manifest.folder} | when | own | {"rows": rows}


def _how(metrics: Benchmark, finished: str | None) -> str:
    """Runtimes, samples and date of the times, as they stand below every drawing of them."""
    versions = metrics.conditions.runtimes
    parts = [wording.runtime(name, versions.get(name)) for name in dict.fromkeys(row.runtime for row in metrics.rows)]
    samples = sorted({row.samples for row in metrics.rows if row.samples is not None})
    if samples:
        span = f"{samples[0]:,}" if len(samples) == 1 else f"{samples[0]:,} to {samples[-1]:,}"
        parts.append(f"n = {span} samples a file")
    parts += [f"measured {wording.moment(finished)}"] if finished and metrics.rows else []
    return ", ".join(parts)
