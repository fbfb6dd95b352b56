"""What the trainings of a running stage have reached, on disk: a stage that was killed goes on from its last epoch.

    stages/02-distill.training/begun.json          the stage's key, and with how many threads and processes
    stages/02-distill.training/00/epoch.json       of its first training: which file holds the state, and its hash
    stages/02-distill.training/00/3.safetensors    weights, optimizer, averages, random numbers after three epochs

A stage trains in an order that its settings fix, so a training is known by its number. The state of an epoch is on the
disk, whole, before `epoch.json` names it, and the state before it goes only after that.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from compress.written import read_json, write_bytes, write_json

BEGUN, EPOCH = "begun.json", "epoch.json"


@dataclass(frozen=True)
class State:
    """A training after some of its epochs."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]
    """JSON values; `epoch` is how many are over."""


def prepare_epochs(folder: Path, key: str, conditions: Mapping[str, int] = MappingProxyType({})) -> list[str]:
    """Empties `folder`, unless an earlier attempt at a stage of the same key left it.

    `conditions` are no part of the key. Returns a sentence for each time that one of them changed after the end of an
    epoch, now or in an earlier attempt: `begun with 2 threads, goes on with 1`.
    """
    found = read_json(folder / BEGUN)
    if found.get("key") == key:
        if not any(folder.glob(f"*/{EPOCH}")):
            write_json(folder / BEGUN, {"key": key, **conditions})
            return []
        changed = found.get("changed", []) + [
            f"begun with {found[name]} {name}, goes on with {now}"
            for name, now in conditions.items()
            if found.get(name, now) != now
        ]
        write_json(folder / BEGUN, {"key": key, **conditions, "changed": changed})
        return list(dict.fromkeys(changed))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_json(folder / BEGUN, {"key": key, **conditions})
    return []


def forget_epochs(folder: Path, *, kept: bool = False) -> None:
    """Removes `folder`; with `kept` only where no training in it has come to the end of an epoch."""
    if not (kept and any(folder.glob(f"*/{EPOCH}"))):
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Epochs:
    """The trainings of one stage, in the order in which they begin. Without a folder nothing is kept."""

    folder: Path | None = None
    begun: int = 0
    earlier_s: float = 0.0
    """What epochs took that earlier attempts have finished."""

    def begin(self) -> Training:
        """The place of the next training."""
        self.begun += 1
        return Training(None if self.folder is None else self.folder / f"{self.begun - 1:02d}")


@dataclass
class Training:
    folder: Path | None
    current: str = field(default="", init=False)

    def epoch(self) -> int:
        """How many epochs are kept; 0 where none is, or where the file is not what was written."""
        return 0 if self._content() is None else int(read_json(self._header)["facts"]["epoch"])

    def load(self) -> State:
        """The state after that many epochs, if that is not 0."""
        content = self._content()
        assert content is not None
        return State(load(content), read_json(self._header)["facts"])

    def _content(self) -> bytes | None:
        if self.folder is None:
            return None
        found = read_json(self._header)
        try:
            content = (self.folder / str(found.get("file"))).read_bytes()
        except OSError:
            return None
        if _sha256(content, found.get("facts")) != found.get("sha256"):
            return None
        self.current = found["file"]
        return content

    @property
    def _header(self) -> Path:
        assert self.folder is not None
        return self.folder / EPOCH

    def save(self, state: State) -> None:
        """Keeps the state in place of the one before."""
        if self.folder is None:
            return
        self.folder.mkdir(exist_ok=True)
        name = f"{state.facts['epoch']}.safetensors"
        # Clones: modules may share tensors, the file cannot.
        content = save({key: value.detach().cpu().contiguous().clone() for key, value in state.tensors.items()})
        write_bytes(self.folder / name, content)
        facts = dict(state.facts)
        write_json(self._header, {"file": name, "sha256": _sha256(content, facts), "facts": facts})
        if self.current not in ("", name):
            (self.folder / self.current).unlink(missing_ok=True)
        self.current = name


def _sha256(content: bytes, facts: Any) -> str:
    """Of both: neither is believed without the other."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode() + content).hexdigest()
