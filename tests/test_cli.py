"""The command line as a user meets it: real processes, exit codes, one clear line for each mistake."""

import io
import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from test_pipeline import NETWORK, RECIPE

from compress import cli

ROOT = Path(__file__).parents[1]

PHOTOS = """
name: photos
model: {use: "mynet:Net"}
data: {use: folder, path: photos}
preprocess: {size: 16}
stages:
  - {use: train, epochs: 1, batch_size: 8}
  - {use: quantize, epochs: 0}
  - {use: export}
  - {use: verify}
"""


def compress(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "compress.cli", *words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def refused(*words: str, cwd: Path, status: int = 1) -> str:
    """What a refused command says on stderr; it must be short and no traceback."""
    done = compress(*words, cwd=cwd)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    return done.stderr.strip()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "mynet.py").write_text(NETWORK)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "photos.yaml").write_text(PHOTOS)
    for split, count in (("train", 8), ("val", 3)):
        for index, colour in enumerate(("red", "green", "blue")):
            folder = tmp_path / "photos" / split / colour
            folder.mkdir(parents=True)
            for number in range(count):
                pixel = tuple(200 + number if channel == index else 10 * number for channel in range(3))
                Image.new("RGB", (24, 20), pixel).save(folder / f"{number}.png")
    return tmp_path


def test_a_run_on_photographs_from_start_to_report_and_again(place):
    done = compress("run", "photos.yaml", cwd=place)
    assert done.returncode == 0, done.stderr
    assert "runs/photos/report.html" in done.stdout
    assert "int8.onnx" in done.stdout
    report = json.loads((place / "runs/photos/report.json").read_text())
    assert report
    assert (place / "runs/photos/report.md").exists()
    again = compress("run", "photos.yaml", cwd=place)
    assert again.returncode == 0
    assert again.stdout.count("unchanged, taken from the run of") == 5
    assert "train  epoch" not in again.stdout
    (place / "runs/photos/report.html").unlink()
    assert compress("report", "runs/photos", cwd=place).returncode == 0
    assert (place / "runs/photos/report.html").exists()
    models = [f"runs/photos/stages/03-export/{name}" for name in ("parent.onnx", "int8.onnx", "int8.tflite")]
    bench = compress("bench", *models, "--rounds", "1", "--runs", "3", "--json", cwd=place)
    assert bench.returncode == 0, bench.stderr
    assert len(json.loads(bench.stdout)["rows"]) == 3


def test_a_zip_gives_the_same_network_as_its_folder(place):
    with zipfile.ZipFile(place / "photos.zip", "w") as archive:
        for path in sorted((place / "photos").rglob("*.png")):
            archive.write(path, path.relative_to(place / "photos"))
    stage = "stages=[{use: train, epochs: 1, batch_size: 8}]"
    weights = "stages/01-train/network/weights.safetensors"
    for out, data in (("a", "data.path=photos"), ("b", "data.path=photos.zip")):
        assert compress("run", "photos.yaml", data, stage, "--out", out, cwd=place).returncode == 0
    assert (place / "a" / weights).read_bytes() == (place / "b" / weights).read_bytes()


def test_a_truncated_image_is_named_and_nothing_is_started(place):
    path = place / "photos/train/green/3.png"
    path.write_bytes(path.read_bytes()[:-30])
    said = refused("run", "photos.yaml", cwd=place)
    assert "train/green/3.png" in said
    assert len(said.splitlines()) == 1
    assert not (place / "runs/photos/stages").exists() or not list((place / "runs/photos/stages").iterdir())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run", "nowhere.yaml"], "nowhere.yaml"),
        (["run", "photos.yaml", "data.path=elsewhere"], "elsewhere"),
        (["run", "photos.yaml", "model.weights=photos.yaml"], "photos.yaml"),
        (["run", "photos.yaml", "model.weights=none.safetensors"], "none.safetensors"),
        (["run", "photos.yaml", 'model.use="mynet:Nett"'], "did you mean"),
        (["run", "photos.yaml", 'model.use="nonet:Net"'], "nonet"),
        (["check", "photos.yaml", "stages.train.epocs=3"], "did you mean 'epochs'?"),
        (["bench", "none.onnx"], "none.onnx"),
        (["bench", "photos.yaml"], "photos.yaml"),
        (["bench", "empty.onnx", "--target", "raspberrypi"], "ssh://user@host"),
        (["bench", "empty.onnx", "--target", "ssh://-oProxyCommand=x"], "ssh://"),
        (["bench", "empty.onnx", "--target", "ssh://nobody@board.invalid"], "board.invalid"),
        (["bench", "empty.onnx", "--threads", "0"], "--threads"),
        (["clean", "local"], "ssh://"),
        (["clean", "ssh://nobody@board.invalid"], "board.invalid"),
        (["bench", "empty.onnx", "--cores", "first"], "cores"),
        (["bench", "empty.onnx", "--setup"], "--setup"),
        (["bench", "empty.onnx", "--target", "emulated", "--threads", "2"], "one thread"),
        (["bench", "empty.onnx"], "empty.onnx"),
        (["run", "photos.yaml", "target=pi"], "ssh://user@host"),
        (["report", "photos"], "photos"),
    ],
)
def test_mistakes_are_one_line_that_names_them(place, words, expected):
    (place / "empty.onnx").touch()
    said = refused(*words, cwd=place)
    assert expected in said
    assert len(said.splitlines()) == 1


def test_all_mistakes_of_a_recipe_come_at_once_with_their_lines(place):
    (place / "bad.yaml").write_text(RECIPE.replace("epochs: 3", "epocs: 3").replace("macs: 0.5", "macs: 1.5"))
    lines = refused("run", "bad.yaml", cwd=place).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("bad.yaml:7: stages.0.epocs: unknown field")
    assert lines[1].startswith("bad.yaml:8: stages.1.goal.macs:")


@pytest.mark.alone
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_at_once_says_how_to_go_on_and_leaves_no_half(place, number):
    words = ["run", "recipe.yaml", "stages.train.epochs=500", "--out", number.name]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, "-m", "compress.cli", *words],
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert any("train  epoch 2/500" in line for line in process.stdout)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert said.strip() == "stopped; the same command goes on from the last finished epoch"
    assert sorted(path.name for path in (place / number.name / "stages").iterdir()) == ["00-load", "01-train.training"]


def test_a_ctrl_c_that_python_dropped_stops_the_next_step(monkeypatch):
    monkeypatch.setattr(cli.RichProgress, "interrupted", 0)  # and again after the test
    progress = cli.RichProgress(Console(file=io.StringIO()))
    with progress.steps("train", 2) as advance:
        advance("")
        with pytest.raises(KeyboardInterrupt):
            cli._interrupt()  # and nobody heard of it
        with pytest.raises(KeyboardInterrupt):
            advance("")


def test_a_wrong_option_is_told_without_a_traceback(place):
    assert "--speed" in refused("bench", "x.onnx", "--speed", "9", cwd=place, status=2)


def test_check_says_what_would_run_and_runs_nothing(place):
    done = compress("check", "recipe.yaml", cwd=place)
    assert done.returncode == 0
    assert [line.split()[1].rstrip(":") for line in done.stdout.splitlines()[2:9]] == [
        *("train", "prune", "distill", "quantize", "export", "verify", "benchmark"),
    ]
    assert not (place / "runs").exists()


def test_schema_is_json(place):
    assert json.loads(compress("schema", cwd=place).stdout)["title"] == "Recipe for compress"


def test_help_needs_no_heavy_library():
    code = (
        "import sys, compress.cli; sys.exit(any(m in sys.modules for m in ('torch', 'onnx', 'matplotlib', 'sklearn')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
