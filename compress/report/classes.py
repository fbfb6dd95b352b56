"""What a run says of its data, and of single classes: how many images, and how many of them are right."""

from __future__ import annotations

from typing import Any

from compress.report import wording
from compress.report.folder import Stage
from compress.report.parts import Loading, RunDescription

SHOWN = 12
"""Classes in a table of those that lost most."""
LISTED = 200
"""Classes whose images are counted one by one."""


def recall(verify: dict[str, Any] | None, labels: list[str]) -> dict[str, Any] | None:
    """The classes whose part of right answers changed most; None without two files to compare."""
    wrong = verify and verify["wrong"]
    tables = verify["confusion"] if verify else {}
    if not wrong or wrong["file"] not in tables or wrong["parent"] not in tables:
        return None
    found = []
    for number, (now, before) in enumerate(
        zip(tables[wrong["file"]]["recall"], tables[wrong["parent"]]["recall"], strict=False)
    ):
        if now[0] and before[0]:
            found.append(
                {
                    "label": wording.label(number, labels),
                    "images": now[0],
                    "parent": before[1] / before[0],
                    "compressed": now[1] / now[0],
                }
            )
    changed = [row for row in found if row["compressed"] != row["parent"]]
    changed.sort(key=lambda row: -abs(row["compressed"] - row["parent"]))
    return {
        "file": wrong["file"],
        "parent": wrong["parent"],
        "changed": len(changed),
        "of": len(found),
        "classes": sorted(changed[:SHOWN], key=lambda row: row["compressed"] - row["parent"]),
    }


def data(run: RunDescription, stages: list[Stage], verify: dict[str, Any] | None) -> dict[str, Any]:
    """A sentence on the data, images per class and split where they are known, samples of the network's input."""
    loading = next((stage.metrics for stage in stages if isinstance(stage.metrics, Loading)), None)
    at = next((stage.manifest.folder for stage in stages if isinstance(stage.metrics, Loading)), "")
    counts = dict(loading.classes) if loading else {}
    if "evaluation" not in counts and verify and verify["confusion"]:
        first = next(iter(verify["confusion"].values()))
        counts["evaluation"] = [images for images, _ in first["recall"]]
    counts = {split: images for split, images in counts.items() if len(images) == len(run.data.labels)}
    listed = [
        {"label": label, "images": [images[number] for images in counts.values()]}
        for number, label in enumerate(run.data.labels)
    ]
    return {
        "sentence": _sentence(run, counts),
        "splits": list(counts),
        "classes": listed if counts and len(listed) <= LISTED else [],
        "samples": [
            sample.model_dump(mode="json") | {"image": f"stages/{at}/{sample.image}"}
            for sample in (loading.samples if loading else [])
        ],
    }


def _sentence(run: RunDescription, counts: dict[str, list[int]]) -> str:
    own = run.data
    parts = [own.use] if own.use else []
    uses = ((own.train, "to train on"), (own.evaluation, "to judge by"))
    parts += [f"{number:,} images {use}" for number, use in uses if number]
    if own.labels and own.task == "classification":
        parts.append(f"{len(own.labels):,} classes")
    elif own.labels:
        parts.append(f"{len(own.labels):,} outputs ({own.task.replace('_', ' ')})")
    for split, images in counts.items():
        if min(images) != max(images):
            parts.append(f"{split} {min(images):,} to {max(images):,} images per class")
    size = run.preprocess.get("size")
    parts += [f"the network sees {size} × {size} pixels"] if size else []
    return "; ".join(parts)[:1].upper() + "; ".join(parts)[1:] + "." if parts else "The run says nothing of its data."
