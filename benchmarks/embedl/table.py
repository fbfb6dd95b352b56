"""The table of the experiment to beat, from a sweep over goals of speed with controls.

    compress sweep benchmarks/embedl/embedl.yaml -p stages.prune.goal.speedup=3,6.15,8 --workers 1 --out runs/embedl
    python benchmarks/embedl/table.py runs/embedl

Each run times its own network, its controls and the parent's float file in one session, and says so in run.json. The
table is printed and written to embedl.md; nothing is measured here.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from compress.recipe.controlled import worded
from compress.written import read_json, write_text

HEAD = (
    "| asked | network | measured speed-up | its time / ours | accuracy, mean ± sd | against the parent | verdict |",
    "|---|---|---:|---:|---:|---:|---|",
)
HERE = Path(__file__).parent
OURS = "ours"


def runs_in(folder: Path) -> list[Path]:
    """Finished runs with controls, not the controls themselves."""
    found = [path.parent for path in sorted(folder.rglob("run.json")) if "controls" not in path.parts]
    return [run for run in found if read_json(run / "run.json").get("equal_latency", {}).get("finished")]


def rows(run: Path) -> list[tuple[float, str]]:
    """A line for each network of a run, with the speed-up that the run was asked for."""
    equal = read_json(run / "run.json")["equal_latency"]
    pruned = read_json(next(run.glob("stages/*-prune/manifest.json")))
    goal = float(pruned["settings"]["goal"]["speedup"])
    verify = read_json(next(run.glob("stages/*-verify/manifest.json")))["metrics"]
    parent = next(float(file["accuracy"]) for name, file in verify["files"].items() if name.startswith("parent."))
    return [(goal, _row(goal, network, parent)) for network in equal["networks"]]


def _row(goal: float, network: dict[str, Any], parent: float) -> str:
    name = "**ours**" if network["name"] == OURS else worded(network["name"])
    if network["left_out"] or network["mean"] is None:
        return f"| {goal:g}x | {name} | | | | | left out: {network['left_out'] or 'failed'} |"
    spread = f" ± {100 * network['sd']:.2f}" if network["sd"] is not None else ""
    mean = f"{100 * network['mean']:.2f} %{spread} ({len(network['accuracy'])})"
    figures = [_times(network["speedup"]), _times(network["ratio"]), mean, f"{100 * (network['mean'] - parent):+.2f}"]
    return f"| {goal:g}x | {name} | " + " | ".join(figures) + f" | {network['verdict'] or ''} |"


def _times(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f}x"


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/embedl/table.py FOLDER_OF_THE_SWEEP")
    folder = Path(sys.argv[1])
    runs = runs_in(folder)
    if not runs:
        sys.exit(f"{folder}: no finished run with controls in it; run the sweep of embedl.yaml first")
    found = sorted((row for run in runs for row in rows(run)), key=lambda row: row[0])
    facts = read_json(runs[0] / "run.json")
    conditions = facts["equal_latency"]["conditions"]
    where = f"{conditions['cpu']}, {facts['equal_latency']['runtime']}, {facts['equal_latency']['threads']} thread"
    text = "\n".join([f"Accuracy of files on the evaluation images; seeds in brackets. {where}.", "", *HEAD])
    text += "\n" + "\n".join(row for _, row in found) + "\n"
    write_text(HERE / "embedl.md", text)
    print(text)


if __name__ == "__main__":
    main()
