"""Damaged run folders and baselines: the commands that read them answer, or say in one line what is wrong.

`run` on such a folder goes on or begins again, and neither alters nor removes anything outside of it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from mutation import cases, damaged, mutated
from sandboxed import Sandbox
from test_fuzz_recipes import NETWORK, SMALL, written

sys.path.append(str(Path(__file__).parents[1] / "gate"))
from run_folders import network, rounds, write_run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    """A sandbox with run folders that no training made, and a baseline."""
    box = Sandbox(tmp_path_factory.mktemp("made"))
    kept = box.folder / "kept"
    kept.mkdir()
    files = {"parent.onnx": network(kept / "parent.onnx", 2), "int8.onnx": network(kept / "int8.onnx", 1, seed=1)}
    times = {"parent.onnx": rounds(4.0), "int8.onnx": rounds(2.0)}
    for name in ("ours", "theirs"):
        write_run(
            kept / name, files, wrong={"int8.onnx": [1, 2]}, times=times, control={"parent.onnx": rounds(4.0, seed=2)}
        )
    shutil.copytree(kept / "theirs", box.cwd / "theirs")
    done = box.run("gate", "theirs", "--write-baseline", "baseline/baseline.json")
    assert done.status == 0, done.err
    shutil.move(box.cwd / "baseline", kept / "baseline")
    return box


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    """A sandbox with a finished run of a small recipe."""
    box = Sandbox(tmp_path_factory.mktemp("trained"))
    (box.cwd / "mynet.py").write_text(NETWORK)
    (box.cwd / "recipe.yaml").write_bytes(written(SMALL))
    done = box.run("run", "recipe.yaml", timeout_s=200)
    assert done.status == 0, done.err
    shutil.copytree(box.cwd, box.folder / "kept")
    return box


def _readable(path: Path) -> Any:
    """The file's JSON; None where an earlier harm has left none."""
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None


def harm(folder: Path, outside: Path, rng: random.Random) -> str:
    """Damages one or two things in the folder; what and how."""
    said = []
    for _ in range(rng.choice((1, 1, 1, 2))):
        found = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        texts = [path for path in found if path.suffix in (".json", ".yaml", ".jsonl")]
        if not found:
            break
        path = rng.choice(texts if texts and rng.random() < 0.7 else found)
        way = rng.randrange(12)
        said.append(f"{path.relative_to(folder)}: way {way}")
        match way:
            case 0:
                path.unlink()
            case 1:
                path.unlink()
                path.mkdir()
            case 2:
                path.unlink()
                path.symlink_to(path.name)
            case 3:
                path.unlink()
                path.symlink_to(outside / "precious.txt")
            case 4:
                above = path.parent
                if above != folder:
                    shutil.rmtree(above)
                    above.symlink_to(outside, target_is_directory=True)
            case 5:
                path.write_bytes(b"")
            case 6:
                path.unlink()
                os.mkfifo(path)
            case 7 | 8 | 9 if path.suffix == ".json" and (value := _readable(path)) is not None:
                path.write_text(json.dumps(mutated(value, rng)))
            case _:
                path.write_bytes(damaged(path.read_bytes(), rng))
    return "; ".join(said)


def judged(box: Sandbox, said: str, words: list[str], before: dict[str, str], *inside: Path) -> None:
    ended = box.run(*words, timeout_s=60, signal_s=45)
    wrong = ended.wrong(statuses=(0, 1, 2, 3, 4, 5), lines=3 if words[0] == "run" else 1)
    if not wrong and box.listing(*inside) != before:
        after = box.listing(*inside)
        wrong = (
            f"changed {sorted(path for path in after.keys() | before.keys() if after.get(path) != before.get(path))}"
        )
    assert not wrong, f"{wrong}\n{' '.join(words)}\n{said}\n{ended.err[-2500:]}"


@pytest.mark.parametrize("case", cases("made", 25, 600))
def test_a_damaged_folder_is_judged(case: str, made: Sandbox) -> None:
    rng = random.Random(int(case.partition("-")[2]))
    made.empty()
    for name in ("ours", "theirs", "baseline"):
        shutil.copytree(made.folder / "kept" / name, made.cwd / name)
    outside = made.cwd / "outside"
    outside.mkdir()
    (outside / "precious.txt").write_text("keep me")
    words = rng.choice(
        (
            ["gate", "ours", "--baseline", "baseline/baseline.json"],
            ["gate", "ours", "--baseline", "baseline/baseline.json"],
            ["compare", "ours", "theirs"],
            ["compare", "ours", "baseline/baseline.json", "--json"],
            ["compare", "theirs", "ours", "--markdown"],
            ["gate", "ours", "--write-baseline", "new/baseline.json"],
            ["report", "ours"],
        )
    )
    said = harm(
        made.cwd / rng.choice(("ours", "baseline") if "baseline/baseline.json" in words else ("ours",)), outside, rng
    )
    if words[0] == "report" or "--write-baseline" in words:
        inside = [made.cwd / ("ours" if words[0] == "report" else "new")]
        judged(made, said, words, made.listing(*inside), *inside)
        for place in inside:
            assert (outside / "precious.txt").read_text() == "keep me"
            assert place.name in ("ours", "new")
    else:
        judged(made, said, words, made.listing())


COMMANDS = (
    ["run", "recipe.yaml"],
    ["report", "runs/small"],
    ["verify", "runs/small", "--limit", "8"],
    ["compare", "runs/small", "runs/small"],
    ["gate", "runs/small", "--write-baseline", "new/baseline.json"],
    ["show", "runs/small"],
    ["ls"],
    ["index", "runs"],
)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases("trained", 0, 120))
def test_a_damaged_run_is_gone_on_with_and_read(case: str, trained: Sandbox) -> None:
    rng = random.Random(int(case.partition("-")[2]))
    trained.empty()
    shutil.copytree(trained.folder / "kept", trained.cwd, dirs_exist_ok=True)
    outside = trained.cwd / "outside"
    outside.mkdir()
    (outside / "precious.txt").write_text("keep me")
    said = harm(trained.cwd / "runs" / "small", outside, rng)
    words = list(rng.choice(COMMANDS[:3] if rng.random() < 0.6 else COMMANDS))
    outputs = [trained.cwd / "index.html"] if words[0] == "index" else []
    inside = [
        *outputs,
        trained.cwd / "runs",
        trained.cwd / "new",
        trained.cwd / "__pycache__",
        trained.folder / "home" / ".cache",
    ]
    before = trained.listing(*inside)
    run_before = trained.listing(trained.cwd / "new", trained.cwd / "__pycache__", trained.folder / "home" / ".cache")
    judged(trained, said, words, before, *inside)
    if words[0] in ("compare", "gate", "verify", "show", "ls"):  # they only read
        assert (
            trained.listing(trained.cwd / "new", trained.cwd / "__pycache__", trained.folder / "home" / ".cache")
            == run_before
        )
