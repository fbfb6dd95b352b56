"""The whole way over ssh to an ARM board: its `python3` is an aarch64 Debian's, run by qemu."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from stand_in import Shown, StandIn

from compress.targets import Measuring, asking
from compress.targets.emulated.userland import ready
from compress.targets.ssh import Ssh


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIn]:
    with StandIn(tmp_path_factory.mktemp("board")) as board:
        ready(Shown()).write_python3(board.programs / "python3", "cortex-a72")
        board.write_program("uname", 'case "$1" in -s) echo Linux;; *) echo aarch64;; esac')
        yield board


def test_it_computes_what_this_machine_computes(arm: StandIn, exported: Any, stripes: Any) -> None:
    images = stripes.splits["evaluation"][0][:4].numpy()
    with Ssh(arm.url, config=arm.config) as machine:
        for name in ("int8.onnx", "int8.tflite"):
            path: Path = exported.files[name]
            here = asking.open_model(path).answers(images)
            found = asking.answers(machine, path, images)
            assert len(np.unique(here)) > 5
            assert name == "int8.onnx" or here.dtype == np.int8  # the other ends with the real values of its int8 sums
            np.testing.assert_array_equal(found.outputs_NK, here)
    assert arm.quiet(60)


def test_it_is_measured_in_fresh_processes(arm: StandIn, exported: Any) -> None:
    files = asking.by_name([exported.files["parent.tflite"], exported.files["int8.tflite"]])
    with Ssh(arm.url, config=arm.config) as machine:
        found = asking.compare(machine, files, Measuring(rounds=1, runs=2, warmup_s=0.0))
    assert found.conditions["arch"] == "aarch64"
    assert "Cortex-A72" in found.conditions["cpu"]
    assert found.conditions["runtimes"]["litert"] == importlib.metadata.version("ai-edge-litert")
    assert [sample["file"] for sample in found.samples] == ["parent.tflite", "int8.tflite", "parent.tflite"]
    assert arm.quiet(60)
