"""`compress ls` and `show`, and what `compress run` says to programs: of a real run, and of folders spoiled by hand."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_pipeline import NETWORK

from compress import cli, locks
from compress.cli import listing
from compress.errors import CompressError
from compress.progress import read_log

RECIPE = """
name: small
model: {use: "mynet:Net"}
data: {use: digits}
preprocess: {size: 16, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}
stages:
  - {use: train, epochs: 2}
  - {use: quantize, epochs: 0}
  - {use: export}
"""
STAGES = ["00-load", "01-train", "02-quantize", "03-export"]


def compress(*words: object) -> None:
    cli.app([str(word) for word in words], prog_name="compress", standalone_mode=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with one finished run, which spoke JSON to `said`."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "mynet.py").write_text(NETWORK)
    (folder / "recipe.yaml").write_text(RECIPE)
    script = "import sys; from compress.cli import main; sys.argv[0] = 'compress'; main()"
    command = [sys.executable, "-c", script, "run", "recipe.yaml", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "HF_TOKEN": "hf_not_to_be_shown"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (folder / "said").write_text(done.stdout)
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch) -> Path:
    """A copy of it to spoil."""
    shutil.copytree(made, tmp_path / "user")
    monkeypatch.chdir(tmp_path / "user")
    return tmp_path / "user"


def rows(folder: object = "runs") -> dict[str, listing.Listed]:
    return {Path(row.folder).name: row for row in listing.runs_below(Path(str(folder)))}


def test_the_log_tells_the_whole_run_and_standard_output_is_the_log(place):
    log = list(read_log(place / "runs/small/log.jsonl"))
    said = [json.loads(line) for line in (place / "said").read_text().splitlines()]

    def told_alike(lines: list[dict]) -> list[tuple]:
        """Without what each takes from its own clock."""
        return [
            (
                line["event"],
                line["stage"],
                line["facts"] if line["event"] != "work" else line["facts"] | {"seconds": None},
            )
            for line in lines
        ]

    assert told_alike(said) == told_alike(log)
    events = [line["event"] for line in log if line["event"] not in ("work", "note")]
    stages = ["stage_started", "stage_finished"]
    epochs = ["epoch", "epoch"]
    assert events == [
        *(
            "run_started",
            *stages,
            "stage_started",
            *epochs,
            "stage_finished",
            *stages,
            *stages,
            "run_finished",
            "report",
        )
    ]
    told = {line["stage"]: line["facts"] for line in log if line["event"] == "stage_finished"}
    assert list(told) == STAGES
    for label in STAGES:
        manifest = json.loads((place / "runs/small/stages" / label / "manifest.json").read_text())
        assert told[label].get("accuracy") == (manifest["network"] or {}).get("accuracy")
        assert told[label]["seconds"] == manifest["seconds"]
    assert told["03-export"]["files"] == {
        path.name: path.stat().st_size
        for path in (place / "runs/small/stages/03-export").iterdir()
        if path.suffix in (".onnx", ".tflite")
    }
    history = json.loads((place / "runs/small/stages/01-train/manifest.json").read_text())["metrics"]["history"]
    trained = [line["facts"] for line in log if line["event"] == "epoch"]
    assert [{name: facts[name] for name in history[0]} for facts in trained] == history
    assert all(facts["images_per_second"] == pytest.approx(22 * 64 / facts["seconds"]) for facts in trained)
    assert "hf_not_to_be_shown" not in (place / "runs/small/log.jsonl").read_text() + (place / "said").read_text()


def test_quiet_says_where_the_report_is_and_a_run_that_is_done_adds_its_stages_to_the_log(place, capfd):
    before = (place / "runs/small/log.jsonl").read_text()
    compress("run", "recipe.yaml", "--quiet")
    out, err = capfd.readouterr()
    assert out == "runs/small/report.html\n"
    assert err == ""
    after = (place / "runs/small/log.jsonl").read_text()
    assert after.startswith(before)
    new = [json.loads(line) for line in after[len(before) :].splitlines()]
    assert [line["stage"] for line in new if line["event"] == "stage_resumed"] == STAGES


def test_a_run_as_a_row(place, capsys):
    row = rows()["small"]
    report = json.loads((place / "runs/small/report.json").read_text())
    assert row.state == "finished"
    assert (row.stages_done, row.stages) == (4, 4)
    assert row.parent_score == report["parent"]["accuracy"]
    assert row.headline == report["headline"]["sentence"]
    file = next(file for file in report["files"] if file["file"] == row.file)
    assert row.size_bytes == (place / "runs/small/stages/03-export" / row.file).stat().st_size == file["size_bytes"]
    compress("ls", "--json")
    assert json.loads(capsys.readouterr().out)[0]["name"] == "small"


def test_states_of_runs_that_did_not_end(place):
    def copy(name: str) -> Path:
        shutil.copytree(place / "runs/small", place / "runs" / name)
        return place / "runs" / name

    def change(path: Path, **values: object) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    def log(folder: Path, event: str, **facts: object) -> None:
        with (folder / "log.jsonl").open("a") as file:
            file.write(json.dumps({"event": event, "stage": None, "facts": facts}) + "\n")

    killed, stopped, broken, refused, paused = map(copy, ("killed", "stopped", "broken", "refused", "paused"))
    for folder in (killed, stopped, broken, paused):
        change(folder / "run.json", finished=None, seconds=None, stages=STAGES[:2])
        log(folder, "run_started")
    log(stopped, "signal", name="SIGINT")
    log(broken, "error", text="stage 02-quantize: no room")
    log(paused, "run_paused")
    manifest = refused / "stages/03-export/manifest.json"
    change(manifest, metrics=json.loads(manifest.read_text())["metrics"] | {"verdict": "FAIL", "reason": "too large"})
    (place / "runs/torn").mkdir()
    (place / "runs/torn/run.json").write_text("{")
    shutil.rmtree(copy("gone") / "stages/01-train")
    change(copy("odd") / "run.json", stages=7)
    (copy("half") / "stages/01-train/manifest.json").write_text('{"stage": "train"')
    (copy("pipe") / "run.json").unlink()
    os.mkfifo(place / "runs/pipe/run.json")
    (place / "runs/begun").mkdir()
    (place / "runs/begun/log.jsonl").write_text("")
    (place / "runs/wrong").mkdir()
    log(place / "runs/wrong", "error", text="photos/a.jpg: is no readable image")
    (place / "runs/notes").mkdir()
    found = rows()
    assert {name: row.state for name, row in found.items()} == {
        "small": "finished",
        "killed": "interrupted",
        "stopped": "interrupted",
        "broken": "failed",
        "refused": "failed",
        "paused": "paused",
        "torn": "damaged",
        "gone": "damaged",
        "odd": "damaged",
        "half": "damaged",
        "pipe": "damaged",
        "begun": "interrupted",
        "wrong": "failed",
    }
    assert found["stopped"].reason == "SIGINT"
    assert found["broken"].reason == "stage 02-quantize: no room"
    assert found["wrong"].reason == "photos/a.jpg: is no readable image"
    assert found["refused"].reason == "03-export: too large"
    assert "01-train" in found["gone"].reason
    assert (found["killed"].stages_done, found["killed"].stages) == (2, 4)
    assert all(row.reason for row in found.values() if row.state not in ("finished", "paused"))


def test_a_run_that_somebody_works_on_is_running(place):
    with locks.held(place / "runs/small/lock"):
        row = rows()["small"]
    assert row.state == "running"
    assert str(os.getpid()) in row.reason
    assert rows()["small"].state == "finished"


def test_the_tables_have_every_run_and_reason(place, capsys, monkeypatch):
    (place / "runs/torn").mkdir()
    (place / "runs/torn/run.json").write_text("[]")
    compress("ls")
    said = capsys.readouterr().out
    assert "torn" in said
    assert "damaged: run.json cannot be read" in said
    compress("show", "runs/small")
    said = capsys.readouterr().out
    for label in STAGES:
        assert label in said
    digest = json.loads((place / "runs/small/stages/03-export/manifest.json").read_text())["files"]["int8.onnx"][
        "sha256"
    ]
    assert digest in said
    assert "epochs: 2" in said  # the resolved recipe
    compress("show", "runs/small", "export")
    said = capsys.readouterr().out
    assert digest in said
    assert "01-train" not in said
    compress("show", "runs/small", "--json")
    shown = json.loads(capsys.readouterr().out)
    assert [stage["folder"] for stage in shown["stages"]] == STAGES
    assert shown["recipe"] == (place / "runs/small/recipe.yaml").read_text()


@pytest.mark.parametrize("name", ["01-train", "train", "1", "01"])
def test_a_stage_goes_by_its_folder_its_name_or_its_number(place, name):
    assert listing.stage_of(listing.shown(Path("runs/small")), name)["folder"] == "01-train"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ls", "nowhere"], "nowhere: no such folder"),
        (["show", "mynet.py"], "no run.json in it"),
        (["show", "runs/small", "trian"], "no finished stage of the run; did you mean '01-train'"),
        (["show", "runs/small", "9"], "there are 00-load, 01-train, 02-quantize, 03-export"),
    ],
)
def test_mistakes_are_one_line(place, words, said):
    with pytest.raises(CompressError, match=said) as caught:
        compress(*words)
    assert len(str(caught.value).splitlines()) == 1


def test_a_manifest_without_its_date_is_one_line(place):
    manifest = place / "runs/small/stages/01-train/manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "finished": None}))
    for words in (["show", "runs/small"], ["show", "runs/small", "train"]):
        with pytest.raises(CompressError, match=r"runs/small: does not say what it should \(.*; run its recipe again"):
            compress(*words)


@pytest.mark.slow
def test_ctrl_c_is_the_last_line_of_the_log_and_ls_says_so(place):
    command = [sys.executable, "-m", "compress.cli", "run", "recipe.yaml", "stages.train.epochs=500", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [*command, "--out", "runs/cut"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert any(json.loads(line)["event"] == "epoch" for line in process.stdout)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    last = list(read_log(place / "runs/cut/log.jsonl"))[-1]
    assert (last["event"], last["level"], last["stage"]) == ("signal", "warning", "01-train")
    assert last["facts"] == {"name": "SIGINT"}
    assert (rows()["cut"].state, rows()["cut"].reason) == ("interrupted", "SIGINT")
