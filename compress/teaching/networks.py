"""The teacher's network as a loss on weights can compare it with the student's."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import fx, nn

from compress.models.structure import inside, within
from compress.product import KeptChannels, Network, Run
from compress.quantization import fold_batchnorm
from compress.teachers.teacher import Teacher


class Counterpart:
    """A teacher of one network: its weights in the student's form, and which of its channels the student kept."""

    def __init__(self, teacher: Teacher, student: Network, run: Run) -> None:
        self.teacher, self.run = teacher, run
        self.kept: Mapping[str, KeptChannels] | None = None
        """None where the two do not come from one network, or the teacher lacks something that the student has."""
        if teacher.network is not None and teacher.related:
            mine, theirs = student.structure, teacher.network.structure
            if all(inside(name, mine.dropped) for name in theirs.dropped):
                self.kept = within(mine.kept, theirs.kept, mine.dropped)
        self._source: nn.Module | None = None
        self._form: nn.Module | None = None

    def module(self, student: nn.Module) -> nn.Module:
        """The teacher's module on the run's device, with BatchNorm folded if the student's was: `student` is a graph.

        It is the teacher's own module wherever that will do, so it moves with a teacher that does.
        """
        assert self.teacher.network is not None
        module = self.teacher.network.module
        if module is not self._source:
            self._source, self._form = module, self._formed(module, folded=isinstance(student, fx.GraphModule))
        assert self._form is not None
        return self._form

    def _formed(self, module: nn.Module, *, folded: bool) -> nn.Module:
        if folded and not isinstance(module, fx.GraphModule):
            module = fold_batchnorm(module)  # a copy
        elif _device(module) != self.run.device.type:
            module = copy.deepcopy(module)
        return module.to(self.run.device)


def _device(module: nn.Module) -> str:
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu")).type
