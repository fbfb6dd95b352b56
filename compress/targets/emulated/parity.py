"""Whether a file computes on ARM kernels what it computes here, bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compress.targets import asking
from compress.targets.agent import random_input
from compress.targets.local import open_model
from compress.targets.machine import Machine

RANDOM_IMAGES = 4
"""Where no images are given."""


def parity(
    files: Mapping[str, Path],
    images_real: np.ndarray | None,
    machines: Mapping[str, Machine],
    on_result: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Per file and CPU, how many numbers of the first output differ from those of the same runtime here.

    `machines` has an entered machine for each CPU. `max_lsb` is the largest difference of integer outputs; for floats
    it is 0 where no bit differs, else None, and `max_difference` says how far they are apart (None: one is no number).
    A file that turns int8 outputs into floats as its last step gives equal floats for equal integers, and no others.
    Without images random ones are taken.
    """
    rows = []
    for name, path in files.items():
        model = open_model(path)
        images = images_real
        if images is None:
            images = np.concatenate(
                [model.input.real(random_input(model.input, seed)) for seed in range(RANDOM_IMAGES)]
            )
        here = model.answers(images)
        for cpu, machine in machines.items():
            there = asking.answers(machine, path, images)
            row = {"file": name, "runtime": model.runtime, "cpu": cpu, "images": len(images)}
            rows.append({**row, **compared(there.outputs_NK, here), "host_sha256": sha256_of(here)})
            on_result(f"{name} on {cpu}: {rows[-1]['differing']} of {rows[-1]['outputs']} outputs differ")
    return rows


def compared(there: np.ndarray, here: np.ndarray) -> dict[str, Any]:
    """`outputs`, `differing`, `max_lsb`, `max_difference`, `outputs_sha256` of two arrays of one file's output."""
    if there.shape != here.shape or there.dtype != here.dtype:
        raise ValueError(f"{there.dtype} {there.shape} cannot be compared with {here.dtype} {here.shape}")
    bits = np.dtype(f"u{here.dtype.itemsize}")
    differing = np.ascontiguousarray(there).view(bits) != np.ascontiguousarray(here).view(bits)
    integers = here.dtype.kind in "iu"
    wide = np.int64 if integers else np.float64
    largest = np.abs(there.astype(wide) - here.astype(wide))[differing].max(initial=0)
    lsb = int(largest) if integers else None
    return {
        "outputs": int(here.size),
        "differing": int(differing.sum()),
        "max_lsb": lsb if differing.any() else 0,
        "max_difference": float(largest) if not integers and np.isfinite(largest) else None,
        "outputs_sha256": sha256_of(there),
    }


def sha256_of(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
