"""What a run's folder remembers of each stage, and when that may be believed again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ValidationError

from compress.models import file_sha256
from compress.written import read_json

NAME = "manifest.json"
STAGE_FOLDER = re.compile(r"\d\d-[a-z]+(\.partial|\.training)?")
TRAINING_PACKAGES = ("torch", "torch-pruning", "numpy", "pillow")
"""Their versions can change a network; those of the runtimes only change files and measurements."""
FILE_PACKAGES = ("onnx", "onnxscript", "onnx-ir", "flatbuffers", "onnxruntime", "ai-edge-litert", "ncnn")
SHOWING = ("api.py", "cli", "progress.py", "report", "starting", "sweep", "tracking")
"""What of our code only asks for work or shows it: it cannot change a stage's result."""


class _File(BaseModel):
    sha256: str
    size_bytes: int


class _Network(BaseModel):
    accuracy: float
    params: int
    macs: int
    precision: str


class _Product(BaseModel):
    network: str | None
    parent: str | None
    float_network: str | None
    files: dict[str, str]
    layer_losses: dict[str, dict[str, float]]


class _Manifest(BaseModel):
    """What every stage's manifest holds, whatever the stage. There is more in it."""

    stage: str
    folder: str
    key: str
    settings: dict[str, Any]
    seconds: float
    finished: Annotated[str, AfterValidator(datetime.fromisoformat)]
    product: _Product
    network: _Network | None
    metrics: dict[str, Any]
    notes: list[str]
    files: dict[str, _File]


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a stage's folder; empty where there is none, or where it says other things than stages do."""
    found = read_json(folder / NAME)
    try:
        _Manifest.model_validate(found, strict=True)
    except ValidationError:
        return {}
    return found


def key(*parts: Any) -> str:
    """SHA-256 of JSON values: equal keys, equal result."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def own_code() -> str:
    """SHA-256 over our sources, without those that only show results."""
    root = Path(__file__).parent
    names = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*.py"))}
    return key([[name, file_sha256(path)] for name, path in names.items() if name.split("/")[0] not in SHOWING])


def files_below(folder: Path) -> dict[str, dict[str, Any]]:
    """Hash and size of every file in a stage's folder, by relative path."""
    return {
        path.relative_to(folder).as_posix(): {"sha256": file_sha256(path), "size_bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != NAME
    }


def valid(folder: Path, wanted: str) -> dict[str, Any] | None:
    """A stage's manifest, if it has the key `wanted`, no failed verdict, and every file it lists is there unaltered."""
    manifest = _of_key(folder, wanted)
    return None if not manifest or _damaged(folder, manifest) else manifest


def damage(folder: Path, wanted: str) -> str:
    """What has become of a file of a stage that has the key `wanted`; empty for any other folder."""
    manifest = _of_key(folder, wanted)
    return _damaged(folder, manifest) if manifest else ""


def _of_key(folder: Path, wanted: str) -> dict[str, Any]:
    manifest = read(folder)
    return {} if manifest.get("key") != wanted or manifest["metrics"].get("verdict") == "FAIL" else manifest


def _damaged(folder: Path, manifest: dict[str, Any]) -> str:
    for name, facts in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != facts["size_bytes"]:
            return f"{name} has {path.stat().st_size} bytes of {facts['size_bytes']}"
        if file_sha256(path) != facts["sha256"]:
            return f"{name} was altered (its hash is another)"
    return ""


def noisy(manifest: dict[str, Any]) -> bool:
    """Whether a benchmark's times cannot be told from noise."""
    return any(pair.get("verdict") == "NOISY" for pair in manifest["metrics"].get("pairs", []))


def other_machine(folder: Path, machine: dict[str, Any]) -> str:
    """What a benchmark's machine differs in from the one that would measure now: `governor was a, is b`."""
    before = read(folder).get("machine", {})
    return ", ".join(
        f"{fact} was {before[fact]}, is {now}" for fact, now in machine.items() if before.get(fact, now) != now
    )


def forget_others(stages: Path, labels: list[str]) -> None:
    """Removes folders of stages that a finished run no longer has; never anything that a run did not make."""
    for path in stages.iterdir():
        unfinished = path.suffix in (".partial", ".training")
        ours = STAGE_FOLDER.fullmatch(path.name) and (unfinished or (path / NAME).is_file())
        if ours and path.name not in labels:
            shutil.rmtree(path)
