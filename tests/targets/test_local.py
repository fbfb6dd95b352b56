"""The machine that runs the tests, measured through real processes."""

from __future__ import annotations

import platform
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compress.errors import TargetError
from compress.targets import open_model, target
from compress.targets.comparison import by_name, compare
from compress.targets.local import Local


def convolutions(path: Path, *, layers: int) -> Path:
    """A stack of 3x3 convolutions over 16 channels of 32 x 32; time grows with `layers`."""
    weights = np.random.default_rng(0).normal(0, 0.1, (16, 16, 3, 3)).astype(np.float32)
    names = ["x", *(f"h{i}" for i in range(1, layers)), "y"]
    nodes = [helper.make_node("Conv", [a, "w"], [b], pads=[1] * 4) for a, b in pairwise(names)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 16, 32, 32]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "stack", ends[:1], ends[1:], [numpy_helper.from_array(weights, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def program(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_probe_is_of_this_machine() -> None:
    assert target("local").probe()["arch"] == platform.machine()


def test_compare_finds_the_faster_file(tmp_path: Path) -> None:
    files = by_name([convolutions(tmp_path / "deep.onnx", layers=12), convolutions(tmp_path / "flat.onnx", layers=2)])
    found = compare(files, target=target("local"), rounds=2, runs=20, warmup_s=0.02)
    assert [row["file"] for row in found.rows] == ["deep.onnx", "flat.onnx"]
    (pair,) = found.pairs
    assert pair["speedup"] > 2
    assert pair["interval"][0] > 1
    assert 0.2 < pair["aa_ratio"] < 5, "one file against itself; a shared machine may still be noisy"
    assert found.conditions["target"] == "local"
    assert found.conditions["arch"] == platform.machine()
    assert "optimization=all" in found.conditions["settings"]
    assert [len(sample["samples_ms"]) for sample in found.samples] == [20] * 6


def test_a_broken_file_is_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no protobuf")
    with pytest.raises(TargetError) as caught:
        compare({"broken.onnx": broken}, target=target("local"))
    assert str(caught.value).startswith("broken.onnx on onnxruntime: onnxruntime cannot open it: ")
    assert "\n" not in str(caught.value)
    with pytest.raises(TargetError, match=r"^broken\.onnx: onnxruntime cannot open it: "):
        open_model(broken)


def test_a_killed_agent_is_one_line_with_its_last_word(tmp_path: Path) -> None:
    machine = Local(python=program(tmp_path / "python", "echo 'agent: half way' >&2; kill -9 $$"))
    with pytest.raises(TargetError) as caught:
        machine.time(tmp_path / "a.onnx", runtime="onnxruntime", threads=1, runs=1, warmup_s=0, min_s=0)
    assert str(caught.value) == ("a.onnx on onnxruntime: the agent was ended by SIGKILL; its last message: half way")


def test_an_agent_that_hangs_is_ended(tmp_path: Path) -> None:
    machine = Local(python=program(tmp_path / "python", "exec sleep 60"), timeout_s=0.2)
    with pytest.raises(TargetError, match=r"local: no result within 0\.2 s"):
        machine.probe()


def test_an_agent_without_an_answer(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="ended without a result"):
        Local(python=program(tmp_path / "python", "echo hello")).probe()
    with pytest.raises(TargetError, match="cannot start"):
        Local(python=str(tmp_path / "gone")).probe()
