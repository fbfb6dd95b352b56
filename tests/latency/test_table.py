"""A table is only ever used for what it was measured on, and only as it was saved."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from compress.errors import TargetError
from compress.latency.shapes import Shape
from compress.latency.table import Key, Table, Whole

CONV = Shape("conv", 16, 32, (3, 3), (2, 2), (1, 1), (1, 1), 1, (24, 24))
KEY = Key({"cpu": "Cortex-A72", "features": ["asimd"], "governor": "performance"}, "litert", "2.3.0", 1)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def table() -> Table:
    linear = Shape("linear", 64, 10, (1, 1), (1, 1), (0, 0), (1, 1), 1, (1, 1))
    whole = Whole((CONV, linear), 123.456789, "abc")
    return Table(KEY, {CONV: 0.1 + 0.2, linear: 1e-3}, (whole,), noise=0.01)


def test_it_comes_back_as_it_was_saved(table):
    assert Table.load(KEY) == Table(KEY)
    table.save()
    assert Table.load(KEY) == table
    assert table.path.parent.name == "latency"


@pytest.mark.parametrize(
    "other",
    [
        replace(KEY, runtime="onnxruntime"),
        replace(KEY, version="2.3.1"),
        replace(KEY, threads=2),
        replace(KEY, device={**KEY.device, "cpu": "Cortex-A76"}),
        replace(KEY, device={**KEY.device, "governor": "powersave"}),
    ],
    ids=["runtime", "version", "threads", "cpu", "governor"],
)
def test_another_machine_runtime_or_setting_has_another_table(table, other):
    table.save()
    assert other.path != KEY.path
    assert Table.load(other).cells == {}
    other.path.write_bytes(KEY.path.read_bytes())  # a file that somebody has renamed
    with pytest.raises(TargetError, match="another device or runtime"):
        Table.load(other)


def test_damage_is_refused_in_one_line(table):
    table.save()
    good = table.path.read_text()
    faster = json.loads(good)
    faster["cells"][0][1] /= 2
    for bad in (good[: len(good) // 2], "", "[]", "null", json.dumps(faster), good.replace("16", "17", 1), '{"a": 1}'):
        table.path.write_text(bad)
        with pytest.raises(TargetError) as caught:
            Table.load(KEY)
        assert str(table.path) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert "damaged or altered" in str(caught.value)


def test_networks_are_replaced_by_their_shapes(table):
    again = table.with_wholes([Whole(table.wholes[0].shapes, 99.0, "abc")])
    assert [whole.us for whole in again.wholes] == [99.0]
    more = table.with_cells({CONV: 7.0}, noise=0.2)
    assert (more.cells[CONV], more.noise, table.cells[CONV]) == (7.0, 0.2, 0.1 + 0.2)
