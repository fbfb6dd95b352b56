"""Takes whole channels out until the network needs no more than a given share of its multiply-adds.

One step: score every set of coupled channels, cut the sorted channels into blocks that respect `round_to`, order the
blocks of all layers by score, and remove as many as the goal asks for. Several steps score anew what is left.
"""

from __future__ import annotations

import copy
import math
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor, nn

from compress.criteria import CriterionSettings
from compress.criteria.magnitude import Magnitude
from compress.errors import ModelError
from compress.measures import layers as measured_layers
from compress.measures import macs
from compress.models.coupled import Coupled, Side, channel_rows, depthwise, find_coupled
from compress.models.structure import compose, resize, sizes
from compress.product import Batch, KeptChannels, Network, Preprocess, Product, Run
from compress.settings import Settings
from compress.stages.distill import Distillation, objective
from compress.stages.sample import sample, sample_size
from compress.training import Fit, fit, labels_loss, reestimated_batchnorm

SCORED_AT_ONCE = 32
"""Images in a mini-batch whose gradient enters the score: the more, the more do opposite gradients cancel out."""


def _compiles(pattern: str) -> str:
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_compiles)]
"""A layer's name with wildcards (`features.3.*`), or `re:` and a regular expression for the whole name."""
Ratio = Annotated[float, Field(ge=0, lt=1)]


class MacGoal(Settings):
    """A share of the multiply-adds of the network that enters the stage."""

    macs: float = Field(gt=0, lt=1)

    def most_macs(self, before: int) -> int:
        """What the pruned network may need, given what the whole one needs."""
        return int(self.macs * before)


class Prune(Settings):
    """Takes the least important channels out, in all layers at once, until the goal is reached."""

    use: Literal["prune"]
    goal: MacGoal
    """Reached from below, as closely as `round_to` allows."""
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
    finetune: Fit | None = None
    """Training after each step."""
    distill: Distillation | None = None
    """A teacher for `finetune`."""

    @model_validator(mode="after")
    def _distill_needs_finetune(self) -> Prune:
        if self.distill is not None and self.finetune is None:
            raise ValueError("`distill` teaches while `finetune` trains: give both, or let a stage `distill` follow")
        return self

    def check(self, module: nn.Module, preprocess: Preprocess) -> None:
        """Raises ModelError for a network that cannot be followed, an unmatched pattern, a goal out of reach."""
        sets, _ = find_coupled(module, preprocess.size)
        least_widths = self._least_widths(module)
        fewest = [_widths(coupled, module, least_widths, self.round_to)[-1] for coupled in sets]
        self._refuse_out_of_reach(macs(module, preprocess.size), _cost(module, sets, preprocess.size)(fewest))

    def _refuse_out_of_reach(self, before: int, least: int) -> None:
        if least > self.goal.most_macs(before):
            raise ModelError(
                "stage prune",
                f"`goal: {{macs: {self.goal.macs:g}}}` is out of reach: under these limits "
                f"{math.ceil(1000 * least / before) / 1000:g} of the multiply-adds remain",
                "raise max_ratio or layer_ratios, lower round_to, or keep fewer layers",
            )

    def apply(self, product: Product, run: Run) -> Product:
        network, size = product.network, run.data.preprocess.size
        if network.structure.quantize is not None:
            raise ModelError("stage prune", "the network is already quantized", "put prune before quantize")
        before = macs(network.module, size)
        most = self.goal.most_macs(before)
        least_widths = self._least_widths(network.module)
        generator = torch.Generator().manual_seed(run.seed)
        module, kept = network.module, dict(network.structure.kept)
        history: list[dict[str, Any]] = []
        for step in range(1, self.steps + 1):
            sets, whole = find_coupled(module, size)
            if step == 1:
                for sentence in whole:
                    run.progress.note(sentence)
            ranked = self._rank(module, sets, least_widths, run, generator)
            cost = _cost(module, sets, size)
            self._refuse_out_of_reach(before, cost([ranking.widths[-1] for ranking in ranked]))
            # Exact in the last step, where the power is 1.
            now = most if step == self.steps else round(before * (most / before) ** (step / self.steps))
            removed = _kept(module, sets, ranked, choose(ranked, cost, most=now, scope=self.scope))
            module = copy.deepcopy(module)
            resize(module, removed)
            kept = compose(kept, removed)
            if self.batchnorm_images:
                module = reestimated_batchnorm(module, sample(run, self.batchnorm_images, batch_size=64), run.device)
            if self.finetune is not None:
                loss = objective(self.distill, product, run, label_smoothing=self.finetune.label_smoothing)
                module, epochs = fit(
                    module, loss=loss, run=run, settings=self.finetune, label=f"prune {step}/{self.steps}"
                )
                history += [{"step": step, **epoch} for epoch in epochs]
        after = macs(module, size)
        return replace(
            product,
            network=Network(module, network.structure.model_copy(update={"kept": kept})),
            parent=product.original,
            metrics={
                "goal_macs": self.goal.macs,
                "macs_before": before,
                "macs_after": after,
                "reached": after / before,
                "criterion": self.criterion.use,
                "round_to": self.round_to,
                "steps": self.steps,
                "history": history,
            },
        )

    def _least_widths(self, module: nn.Module) -> dict[str, float]:
        """By layer, how many outputs have to stay under `max_ratio`, `layer_ratios` and `keep`."""
        outputs = {
            name: sizes(name, layer)[0]
            for name, layer in module.named_modules()
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))
        }
        limits: dict[str, float] = {}
        for pattern, ratio in self.layer_ratios.items():
            for name in matching(pattern, list(outputs), field="layer_ratios"):
                limits[name] = min(ratio, limits.get(name, ratio))
        for pattern in self.keep:
            limits.update(dict.fromkeys(matching(pattern, list(outputs), field="keep"), 0.0))
        return {name: width * (1 - limits.get(name, self.max_ratio)) for name, width in outputs.items()}

    def _rank(
        self,
        module: nn.Module,
        sets: Sequence[Coupled],
        least_widths: Mapping[str, float],
        run: Run,
        generator: torch.Generator,
    ) -> list[Ranking]:
        gradients = root_mean_square_gradients(module, run, self.images) if self.criterion.needs_gradients else {}
        ranked = []
        for coupled in sets:
            scores = _scores(coupled, module, gradients, self.criterion, generator)
            if not scores.isfinite().all():
                raise ModelError(coupled.producers[0], f"the {self.criterion.use} scores are not finite")
            # Makes layers comparable. The paper of `taylor` compares raw scores, but those empty the late layers, which
            # save few MACs (MobileNetV2 x 0.35 on digits, 32 px, half the MACs in 4 steps, BatchNorm re-estimated:
            # accuracy 0.61 with the division, 0.33 without; one seed).
            scores = scores / scores.mean().clamp_min(torch.finfo(scores.dtype).tiny)
            order = scores.argsort(stable=True)
            widths = _widths(coupled, module, least_widths, self.round_to)
            ranked.append(Ranking(order.tolist(), scores[order].tolist(), widths))
        return ranked


def matching(pattern: str, names: Sequence[str], *, field: str) -> list[str]:
    """The names that a pattern of the recipe means, at least one. Raises ModelError, listing similar names."""
    if pattern.startswith("re:"):
        found = [name for name in names if re.fullmatch(pattern[3:], name)]
    else:
        found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        close = get_close_matches(pattern, names, n=3, cutoff=0.4) or names[:3]
        raise ModelError(
            "stage prune",
            f"`{field}: {pattern}` matches no convolution or linear layer",
            f"close: {', '.join(close)}",
        )
    return found


@dataclass(frozen=True)
class Ranking:
    """The units of one set of coupled channels, the least important first."""

    order: Sequence[int]
    scores: Sequence[float]
    """In the same order, rising."""
    widths: Sequence[int]
    """How many units may stay, falling from all of them; the differences are the blocks that go together."""


def choose(
    ranked: Sequence[Ranking],
    cost: Callable[[Sequence[int]], int],
    *,
    most: int,
    scope: Literal["global", "local"],
) -> list[int]:
    """How many units of each ranking stay, so that their `cost` is at most `most` and close to it.

    `global`: blocks of all rankings go in the order of their mean score until the cost is low enough; then whatever
    still fits is put back, the last block first. `local`: blocks go so that every ranking loses the same share.
    """
    blocks: list[tuple[float, int, int]] = []
    for index, ranking in enumerate(ranked):
        units = len(ranking.order)
        for level, (more, fewer) in enumerate(zip(ranking.widths, ranking.widths[1:], strict=False), start=1):
            block = ranking.scores[units - more : units - fewer]
            blocks.append((sum(block) / len(block) if scope == "global" else 1 - fewer / units, index, level))
    blocks.sort(key=lambda block: block[0])  # stable, so a ranking's blocks stay in their order

    def widths(levels: Sequence[int]) -> list[int]:
        return [ranking.widths[level] for ranking, level in zip(ranked, levels, strict=True)]

    def levels_after(count: int) -> list[int]:
        levels = [0] * len(ranked)
        for _, index, level in blocks[:count]:
            levels[index] = level
        return levels

    count = bisect_left(range(len(blocks) + 1), -most, key=lambda count: -cost(widths(levels_after(count))))
    levels = levels_after(count)
    # Not in `local`: cheap layers fit, and would stay whole while the others shrink.
    for _, index, level in reversed(blocks[:count]) if scope == "global" else ():
        if levels[index] == level:
            levels[index] -= 1
            if cost(widths(levels)) > most:
                levels[index] = level
    return widths(levels)


def _widths(coupled: Coupled, module: nn.Module, least_widths: Mapping[str, float], round_to: int) -> list[int]:
    """How many units may stay: all, then all numbers that give the producing layers multiples of `round_to`."""
    layers = dict(module.named_modules())
    step, least = 1, 0.0
    for name in coupled.producers:
        if name in least_widths:
            step = math.lcm(step, round_to // math.gcd(round_to, coupled.places[name, "outputs"].shape[1]))
            # Where these channels are only a part of the layer's, they may shrink by the layer's share.
            least = max(least, coupled.units * least_widths[name] / sizes(name, layers[name])[0])
    smallest = step * max(1, math.ceil(round(least, 6) / step))
    largest = (coupled.units - 1) // step * step
    return [coupled.units, *range(largest, smallest - 1, -step)]


def _scores(
    coupled: Coupled,
    module: nn.Module,
    gradients: Mapping[str, Tensor],
    criterion: Any,
    generator: torch.Generator,
) -> Tensor:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    weights, slopes = [], []
    for (name, side), channels in coupled.places.items():
        layer, key = module.get_submodule(name), f"{name}.weight"
        if key not in parameters:  # BatchNorm without a scale
            continue
        weights.append(_unit_rows(layer, side, parameters[key].detach(), channels))
        if gradients:
            slopes.append(_unit_rows(layer, side, gradients[key], channels))
    scores: Tensor = criterion(weights, slopes, generator)
    return scores


def _unit_rows(layer: nn.Module, side: Side, weight: Tensor, channels: Tensor) -> Tensor:
    """(units, elements): what each unit takes out of the weight."""
    return channel_rows(layer, side, weight)[channels.flatten()].reshape(len(channels), -1)


def root_mean_square_gradients(module: nn.Module, run: Run, images: int) -> dict[str, Tensor]:
    """By parameter, the root mean square over mini-batches of the cross entropy's gradient.

    In eval mode, so that BatchNorm's statistics stay, and the same on every process.
    """
    copied = copy.deepcopy(module).to(run.device).requires_grad_(True).eval()
    loss = labels_loss()
    squares: dict[str, Tensor] = {}
    count = 0
    steps = max(1, sample_size(run, images) // SCORED_AT_ONCE)
    with run.progress.steps("prune  gradients", steps) as advance:
        for batch in sample(run, images, batch_size=SCORED_AT_ONCE):
            copied.zero_grad(set_to_none=True)
            value = loss(copied, Batch(batch.images_NCHW.to(run.device), batch.labels_N.to(run.device)))
            value.backward()
            for name, parameter in copied.named_parameters(remove_duplicate=False):
                if parameter.grad is not None:
                    squares[name] = squares.get(name, 0) + parameter.grad.square()
            count += 1
            advance(f"loss {value.item():.3f}")
    return {name: (total / count).sqrt().cpu() for name, total in squares.items()}


def _cost(module: nn.Module, sets: Sequence[Coupled], size: int) -> Callable[[Sequence[int]], int]:
    """The network's multiply-adds as a function of how many units of each set stay; equals `macs` of the result."""
    table = measured_layers(module, size)
    shapes = [
        (coupled.units, [(place, channels.shape[1]) for place, channels in coupled.places.items()]) for coupled in sets
    ]
    narrow = {name for name, layer in module.named_modules() if depthwise(layer)}

    def cost(stay: Sequence[int]) -> int:
        gone: defaultdict[tuple[str, Side], int] = defaultdict(int)
        for (units, places), count in zip(shapes, stay, strict=True):
            for place, each in places:
                gone[place] += (units - count) * each
        total = 0
        for layer in table:
            name, outputs, inputs = layer["name"], layer["outputs"], layer["inputs"]
            left = layer["macs"] * (outputs - gone[name, "outputs"]) // outputs
            total += left if name in narrow else left * (inputs - gone[name, "inputs"]) // inputs
        return total

    return cost


def _kept(
    module: nn.Module, sets: Sequence[Coupled], ranked: Sequence[Ranking], stay: Sequence[int]
) -> dict[str, KeptChannels]:
    """What every layer keeps when the last `stay` units of each ranking do; untouched layers are absent."""
    gone: defaultdict[tuple[str, Side], set[int]] = defaultdict(set)
    for coupled, ranking, count in zip(sets, ranked, stay, strict=True):
        units = list(ranking.order[: coupled.units - count])
        if units:
            for place, channels in coupled.places.items():
                gone[place].update(channels[units].flatten().tolist())
    kept: dict[str, KeptChannels] = {}
    for name, layer in module.named_modules():
        if not {(name, "outputs"), (name, "inputs")} & gone.keys():
            continue
        width, depth = sizes(name, layer)
        outputs = _others(width, gone[name, "outputs"])
        if depthwise(layer) and outputs is not None:
            kept[name] = KeptChannels(outputs=outputs, inputs=outputs, groups=len(outputs))
        else:
            kept[name] = KeptChannels(outputs=outputs, inputs=_others(depth, gone[name, "inputs"]))
    return kept


def _others(size: int, gone: set[int]) -> tuple[int, ...] | None:
    return tuple(index for index in range(size) if index not in gone) if gone else None
