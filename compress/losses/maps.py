"""What layers return, as channels by positions, for the losses that compare where or how much channels are active.

A convolution's (N, C, H, W) has H * W positions; a transformer's (N, tokens, C) has one for each token, the class token
among them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compress.errors import ModelError
from compress.losses.lesson import Facts


def channels_by_positions(features: Tensor) -> Tensor:
    """(N, C, P): P = H * W of a map (N, C, H, W), P = tokens of (N, tokens, C)."""
    return features.flatten(2) if features.ndim == 4 else features.transpose(1, 2)


def unit(vectors: Tensor, *, dim: int, shortest: float = 1e-6) -> Tensor:
    """`vectors` at length 1 along `dim`; one shorter than `shortest` becomes 0 and gets no gradient.

    A dead channel has no direction. Dividing by a small number instead gives it a gradient of one over that number.
    """
    squares = vectors.square().sum(dim, keepdim=True)
    alive = squares > shortest**2
    return vectors * torch.where(alive, squares, 1).rsqrt() * alive


def positions(shape: Sequence[int]) -> int:
    """How many places a layer's output has for an image, by its shape without the batch; 1 for a vector."""
    match tuple(shape):
        case (_, height, width):
            return int(height * width)
        case (tokens, _):
            return int(tokens)
    return 1


def refuse_unless_maps(loss: str, facts: Facts, *, tokens: bool = True) -> None:
    """Raises ModelError, with the layers' names, where a layer returns no map (C, H, W), nor (tokens, C) if allowed."""
    allowed = (3, 2) if tokens else (3,)
    wrong = {name: shape for name, shape in _layers(facts) if len(shape) not in allowed}
    if wrong:
        shapes = ", ".join(str(shape) for shape in wrong.values())
        wanted = "a map (C, H, W) or (tokens, C)" if tokens else "a map (C, H, W)"
        raise ModelError(", ".join(wrong), f"`{loss}` needs {wanted}, not {shapes}", "choose other `layers`")


def refuse_unless_places(loss: str, facts: Facts) -> None:
    """Raises ModelError if no layer has two positions: what is compared between positions would always be 0."""
    if facts.layers and all(positions(shape) < 2 for _, shape in _layers(facts)):
        problem = f"`{loss}` compares positions in the image, and there is only one"
        raise ModelError(", ".join(facts.layers), problem, "choose earlier `layers`")


def refuse_unless_equal(loss: str, facts: Facts) -> None:
    """Raises ModelError, with the layer's name, where student and teacher return different shapes."""
    for name, student, teacher in zip(facts.layers, facts.student_shapes, facts.teacher_shapes, strict=True):
        if tuple(student) != tuple(teacher):
            shapes = f"the student's is {tuple(student)}, the teacher's {tuple(teacher)}"
            raise ModelError(
                name, f"`{loss}` compares equal shapes; {shapes}", "use `adaptor: kept` or `adaptor: linear`"
            )


def refuse_single(loss: str, facts: Facts) -> None:
    """Raises ModelError, with the layer's name, for a loss that goes from one layer to the next and has no next."""
    if len(facts.layers) < 2:
        raise ModelError(", ".join(facts.layers), f"`{loss}` goes from one layer to the next", "name two `layers`")


def _layers(facts: Facts) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(shape)) for name, shape in zip(facts.layers, facts.student_shapes, strict=True)]
