"""What a machine that measures must be able to do: take files, run `agent.py`, give results back."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from compress.errors import TargetError

OnLine = Callable[[dict[str, Any]], None]


class Machine(Protocol):
    """A machine on which `agent.py` runs. A context manager: what the job put there is removed when it is left.

    Every method raises TargetError when the machine cannot do its part.
    """

    @property
    def name(self) -> str:
        """As the recipe names it: `local`, `ssh://pi@raspberrypi:22`, `emulated:cortex-a72`."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def put(self, path: Path) -> str:
        """The path under which the machine's agent finds this file; copied there by content, once."""
        ...

    def place(self, name: str) -> str:
        """A path on the machine for a result of this job."""
        ...

    def get(self, name: str, path: Path) -> None:
        """Brings `place(name)` here, whole or not at all."""
        ...

    def ask(
        self, arguments: Sequence[str], *, about: str, on_line: OnLine | None = None, timeout_s: float = 900
    ) -> dict[str, Any]:
        """The last line of `agent.py ARGUMENTS`, a JSON object; `on_line` hears those before it (`EVENTS`).

        Raises TargetError about `about` with the agent's last word when it fails, and when it is killed, silent for
        `timeout_s` seconds, or cut off.
        """
        ...


EVENTS = ("process", "point", "layer")
"""Keys of the lines that the agent prints on its way; what has none of them is its result."""


class Lines:
    """The agent's standard output, line by line: JSON objects are taken, a login shell's chatter is not."""

    def __init__(self, on_line: OnLine | None = None) -> None:
        self.on_line = on_line
        self.found: dict[str, Any] | None = None

    def take(self, text: str) -> None:
        try:
            value = json.loads(text)
        except ValueError:
            return
        if not isinstance(value, dict):
            return
        if not any(key in value for key in EVENTS):
            self.found = value
        elif self.on_line:
            self.on_line(value)

    def result(self, about: str) -> dict[str, Any]:
        if self.found is None:
            raise TargetError(about, "the agent ended without a result")
        return self.found


def last_words(lines: Iterable[str]) -> str:
    """The last line that the agent said on standard error, without its name."""
    said = [line.strip() for line in lines if line.strip()]
    return said[-1].removeprefix("agent: ").removeprefix("error: ") if said else "no message"
