"""Finished stages that several runs share, by their keys: each is computed once, and the others take a copy.

    <store>/<key>/03-distill/     as in a run's folder; its files are hard links to those of the run that computed it
    <store>/<key>.lock            of the process that is at it

The label belongs to the place: it numbers the stage, and with the number goes the seed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from compress import manifest
from compress.locks import held
from compress.progress import Progress
from compress.written import put_in_place


@contextlib.contextmanager
def shelved(store: Path | None, key: str, label: str, progress: Progress) -> Iterator[Path | None]:
    """The stage's place in the store, to take from or to put into; None without a store.

    Until the end no other process computes that stage: it waits, and says so, while this one is at it.
    """
    if store is None:
        yield None
        return
    store.mkdir(parents=True, exist_ok=True)
    place = store / key / label
    if manifest.valid(place, key) is not None:  # nothing changes there any more
        yield place
        return
    with held(store / f"{key}.lock", place=label, waiting=progress):
        yield place


def take(source: Path, place: Path, key: str) -> None:
    """Copies a finished stage of that key to `place`, unless it lies there already."""
    if manifest.valid(place, key) is None and manifest.valid(source, key) is not None:
        _put(source, place, shutil.copy2)


def put(place: Path, shelf: Path, key: str) -> None:
    """Puts a finished stage into the store, without another copy of its files where the file system has links."""
    if manifest.valid(shelf, key) is None and manifest.valid(place, key) is not None:
        shelf.parent.mkdir(parents=True, exist_ok=True)
        _put(place, shelf, _linked)


def _put(source: Path, place: Path, copy: object) -> None:
    partial = place.with_name(place.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, copy_function=copy)  # type: ignore[arg-type]
    put_in_place(partial, place)


def _linked(source: str, place: str) -> None:
    try:
        os.link(source, place)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, place)
