"""The machine that runs the tests, measured through real processes."""

from __future__ import annotations

import os
import platform
import threading
import time
from pathlib import Path

import pytest
from stacks import convolutions

from compress.errors import TargetError
from compress.progress import Progress
from compress.targets import Measuring, asking, check_name, open_model, open_target
from compress.targets.local import Local


def program(path: Path, script: str) -> Local:
    """A machine whose Python is a shell script."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return Local(command=(str(path),))


def test_probe_is_of_this_machine(progress: Progress) -> None:
    with open_target("local", progress) as machine:
        assert asking.probe(machine)["arch"] == platform.machine()


def test_compare_finds_the_faster_file(tmp_path: Path) -> None:
    files = asking.by_name(
        [convolutions(tmp_path / "deep.onnx", layers=12), convolutions(tmp_path / "flat.onnx", layers=2)]
    )
    said: list[str] = []
    with Local() as machine:
        found = asking.compare(machine, files, Measuring(rounds=2, runs=20, warmup_s=0.02), on_process=said.append)
    assert [row["file"] for row in found.rows] == ["deep.onnx", "flat.onnx"]
    (pair,) = found.pairs
    assert (pair["baseline"], pair["candidate"]) == ("deep.onnx", "flat.onnx")
    assert pair["speedup"] > 2
    assert pair["interval"][0] > 1
    assert 0.2 < pair["aa_ratio"] < 5, "one file against itself; a shared machine may still be noisy"
    assert found.conditions["target"] == "local"
    assert found.conditions["arch"] == platform.machine()
    assert "optimization=all" in found.conditions["settings"]
    assert [len(sample["samples_ms"]) for sample in found.samples] == [20] * 6
    assert [text.split()[0] for text in said] == ["deep.onnx", "flat.onnx", "deep.onnx"] * 2


def test_a_broken_file_is_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no protobuf")
    with Local() as machine, pytest.raises(TargetError) as caught:
        asking.compare(machine, {"broken.onnx": broken})
    assert str(caught.value).startswith("benchmark on local: ")
    assert "broken.onnx: onnxruntime cannot open it: " in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(TargetError, match=r"^broken\.onnx: onnxruntime cannot open it: "):
        open_model(broken)


def test_a_killed_agent_is_one_line_with_its_last_word(tmp_path: Path) -> None:
    machine = program(tmp_path / "python", "echo 'agent: half way' >&2; kill -9 $$")
    with pytest.raises(TargetError) as caught:
        machine.ask(["time", "a.onnx"], about="a.onnx")
    assert str(caught.value) == "a.onnx: the agent was ended by SIGKILL; its last message: half way"


def test_an_agent_that_hangs_is_ended(tmp_path: Path) -> None:
    machine = program(tmp_path / "python", "exec sleep 60")
    with pytest.raises(TargetError, match=r"local: no result within 0\.2 s"):
        machine.ask(["probe"], about="local", timeout_s=0.2)


def test_an_agent_that_speaks_now_and_then_does_not_hang(tmp_path: Path) -> None:
    machine = program(
        tmp_path / "python", """for i in 1 2 3 4 5 6; do echo '{"point": 1}'; sleep 0.2; done; echo '{}'"""
    )
    heard: list[object] = []
    assert machine.ask(["sustain"], about="local", timeout_s=0.9, on_line=heard.append) == {}
    assert heard == [{"point": 1}] * 6


def test_an_agent_without_an_answer(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="ended without a result"):
        program(tmp_path / "python", "echo hello; echo 3; echo '{\"point\": 1}'").ask(["probe"], about="local")
    with pytest.raises(TargetError, match="cannot start"):
        Local(command=(str(tmp_path / "gone"),)).ask(["probe"], about="local")


def test_what_was_measured_before_the_fault_is_heard(tmp_path: Path) -> None:
    script = """echo '{"process": {"index": 0}}'; echo 'agent: error: no memory' >&2; exit 1"""
    heard: list[object] = []
    with pytest.raises(TargetError, match=r"^x: no memory$"):
        program(tmp_path / "python", script).ask(["compare"], about="x", on_line=heard.append)
    assert heard == [{"process": {"index": 0}}]


def test_who_stops_listening_ends_the_agent(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    script = f"""echo $$ > {pid}; echo '{{"point": 1}}'; exec sleep 60"""

    def stop(line: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        program(tmp_path / "python", script).ask(["sustain"], about="x", on_line=stop)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_much_on_standard_error_blocks_nothing(tmp_path: Path) -> None:
    script = "i=0; while [ $i -lt 20000 ]; do echo 'agent: a long line of no interest' >&2; i=$((i+1)); done; echo '{}'"
    before = threading.active_count()
    assert program(tmp_path / "python", script).ask(["probe"], about="local", timeout_s=60) == {}
    time.sleep(0.05)
    assert threading.active_count() == before


def test_results_are_fetched_and_the_job_leaves_nothing(tmp_path: Path) -> None:
    with Local() as machine:
        Path(machine.place("out.bin")).write_bytes(b"123")
        machine.get("out.bin", tmp_path / "here.bin")
        folder = machine.folder
    assert (tmp_path / "here.bin").read_bytes() == b"123"
    assert not folder.exists()


@pytest.mark.parametrize("name", ["", "Local", "raspberrypi", "emulated:", "emulated:cortex-m4", "http://x", "local "])
def test_what_is_no_target_is_said(name: str, progress: Progress) -> None:
    with pytest.raises(TargetError, match=r"^target "):
        check_name(name)
    with pytest.raises(TargetError, match=r"^target "):
        open_target(name, progress)


def test_nothing_can_be_set_up_here(progress: Progress) -> None:
    with pytest.raises(TargetError, match="leave out --setup"):
        open_target("local", progress, setup=True)
