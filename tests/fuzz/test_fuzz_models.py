"""Damaged ONNX and TFLite files through every command that reads them: a result, or one clear line.

A case is its number: `pytest "tests/fuzz/test_fuzz_models.py::test_a_damaged_network[tflite-17]"` makes the same file
and runs the same command again; the file stays in the folder that a failure names. FUZZ_CASES=10000-12000 adds cases.
"""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from mutation import cases, damaged, onnx_mutated, tflite_mutated
from sandboxed import Sandbox
from seeds import SIZE, models

WAYS = {"onnx": (damaged, onnx_mutated, onnx_mutated), "tflite": (damaged, tflite_mutated, tflite_mutated)}


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    sandbox = Sandbox(tmp_path_factory.mktemp("models"))
    models(sandbox.folder / "seeds")
    np.save(sandbox.folder / "inputs.npy", np.zeros((2, 3, SIZE, SIZE), np.float32))
    return sandbox


def words(rng: random.Random, box: Sandbox, file: Path) -> tuple[str, list[str | Path]]:
    """Who reads the file, and the command."""
    partner = box.cwd / f"int8.{'tflite' if file.suffix == '.onnx' else 'onnx'}"
    match rng.randrange(12):
        case 0 | 1:
            outputs = box.folder / "tmp" / "outputs.npy"
            return "agent", ["run", file, "--inputs", box.folder / "inputs.npy", "--outputs", outputs]
        case 2:
            shutil.copyfile(box.folder / "seeds" / partner.name, partner)
            return "cli", ["verify", file, partner, "--limit", "2"]
        case 3:
            return "cli", ["verify", file, "--limit", "1", "--json"]
    return "cli", ["verify", file, "--limit", "2"]


def examine(box: Sandbox, file: Path, who: str, given: list[str | Path]) -> None:
    """Runs one case; fails with the command, what it said, and where its file lies."""
    before = box.listing()
    ended = box.run(*given, entry=who)
    kept = {path for path in box.listing() if path not in before}
    # LiteRT itself may crash on a file. The agent is the process apart: whoever asked it says so in one line.
    crashed = who == "agent" and ended.status in (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGFPE, -signal.SIGBUS)
    wrong = "" if crashed else ended.wrong()
    allowed = {str(box.folder / "tmp" / "outputs.npy")}
    after = {path: kind for path, kind in box.listing().items() if path not in allowed}
    if not wrong and after != {path: kind for path, kind in before.items() if path not in allowed}:
        wrong = f"changed what lies around: {sorted(kept) or 'another content'}"
    assert not wrong, f"{wrong}\n{' '.join(map(str, given))}\n{ended.err[-2500:]}\n{ended.out[-500:]}"


@pytest.mark.parametrize("case", cases("onnx", 40, 1000) + cases("tflite", 40, 1000))
def test_a_damaged_network(case: str, box: Sandbox) -> None:
    kind, _, number = case.partition("-")
    rng = random.Random(int(number))
    source = box.folder / "seeds" / f"{rng.choice(('float', 'int8'))}.{kind}"
    content = rng.choice(WAYS[kind])(source.read_bytes(), rng)
    box.empty()
    file = box.cwd / f"case.{kind}"
    file.write_bytes(content)
    examine(box, file, *words(rng, box, file))


@pytest.mark.slow
@pytest.mark.parametrize("case", cases("onnx", 0, 20) + cases("tflite", 0, 20))
def test_a_damaged_network_is_timed(case: str, box: Sandbox) -> None:
    """`bench` starts processes of its own, which takes seconds."""
    kind, _, number = case.partition("-")
    rng = random.Random(int(number))
    source = box.folder / "seeds" / f"{rng.choice(('float', 'int8'))}.{kind}"
    box.empty()
    file = box.cwd / f"case.{kind}"
    file.write_bytes(rng.choice(WAYS[kind])(source.read_bytes(), rng))
    ended = box.run("bench", file, "--rounds", "1", "--runs", "3", timeout_s=120)
    wrong = ended.wrong()
    assert not wrong, f"{wrong}\n{ended.err[-2500:]}"
    assert file.exists()


def test_undamaged_ones_pass(box: Sandbox) -> None:
    """What the cases start from is accepted, so that a refusal is of the damage."""
    box.empty()
    for name in ("float.onnx", "int8.onnx", "float.tflite", "int8.tflite"):
        shutil.copyfile(box.folder / "seeds" / name, box.cwd / name)
    ended = box.run("verify", "int8.onnx", "int8.tflite", "--limit", "2")
    assert ended.status == 0, ended.err
    for name in ("float.onnx", "float.tflite"):
        assert box.run("verify", name, "--limit", "2").status == 0


def test_a_crash_of_a_runtime_is_one_line(box: Sandbox) -> None:
    """The process that reads the file is not the one that answers the user."""
    file = box.cwd / "crash.onnx"
    shutil.copyfile(box.folder / "seeds" / "float.onnx", file)
    crash = "import os; import compress.verification as v; v.verify_files = lambda *a, **k: os.kill(os.getpid(), 11)"
    ended = box.run("verify", file, before=crash)
    assert ended.status == 1
    assert not ended.wrong()
    assert "crash.onnx: the runtime that reads it crashed (SIGSEGV)" in ended.err
