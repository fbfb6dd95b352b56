"""Outputs of one file from two machines, or two days, held against each other."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

HUGE = 1e30
"""In place of a difference that is no number."""


def compared(there: np.ndarray, here: np.ndarray, *, int8: bool = False) -> dict[str, Any]:
    """`outputs`, `differing` (in any bit), `max_lsb`, `max_difference`, `largest_steps`, `outputs_sha256` of `there`.

    `max_lsb` is the largest difference of integers; for floats it is 0 where no bit differs, else None, and
    `max_difference` says how far they are apart (None: one is no number). With `int8`, for files that turn int8 outputs
    into floats as their last step, `largest_steps` tells that difference in steps of the grid. ValueError for arrays of
    other shapes or types.
    """
    if there.shape != here.shape or there.dtype != here.dtype:
        raise ValueError(f"{there.dtype} {there.shape} cannot be compared with {here.dtype} {here.shape}")
    bits = np.dtype(f"u{here.dtype.itemsize}")
    differing = np.ascontiguousarray(there).view(bits) != np.ascontiguousarray(here).view(bits)
    integers = here.dtype.kind in "iu"
    wide = np.int64 if integers else np.float64
    largest = np.abs(there.astype(wide) - here.astype(wide))[differing].max(initial=0)
    lsb = int(largest) if integers else None
    steps = float(largest) / output_step(here) if np.isfinite(largest) else HUGE
    return {
        "outputs": int(here.size),
        "differing": int(differing.sum()),
        "max_lsb": lsb if differing.any() else 0,
        "max_difference": float(largest) if not integers and np.isfinite(largest) else None,
        "largest_steps": steps if int8 and not integers else None,
        "outputs_sha256": sha256_of(there),
    }


def output_step(outputs_NK: np.ndarray) -> float:
    """The step of an int8 file's output: 1 for stored integers; for real values their grid's.

    That is the smallest gap between two of them. Where they lie on no grid, because the last layers compute in float,
    it is one of 255 steps over their range, as in `verify`.
    """
    if outputs_NK.dtype.kind != "f":
        return 1.0
    gaps = np.diff(np.unique(outputs_NK[np.isfinite(outputs_NK)].astype(np.float64)))
    if not gaps.size:
        return 1.0
    span = float(gaps.sum())
    return float(gaps.min()) if span / gaps.min() <= 255.5 else span / 255


def sha256_of(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
