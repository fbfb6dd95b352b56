"""How large the files are and how much memory their activations need. An untrained network's files are as large."""

from __future__ import annotations

from dataclasses import dataclass

from compress.doctor.program import Program


@dataclass(frozen=True)
class FileSize:
    """One exported file. Its metadata (labels, recipe) is not in it yet: about a kilobyte more."""

    kind: str
    """float, float16 or int8."""
    format: str
    size_bytes: int
    stored_bytes: int
    """Parameters times their bytes: 4, 2, or 1 with four for each bias. The rest of the file says what is computed."""
    peak_bytes: int | None
    """The largest sum of activations alive at once in the runtime's plan, at batch 1; None where it was not asked."""


def stored_bytes(kind: str, weights: int, others: int) -> int:
    """What `weights` of convolutions and linear layers take with `others` (biases, norms) beside them."""
    per_weight = {"float": 4, "float16": 2, "int8": 1}[kind]
    return per_weight * weights + (2 if kind == "float16" else 4) * others


def file_size(file: str, content: bytes, counts: tuple[int, int], program: Program | None) -> FileSize:
    """The entry of a file such as `int8.onnx`; `counts` are (weights, other parameters)."""
    kind, file_format = file.split(".")
    peak = program.peak_bytes() if program else None
    return FileSize(kind, file_format, len(content), stored_bytes(kind, *counts), peak)
