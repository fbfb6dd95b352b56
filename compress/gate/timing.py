"""How much longer one file takes than another, from samples in rounds, with a bootstrap interval.

Samples of one process are not independent: rounds are drawn first, then samples within each (Davison & Hinkley,
Bootstrap Methods, 1997, section 3.8).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from compress.gate.paired import CONFIDENCE

Rounds = Sequence[Sequence[float]]
"""Samples in ms, one list per round, which is one process."""

RESAMPLES = 1000
DRAWN_AT_ONCE = 1_000_000
"""Samples, to bound the memory."""
NOW, APART, SELF = "timed now, in turns", "two recordings", "the baseline's own recording"
"""Where two series come from."""


@dataclass(frozen=True)
class Timed:
    """One file of the baseline and of the run on one runtime, and how far to trust the two."""

    baseline: Rounds
    candidate: Rounds
    interval: tuple[float, float]
    """Of the candidate's median over the baseline's: above 1 is slower."""
    aa_ratio: float | None
    """What did not change, measured for the run over measured for the baseline; None where nothing tells."""
    how: str
    """NOW, APART or SELF."""
    noisy: tuple[str, ...] = field(default=())
    """Why the two cannot be compared, in sentences."""
    restless: tuple[str, ...] = field(default=())
    """Why the candidate's own times are not to be believed: all that counts against a number."""

    unsteady: tuple[str, ...] = field(default=())
    """Why either recording is not to be believed by itself."""

    @property
    def ratio(self) -> float:
        return median_ms(self.candidate) / median_ms(self.baseline)


def median_ms(rounds: Rounds) -> float:
    return float(np.median(np.concatenate([np.asarray(samples, float) for samples in rounds])))


def resampled_medians(rounds: Rounds, *, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """Medians in ms of bootstrap resamples, (resamples,): as many rounds as there are, as many samples of each."""
    rng = np.random.default_rng(seed)
    lengths = np.array([len(samples) for samples in rounds])
    padded = np.zeros((len(rounds), lengths.max()))
    for row, samples in zip(padded, rounds, strict=True):
        row[: len(samples)] = samples
    each = round(lengths.mean())
    at_once = max(1, DRAWN_AT_ONCE // (len(rounds) * each))
    medians = []
    for start in range(0, resamples, at_once):
        count = min(at_once, resamples - start)
        drawn = rng.integers(len(rounds), size=(count, len(rounds), 1))
        places = (rng.random((count, len(rounds), each)) * lengths[drawn]).astype(int)
        medians.append(np.median(padded[drawn, places].reshape(count, -1), axis=1))
    return np.concatenate(medians)


def interval_of(values: np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The middle part of resampled values."""
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def between_recordings(
    baseline: Rounds, candidate: Rounds, *, control: tuple[Rounds, Rounds] | None, tolerance: float, seed: int = 0
) -> Timed:
    """Two series recorded at different times; `control` is a file that both recordings measured, which did not change.

    The control tells drift from change: off by more than `tolerance`, the two are not comparable; off by less, the
    interval is widened by as much. Without a control nothing can be said.
    """
    how = APART
    if [list(samples) for samples in baseline] == [list(samples) for samples in candidate]:
        return Timed(baseline, candidate, (1.0, 1.0), None, SELF)  # the baseline was made of this very run
    # The two did not run side by side, so their rounds are drawn apart.
    ratios = resampled_medians(candidate, seed=seed) / resampled_medians(baseline, seed=seed + 1)
    low, high = interval_of(ratios)
    if control is None:
        why = "no file was measured in both recordings that could tell drift from change: --measure times both now"
        return Timed(baseline, candidate, (low, high), None, how, (why,))
    aa_ratio = median_ms(control[1]) / median_ms(control[0])
    drift = max(aa_ratio, 1 / aa_ratio)
    noisy = (
        () if drift <= 1 + tolerance else (f"an unchanged file took {aa_ratio:.3f} times as long as in the baseline",)
    )
    return Timed(baseline, candidate, (low / drift, high * drift), aa_ratio, how, noisy)
