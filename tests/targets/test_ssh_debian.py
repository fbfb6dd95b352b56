"""The whole way to Debian's own sshd with an arm64 Debian behind it, `--setup` included."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from debian_board import DebianBoard
from stand_in import Shown

from compress.errors import TargetError
from compress.targets import Measuring, asking
from compress.targets.ssh import Ssh

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="a chroot and mounts need root; this is another user"),
]


@pytest.fixture(scope="module")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DebianBoard]:
    with DebianBoard(tmp_path_factory.mktemp("debian")) as board:
        yield board


def test_what_is_there_before_the_set_up(debian: DebianBoard, exported: Any) -> None:
    with Ssh(debian.url, config=debian.config) as machine:
        found = asking.probe(machine)
        with pytest.raises(TargetError, match="has no numpy and no ai-edge-litert; --setup installs it"):
            machine.put(exported.files["int8.tflite"])
    assert debian.quiet()
    assert found["arch"] == "aarch64"
    assert "Cortex-A72" in found["cpu"]
    assert found["numpy"] == "unavailable"
    assert found["venv"] is True


def test_set_up_measured_and_computed_bit_for_bit(debian: DebianBoard, exported: Any, stripes: Any) -> None:
    shown, path = Shown(), exported.files["int8.tflite"]
    images = stripes.splits["evaluation"][0].numpy()
    with Ssh(debian.url, config=debian.config, setup=True, runtimes=["litert"], progress=shown) as machine:
        found = asking.answers(machine, path, images)
        files = asking.by_name([exported.files["parent.tflite"], path])
        measured = asking.compare(machine, files, Measuring(runtimes=("litert",), rounds=1, runs=3, warmup_s=0.0))
    assert shown.said[:3] == ["virtual environment", "numpy", "ai-edge-litert"]
    np.testing.assert_array_equal(found.outputs_NK, asking.open_model(path).answers(images))
    assert found.outputs_NK.dtype == np.int8
    assert measured.conditions["arch"] == "aarch64"
    assert measured.conditions["python_path"].startswith("/home/pi/.cache/compress/venv-3.")
    assert [sample["file"] for sample in measured.samples] == ["parent.tflite", "int8.tflite", "parent.tflite"]
    assert debian.quiet()
    assert {entry.name for entry in debian.home.iterdir()} == {".cache"}
    assert {entry.name for entry in (debian.home / ".cache").iterdir()} == {"compress"}


def test_a_cut_connection(debian: DebianBoard, exported: Any, tmp_path: Path) -> None:
    """After the test before: its environment is used without --setup."""
    files = asking.by_name([exported.files["parent.tflite"], exported.files["int8.tflite"]])
    quick, journal = Measuring(runtimes=("litert",), rounds=1, runs=3, warmup_s=0.0), tmp_path / "journal.jsonl"

    with Ssh(debian.url, config=debian.config) as machine:

        def cut(said: str) -> None:
            machine._link._process.kill()

        with pytest.raises(TargetError, match=r"the connection to 127\.0\.0\.1 dropped"):
            asking.compare(machine, files, quick, journal=journal, on_process=cut)
    assert debian.quiet()
    notes: list[str] = []
    began = time.monotonic()
    with Ssh(debian.url, config=debian.config) as machine:
        found = asking.compare(machine, files, quick, journal=journal, on_note=notes.append)
        machine.remove()
    assert time.monotonic() - began < 300
    assert notes[0].startswith("1 of 3 processes were measured before")
    assert len(found.samples) == 3
    assert debian.quiet()
    assert not list((debian.home / ".cache").iterdir())
