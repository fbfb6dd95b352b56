"""Layers measured on this machine by the agent, and what is left of a measurement that was cut off."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from torch import nn

from compress.errors import TargetError
from compress.latency import measure as measuring
from compress.latency import predict
from compress.latency.measure import key_of, measure
from compress.latency.networks import int8_file
from compress.latency.predict import calibrated, predictor_for
from compress.latency.shapes import Shape, place_layers
from compress.latency.table import Table
from compress.product import Preprocess
from compress.progress import Silent
from compress.targets.local import Local
from compress.targets.machine import OnLine


class Heard(Silent):
    """What a user would read."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@dataclass
class Cut(Local):
    """This machine, whose connection drops after some of a table's layers."""

    after: int | None = None
    asked: list[set[str]] = field(default_factory=list)
    """The names of the layers of each archive."""

    def ask(self, arguments, *, about, on_line: OnLine | None = None, timeout_s: float = 900):
        if arguments[0] != "layers":
            return super().ask(arguments, about=about, on_line=on_line, timeout_s=timeout_s)
        with zipfile.ZipFile(arguments[1]) as archive:
            self.asked.append({one["name"] for batch in json.loads(archive.read("layers.json")) for one in batch})
        heard = 0

        def pass_on(line):
            nonlocal heard
            if heard == self.after:
                raise TargetError("ssh://board", "the connection dropped")
            heard += 1
            on_line(line)

        return super().ask(arguments, about=about, on_line=pass_on, timeout_s=timeout_s)


@pytest.fixture(autouse=True)
def _quick(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(measuring, "SAMPLE_S", 0.002)
    monkeypatch.setattr(measuring, "WHOLE_S", 0.01)


def conv(outputs: int, size: int = 8) -> Shape:
    return Shape("conv", 16, outputs, (3, 3), (1, 1), (1, 1), (1, 1), 1, (size, size))


SHAPES = [conv(outputs) for outputs in (8, 16, 24, 32, 40)]


class Small(nn.Sequential):
    def __init__(self, width: int = 24) -> None:
        super().__init__(
            nn.Conv2d(3, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, groups=width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, 5),
        )


def test_a_dropped_board_goes_on_where_it_was():
    heard = Heard()
    with Cut(after=3) as machine:
        key = key_of(machine, "litert", 1)
        with pytest.raises(TargetError) as caught:
            measure(machine, SHAPES, "litert", key=key, progress=heard)
    assert str(caught.value).endswith("3 of 5 are kept, the same command goes on")
    assert "the connection dropped" in str(caught.value)
    journal = key.path.with_suffix(".jsonl")
    kept = {line["layer"]["name"] for line in map(json.loads, journal.read_text().splitlines()) if "layer" in line}
    assert len(kept) == 3
    journal.write_text(journal.read_text() + '{"layer": {"name": "half a li')  # killed in the middle of a line
    with Cut() as machine:
        found = measure(machine, [*SHAPES, conv(48)], "litert", key=key, progress=heard)
    assert len(machine.asked) == 1
    assert len(machine.asked[0]) == 3
    assert not machine.asked[0] & kept
    assert set(found.cells) == {*SHAPES, conv(48)}
    assert heard.notes[-1].startswith("3 of 6 were measured before, from ")
    assert all(name in journal.read_text() for name in map(json.dumps, kept | machine.asked[0]))  # until a table has it


def test_another_machine_does_not_go_on_with_it(monkeypatch):
    with Cut(after=2) as machine:
        key = key_of(machine, "litert", 1)
        with pytest.raises(TargetError):
            measure(machine, SHAPES, "litert", key=key, progress=Silent())
    monkeypatch.setattr(measuring, "DEVICE", ("cpu",))
    with Cut() as machine:
        other = key_of(machine, "litert", 1)
        assert other.path != key.path
        assert len(measure(machine, SHAPES[:2], "litert", key=other, progress=Silent()).cells) == 2
    assert len(machine.asked[0]) == 2


def test_more_work_takes_longer():
    wide, narrow = conv(256, 24), conv(16, 24)
    for runtime in ("onnxruntime", "litert"):
        with Local() as machine:
            key = key_of(machine, runtime, 1)
            found = measure(machine, [wide, narrow], runtime, key=key, progress=Silent())
        assert found.cells[wide] > 2 * found.cells[narrow]  # sixteen times the multiply-adds
        assert found.noise >= 0


def test_a_missing_runtime_and_damaged_archives_are_told_in_one_line(tmp_path):
    with Local() as machine, pytest.raises(TargetError, match="local: tvm is not installed there; install it"):
        key_of(machine, "tvm", 1)
    for content in (b"nothing", b"PK\x05\x06" + bytes(18)):
        path = tmp_path / "layers.zip"
        path.write_bytes(content)
        with Local() as machine, pytest.raises(TargetError, match="is no archive of layers"):
            machine.ask(["layers", str(path), "--runtime=litert"], about="layers")


def test_a_table_is_built_once_and_fits_whole_networks(monkeypatch):
    monkeypatch.setattr(predict, "BASES", (16,))
    monkeypatch.setattr(predict, "OFFSETS", (0, 8, 16, 32))
    monkeypatch.setattr(predict, "BESIDE", 16)
    asked: list[set[str]] = []
    monkeypatch.setattr(predict, "open_target", lambda *_, **__: Cut(asked=asked))
    layers = place_layers(Small(), 16)
    heard = Heard()
    first = predictor_for("local", "litert", layers, progress=heard)
    assert len(asked) == 1
    assert (first.fixed_us, first.scale, first.fitted, first.estimated) == (0.0, 1.0, 0, False)
    again = predictor_for("local", "litert", layers, progress=heard)
    assert len(asked) == 1  # nothing was missing
    assert again.table == first.table == Table.load(first.table.key)
    more = predictor_for("local", "litert", layers, progress=heard, cells=[conv(40), layers[0].shape])
    assert len(asked[1]) == 1  # one of the two is in it
    assert more.layer_us(conv(40)) == more.table.cells[conv(40)]
    nets = [(place_layers(net, 16), int8_file(net, Preprocess(size=16), "litert")) for net in (Small(), Small(8))]
    fitted = calibrated("local", more, nets, progress=heard)
    assert (fitted.fitted, len(asked[2])) == (2, 2)
    kept = predictor_for("local", "litert", layers, progress=heard)
    assert (kept.fitted, kept.scale) == (2, fitted.scale)
    assert calibrated("local", kept, nets, progress=heard) == kept
    assert len(asked) == 3
    path = first.table.path
    path.write_text(path.read_text().replace("0.", "1.", 1))
    predictor_for("local", "litert", layers, progress=heard)
    assert heard.notes[-1] == f"{path}: the latency table was damaged or altered; it is measured anew"
    assert len(asked[3]) == len(asked[0])
    assert not list(Path(path.parent).glob("*.jsonl"))
