"""How good the networks are that a scheme trains on its way."""

from __future__ import annotations

from torch import nn

from compress import processes
from compress.measures import accuracy
from compress.product import Run


def evaluation_accuracy(module: nn.Module, run: Run) -> float:
    """Top-1 accuracy on the evaluation split, measured by the first process: for the report, not to choose by."""
    return processes.shared(lambda: accuracy(module, run.data.batches("evaluation", batch_size=64), run.device))


def accuracies_apart(module: nn.Module, run: Run) -> list[float]:
    """The same of each process's own network, in the order of ranks."""
    mine = accuracy(module, run.data.batches("evaluation", batch_size=64), run.device)
    return processes.gathered(mine)
