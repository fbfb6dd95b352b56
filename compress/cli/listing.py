"""Runs and stages as facts: what `compress ls` and `compress show` print, read from their folders and nothing else."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from compress.errors import CompressError
from compress.locks import holder_of
from compress.progress import LOG, read_log
from compress.written import read_json, read_text

State = Literal["finished", "failed", "running", "paused", "interrupted", "damaged"]
LOCK = "lock"
DEEPEST = 4
"""Folders below the one that was named; a sweep keeps its runs a few further down."""
INSIDE = ("stages", "controls", "tensorboard")
"""Folders of a run, which hold no runs that are listed."""


@dataclass(frozen=True)
class Listed:
    """A run as a row. Figures that were not measured are None."""

    name: str
    folder: str
    state: State
    reason: str = ""
    """Of a state that is not `finished`."""
    started: str | None = None
    finished: str | None = None
    seconds: float | None = None
    """Of all finished stages."""
    stages_done: int = 0
    stages: int | None = None
    """The recipe's, with the loading of the network."""
    score: str = "accuracy"
    parent_score: float | None = None
    final_score: float | None = None
    file: str | None = None
    """The one that the report's headline speaks of: size and speed are its own."""
    speedup: float | None = None
    size_bytes: int | None = None
    headline: str = ""
    """What the report begins with."""


def runs_below(folder: Path) -> list[Listed]:
    """Every run in `folder` or below it, by name. Raises CompressError where the folder is missing."""
    if not folder.is_dir():
        raise CompressError(folder, "no such folder", "give the folder that holds the runs, such as `runs`")
    return [listed(path) for path in sorted(_run_folders(folder, DEEPEST))]


def _run_folders(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / "run.json").exists() or (folder / LOG).exists():
        yield folder
        return
    found = 0
    for path in folder.iterdir() if depth else ():
        if path.is_dir() and not path.is_symlink() and path.name not in INSIDE and not path.name.startswith("."):
            for below in _run_folders(path, depth - 1):
                found += 1
                yield below
    if not found and (folder / LOCK).is_file() and holder_of(folder / LOCK) is not None:  # it is just beginning
        yield folder


def listed(folder: Path) -> Listed:
    """The run in `folder`; whatever is wrong with the folder is its row's reason."""
    holder = holder_of(folder / LOCK)
    facts = read_json(folder / "run.json")
    if not facts:
        if holder is not None:
            return Listed(folder.name, str(folder), "running", str(holder))
        if not (folder / "run.json").exists():
            last = _last_events(folder)
            state: State = "failed" if "error" in last else "interrupted"
            return Listed(folder.name, str(folder), state, next(iter(last.values()), "") or "nothing has run yet")
        return Listed(folder.name, str(folder), "damaged", "run.json cannot be read")
    try:
        row = _read(folder, facts)
    except (CompressError, KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        said = error.problem if isinstance(error, CompressError) else f"{type(error).__name__}: {error}"
        row = Listed(str(facts.get("name", folder.name)), str(folder), "damaged", " ".join(said.split())[:200])
    if holder is not None:
        return Listed(**asdict(row) | {"state": "running", "reason": str(holder)})
    return row


def _read(folder: Path, facts: Mapping[str, Any]) -> Listed:
    from compress.report import read_report

    done = list(facts["stages"])
    state, reason = _state(folder, facts)
    told: dict[str, Any] = {"seconds": facts["seconds"]}
    if done and all((folder / "stages" / label / "manifest.json").is_file() for label in done):
        report = read_report(folder)
        told = {"seconds": sum(stage["seconds"] for stage in report["stages"]), **_figures(report)}
    elif done:
        missing = next(label for label in done if not (folder / "stages" / label / "manifest.json").is_file())
        state, reason = "damaged", f"stages/{missing}/manifest.json is missing"
    return Listed(
        name=str(facts["name"]),
        folder=str(folder),
        state=state,
        reason=reason,
        started=facts["started"],
        finished=facts["finished"],
        stages_done=len(done),
        stages=_planned(folder),
        score=facts["data"].get("score", {}).get("name", "accuracy"),
        **told,
    )


def _state(folder: Path, facts: Mapping[str, Any]) -> tuple[State, str]:
    """Of a run that nobody works on."""
    if facts["finished"] is None:
        last = _last_events(folder)
        if "error" in last:
            return "failed", last["error"]
        if "run_paused" in last:
            return "paused", ""
        return "interrupted", last.get("signal", "killed")
    for label in facts["stages"]:
        metrics = read_json(folder / "stages" / label / "manifest.json").get("metrics", {})
        if metrics.get("verdict") == "FAIL":
            return "failed", f"{label}: {metrics.get('reason', '')}"
    return "finished", ""


def _last_events(folder: Path) -> dict[str, str]:
    """What the last attempt's log says that ended it, by event."""
    found: dict[str, str] = {}
    if (folder / LOG).is_file():
        for line in read_log(folder / LOG):
            facts = line.get("facts", {})
            if line.get("event") == "run_started" and not facts.get("of"):
                found.clear()
            if line.get("event") in ("error", "signal", "run_paused"):
                found[line["event"]] = str(facts.get("text") or facts.get("name") or "")
    return found


def _planned(folder: Path) -> int | None:
    """How many stages the resolved recipe has, with the loading of the network."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        recipe = YAML(typ="safe", pure=True).load(read_text(folder / "recipe.yaml"))
        return 1 + len(recipe["stages"])
    except (OSError, YAMLError, TypeError, KeyError, ValueError):
        return None


def _figures(report: Mapping[str, Any]) -> dict[str, Any]:
    """Of the file that the headline speaks of, against the file of the parent; of the last network where none is."""
    headline = report["headline"]
    files = {file["file"]: file for file in reversed(report["files"]) if file["file"]}
    best, base = files.get(headline["file"]), files.get(headline["baseline"])
    networks = [stage["network"] for stage in report["stages"] if stage["network"]]
    parent = report["parent"] or {}
    final = best or (networks[-1] if networks and headline["compressed"] else {})
    return {
        "headline": headline["sentence"],
        "parent_score": (base or parent or (networks[0] if networks else {})).get("accuracy"),
        "final_score": final.get("accuracy"),
        "file": best and best["file"],
        "speedup": ((best or {}).get("pair") or {}).get("speedup"),
        "size_bytes": best and best["size_bytes"],
    }


@dataclass(frozen=True)
class Shown:
    """One run in full."""

    listed: Listed
    run: dict[str, Any]
    recipe: str
    """The resolved one."""
    stages: list[dict[str, Any]] = field(default_factory=list)
    """Manifests, in their order."""


def shown(folder: Path) -> Shown:
    """The run in `folder`. Raises CompressError where there is none."""
    row = listed(folder)
    facts = read_json(folder / "run.json")
    if not facts:
        way_out = "give the folder that `compress run` wrote"
        raise CompressError(folder, row.reason if (folder / "run.json").exists() else "no run.json in it", way_out)
    try:
        recipe = read_text(folder / "recipe.yaml")
    except (OSError, ValueError):
        recipe = ""
    paths = (folder / "stages" / str(label) / "manifest.json" for label in facts.get("stages") or [])
    return Shown(row, facts, recipe, [found for path in paths if (found := read_json(path))])


def stage_of(run: Shown, name: str) -> dict[str, Any]:
    """The manifest of the stage that goes by `01-train`, `train` or `1`.

    Raises CompressError, which names those there are.
    """
    labels = [str(stage.get("folder")) for stage in run.stages]
    number = name.isdigit() and f"{int(name):02d}-"
    matches = [label for label in labels if name in (label, label[3:]) or (number and label.startswith(number))]
    if len(matches) == 1:
        return run.stages[labels.index(matches[0])]
    if matches:
        raise CompressError(name, f"{len(matches)} stages of the run go by it", f"give one of {', '.join(matches)}")
    close = difflib.get_close_matches(name, labels, 1)
    hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(labels) or 'none yet'}"
    raise CompressError(name, "no finished stage of the run", hint)
