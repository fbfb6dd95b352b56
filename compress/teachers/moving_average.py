"""Mean teacher: Tarvainen and Valpola, 2017 (arXiv:1703.01780)."""

from __future__ import annotations

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
from compress.tensors import load_state


def decay_at(step: int, decay: float) -> float:
    """The decay of one step, in [0, `decay`]: 0 at step 0, and a plain mean of all steps until `decay` is reached.

    min(1 - 1 / (step + 1), decay), as in the authors' code, so that the first weights do not stay in the average.
    """
    return min(1 - 1 / (step + 1), decay)


@torch.no_grad()
def average_into(average: nn.Module, current: nn.Module, decay: float) -> None:
    """Moves the parameters and buffers of `average` to decay * average + (1 - decay) * current.

    The paper averages parameters alone; averaged BatchNorm statistics let the teacher answer in eval mode. What is not
    floating point is copied.
    """
    state = current.state_dict()
    for name, mean in average.state_dict().items():
        value = state[name].to(mean.device)
        if mean.is_floating_point():
            mean.lerp_(value.to(mean.dtype), 1 - decay)
        else:
            mean.copy_(value)


class MovingAverage(Settings):
    """The average of the student's weights over its last steps, theta' = decay * theta' + (1 - decay) * theta.

    The paper's teacher sees other noise and another augmentation than the student; ours sees the same images, in eval
    mode. It begins as the student that entered the stage: after pruning, let it count later with the loss's `active`.
    """

    use: Literal["moving_average"]
    decay: float = Field(default=0.999, ge=0, lt=1)
    """Weight of what the average was a step before; 0 is the student as it is. 0.999 is about the last 1000 steps."""

    def folders(self) -> tuple[str, ...]:
        """Folders outside the run that the teacher is read from."""
        return ()

    def open(self, product: Product, run: Run) -> Teacher:
        return Average(product.network, run, self.decay)


class Average:
    """The moving average while it follows; before the first step it answers as the network that enters the stage."""

    related = True
    fingerprint: str | None = None

    def __init__(self, network: Network, run: Run, decay: float) -> None:
        self.network: Network | None = network
        self.run, self.decay, self.followed = run, decay, False
        self.module: nn.Module | None = None

    def answers(self, batch: Batch, layers: Sequence[str], *, differentiable: bool = False) -> Answers:
        if self.module is None:
            assert self.network is not None
            self.module = copied(self.network.module, self.run)
        return asked(self.module, batch, layers, differentiable=differentiable)

    def follow(self, student: nn.Module, batch: Batch) -> None:
        # The student of the first step may have fake quantization that the network which entered has not.
        if not self.followed or self.module is None:
            self._become(student)
        else:
            average_into(self.module, student, decay_at(batch.step, self.decay))

    def state(self) -> dict[str, Tensor]:
        return dict(self.module.state_dict()) if self.followed and self.module is not None else {}

    def restore(self, state: Mapping[str, Tensor], student: nn.Module) -> None:
        if state:
            load_state(self._become(student), state)

    def _become(self, student: nn.Module) -> nn.Module:
        self.module, self.followed = copied(student, self.run), True
        assert self.network is not None
        self.network = replace(self.network, module=self.module)
        return self.module
