"""What a sweep does with workers that end, fail and die, on an engine that does as it is told."""

import json
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from compress.errors import CompressError
from compress.locks import held
from compress.progress import RichProgress
from compress.sweep import sweep as sweeps
from compress.sweep.cell import Ended, Task, _Told
from compress.sweep.display import ended, lines
from compress.sweep.matrix import cells
from compress.sweep.sweep import RETRIES, Asked, Watched, run_sweep, shares

RECIPE = """
name: small
model: {use: mobilenet_v2}
data: {use: digits}
stages:
  - {use: train, epochs: 3}
  - {use: prune, goal: {macs: 0.5}}
  - {use: export}
  - {use: benchmark}
"""


@dataclass
class Told:
    """An engine that ends tasks as a script says, one after the other, last begun first."""

    script: dict[str, list[object]] = field(default_factory=dict)
    """By cell and whether it is timed: what its tasks come to; an Ended, None for a lost worker, or an exception."""
    workers: int = 2
    threads: int = 1
    name: str = "told"
    version: str = "0"
    running: list[Task] = field(default_factory=list)
    begun: list[tuple[str, int | None]] = field(default_factory=list)
    together: list[set[str]] = field(default_factory=list)
    stopped: int = 0

    def has_room(self) -> bool:
        return len(self.running) < self.workers

    def submit(self, task: Task) -> None:
        assert self.has_room()
        self.running.append(task)
        self.begun.append((task.cell, task.until))
        self.together.append({one.cell for one in self.running})
        if task.alone:
            assert len(self.running) == 1

    def ended(self, timeout_s: float) -> list[tuple[Task, Ended | None]]:
        task = self.running.pop()
        left = self.script.get(task.cell, [])
        result = left.pop(0) if left else Ended()
        if isinstance(result, BaseException):
            raise result
        return [(task, result)]

    def stop(self) -> None:
        self.stopped += 1
        self.running.clear()


@pytest.fixture
def asked(tmp_path: Path) -> Asked:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    matrix = cells(tmp_path / "recipe.yaml", ["stages.prune.goal.macs=0.25,0.5,0.75"])
    return Asked(tmp_path / "recipe.yaml", matrix, tmp_path / "sweep", "compress sweep", tmp_path)


def go(asked: Asked, engine: Told, monkeypatch: pytest.MonkeyPatch, show=lambda watched: None):
    monkeypatch.setattr(sweeps, "opened", lambda *_: engine)
    return run_sweep(asked, show)


def written(asked: Asked) -> dict:
    return json.loads((asked.folder / "sweep.json").read_text())


def test_what_is_shared_comes_first_what_is_timed_last_and_alone(asked, monkeypatch):
    engine = Told()
    swept = go(asked, engine, monkeypatch)
    assert engine.begun == [
        ("macs=0.25", 1),
        ("macs=0.25", 3),
        ("macs=0.5", 3),
        ("macs=0.75", 3),
        ("macs=0.25", None),
        ("macs=0.5", None),
        ("macs=0.75", None),
    ]
    assert {"macs=0.25", "macs=0.5"} in engine.together, "workers work at the same time"
    assert not swept.failed
    assert engine.stopped == 1


def test_a_cell_that_fails_is_recorded_and_the_others_go_on(asked, monkeypatch):
    line = "stage 02-prune: no channel can be spared"
    engine = Told({"macs=0.5": [Ended(line)]})
    swept = go(asked, engine, monkeypatch)
    assert [(result.cell.name, result.error) for result in swept.failed] == [("macs=0.5", line)]
    assert ("macs=0.5", None) not in engine.begun, "what failed is not timed"
    assert [cell["status"] for cell in written(asked)["cells"]] == ["finished", "failed", "finished"]


def test_what_is_shared_and_fails_fails_all_that_begin_with_it(asked, monkeypatch):
    engine = Told({"macs=0.25": [Ended("stage 01-train: the loss is nan")]})
    swept = go(asked, engine, monkeypatch)
    assert engine.begun == [("macs=0.25", 1)]
    errors = [result.error for result in swept.failed]
    assert errors[0] == "stage 01-train: the loss is nan"
    assert set(errors[1:]) == {"it begins with what macs=0.25 failed in"}


def test_a_lost_worker_is_replaced_and_a_cell_that_loses_too_many_fails(asked, monkeypatch):
    engine = Told({"macs=0.5": [None] * RETRIES, "macs=0.75": [None] * (RETRIES + 1)})
    swept = go(asked, engine, monkeypatch)
    assert engine.begun.count(("macs=0.5", 3)) == RETRIES + 1
    assert [result.cell.name for result in swept.failed] == ["macs=0.75"]
    assert "its worker was killed, 3 times by now" in swept.failed[0].error
    assert len(written(asked)["notes"]) == 2 * RETRIES


def test_an_interrupted_sweep_stops_its_workers_and_says_what_is_not_finished(asked, monkeypatch):
    engine = Told({"macs=0.5": [Ended(), KeyboardInterrupt()]})
    with pytest.raises(KeyboardInterrupt):
        go(asked, engine, monkeypatch)
    assert engine.stopped == 1
    assert [cell["status"] for cell in written(asked)["cells"]] == ["finished", "not finished", "not finished"]
    swept = go(asked, Told(), monkeypatch)
    assert not swept.failed
    assert [cell["status"] for cell in written(asked)["cells"]] == ["finished"] * 3


def test_two_sweeps_do_not_work_in_one_folder(asked, monkeypatch):
    asked.folder.mkdir()
    with held(asked.folder / sweeps.LOCK), pytest.raises(CompressError, match=r"in use by process \d+"):
        go(asked, Told(), monkeypatch)


def test_a_folder_that_cannot_be_made(asked, monkeypatch):
    asked.folder.write_text("")
    with pytest.raises(CompressError, match="cannot be made"):
        go(asked, Told(), monkeypatch)


def test_the_task_runs_the_cells_own_recipe_and_says_how_to_run_it_alone(asked, monkeypatch):
    tasks = []
    engine = Told()
    monkeypatch.setattr(engine, "submit", lambda task, submit=engine.submit: (tasks.append(task), submit(task)))
    go(asked, engine, monkeypatch)
    last = tasks[-1]
    assert last.command.startswith("compress run ")
    assert "stages.prune.goal.macs=0.75" in last.command
    assert type(asked.cells[2].recipe).model_validate_json(last.recipe) == asked.cells[2].recipe


def test_secrets_of_the_environment_are_in_nothing_that_it_writes(asked, monkeypatch):
    secret = "Zq9-'hunter' secret|value"
    monkeypatch.setenv("HF_TOKEN", secret)
    first = replace(asked.cells[0], overrides=(f"model.args.token={secret}",), values=(("model.args.token", secret),))
    asked = replace(asked, command=f"compress sweep {secret}", cells=[first, *asked.cells[1:]])
    told, tasks = Told({first.name: [Ended(f"no access with {secret}")]}), []
    monkeypatch.setattr(told, "submit", lambda task: (tasks.append(task), Told.submit(told, task)))
    go(asked, told, monkeypatch)
    written = [asked.folder / f"sweep.{kind}" for kind in ("json", "md", "html")]
    for text in [path.read_text() for path in written] + [task.command for task in tasks]:
        assert "hunter" not in text
    assert all("***" in path.read_text() for path in written)


def test_secrets_are_not_in_the_log_of_a_worker(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "Zq9-very-secret-value")
    out = StringIO()
    told = _Told(RichProgress(Console(file=out)), lambda words: None)
    told.note("downloading with Zq9-very-secret-value")
    with told.steps("Zq9-very-secret-value", 1) as advance:
        advance("by Zq9-very-secret-value")
    assert out.getvalue().count("***") == 3
    assert "secret" not in out.getvalue()


def test_workers_and_their_threads_are_no_more_than_the_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    for wanted, count in ((None, 100), (3, 100), (100, 5), (1, 1), (None, 3)):
        workers, threads = shares(wanted, count)
        assert 1 <= workers <= count
        assert workers * threads <= 8
    assert shares(3, 100) == (3, 2)
    assert shares(100, 20) == (20, 1), "more workers than cores where they were asked for"


def test_what_is_shown():
    watched = Watched(4, 2, ["a"], {"b": "stage 01-train: no"})
    watched.working = {"c": {"doing": "train  epoch 1/3", "done": 5, "total": 10, "said": "loss 0.3"}}
    shown = lines(watched)
    assert shown[0].endswith("2 of 4 runs, 1 failed")
    assert "train  epoch 1/3" in shown[1]
    assert shown[1].endswith("loss 0.3")
    assert shown[2].strip() == "idle"
    assert ended(watched) == ["a   finished", "b   failed: stage 01-train: no"]


def test_an_engine_that_does_not_exist(asked):
    with pytest.raises(CompressError, match="no such engine"):
        sweeps.opened("dask", 1, 1, None)
    with pytest.raises(CompressError, match="belongs to Ray"):
        sweeps.opened("joblib", 1, 1, "auto")
