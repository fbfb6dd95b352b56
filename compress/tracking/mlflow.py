"""MLflow: parameters, curves, figures and files of a run, at the tracking URI that MLflow is configured with.

A run that goes on continues its MLflow run (its id is in RUN/mlflow.json) as long as the recipe is the same: MLflow
does not let parameters change, so another recipe begins another one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.extras import need
from compress.tracking import EPOCH, STAGE, figures, series
from compress.written import read_json, write_json

KEPT = "mlflow.json"
EXPERIMENT = "compress"
"""Where MLFLOW_EXPERIMENT_NAME does not say another."""
LONGEST = 500
"""Characters of a parameter's value, which all of MLflow's stores take."""
SHIPPED = ("report.html", "report.md", "report.json", "recipe.yaml")


@dataclass
class Mlflow:
    """One run of an MLflow server or folder."""

    client: Any
    run_id: str
    folder: Path
    steps: dict[str, int]
    """Of each metric that is there already: the last step it was told at."""

    def event(self, kind: str, facts: Mapping[str, Any]) -> None:
        place = series(facts)
        if kind == "epoch":
            self._log({f"{place}/{name}": value for name, value in figures(facts, EPOCH).items()}, facts["epoch"])
        elif kind in ("stage_finished", "stage_resumed"):
            found = {f"{place}/{name}": value for name, value in figures(facts, STAGE).items()}
            found |= {f"{place}/size_bytes/{name}": float(size) for name, size in facts.get("files", {}).items()}
            self._log(found, 0, again=kind == "stage_finished")
            if facts.get("verdict"):
                self.client.set_tag(self.run_id, f"{place}/verdict", facts["verdict"])
        elif kind == "run_started" and not facts.get("of"):
            for name in ("command", "recipe_hash", "compress", "device", "cpu"):
                self.client.set_tag(self.run_id, name, str(facts.get(name, "")))
        elif kind == "report":
            self._files()

    def close(self, error: str | None) -> None:
        status = "FINISHED" if error is None else "KILLED" if error == "stopped" else "FAILED"
        if error is not None:
            self.client.set_tag(self.run_id, "ended by", error[:LONGEST])
        self.client.set_terminated(self.run_id, status)

    def _log(self, values: Mapping[str, float], step: int, *, again: bool = True) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        new = {_name(key): value for key, value in values.items() if again or _name(key) not in self.steps}
        self.client.log_batch(self.run_id, metrics=[Metric(key, value, now, step) for key, value in new.items()])
        self.steps |= dict.fromkeys(new, step)

    def _files(self) -> None:
        """Uploads the report and what was exported; what the last stage measured becomes `final/...`."""
        for name in SHIPPED:
            if (self.folder / name).is_file():
                self.client.log_artifact(self.run_id, str(self.folder / name))
        for path in sorted(self.folder.glob("stages/*-export/*")):
            if path.suffix in (".onnx", ".tflite"):
                self.client.log_artifact(self.run_id, str(path), "files")
        report = read_json(self.folder / "report.json")
        found: dict[str, float] = {}
        for file in report.get("files", []):
            place = f"final/{file['file']}" + (f"/{file['runtime']}" if file["runtime"] else "")
            found |= {f"{place}/{name}": value for name, value in figures(file, ("accuracy", "size_bytes")).items()}
            found |= {f"{place}/{name}": value for name, value in figures(file["timing"] or {}, ("p50_ms",)).items()}
            found |= {f"{place}/{name}": value for name, value in figures(file["pair"] or {}, ("speedup",)).items()}
        self._log(found, 0)


def open_tracker(folder: Path, name: str, recipe: Mapping[str, Any]) -> Mlflow:
    """Begins an MLflow run for the run in `folder`, or continues its own.

    Raises CompressError where the package is missing.
    """
    mlflow = need("mlflow", "mlflow", "--track mlflow")
    client = mlflow.MlflowClient()
    parameters = dict(_flat("", recipe))
    # A hash: the address of a server may hold a password.
    told = hashlib.sha256(json.dumps([mlflow.get_tracking_uri(), parameters]).encode()).hexdigest()
    kept = read_json(folder / KEPT)
    run = _existing(client, str(kept.get("run_id"))) if kept.get("told") == told else None
    if run is None:
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        found = client.get_experiment_by_name(experiment)
        place = found.experiment_id if found else client.create_experiment(experiment)
        run = client.create_run(place, run_name=name)
        _log_parameters(client, run.info.run_id, parameters)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / KEPT, {"run_id": run.info.run_id, "told": told})
    else:
        client.update_run(run.info.run_id, status="RUNNING")
        client.set_tag(run.info.run_id, "ended by", "")
    return Mlflow(client, run.info.run_id, folder, dict.fromkeys(run.data.metrics, 0))


def _existing(client: Any, run_id: str) -> Any:
    """The run of that id, or None where it was deleted or its store is another."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException:
        return None
    return run if run.info.lifecycle_stage == "active" else None


def _log_parameters(client: Any, run_id: str, parameters: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    items = list(parameters.items())
    for start in range(0, len(items), 100):  # as many as a call may have
        client.log_batch(run_id, params=[Param(key, value) for key, value in items[start : start + 100]])


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    """The recipe's settings as `stages.0.epochs`, with values as short texts."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), item)
    elif isinstance(value, (list, tuple)) and any(isinstance(item, (Mapping, list)) for item in value):
        for index, item in enumerate(value):
            yield from _flat(f"{prefix}.{index}", item)
    else:
        yield _name(prefix), str(value)[:LONGEST]


def _name(text: str) -> str:
    """As MLflow allows names: no character that a file system or a URL would read otherwise."""
    return re.sub(r"[^\w\-. /]", "_", text)
