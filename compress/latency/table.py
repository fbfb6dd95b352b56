"""A table of measured layers in the cache: one JSON file for each device, runtime, version and number of threads.

The file names the machine that it is of, and has a checksum of itself: a table of another machine is never used, and a
damaged or altered one is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from compress.errors import TargetError
from compress.latency.shapes import Shape
from compress.targets.cache import cache_folder
from compress.written import write_text

FORMAT = 1
"""Of the file, and of how layers are measured: another number makes every older table useless."""

NAMES = tuple(field.name for field in fields(Shape))
KINDS: dict[str, type] = {name: str if name == "kind" else tuple for name in NAMES}
KINDS |= dict.fromkeys(("inputs", "outputs", "groups"), int)


@dataclass(frozen=True)
class Key:
    """What a table is of: nothing in it holds where one of these differs."""

    device: Mapping[str, Any]
    """Facts of the machine (`measure.DEVICE`), by name."""
    runtime: str
    version: str
    """Of the runtime."""
    threads: int

    @property
    def as_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self), "device": dict(self.device)}

    @property
    def estimated(self) -> bool:
        """Whether times are estimated cycles of an emulated core at the clock of `device`."""
        return "llvm_mca" in self.device

    @property
    def path(self) -> Path:
        """Where its table is kept."""
        text = json.dumps(self.as_json, sort_keys=True)
        return cache_folder() / "latency" / f"{self.runtime}-{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"


@dataclass(frozen=True)
class Whole:
    """A whole network of int8 layers that was measured."""

    shapes: tuple[Shape, ...]
    us: float
    architecture: str
    """`predict.architecture` of it: what else it computes is alike for networks that have the same."""


@dataclass(frozen=True)
class Table:
    """What was measured of a device. Times are in microseconds of a single inference of one int8 layer."""

    key: Key
    cells: Mapping[Shape, float] = field(default_factory=dict)
    wholes: tuple[Whole, ...] = ()
    noise: float = 0.0
    """How far repeated measurements of the same layer were apart, as a share."""

    @property
    def path(self) -> Path:
        return self.key.path

    @property
    def estimated(self) -> bool:
        return self.key.estimated

    def with_cells(self, cells: Mapping[Shape, float], noise: float = 0.0) -> Table:
        return replace(self, cells={**self.cells, **cells}, noise=max(self.noise, noise))

    def with_wholes(self, wholes: Sequence[Whole]) -> Table:
        """The same with more networks; one that was measured before is replaced."""
        known = {whole.shapes: whole for whole in (*self.wholes, *wholes)}
        return replace(self, wholes=tuple(known.values()))

    def save(self) -> None:
        """Replaces the file as one step."""
        body = {
            "key": self.key.as_json,
            "noise": self.noise,
            "cells": [[row_of(shape), us] for shape, us in self.cells.items()],
            "wholes": [[list(map(row_of, one.shapes)), one.us, one.architecture] for one in self.wholes],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, json.dumps({"sha256": _checksum(body), **body}) + "\n")

    @classmethod
    def load(cls, key: Key) -> Table:
        """The table of `key`, empty where none is kept. Raises TargetError for a file that is not what was saved."""
        path = key.path
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return cls(key)
        except (OSError, UnicodeDecodeError) as error:
            raise TargetError(path, f"cannot be read ({_first_line(error)})", "remove it") from error
        try:
            body = json.loads(text)
            checksum = body.pop("sha256")
            if checksum != _checksum(body):
                raise TargetError(path, "the latency table was damaged or altered", "remove it")
            if body["key"] != json.loads(json.dumps(key.as_json)):
                raise TargetError(path, "the latency table is of another device or runtime", "remove it")
            return cls(
                key,
                {shape_of_row(row): float(us) for row, us in body["cells"]},
                tuple(Whole(tuple(map(shape_of_row, rows)), float(us), alike) for rows, us, alike in body["wholes"]),
                float(body["noise"]),
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise TargetError(path, "the latency table was damaged or altered", "remove it") from error


def row_of(shape: Shape) -> list[Any]:
    """The shape as JSON."""
    return [getattr(shape, name) for name in NAMES]


def shape_of_row(row: Sequence[Any]) -> Shape:
    """The shape of `row_of`. Raises ValueError or TypeError for what is none."""
    facts: dict[str, Any] = dict(zip(NAMES, row, strict=True))
    for name, kind in KINDS.items():
        value = facts[name]
        pair = isinstance(value, list) and len(value) == 2 and all(type(number) is int for number in value)
        if not (pair if kind is tuple else type(value) is kind):
            raise TypeError(f"{name} is {value!r}")
        facts[name] = tuple(value) if pair else value
    return Shape(**facts)


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
