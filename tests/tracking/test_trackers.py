"""Trackers hear a run and cannot harm it; what they keep is read back with the services' own readers."""

import json
import sys
from pathlib import Path

import pytest

from compress import tracking
from compress.errors import CompressError
from compress.progress import Silent
from compress.tracking import TrackerName, figures, following, series

RECIPE = {"name": "small", "seed": 0, "model": {"args": {}}, "stages": [{"use": "train", "epochs": 2, "only": []}]}


class Heard(Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


class Broken:
    def __init__(self):
        self.asked = 0

    def event(self, kind, facts):
        self.asked += 1
        raise OSError("the server\nis gone")

    def close(self, error):
        self.asked += 1


def a_run(progress, *, epochs=(1, 2), final=0.75, error=None):
    """What the pipeline tells of a training and its end, and what ends it early."""
    progress.event(
        "run_started", name="small", command="run data.token=hf_abcdefgh", recipe_hash="h", device="cpu", cpu="x"
    )
    progress.event("stage_started", stage="01-train", key="k")
    for epoch in epochs:
        told = {"loss": 1 / epoch, "lr": 0.1, "seconds": 0.5, "images_per_second": 100.0, "training": "train"}
        progress.event("epoch", stage="01-train", epoch=epoch, **told)
    progress.event("stage_finished", stage="01-train", accuracy=final, params=10, macs=100, seconds=1.0)
    progress.event("stage_finished", stage="02-export", seconds=1.0, files={"int8.onnx": 900}, verdict="PASS")
    if error is not None:
        raise error


def test_a_tracker_that_fails_is_one_note_and_no_failure(tmp_path, monkeypatch):
    broken, heard = Broken(), Heard()
    module = type(sys)("compress.tracking.tensorboard")
    module.open_tracker = lambda folder, name, recipe: broken
    monkeypatch.setitem(sys.modules, "compress.tracking.tensorboard", module)
    with following([TrackerName.TENSORBOARD], tmp_path, "small", RECIPE, heard) as progress:
        a_run(progress)
    assert heard.notes == ["tensorboard failed (OSError: the server is gone); the run goes on without it"]
    assert broken.asked == 1


def test_a_tracker_that_cannot_be_opened_is_one_note_and_no_failure(tmp_path, monkeypatch):
    def refuse(folder, name, recipe):
        raise ConnectionError("no route")

    module = type(sys)("compress.tracking.mlflow")
    module.open_tracker = refuse
    monkeypatch.setitem(sys.modules, "compress.tracking.mlflow", module)
    heard = Heard()
    with following([TrackerName.MLFLOW], tmp_path, "small", RECIPE, heard) as progress:
        a_run(progress)
    assert heard.notes == ["mlflow failed (ConnectionError: no route); the run goes on without it"]


@pytest.mark.parametrize("name", list(TrackerName))
def test_a_missing_package_is_told_with_the_line_that_installs_it(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, str(name), None)
    said = rf"--track {name}: .*; pip install 'compress\[{name}\]'"
    with pytest.raises(CompressError, match=said), following([name], tmp_path / "run", "small", RECIPE, Silent()):
        pytest.fail("the run began")
    assert not (tmp_path / "run").exists()


def test_every_name_is_a_file_with_a_tracker():
    folder = Path(tracking.__file__).parent
    assert {path.stem for path in folder.glob("*.py")} == {"__init__", *TrackerName}


def test_secrets_reach_no_tracker(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    got = []

    class Kept:
        def event(self, kind, facts):
            got.append(facts)

        def close(self, error):
            got.append(error)

    def opened(folder, name, recipe):
        got.append(recipe)
        return Kept()

    module = type(sys)("compress.tracking.mlflow")
    module.open_tracker = opened
    monkeypatch.setitem(sys.modules, "compress.tracking.mlflow", module)
    recipe = RECIPE | {"data": {"token": "hf_abcdefgh"}}
    with pytest.raises(ValueError, match="hf_"), following(["mlflow"], tmp_path, "small", recipe, Silent()) as progress:
        a_run(progress, error=ValueError("hf_abcdefgh is refused"))
    assert len(got) == 8
    assert "abcdefgh" not in json.dumps(got)


def test_figures_have_places_that_keep_trainings_and_controls_apart():
    assert series({"stage": "01-train", "training": "train"}) == "01-train"
    assert series({"stage": "03-distill", "training": "assistant 1"}) == "03-distill/assistant 1"
    assert series({"stage": "03-train", "training": "train", "of": "control"}) == "control/03-train"
    assert figures({"loss": 1, "lr": "nan", "other": 2}, ("lr", "loss")) == {"loss": 1.0}


@pytest.mark.extras
def test_tensorboard_reads_the_curves_of_a_run_that_went_on(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for epochs in ((1, 2), (3,)):
        with following([TrackerName.TENSORBOARD], tmp_path, "small", RECIPE, Silent()) as progress:
            a_run(progress, epochs=epochs)
    files = EventAccumulator(str(tmp_path / "tensorboard"))
    files.Reload()
    losses = files.Scalars("01-train/loss")
    assert [(event.step, event.value) for event in losses] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert {event.step: event.value for event in files.Scalars("stages/accuracy")} == {1: 0.75}
    assert files.Scalars("02-export/size_bytes/int8.onnx")[0].value == 900


@pytest.fixture
def client(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    return mlflow.MlflowClient()


def only_run(client):
    (run,) = client.search_runs([client.get_experiment_by_name("compress").experiment_id])
    return run


@pytest.mark.extras
@pytest.mark.filterwarnings("default")
def test_mlflow_has_parameters_curves_figures_and_files_and_goes_on_with_the_same_run(tmp_path, client):
    folder = tmp_path / "run"
    with (
        pytest.raises(KeyboardInterrupt),
        following([TrackerName.MLFLOW], folder, "small", RECIPE, Silent()) as progress,
    ):
        a_run(progress, error=KeyboardInterrupt())
    stopped = only_run(client)
    assert stopped.info.status == "KILLED"
    assert stopped.info.run_name == "small"
    assert stopped.data.tags["ended by"] == "stopped"
    assert stopped.data.params["stages.0.use"] == "train"
    assert stopped.data.params["stages.0.epochs"] == "2"

    (folder / "report.html").write_text("<p>report</p>")
    (folder / "stages/02-export").mkdir(parents=True)
    (folder / "stages/02-export/int8.onnx").write_bytes(b"network")
    file = {"file": "int8.onnx", "runtime": "onnxruntime", "accuracy": 0.7, "size_bytes": 7, "timing": None}
    (folder / "report.json").write_text(json.dumps({"files": [file | {"pair": {"speedup": 2.0}}]}))
    with following([TrackerName.MLFLOW], folder, "small", RECIPE, Silent()) as progress:
        a_run(progress, epochs=(3,), final=0.8)
        progress.event("report", path="report.html")
    run = only_run(client)
    assert run.info.run_id == stopped.info.run_id
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "01-train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert run.data.metrics["01-train/accuracy"] == 0.8
    assert run.data.metrics["final/int8.onnx/onnxruntime/speedup"] == 2.0
    assert run.data.tags["02-export/verdict"] == "PASS"
    named = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert {"report.html", "report.json", "files"} <= named
    local = client.download_artifacts(run.info.run_id, "files/int8.onnx", str(tmp_path))
    assert Path(local).read_bytes() == b"network"


@pytest.mark.extras
@pytest.mark.filterwarnings("default")
def test_another_recipe_is_another_run_of_mlflow(tmp_path, client):
    for seed in (0, 1):
        with following([TrackerName.MLFLOW], tmp_path / "run", "small", RECIPE | {"seed": seed}, Silent()) as progress:
            a_run(progress)
    runs = client.search_runs([client.get_experiment_by_name("compress").experiment_id])
    assert sorted(run.data.params["seed"] for run in runs) == ["0", "1"]
    assert "password" not in (tmp_path / "run/mlflow.json").read_text()
