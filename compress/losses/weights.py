"""Intermediate weights: Han, EfficientML (MIT), lecture on knowledge distillation, "matching intermediate weights".

The lecture adds the L2 distance between teacher's and student's weights, with a linear transformation where the sizes
differ: sum over layers of ||W_t - A W_s B||^2. A pruned student needs none, for it knows which of the teacher's rows
and columns it kept. That case is the L2-SP of Li et al., 2018 (arXiv:1802.01483): a pull towards where training began.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from compress.errors import ModelError
from compress.losses.lesson import Facts, Lesson, Term
from compress.models.patterns import Pattern, matching_any
from compress.models.structure import kept_weight
from compress.product import KeptChannels

PLACE = "loss weights"
Layer = nn.Conv2d | nn.ConvTranspose2d | nn.Linear
BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def weight_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared Frobenius norm of the difference of two weights of the same shape: a scalar."""
    return (student - teacher).square().sum()


def aligned(weight: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """left @ weight @ right, at each place of a kernel: from (o, i, ...) with (O, o) and (i, I) to (O, I, ...)."""
    return torch.einsum("xo,oi...,iy->xy...", left, weight, right)


class Alignment(nn.Module):
    """The trained A and B of one layer, for the first two axes of its weight; they start where they copy.

    `first` and `second` are the teacher's rows and columns that the student's are copied to; None for the first ones.
    """

    def __init__(
        self, student: Tensor, teacher: Tensor, first: Sequence[int] | None = None, second: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.left = nn.Parameter(_copying(teacher.shape[0], student.shape[0], first))
        self.right = nn.Parameter(_copying(teacher.shape[1], student.shape[1], second).T.contiguous())

    def forward(self, weight: Tensor) -> Tensor:
        return aligned(weight, self.left, self.right)


def _copying(rows: int, columns: int, places: Sequence[int] | None) -> Tensor:
    """(rows, columns) zeros, with a 1 that takes each column to its place."""
    if places is None or len(places) != columns or max(places) >= rows:
        places = range(min(rows, columns))
    matrix = torch.zeros(rows, columns)
    matrix[list(places), range(len(places))] = 1
    return matrix


class Weights(Term):
    """Keep the weights near the teacher's, layer by layer of the same name. Biases and BatchNorm are free.

    No weight is published. The default of 0.01 acts on what is kept like a weight decay of 0.02 that ends at the
    teacher's weights instead of zero.
    """

    needs_networks: ClassVar[bool] = True

    use: Literal["weights"]
    layers: Literal["auto"] | Annotated[tuple[Pattern, ...], Field(min_length=1)] = "auto"
    """Convolutions and linear layers by name or pattern; `auto` takes all that both networks have."""
    adaptor: Literal["auto", "kept", "linear"] = "auto"
    """`kept` compares with the teacher's rows and columns that pruning kept, `linear` through matrices A and B that are
    trained along. `auto` is `kept` where those are known."""
    weight: float = Field(default=0.01, ge=0)

    def parts(self, facts: Facts) -> nn.Module | None:
        """The alignments, in the order of the layers. Raises ModelError where layers do not fit."""
        assert facts.student is not None
        assert facts.teacher is not None
        pairs = self._pairs(facts.student, facts.teacher, facts.kept)
        if self._by_index(facts.kept):
            _distances(pairs, facts.kept or {})
            return None
        return nn.ModuleList(_alignment(name, *pair, (facts.kept or {}).get(name)) for name, pair in pairs.items())

    def __call__(self, lesson: Lesson) -> Tensor:
        assert lesson.student is not None
        assert lesson.teacher is not None
        pairs = self._pairs(lesson.student, lesson.teacher, lesson.kept)
        if self._by_index(lesson.kept):
            return torch.stack(_distances(pairs, lesson.kept or {})).sum()
        assert isinstance(lesson.parts, nn.ModuleList)
        distances = [
            weight_distance(align(mine.weight), theirs.weight.detach().to(mine.weight))
            for (mine, theirs), align in zip(pairs.values(), lesson.parts, strict=True)
        ]
        return torch.stack(distances).sum()

    def candidates(self, module: nn.Module) -> list[str]:
        """Names of the layers that `layers` may mean."""
        return list(_layers(module))

    def _by_index(self, kept: Mapping[str, KeptChannels] | None) -> bool:
        if self.adaptor == "kept" and kept is None:
            raise ModelError(
                PLACE, "`adaptor: kept`: the student was not pruned from this teacher", "use `adaptor: linear`"
            )
        return self.adaptor == "kept" or (self.adaptor == "auto" and kept is not None)

    def _pairs(
        self, student: nn.Module, teacher: nn.Module, kept: Mapping[str, KeptChannels] | None
    ) -> dict[str, tuple[Layer, Layer]]:
        """The layers that are compared, in the student's order."""
        student, teacher = _unwrapped(student), _unwrapped(teacher)
        if self._by_index(kept):
            _refuse_one_folded(student, teacher)
        mine, theirs = _layers(student), _layers(teacher)
        if self.layers == "auto":
            chosen = [name for name in mine if name in theirs]
            if not chosen:
                raise ModelError(
                    PLACE, "no convolution or linear layer has the same name in both networks", "use another loss"
                )
        else:
            names = list({**mine, **theirs})
            found = matching_any(self.layers, names, field="layers", place=PLACE)
            chosen = [name for name in names if name in found]
            for name in chosen:
                for who, there in (("student", mine), ("teacher", theirs)):
                    if name not in there:
                        raise ModelError(
                            f"{PLACE}: layer {name}",
                            f"the {who} has no such convolution or linear layer",
                            "leave it out",
                        )
        return {name: (mine[name], theirs[name]) for name in chosen}


def _layers(module: nn.Module) -> dict[str, Layer]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, Layer)}


def _unwrapped(module: nn.Module) -> nn.Module:
    return module.module if isinstance(module, DistributedDataParallel) else module


def _distances(pairs: Mapping[str, tuple[Layer, Layer]], kept: Mapping[str, KeptChannels]) -> list[Tensor]:
    """Of each layer's weight from what the teacher's holds of the channels that were kept."""
    distances = []
    for name, (mine, theirs) in pairs.items():
        target = kept_weight(name, theirs, kept.get(name, KeptChannels())).to(mine.weight)
        if target.shape != mine.weight.shape:
            raise ModelError(
                f"{PLACE}: layer {name}",
                f"the student's weight is {tuple(mine.weight.shape)}, what was kept of the teacher's "
                f"{tuple(target.shape)}",
                "leave it out of `layers`, or use `adaptor: linear`",
            )
        distances.append(weight_distance(mine.weight, target))
    return distances


def _alignment(name: str, student: Layer, teacher: Layer, channels: KeptChannels | None) -> Alignment:
    mine, theirs = student.weight, teacher.weight
    if mine.shape[2:] != theirs.shape[2:]:
        raise ModelError(
            f"{PLACE}: layer {name}",
            f"the student's kernel is {tuple(mine.shape[2:])}, the teacher's {tuple(theirs.shape[2:])}",
            "leave it out of `layers`",
        )
    sides = (None, None) if channels is None else (channels.outputs, channels.inputs)
    first, second = reversed(sides) if isinstance(student, nn.ConvTranspose2d) else sides
    return Alignment(mine, theirs, first, second)


def _taken_out(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the layer was in a block that is the identity now."""
    parts = name.split(".")
    return any(isinstance(modules.get(".".join(parts[:end])), nn.Identity) for end in range(1, len(parts)))


def _refuse_one_folded(student: nn.Module, teacher: nn.Module) -> None:
    """Raises ModelError where one network has BatchNorm within its weights and the other next to them."""
    mine, theirs = dict(student.named_modules()), dict(teacher.named_modules())
    for who, one, other in (("teacher", theirs, mine), ("student", mine, theirs)):
        for name, layer in one.items():
            if isinstance(layer, BATCHNORMS) and name not in other and not _taken_out(name, other):
                raise ModelError(
                    f"{PLACE}: layer {name}",
                    f"only the {who} has this BatchNorm: the other's is part of its weights, which are scaled by it",
                    "use `adaptor: linear`, or this loss before `quantize`",
                )
