"""Real runs killed at random points end as a run that was never stopped."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_pipeline import NETWORK, RECIPE

ROOT = Path(__file__).parents[1]
KILLS = 20
CLOCKS = ("seconds", "finished", "started", "resumed", "size_bytes", "sha256")
"""What differs between two runs that computed the same: times, and with them hashes of reports on times."""


def start(folder: Path, out: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "compress.cli", "run", "recipe.yaml", "--out", out]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def hashes(run: Path) -> dict[str, str]:
    """Of the weights and the exported files, by their places."""
    paths = [path for path in run.rglob("*") if path.suffix in (".safetensors", ".onnx", ".tflite")]
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def figures(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: figures(inner) for key, inner in value.items() if key not in CLOCKS}
    return [figures(inner) for inner in value] if isinstance(value, list) else value


def metrics(run: Path) -> dict[str, Any]:
    found = {path.parent.name: json.loads(path.read_text()) for path in run.glob("stages/*/manifest.json")}
    return {name: figures([facts["metrics"], facts["network"]]) for name, facts in found.items()}


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_as_one_that_was_not(tmp_path: Path) -> None:
    (tmp_path / "mynet.py").write_text(NETWORK)
    recipe = RECIPE[: RECIPE.index("  - {use: benchmark")]
    recipe = recipe.replace("epochs: 3,", "epochs: 12, ema: 0.9,").replace("epochs: 2,", "epochs: 8,")
    (tmp_path / "recipe.yaml").write_text(recipe.replace("{use: quantize, epochs: 1}", "{use: quantize, epochs: 5}"))
    began = time.perf_counter()
    with start(tmp_path, "whole") as process:
        said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    whole_s = time.perf_counter() - began
    drawn = random.Random(0)
    kills = 0
    for _ in range(10 * KILLS):
        with start(tmp_path, "killed") as process:
            try:
                process.wait(timeout=drawn.uniform(0.15, 0.45) * whole_s if kills < KILLS else 600)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                kills += 1
                continue
            assert process.stdout is not None
            said = process.stdout.read()
        assert process.returncode == 0, said
        if kills >= KILLS:
            break
        # It got to its end between two kills: what was finished is taken away, and it goes on being killed.
        last = sorted((tmp_path / "killed/stages").iterdir())[drawn.randrange(1, 6)]
        (last / "manifest.json").unlink()
    assert kills == KILLS
    assert len(hashes(tmp_path / "whole")) >= 8
    assert hashes(tmp_path / "killed") == hashes(tmp_path / "whole")
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    stages = tmp_path / "killed/stages"
    assert sorted(path.name for path in stages.iterdir()) == sorted(
        path.name for path in (tmp_path / "whole/stages").iterdir()
    ), "nothing half is left"
