"""Scales of sums, differences, products and concatenations whose values every runtime rounds to the same steps.

A step of a sum is scale_a / scale_c * (a - zero_a) + scale_b / scale_c * (b - zero_b), rounded. Runtimes compute it in
float32 or with multipliers of 21 bits, so of the 65,536 pairs (a, b) those few that lie within some 10^-5 of a half are
rounded to one side here and to the other there. Which pairs these are depends on the last bits of the scales. If one of
them is common in the data, as small numbers are, one value in a thousand differs by a step, and ten layers later
logits differ by five. A scale that is another by some 10^-6 of itself has other such pairs, or none.

The formulas below are those of the runtimes' kernels; tests compare them with the runtimes on all pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

Joint = Literal["sum", "difference", "product", "concatenation"]
Points = tuple[float, int]
"""Scale (a float32 value) and zero point of a grid of 256 steps."""
Array = np.ndarray[Any, Any]

LARGEST_NUDGE = 2.0**-10
"""Of a scale, as a part of it: a quarter of a step at the far end of the grid."""
NUDGES = tuple(LARGEST_NUDGE * 2.0 ** (-k / 4) for k in range(36, 0, -1))
"""Small ones first: each value that a nudge changes is one more difference from the network that was trained. Of 3,925
images through one MobileNetV2, 1.7 % changed class in freezing without nudges, 1.9 % with these, and 2.1 % with
multiples of 2**-16."""
MANY = 256
"""So many disputed pairs are exact halves, which small nudges leave in doubt."""
WINDOW = 2.0**-12
"""Around halves: no kernel is as many steps off, per unit of its largest ratio of scales."""
F32 = np.float32


def settled_scale(joint: Joint, operands: Sequence[Points], result: Points, *, largest: float | None = None) -> float:
    """The scale, at most `LARGEST_NUDGE` of itself from that of `result`, at which the fewest values are disputed.

    The nearest one, if several; none is above `largest`. A concatenation that does not round some of its numbers keeps
    its scale, so that it still does not.
    """
    scale, zero_point = result
    if joint == "concatenation" and result in operands:
        return scale
    best, fewest = scale, disputed(joint, operands, result)
    nudges = NUDGES if fewest < MANY else [nudge for nudge in NUDGES if nudge > 2**-16]
    for factor in (1 + sign * nudge for nudge in nudges for sign in (1, -1)):
        if fewest == 0:
            break
        candidate = float(F32(scale * factor))
        if largest is None or candidate <= largest:
            count = disputed(joint, operands, (candidate, zero_point))
            if count < fewest:
                best, fewest = candidate, count
    return best


def disputed(joint: Joint, operands: Sequence[Points], result: Points) -> int:
    """How many of all pairs of steps (all steps, of a concatenation's operands) some runtime rounds differently.

    Differently from exact arithmetic, halves to even, as `integer` computes.
    """
    if joint == "concatenation":
        return sum(_disputed(np.add, _copies, operand, None, result) for operand in operands)
    exact, kernels = PAIRS[joint]
    return _disputed(exact, kernels, operands[0], operands[1], result)


def _disputed(exact: np.ufunc, kernels: Callable[..., list[Array]], a: Points, b: Points | None, c: Points) -> int:
    i = np.arange(256.0) - a[1]
    j = np.zeros(1) if b is None else np.arange(256.0) - b[1]
    second = 0.0 if b is None else b[0]
    steps = exact.outer(i * a[0], j * second).reshape(-1) / c[0]
    window = WINDOW if exact is np.multiply else WINDOW * max(1.0, a[0] / c[0], second / c[0])
    from_whole = np.subtract(steps, np.rint(steps))  # -0.5 to 0.5
    near = np.flatnonzero(np.abs(from_whole, out=from_whole) > 0.5 - window)
    if not near.size:
        return 0
    row, column = np.divmod(near, j.size)
    expected = np.clip(np.rint(steps[near]) + c[1], 0, 255)
    found = np.stack(kernels(i[row], j[column], a, b, c)) if b else np.stack(kernels(i[row], a, c))
    return int((np.clip(found, 0, 255) != expected).any(0).sum())


# Kernels: steps of the result, as whole numbers in float64 and not clipped, of the steps from zero of its operands.


def _sums(i: Array, j: Array, a: Points, b: Points, c: Points) -> list[Array]:
    """Of QLinearAdd in ONNX Runtime (x86 with and without AVX2, ARM), of XNNPACK's qs8-vadd, and of plain float32."""
    (_, zero_a), (_, zero_b), (_, zero_c) = a, b, c
    ratio_a, ratio_b = F32(a[0]) / F32(c[0]), F32(b[0]) / F32(c[0])
    p, q = (i + zero_a).astype(F32), (j + zero_b).astype(F32)
    offset_b = ratio_b * F32(zero_b)
    rounded_twice = F32(zero_c) - (ratio_a * F32(zero_a) + offset_b)
    rounded_once = F32(zero_c) - _fused(ratio_a, F32(zero_a), offset_b)  # as compilers contract it
    results = [(rounded_twice + p * ratio_a) + q * ratio_b]
    for offset in (rounded_twice, rounded_once):
        results += [_fused(p, ratio_a, _fused(q, ratio_b, offset)), _fused(q, ratio_b, _fused(p, ratio_a, offset))]
    floats = (i.astype(F32) * F32(a[0]) + j.astype(F32) * F32(b[0])) / F32(c[0])
    fixed = _fixed_point(i, j, ratio_a, ratio_b, bits=22)
    away = np.trunc(fixed + np.copysign(0.5, fixed))
    up = np.floor(_fixed_point(i, j, ratio_a, ratio_b, bits=21) + 0.5)
    return [*(np.rint(r).astype(np.float64) for r in results), *(r + zero_c for r in (np.rint(floats), away, up))]


def _differences(i: Array, j: Array, a: Points, b: Points, c: Points) -> list[Array]:
    """Of plain float32, as ONNX Runtime computes them, and of XNNPACK's qs8-vadd with a negative multiplier."""
    floats = (i.astype(F32) * F32(a[0]) - j.astype(F32) * F32(b[0])) / F32(c[0])
    fixed = _fixed_point(i, j, F32(a[0]) / F32(c[0]), -F32(b[0]) / F32(c[0]), bits=21)
    return [np.rint(floats).astype(np.float64) + c[1], np.floor(fixed + 0.5) + c[1]]


def _products(i: Array, j: Array, a: Points, b: Points, c: Points) -> list[Array]:
    """Of QLinearMul in ONNX Runtime (with and without FMA), of XNNPACK's qs8-vmul, and of plain float32."""
    ratio = F32(a[0]) * F32(b[0]) / F32(c[0])
    product = (i * j).astype(F32)
    zero_c = F32(c[1])
    floats = i.astype(F32) * F32(a[0]) * (j.astype(F32) * F32(b[0])) / F32(c[0])
    results = [product * ratio + zero_c, _fused(product, ratio, zero_c)]
    results += [np.rint(product * ratio) + zero_c, np.rint(floats) + zero_c]
    return [np.rint(r).astype(np.float64) for r in results]


def _copies(i: Array, a: Points, c: Points) -> list[Array]:
    """Of numbers that are only put on another grid: QuantizeLinear by division, QUANTIZE by the reciprocal."""
    floats = i.astype(F32) * F32(a[0])
    by = (floats / F32(c[0]), floats * (F32(1) / F32(c[0])))
    return [np.rint(r).astype(np.float64) + c[1] for r in by]


PAIRS: dict[Joint, tuple[np.ufunc, Callable[..., list[Array]]]] = {
    "sum": (np.add, _sums),
    "difference": (np.subtract, _differences),
    "product": (np.multiply, _products),
}


def _fused(x: Any, y: Any, z: Any) -> Any:
    """x * y + z in float32 with one rounding. (Of x, 8 bits are used, so float64 holds the product.)"""
    return F32(np.float64(x) * np.float64(y) + np.float64(z))


def _fixed_point(i: Array, j: Array, ratio_a: Any, ratio_b: Any, *, bits: int) -> Array:
    """The sum before its last rounding, with whole multipliers, the larger one of `bits` bits."""
    _, exponent = np.frexp(max(abs(ratio_a), abs(ratio_b)))  # the larger ratio is in [0.5, 1) * 2**exponent
    shift = bits - int(exponent)
    multipliers = [np.rint(np.ldexp(np.float64(ratio), shift)) for ratio in (ratio_a, ratio_b)]
    return np.ldexp(i * multipliers[0] + j * multipliers[1], -shift)
