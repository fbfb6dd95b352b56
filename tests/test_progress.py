"""The log that programs read: what a line holds, what a kill and a full disk do to it, and what it never shows."""

import io
import json
import math
import os
from datetime import UTC, datetime, timedelta

import pytest
from rich.console import Console

from compress.errors import CompressError
from compress.progress import LogFile, RichProgress, Several, Silent, logged, read_log


@pytest.fixture
def path(tmp_path):
    return tmp_path / "log.jsonl"


class Heard(Silent):
    def __init__(self):
        self.notes, self.events = [], []

    def note(self, text):
        self.notes.append(text)

    def event(self, kind, **facts):
        self.events.append((kind, facts))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_line_has_the_same_five_fields_and_its_stage(path):
    with logged(path, Silent()) as progress:
        progress.event("run_started", name="small")
        progress.event("stage_started", stage="01-train", key="k")
        progress.note("a note")
        with progress.steps("train  epoch 1/1", 2) as advance:
            advance("loss 0.5")
            advance("loss 0.4")
        progress.event("stage_finished", stage="01-train", seconds=1.5, accuracy=0.9)
        progress.event("run_finished")
    found = lines(path)
    assert all(list(line) == ["time", "level", "event", "stage", "facts"] for line in found)
    assert [line["event"] for line in found] == [
        *("run_started", "stage_started", "note", "work", "stage_finished", "run_finished")
    ]
    assert [line["stage"] for line in found] == [None, "01-train", "01-train", "01-train", "01-train", None]
    assert found[2]["facts"] == {"text": "a note"}
    assert found[3]["facts"]["said"] == "loss 0.4"
    assert found[3]["facts"]["steps"] == 2
    for line in found:
        assert line["time"].endswith("Z")
        assert abs(datetime.fromisoformat(line["time"]) - datetime.now(UTC)) < timedelta(minutes=1)


def test_each_line_is_there_as_soon_as_it_was_said(path):
    with logged(path, Silent()) as progress:
        for count in range(1, 4):
            progress.note(str(count))
            assert len(lines(path)) == count


def test_a_second_run_goes_on_below_the_first(path):
    for text in ("first", "second"):
        with logged(path, Silent()) as progress:
            progress.note(text)
    assert [line["facts"]["text"] for line in read_log(path)] == ["first", "second"]


@pytest.mark.parametrize("kept", range(1, 60, 7))
def test_a_line_that_a_kill_cut_short_costs_no_other(path, kept):
    with logged(path, Silent()) as progress:
        progress.note("first")
        progress.note("cut")
    first, cut = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + cut[:kept])
    with logged(path, Silent()) as progress:
        progress.note("second")
    assert [line["facts"]["text"] for line in read_log(path)] == ["first", "second"]
    assert path.read_bytes().startswith(first + cut[:kept] + b"\n")


@pytest.mark.parametrize(
    ("error", "level", "facts"),
    [
        (
            CompressError("stage 01-train", "the loss is nan", "try a lower lr"),
            "error",
            {
                "text": "stage 01-train: the loss is nan; try a lower lr",
                "place": "stage 01-train",
                "problem": "the loss is nan",
                "way_out": "try a lower lr",
            },
        ),
        (ValueError("no"), "error", {"text": "ValueError: no"}),
        (KeyboardInterrupt(), "warning", {"name": "SIGINT"}),
    ],
)
def test_what_ends_the_work_is_the_last_line_and_goes_on_its_way(path, error, level, facts):
    heard = Heard()

    def work():
        with logged(path, heard) as progress:
            progress.event("stage_started", stage="01-train")
            raise error

    with pytest.raises(type(error)):
        work()
    last = lines(path)[-1]
    assert last["level"] == level
    assert last["facts"] == facts
    assert last["stage"] == "01-train"
    assert len(heard.events) == 2  # those who follow hear it as well


def test_a_log_that_cannot_be_written_is_one_note_and_no_failure(path):
    path.mkdir()
    heard = Heard()
    with logged(path, heard) as progress:
        progress.note("one")
        progress.note("two")
    assert [note for note in heard.notes if "log" in note] == [heard.notes[1]]
    assert heard.notes[0] == "one"
    assert heard.notes[2] == "two"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_full_disk_is_one_note_and_no_failure():
    from pathlib import Path

    heard = Heard()
    with logged(Path("/dev/full"), heard) as progress:
        progress.event("a")
        progress.event("b")
    assert len(heard.notes) == 1
    assert "No space left" in heard.notes[0]


def test_what_is_said_before_there_is_a_folder_is_kept_for_it(tmp_path):
    folder = tmp_path / "run"
    log = LogFile(folder / "log.jsonl", pytest.fail)
    log.write("one")
    folder.mkdir()
    log.write("two")
    log.close()
    assert (folder / "log.jsonl").read_text() == "one\ntwo\n"


def test_lines_are_json_for_any_reader_whatever_the_facts_are(path):
    with logged(path, Silent()) as progress:
        progress.event("epoch", loss=math.nan, lr=math.inf, path=path, many={"a": (1, -math.inf)}, flag=True)

    def refuse(name):
        pytest.fail(f"{name} is no JSON")

    line = json.loads(path.read_text(), parse_constant=refuse)
    assert line["facts"] == {
        "loss": "nan",
        "lr": "inf",
        "path": str(path),
        "many": {"a": [1, "-inf"]},
        "flag": True,
    }


def test_values_of_secrets_in_the_environment_reach_no_line(path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "correct horse")
    monkeypatch.setenv("DEBUG_TOKEN", "1")
    with logged(path, Silent()) as progress:
        progress.event("run_started", command="compress run x.yaml data.token=hf_abcdefgh seed=1")
        progress.note("https://me:correct horse@host answers")
        progress.event("epoch", nested={"a": ["correct horse", {"b": "hf_abcdefgh"}]})
    text = path.read_text()
    assert "hf_abcdefgh" not in text
    assert "correct horse" not in text
    assert "data.token=*** seed=1" in text  # and a short value blots out nothing


def test_one_line_a_process_of_torchrun_is_silent_but_the_first(path):
    heard = Heard()
    with logged(path, heard, rank=1) as progress:
        progress.note("not heard")
    assert not path.exists()
    assert not heard.notes


def test_people_see_no_events_and_several_see_all():
    file = io.StringIO()
    heard, people = Heard(), RichProgress(Console(file=file, width=80))
    both = Several([people, heard])
    both.event("epoch", loss=1.0)
    assert file.getvalue() == ""
    both.note("seen")
    assert heard.events == [("epoch", {"loss": 1.0})]
    assert heard.notes == ["seen"]
    assert "seen" in file.getvalue()
    with both.steps("work", 1) as advance:
        advance("done")
    assert "work   done" in file.getvalue()
