"""What layers return, as one vector for each image, for the losses that compare images with images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compress.errors import ModelError
from compress.losses.lesson import Facts


def embedding(features: Tensor) -> Tensor:
    """(N, C): the mean over the positions of maps (N, C, H, W) or tokens (N, tokens, C); (N, C) stays as it is."""
    if features.ndim == 4:
        return features.mean((2, 3))
    return features.mean(1) if features.ndim == 3 else features


def as_maps(features: Tensor) -> Tensor:
    """(N, C, H, W): maps stay as they are, tokens (N, tokens, C) become one column, vectors (N, C) one pixel."""
    if features.ndim == 4:
        return features
    return features.transpose(1, 2)[..., None] if features.ndim == 3 else features[:, :, None, None]


def distances(vectors_ND: Tensor) -> Tensor:
    """(N, N): Euclidean distances between rows; those of equal rows are exactly 0 and get no gradient.

    Not by |x|**2 + |y|**2 - 2 x'y, whose rounding makes equal rows differ and their gradient enormous.
    """
    return torch.cdist(vectors_ND, vectors_ND, compute_mode="donot_use_mm_for_euclid_dist")


def width(shape: Sequence[int]) -> int:
    """Channels, by a layer's shape without the batch: (C, H, W), (tokens, C) or (C,)."""
    return int(shape[-1] if len(shape) == 2 else shape[0])


def refuse_unless_embedded(loss: str, facts: Facts) -> None:
    """Raises ModelError, with the layer's name, for what `embedding` and `as_maps` do not understand."""
    for name, *both in zip(facts.layers, facts.student_shapes, facts.teacher_shapes, strict=True):
        for whose, shape in zip(("student", "teacher"), both, strict=True):
            if len(shape) not in (1, 2, 3) or 0 in shape:
                problem = (
                    f"`{loss}` needs (C, H, W), (tokens, C) or (C,) for each image, not the {whose}'s {tuple(shape)}"
                )
                raise ModelError(name, problem, "choose other `layers`")
    if not facts.layers:
        raise ModelError("layers", f"`{loss}` compares what layers return, and there are none", "name some `layers`")


def refuse_unless_aligned(loss: str, facts: Facts) -> None:
    """Raises ModelError, with the layer's name, where student and teacher differ in more than the channels."""
    refuse_unless_embedded(loss, facts)
    for name, student, teacher in zip(facts.layers, facts.student_shapes, facts.teacher_shapes, strict=True):
        if _positions(student) != _positions(teacher):
            problem = f"`{loss}` compares position by position; the student's shape is {tuple(student)}"
            raise ModelError(
                name, f"{problem}, the teacher's {tuple(teacher)}", "map `layers` to others of the teacher"
            )


def _positions(shape: Sequence[int]) -> tuple[int, ...]:
    """All axes but that of the channels; vectors, tokens and maps always differ."""
    return tuple(shape[:-1]) if len(shape) == 2 else tuple(shape[1:])
