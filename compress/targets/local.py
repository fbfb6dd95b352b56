"""This machine, measured by `agent.py` in fresh processes as a board would be."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import TargetError
from compress.targets import agent

AGENT = Path(agent.__file__)


@dataclass(frozen=True)
class Local:
    python: str = sys.executable
    timeout_s: float = 900
    """For one process of the agent, to end a run that hangs."""

    @property
    def name(self) -> str:
        return "local"

    def probe(self) -> dict[str, Any]:
        return self._ask(["probe"], place="local")

    def time(
        self, model: Path, *, runtime: str, threads: int, runs: int, warmup_s: float, min_s: float
    ) -> dict[str, Any]:
        options = {"runtime": runtime, "threads": threads, "runs": runs, "warmup-s": warmup_s, "min-s": min_s}
        words = [f"--{name}={value}" for name, value in options.items()]
        return self._ask(["time", str(model), *words], place=f"{model.name} on {runtime}", model=model)

    def _ask(self, arguments: Sequence[str], *, place: str, model: Path | None = None) -> dict[str, Any]:
        """The agent's answer; TargetError with its last word when it fails or dies."""
        # -P keeps this folder's modules from hiding others of the same name in the agent's process.
        command = [self.python, "-P", str(AGENT), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=self.timeout_s)
        except subprocess.TimeoutExpired as error:
            raise TargetError(place, f"no result within {self.timeout_s:g} s") from error
        except OSError as error:
            raise TargetError(place, f"cannot start {self.python}: {error.strerror}") from error
        if done.returncode:
            raise TargetError(place, _last_words(done).removeprefix(f"{model}: "))
        try:
            return json.loads(done.stdout.splitlines()[-1])
        except (IndexError, ValueError) as error:
            raise TargetError(place, "the agent ended without a result") from error


def open_model(path: Path, runtime: str = "auto", threads: int = 1) -> agent.Model:
    """`agent.open_model` for use inside `compress`: what goes wrong is a TargetError."""
    try:
        return agent.open_model(path, runtime, threads)
    except agent.AgentError as error:
        raise TargetError(path.name, str(error).removeprefix(f"{path}: ")) from error


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    last = lines[-1].removeprefix("agent: ").removeprefix("error: ") if lines else "no message"
    if done.returncode < 0:
        return f"the agent was ended by {signal.Signals(-done.returncode).name}; its last message: {last}"
    return last
