"""The losses of a recipe that names none: what won the comparison in docs/distillation.md."""

from __future__ import annotations

from compress.errors import ModelError
from compress.losses.fitnets import FitNets
from compress.losses.kd import SoftTargets
from compress.losses.lesson import Term
from compress.observation import observable, stage_ends
from compress.product import Network
from compress.teachers.teacher import Teacher
from compress.teaching.alignment import channels, kept


def default_losses(student: Network, teacher: Teacher) -> tuple[Term, ...]:
    """Soft targets, and for a float student that was pruned from its teacher hints on the channels it kept.

    Hints are at the ends of those stages whose kept channels can be followed; where there are none, soft targets alone.
    """
    soft = SoftTargets(use="kd")
    layers = _followed(student, teacher)
    return (soft, FitNets(use="fitnets", layers=layers, adaptor="kept")) if layers else (soft,)


def _followed(student: Network, teacher: Teacher) -> tuple[str, ...]:
    if teacher.network is None or not teacher.related or student.structure.quantize is not None:
        return ()
    if student.structure.kept == teacher.network.structure.kept:  # as wide as its teacher
        return ()
    try:
        ends = stage_ends(student.module, student.structure.preprocess.size)
    except ModelError:  # no maps
        return ()
    here, there = channels(student, ends), channels(teacher.network, ends)
    known = observable(teacher.network.module)
    return tuple(end for end in ends if end in known and kept(here[end], there[end]) is not None)
