"""What is asked of a network, one file per task: plain functions for its loss, its score and its decisions.

Whatever judges outputs goes through the `Rules` of `Data.task`. To add one: its file, its name in
`compress.labels.Task`, its line in `RULES`, one test; then say which losses and schemes serve it (their `tasks`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.labels import Task
from compress.tasks import classification, multi_label, regression

if TYPE_CHECKING:  # scores are read where there is no torch
    from torch import Generator, Tensor

    from compress.product import Scale


@dataclass(frozen=True)
class Rules:
    """How outputs (N, K) of one task are judged."""

    name: Task
    score_name: str
    percent: bool
    """Whether the score is a fraction that people read as a percentage."""
    kept: Callable[[np.ndarray], np.ndarray]
    """What of the outputs a score needs: a class for each image, or the outputs themselves."""
    score: Callable[..., float]
    """Of what was kept and the labels; larger is better, 1 is perfect. Without classes also of how often each image
    counts, (N,)."""
    same: Callable[[np.ndarray, np.ndarray], np.ndarray]
    """bool (N,) or (N, K): which decisions two results share."""
    differing: str
    """What two results differ in, with `{}` for the part of the decisions that they do not share."""
    details: Callable[[np.ndarray, np.ndarray, Sequence[str], Scale | None], list[dict[str, Any]]]
    """A row for each output, by its name, of what was kept and the labels."""
    drawn: Callable[[Tensor, Generator], Tensor]
    """Labels for outputs (on the CPU), drawn from the distribution that the task's loss takes them for."""
    surprise: Callable[[Tensor, Tensor], Tensor]
    """(N,): -log p of the labels under that distribution, in nats; without weights of classes or smoothing."""


def _as_they_are(outputs_NK: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(outputs_NK, np.float32)


RULES: Mapping[Task, Rules] = {
    rules.name: rules
    for rules in (
        Rules(
            "classification",
            "accuracy",
            True,
            classification.decided,
            classification.accuracy,
            classification.same,
            "the class of {} of images",
            classification.details,
            classification.drawn,
            classification.surprise,
        ),
        Rules(
            "multi_label",
            "mean average precision",
            True,
            _as_they_are,
            multi_label.mean_average_precision,
            multi_label.same,
            "{} of the labels' answers",
            multi_label.details,
            multi_label.drawn,
            multi_label.surprise,
        ),
        Rules(
            "regression",
            "R2",
            False,
            _as_they_are,
            regression.r2,
            regression.same,
            "{} of the numbers",
            regression.details,
            regression.drawn,
            regression.surprise,
        ),
    )
}


def task_of(name: Task) -> Rules:
    """The rules of a task by its name, as `Data.task` has it."""
    return RULES[name]


def agreement(rules: Rules, outputs_a: np.ndarray, outputs_b: np.ndarray) -> float:
    """The part of the decisions that two results of one network share, in [0, 1]."""
    rows_a, rows_b = (outputs.reshape(len(outputs), -1) for outputs in (outputs_a, outputs_b))
    return float(rules.same(rows_a, rows_b).mean())
