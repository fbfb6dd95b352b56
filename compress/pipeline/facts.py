"""What a run's folder says of the run, its machine and the networks in it."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import torch

from compress import __version__, manifest, measures
from compress import recipe as recipes
from compress.data.samples import counts
from compress.models import packages
from compress.product import Data, Network
from compress.progress import Progress, Silent
from compress.quantization.precision import precision
from compress.targets import asking, open_target
from compress.targets.journal import MACHINE
from compress.tasks import task_of
from compress.tasks.classification import balanced_accuracy

if TYPE_CHECKING:
    from compress.pipeline.fold import Fold


def describe(network: Network, data: Data, device: torch.device, progress: Progress) -> dict[str, Any]:
    """What the report says of a network after a stage; the score is torch's, on the whole evaluation split.

    It goes by the name `accuracy`, whatever the task; `run.json` says what it is.
    """
    rules = task_of(data.task)
    module, size = network.module, network.structure.preprocess.size
    count, batch_size = data.count("evaluation"), 64
    layers = measures.layers(module, size, network.structure.preprocess.channels)
    with progress.steps("evaluate", -(-count // batch_size)) as advance:

        def batches() -> Iterator[Any]:
            for batch in data.batches("evaluation", batch_size=batch_size):
                yield batch
                advance("")

        kept, labels = measures.answered(module, batches(), device, rules)
    quantized = network.structure.quantize is not None
    return {
        "accuracy": rules.score(kept, labels),
        "balanced_accuracy": balanced_accuracy(kept, labels) if rules.name == "classification" else None,
        "outputs": rules.details(kept, labels, data.labels, data.scale),
        "images": count,
        "params": sum(layer["params"] for layer in layers) if quantized else measures.params(module),
        "macs": sum(layer["macs"] for layer in layers),
        "precision": precision(network),
        "layers": layers,
    }


def facts_of(fold: Fold, command: str) -> dict[str, Any]:
    recipe, data = fold.recipe, fold.data
    return {
        "name": recipe.name,
        "command": command,
        "started": now(),
        "finished": None,
        "seconds": None,
        "recipe_hash": recipes.recipe_hash(recipe),
        "compress": __version__,
        "versions": manifest.versions((*manifest.TRAINING_PACKAGES, *packages(recipe.model), *manifest.FILE_PACKAGES)),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": str(measured_by("local", Silent())["cpu"]) if fold.rank == 0 else "",
        "threads": torch.get_num_threads(),
        "processes": fold.world_size,
        "device": str(fold.device),
        "seed": recipe.seed,
        "data": {
            "use": recipe.data.use,
            "task": data.task,
            "score": {"name": task_of(data.task).score_name},
            "scale": data.scale.model_dump(mode="json") if data.scale else None,
            "labels": list(data.labels),
            "train": data.count("train"),
            "evaluation": data.count("evaluation"),
            "classes": counts(data),
            "fingerprint": data.fingerprint,
            "notes": list(fold.notes.kept),
        },
        "preprocess": recipe.preprocess.model_dump(mode="json"),
        "model": recipe.model.model_dump(mode="json"),
        "stages": [],
        "controls": [],
    }


def measured_by(name: str, progress: Progress, setup: bool = False) -> dict[str, Any]:
    """What tells the machine that measures, and what is installed on it, from others."""
    with open_target(name, progress, setup=setup) as machine:
        found = asking.probe(machine)
    return {fact: found.get(fact, "unavailable") for fact in MACHINE}


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def results(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What an event tells of a finished stage: its seconds, its network's figures, its files in bytes, its verdict."""
    network = manifest["network"] or {}
    told = {name: network[name] for name in ("accuracy", "params", "macs", "precision") if name in network}
    told |= {name: manifest["metrics"][name] for name in ("verdict", "reason") if manifest["metrics"].get(name)}
    made = manifest["product"]["files"] if manifest["stage"] == "export" else {}
    sizes = {name: manifest["files"][name]["size_bytes"] for name in made if name in manifest["files"]}
    return {"seconds": manifest["seconds"], **told, **({"files": sizes} if sizes else {})}
