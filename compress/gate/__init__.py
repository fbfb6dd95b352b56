"""Whether a run may replace the one before it: baselines, goals, verdicts, and tables of the differences."""

from compress.gate.baseline import make_baseline, read, read_baseline
from compress.gate.goals import GROUPS, Goal, parse
from compress.gate.judge import Asked, asked, gate
from compress.gate.record import BaselineError, Record, read_run
from compress.gate.text import (
    as_json,
    comparison_json,
    comparison_markdown,
    comparison_notes,
    comparison_rows,
    conditions,
    headline,
    markdown,
    reasons,
    rows,
)
from compress.gate.verdict import EXIT_STATUS, Judgement, Line, Verdict

__all__ = [
    "EXIT_STATUS",
    "GROUPS",
    "Asked",
    "BaselineError",
    "Goal",
    "Judgement",
    "Line",
    "Record",
    "Verdict",
    "as_json",
    "asked",
    "comparison_json",
    "comparison_markdown",
    "comparison_notes",
    "comparison_rows",
    "conditions",
    "gate",
    "headline",
    "make_baseline",
    "markdown",
    "parse",
    "read",
    "read_baseline",
    "read_run",
    "reasons",
    "rows",
]
