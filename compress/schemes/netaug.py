"""Network augmentation: Cai et al., 2022 (arXiv:2110.08890), from a pruned network back to its original width."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from compress.errors import ModelError
from compress.labels import Task
from compress.models.blocks import drop
from compress.models.coupled import channel_rows, find_coupled
from compress.models.structure import inside, select
from compress.observation import Answers, observe, unwrapped
from compress.product import Batch, KeptChannels, Network, Preprocess, Product, Run
from compress.settings import Settings
from compress.teaching.alignment import channels as channels_of
from compress.teaching.alignment import kept as kept_of
from compress.teaching.objective import Objective, Taught, objective

PLACE = "scheme netaug"


def kept_since(student: Mapping[str, KeptChannels], parent: Mapping[str, KeptChannels]) -> dict[str, KeptChannels]:
    """What the student keeps of its parent, by the parent's indices; both are given by those of the factory's network.

    Raises ModelError for a channel that the parent does not have.
    """

    def renumbered(name: str, mine: tuple[int, ...] | None, theirs: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if theirs is None:
            return mine
        places = {channel: place for place, channel in enumerate(theirs)}
        if mine is None or not set(mine) <= places.keys():
            raise ModelError(PLACE, f"layer {name} has channels that its parent has lost")
        return tuple(places[channel] for channel in mine)

    found = {}
    for name, channels in student.items():
        before = parent.get(name, KeptChannels())
        found[name] = KeptChannels(
            outputs=renumbered(name, channels.outputs, before.outputs),
            inputs=renumbered(name, channels.inputs, before.inputs),
            groups=channels.groups,
        )
    return found


def positions(parent: nn.Module, kept: Mapping[str, KeptChannels]) -> dict[str, Tensor]:
    """For each parameter and buffer of the parent, where in the flattened tensor the student's values lie.

    int64, in the shape of the student's tensor.
    """
    numbered = copy.deepcopy(parent).double()  # float64 counts to 2^53
    with torch.no_grad():
        for tensor in (*numbered.parameters(), *numbered.buffers()):
            tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape))
    return {name: tensor.long() for name, tensor in select(numbered, kept).items()}


@dataclass(frozen=True)
class Extra:
    """The units of one set of coupled channels that pruning took out of the parent."""

    units: Tensor
    """int64 (E,): their numbers in the set."""
    readers: Mapping[str, Tensor]
    """By the name of each weight that reads them, int64 (units, elements): where in the flattened weight."""


def extras(parent: nn.Module, kept: Mapping[str, KeptChannels], size: int, channels: int = 3) -> list[Extra]:
    """What can be added to the student, set by set of coupled channels. Raises ModelError for sets kept in part."""
    found = []
    layers = dict(parent.named_modules())
    for coupled in find_coupled(parent, size, channels)[0]:
        gone: Tensor | None = None
        for (name, side), units in coupled.places.items():
            chosen = kept.get(name, KeptChannels())
            indices = chosen.outputs if side == "outputs" else chosen.inputs
            width = int(channel_rows(layers[name], side, _weight(layers[name])).shape[0])
            stays = torch.zeros(width, dtype=torch.bool)
            stays[list(range(width)) if indices is None else list(indices)] = True
            whole = stays[units].all(1)
            if bool((stays[units].any(1) != whole).any()) or (gone is not None and not torch.equal(gone, ~whole)):
                raise ModelError(PLACE, f"layer {name} kept other channels than the layers that it belongs to")
            gone = ~whole
        if gone is None or not bool(gone.any()):
            continue
        readers = {}
        for (name, side), units in coupled.places.items():
            if side == "inputs":
                weight = _weight(layers[name])
                rows = channel_rows(layers[name], side, torch.arange(weight.numel()).view(weight.shape))
                readers[f"{name}.weight"] = rows[units.flatten()].reshape(len(units), -1)
        found.append(Extra(gone.nonzero().flatten(), readers))
    return found


def _weight(layer: nn.Module) -> Tensor:
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor):
        return weight
    return layer.running_mean  # type: ignore[return-value]  # a BatchNorm without scale


class _Observed(nn.Module):
    """A network that returns its answers with maps: what `functional_call` can call."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images_NCHW: Tensor, layers: Sequence[str]) -> Answers:
        return observe(self.network, images_NCHW, layers)


class Augmented(nn.Module):
    """The parent's network, in which the kept channels are the student's own parameters.

    The parameters of this module are the other channels; they begin with the parent's weights, as do the statistics of
    its BatchNorm layers, which are its own. Where the student has a value, the one here is never used.
    """

    def __init__(self, parent: nn.Module, kept: Mapping[str, KeptChannels], size: int, channels: int = 3) -> None:
        super().__init__()
        self.wide = _Observed(copy.deepcopy(parent))
        self.extras = extras(parent, kept, size, channels)
        if not self.extras:
            raise ModelError(PLACE, "nothing was taken out of the network that could be added again", "prune it first")
        names = dict(self.wide.network.named_parameters())
        self.places = {name: places for name, places in positions(parent, kept).items() if name in names}
        for name, parameter in names.items():
            # Without channels of its own there is nothing to train in it.
            parameter.requires_grad_(self.places[name].numel() < parameter.numel())

    def refuse_misfit(self, student: nn.Module) -> None:
        """Raises ModelError where the student is not a part of the parent."""
        mine = {name: tuple(parameter.shape) for name, parameter in student.named_parameters()}
        theirs = {name: tuple(places.shape) for name, places in self.places.items()}
        if mine != theirs:
            name = next(name for name in (*mine, *theirs) if mine.get(name) != theirs.get(name))
            raise ModelError(
                PLACE, f"{name} is not what pruning left of the original network's", "put it right after `prune`"
            )

    def assembled(self, student: nn.Module, widths: Sequence[float]) -> dict[str, Tensor]:
        """All parameters of the augmented network, as a function of the student's and of the others.

        `widths` says for each of `extras` what part of it is there, from 0 to 1, the most important first.
        """
        own = dict(student.named_parameters())
        tensors: dict[str, Tensor] = {}
        for name, wide in self.wide.network.named_parameters():
            if wide.requires_grad:
                index = self.places[name] = self.places[name].to(wide.device)  # stays there after the first time
                tensors[name] = wide.flatten().scatter(0, index.flatten(), own[name].flatten()).view(wide.shape)
            else:
                tensors[name] = own[name]
        for extra, width in zip(self.extras, widths, strict=True):
            absent = extra.units[round(width * len(extra.units)) :]
            for name, rows in extra.readers.items():
                # Nobody reads an absent channel; what it computes does not matter then.
                weight = tensors[name]
                silent = rows[absent].flatten().to(weight.device)
                tensors[name] = weight.flatten().index_fill(0, silent, 0.0).view(weight.shape)
        return tensors

    @torch.no_grad()
    def sort(self, student: nn.Module) -> None:
        """Orders the extra channels by the sum of absolute weights that read them, the largest first."""
        whole = self.assembled(student, [1.0] * len(self.extras))
        for index, extra in enumerate(self.extras):
            scores = torch.zeros(len(extra.units))
            for name, rows in extra.readers.items():
                scores += whole[name].flatten().cpu()[rows[extra.units]].abs().sum(1)
            order = scores.argsort(descending=True, stable=True)
            self.extras[index] = Extra(extra.units[order], extra.readers)

    def forward(
        self, student: nn.Module, images_NCHW: Tensor, widths: Sequence[float], layers: Sequence[str] = ()
    ) -> Answers:
        """What the augmented network answers, with gradients to the student's parameters and to the others."""
        tensors = {f"network.{name}": tensor for name, tensor in self.assembled(student, widths).items()}
        answers: Answers = functional_call(self.wide, tensors, (images_NCHW, layers))
        return answers


class NetAug(Settings):
    """The student also learns as a part of wider networks, up to the original's width, which are then dropped.

    Each step adds the loss of one wider network: the original, with the student's parameters in the kept channels and
    a random part of the others, for each set of coupled channels a part of its own. The paper widens a small network by
    new channels; ours are those that pruning took out, with the weights they had; whole blocks stay out. They are
    trained along. The wider networks' BatchNorm statistics are their own, so the student's stay what they are without
    augmentation.
    """

    tasks: ClassVar[tuple[Task, ...]] = ("classification", "multi_label", "regression")

    use: Literal["netaug"]
    weight: float = Field(default=1.0, ge=0)
    """Of the wider network's loss, which is computed as the student's: `losses` and `labels` of the stage."""
    widths: int = Field(default=2, ge=1)
    """Into how many equal parts the way from the student's width to the original's is cut; each step draws one of the
    ends of these parts, both ends of the way among them."""
    until: float = Field(default=0.5, gt=0, le=1)
    """The part of the training after which the student learns alone."""

    def check(self, module: nn.Module, preprocess: Preprocess) -> None:
        """Raises ModelError for a network that pruning cannot follow."""
        find_coupled(module, preprocess.size, preprocess.channels)

    def train(self, settings: Taught, product: Product, run: Run, label: str) -> tuple[nn.Module, dict[str, Any]]:
        student = product.network.module
        goal = objective(settings, product, run, student=student, training=settings)
        augmented = augment(product, run.data.preprocess.size, run.data.preprocess.channels)
        kept = kept_maps(product.network, product.original, goal.layers)
        drawn = torch.Generator()
        epoch = -1

        def loss(module: nn.Module, batch: Batch) -> Tensor:
            nonlocal epoch
            if batch.epoch != epoch and batch.progress < self.until:
                epoch = batch.epoch
                drawn.manual_seed((run.seed * 1_000_003 + epoch) * 1_009 + run.rank)
                augmented.sort(unwrapped(module))
            return self.step(goal, augmented, kept, module, batch, self.draw(len(augmented.extras), drawn))

        module, metrics = goal.train(
            student,
            settings,
            label=label,
            loss=loss,
            beside=augmented,
        )
        return module, metrics | {"scheme": self.use}

    def draw(self, count: int, generator: torch.Generator) -> list[float]:
        """A width for each set of extra channels."""
        numbers = torch.randint(self.widths + 1, (count,), generator=generator)
        return [number / self.widths for number in numbers.tolist()]

    def step(
        self,
        goal: Objective,
        augmented: Augmented,
        kept: Mapping[str, Tensor | None],
        module: nn.Module,
        batch: Batch,
        widths: Sequence[float],
    ) -> Tensor:
        """The student's own loss, and before `until` that of the wider network."""
        said = goal.see(module, batch)
        total = goal.judge(said, batch, module)
        if batch.progress >= self.until or self.weight == 0:
            return total
        wider = augmented(unwrapped(module), batch.images_NCHW, widths, tuple(said.maps))
        maps = {name: _sliced(wider.maps[name], kept[name]) for name in said.maps}
        return total + self.weight * goal.judge(Answers(wider.logits_NK, maps), batch, module, again=True)


def augment(product: Product, size: int, channels: int = 3) -> Augmented:
    """The augmented network of a pruned student. Raises ModelError where it was not pruned, or is not float."""
    student, parent = product.network, product.original
    if student.structure.quantize is not None or parent.structure.quantize is not None:
        raise ModelError(PLACE, "the network is already quantized", "put `distill` with this scheme before `quantize`")
    kept = kept_since(student.structure.kept, parent.structure.kept)
    wide = copy.deepcopy(parent.module)
    drop(wide, [name for name in student.structure.dropped if not inside(name, parent.structure.dropped)])
    augmented = Augmented(wide, kept, size, channels)
    augmented.refuse_misfit(student.module)
    return augmented


def kept_maps(student: Network, parent: Network, layers: Sequence[str]) -> dict[str, Tensor | None]:
    """By layer, which channels of the parent's map are the student's; None where all are.

    Raises ModelError where that cannot be told.
    """
    mine, theirs = channels_of(student, layers), channels_of(parent, layers)
    found: dict[str, Tensor | None] = {}
    for name in layers:
        index = kept_of(mine[name], theirs[name])
        if index is None:
            raise ModelError(PLACE, f"which channels of {name} were kept cannot be told", "name other `layers`")
        found[name] = None if len(index) == len(theirs[name] or ()) else index
    return found


def _sliced(features: Tensor, index: Tensor | None) -> Tensor:
    if index is None:
        return features
    return features.index_select(1 if features.ndim in (2, 4) else -1, index.to(features.device))
