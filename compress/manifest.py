"""What a run's folder remembers of each stage, and when that may be believed again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from compress.models import file_sha256
from compress.written import read_json

NAME = "manifest.json"
STAGE_FOLDER = re.compile(r"\d\d-[a-z]+(\.partial|\.training)?")
TRAINING_PACKAGES = ("torch", "torch-pruning", "numpy", "pillow")
"""Their versions can change a network; those of the runtimes only change files and measurements."""
FILE_PACKAGES = ("onnx", "onnxscript", "onnx-ir", "flatbuffers", "onnxruntime", "ai-edge-litert")


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
    sources = [path for path in sorted(root.rglob("*.py")) if path.parent.name != "report" and path.name != "cli.py"]
    return key([[path.relative_to(root).as_posix(), file_sha256(path)] for path in sources])


def files_below(folder: Path) -> dict[str, dict[str, Any]]:
    """Hash and size of every file in a stage's folder, by relative path."""
    return {
        path.relative_to(folder).as_posix(): {"sha256": file_sha256(path), "size_bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != NAME
    }


def valid(folder: Path, wanted: str) -> dict[str, Any] | None:
    """A stage's manifest, if it has the key `wanted`, no failed verdict, and every file it lists is there unaltered."""
    manifest = read_json(folder / NAME)
    if manifest.get("key") != wanted or manifest.get("metrics", {}).get("verdict") == "FAIL":
        return None
    for name, facts in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != facts["size_bytes"] or file_sha256(path) != facts["sha256"]:
            return None
    return manifest


def forget_others(stages: Path, labels: list[str]) -> None:
    """Removes folders of stages that a finished run no longer has; never anything that a run did not make."""
    for path in stages.iterdir():
        unfinished = path.suffix in (".partial", ".training")
        ours = STAGE_FOLDER.fullmatch(path.name) and (unfinished or (path / NAME).is_file())
        if ours and path.name not in labels:
            shutil.rmtree(path)
