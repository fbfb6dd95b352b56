"""Training by several processes, started by torchrun over gloo on this machine.

What one process computes is what several compute: exactly, up to the order of float sums, where a network has no
BatchNorm; and within the noise of seeds where it has, because each process normalises by its own part of the batch.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_pipeline import NETWORK

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow

RECIPE = """
name: small
model: {use: "mynet:Net"}
data: {use: digits}
preprocess: {size: 16, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}
stages:
  - {use: train, epochs: EPOCHS, lr: 0.05, ema: 0.9}
"""
PLAIN = NETWORK.replace("nn.BatchNorm2d(16), ", "").replace("nn.BatchNorm2d(32), ", "")


def place_of(folder: Path, *, network: str = NETWORK, epochs: int = 3) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "mynet.py").write_text(network)
    (folder / "recipe.yaml").write_text(RECIPE.replace("EPOCHS", str(epochs)))
    return folder


@contextlib.contextmanager
def started(place: Path, processes: int, out: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    """`compress run recipe.yaml` on so many processes; they are gone at the end."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    launcher = several if processes > 1 else []
    process = subprocess.Popen(
        [sys.executable, *launcher, "-m", "compress.cli", "run", "recipe.yaml", "--out", out, *words],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "160"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        killed(process)


def children_of(process: subprocess.Popen[str]) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    except OSError:
        return []


def killed(process: subprocess.Popen[str]) -> None:
    """The launcher and its processes, which are in sessions of their own and would work on without it."""
    for pid in [process.pid, *children_of(process)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def ran(place: Path, processes: int, out: str, *words: str) -> str:
    with started(place, processes, out, *words) as process:
        said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    return said


def trained(place: Path, out: str) -> dict:
    return json.loads((place / out / "stages/01-train/manifest.json").read_text())


def losses(place: Path, out: str) -> list[float]:
    return [epoch["loss"] for epoch in trained(place, out)["metrics"]["history"]]


def reached(place: Path, out: str) -> int:
    try:
        header = json.loads((place / out / "stages/01-train.training/00/epoch.json").read_text())
    except (OSError, ValueError):
        return 0
    return int(header["facts"]["epoch"])


def wait_for(found: Callable[[], object], process: subprocess.Popen[str], seconds: float = 240) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not found():
        assert process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.02)
    assert found()


def test_without_batch_statistics_two_processes_compute_what_one_computes(tmp_path):
    """The same images in each step, the same gradient: only sums are in another order, and decisions stay the same."""
    place = place_of(tmp_path, network=PLAIN)
    for processes in (1, 2):
        ran(place, processes, f"by-{processes}", "stages.train.augment=false")
    one, two = (losses(place, f"by-{processes}") for processes in (1, 2))
    assert two == pytest.approx(one, rel=1e-4)
    from safetensors.torch import load_file

    first, second = (load_file(place / f"by-{n}/stages/01-train/network/weights.safetensors") for n in (1, 2))
    for name, value in first.items():
        assert (second[name] - value).norm() < 1e-3 * value.norm(), name
    figures = [trained(place, f"by-{processes}")["network"] for processes in (1, 2)]
    assert abs(figures[0]["accuracy"] - figures[1]["accuracy"]) <= 1 / figures[0]["images"]


def test_with_batch_statistics_two_processes_are_as_good_as_one_within_the_noise_of_seeds(tmp_path):
    place = place_of(tmp_path, epochs=4)
    found: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    for seed in range(4):
        for processes in (1, 2):
            out = f"by-{processes}-{seed}"
            ran(place, processes, out, f"seed={seed}")
            found[processes].append((trained(place, out)["network"]["accuracy"], losses(place, out)[-1]))
    print(found)
    for figure, least in ((0, 0.005), (1, 0.02)):
        one, two = ([pair[figure] for pair in found[processes]] for processes in (1, 2))
        # Twice the standard error of a difference of two means, and no less than what rounding alone may do.
        noise = max(least, 2 * ((statistics.variance(one) + statistics.variance(two)) / len(one)) ** 0.5)
        assert abs(statistics.fmean(one) - statistics.fmean(two)) <= noise
    assert min(accuracy for pairs in found.values() for accuracy, _ in pairs) > 0.9


def test_what_is_left_is_written_once_and_a_share_that_does_not_come_out_even_is_trained(tmp_path):
    """1438 images for three processes: the last of them is passed over, and each has the same number of steps."""
    place = place_of(tmp_path, epochs=2)
    said = ran(place, 3, "by-3", "stages.train.batch_size=48")
    assert said.count("report: ") == 1
    assert said.count("epoch 2/2") == 1
    run = json.loads((place / "by-3/run.json").read_text())
    assert run["processes"] == 3
    assert run["data"]["train"] % 3 != 0
    events = [json.loads(line) for line in (place / "by-3/log.jsonl").read_text().splitlines()]
    assert [event["facts"]["epoch"] for event in events if event["event"] == "epoch"] == [1, 2]
    assert [event["stage"] for event in events if event["event"] == "stage_finished"] == ["00-load", "01-train"]
    left = [path.name for path in (place / "by-3/stages").iterdir()]
    assert sorted(left) == ["00-load", "01-train"], "nothing half is left"


def test_a_run_goes_on_with_another_number_of_processes_after_a_kill(tmp_path):
    """One process, two, one again, each killed with its launcher; every epoch is trained once, and it ends as good."""
    place = place_of(tmp_path, epochs=9)
    for processes, until in ((1, 3), (2, 6)):
        with started(place, processes, "run") as process:
            wait_for(lambda until=until: reached(place, "run") >= until, process)
            killed(process)
        assert reached(place, "run") >= until
    before = reached(place, "run")
    said = ran(place, 1, "run")
    assert f"goes on after epoch {before}" in said
    found = trained(place, "run")
    for before, now in ((1, 2), (2, 1)):
        assert any(note.startswith(f"begun with {before} processes, goes on with {now}") for note in found["notes"])
    assert [epoch["epoch"] for epoch in found["metrics"]["history"]] == [*range(1, 10)]
    ran(place, 1, "whole")
    whole = trained(place, "whole")
    assert found["key"] == whole["key"], "how many processes are at work is no other stage"
    assert found["network"]["accuracy"] == pytest.approx(whole["network"]["accuracy"], abs=0.02)
    assert losses(place, "run")[-1] == pytest.approx(losses(place, "whole")[-1], abs=0.05)


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_others_within_seconds_with_one_line(tmp_path, killed):
    place = place_of(tmp_path, epochs=200)
    with started(place, 2, "run") as process:
        wait_for(lambda: reached(place, "run") >= 1, process)
        ranks = {}
        for child in children_of(process):
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            ranks |= {int(word[5:]): child for word in environment if word.startswith(b"RANK=")}
        assert sorted(ranks) == [0, 1]
        began = time.monotonic()
        os.kill(ranks[killed], signal.SIGKILL)
        said, _ = process.communicate(timeout=60)
        assert time.monotonic() - began < 20
    assert process.returncode != 0
    ours = [line for line in said.splitlines() if "another process of this run has ended" in line]
    assert len(ours) == 1, said
    assert "the same command goes on" in ours[0]
    assert "[rank" not in said, "a traceback of one of ours"
    assert reached(place, "run") >= 1
