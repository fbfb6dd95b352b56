"""Several teachers as one: ensembles and specialists (Hinton et al., 2015, arXiv:1503.02531).

You et al., 2017 (Learning from Multiple Teacher Networks, KDD) average softened outputs; Fukuda et al., 2017 (Efficient
Knowledge Distillation from an Ensemble of Teachers, Interspeech) choose one at random for each step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from compress.errors import ModelError
from compress.observation import Answers
from compress.product import Batch, Network, Product, Run
from compress.settings import Settings
from compress.teachers.single import SingleTeacher
from compress.teachers.teacher import Teacher
from compress.tensors import under


def mean_log_probabilities(logits_MNK: Sequence[Tensor], weights_M: Sequence[float]) -> Tensor:
    """(N, K): the logarithm of the weighted mean of the M teachers' class probabilities at temperature 1.

    log sum_m w_m softmax(z_m), with weights that are divided by their sum; teachers of weight 0 play no part. Its
    softmax is that mean, so it serves as logits. A loss with a temperature softens the mean; Hinton et al. take the
    mean of what was softened.
    """
    total = float(sum(weights_M))
    rows = [
        torch.log_softmax(logits_NK, dim=1) + float(np.log(weight / total))
        for logits_NK, weight in zip(logits_MNK, weights_M, strict=True)
        if weight > 0
    ]
    return torch.logsumexp(torch.stack(rows), dim=0)


def mean_logits(logits_MNK: Sequence[Tensor], weights_M: Sequence[float]) -> Tensor:
    """(N, K): the weighted mean of the M teachers' logits, whose softmax is their geometric mean, normalised."""
    total = float(sum(weights_M))
    return torch.stack(
        [(weight / total) * logits_NK for logits_NK, weight in zip(logits_MNK, weights_M, strict=True) if weight > 0]
    ).sum(0)


class Several(Settings):
    """Logits of several teachers, or of one of them for each step; feature maps of one of them."""

    use: Literal["several"]
    teachers: tuple[SingleTeacher, ...] = Field(min_length=2)
    """Each like the `teacher` of a stage: `parent`, the folder of a network, or a mapping."""
    combine: Literal["mean", "random"] = "mean"
    """`random`: another one for each step of the training, drawn by the run's seed."""
    of: Literal["probabilities", "logits"] = "probabilities"
    """What the mean is of. Losses that compare logits themselves, as `l2` does, need `logits`."""
    weights: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    """Of the teachers in the mean, or in the draw; a teacher of weight 0 gives feature maps only. null: equal."""
    features_from: int | None = Field(default=None, ge=0)
    """Which teacher, counted from 0, gives what losses on features and weights compare; null where no loss does."""

    @model_validator(mode="after")
    def _fits_the_number_of_teachers(self) -> Several:
        count = len(self.teachers)
        if self.weights is not None and len(self.weights) != count:
            raise ValueError(f"{len(self.weights)} weights for {count} teachers")
        if self.weights is not None and not any(self.weights):
            raise ValueError("`weights` are all 0, so no teacher gives logits")
        if self.features_from is not None and self.features_from >= count:
            raise ValueError(f"`features_from: {self.features_from}` is no teacher: the last of {count} is {count - 1}")
        return self

    def folders(self) -> tuple[str, ...]:
        """Folders outside the run that the teachers are read from."""
        return tuple(folder for teacher in self.teachers for folder in teacher.folders())

    def open(self, product: Product, run: Run) -> Teacher:
        return Ensemble(
            [teacher.open(product, run) for teacher in self.teachers],
            combine=self.combine,
            of=self.of,
            weights=self.weights,
            features_from=self.features_from,
            seed=run.seed,
        )


class Ensemble:
    """Teachers that answer together."""

    def __init__(
        self,
        members: Sequence[Teacher],
        *,
        combine: Literal["mean", "random"] = "mean",
        of: Literal["probabilities", "logits"] = "probabilities",
        weights: Sequence[float] | None = None,
        features_from: int | None = None,
        seed: int = 0,
    ) -> None:
        self.members, self.combine, self.of, self.seed = tuple(members), combine, of, seed
        self.weights = tuple(weights) if weights is not None else (1.0,) * len(self.members)
        self.features_from = features_from
        self.chosen = self._draw(0)
        self.network: Network | None = self._network()
        self.related = features_from is not None and self.members[features_from].related
        self.fingerprint: str | None = self._fingerprint()

    def answers(self, batch: Batch, layers: Sequence[str], *, differentiable: bool = False) -> Answers:
        """Raises ModelError for layers where no teacher was named to give them."""
        if layers and self.features_from is None:
            raise ModelError(
                "teacher (several)",
                f"a loss compares layer {layers[0]}, and no teacher was named to give it",
                "set `features_from: 0` for the first of the teachers",
            )
        giving = [self.chosen] if self.combine == "random" else [i for i, w in enumerate(self.weights) if w > 0]
        asked = sorted({*giving, self.features_from} if layers and self.features_from is not None else giving)
        said = {
            index: self.members[index].answers(
                batch, layers if index == self.features_from else (), differentiable=differentiable
            )
            for index in asked
        }
        maps = said[self.features_from].maps if layers and self.features_from is not None else {}
        if self.combine == "random":
            return Answers(said[self.chosen].logits_NK, maps)
        mean = mean_logits if self.of == "logits" else mean_log_probabilities
        logits_MNK = [said[index].logits_NK for index in giving]
        return Answers(mean(logits_MNK, [self.weights[index] for index in giving]), maps)

    def follow(self, student: nn.Module, batch: Batch) -> None:
        self.chosen = self._draw(batch.step)
        for member in self.members:
            member.follow(student, batch)
        self.network = self._network()

    def _network(self) -> Network | None:
        return None if self.features_from is None else self.members[self.features_from].network

    def _fingerprint(self) -> str | None:
        prints = [member.fingerprint for member, weight in zip(self.members, self.weights, strict=True) if weight > 0]
        if None in prints or self.combine == "random":
            return None
        facts = (self.of, prints, [weight for weight in self.weights if weight > 0])
        return hashlib.sha256(f"several {facts}".encode()).hexdigest()

    def state(self) -> dict[str, Tensor]:
        states = enumerate(member.state() for member in self.members)
        return {f"{number}.{name}": value for number, state in states for name, value in state.items()}

    def restore(self, state: Mapping[str, Tensor], student: nn.Module) -> None:
        for number, member in enumerate(self.members):
            member.restore(under(state, f"{number}."), student)
        self.network = self._network()

    def _draw(self, step: int) -> int:
        """Of this step: the same in every process, and again in a run with the same seed."""
        shares = np.asarray(self.weights) / sum(self.weights)
        return int(np.random.default_rng((self.seed, step, 3)).choice(len(self.members), p=shares))
