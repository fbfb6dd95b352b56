"""The workflow and its scripts: what a job runs exists, is sound shell, and does here what it will do there."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ruamel.yaml import YAML
from run_folders import network, write_run

from compress.gate import make_baseline
from compress.gate.check import main
from compress.progress import Silent

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
SCRIPTS = [path for path in sorted((ROOT / ".ci").iterdir()) if path.is_file()]
BASELINE = ROOT / "benchmarks/baseline/baseline.json"


def steps(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    workflow = YAML(typ="safe").load(path)
    for name, job in workflow["jobs"].items():
        for step in job["steps"]:
            yield name, step


def test_there_is_a_job_on_arm_and_one_on_x86_with_few_rights():
    (path,) = WORKFLOWS
    workflow = YAML(typ="safe").load(path)
    assert {job["runs-on"] for job in workflow["jobs"].values()} == {"ubuntu-24.04", "ubuntu-24.04-arm"}
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["cancel-in-progress"] is True
    assert all("permissions" not in job and job["timeout-minutes"] <= 120 for job in workflow["jobs"].values())


def test_actions_are_pinned_to_commits():
    used = [step["uses"] for path in WORKFLOWS for _, step in steps(path) if "uses" in step]
    assert used
    assert all(re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", name) for name in used)


def test_every_command_of_a_job_is_a_script_of_the_repository_whose_files_exist():
    commands = [step["run"] for path in WORKFLOWS for _, step in steps(path) if "run" in step]
    assert commands
    for command in commands:
        script, *words = command.split()
        assert (ROOT / script) in SCRIPTS
        for word in words:
            if word.startswith(("recipes/", "benchmarks/")):
                assert (ROOT / word).is_file()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_stop_at_the_first_error_and_may_be_run(script):
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", script]).returncode == 0


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_scripts_are_shellcheck_clean():
    done = subprocess.run(["shellcheck", *SCRIPTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """A `compress` whose `run` takes a made run's folder as the recipe; the rest is the real one.

    With RESTLESS its `gate` ends as on a machine whose times cannot be judged.
    """
    script = tmp_path / "compress"
    script.write_text(
        f'#!/usr/bin/env bash\nset -e\nif [ "$1" = run ]; then mkdir -p "$(dirname "$4")"; cp -r "$2" "$4"; exit; fi\n'
        f'export PYTHONPATH="{ROOT}"\n'
        f'if [ "$1$RESTLESS" = gate1 ]; then "{sys.executable}" -m compress.cli "$@" || true; exit 5; fi\n'
        f'exec "{sys.executable}" -m compress.cli "$@"\n'
    )
    script.chmod(0o755)
    return script


def measure(
    stand_in: Path, run: Path, baseline: Path, out: Path, *words: str, restless: str = ""
) -> subprocess.CompletedProcess[str]:
    own = {
        "RESTLESS": restless,
        "COMPRESS": str(stand_in),
        "GITHUB_STEP_SUMMARY": str(out.with_name("job.md")),
        "OMP_NUM_THREADS": "1",
    }
    environment = {**os.environ, **own}
    command = [ROOT / ".ci/measure", run, baseline, out, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.alone
def test_measure_judges_and_writes_the_jobs_summary_and_artifacts(tmp_path, stand_in):
    fast, slow = network(tmp_path / "f.onnx", 2), network(tmp_path / "s.onnx", 30)
    baseline = tmp_path / "base/baseline.json"
    good = write_run(tmp_path / "good", {"int8.onnx": fast})
    make_baseline(good, baseline)
    words = ("--rounds", "2", "--runs", "20", "--tolerance", "0.8", "--goal", "latency:percent-max-degradation=150")
    done = measure(stand_in, good, baseline, tmp_path / "out", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "job.md").read_text() == (tmp_path / "out/summary.md").read_text()
    assert (tmp_path / "job.md").read_text().startswith("## ACCEPT")
    assert json.loads((tmp_path / "out/gate.json").read_text())["verdict"] == "ACCEPT"
    assert "int8.onnx" in (tmp_path / "out/compare.md").read_text()

    done = measure(stand_in, write_run(tmp_path / "slow", {"int8.onnx": slow}), baseline, tmp_path / "out2", *words)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "## REGRESSION: size of int8.onnx" in (tmp_path / "job.md").read_text()

    done = measure(stand_in, good, baseline, tmp_path / "out3", *words, restless="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "::warning::NOISY" in done.stdout

    done = measure(
        stand_in, write_run(tmp_path / "other", {"int8.onnx": fast}, fingerprint="0"), baseline, tmp_path / "o4"
    )
    assert done.returncode == 1
    assert "## ERROR" in (tmp_path / "job.md").read_text()


def test_check_files_knows_its_own_machine_and_notices_other_outputs(tmp_path, capsys):
    baseline = tmp_path / "base/baseline.json"
    made = make_baseline(write_run(tmp_path / "run", {"int8.onnx": network(tmp_path / "f.onnx", 2)}), baseline)
    assert main([str(baseline), str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out/check.json").read_text())["lines"][0]["facts"]["differing"] == 0
    assert (tmp_path / "out/check.md").read_text().startswith("## ACCEPT")

    value = json.loads(baseline.read_text())
    outputs = made.files["int8.onnx"].outputs_NK + np.float32(1)
    value["files"]["int8.onnx"]["outputs"] |= {"data": base64.b64encode(outputs.tobytes()).decode()}
    baseline.write_text(json.dumps(value))
    assert main([str(baseline), str(tmp_path / "out")]) == 3
    assert (tmp_path / "out/check.md").read_text().startswith("## REGRESSION")
    assert main([str(tmp_path / "none.json"), str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.strip().endswith("compress gate RUN --write-baseline FILE")
    assert main([]) == 2


def test_the_committed_files_compute_here_what_was_recorded(tmp_path):
    assert check(tmp_path / "out", sys.executable, os.environ).returncode == 0
    found = json.loads((tmp_path / "out/check.json").read_text())
    assert [(line["file"], line["verdict"]) for line in found["lines"]] == [
        ("int8.onnx", "ACCEPT"),
        ("int8.tflite", "ACCEPT"),
    ]


@pytest.mark.parametrize("cpu", ["cortex-a72"])
def test_the_committed_files_compute_on_arm_what_was_recorded_bit_for_bit(tmp_path, cpu):
    """The job's script in the aarch64 userland, with ARM's kernels."""
    from compress.targets.emulated.userland import ready

    userland = ready(Silent())
    python = tmp_path / "python3"
    userland.write_python3(python, cpu)
    done = check(tmp_path / "out", str(python), userland.environment)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out/check.json").read_text())
    assert found["machine"]["arch"] == "aarch64"
    assert "Cortex-A72" in found["machine"]["cpu"]
    assert [line["facts"]["differing"] for line in found["lines"]] == [0, 0]
    assert json.loads((tmp_path / "out/probe.json").read_text())["is_arm"] is True


def check(out: Path, python: str, environment: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / ".ci/check-files", BASELINE, out],
        env={**os.environ, **environment, "PYTHON": python, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
