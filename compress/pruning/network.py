"""From a network to a narrower one of the same outputs.

One step: score every set of coupled channels, cut the sorted channels into blocks that respect `round_to`, order the
blocks of all layers by score, and remove as many as the goal asks for. Several steps score anew what is left.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.criteria import CriterionSettings
from compress.criteria.magnitude import Magnitude
from compress.data.sample import with_new_statistics
from compress.measures import macs
from compress.models.coupled import Coupled, find_coupled
from compress.models.patterns import Pattern
from compress.models.rebuild import refuse_to_cut
from compress.models.structure import compose, resize
from compress.product import KeptChannels, Network, Run
from compress.pruning.choose import choose, kept_channels
from compress.pruning.chosen import surveyed
from compress.pruning.goal import MacGoal, cost_of
from compress.pruning.limits import Ratio, least_widths, widths
from compress.pruning.ramp import Ramp, share_left
from compress.settings import Settings


class Pruning(Settings):
    """What goes first, and what has to stay."""

    criterion: CriterionSettings = Field(default_factory=lambda: Magnitude(use="magnitude"))
    round_to: int = Field(default=8, ge=1)
    """Channels left in a pruned layer are a multiple of this; layers that lose nothing keep their width."""
    scope: Literal["global", "local"] = "global"
    """`global` ranks the channels of all layers together; `local` takes the same share of every layer."""
    max_ratio: Ratio = 0.8
    """Largest share of a layer's output channels that may go."""
    layer_ratios: dict[Pattern, Ratio] = Field(default_factory=dict)
    """The same for single layers, instead of `max_ratio`; where several patterns match, the smallest holds."""
    keep: tuple[Pattern, ...] = ()
    """Layers that keep all their output channels. The network's outputs always stay."""
    steps: int = Field(default=1, ge=1)
    """Rounds of scoring and removing; each takes the same share of what is left."""
    images: int = Field(default=256, ge=1)
    """Training images for a criterion that needs gradients."""
    batchnorm_images: int = Field(default=512, ge=0)
    """Training images on which BatchNorm statistics are measured again after each step; 0 leaves them as they are."""


def prune_network(
    network: Network,
    goal: MacGoal,
    pruning: Pruning | None = None,
    *,
    run: Run,
    around: Mapping[str, KeptChannels] | None = None,
    after: Callable[[Network, int], nn.Module] | None = None,
    ramp: Ramp = "geometric",
    place: str = "pruning",
) -> Network:
    """The network without its least important channels; nothing is trained, unless `after` does that.

    The goal is reached from below, as closely as `round_to` allows. `structure.kept` goes on naming channels by the
    factory's indices, so pruning a pruned network composes. The channels of `around`, a narrower network's
    `structure.kept`, go after all others: the result then has them all, where the goal and the widths that `round_to`
    allows leave room (not with `scope: local`, which sets the widths before it looks at scores). `after(network, step)`
    is given what each step left (steps count from 1) and returns the module of the next. Raises ModelError, which names
    `place`, for a network that cannot be followed or is quantized, a pattern that matches nothing and a goal that is
    out of reach.
    """
    pruning, size, channels = pruning or Pruning(), run.data.preprocess.size, run.data.preprocess.channels
    refuse_to_cut(network.structure, place)
    before = macs(network.module, size, channels)
    most = goal.most_macs(before)
    least = least_of(network.module, pruning, place)
    generator = torch.Generator().manual_seed(run.seed)
    module, structure = network.module, network.structure
    for step in range(1, pruning.steps + 1):
        last = None if around is None else partial(_shared_units, kept=structure.kept, narrower=around)
        found = surveyed(module, pruning, least=least, run=run, generator=generator, last=last)
        sets, ranked = found.sets, found.ranked
        if step == 1:
            for sentence in found.notes:
                run.progress.note(sentence)
        cost = cost_of(module, sets, size, channels)
        goal.refuse_out_of_reach(before, cost([ranking.widths[-1] for ranking in ranked]), place)
        # Exact in the last step, where all of the way is behind.
        left = share_left(step / pruning.steps, most / before, ramp)
        now = most if step == pruning.steps else round(before * left)
        removed = kept_channels(module, sets, ranked, choose(ranked, cost, most=now, scope=pruning.scope))
        module = copy.deepcopy(module)
        resize(module, removed)
        structure = structure.model_copy(update={"kept": compose(structure.kept, removed)})
        module = with_new_statistics(module, run, pruning.batchnorm_images)
        if after is not None:
            module = after(Network(module, structure), step)
    return Network(module, structure)


def refuse_unreachable(
    module: nn.Module,
    goal: MacGoal,
    pruning: Pruning | None = None,
    *,
    size: int,
    channels: int = 3,
    place: str = "pruning",
) -> None:
    """Raises ModelError where `prune_network` would for what can be known without data: patterns, the goal."""
    pruning = pruning or Pruning()
    sets, _ = find_coupled(module, size, channels)
    least = least_of(module, pruning, place)
    fewest = [widths(coupled, module, least, pruning.round_to)[-1] for coupled in sets]
    least_macs = cost_of(module, sets, size, channels)(fewest)
    goal.refuse_out_of_reach(macs(module, size, channels), least_macs, place)


def _shared_units(coupled: Coupled, kept: Mapping[str, KeptChannels], narrower: Mapping[str, KeptChannels]) -> Tensor:
    """bool (units,): which have a channel that `narrower` kept; both say so by the factory's indices."""
    shared = torch.zeros(coupled.units, dtype=torch.bool)
    for name in coupled.producers:
        channels = coupled.places[name, "outputs"]
        now, then = kept.get(name, KeptChannels()).outputs, narrower.get(name, KeptChannels()).outputs
        factory = channels if now is None else torch.tensor(now)[channels]
        shared |= torch.ones_like(shared) if then is None else torch.isin(factory, torch.tensor(then)).any(1)
    return shared


def least_of(module: nn.Module, pruning: Pruning, place: str) -> dict[str, float]:
    """How narrow each layer may become, by its name. Raises ModelError for a pattern that matches nothing."""
    return least_widths(
        module, max_ratio=pruning.max_ratio, layer_ratios=pruning.layer_ratios, keep=pruning.keep, place=place
    )
