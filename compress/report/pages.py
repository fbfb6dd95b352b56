"""Figures as text: pages of HTML that need nothing but themselves, and Markdown for a pull request.

To make another page: a template that says `{% extends "page.html" %}` and fills the blocks `title` and `main`, and
`page("its_name.html", folder=..., figures=...)`.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from compress.report import charts, wording
from compress.report.pictures import embedded

TEMPLATES = Path(__file__).parent

POLICY = "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; style-src 'unsafe-inline'"
"""What a browser lets a page of ours do: show what is in it. Drawings carry their styles as attributes."""


def page(template: str, *, folder: Path = TEMPLATES, script: str = "", **values: Any) -> str:
    """A template of `folder` with those values, as a page that nothing from outside gets into.

    `script` is all that may run in it, told by its hash; it is set into the page as it is.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"{POLICY}; script-src 'sha256-{digest}'" if script else POLICY
    environment = _environment(folder, autoescape=True)
    return environment.get_template(template).render(policy=policy, script=Markup(script), **values)


def as_html(report: dict[str, Any], run_folder: Path) -> str:
    """One page without scripts or references to anything outside it; the run's pictures are in it."""
    score = wording.score_of(report["run"]["data"]["task"])
    drawings: dict[str, Any] = {
        "tradeoff": charts.tradeoff(report["files"], score),
        "channels": charts.channels(report["layers"]),
        "controls": charts.controls(report["controls"], score) if report["controls"] else "",
        "sensitivity": charts.sensitivity(report["sensitivity"]) if report["sensitivity"] else "",
        "knowledge": {found["stage"]: charts.knowledge(found) for found in report["knowledge"]},
        "sustained": [(series, charts.sustained(series)) for series in (report["board"] or {}).get("sustained", [])],
        "lsb": [
            (item, charts.lsb_histogram(item, allowed=report["verify"]["tolerance_lsb"]))
            for item in (report["verify"] or {}).get("agreement", [])
            if any(number for step, number in item["histogram"].items() if int(step))
        ],
        "training": {
            stage["folder"]: charts.training_curve(stage["folder"], stage["training"])
            for stage in report["stages"]
            if stage["training"]
        },
    }
    if report["stopped"] and report["stopped"]["training"]:
        running = f"{report['stopped']['running']}, not finished"
        drawings["training"][running] = charts.training_curve(running, report["stopped"]["training"])
    drawings |= {"wrong": _wrong(report, run_folder), "samples": _samples(report, run_folder)}
    return page("report.html", report=report, charts=drawings, score=score)


def _wrong(report: dict[str, Any], run_folder: Path) -> list[tuple[dict[str, Any], str]]:
    """Images that compression cost, those whose picture is there."""
    verify = report["verify"]
    if not verify or not verify["wrong"]:
        return []
    stage = f"stages/{verify['stage']}"
    found = [(one, embedded(run_folder, f"{stage}/{one['image']}")) for one in verify["wrong"]["examples"]]
    return [(one, source) for one, source in found if source]


def _samples(report: dict[str, Any], run_folder: Path) -> list[dict[str, Any]]:
    """Images as the network sees them, by split."""
    found: dict[str, list[tuple[dict[str, Any], str]]] = {}
    for sample in report["data"]["samples"]:
        if source := embedded(run_folder, sample["image"]):
            found.setdefault(sample["split"], []).append((sample, source))
    return [{"title": split.capitalize(), "pictures": pictures} for split, pictures in found.items()]


def as_markdown(report: dict[str, Any]) -> str:
    """The report's tables for a README or a pull request."""
    environment = _environment(TEMPLATES, autoescape=False, finalize=_escape_markdown)
    score = wording.score_of(report["run"]["data"]["task"])
    return environment.get_template("report.md").render(report=report, score=score)


@cache
def _environment(folder: Path, *, autoescape: bool, finalize: Callable[[Any], Any] | None = None) -> Environment:
    environment = Environment(
        loader=FileSystemLoader([folder, TEMPLATES]),
        autoescape=autoescape,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for name in (
        "output",
        "percent",
        "points",
        "ms",
        "fps",
        "ratio",
        "size",
        "count",
        "duration",
        "runtime",
        "three_digits",
        "smaller",
        "agreement",
        "uncounted",
        "moment",
        "decibels",
        "measure",
        "group",
        "figure",
        "change",
        "looked_at",
        "as_text",
        "apart",
        "core",
        "span",
        "label",
        "sure",
        "came",
    ):
        environment.filters[name] = getattr(wording, name)
    environment.filters["verbatim"] = lambda text: Markup(" ".join(text.split()))
    return environment


def _escape_markdown(value: Any) -> Any:
    """Text that stays one cell of a table and starts no markup; Markup passes as it is."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "".join(f"\\{c}" if c in "\\|<*[]`" else c for c in " ".join(value.split()))
