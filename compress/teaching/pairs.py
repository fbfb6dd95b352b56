"""The layers that a loss compares, and how a narrower student's maps are made to fit the teacher's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.errors import ModelError
from compress.losses.lesson import Facts, FeatureTerm
from compress.models.patterns import matching
from compress.observation import answers_to_blank, before_activations, observable, stage_ends
from compress.product import Network, Preprocess
from compress.teaching.alignment import channels, kept


@dataclass(frozen=True)
class Pair:
    """A layer of the student with the one of the teacher that it is compared with."""

    student: str
    teacher: str
    index: Tensor | None
    """Which of the teacher's channels are compared; None for all."""
    adaptor: nn.Module | None
    """What makes the student's map as wide as the teacher's, trained along."""

    def align(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """The two maps as a loss compares them: same channels where that was asked for, same height and width."""
        if self.index is not None:
            teacher = teacher.index_select(_axis(teacher), self.index.to(teacher.device))
        if self.adaptor is not None:
            student = self.adaptor(student)
        if student.ndim == teacher.ndim == 4 and student.shape[2:] != teacher.shape[2:]:
            size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
            student, teacher = F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)
        return student, teacher


def chosen_layers(
    term: FeatureTerm,
    reference: nn.Module,
    preprocess: Preprocess,
    place: str,
    *,
    student: Sequence[str],
    teacher: Sequence[str],
) -> list[tuple[str, str]]:
    """(student's, teacher's) names of the layers that a loss compares; `reference` is the student in float.

    `student` and `teacher` are the layers that can be observed. Raises ModelError for a pattern without a match, and
    for a layer that the teacher does not have or that quantization fused with others.
    """
    if term.layers == "auto":
        find = before_activations if term.where == "activations" else stage_ends
        ends = find(reference, preprocess.size, preprocess.channels)
        ends = ends[-1:] if term.where == "last" else ends
        pairs = [(name, name) for name in ends if name in student and name in teacher]
        if not pairs:
            known = ", ".join(ends)
            raise ModelError(
                place,
                f"`layers: auto` of a student with {known} finds none of them in the teacher",
                "give `layers: {the student's name: the teacher's}`",
            )
        return pairs
    names = [name for name, _ in reference.named_modules() if name]
    if isinstance(term.layers, dict):
        for pattern in term.layers:
            matching(pattern, names, field="layers", place=place)
        pairs = list(term.layers.items())
    else:
        seen = {*student} & {*teacher}
        matched: list[str] = []
        for pattern in term.layers:
            found = matching(pattern, names, field="layers", place=place)
            # Of many that a pattern means, those that quantization fused with others do not count.
            matched += found if pattern in found else [name for name in found if name in seen] or found[:1]
        pairs = [(name, name) for name in sorted(dict.fromkeys(matched), key=names.index)]
    for mine, theirs in pairs:
        for name, there, who in ((mine, student, "student"), (theirs, teacher, "teacher")):
            if name not in there:
                raise ModelError(
                    place,
                    f"the {who} has no layer `{name}` to observe",
                    "name another one, or a mapping of the student's layer to the teacher's",
                )
    return pairs


def pair_up(
    term: FeatureTerm,
    student: Network,
    trained: nn.Module,
    teacher: Network,
    place: str,
    *,
    images: int,
    related: bool,
) -> tuple[list[Pair], Facts]:
    """The pairs of a loss, and what it may know before training.

    `student` is the student in float, `trained` what is trained: the same, or with fake quantization. `related` says
    that both come from one network, so that a channel is the same in both; `adaptor: auto` trusts indices only then.
    """
    preprocess = student.structure.preprocess
    names = chosen_layers(
        term, student.module, preprocess, place, student=observable(trained), teacher=observable(teacher.module)
    )
    mine = _shapes(student.module, [name for name, _ in names], preprocess)
    theirs = _shapes(teacher.module, [name for _, name in names], preprocess)
    indices = _indices(term, student, teacher, names, theirs, related=related)
    pairs, student_shapes, teacher_shapes = [], [], []
    for here, there in names:
        index, adaptor = indices.get(here), None
        if term.adaptor == "kept" and index is None:
            raise ModelError(
                place,
                f"`adaptor: kept`: the teacher's {there} does not hold the channels of the student's {here}",
                "use `adaptor: linear`",
            )
        if term.adaptor == "linear" or (term.adaptor == "auto" and term.same_width and index is None):
            adaptor = _adaptor(mine[here], theirs[there], place, here)
        if index is not None and index.tolist() == list(range(theirs[there][_axis_of(theirs[there])])):
            index = None  # all of them
        pair = Pair(here, there, index, adaptor)
        with torch.no_grad():
            maps = pair.align(torch.zeros(1, *mine[here]), torch.zeros(1, *theirs[there]))
        pairs.append(pair)
        student_shapes.append(tuple(maps[0].shape[1:]))
        teacher_shapes.append(tuple(maps[1].shape[1:]))
        if term.same_width and student_shapes[-1] != teacher_shapes[-1]:
            raise ModelError(
                place,
                f"layer {here} returns {student_shapes[-1]} and the teacher's {there} {teacher_shapes[-1]}",
                "use `adaptor: linear` or other layers",
            )
    facts = Facts(
        layers=[pair.student for pair in pairs],
        student_shapes=student_shapes,
        teacher_shapes=teacher_shapes,
        classes=student.structure.num_classes,
        images=images,
    )
    return pairs, facts


def _indices(
    term: FeatureTerm,
    student: Network,
    teacher: Network,
    names: Sequence[tuple[str, str]],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    related: bool,
) -> dict[str, Tensor | None]:
    """By the student's layer, which of the teacher's channels it kept, where the loss is to compare those.

    `shapes` are those of the teacher's layers.
    """
    automatic = term.adaptor == "auto" and term.same_width and related
    if not (automatic or term.adaptor == "kept") or _architecture(student) != _architecture(teacher):
        return {}
    if student.structure.kept == teacher.structure.kept:  # the same shape, whether it can be traced or not
        widths = {theirs: shape[_axis_of(shape)] for theirs, shape in shapes.items()}
        return {mine: torch.arange(widths[theirs]) if mine == theirs else None for mine, theirs in names}
    here = channels(student, [name for name, _ in names])
    there = channels(teacher, [name for _, name in names])
    return {mine: kept(here[mine], there[theirs]) for mine, theirs in names}


def _architecture(network: Network) -> dict[str, Any]:
    return {key: value for key, value in network.structure.model.items() if key != "weights"}


def _shapes(module: nn.Module, layers: Sequence[str], preprocess: Preprocess) -> dict[str, tuple[int, ...]]:
    """What layers return, without the batch."""
    maps = answers_to_blank(module, preprocess.size, layers, preprocess.channels).maps
    return {name: tuple(maps[name].shape[1:]) for name in layers}


def _axis(tensor: Tensor) -> int:
    return 1 if tensor.ndim in (2, 4) else -1


def _axis_of(shape: tuple[int, ...]) -> int:
    """Of the channels, in a shape without the batch."""
    return 0 if len(shape) in (1, 3) else -1


def _adaptor(student: tuple[int, ...], teacher: tuple[int, ...], place: str, layer: str) -> nn.Module:
    inputs, outputs = student[_axis_of(student)], teacher[_axis_of(teacher)]
    if len(student) != len(teacher):
        raise ModelError(place, f"layer {layer} returns {student}, the teacher's {teacher}", "name other layers")
    if len(student) == 3:
        return nn.Conv2d(inputs, outputs, 1)
    return nn.Linear(inputs, outputs)
