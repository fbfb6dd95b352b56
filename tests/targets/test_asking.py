"""What is asked of machines: by local processes here, by a board's elsewhere."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stacks import convolutions

from compress.errors import TargetError
from compress.targets import Measuring, asking, open_model
from compress.targets.journal import own_journal
from compress.targets.local import Local
from compress.targets.machine import OnLine

QUICK = Measuring(rounds=2, runs=3, warmup_s=0.0, tolerance=10.0)


@dataclass
class Cut(Local):
    """This machine, on a link that breaks after some lines."""

    after: int = 10**9
    asked: list[list[str]] = field(default_factory=list)

    def ask(
        self, arguments: Sequence[str], *, about: str, on_line: OnLine | None = None, timeout_s: float = 900
    ) -> dict[str, Any]:
        self.asked.append(list(arguments))
        heard = 0

        def hear(line: dict[str, Any]) -> None:
            nonlocal heard
            if arguments[0] == "compare" and heard == self.after:
                raise TargetError(about, "the connection was cut")
            heard += 1
            if on_line:
                on_line(line)

        return super().ask(arguments, about=about, on_line=hear, timeout_s=timeout_s)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    return asking.by_name([convolutions(folder / f"{n}.onnx", layers=n) for n in (2, 3)])


@pytest.mark.parametrize("after", range(6))
def test_after_a_cut_only_the_rest_is_measured(files: dict[str, Path], tmp_path: Path, after: int) -> None:
    journal, notes = tmp_path / "journal.jsonl", list[str]()
    with Cut(after=after) as machine, pytest.raises(TargetError, match="the connection was cut"):
        asking.compare(machine, files, QUICK, journal=journal)
    kept = [json.loads(text)["process"] for text in journal.read_text().splitlines()[1:]] if after else []
    assert len(kept) == after
    said: list[str] = []
    with Cut() as machine:
        found = asking.compare(machine, files, QUICK, journal=journal, on_process=said.append, on_note=notes.append)
    assert len(said) == len(found.samples) == 6
    assert [sample["samples_ms"] for sample in found.samples[:after]] == [process["samples_ms"] for process in kept]
    assert [note[:6] for note in notes] == ([f"{after} of 6"] if after else [])
    assert not journal.exists()
    (pair,) = found.pairs
    assert pair["speedup"] == pytest.approx(
        np.median(np.concatenate([s["samples_ms"] for s in found.samples if s["index"] == 0 and not s["control"]]))
        / np.median(np.concatenate([s["samples_ms"] for s in found.samples if s["index"] == 1]))
    )


def test_a_journal_of_another_file_is_not_believed(files: dict[str, Path], tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    with Cut(after=2) as machine, pytest.raises(TargetError):
        asking.compare(machine, files, QUICK, journal=journal)
    other = {"2.onnx": files["2.onnx"], "3.onnx": convolutions(tmp_path / "3.onnx", layers=4)}
    with Cut() as machine:
        asking.compare(machine, other, QUICK, journal=journal, on_note=pytest.fail)
        assert not any(word.startswith("--done") for word in machine.asked[-1])


def test_two_at_once_do_not_share_a_journal(files: dict[str, Path], tmp_path: Path) -> None:
    journal, notes = tmp_path / "journal.jsonl", list[str]()
    with own_journal(journal) as free, Cut() as machine:
        assert not free
        found = asking.compare(machine, files, QUICK, journal=journal, on_note=notes.append)
    assert len(found.samples) == 6
    (note,) = notes
    assert note.startswith("What is measured is not kept, an interruption would lose it (process ")
    assert note.endswith(" measures the same).")
    assert not journal.exists()


def test_where_nothing_can_be_kept_it_is_measured_all_the_same(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    notes: list[str] = []
    with Cut() as machine:
        found = asking.compare(machine, files, QUICK, journal=tmp_path / "file" / "journal.jsonl", on_note=notes.append)
    assert len(found.samples) == 6
    assert len(notes) == 1
    assert f"{tmp_path / 'file'}" in notes[0]


def test_the_error_says_how_much_is_kept(files: dict[str, Path], tmp_path: Path) -> None:
    with Cut(after=4) as machine, pytest.raises(TargetError) as caught:
        asking.compare(machine, files, QUICK, journal=tmp_path / "journal.jsonl")
    assert str(caught.value).endswith("; 4 of 6 processes are kept, the same command goes on")


def test_answers_are_those_of_the_file(files: dict[str, Path]) -> None:
    images_NCHW = np.random.default_rng(0).normal(size=(5, 16, 32, 32)).astype(np.float32)
    path = files["2.onnx"]
    with Local() as machine:
        found = asking.answers(machine, path, images_NCHW)
    model = open_model(path)
    expected = np.concatenate([model.infer(image[None])[0] for image in images_NCHW])
    np.testing.assert_array_equal(found.outputs_NK, expected)
    assert (found.images, found.correct) == (5, None)
    assert found.facts["runtime"] == "onnxruntime"


def test_outputs_that_changed_on_the_way_are_refused(files: dict[str, Path]) -> None:
    @dataclass
    class Careless(Local):
        def get(self, name: str, path: Path) -> None:
            super().get(name, path)
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)

    with Careless() as machine, pytest.raises(TargetError, match="the outputs changed on their way here"):
        asking.answers(machine, files["2.onnx"], np.zeros((1, 16, 32, 32), np.float32))


def test_a_sustained_series_has_its_points(files: dict[str, Path]) -> None:
    points: list[dict[str, Any]] = []
    with Local() as machine:
        found = asking.sustain(machine, files["2.onnx"], minutes=0.02, every_s=0.3, on_point=points.append)
    assert len(points) >= 3
    assert found["series"] == points
    assert found["slowdown"] == pytest.approx(found["last_minute_p50_ms"] / found["first_minute_p50_ms"])
    assert found["verdict"] in ("OK", "THROTTLED")


def test_a_machine_without_the_runtime_says_so(files: dict[str, Path], tmp_path: Path) -> None:
    hidden = "import sys; sys.modules['onnxruntime'] = None; import runpy; sys.argv = sys.argv[1:]; "
    command = (sys.executable, "-P", "-c", hidden + "runpy.run_path(sys.argv[0], run_name='__main__')")
    with Local(command=command) as machine, pytest.raises(TargetError, match="onnxruntime"):
        asking.answers(machine, files["2.onnx"], np.zeros((1, 16, 32, 32), np.float32))
