"""The schedule `progressive` of stage `prune`: one training in which the network becomes narrower."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from compress.losses.lesson import FeatureTerm
from compress.models.rebuild import refuse_to_cut
from compress.models.structure import compose
from compress.product import Network, Product, Run
from compress.pruning import MacGoal, Pruning
from compress.pruning.schedule import Narrowed, Progressive
from compress.regularizers import Sparse
from compress.teaching import Distillation, teach
from compress.training import Fit


def refuse_unprogressive(goal: Any, finetune: Fit | None, distill: Distillation | None) -> None:
    """Raises ValueError for what a network that becomes narrower while it is trained cannot be trained with."""
    if not isinstance(goal, MacGoal):
        raise ValueError("`schedule: progressive` goes by multiply-adds: give `goal: {macs: ...}`, or use `iterative`")
    if finetune is None or finetune.epochs == 0:
        raise ValueError("`schedule: progressive` takes channels out while `finetune` trains: give it epochs")
    if isinstance(finetune, Sparse) and finetune.sparsity is not None:
        raise ValueError("`schedule: progressive` and `finetune.sparsity` are two ways to the same: leave one out")
    term: Any
    for term in (distill.losses if distill is not None else None) or ():
        if isinstance(term, FeatureTerm) or term.needs_networks:
            raise ValueError(
                f"`{term.use}` compares channels that go while `schedule: progressive` trains: "
                "use losses of logits, or let a stage `distill` follow"
            )


def narrowed(
    product: Product,
    goal: MacGoal,
    pruning: Pruning,
    schedule: Progressive,
    finetune: Fit,
    distill: Distillation | None,
    run: Run,
    place: str,
) -> tuple[Network, dict[str, Any]]:
    """The trained, narrower network, and what the training's manifest says, with each narrowing in `narrowed`."""
    network = product.network
    refuse_to_cut(network.structure, place)
    narrowing = Narrowed(network.module, pruning, goal.macs, schedule, run, place)
    teaching = replace(product, parent=product.original)
    module, found = teach(network.module, finetune, teaching, run, label="prune", by=distill, narrowing=narrowing)
    kept = compose(network.structure.kept, narrowing.kept)
    structure = network.structure.model_copy(update={"kept": kept})
    return Network(module, structure), {"history": found["history"], "narrowed": narrowing.course}
