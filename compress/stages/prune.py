"""Takes whole channels out until the network is small enough, or its int8 file fast enough."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from pydantic import model_validator
from torch import nn

from compress.measures import layers, macs
from compress.product import Network, Preprocess, Product, Run
from compress.pruning import (
    Goal,
    MacGoal,
    Pruning,
    prune_network,
    prune_to_time,
    refuse_unreachable,
    refuse_untimed,
    sensitivity,
    units_left,
)
from compress.pruning.schedule import Progressive, ScheduleSettings
from compress.regularizers import Sparse
from compress.settings import Settings
from compress.stages.progressive import narrowed, refuse_unprogressive
from compress.teaching import Distillation, teach
from compress.training import Fit

PLACE = "stage prune"


class Aim(Settings):
    """What pruning is for."""

    goal: Goal
    """`{macs: 0.33}`: the share of the multiply-adds that may be left. `{fps: 30}` or `{speedup: 6}`: how fast the int8
    file has to be on the recipe's target, or against the parent's float file there; widths follow times measured on the
    target. Reached from below, as closely as `round_to` allows."""


class Finetune(Sparse, Fit):
    """Training between and after the steps."""

    @model_validator(mode="after")
    def _nothing_grows_for_its_removal(self) -> Finetune:
        if self.sparsity is not None and self.sparsity.use == "growing":
            raise ValueError("`growing` chooses what a later `prune` takes out: put it into a stage `train` before it")
        return self


class Prune(Pruning, Aim):  # pydantic lists the fields of later bases first, and a recipe reads better from its goal on
    """Takes the least important channels out, in all layers at once, until the goal is reached."""

    use: Literal["prune"]
    finetune: Finetune | None = None
    """Training after each step."""
    distill: Distillation | None = None
    """A teacher for `finetune`."""
    schedule: ScheduleSettings | None = None
    """When channels go; null: in one step, or in as many as `steps` says."""
    blocks: bool = True
    """Whether whole residual blocks may go; for goals of speed, which alone know what a block costs."""
    sensitivity: bool = False
    """Measure what each set of channels costs in accuracy, alone, before anything goes. Goals of speed always do."""

    @model_validator(mode="after")
    def _distill_needs_finetune(self) -> Prune:
        if self.distill is not None and self.finetune is None:
            raise ValueError("`distill` teaches while `finetune` trains: give both, or let a stage `distill` follow")
        return self

    @model_validator(mode="after")
    def _schedule_fits(self) -> Prune:
        if self.schedule is None:
            return self
        if self.steps != 1:
            raise ValueError("`steps` stands in `schedule: {use: iterative, steps: ...}`: leave the other one out")
        if self.schedule.use == "progressive":
            refuse_unprogressive(self.goal, self.finetune, self.distill)
            if self.sensitivity:
                raise ValueError("`sensitivity` is measured between steps: leave `schedule: progressive` or it out")
        elif not isinstance(self.goal, MacGoal) and self.schedule.ramp != "geometric":
            raise ValueError("`ramp` is of multiply-adds: goals of speed take the same share of the time in each step")
        return self

    def check(self, module: nn.Module, preprocess: Preprocess) -> None:
        """Raises ModelError for a network that cannot be followed, an unmatched pattern, a goal out of reach."""
        if isinstance(self.goal, MacGoal):
            refuse_unreachable(module, self.goal, self, size=preprocess.size, channels=preprocess.channels, place=PLACE)
        else:
            refuse_untimed(module, self.goal, self, preprocess, PLACE)
        if self.distill is not None:
            self.distill.refuse_misfits(module, preprocess, PLACE)
        if self.finetune is not None:
            self.finetune.refuse_unsparse(module, preprocess, PLACE)

    def apply(self, product: Product, run: Run) -> Product:
        size, channels = run.data.preprocess.size, run.data.preprocess.channels
        history: list[dict[str, Any]] = []
        losses: dict[str, dict[str, float]] = {}

        schedule, steps = self.schedule, self.steps if self.schedule is None else self.schedule.steps

        def finetune(network: Network, step: int) -> nn.Module:
            assert self.finetune is not None
            pruned = replace(product, network=network, parent=product.original)
            label = f"prune {step}/{steps}"
            pull = self.finetune.regularizer(network.module, run)
            module, found = teach(
                network.module, self.finetune, pruned, run, label=label, by=self.distill, regularizer=pull
            )
            history.extend({"step": step, **epoch} for epoch in found["history"])
            losses.update(found.get("layer_losses", {}))
            return module

        course: dict[str, Any] = {}
        if isinstance(schedule, Progressive):
            assert self.finetune is not None
            assert isinstance(self.goal, MacGoal)
            network, course = narrowed(product, self.goal, self, schedule, self.finetune, self.distill, run, PLACE)
            history.extend(course.pop("history"))
        else:
            rounds = self.model_copy(update={"steps": steps})
            ramp, after_step = schedule.ramp if schedule else "geometric", finetune if self.finetune else None
            if isinstance(self.goal, MacGoal):
                if self.sensitivity:
                    course["sensitivity"] = sensitivity(product.network, rounds, run, PLACE)
                network = prune_network(
                    product.network, self.goal, rounds, run=run, after=after_step, ramp=ramp, place=PLACE
                )
            else:
                network, course = prune_to_time(
                    product.network,
                    self.goal,
                    rounds,
                    parent=product.original,
                    run=run,
                    blocks=self.blocks,
                    after=after_step,
                    place=PLACE,
                )
        before, after = macs(product.network.module, size, channels), macs(network.module, size, channels)
        metrics: dict[str, Any] = {
            "goal_macs": self.goal.macs if isinstance(self.goal, MacGoal) else None,
            "macs_before": before,
            "macs_after": after,
            "reached": after / before,
            "criterion": self.criterion.use,
            "round_to": self.round_to,
            "steps": steps,
            "history": history,
        } | course
        for curve in metrics.get("sensitivity", []):
            curve["kept"] = units_left(curve, network.module)
        metrics["channels"] = changed_channels(product.network.module, network.module, size, channels)
        metrics |= {"layer_losses": losses} if losses else {}
        return replace(product.taught(network, metrics), parent=product.original)


def changed_channels(before: nn.Module, after: nn.Module, size: int, channels: int = 3) -> list[dict[str, Any]]:
    """Outputs and inputs of every layer before and after, in order of execution; zeros for a layer that is gone."""
    left = {layer["name"]: [layer["outputs"], layer["inputs"]] for layer in layers(after, size, channels)}
    return [
        {
            "layer": layer["name"],
            "before": [layer["outputs"], layer["inputs"]],
            "after": left.get(layer["name"], [0, 0]),
        }
        for layer in layers(before, size, channels)
    ]
