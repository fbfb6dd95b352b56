"""Machines that measure: so far the one `compress` runs on; a board over ssh will be another."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from compress.errors import TargetError
from compress.targets.local import Local, open_model

__all__ = ["Runtime", "Target", "TargetSettings", "open_model", "target"]

Runtime = Literal["onnxruntime", "litert"]

TargetSettings = Literal["local"]
"""What a recipe can name as its target."""


class Target(Protocol):
    """A machine on which `agent.py` runs. Both methods raise TargetError when it cannot answer."""

    @property
    def name(self) -> str:
        """As the recipe names it."""
        ...

    def probe(self) -> dict[str, Any]:
        """What `agent.probe` finds out: board, CPU, memory, system, runtimes, clock, temperature."""
        ...

    def time(
        self, model: Path, *, runtime: str, threads: int, runs: int, warmup_s: float, min_s: float
    ) -> dict[str, Any]:
        """What `agent.py time` prints for one fresh process."""
        ...


def target(name: str) -> Target:
    """The machine that a recipe names. Raises TargetError for a name that is none."""
    if name == "local":
        return Local()
    raise TargetError(f"target {name}", "no such target", f"known: {', '.join(get_args(TargetSettings))}")
