"""From a network to a narrower one whose int8 file is as fast as it has to be on the machine that will run it.

A table of measured layers says how long every narrower version takes, curves of measured sensitivity what it loses. The
solver finds the most that the time allows; other ways to spend the same time stand beside its answer, and all of them
are judged by the answers of the narrowed network. In several rounds with training between them, each round measures
anew what is left. At last the int8 file itself is measured, and what the table was wrong by corrects the last round.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from compress.errors import ModelError
from compress.latency.networks import float_file, int8_file, narrower
from compress.latency.predict import Predictor, calibrated, predictor_for, times_of
from compress.latency.shapes import Placed, place_layers
from compress.latency.solver import Problem, least_time, solve
from compress.models.blocks import drop, dropped_from, find_blocks
from compress.models.coupled import find_coupled
from compress.models.rebuild import refuse_to_cut
from compress.models.structure import compose, resize, sizes
from compress.product import Batch, Network, Preprocess, Run
from compress.pruning.choose import choose, kept_channels
from compress.pruning.chosen import surveyed
from compress.pruning.depth import block_scores
from compress.pruning.divergence import held_out, mean_divergence, outputs
from compress.pruning.goal import FpsGoal, SpeedupGoal
from compress.pruning.importance import Curve, as_json, curves
from compress.pruning.network import Pruning, least_of
from compress.pruning.ranking import Ranking
from compress.pruning.timed import Choices, few
from compress.training import reestimated_batchnorm

INFEASIBLE = "INFEASIBLE"
SESSIONS = 3
"""How often the networks that decide are measured; the median is taken, as one session may meet another program."""
CLOSE = 0.01
"""A measured time that is so near to the one asked for is not corrected."""
CORNERS = (0.9, 0.65, 0.45)
"""Networks that the table is fitted to keep at most this share of each set's channels, and at least half of it."""
FRONTIER = 6
"""Points of what is within reach that are told."""
SHARES = 201
"""Shares that are tried where all sets keep the same."""
STEADY = 3
"""How much more a set's loss of capacity may count than its measured loss, in the mixed candidate."""


@dataclass(frozen=True)
class Candidate:
    """One way to spend the time."""

    name: str
    stay: list[int]
    """How many units of each set stay."""
    dropped: list[str]
    """Blocks that go."""
    us: float
    """Predicted."""


@dataclass
class Clock:
    """How long networks take on the target, predicted and measured."""

    goal: FpsGoal | SpeedupGoal
    run: Run
    parent_us: float = math.nan
    """Of the parent's float file."""
    predictor: Predictor = field(init=False)

    def calibrate(self, parent: nn.Module, module: nn.Module) -> float:
        """Builds the table and fits it to whole networks, `module` among them; the microseconds of its int8 file."""
        preprocess, goal = self.run.data.preprocess, self.goal
        sets, _ = find_coupled(module, preprocess.size, preprocess.channels)
        corners = [module] + [
            narrower(module, sets, seed=seed, round_to=8, most=most, least=most / 2)
            for seed, most in enumerate(CORNERS)
        ]

        networks = [(_layers(corner, self.run), self._int8(corner)) for corner in corners]
        how: dict[str, Any] = {"progress": self.run.progress, "setup": self.run.setup}
        predictor = predictor_for(self.run.target, goal.runtime, networks[0][0], threads=goal.threads, **how)
        files = {"whole": networks[0][1], "parent": float_file(parent, preprocess, goal.runtime)}
        self.predictor = calibrated(self.run.target, predictor, networks, **how)
        times = times_of(self.run.target, self.predictor.table.key, files, **how)
        self.parent_us = times["parent"]
        return times["whole"]

    @property
    def most_us(self) -> float:
        return self.goal.most_us(self.parent_us)

    def measured_us(self, module: nn.Module, parent: nn.Module) -> float:
        """Of the int8 file, as if the parent took as long as it did at first: both are measured together, `SESSIONS`
        times."""
        files = {
            "int8": self._int8(module),
            "parent": float_file(parent, self.run.data.preprocess, self.goal.runtime),
        }
        key, progress, setup = self.predictor.table.key, self.run.progress, self.run.setup
        sessions = [times_of(self.run.target, key, files, progress=progress, setup=setup) for _ in range(SESSIONS)]
        return median(times["int8"] / times["parent"] for times in sessions) * self.parent_us

    def _int8(self, module: nn.Module) -> bytes:
        return int8_file(module, self.run.data.preprocess, self.goal.runtime)


def prune_to_time(
    network: Network,
    goal: FpsGoal | SpeedupGoal,
    pruning: Pruning,
    *,
    parent: Network,
    run: Run,
    blocks: bool = True,
    after: Callable[[Network, int], nn.Module] | None = None,
    place: str = "pruning",
) -> tuple[Network, dict[str, Any]]:
    """The network narrowed until its int8 file meets the goal, and what was measured on the way (JSON).

    With `blocks` whole residual blocks may go. `after(network, step)` is given what each of `pruning.steps` left and
    returns the module of the next. Raises ModelError, which names `place`, for a network that cannot be followed or is
    quantized, and for a goal out of reach (`INFEASIBLE`; what is within reach is told in notes before); TargetError
    where the target cannot measure.
    """
    refuse_to_cut(network.structure, place)
    clock = Clock(goal, run)
    whole_us = clock.calibrate(parent.module, network.module)
    start_us = clock.predictor.network_us(layer.shape for layer in _layers(network.module, run))
    least = least_of(network.module, pruning, place)
    found: dict[str, Any] = {
        "goal": goal.text,
        "target": run.target,
        "runtime": goal.runtime,
        "threads": goal.threads,
        "estimated": clock.predictor.estimated,
        "parent_us": clock.parent_us,
        "whole_us": whole_us,
        "most_us": clock.most_us,
        "rounds": [],
    }
    if whole_us <= clock.most_us:
        run.progress.note(f"the int8 file takes {whole_us / 1000:.3g} ms as it is, so nothing has to go")
        return network, found | {"predicted_us": start_us, "measured_us": whole_us}
    generator = torch.Generator().manual_seed(run.seed)
    compared, statistics = held_out(run, pruning.images, pruning.batchnorm_images)
    for step in range(1, pruning.steps + 1):
        options = _Round.of(network, pruning, clock, least, run, generator, compared, statistics, blocks)
        if step == 1:
            for sentence in options.notes:
                run.progress.note(sentence)
            found["frontier"] = options.frontier()
            options.refuse_out_of_reach(clock.most_us, found["frontier"], goal, place)
            first = options
        most_us = min(clock.most_us, start_us) * max(1.0, start_us / clock.most_us) ** (1 - step / pruning.steps)
        best, judged = options.best(most_us)
        facts: dict[str, Any] = {"step": step, "most_us": most_us, "candidates": judged, "chosen": best.name}
        if step == pruning.steps:
            measured_us = clock.measured_us(options.narrowed(best).module, parent.module)
            facts |= {"predicted_us": best.us, "measured_us": measured_us}
            if abs(measured_us / most_us - 1) > CLOSE:
                other, judged = options.best(max(most_us * best.us / measured_us, options.least_us))
                if (other.stay, other.dropped) != (best.stay, best.dropped):
                    best = other
                    measured_us = clock.measured_us(options.narrowed(best).module, parent.module)
                    facts |= {"corrected": True, "candidates": judged, "chosen": best.name}
                    facts |= {"predicted_us": best.us, "measured_us": measured_us}
            found |= {"predicted_us": best.us, "measured_us": measured_us}
        found["rounds"].append(facts)
        network = options.narrowed(best)
        if after is not None:
            network = Network(after(network, step), network.structure)
    gone = network.structure.dropped
    found["sensitivity"] = as_json(first.curves, first.network.module)
    found["blocks"] = [{"name": name, "kl": kl, "dropped": name in gone} for name, kl in first.block_losses.items()]
    return network, found


def sensitivity(network: Network, pruning: Pruning, run: Run, place: str = "pruning") -> list[dict[str, Any]]:
    """A curve for each set of channels of the network as it is (JSON); see `importance`."""
    least = least_of(network.module, pruning, place)
    generator = torch.Generator().manual_seed(run.seed)
    found = surveyed(network.module, pruning, least=least, run=run, generator=generator)
    compared, _ = held_out(run, pruning.images, pruning.batchnorm_images)
    return as_json(curves(network.module, found.sets, found.ranked, compared, run), network.module)


def refuse_untimed(
    module: nn.Module, goal: FpsGoal | SpeedupGoal, pruning: Pruning, preprocess: Preprocess, place: str = "pruning"
) -> None:
    """Raises ModelError where `prune_to_time` would for what can be known without data and without a measurement."""
    find_coupled(module, preprocess.size, preprocess.channels)
    least_of(module, pruning, place)
    int8_file(module, preprocess, goal.runtime)


@dataclass
class _Round:
    """A network as it is, everything that is known of its narrower versions, and the ways to choose among them."""

    network: Network
    choices: Choices
    ranked: Sequence[Ranking]
    curves: Sequence[Curve]
    block_losses: Mapping[str, float]
    run: Run
    scope: str
    compared: Sequence[Batch]
    statistics: Sequence[Batch]
    notes: list[str]

    @classmethod
    def of(
        cls,
        network: Network,
        pruning: Pruning,
        clock: Clock,
        least: Mapping[str, float],
        run: Run,
        generator: torch.Generator,
        compared: Sequence[Batch],
        statistics: Sequence[Batch],
        blocks: bool,
    ) -> _Round:
        size, channels = run.data.preprocess.size, run.data.preprocess.channels
        module = network.module
        survey = surveyed(module, pruning, least=least, run=run, generator=generator)
        sets, ranked = survey.sets, [replace(ranking, widths=few(ranking.widths)) for ranking in survey.ranked]
        may_go = find_blocks(module, size, channels) if blocks and pruning.scope == "global" else []
        may_go = [block for block in may_go if not _kept(block.layers, least, module)]
        losses = block_scores(module, may_go, run, pruning.images)
        possible = [ranking.widths for ranking in ranked]
        choices = Choices(_layers(module, run), sets, possible, clock.predictor, may_go)
        found = curves(module, sets, ranked, compared, run)
        made = cls(
            network, choices, ranked, found, losses, run, pruning.scope, compared, statistics, list(survey.notes)
        )
        if made.problem is None:
            made.notes.append(
                "the solver does not know this structure (a layer reads several sets of channels): widths follow the"
                " criterion's order, or one share for all, with the latency table as their cost"
            )
        return made

    @cached_property
    def losses(self) -> list[np.ndarray]:
        """Nats of each set at each of its widths."""
        return [curve.losses(possible) for curve, possible in zip(self.curves, self.choices.widths, strict=True)]

    @cached_property
    def problem(self) -> tuple[Problem, dict[str, list[int]]] | None:
        """What the solver is asked, with the measured losses; None for a structure that it does not know."""
        return self.choices.problem(self.losses, self.block_losses)

    @cached_property
    def least_us(self) -> float:
        """The fastest that the network can become."""
        if self.problem is None:
            return self.choices.us([possible[-1] for possible in self.choices.widths])
        return least_time(self.problem[0])

    def frontier(self) -> list[dict[str, Any]]:
        """What is within reach: microseconds, and the loss that the curves foretell, in nats."""
        whole_us = self.choices.us([coupled.units for coupled in self.choices.sets])
        if self.problem is None:
            return [{"us": whole_us, "loss": 0.0}, {"us": self.least_us, "loss": None}]
        problem, _ = self.problem
        times_us = np.geomspace(whole_us, self.least_us * (1 + 1e-9), FRONTIER)
        solved = [chosen for most in times_us if (chosen := solve(problem, float(most))) is not None]
        return [{"us": problem.cost(chosen), "loss": max(0.0, -problem.value(chosen))} for chosen in solved]

    def refuse_out_of_reach(
        self, most_us: float, frontier: Sequence[Mapping[str, Any]], goal: FpsGoal | SpeedupGoal, place: str
    ) -> None:
        """Raises ModelError where even the fastest narrower network takes longer; notes say what is within reach."""
        least_us = self.least_us
        if least_us <= most_us:
            return
        parent_us = most_us * goal.speedup if isinstance(goal, SpeedupGoal) else None
        for point in frontier:
            speed = f"{1e6 / point['us']:.4g} fps"
            speed += f", {parent_us / point['us']:.3g}x the parent's float file" if parent_us else ""
            loss = "" if point["loss"] is None else f", {point['loss']:.2g} nats lost before training"
            self.run.progress.note(f"within reach: {point['us'] / 1000:.3g} ms, {speed}{loss}")
        most = f"{parent_us / least_us:.3g}x" if parent_us else f"{1e6 / least_us:.4g} fps"
        raise ModelError(
            place,
            f"{INFEASIBLE}: `goal: {{{goal.text}}}` asks for {most_us / 1000:.3g} ms; under these limits the fastest"
            f" network takes {least_us / 1000:.3g} ms ({most})",
            "ask for less, raise max_ratio or layer_ratios, lower round_to, or keep fewer layers",
        )

    def best(self, most_us: float) -> tuple[Candidate, list[dict[str, Any]]]:
        """The candidate that moves the answers least, and all of them as JSON, the best first."""
        candidates = self._candidates(most_us)
        if len(candidates) == 1:
            return candidates[0], [{"name": candidates[0].name, "us": candidates[0].us, "kl": None}]
        whole_NK = outputs(copy.deepcopy(self.network.module), self.compared, self.run.device)
        judged = []
        with self.run.progress.steps("prune  candidates", len(candidates)) as advance:
            for candidate in candidates:
                kl = mean_divergence(self.narrowed(candidate).module, whole_NK, self.compared, self.run)
                judged.append((kl, candidate))
                advance(f"{candidate.name} {kl:.3g} nats")
        judged.sort(key=lambda pair: pair[0])  # of equal ones the first: the solver's
        told = [{"name": candidate.name, "us": candidate.us, "kl": kl} for kl, candidate in judged]
        return judged[0][1], told

    def narrowed(self, candidate: Candidate) -> Network:
        """The network with that choice made, and BatchNorm's statistics measured again."""
        kept = kept_channels(self.network.module, self.choices.sets, self.ranked, candidate.stay)
        module = copy.deepcopy(self.network.module)
        resize(module, kept)
        drop(module, candidate.dropped)
        structure = self.network.structure
        structure = structure.model_copy(update={"kept": compose(structure.kept, kept)})
        if self.statistics:
            module = reestimated_batchnorm(module, self.statistics, self.run.device)
        return Network(module, dropped_from(structure, candidate.dropped) if candidate.dropped else structure)

    def _candidates(self, most_us: float) -> list[Candidate]:
        """Different ways to be as fast, the solver's first; with `scope: local` one share for all, and no other."""
        uniform = self._uniform(most_us)
        if self.scope == "local":
            return [uniform]
        measured = self.losses
        # What a narrow layer can hold, whatever it holds now: the logarithm of its width, as much as the measured loss
        # is on average.
        level = float(np.mean([losses[-1] for losses in measured])) if measured else 0.0
        capacity = [
            np.log(possible[0] / np.asarray(possible)) * level / max(1e-9, math.log(possible[0] / possible[-1]))
            for possible in self.choices.widths
        ]
        rooted = [np.sqrt(losses * max(losses[-1], 1e-12)) for losses in measured]
        ways: dict[str, tuple[Sequence[np.ndarray], Mapping[str, float]]] = {
            "sensitivity": (measured, self.block_losses),
            "sensitivity, all blocks": (measured, {}),
            "sensitivity and capacity": ([a + b for a, b in zip(measured, capacity, strict=True)], self.block_losses),
            "mostly capacity": ([a + STEADY * b for a, b in zip(measured, capacity, strict=True)], self.block_losses),
            "rooted sensitivity": (rooted, self.block_losses),
        }
        found = []
        for name, (losses, block_losses) in ways.items():
            problem = self.choices.problem(losses, block_losses)
            chosen = None if problem is None else solve(problem[0], most_us)
            if problem is not None and chosen is not None:
                stay, dropped = self.choices.answer(chosen, problem[1])
                found.append(Candidate(name, stay, dropped, self.choices.us(stay, dropped)))
        in_order = choose(self.ranked, self.choices.cost, most=most_us, scope="global")
        found += [Candidate("the criterion's order", in_order, [], self.choices.us(in_order)), uniform]
        fits = [candidate for candidate in found if candidate.us <= most_us * (1 + 1e-9)] or found[:1]
        different = {(tuple(candidate.stay), tuple(candidate.dropped)): candidate for candidate in reversed(fits)}
        return list(reversed(different.values()))

    def _uniform(self, most_us: float) -> Candidate:
        """The largest share of all sets alike that is fast enough."""

        def stay(share: float) -> list[int]:
            wide = [(possible, share * possible[0]) for possible in self.choices.widths]
            return [min(possible, key=lambda width: abs(width - most)) for possible, most in wide]

        shares = np.linspace(1, 0, SHARES)  # not by halves: a wider network may be faster
        chosen = next((found for share in shares if self.choices.us(found := stay(float(share))) <= most_us), stay(0.0))
        return Candidate("one share for all", chosen, [], self.choices.us(chosen))


def _layers(module: nn.Module, run: Run) -> list[Placed]:
    return place_layers(module, run.data.preprocess.size, run.data.preprocess.channels)


def _kept(layers: Sequence[str], least: Mapping[str, float], module: nn.Module) -> bool:
    """Whether the recipe says that one of the layers keeps all of its outputs."""
    own = dict(module.named_modules())
    return any(name in least and least[name] >= sizes(name, own[name])[0] for name in layers)


def units_left(curve: Mapping[str, Any], module: nn.Module) -> int:
    """How many units of a curve's set (as JSON) the pruned network has; 0 where all of its layers are gone."""
    layers = dict(module.named_modules())
    left = [sizes(name, layers[name])[0] for name in curve["layers"] if name in layers]
    return min([int(curve["units"]), *left]) if left else 0
