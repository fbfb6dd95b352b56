"""The losses of a recipe that names none: what won the comparison in docs/distillation.md."""

from __future__ import annotations

from compress.errors import ModelError
from compress.labels import Task
from compress.losses.binary_kd import BinarySoftTargets
from compress.losses.fitnets import FitNets
from compress.losses.kd import SoftTargets
from compress.losses.lesson import Term
from compress.losses.mse import SquaredError
from compress.observation import observable, stage_ends
from compress.product import Network
from compress.teachers.teacher import Teacher
from compress.teaching.alignment import channels, kept


def soft_loss(task: Task) -> SoftTargets | BinarySoftTargets | SquaredError:
    """What compares a student's outputs with its teacher's where the recipe does not say."""
    match task:
        case "classification":
            return SoftTargets(use="kd")
        case "multi_label":
            return BinarySoftTargets(use="binary_kd")
        case "regression":
            return SquaredError(use="mse")


def default_losses(student: Network, teacher: Teacher, soft: Term) -> tuple[Term, ...]:
    """The soft loss, and for a float student that was pruned from its teacher hints on the channels it kept.

    Hints are at the ends of those stages whose kept channels can be followed; where there are none, `soft` alone.
    """
    layers = _followed(student, teacher)
    return (soft, FitNets(use="fitnets", layers=layers, adaptor="kept")) if layers else (soft,)


def _followed(student: Network, teacher: Teacher) -> tuple[str, ...]:
    if teacher.network is None or not teacher.related or student.structure.quantize is not None:
        return ()
    mine, theirs = student.structure, teacher.network.structure
    if mine.kept == theirs.kept and mine.dropped == theirs.dropped:  # as wide and as deep as its teacher
        return ()
    try:
        preprocess = student.structure.preprocess
        ends = stage_ends(student.module, preprocess.size, preprocess.channels)
    except ModelError:  # no maps
        return ()
    here, there = channels(student, ends), channels(teacher.network, ends)
    known = observable(teacher.network.module)
    return tuple(end for end in ends if end in known and kept(here[end], there[end]) is not None)
