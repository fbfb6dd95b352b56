"""What each residual block contributes: how far the answers move without it."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn

from compress.models.blocks import Block, drop
from compress.product import Run
from compress.pruning.divergence import held_out, mean_divergence, outputs
from compress.training import reestimated_batchnorm


def block_scores(module: nn.Module, blocks: Sequence[Block], run: Run, images: int) -> dict[str, float]:
    """By block, in nats: the mean divergence of the answers of `module` without it from those of the whole one.

    On `images` training images; BatchNorm's statistics are measured again without each block, on as many others. Larger
    means that the block matters more. `module` stays as it is.
    """
    if not blocks:
        return {}
    compared, statistics = held_out(run, images, images)
    whole_NK = outputs(copy.deepcopy(module), compared, run.device)
    scores: dict[str, float] = {}
    with run.progress.steps("prune  blocks", len(blocks)) as advance:
        for block in blocks:
            without = copy.deepcopy(module)
            drop(without, [block.name])
            without = reestimated_batchnorm(without, statistics, run.device)
            scores[block.name] = mean_divergence(without, whole_NK, compared, run)
            advance(f"{block.name} {scores[block.name]:.3g}")
    return scores
