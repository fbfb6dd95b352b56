"""A baseline: what a run was good for when it was accepted, as one JSON file with the shipped files beside it.

benchmarks/baseline/baseline.json   accuracy and answers per image, sizes, raw samples, conditions, goals
benchmarks/baseline/int8.onnx       what is timed again by `--measure`, on whatever machine
benchmarks/baseline/int8.tflite
benchmarks/baseline/sample.npy      images on which every machine must compute the same outputs
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from compress import __version__
from compress.errors import CompressError
from compress.gate import answers as answering
from compress.gate.goals import Goal, parse
from compress.gate.record import (
    BaselineError,
    File,
    Record,
    Timing,
    known_task,
    milliseconds,
    parity_facts,
    read_json,
    read_run,
    target_facts,
    unchanged,
    understood,
)
from compress.targets import open_model
from compress.targets.agent import sha256

SCHEMA = 1
ANEW = "write it anew: compress gate RUN --write-baseline FILE"

Compute = Callable[[Path, np.ndarray], np.ndarray]
"""Outputs (N, ...) of a file, as it stores them, for real-valued images (N, 3, H, W)."""

OF_THE_DAY = ("python_path", "venv", "disk_free_mb")
"""Of a probe: what a baseline, which is committed, should not tell of the machine it was made on."""


def computed_here(path: Path, images_NCHW: np.ndarray) -> np.ndarray:
    """The first output (N, ...) of a file for real-valued images, as it stores it. Raises TargetError."""
    model = open_model(path)
    return np.stack([model.infer(model.feed(image))[0][0] for image in images_NCHW])


def read(path: Path) -> Record:
    """A run's folder, or a baseline's JSON. Raises BaselineError in one line."""
    return read_run(path) if path.is_dir() else read_baseline(path)


def read_baseline(path: Path) -> Record:
    """Raises BaselineError for a file that is none, was cut short, or has another content beside it than it names."""
    if not path.is_file():
        raise BaselineError(path, "no such file", "write it first: compress gate RUN --write-baseline FILE")
    value = read_json(path, ANEW)
    if value.get("schema") != SCHEMA:
        made = f"has schema {value['schema']!r}" if "schema" in value else "is no baseline: it has no schema"
        raise BaselineError(path, f"{made}; this version reads {SCHEMA}", ANEW)
    with understood(path, ANEW):
        goals = [parse(text, str(path)) for text in value["goals"]]
        shipped = [str(name) for name in value["shipped"]]
        record = Record(
            place=str(path),
            name=str(value["recipe"]["name"]),
            recipe_hash=str(value["recipe"]["hash"]),
            fingerprint=str(value["data"]["fingerprint"]),
            answers=answering.from_dict(value["answers"]),
            files={name: _file(name, facts, path, name in shipped) for name, facts in value["files"].items()},
            timings=[_timing(facts) for facts in value["timings"]],
            shipped=shipped,
            parity=parity_facts(value["parity"]) | {"target": target_facts(value["parity"]["target"])},
            conditions=dict(value["conditions"]),
            made=str(value["made"]),
            sample=path.parent / answering.SAMPLE,
            goals=goals,
            task=known_task(value["data"]),
        )
        for name in record.files:
            if name in record.answers.top1 and abs(record.files[name].accuracy - record.score(name)) > 1e-9:
                raise ValueError(f"{name}: its accuracy is not that of its answers")
        strangers = [t.file for t in record.timings if t.file not in record.files]
        strangers += [name for name in record.files if name not in record.answers.top1]
        strangers += [name for name in shipped if name not in record.files]
        if strangers or not shipped:
            raise ValueError(f"knows nothing of {strangers[0]}" if strangers else "no file")
        sample_sha256 = str(value["sample_sha256"])
    for name in shipped:
        unchanged(record.files[name], "restore the file, or write the baseline anew")
        if (path.parent / name).stat().st_size != record.files[name].size_bytes:
            raise BaselineError(path, f"names another size than {name} has", ANEW)
    if not (path.parent / answering.SAMPLE).is_file() or sha256(path.parent / answering.SAMPLE) != sample_sha256:
        raise BaselineError(path.parent / answering.SAMPLE, f"is not the sample that {path.name} names", "restore it")
    return record


def make_baseline(run: Path, path: Path, goals: Sequence[str] = (), compute: Compute = computed_here) -> Record:
    """The run in a folder as a baseline; `goals` are kept with it. See `write_baseline`."""
    return write_baseline(read_run(run), path, compute, goals=[parse(goal) for goal in goals])


def write_baseline(run: Record, path: Path, compute: Compute, *, goals: Sequence[Goal] = ()) -> Record:
    """The baseline as it can be read again: the JSON, the shipped files and the sample, in `path`'s folder.

    Raises BaselineError for a run that failed its parity check, and where the folder holds the
    files of another baseline.
    """
    if run.parity["verdict"] != "PASS":
        raise BaselineError(run.place, f"failed verify: {run.parity['reason']}", "mend that first")
    if not run.shipped:
        raise BaselineError(run.place, "has no file but the parent", "compress something first")
    if run.sample is None:
        raise BaselineError(run.place, "keeps no sample of its images: verified by an older version", "run it again")
    paths = {name: run.files[name].path for name in run.shipped}
    folder = path.parent
    folder.mkdir(parents=True, exist_ok=True)
    _refuse_neighbours(path, [*paths, answering.SAMPLE])
    try:
        images_NCHW = np.load(run.sample, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BaselineError(
            run.sample, "is not the sample of images that verify wrote", "run its recipe again"
        ) from error
    files: dict[str, dict[str, Any]] = {}
    for name, file in run.files.items():
        files[name] = {
            key: getattr(file, key) for key in ("kind", "sha256", "size_bytes", "runtime", "version", "accuracy")
        }
        if name in paths:
            assert file.path is not None
            files[name]["outputs"] = answering.packed(compute(file.path, images_NCHW))
    for name, source in {**paths, answering.SAMPLE: run.sample}.items():
        assert source is not None
        _replace(folder / name, partial(shutil.copyfile, source))
    value = {
        "schema": SCHEMA,
        "compress": __version__,
        "made": run.made,
        "recipe": {"name": run.name, "hash": run.recipe_hash},
        "data": {"fingerprint": run.fingerprint, "images": run.images, "task": run.task},
        "goals": [str(goal) for goal in goals],
        "shipped": list(paths),
        "files": files,
        "sample_sha256": sha256(run.sample),
        "parity": dict(run.parity),
        "conditions": {key: value for key, value in run.conditions.items() if key not in OF_THE_DAY},
        "timings": [
            {
                "file": timing.file,
                "runtime": timing.runtime,
                "version": timing.version,
                "settings": timing.settings,
                "throttled": list(timing.throttled),
                "rounds_ms": [list(samples) for samples in timing.rounds_ms],
                "control_ms": [list(samples) for samples in timing.control_ms],
            }
            for timing in run.timings
        ],
        "answers": run.answers.as_dict(),
    }
    text = _lines(value)
    _replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return read_baseline(path)


def _file(name: str, facts: Mapping[str, Any], path: Path, shipped: bool) -> File:
    accuracy, size = float(facts["accuracy"]), int(facts["size_bytes"])
    if not accuracy <= 1 or size <= 0:  # R2 has no lower bound; the answers say whether it is the right number
        raise ValueError(f"{name}: accuracy {accuracy}, {size} bytes")
    if Path(name).name != name:
        raise ValueError(f"{name} is no name of a file")
    return File(
        name=name,
        kind=str(facts["kind"]),
        sha256=str(facts["sha256"]),
        size_bytes=size,
        runtime=str(facts["runtime"]),
        version=str(facts["version"]),
        accuracy=accuracy,
        path=path.parent / name if shipped else None,
        outputs_NK=answering.unpacked(facts["outputs"]) if shipped else None,
    )


def _timing(facts: Mapping[str, Any]) -> Timing:
    rounds_ms = milliseconds(facts["rounds_ms"])
    if not rounds_ms:
        raise ValueError(f"{facts['file']} has no samples")
    return Timing(
        file=str(facts["file"]),
        runtime=str(facts["runtime"]),
        version=str(facts["version"]),
        settings=str(facts["settings"]),
        rounds_ms=rounds_ms,
        control_ms=milliseconds(facts["control_ms"]),
        throttled=tuple(map(str, facts["throttled"])),
    )


def _refuse_neighbours(path: Path, names: Sequence[str]) -> None:
    """One folder, one baseline: the files beside the JSON go by the same names in each."""
    for other in sorted(path.parent.glob("*.json")):
        if other.name == path.name:
            continue
        try:
            kept = read_json(other).get("shipped", [])
        except CompressError:
            continue
        if set(kept) & set(names):
            raise BaselineError(path, f"{other.name} keeps its files in this folder", "give each baseline its own")


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """The file in one step: a reader finds the old content or the new."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    os.replace(temporary, path)


def _lines(value: Mapping[str, Any]) -> str:
    """JSON whose differences can be read: one line per fact of the upper two levels, arrays of numbers on one line."""
    parts = []
    for key, content in value.items():
        if isinstance(content, dict) and content:
            inner = ",\n".join(f"  {json.dumps(name)}: {json.dumps(item)}" for name, item in content.items())
            parts.append(f" {json.dumps(key)}: {{\n{inner}\n }}")
        elif isinstance(content, list) and content:
            inner = ",\n".join(f"  {json.dumps(item)}" for item in content)
            parts.append(f" {json.dumps(key)}: [\n{inner}\n ]")
        else:
            parts.append(f" {json.dumps(key)}: {json.dumps(content)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"
