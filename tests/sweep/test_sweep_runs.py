"""Real sweeps: what they compute, and what is left of them when workers are killed and when they are stopped."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_pipeline import NETWORK

ROOT = Path(__file__).parents[2]

RECIPE = """
name: small
model: {use: "mynet:Net"}
data: {use: digits}
preprocess: {size: 16, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}
stages:
  - {use: train, epochs: 6, lr: 0.05}
  - {use: prune, goal: {macs: 0.5}}
  - {use: distill, epochs: 4, lr: 0.02}
  - {use: quantize, epochs: 1}
  - {use: export}
  - {use: verify}
"""
VALUES = ("0.3", "0.6")
ENGINES = [pytest.param("joblib", marks=pytest.mark.slow), pytest.param("ray", marks=pytest.mark.extras)]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "mynet.py").write_text(NETWORK)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


@contextlib.contextmanager
def compress(place: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """The command at work; it and whatever it started is gone at the end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    process = subprocess.Popen(
        [sys.executable, "-m", "compress.cli", *words],
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def ran(place: Path, *words: str, status: int = 0) -> str:
    with compress(place, *words) as process:
        said, _ = process.communicate(timeout=900)
    assert process.returncode == status, said
    return said


def sweep_words(engine: str) -> list[str]:
    return ["sweep", "recipe.yaml", "-p", f"stages.prune.goal.macs={','.join(VALUES)}", "--engine", engine]


def made(run: Path) -> dict[str, str]:
    """Hashes of networks and files of a run, by their places."""
    found = {
        path.relative_to(run).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in run.rglob("*")
        if path.suffix in (".safetensors", ".onnx", ".tflite")
    }
    assert len(found) >= 9
    return found


def alone(place: Path, value: str) -> dict[str, str]:
    out = f"alone-{value}"
    ran(place, "run", "recipe.yaml", f"stages.prune.goal.macs={value}", "--out", out)
    return made(place / out)


def events(place: Path, kind: str) -> list[dict]:
    """What the logs of all cells say of that kind."""
    lines = [line for log in place.glob("sweeps/small/*/log.jsonl") for line in log.read_text().splitlines()]
    assert lines
    return [event for event in map(json.loads, lines) if event.get("event") == kind]


def wait_for(found: Callable[[], object], process: subprocess.Popen[str], seconds: float = 240) -> object:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert process.poll() is None, process.stdout and process.stdout.read()
        if value := found():
            return value
        time.sleep(0.02)
    raise AssertionError("it did not come to that")


def at_work(place: Path, doing: str) -> list[tuple[int, str]]:
    """(process, what it does) of the workers whose last word begins like this pattern."""
    found = []
    for path in place.glob("sweeps/small/working/*.json"):
        with contextlib.suppress(OSError, ValueError):
            word = json.loads(path.read_text())
            if re.match(doing, word["doing"].strip()):
                found.append((word["pid"], word["doing"]))
    return found


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("engine", ENGINES)
def test_a_sweep_makes_what_single_runs_make_and_survives_a_killed_worker(place, engine):
    with compress(place, *sweep_words(engine), "--workers", "2") as process:
        # In the training that both cells share, and again where they have parted.
        killed = []
        for doing in ("train  epoch [2-6]/6", "distill  epoch [2-4]/4"):
            pid = wait_for(lambda doing=doing: [pid for pid, _ in at_work(place, doing) if pid not in killed], process)[
                0
            ]
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
        said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said
    facts = json.loads((place / "sweeps/small/sweep.json").read_text())
    assert [cell["status"] for cell in facts["cells"]] == ["finished", "finished"]
    assert len([note for note in facts["notes"] if "its worker was killed in " in note]) == 2
    logs = "".join(path.read_text() for path in place.glob("sweeps/small/*/log.txt"))
    assert re.search("train: goes on after epoch [1-5]", logs)
    assert re.search("distill: goes on after epoch [1-3]", logs)
    for value in VALUES:
        assert made(place / f"sweeps/small/macs={value}") == alone(place, value)
    trained = [event for event in events(place, "stage_finished") if event["stage"] == "01-train"]
    assert len(trained) == 1, "one cell trains what both begin with"
    # The folder of a cell is a run's folder: the command goes on there and finds nothing to do.
    folder = f"sweeps/small/macs={VALUES[0]}"
    again = ran(place, "run", "recipe.yaml", f"stages.prune.goal.macs={VALUES[0]}", "--out", folder)
    assert again.count("unchanged, taken from the run of") == 7
    assert folder in json.loads((place / folder / "run.json").read_text())["command"]


@pytest.mark.parametrize("engine", ENGINES)
def test_ctrl_c_stops_all_workers_within_seconds_and_the_same_command_goes_on(place, engine):
    with compress(place, *sweep_words(engine), "--workers", "2") as process:
        wait_for(lambda: len(at_work(place, "distill  epoch 3/4")) + len(at_work(place, "distill  epoch 2/4")), process)
        workers = [pid for pid, _ in at_work(place, "")]
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
        took_s = time.monotonic() - began
        assert process.returncode == 130, said
        assert "the same command goes on" in said
        assert took_s < 15
        while any(map(is_running, workers)) and time.monotonic() < began + 40:
            time.sleep(0.1)  # Ray ends its own after the command, in its time
        assert not [pid for pid in workers if is_running(pid)]
    facts = json.loads((place / "sweeps/small/sweep.json").read_text())
    assert {cell["status"] for cell in facts["cells"]} <= {"finished", "not finished"}
    assert not list(place.glob("sweeps/small/*/stages/*.partial"))
    ran(place, *sweep_words(engine), "--workers", "2")
    assert len([event for event in events(place, "stage_finished") if event["stage"] == "01-train"]) == 1
    assert any("goes on after epoch" in path.read_text() for path in place.glob("sweeps/small/*/log.txt"))


@pytest.mark.slow
def test_a_cell_that_cannot_be_trained_is_named_at_the_end_and_what_is_timed_is_timed_alone(place):
    timed = "  - {use: benchmark, rounds: 1, runs: 5, warmup_s: 0.0, tolerance: 10.0}\n"
    short = (
        RECIPE.replace("epochs: 6", "epochs: 1")
        .replace("epochs: 4", "epochs: 1")
        .replace("{use: verify}\n", "{use: verify}\n" + timed)
    )
    (place / "recipe.yaml").write_text(short)
    words = ["sweep", "recipe.yaml", "-p", "stages.distill.lr=0.01,1e30,0.02", "stages.distill.clip_norm=null"]
    said = ran(place, *words, "--engine", "joblib", "--workers", "2", status=1)
    last = said.strip().splitlines()[-1]
    assert "1 of 3 runs failed" in last
    assert "failed: lr=1e-30" not in said
    assert any(line.startswith("failed: lr=1e30: stage 03-distill: the loss is") for line in said.splitlines())
    facts = json.loads((place / "sweeps/small/sweep.json").read_text())
    assert [cell["status"] for cell in facts["cells"]] == ["finished", "failed", "finished"]
    for cell in facts["cells"]:
        assert (cell["latency_ms"] is not None) == (cell["status"] == "finished")
        assert (cell["size_bytes"] is not None) == (cell["status"] == "finished")
    finished = {(event["stage"], event["time"]) for event in events(place, "stage_finished")}
    last_computed = max(when for stage, when in finished if "benchmark" not in stage)
    first_timed = min(event["time"] for event in events(place, "stage_started") if "benchmark" in event["stage"])
    assert first_timed >= last_computed
    assert (place / "sweeps/small/sweep.html").stat().st_size > 5000
