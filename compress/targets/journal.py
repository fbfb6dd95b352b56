"""What an interrupted comparison, or table of layers, has measured so far: the next attempt goes on with it.

One JSON object a line: first what is measured and on which machine, then one per process or layer, each with its
time. A journal of other files, options or another machine is begun anew.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from compress import locks

MACHINE = (
    "board",
    "cpu",
    "arch",
    "cores",
    "ram_gb",
    "os",
    "kernel",
    "python",
    "numpy",
    "runtimes",
    "agent",
    "governor",
)
"""What tells a machine, and what is installed on it, from another; the rest of a probe changes with the hour."""
KEPT = ("process", "layer")
"""Keys of the agent's lines that are worth keeping."""


@dataclass
class Journal:
    path: Path
    asked: dict[str, Any]
    """What is compared, and how: JSON values."""
    lines: list[dict[str, Any]] = field(default_factory=list)
    """The agent's lines of the processes measured before."""
    begun: str = ""
    """When the first of them was measured, UTC."""

    @classmethod
    def open(cls, path: Path, asked: dict[str, Any]) -> Journal:
        """The journal at `path`, with the lines in it if they answer `asked`; a line that was cut short is dropped."""
        journal = cls(path, asked)
        try:
            texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return journal
        found = [value for value in map(_parsed, texts) if value is not None]
        if found and found[0].get("asked") == json.loads(json.dumps(asked)):
            journal.lines = [value for value in found[1:] if any(key in value for key in KEPT)]
            journal.begun = str(journal.lines[0].get("measured", "")) if journal.lines else ""
        return journal

    def keep(self, line: dict[str, Any]) -> None:
        """Adds a line. It is on the disk when this returns; a machine that loses power loses nothing of it."""
        self.lines.append(line | {"measured": datetime.now(UTC).isoformat(timespec="seconds")})
        if len(self.lines) == 1:
            self.path.write_text(json.dumps({"asked": self.asked}) + "\n", encoding="utf-8")
        self._append(self.lines[-1])

    def forget(self) -> None:
        """Removes the journal: what it holds is part of a result now."""
        self.path.unlink(missing_ok=True)

    def _append(self, value: dict[str, Any]) -> None:
        with self.path.open("r+", encoding="utf-8") as file:
            text = file.read()
            if text and not text.endswith("\n"):  # the last attempt was killed in the middle of a line
                file.write("\n")
            file.write(json.dumps(value) + "\n")
            file.flush()
            os.fsync(file.fileno())


@contextlib.contextmanager
def own_journal(path: Path) -> Iterator[str]:
    """Keeps other processes from the journal at `path`, whose folder is made; yields why it cannot be had, or ""."""
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locks.held(path.with_suffix(".lock")))
            taken = ""
        except locks.HeldError as error:
            taken = f"{error.holder or 'another process'} measures the same"
        except OSError as error:
            taken = f"{error.filename or path.parent}: {error.strerror}"
        yield taken


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
