"""When channels go: all at once, in rounds with training between them, or while the network is trained."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from compress import processes
from compress.data.sample import sample
from compress.measures import macs
from compress.models.structure import compose, resize, select
from compress.product import KeptChannels, Run
from compress.progress import Silent
from compress.pruning.chosen import chosen
from compress.pruning.network import Pruning, least_of
from compress.pruning.ramp import Ramp, share_left
from compress.settings import Settings
from compress.training import like, reestimated_batchnorm


class OneShot(Settings):
    """All channels go at once; `finetune` comes after."""

    use: Literal["one_shot"]
    ramp: Ramp = "geometric"
    """Of no effect in a single step."""

    @property
    def steps(self) -> int:
        return 1


class Iterative(Settings):
    """Channels go in rounds, each with scores of its own and `finetune` after it."""

    use: Literal["iterative"]
    steps: int = Field(default=4, ge=2)
    ramp: Ramp = "geometric"
    """What each round takes: `geometric`, the same share of what is left; `cubic`, most of it early."""


class Progressive(Settings):
    """Channels go while `finetune` trains: one training, one learning rate schedule, most of them early."""

    use: Literal["progressive"]
    begin: float = Field(default=0.0, ge=0, lt=1)
    """The part of the training at which the first channels go."""
    end: float = Field(default=0.5, ge=0, lt=1)
    """The part at which the goal is reached; the rest of the training recovers."""
    every: float = Field(default=1.0, gt=0)
    """Epochs from one narrowing to the next; 0.1 narrows ten times an epoch."""
    ramp: Ramp = "cubic"

    @property
    def steps(self) -> int:
        """Of scoring, removing and then training: all of it is one."""
        return 1

    @model_validator(mode="after")
    def _ends_after_it_begins(self) -> Progressive:
        if self.end < self.begin:
            raise ValueError(f"`end: {self.end:g}` comes before `begin: {self.begin:g}`")
        return self

    def moments(self, total: int, epoch: int) -> range:
        """The steps of a training before which channels go, but for the last one, which is the range's end; `total`
        steps in all, `epoch` in an epoch."""
        last = min(round(self.end * total), total - 1)
        return range(min(round(self.begin * total), last), last, max(1, round(self.every * epoch)))


ScheduleSettings = Annotated[OneShot | Iterative | Progressive, Field(discriminator="use")]


@dataclass
class Narrowed:
    """Takes channels out of a network that is being trained; `compress.training.fit` asks it before each step."""

    whole: nn.Module
    """The network that enters the training."""
    pruning: Pruning
    goal: float
    """Share of its multiply-adds that is left in the end."""
    schedule: Progressive
    run: Run
    place: str
    kept: dict[str, KeptChannels] = field(default_factory=dict, init=False)
    """What is left so far, by the indices of the network that entered."""
    course: list[dict[str, int]] = field(default_factory=list, init=False)
    """The step before which channels went, and the multiply-adds after it."""

    def due(self, step: int, total: int, epoch: int) -> bool:
        moments = self.schedule.moments(total, epoch)
        return step in moments or step == moments.stop

    def narrow(
        self,
        student: nn.Module,
        average: AveragedModel | None,
        optimizer: torch.optim.Optimizer,
        layout: torch.memory_format,
        *,
        step: int,
        total: int,
        epoch: int,
    ) -> None:
        """Takes out what has to go before `step`; all processes take the same, which the first one chooses."""

        def removed_now() -> dict[str, KeptChannels]:
            return self._removed(student, step, total, epoch)

        # A stage `prune` of a recipe runs in one process, whether there are others or not.
        removed = processes.shared(removed_now) if self.run.world_size > 1 else removed_now()
        narrow(student, average, optimizer, removed, layout)
        self.kept = compose(self.kept, removed)
        preprocess = self.run.data.preprocess
        left = macs(copy.deepcopy(student).cpu(), preprocess.size, preprocess.channels)
        self.course.append({"step": step, "macs": left})

    def state(self) -> dict[str, Any]:
        return {"kept": {name: kept.model_dump() for name, kept in self.kept.items()}, "course": self.course}

    def restore(
        self,
        state: Mapping[str, Any],
        student: nn.Module,
        average: AveragedModel | None,
        optimizer: torch.optim.Optimizer,
        layout: torch.memory_format,
    ) -> None:
        """The network as narrow as it was; its weights come after."""
        self.kept = {name: KeptChannels.model_validate(kept, strict=False) for name, kept in state["kept"].items()}
        self.course = list(state["course"])
        narrow(student, average, optimizer, self.kept, layout)

    def _removed(self, student: nn.Module, step: int, total: int, epoch: int) -> dict[str, KeptChannels]:
        preprocess = self.run.data.preprocess
        moments = self.schedule.moments(total, epoch)
        # The first moment takes channels, too: the ramp counts from one interval before it.
        begin = moments.start - moments.step
        part = 1.0 if step == moments.stop else (step - begin) / (moments.stop - begin)
        before = macs(self.whole, preprocess.size, preprocess.channels)
        most = int(self.goal * before) if part == 1 else round(before * share_left(part, self.goal, self.schedule.ramp))
        least = least_of(self.whole, self.pruning, self.place)
        module = copy.deepcopy(student).cpu().to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
        generator = torch.Generator().manual_seed(self.run.seed + step)
        # The training's own bar is on the screen.
        quiet = replace(self.run, progress=Silent())
        if self.kept and self.pruning.batchnorm_images:
            # Channels went a few steps ago, and the running statistics are still on their way to what they are now.
            batches = sample(quiet, self.pruning.batchnorm_images, batch_size=64)
            module = reestimated_batchnorm(module, batches, quiet.device)
        found = chosen(module, self.pruning, most=most, least=least, run=quiet, generator=generator)
        return found.kept(module)


def narrow(
    student: nn.Module,
    average: AveragedModel | None,
    optimizer: torch.optim.Optimizer,
    removed: Mapping[str, KeptChannels],
    layout: torch.memory_format,
) -> None:
    """Leaves the channels of `removed` only, in place: in the network, in its moving average, and in what the optimizer
    remembers of each weight.

    Parameters become others; the optimizer goes on with those. What it remembers of a whole parameter, such as the
    number of its steps, stays.
    """
    before = dict(student.named_parameters())
    remembered = _cut(student, optimizer, removed)
    resize(student, removed)
    student.to(memory_format=layout)  # type: ignore[call-overload]
    if average is not None:
        resize(average.module, removed)
        average.module.to(memory_format=layout)  # type: ignore[call-overload]
    after = dict(student.named_parameters())
    names = {parameter: name for name, parameter in before.items()}
    for group in optimizer.param_groups:  # a companion's stay as they are
        group["params"] = [after[names[p]] if p in names else p for p in group["params"]]
    for name, parameter in before.items():
        optimizer.state.pop(parameter, None)
        if name in remembered:
            optimizer.state[after[name]] = {key: like(after[name], value) for key, value in remembered[name].items()}


def _cut(
    student: nn.Module, optimizer: torch.optim.Optimizer, removed: Mapping[str, KeptChannels]
) -> dict[str, dict[str, Any]]:
    """By parameter, what the optimizer remembers of the part that stays."""
    kinds: dict[str, dict[str, Tensor]] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, parameter in student.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                kinds.setdefault(key, {})[name] = value
            elif value is not None:
                found.setdefault(name, {})[key] = value
    for key, values in kinds.items():
        # What is remembered has the shape of the weights: it is cut as a network that has it for weights.
        copied = copy.deepcopy(student)
        with torch.no_grad():
            for name, parameter in copied.named_parameters():
                if name in values:
                    parameter.copy_(values[name])
        cut = select(copied, removed)
        for name in values:
            found.setdefault(name, {})[key] = cut[name]
    return found
