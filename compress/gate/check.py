"""Whether this machine's runtimes compute what was recorded with a baseline: numpy and the runtimes are enough.

    python -m compress.gate.check benchmarks/baseline/baseline.json OUT

writes OUT/check.md and OUT/check.json. Exit status as of `compress gate`: 0, or 3 for other outputs, 1 for an error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compress.errors import CompressError
from compress.gate.baseline import computed_here, read_baseline
from compress.gate.text import table
from compress.gate.verdict import EXIT_STATUS, Line, same_outputs, worst
from compress.targets.agent import probe


def check_files(baseline: Path) -> tuple[list[Line], dict[str, Any], int]:
    """One line per shipped file, the machine, and the number of images. Raises CompressError."""
    record, machine = read_baseline(baseline), probe()
    assert record.sample is not None
    images_NCHW = np.load(record.sample, allow_pickle=False)
    lines = []
    for name in record.shipped:
        file = record.files[name]
        assert file.path is not None
        outputs_NK = computed_here(file.path, images_NCHW)
        lines.append(same_outputs(file, outputs_NK, machine["cpu"], classes=record.task == "classification"))
    return lines, machine, len(images_NCHW)


def report(lines: Sequence[Line], machine: dict[str, Any], images: int) -> str:
    """In Markdown."""
    rows = [
        {
            "verdict": line.verdict,
            "file": line.file,
            "outputs": str(line.facts.get("outputs", "other shape")),
            "differing": str(line.facts.get("differing", "all")),
            "largest difference": f"{line.facts.get('largest', float('inf')):.3g} {line.facts.get('unit', '')}",
            **_classes(line),
        }
        for line in lines
    ]
    verdict = worst([line.verdict for line in lines])
    title = "computes what was recorded" if verdict == "ACCEPT" else "computes something else than was recorded"
    runtimes = ", ".join(f"{name} {version}" for name, version in machine["runtimes"].items())
    parts = [
        f"## {verdict}: this machine {title}",
        table(rows),
        f"{machine['cpu']} ({machine['arch']}), {machine['os']}; {runtimes}; Python {machine['python']}.",
        f"{images} evaluation images; LSB is a step of the int8 output's grid, of which one at most may differ.",
    ]
    return "\n\n".join(parts) + "\n"


def _classes(line: Line) -> dict[str, str]:
    """A column for files whose outputs are classes, or are of another shape than was recorded."""
    if line.facts and "classes_changed" not in line.facts:
        return {}
    return {"classes changed": str(line.facts.get("classes_changed", "all"))}


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 2:
        print("usage: python -m compress.gate.check BASELINE.json OUT", file=sys.stderr)
        return 2
    out = Path(arguments[1])
    try:
        lines, machine, images = check_files(Path(arguments[0]))
        out.mkdir(parents=True, exist_ok=True)
        verdict = worst([line.verdict for line in lines])
        found = {"verdict": verdict, "machine": machine, "lines": [line.as_dict() for line in lines]}
        (out / "check.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (out / "check.md").write_text(report(lines, machine, images), encoding="utf-8")
    except (CompressError, OSError) as error:
        print(f"check: {error}", file=sys.stderr)
        return 1
    print((out / "check.md").read_text(encoding="utf-8"))
    return EXIT_STATUS[verdict]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
