"""Born-again networks: Furlanello et al., 2018 (arXiv:1805.04770)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from compress.errors import ModelError
from compress.holding import held
from compress.labels import Task
from compress.product import Network, Preprocess, Product, Run
from compress.schemes.judged import evaluation_accuracy
from compress.settings import Settings
from compress.teachers.several import Ensemble, mean_logits
from compress.teachers.teacher import Frozen, Teacher
from compress.teaching import Taught, teach


class Together(nn.Module):
    """Networks as one, in eval mode: the mean of their logits (section 3.2 of the paper)."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.eval()

    def forward(self, images_NCHW: Tensor) -> Tensor:
        return mean_logits([member(images_NCHW) for member in self.members], [1.0] * len(self.members))


def reinitialized(module: nn.Module, seed: int) -> nn.Module:
    """A copy with fresh weights: PyTorch's own of each layer, which may differ from what the factory would draw.

    Raises ModelError for a layer with weights that does not know how to draw them anew.
    """
    refuse_fixed_weights(module)
    fresh = copy.deepcopy(module)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in fresh.modules():
            if (reset := _reset_of(layer)) is not None:
                reset()
    return fresh.eval()


def refuse_fixed_weights(module: nn.Module) -> None:
    """Raises ModelError for a layer with weights of its own that does not know how to draw them anew, or that keeps
    what its weights are."""
    for name, layer in module.named_modules():
        if held(layer):
            problem = "`reinitialize` would draw weights anew whose zeros or shared values are to stay"
            raise ModelError(name, problem, "leave reinitialize out, or put the stage before sparsify and cluster")
        if _reset_of(layer) is None and any(True for _ in layer.parameters(recurse=False)):
            raise ModelError(
                name or type(layer).__name__,
                f"`reinitialize` cannot draw the weights of a {type(layer).__name__} anew: no reset_parameters()",
                "leave reinitialize out, or give the layer that method",
            )


def _reset_of(layer: nn.Module) -> Any:
    return getattr(layer, "reset_parameters", None) or getattr(layer, "_reset_parameters", None)


class BornAgain(Settings):
    """Several generations of the student, each taught by the one before; the recipe's teacher teaches the first.

    The result is the last generation. In the paper students equal their teacher in shape and start at random weights;
    here all generations start from the weights that entered the stage, because what pruning kept is in them, and each
    draws another order of images and other augmentations. The paper's loss is `labels: 1` with
    `losses: [{use: kd, temperature: 1, weight: 1}]`.
    """

    tasks: ClassVar[tuple[Task, ...]] = ("classification", "multi_label", "regression")

    use: Literal["born_again"]
    generations: int = Field(default=3, ge=1)
    """Each is trained for the stage's `epochs`."""
    reinitialize: bool = False
    """Start each generation from fresh weights, as the paper does, in the shape that pruning left."""
    ensemble: bool = False
    """Also measure the mean of all generations' logits on the evaluation images."""
    from_ensemble: bool = False
    """Train once more, taught by the ensemble; that network is then the result."""

    @model_validator(mode="after")
    def _an_ensemble_of_several(self) -> BornAgain:
        if (self.ensemble or self.from_ensemble) and self.generations < 2:
            raise ValueError("an ensemble needs `generations` of 2 or more")
        return self

    def check(self, module: nn.Module, preprocess: Preprocess) -> None:
        """Raises ModelError for a layer that cannot be initialised anew, where that is asked for."""
        if self.reinitialize:
            refuse_fixed_weights(module)

    def train(self, settings: Taught, product: Product, run: Run, label: str) -> tuple[nn.Module, dict[str, Any]]:
        teacher: Teacher | None = None
        born: list[Frozen] = []
        generations: list[dict[str, Any]] = []
        history: list[dict[str, Any]] = []
        for generation in range(1, self.generations + 1):
            module, metrics = self._generation(
                settings, product, run, f"{label} generation {generation}/{self.generations}", teacher, generation
            )
            history += [{"generation": generation, **epoch} for epoch in metrics["history"]]
            generations.append({"generation": generation, "accuracy": evaluation_accuracy(module, run)})
            teacher = Frozen(Network(module, product.network.structure), run, related=True)
            born.append(teacher)
        found: dict[str, Any] = {"scheme": "born_again", "generations": generations}
        if self.ensemble or self.from_ensemble:
            found["ensemble_accuracy"] = evaluation_accuracy(
                Together([member.network.module for member in born if member.network]), run
            )
        if self.from_ensemble:
            ensemble = Ensemble(born, of="logits", features_from=len(born) - 1)
            # Counted on, so that its images come in yet another order.
            module, metrics = self._generation(
                settings, product, run, f"{label} from the ensemble", ensemble, self.generations + 1
            )
            history += [{"generation": "ensemble", **epoch} for epoch in metrics["history"]]
            found["from_ensemble_accuracy"] = evaluation_accuracy(module, run)
        return module, {**metrics, **found, "history": history}

    def _generation(
        self, settings: Taught, product: Product, run: Run, label: str, teacher: Teacher | None, number: int
    ) -> tuple[nn.Module, dict[str, Any]]:
        # The first is what the stage would have trained without a scheme.
        seed = run.seed + number - 1
        start = product.network
        if self.reinitialize:
            start = Network(reinitialized(start.module, seed), start.structure)
        return teach(
            start.module,
            settings,
            replace(product, network=start),
            replace(run, seed=seed),
            label=label,
            teacher=teacher,
        )
