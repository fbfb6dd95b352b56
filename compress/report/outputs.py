"""How well each output of a network does, where there are no classes: each label's precision, each number's error."""

from __future__ import annotations

from typing import Any

from compress.report.parts import NetworkFigures, Verification, VerifiedFile

COLUMNS = {
    "multi_label": ("average_precision", "right"),
    "regression": ("r2", "mae", "rmse"),
}
"""What is shown of an output, by task."""
TITLES = {
    "average_precision": "average precision",
    "right": "right at probability 0.5",
    "r2": "R2",
    "mae": "mean absolute error",
    "rmse": "root mean square error",
}


def outputs(
    task: str,
    best: dict[str, Any] | None,
    baseline: dict[str, Any] | None,
    verification: Verification | None,
    network: NetworkFigures | None,
) -> dict[str, Any] | None:
    """A row for each output, of the file that the headline speaks of beside its parent's, or of the last torch network.

    None for classes, and where nothing was measured.
    """
    columns = COLUMNS.get(task, ())
    files = verification.files if verification else {}
    now, before = (files.get(file["file"]) if file else None for file in (best, baseline))
    measured: VerifiedFile | NetworkFigures | None = now if now and now.outputs else network
    if not columns or not measured or not measured.outputs:
        return None
    compared = before if measured is now and before is not now else None
    others = {row.name: row for row in compared.outputs} if compared else {}
    return {
        "of": best["file"] if best and measured is now else "the torch network",
        "parent": baseline["file"] if baseline and others else None,
        "images": measured.images,
        "titles": [TITLES[column] for column in columns],
        "rows": [
            {
                "name": row.name,
                "positives": row.positives,
                "figures": [getattr(row, column) for column in columns],
                "before": [getattr(others[row.name], column) for column in columns] if row.name in others else None,
                "percent": [column in ("average_precision", "right") for column in columns],
            }
            for row in measured.outputs
        ],
    }
