"""A table of layers over ssh: one archive goes there, a line comes back per layer, and a dropped board goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from stand_in import Shown, StandIn

from compress.errors import TargetError
from compress.latency import measure as measuring
from compress.latency.measure import key_of, measure
from compress.latency.shapes import Shape
from compress.targets.ssh import Ssh


@pytest.fixture
def board(tmp_path: Path) -> Iterator[StandIn]:
    with StandIn(tmp_path) as board:
        yield board


def test_a_connection_that_drops_costs_only_what_was_not_heard(
    board: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(measuring, "SAMPLE_S", 0.002)
    monkeypatch.setattr(measuring, "BATCH", 1)  # so that lines come one by one
    shapes = [Shape("linear", 64, n, (1, 1), (1, 1), (0, 0), (1, 1), 1, (1, 1)) for n in range(16, 16 * 13, 16)]
    progress = Shown()
    board.watch = lambda way, seen: way == "out" and seen.count(b"halves_us") >= 4
    with Ssh(board.url, config=board.config) as machine:
        key = key_of(machine, "litert", 1)
        with pytest.raises(TargetError) as caught:
            measure(machine, shapes, "litert", key=key, progress=progress)
    kept = key.path.with_suffix(".jsonl").read_text().count('"layer"')
    assert 1 <= kept < len(shapes)
    assert f"{kept} of 12 are kept, the same command goes on" in str(caught.value)
    board.watch = lambda way, seen: False
    said = []
    monkeypatch.setattr(progress, "note", said.append)
    with Ssh(board.url, config=board.config) as machine:
        found = measure(machine, shapes, "litert", key=key, progress=progress)
    assert set(found.cells) == set(shapes)
    assert said[0].startswith(f"{kept} of 12 were measured before")
    assert board.quiet(60)
