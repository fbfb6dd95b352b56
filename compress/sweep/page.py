"""The tables of a sweep: Markdown, rows for a terminal, and a page like a run's report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.report import charts, wording
from compress.report.pages import page
from compress.report.wording import Score
from compress.shown import without_secrets
from compress.sweep.results import BETTER, Group


def columns(groups: Sequence[Group]) -> dict[str, str]:
    """Headings by figure."""
    return {"accuracy": score(groups).title, "latency_ms": "Latency, p50", "size_bytes": "Size"}


def score(groups: Sequence[Group]) -> Score:
    """What the cells are judged by, as their task has it."""
    done = (result.figures for group in groups for result in group.cells if result.status == "finished")
    return wording.score_of(next((one.task for one in done), "classification"))


def rows(groups: Sequence[Group]) -> list[dict[str, str]]:
    """One row for each group, all with the same keys: the headings of a table."""
    repeated = any(len(group.cells) > 1 for group in groups)
    found = []
    for number, group in enumerate(groups, start=1):
        row = {"": str(number), "cell": group.name, "best": "yes" if group.best else ""}
        row |= {heading: _words(name, group) for name, heading in columns(groups).items()}
        if repeated:
            row["seeds"] = f"{group.finished} of {len(group.cells)}"
        found.append(row | {"remarks": "; ".join(remarks(group))})
    return found


def remarks(group: Group) -> list[str]:
    """What a reader of a group's figures must not overlook, a few words each."""
    found = []
    for status in ("failed", "not finished"):
        count = sum(result.status == status for result in group.cells)
        if count:
            found.append(f"{count} {status}" if len(group.cells) > 1 else status)
    noisy = sum(result.figures.noisy for result in group.cells)
    if noisy:
        share = f" ({noisy} of {len(group.cells)})" if len(group.cells) > 1 else ""
        found.append(f"NOISY: its latency is a rough figure{share}")
    if any(result.figures.accuracy_of == "torch" for result in group.cells):
        found.append(f"{score([group]).name} of the torch network")
    return found


def failures(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """(cell, its line) of all that failed."""
    return [(result.cell.name, result.error) for group in groups for result in group.cells if result.error]


def missing(groups: Sequence[Group]) -> list[str]:
    """Figures that no cell has, in words: the best are chosen by the others."""
    return [
        heading.partition(",")[0].lower()
        for name, heading in columns(groups).items()
        if not any(name in group.spreads for group in groups)
    ]


def statements(groups: Sequence[Group]) -> list[str]:
    """The sentences that have to stand beside latencies, each once."""
    found = [result.figures.machine for group in groups for result in group.cells if result.figures.latency_ms]
    return list(dict.fromkeys(text for text in found if text))


def conditions(groups: Sequence[Group]) -> list[str]:
    """Under what was timed, each once."""
    found = [result.figures.conditions for group in groups for result in group.cells]
    return list(dict.fromkeys(text for text in found if text))


def as_markdown(facts: dict[str, Any], groups: Sequence[Group]) -> str:
    """The table for a README or a pull request."""
    table = rows(groups)
    lines = [f"# {facts['name']}", "", f"`{facts['command']}`", ""]
    headings = list(table[0])
    lines += ["| " + " | ".join(headings) + " |", "|" + " --- |" * len(headings)]
    lines += ["| " + " | ".join(value.replace("|", "\\|") for value in row.values()) + " |" for row in table]
    lines += ["", said_of_best(groups), *statements(groups)]
    lines += [f"- {name}: {error}" for name, error in failures(groups)]
    return "\n".join(lines) + "\n"


def said_of_best(groups: Sequence[Group]) -> str:
    """How the column `best` is to be read."""
    by = [heading.partition(",")[0].lower() for name, heading in columns(groups).items() if name in _measured(groups)]
    if not by:
        return "Nothing was finished, so none is the best."
    means = (
        "; by means over seeds, shown ± standard deviation: less than that may be chance"
        if any(len(g.cells) > 1 for g in groups)
        else ""
    )
    apart = missing(groups)
    without = f" ({' and '.join(apart)} not measured)" if apart else ""
    return f"Best: no other is at least as good in {', '.join(by)} and better in one{without}{means}."


def as_html(facts: dict[str, Any], groups: Sequence[Group]) -> str:
    """One page without references to anything outside it but the reports of its cells."""
    numbered = [
        {
            "number": number,
            "name": group.name,
            "best": group.best,
            "noisy": group.noisy,
            "values": without_secrets(group.setting),
            "words": {name: _words(name, group) for name in BETTER},
            "figures": {
                name: {"mean": one.mean, "least": one.least, "most": one.most} for name, one in group.spreads.items()
            },
            "cells": group.cells,
            "finished": group.finished,
            "remarks": remarks(group),
        }
        for number, group in enumerate(groups, start=1)
    ]
    return page(
        "sweep.html",
        folder=Path(__file__).parent,
        facts=facts,
        groups=numbered,
        repeated=any(len(group.cells) > 1 for group in groups),
        chart=charts.pareto(numbered, score=score(groups)),
        score=score(groups),
        failures=failures(groups),
        said_of_best=said_of_best(groups),
        statements=statements(groups),
        conditions=conditions(groups),
        headline=headline(groups),
    )


def headline(groups: Sequence[Group]) -> str:
    """The sweep in one sentence."""
    cells = [result for group in groups for result in group.cells]
    done = sum(result.status == "finished" for result in cells)
    front = sum(group.best for group in groups)
    sentence = f"{front} of {len(groups)} settings not beaten by another" if done else "Nothing finished"
    failed = sum(result.status == "failed" for result in cells)
    more = [f"{failed} of {len(cells)} runs failed"] if failed else []
    left = len(cells) - done - failed
    more += [f"{left} not finished"] if left else []
    return ", ".join([sentence, *more])


def _measured(groups: Sequence[Group]) -> set[str]:
    return {name for group in groups for name in group.spreads}


def _words(name: str, group: Group) -> str:
    """A figure with its spread; `not measured` where a finished cell lacks it."""
    one = group.spreads.get(name)
    if one is None:
        return wording.NOT_MEASURED
    if name == "accuracy":
        mean, deviation = score([group]).said(one.mean), score([group]).said(one.deviation)
        return mean if one.deviation is None else f"{mean} ± {deviation}"
    said = wording.ms(one.mean) if name == "latency_ms" else wording.size(one.mean)
    if one.deviation is None or (name == "size_bytes" and one.deviation == 0):
        return said
    value, _, unit = said.rpartition(" ")
    number = float(value.replace(",", ""))
    scale = one.mean / number if number else 1.0
    return f"{value} ± {one.deviation / scale:.{len(value.partition('.')[2])}f} {unit}"
