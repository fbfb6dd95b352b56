"""How good the networks are that a scheme trains on its way."""

from __future__ import annotations

from torch import nn

from compress import processes
from compress.measures import score
from compress.product import Run


def evaluation_accuracy(module: nn.Module, run: Run) -> float:
    """The task's score on the evaluation split, measured by the first process: for the report, not to choose by."""
    return processes.shared(lambda: _score(module, run))


def accuracies_apart(module: nn.Module, run: Run) -> list[float]:
    """The same of each process's own network, in the order of ranks."""
    return processes.gathered(_score(module, run))


def _score(module: nn.Module, run: Run) -> float:
    return score(module, run.data.batches("evaluation", batch_size=64), run.device, run.data.task)
