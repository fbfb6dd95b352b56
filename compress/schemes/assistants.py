"""Teacher assistants: Mirzadeh et al., 2020 (arXiv:1902.03393)."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import nn

from compress.errors import ModelError
from compress.labels import Task
from compress.measures import macs
from compress.product import Network, Preprocess, Product, Run
from compress.pruning import MacGoal, Pruning, prune_network, refuse_unreachable
from compress.schemes.judged import evaluation_accuracy
from compress.settings import Settings
from compress.teachers.teacher import Frozen, Teacher
from compress.teaching import Taught, teach

PLACE = "scheme assistants"
Share = Annotated[float, Field(gt=0, lt=1)]


class Assistants(Settings):
    """A chain: the teacher teaches a wider network, that one a less wide one, and the last of them the student.

    The assistants are earlier pruning levels of the original network, so they cost no design: channels that the student
    has are the last to go, and where that leaves them all of these, losses on maps compare kept channel with kept
    channel. Everybody is trained with the stage's settings and losses.
    """

    tasks: ClassVar[tuple[Task, ...]] = ("classification", "multi_label", "regression")

    use: Literal["assistants"]
    macs: tuple[Share, ...] = Field(default=(0.66,), min_length=1)
    """Shares of the original network's multiply-adds, from large to small; all above the student's."""
    pruning: Pruning = Pruning()
    """How the assistants are pruned; as the student was, if they are to be its earlier levels."""
    epochs: int | None = Field(default=None, ge=1)
    """For each assistant; null for as many as the student."""

    @model_validator(mode="after")
    def _falling(self) -> Assistants:
        if any(wide <= narrow for wide, narrow in zip(self.macs, self.macs[1:], strict=False)):
            raise ValueError(f"`macs: {list(self.macs)}` must fall, from the widest assistant to the narrowest")
        return self

    def check(self, module: nn.Module, preprocess: Preprocess) -> None:
        """Raises ModelError for a share that pruning cannot reach or a pattern that matches no layer."""
        goal = MacGoal(macs=self.macs[-1])
        refuse_unreachable(module, goal, self.pruning, size=preprocess.size, channels=preprocess.channels, place=PLACE)

    def train(self, settings: Taught, product: Product, run: Run, label: str) -> tuple[nn.Module, dict[str, Any]]:
        networks = self.assistants(product, run)
        of_assistants = settings if self.epochs is None else settings.model_copy(update={"epochs": self.epochs})
        before = macs(product.original.module, run.data.preprocess.size, run.data.preprocess.channels)
        teacher: Teacher | None = None
        chain: list[dict[str, Any]] = []
        history: list[dict[str, Any]] = []
        for number, network in enumerate(networks, start=1):
            module, metrics = teach(
                network.module,
                of_assistants,
                replace(product, network=network, float_network=None),
                run,
                label=f"{label} assistant {number}/{len(networks)}",
                teacher=teacher,
            )
            teacher = Frozen(Network(module, network.structure), run, related=True)
            history += [{"assistant": number, **epoch} for epoch in metrics["history"]]
            share = macs(module, run.data.preprocess.size, run.data.preprocess.channels) / before
            chain.append({"assistant": number, "macs": share, "accuracy": evaluation_accuracy(module, run)})
        module, metrics = teach(
            product.network.module, settings, product, run, label=f"{label} student", teacher=teacher
        )
        history += metrics["history"]
        return module, {**metrics, "scheme": "assistants", "assistants": chain, "history": history}

    def assistants(self, product: Product, run: Run) -> list[Network]:
        """The untrained assistants. Raises ModelError where one would be as narrow as the student."""
        given = run.data.preprocess
        student = macs(product.network.module, given.size, given.channels)
        before = macs(product.original.module, given.size, given.channels)
        if int(self.macs[-1] * before) <= student:
            raise ModelError(
                PLACE,
                f"an assistant at {self.macs[-1]:g} of the multiply-adds is no wider than the student, which has "
                f"{student / before:.3g}",
                "raise the smallest of `macs`" if student < before else "put the stage after one that prunes",
            )
        kept = product.network.structure.kept
        return [
            prune_network(product.original, MacGoal(macs=share), self.pruning, run=run, around=kept, place=PLACE)
            for share in self.macs
        ]
