"""Which images a compressed file takes for another class than its parent does, and which classes it mixes up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

MATRIX_CLASSES = 32
"""A matrix of more classes cannot be read, and is large."""
WORST = 20
"""Confusions that are named."""
EXAMPLES = 16


def confidence(logits_NK: np.ndarray) -> np.ndarray:
    """float64 (N,): what softmax gives the class that each row says."""
    rows_NK = logits_NK.astype(np.float64)
    shares_NK = np.exp(rows_NK - rows_NK.max(1, keepdims=True))
    result: np.ndarray = shares_NK.max(1) / shares_NK.sum(1)
    return result


def confusion(labels_N: np.ndarray, said_N: np.ndarray, classes: int) -> dict[str, Any]:
    """How many images of each class were taken for which.

    `matrix`: a row per true class, a column per class that was said; None for more than 32 classes. `worst`: the
    commonest mistakes, `[true, said, images]`. `recall`: of every class, the images and how many were right.
    """
    known = (labels_N >= 0) & (labels_N < classes)
    labels_N, said_N = labels_N[known].astype(np.int64), said_N[known].astype(np.int64)
    width = max(classes, int(said_N.max(initial=0)) + 1)
    pairs, counts = np.unique(labels_N * width + said_N, return_counts=True)
    cells = [(int(pair) // width, int(pair) % width, int(count)) for pair, count in zip(pairs, counts, strict=True)]
    wrong = sorted((cell for cell in cells if cell[0] != cell[1]), key=lambda cell: (-cell[2], cell[:2]))
    right = {true: count for true, said, count in cells if true == said}
    matrix = None
    if width <= MATRIX_CLASSES:
        matrix = [[0] * width for _ in range(classes)]
        for true, said, count in cells:
            matrix[true][said] = count
    images = np.bincount(labels_N, minlength=classes)
    return {
        "matrix": matrix,
        "worst": [list(cell) for cell in wrong[:WORST]],
        "mistakes": sum(cell[2] for cell in wrong),
        "recall": [[int(count), right.get(true, 0)] for true, count in enumerate(images)],
    }


def compared(
    labels_N: np.ndarray, parent_N: np.ndarray, said_N: np.ndarray, sure: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """How many images only one of two networks gets right, and examples of those that the compressed one got wrong.

    `sure`: the confidence of `parent` and of `compressed`, (N,). The examples are those that the parent is surest of,
    one of every class in turn.
    """
    known = labels_N >= 0
    lost = known & (parent_N == labels_N) & (said_N != labels_N)
    order = sorted(np.flatnonzero(lost).tolist(), key=lambda index: (-float(sure["parent"][index]), index))
    turns: dict[int, int] = {}
    ranked: list[tuple[int, int, int]] = []
    for index in order:
        label = int(labels_N[index])
        ranked.append((turns.get(label, 0), len(ranked), index))
        turns[label] = turns.get(label, 0) + 1
    return {
        "images": int(known.sum()),
        "lost": int(lost.sum()),
        "gained": int((known & (parent_N != labels_N) & (said_N == labels_N)).sum()),
        "both": int((known & (parent_N != labels_N) & (said_N != labels_N)).sum()),
        "examples": [
            {
                "index": index,
                "true": int(labels_N[index]),
                "parent": int(parent_N[index]),
                "compressed": int(said_N[index]),
                "parent_confidence": round(float(sure["parent"][index]), 4),
                "compressed_confidence": round(float(sure["compressed"][index]), 4),
            }
            for _, _, index in sorted(ranked)[:EXAMPLES]
        ],
    }
