"""One page over many runs: a row for each, a link to its report, and which of them nothing else beats."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from compress.errors import CompressError
from compress.report import charts, wording
from compress.report.pages import page
from compress.report.report import read_report
from compress.shown import without_secrets
from compress.written import write_text

SCRIPT = """
const body = document.querySelector('tbody'), rows = [...body.rows], all = rows.length;
const only = document.querySelector('input'), said = document.querySelector('output');
document.querySelector('form').hidden = false;
const filter = () => {
  const words = only.value.toLowerCase().split(/\\s+/).filter(Boolean);
  for (const row of rows) row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
  said.textContent = `${rows.filter(row => !row.hidden).length} of ${all} runs`;
};
only.addEventListener('input', filter);
only.form.addEventListener('submit', event => event.preventDefault());
filter();
document.querySelectorAll('th[data-column]').forEach(head => {
  const button = document.createElement('button');
  button.type = 'button';
  button.append(...head.childNodes);
  head.append(button);
  button.addEventListener('click', () => {
    const up = head.getAttribute('aria-sort') !== 'ascending';
    document.querySelectorAll('th[aria-sort]').forEach(other => other.removeAttribute('aria-sort'));
    head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
    const value = row => row.querySelector(`[data-column=${head.dataset.column}]`).dataset.value;
    const numbers = rows.every(row => !value(row) || !isNaN(value(row)));
    rows.sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (!x || !y) return (x ? 0 : 1) - (y ? 0 : 1);
      return (numbers ? x - y : x.localeCompare(y)) * (up ? 1 : -1);
    });
    body.append(...rows);
  });
});
"""
"""Sorts by a column, the runs without a figure last, and shows only rows that hold all the words. Without it the page
is the same table in the order of dates."""

BETTER = {"accuracy": 1, "latency_ms": -1, "size_bytes": -1}
"""Figures that a run is chosen by, and whether more of one is better or less."""


def write_index(runs: Sequence[Path], out: Path) -> Path:
    """Path of the page over those runs, or over those that lie in those folders. Raises CompressError.

    A folder that cannot be read is listed with the reason. The page is one file; its links to reports are relative.
    """
    found = [_row(folder, out) for given in runs for folder in _folders(given)]
    if not found:
        raise CompressError(", ".join(map(str, runs)) or "index", "no runs", "give folders that `compress run` wrote")
    found.sort(key=lambda row: (row["date"], row["name"]), reverse=True)
    for number, row in enumerate(found, start=1):
        row["number"] = number
    drawings = _drawings(found)
    html = page("index.html", script=SCRIPT, rows=found, drawings=drawings, made=wording.moment(_now()))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, html)
    except OSError as error:
        raise CompressError(out, f"cannot be written ({error.strerror})", "choose another file with --out") from error
    return out


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _folders(given: Path) -> list[Path]:
    """The run itself, or the runs that lie in the folder; what is neither is a run that cannot be read."""
    if (given / "run.json").exists() or not given.is_dir():
        return [given]
    inside = sorted(path.parent for path in given.glob("*/run.json"))
    return inside or [given]


def _row(folder: Path, out: Path) -> dict[str, Any]:
    """What the page says of one run; None for what it does not know."""
    row: dict[str, Any] = dict.fromkeys(
        ("parent", "accuracy", "difference", "speedup", "latency_ms", "size_bytes", "times_smaller", "parity", "timing")
    )
    row |= {
        "name": folder.resolve().name,
        "folder": _from(folder, out),
        "href": _link(folder, out),
        "date": "",
        "model": "",
    }
    row |= {"target": "", "status": "broken", "problem": "", "score": wording.score_of(""), "best": False}
    try:
        report = read_report(folder)
    except CompressError as error:
        return row | {"problem": without_secrets(f"{error.problem}{f'; {error.way_out}' if error.way_out else ''}")}
    return row | _figures(report)


def _figures(report: dict[str, Any]) -> dict[str, Any]:
    run, headline, machine = report["run"], report["headline"], report["machine"]
    own = [file for file in report["files"] if file["file"] == headline["file"]]
    file = min(own, key=lambda one: one["timing"]["p50_ms"] if one["timing"] else float("inf"), default=None)
    network = next((stage["network"] for stage in reversed(report["stages"]) if stage["network"]), None)
    measured = file or network or {"accuracy": None, "difference": None}
    pair = file["pair"] if file else None
    accuracy, difference = measured["accuracy"], measured["difference"]
    before = accuracy if not headline["compressed"] else _before(accuracy, difference)
    noisy = bool(pair and pair["verdict"] == "NOISY")
    earlier = bool(report["benchmark"] and report["benchmark"]["earlier"])
    names = [run["model"].get(key) for key in ("use", "name") if run["model"].get(key)]
    return {
        "name": report["name"],
        "date": run["finished"] or run["started"] or "",
        "model": " ".join(map(str, names)),
        "score": wording.score_of(run["data"]["task"]),
        "accuracy": accuracy,
        "parent": before,
        "compressed": headline["compressed"],
        "difference": difference if headline["compressed"] else None,
        "speedup": pair["speedup"] if pair else None,
        "latency_ms": file["timing"]["p50_ms"] if file and file["timing"] else None,
        "size_bytes": file["size_bytes"] if file else None,
        "times_smaller": file["times_smaller"] if file else None,
        "parity": report["verify"]["verdict"] if report["verify"] else None,
        "timing": ("NOISY" if noisy else "earlier" if earlier else pair["verdict"]) if pair else None,
        "target": machine["conditions"] if machine else "",
        "statement": machine["statement"] if machine and not machine["is_arm"] else "",
        "status": "unfinished" if report["unfinished"] or not run["finished"] else "finished",
        "problem": headline["sentence"],
    }


def _before(accuracy: float | None, difference: float | None) -> float | None:
    return None if accuracy is None or difference is None else accuracy - difference


def _from(folder: Path, out: Path) -> str:
    """The folder as it lies from the page."""
    return Path(os.path.relpath(folder, out.parent)).as_posix()


def _link(folder: Path, out: Path) -> str:
    """The report relative to the page; "" where there is none."""
    report = folder / "report.html"
    return quote(_from(report, out)) if report.is_file() else ""


def _drawings(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A drawing for each machine and score that two runs share: only those may be compared. Marks the best rows."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["accuracy"] is not None and row["latency_ms"] is not None and row["parity"] != "FAIL":
            groups.setdefault((row["target"], row["score"].name), []).append(row)
    found = []
    for place, ((target, _), own) in enumerate(groups.items()):
        if len(own) < 2:
            continue
        for row in own:
            row["best"] = not any(_beats(other, row) for other in own)
        score = own[0]["score"]
        points = [
            {
                "number": row["number"],
                "best": row["best"],
                "noisy": row["timing"] == "NOISY",
                "figures": {
                    name: dict.fromkeys(("mean", "least", "most"), row[name])
                    for name in BETTER
                    if row[name] is not None
                },
            }
            for row in own
        ]
        drawing = charts.pareto(points, name=f"pareto-{place}", score=score)
        statements = dict.fromkeys(row["statement"] for row in own if row["statement"])
        found.append(
            {"title": f"{score.title} against latency", "drawing": drawing, "target": target, "runs": len(own)}
            | {"statements": " ".join(statements)}
        )
    return found


def _beats(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether it is as good in every figure and better in one."""
    known = [name for name in BETTER if one[name] is not None and other[name] is not None]
    gains = [BETTER[name] * (one[name] - other[name]) for name in known]
    return min(gains) >= 0 and max(gains) > 0
