"""`compress ls` and `show`: what lies in runs' folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.cli.console import RunFolder, say, show_rows

if TYPE_CHECKING:
    from compress.cli.listing import Shown

LONGEST = 60
"""Characters of a reason in the table."""
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def ls(
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Where runs lie, at any depth.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """List runs: state, accuracy, speed-up, size, time."""
    from compress.cli.listing import runs_below

    found = runs_below(folder)
    if as_json:
        print(json.dumps([asdict(row) for row in found], indent=1))
        return
    if not found:
        say(f"{folder}: no runs in it")
    from compress.report import wording

    rows = []
    for row in found:
        planned = "?" if row.stages is None else row.stages
        rows.append(
            {
                "run": Path(row.folder).relative_to(folder).as_posix() if Path(row.folder) != folder else row.name,
                "state": row.state + (f": {_short(row.reason)}" if row.reason else ""),
                "started": wording.moment(row.started) if row.started else "",
                "stages": f"{row.stages_done}/{planned}" if row.started else "",
                "accuracy": _change(row.parent_score, row.final_score),
                "speed-up": "" if row.speedup is None else wording.ratio(row.speedup),
                "size": "" if row.size_bytes is None else wording.size(row.size_bytes),
                "time": "" if row.seconds is None else wording.duration(row.seconds),
            }
        )
    show_rows(rows)


def show(
    folder: RunFolder,
    stage: Annotated[str | None, typer.Argument(metavar="[STAGE]", help="Such as 03-distill, distill or 3.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show a run, or one stage of it.

    Facts, figures, notes, files with their hashes, the resolved recipe.
    """
    from compress.cli.listing import shown, stage_of
    from compress.gate.record import understood

    run = shown(folder)
    if as_json and stage is None:
        found = {"listed": asdict(run.listed), "run": run.run, "recipe": run.recipe, "stages": run.stages}
        print(json.dumps(found, indent=1))
        return
    with understood(folder, "run its recipe again"):
        if stage is None:
            _show_run(run)
        else:
            _show_stage(folder, stage_of(run, stage), as_json)


def _show_run(run: Shown) -> None:
    from compress.report import wording

    row, facts = run.listed, run.run
    say(f"{row.name}: {row.state}" + (f" ({row.reason})" if row.reason else ""))
    if row.headline:
        say(f"  {row.headline}")
    data = facts.get("data", {})
    _show_facts(
        {
            "command": facts.get("command"),
            "started": row.started and wording.moment(row.started),
            "took": row.seconds is not None and wording.duration(row.seconds),
            "data": f"{data.get('use')}, {data.get('train')} for training, {data.get('evaluation')} for evaluation",
            "machine": f"{facts.get('cpu')}, {facts.get('device')}, {facts.get('threads')} threads",
            "compress": f"{facts.get('compress')}, Python {facts.get('python')}",
            "recipe hash": facts.get("recipe_hash"),
            "seed": facts.get("seed"),
        }
    )
    show_rows([_stage_row(manifest) for manifest in run.stages])
    show_rows(
        [
            {"file": f"stages/{manifest['folder']}/{name}", **_file(facts)}
            for manifest in run.stages
            for name, facts in manifest["files"].items()
        ]
    )
    for manifest in run.stages:
        for note in manifest["notes"]:
            say(f"note of {manifest['folder']}: {note}")
    say("recipe.yaml, as it was resolved:")
    for line in run.recipe.splitlines():
        say(f"  {line}")


def _show_stage(folder: Path, manifest: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(manifest, indent=1))
        return
    say(f"{folder / 'stages' / manifest['folder']}")
    show_rows([_stage_row(manifest)])
    _show_facts(_scalars("", manifest["settings"]), "settings")
    _show_facts(_scalars("", manifest["metrics"]), "metrics")
    show_rows([{"file": name, **_file(facts)} for name, facts in manifest["files"].items()])
    for note in manifest["notes"]:
        say(f"note: {note}")
    say(f"key {manifest['key']}")


def _stage_row(manifest: Mapping[str, Any]) -> dict[str, str]:
    from compress.report import wording

    network = manifest.get("network") or {}
    return {
        "stage": manifest["folder"],
        "time": wording.duration(manifest["seconds"]),
        "finished": wording.moment(manifest["finished"]),
        "accuracy": wording.percent(network["accuracy"]) if network else "",
        "MACs": wording.count(network["macs"]) if network else "",
        "params": wording.count(network["params"]) if network else "",
        "verdict": manifest["metrics"].get("verdict") or "",
    }


def _file(facts: Mapping[str, Any]) -> dict[str, str]:
    from compress.report import wording

    return {"size": wording.size(facts["size_bytes"]), "SHA-256": facts["sha256"]}


def _show_facts(facts: Mapping[str, Any], title: str = "") -> None:
    if title and facts:
        say(f"{title}:")
    width = max(map(len, facts), default=0)
    for name, value in facts.items():
        if value is not None and value is not False and value != "":
            say(f"  {name:<{width}}  {value}")


def _scalars(prefix: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """Settings or metrics that a line can hold, by dotted names; lists and tables are for --json."""
    found: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, Mapping):
            found |= _scalars(f"{prefix}{name}.", item)
        elif not isinstance(item, (list, tuple)):
            found[prefix + name] = item
        elif all(isinstance(entry, (str, int, float)) for entry in item) and len(item) <= 8:
            found[prefix + name] = ", ".join(map(str, item))
    return found


def _change(parent: float | None, final: float | None) -> str:
    """91.1% → 88.5%; of a network that nothing was taken from, what it has."""
    from compress.report import wording

    return " → ".join(wording.percent(value) for value in (parent, final) if value is not None)


def _short(reason: str) -> str:
    """As much of it as a table has room for; `compress show` has the rest."""
    first = reason.split("; ")[0]
    return first if len(first) <= LONGEST else first[: LONGEST - 1].rsplit(" ", 1)[0] + " …"
