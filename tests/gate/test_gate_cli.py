"""`compress gate` and `compress compare` as a user or a job calls them: real files, real times, real exit statuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from run_folders import network, rounds, write_run
from test_pipeline import NETWORK, RECIPE

ROOT = Path(__file__).parents[2]
PARENT, INT8 = "parent.onnx", "int8.onnx"
JUDGED = ("gate", "good", "--baseline", "base/baseline.json")
QUICK = ("--measure", "--rounds", "2", "--runs", "20", "--tolerance", "0.8")
"""Two busy cores: an A/A ratio of 1.8 is let through, and what must be seen takes ten times as long."""


def compress(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "compress.cli", *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Runs of a fast network, of the same with wrong answers, of a slow and large one; a baseline of the first."""
    folder = tmp_path_factory.mktemp("gate")
    parent, fast = network(folder / "p.onnx", 4), network(folder / "f.onnx", 2, seed=1)
    slow = network(folder / "s.onnx", 40, seed=1)
    wrong = {INT8: range(10)}
    times = {PARENT: rounds(10, seed=1), INT8: rounds(4, seed=2)}
    for name, file, changes in (
        ("good", fast, {"wrong": wrong}),
        ("bad", fast, {"wrong": {INT8: range(60)}}),
        ("slow", slow, {"wrong": wrong}),
    ):
        write_run(folder / name, {PARENT: parent, INT8: file}, times=times, **changes)
    made = compress("gate", "good", "--write-baseline", "base/baseline.json", cwd=folder)
    assert made.returncode == 0, made.stderr
    return folder


def test_a_run_against_its_own_baseline_is_accepted_and_leaves_summary_and_json(place):
    words = ("gate", "good", "--baseline", "base/baseline.json", "--summary", "s.md", "--json", "s.json")
    done = compress(*words, cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (place / "s.md").read_text().startswith("## ACCEPT")
    assert f"compress {' '.join(words)}" in (place / "s.md").read_text()
    assert json.loads((place / "s.json").read_text())["verdict"] == "ACCEPT"
    assert "ACCEPT: every goal holds" in done.stdout


@pytest.mark.alone
def test_the_same_file_timed_now_in_turns_is_accepted(place):
    goal = ("--goal", "latency:percent-max-degradation=150")
    done = compress("gate", "good", "--baseline", "base/baseline.json", *QUICK, *goal, "--json", "m.json", cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((place / "m.json").read_text())
    assert found["timed"] == "timed now, in turns"
    (outputs,) = (line for line in found["lines"] if line["metric"] == "parity" and line["file"] == INT8)
    assert outputs["facts"]["differing"] == 0


@pytest.mark.alone
def test_a_slowed_file_is_a_regression_when_timed(place):
    only = ("--only", "latency")
    done = compress("gate", "slow", "--baseline", "base/baseline.json", *QUICK, *only, "--json", "l.json", cwd=place)
    assert done.returncode == 3, done.stdout + done.stderr
    (line,) = json.loads((place / "l.json").read_text())["lines"]
    assert line["interval"][0] > 1.05 * line["baseline"]


@pytest.mark.parametrize(
    ("run", "words", "status", "said"),
    [
        ("slow", ["--only", "size"], 3, "REGRESSION: size of int8.onnx"),
        ("bad", ["--only", "accuracy"], 3, "REGRESSION: accuracy of int8.onnx (-25.00 points)"),
        ("good", ["--only", "size", "--goal", "size:percent-min-improvement=30"], 4, "INFEASIBLE: size"),
        ("good", ["--only", "latency", "--goal", "latency:threshold=4"], 5, "NOISY: latency"),
        ("good", ["--only", "parity,size"], 0, "ACCEPT"),
    ],
)
def test_exit_statuses(place, run, words, status, said):
    done = compress("gate", run, "--baseline", "base/baseline.json", *words, cwd=place)
    assert done.returncode == status, done.stdout + done.stderr
    assert done.stdout.strip().splitlines()[-1].startswith(said)


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["gate", "good"], 2, "--baseline"),
        ([*JUDGED, "--write-baseline", "b"], 2, "--baseline"),
        (["gate", "good", "--baseline", "nowhere.json"], 1, "nowhere.json: no such file"),
        (["gate", "nowhere", "--baseline", "base/baseline.json"], 1, "not a run"),
        (["gate", "good", "--baseline", "base/int8.onnx"], 1, "not JSON"),
        ([*JUDGED, "--goal", "size:big=1"], 1, "no type of goal 'big'"),
        ([*JUDGED, "--only", "fps"], 1, "judged with latency"),
        ([*JUDGED, "--measure", "--target", "moon"], 1, "moon"),
        ([*JUDGED, "--measure", "--goal", "speedup:threshold=2"], 1, "times no parent"),
        (["compare", "good", "nowhere"], 1, "nowhere"),
    ],
)
def test_mistakes_are_one_line(place, words, status, said):
    done = compress(*words, cwd=place)
    assert done.returncode == status, done.stdout + done.stderr
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr


def test_compare_prints_a_table_markdown_or_json(place):
    plain = compress("compare", "base/baseline.json", "slow", cwd=place)
    assert plain.returncode == 0, plain.stderr
    assert INT8 in plain.stdout
    text = compress("compare", "base/baseline.json", "slow", "--markdown", cwd=place).stdout
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 4
    assert len({line.count("|") for line in rows}) == 1
    found = json.loads(compress("compare", "base/baseline.json", "slow", "--json", cwd=place).stdout)
    sizes = {entry["file"]: entry["size_bytes"] for entry in found["files"]}
    assert sizes[INT8] == [(place / "f.onnx").stat().st_size, (place / "s.onnx").stat().st_size]


@pytest.mark.slow
def test_a_real_run_is_its_own_baseline_and_a_spoiled_one_is_not(tmp_path):
    (tmp_path / "mynet.py").write_text(NETWORK)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    assert compress("run", "recipe.yaml", "--out", "good", cwd=tmp_path).returncode == 0
    made = compress("gate", "good", "--write-baseline", "base/baseline.json", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    judged = ("--baseline", "base/baseline.json")
    same = compress("gate", "good", *judged, "--summary", "s.md", cwd=tmp_path)
    assert same.returncode == 0, same.stdout + same.stderr
    assert "fps on" in (tmp_path / "s.md").read_text()

    spoil = (
        "stages.prune.goal.macs=0.25",
        "stages.distill.epochs=1",
        "stages.distill.lr=0.0001",
        "stages.quantize.epochs=0",
    )
    assert compress("run", "recipe.yaml", *spoil, "--out", "spoiled", cwd=tmp_path).returncode == 0
    found = compress("gate", "spoiled", *judged, "--only", "accuracy,size,parity", "--json", "g.json", cwd=tmp_path)
    assert found.returncode == 3, found.stdout + found.stderr
    verdicts = {(line["metric"], line["verdict"]) for line in json.loads((tmp_path / "g.json").read_text())["lines"]}
    assert verdicts == {("accuracy", "REGRESSION"), ("size", "ACCEPT"), ("parity", "ACCEPT")}
