"""Snapshot distillation: Yang et al., 2019 (arXiv:1812.00123): the student learns from what it was before."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.observation import Answers
from compress.product import Batch, Network, Product, Run
from compress.settings import Settings
from compress.teachers.teacher import Teacher, asked, copied
from compress.tensors import load_state, under


class EarlierEpochs(Settings):
    """The student at the end of the last cycle of epochs, or of one before.

    With `every: 1` and `ago: k`, the student as it was k epochs ago. In the paper every cycle begins with a high
    learning rate and ends with a low one, and there is no teacher in the first; here the learning rate is the stage's,
    which falls once, and in the first `ago` cycles the student as it entered the stage teaches. To learn nothing from
    that, as in the paper, give the loss `active: [0.25, 1]` (of 4 cycles).
    """

    use: Literal["earlier_epochs"]
    every: int = Field(default=1, ge=1)
    """Epochs in a cycle; a copy of the student is made at the end of each."""
    ago: int = Field(default=1, ge=1)
    """Which copy teaches: 1 is the last. So many are kept in memory."""

    def folders(self) -> tuple[str, ...]:
        """Folders outside the run that the teacher is read from."""
        return ()

    def open(self, product: Product, run: Run) -> Teacher:
        return Snapshots(product.network, run, every=self.every, ago=self.ago)


class Snapshots:
    """The copies while they teach; before the first step the network that enters the stage answers."""

    related = True
    fingerprint: str | None = None

    def __init__(self, network: Network, run: Run, *, every: int, ago: int) -> None:
        self.network: Network | None = network
        self.run, self.every, self.cycle = run, every, -1
        self.copies: deque[nn.Module] = deque(maxlen=ago)

    def answers(self, batch: Batch, layers: Sequence[str], *, differentiable: bool = False) -> Answers:
        if not self.copies:
            assert self.network is not None
            self.copies.append(copied(self.network.module, self.run))
        return asked(self.copies[0], batch, layers, differentiable=differentiable)

    def follow(self, student: nn.Module, batch: Batch) -> None:
        cycle = batch.epoch // self.every
        if cycle == self.cycle:
            return
        if self.cycle < 0:
            # The student of the first step may have fake quantization that the network which entered has not.
            self.copies.clear()
        self.copies.append(copied(student, self.run))
        self.cycle = cycle
        self._answer_with_the_first()

    def state(self) -> dict[str, Tensor]:
        if self.cycle < 0:
            return {}
        found = {"cycle": torch.tensor(self.cycle), "copies": torch.tensor(len(self.copies))}
        for number, each in enumerate(self.copies):
            found |= {f"{number}.{name}": value for name, value in each.state_dict().items()}
        return found

    def restore(self, state: Mapping[str, Tensor], student: nn.Module) -> None:
        if not state:
            return
        self.cycle = int(state["cycle"])
        self.copies.clear()
        for number in range(int(state["copies"])):
            self.copies.append(copied(student, self.run))
            load_state(self.copies[-1], under(state, f"{number}."))
        self._answer_with_the_first()

    def _answer_with_the_first(self) -> None:
        assert self.network is not None
        self.network = replace(self.network, module=self.copies[0])
