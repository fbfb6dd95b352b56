"""Be your own teacher: Zhang et al., 2019 (arXiv:1905.08094)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.errors import ModelError
from compress.labels import Task
from compress.losses.kd import soft_targets
from compress.models.patterns import matching_any
from compress.observation import answers_to_blank, observable, stage_ends
from compress.product import Batch, Preprocess, Product, Run
from compress.settings import Settings
from compress.tasks.classification import cross_entropy
from compress.teaching.objective import Objective, Taught, objective
from compress.training import OutputsLoss

PLACE = "scheme deeper_to_shallower"


def self_distillation(
    shallow_NK: Tensor,
    shallow_NC: Tensor,
    labels_N: Tensor,
    *,
    deepest_NK: Tensor,
    deepest_NC: Tensor,
    labels: float,
    soft: float,
    temperature: float,
    hints: float,
    labels_loss: OutputsLoss = cross_entropy,
) -> Tensor:
    """One shallow classifier's loss: `labels` times the cross entropy, `soft` times T^2 KL(deepest || shallow), `hints`
    times the squared Euclidean distance to the deepest features; each a batch mean (equations 2 to 4 of the paper).

    The deepest classifier is a target: nothing of this trains it, as in public implementations.
    """
    distance = (shallow_NC - deepest_NC.detach()).square().sum(1).mean()
    softened = soft_targets(shallow_NK, deepest_NK.detach(), temperature)
    hard = labels_loss(shallow_NK, labels_N)
    return labels * hard + soft * softened + hints * distance


class Head(nn.Module):
    """(features (N, C of the deepest map), logits) of a shallower map: separable convolutions with stride 2 down to the
    deepest map's size (at least one), the mean over what is left, a linear layer."""

    def __init__(self, shallow: Sequence[int], deepest: Sequence[int], classes: int) -> None:
        super().__init__()
        width, (goal, *_) = int(shallow[0]), deepest
        times = max(1, round(math.log2(max(1.0, shallow[1] / deepest[1]))))
        layers: list[nn.Module] = []
        for time in range(1, times + 1):
            outputs = goal if time == times else min(goal, 2 * width)
            layers += [
                nn.Conv2d(width, width, 3, stride=2, padding=1, groups=width, bias=False),
                nn.Conv2d(width, outputs, 1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
            ]
            width = outputs
        self.bottleneck = nn.Sequential(*layers)
        self.linear = nn.Linear(width, classes)

    def forward(self, shallow_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        features_NC = self.bottleneck(shallow_NCHW).mean((2, 3))
        return features_NC, self.linear(features_NC)


class DeeperToShallower(Settings):
    """Every stage gets a classifier of its own, taught by the deepest; the classifiers are then dropped.

    The student returns as it is, in the same structure, and is the deepest classifier; its own loss is that of the
    stage (`losses` from the teacher, and `labels`); the paper's, which has no teacher, is `labels: 1` with
    `losses: [{use: kd, weight: 0}]`. Weights are MMRazor's; its hints are the distance over the whole batch, ours the
    paper's squared distance as the batch's mean. Instead of the paper's bottlenecks, separable convolutions.
    """

    tasks: ClassVar[tuple[Task, ...]] = ("classification",)

    use: Literal["deeper_to_shallower"]
    layers: Literal["auto"] | tuple[str, ...] = "auto"
    """Layers with a classifier behind them, by name or pattern; the deepest of them gets none, it says what the
    others' features should be. `auto`: the ends of all stages."""
    labels: float = Field(default=0.7, ge=0)
    """Weight of each classifier's cross entropy with the labels."""
    soft: float = Field(default=0.3, ge=0)
    """Weight of what the deepest classifier's softened predictions teach each other."""
    temperature: float = Field(default=3.0, gt=0)
    hints: float = Field(default=0.03, ge=0)
    """Weight of the squared distance to the deepest features."""

    def check(self, module: nn.Module, preprocess: Preprocess) -> None:
        """Raises ModelError for a pattern that matches no layer, or where fewer than two layers return maps."""
        self.chosen(module, preprocess.size, preprocess.channels)

    def train(self, settings: Taught, product: Product, run: Run, label: str) -> tuple[nn.Module, dict[str, Any]]:
        student = product.network.module
        goal = objective(settings, product, run, student=student, training=settings)
        heads, deepest = self.build(student, run)
        module, metrics = goal.train(
            student,
            settings,
            label=label,
            loss=lambda module, batch: self.step(goal, heads, deepest, module, batch),
            beside=nn.ModuleList(heads.values()),
        )
        return module, metrics | {"scheme": self.use, "layers": [*heads, deepest]}

    def chosen(self, module: nn.Module, size: int, channels: int = 3) -> dict[str, tuple[int, ...]]:
        """The layers and the shapes of their maps without the batch, the deepest last."""
        if self.layers == "auto":
            names = stage_ends(module, size, channels)
        else:
            known = observable(module)
            found = matching_any(self.layers, known, field="layers", place=PLACE)
            names = [name for name in known if name in found]
        maps = answers_to_blank(module, size, names, channels).maps
        shapes = {name: tuple(maps[name].shape[1:]) for name in maps}  # in the order in which they ran
        flat = [name for name, shape in shapes.items() if len(shape) != 3]
        if flat or len(shapes) < 2:
            problem = f"layer {flat[0]} returns no map (C, H, W)" if flat else f"{names[0]} is the only layer"
            raise ModelError(PLACE, problem, "name two layers or more that return maps")
        return shapes

    def build(self, student: nn.Module, run: Run) -> tuple[dict[str, Head], str]:
        """A head for each layer but the deepest, and the deepest."""
        shapes = self.chosen(student, run.data.preprocess.size, run.data.preprocess.channels)
        *shallow, deepest = shapes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            heads = {name: Head(shapes[name], shapes[deepest], len(run.data.labels)) for name in shallow}
        return heads, deepest

    def step(self, goal: Objective, heads: dict[str, Head], deepest: str, module: nn.Module, batch: Batch) -> Tensor:
        """The student's own loss and those of the shallower classifiers."""
        said = goal.see(module, batch, (*heads, deepest))
        total = goal.judge(said, batch, module)
        for name, head in heads.items():
            shallow_NC, shallow_NK = head(said.maps[name])
            total = total + self_distillation(
                shallow_NK,
                shallow_NC,
                batch.labels_N,
                deepest_NK=said.logits_NK,
                deepest_NC=said.maps[deepest].mean((2, 3)),
                labels=self.labels,
                soft=self.soft,
                temperature=self.temperature,
                hints=self.hints,
                labels_loss=goal.labels_loss,
            )
        return total
