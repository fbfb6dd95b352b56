"""How far two results of one network are apart: in steps of a grid, relative to the largest number, in decibels."""

from __future__ import annotations

from typing import Any

import numpy as np

from compress.targets.outputs import HUGE
from compress.tasks import Rules, agreement, task_of

CLASSES = task_of("classification")
Pair = dict[str, Any]
"""One entry of the report: names `a` and `b`, measures, `verdict` (PASS or FAIL) and, where it failed, `reason`."""


def compare_decisions(
    a: str, b: str, logits_a: np.ndarray, logits_b: np.ndarray, tolerance: float, rules: Rules = CLASSES
) -> Pair:
    """How many decisions (classes of images) differ in two results (N, K). One is no evidence, unless none may be."""
    alike = rules.same(_rows(logits_a), _rows(logits_b))
    same, moved = float(alike.mean()), int((~alike).sum())
    passed = moved <= tolerance * alike.size or (moved == 1 and tolerance > 0)
    return {
        "a": a,
        "b": b,
        "top1_agreement": same,
        "sqnr_db": finite(sqnr_db(logits_a, logits_b)),
        "verdict": "PASS" if passed else "FAIL",
        "reason": "" if passed else f"{a} and {b} differ in {rules.differing.format(f'{1 - same:.1%}')}",
    }


def compare_steps(
    a: str, b: str, steps_a: np.ndarray, steps_b: np.ndarray, tolerance_lsb: int, rules: Rules = CLASSES
) -> Pair:
    """How far two int8 results (N, K) are apart, as whole numbers of the output's grid."""
    difference = np.abs(steps_a.astype(np.int64) - steps_b.astype(np.int64))
    largest = int(difference.max())
    no_numbers = max(int(np.abs(steps_a).max()), int(np.abs(steps_b).max())) >= 2**31
    passed = largest <= tolerance_lsb and not no_numbers
    reason = f"{a} and {b} differ by {largest} LSB, allowed {tolerance_lsb}"
    if no_numbers:
        reason = f"{a} or {b} gives what is no number"
    return {
        "a": a,
        "b": b,
        "logits": int(difference.size),
        "differing": int((difference > 0).sum()),
        "max_lsb": largest,
        "histogram": histogram(difference),
        "top1_agreement": agreement(rules, steps_a, steps_b),
        "worst_image": int(per_image(difference).argmax()),
        "images_beyond": len(difference) if no_numbers else int((per_image(difference) > tolerance_lsb).sum()),
        "verdict": "PASS" if passed else "FAIL",
        "reason": "" if passed else reason,
    }


def compare_floats(
    a: str, b: str, logits_a: np.ndarray, logits_b: np.ndarray, tolerance: float, rules: Rules = CLASSES
) -> Pair:
    """How far two float results (N, K) are apart, relative to the largest logit of `a`."""
    difference = np.nan_to_num(np.abs(logits_a - logits_b), nan=HUGE, posinf=HUGE)
    largest = float(difference.max())
    relative = largest / max(float(np.nan_to_num(np.abs(logits_a), posinf=HUGE).max()), 1e-12)
    passed = relative <= tolerance
    return {
        "a": a,
        "b": b,
        "logits": int(logits_a.size),
        "max_abs": largest,
        "max_relative": relative,
        "top1_agreement": agreement(rules, logits_a, logits_b),
        "worst_image": int(per_image(difference).argmax()),
        "verdict": "PASS" if passed else "FAIL",
        "reason": "" if passed else f"{a} and {b} differ by {relative:.2g} of the largest logit, allowed {tolerance:g}",
    }


def sqnr_db(exact: np.ndarray, rounded: np.ndarray) -> float:
    """10 log10(sum x^2 / sum (x - q)^2): the signal over what quantization added; infinite where nothing differs."""
    exact, rounded = exact.astype(np.float64), rounded.astype(np.float64)
    noise = float(((exact - rounded) ** 2).sum())
    signal = float((exact**2).sum())
    if noise == 0:
        return float("inf")
    return float(10 * np.log10(signal / noise)) if signal > 0 else float("-inf")


def finite(decibels: float) -> float | None:
    """For JSON: None where nothing differs (or there is no signal)."""
    return decibels if np.isfinite(decibels) else None


def histogram(difference: np.ndarray) -> dict[str, int]:
    """How many values differ by how many steps."""
    sizes, counts = np.unique(difference, return_counts=True)
    return {str(size): int(count) for size, count in zip(sizes, counts, strict=True)}


def per_image(difference: np.ndarray) -> np.ndarray:
    """The largest difference of each image, (N,)."""
    largest: np.ndarray = _rows(difference).max(1)
    return largest


def _rows(values: np.ndarray) -> np.ndarray:
    return values.reshape(len(values), -1)
