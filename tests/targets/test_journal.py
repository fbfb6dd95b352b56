"""What an interrupted comparison leaves, and who may go on with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compress.targets.journal import Journal, own_journal

ASKED = {"files": [["a.onnx", "00"]], "options": ["--runs=3"], "machine": {"cpu": "4 x Cortex-A76"}}


def line(number: int) -> dict[str, object]:
    return {"process": {"index": number, "samples_ms": [1.5, 2.5]}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with own_journal(tmp_path / "kept" / "journal.jsonl") as taken:
        assert not taken
    return tmp_path / "kept" / "journal.jsonl"


def kept(path: Path, count: int) -> Journal:
    journal = Journal.open(path, ASKED)
    for number in range(count):
        journal.keep(line(number))
    return journal


def test_the_next_attempt_finds_every_line(path: Path) -> None:
    kept(path, 3)
    found = Journal.open(path, ASKED)
    assert [entry["process"] for entry in found.lines] == [line(number)["process"] for number in range(3)]
    assert found.begun == found.lines[0]["measured"]
    found.keep(line(3))
    assert len(Journal.open(path, ASKED).lines) == 4


@pytest.mark.parametrize(
    "other",
    [
        ASKED | {"options": ["--runs=4"]},
        ASKED | {"files": [["a.onnx", "01"]]},
        ASKED | {"machine": {"cpu": "4 x Cortex-A72"}},
    ],
)
def test_of_another_question_nothing_is_taken_and_nothing_stays(path: Path, other: dict[str, object]) -> None:
    kept(path, 3)
    found = Journal.open(path, other)
    assert found.lines == []
    found.keep(line(7))
    assert [entry["process"] for entry in Journal.open(path, other).lines] == [line(7)["process"]]
    assert Journal.open(path, ASKED).lines == []


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_line_that_was_cut_short_is_dropped_and_the_next_is_whole(path: Path, cut: int) -> None:
    kept(path, 3)
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    found = Journal.open(path, ASKED)
    whole = 3 if cut == 1 else 2  # the first byte from the end is the line's end
    assert len(found.lines) == whole
    found.keep(line(9))
    again = Journal.open(path, ASKED).lines
    assert len(again) == whole + 1
    assert again[-1]["process"] == line(9)["process"]


@pytest.mark.parametrize("content", [b"", b"\n", b"[]\n", b"{}\n", b"\xff\xfe", b'{"asked": 3}\n{"process": {}}\n'])
def test_a_file_that_is_no_journal_is_begun_anew(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert Journal.open(path, ASKED).lines == []
    kept(path, 1)
    first, *rest = path.read_text().splitlines()
    assert json.loads(first) == {"asked": ASKED}
    assert len(rest) == 1


def test_forgotten_when_all_is_measured(path: Path) -> None:
    kept(path, 1).forget()
    assert not path.exists()
    Journal.open(path, ASKED).forget()
