"""A real run whose machine fails it: each fault is one clear line, nothing finished is lost, the next run goes on."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from compress import checkpoint, locks, manifest, processes
from compress import recipe as recipes
from compress.errors import CompressError, ModelError
from compress.pipeline import Outcome, faults, run_recipe
from compress.pipeline.faults import LOCK, diverged
from compress.progress import Silent

NETWORK = """
from torch import nn

def net(num_classes, width=8):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, num_classes))
"""
RECIPE = """
name: tiny
model: {use: "faultnet:net"}
data: {use: digits}
preprocess: {size: 16, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}
stages:
  - {use: train, epochs: 2, lr: 0.05, augment: false}
"""
LABELS = ["00-load", "01-train"]
Go = Callable[..., Outcome]


class Said(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def said() -> Said:
    return Said()


@pytest.fixture
def go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Said) -> Go:
    """Runs the tiny recipe in a user's folder."""
    (tmp_path / "faultnet.py").write_text(NETWORK)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)

    def run(*overrides: str, out: str | Path = "run") -> Outcome:
        recipe = recipes.load(tmp_path / "recipe.yaml", overrides)
        return run_recipe(recipe, tmp_path / out, said, command="compress run", base=tmp_path)

    return run


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 400 KiB, which only root can have here."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system may be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def weights(run: Path) -> bytes:
    return (run / "stages/01-train/network/weights.safetensors").read_bytes()


def filled(disk: Path, free: int) -> Path:
    """A file that leaves so many bytes."""
    filler = disk / "filler"
    with filler.open("wb") as file:
        size = shutil.disk_usage(disk).free - free
        file.write(b"\0" * size)
    return filler


def test_a_full_disk_is_said_wherever_it_is_met_and_what_is_finished_stays(go: Go, small_disk: Path) -> None:
    go()
    run, reached = small_disk / "run", list[int]()
    for free in range(0, 400_000, 8192):
        filler = filled(small_disk, free)
        before = sorted(path.name for path in run.glob("stages/[0-9][0-9]-*") if (path / manifest.NAME).is_file())
        told: CompressError | None = None
        try:
            go(out=run)
        except CompressError as error:
            told = error
        finally:
            filler.unlink()
        if told is None:
            break
        assert "the disk is full (0.0 MB are free); make room on it; the same command goes on" in str(told)
        assert str(run) in told.place
        after = sorted(path.name for path in run.glob("stages/[0-9][0-9]-*") if (path / manifest.NAME).is_file())
        assert set(before) <= set(after)
        assert not list(small_disk.rglob("*.tmp"))
        reached.append(len(list(small_disk.rglob("*"))))
    assert len(set(reached)) >= 3, "it was full at several places"
    assert weights(run) == weights(Path("run"))


def test_a_disk_that_may_only_be_read(go: Go, small_disk: Path) -> None:
    run = small_disk / "run"
    go(out=run)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for out in (run, small_disk / "another"):
        with pytest.raises(
            CompressError, match=r"(run|another).*: cannot be written \(Read-only file system\); .*--out"
        ):
            go(out=out)


def test_a_folder_of_somebody_else() -> None:
    if os.geteuid():
        pytest.skip("only root can become somebody else")
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    os.seteuid(65534)
    try:
        for out in (folder, folder / "new"):
            told = pytest.raises(CompressError, match=r"cannot be written \(Permission denied\); .*--out")
            with told, faults.own_folder(out, Silent()):
                pytest.fail("it was written")
    finally:
        os.seteuid(0)
        shutil.rmtree(folder)


def test_of_two_runs_in_a_folder_the_second_is_told_who_has_it_at_once(go: Go, tmp_path: Path, said: Said) -> None:
    go()
    before = weights(tmp_path / "run")
    with locks.held(tmp_path / "run" / LOCK):
        began = time.perf_counter()
        with pytest.raises(CompressError) as caught:
            go("stages.train.epochs=3")
        assert time.perf_counter() - began < 1
    assert str(caught.value).startswith(
        f"{tmp_path / 'run'}: in use by process {os.getpid()} on {os.uname().nodename}, "
    )
    assert str(caught.value).endswith("; wait until it has ended, or choose another folder with --out")
    assert weights(tmp_path / "run") == before
    assert go().resumed == LABELS
    assert not (tmp_path / "run" / LOCK).exists()
    assert not any("was killed" in note for note in said.notes)


@pytest.mark.parametrize("oom", [False, True])
def test_a_run_that_was_killed_is_spoken_of_by_the_next(go: Go, tmp_path: Path, said: Said, oom: bool) -> None:
    killed = locks.Holder.of_this_process()
    killed = replace(killed, pid=4_000_000, oom_kills=killed.oom_kills - oom)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).write_text(json.dumps(asdict(killed)))
    go()
    (note,) = [note for note in said.notes if "process 4000000" in note]
    assert ("ran out of memory" in note) == (oom and bool(killed.boot))
    assert note.endswith("this one goes on with what it finished")
    said.notes.clear()
    go()
    assert not [note for note in said.notes if "process 4000000" in note]


@contextlib.contextmanager
def little_memory(more: int) -> Iterator[None]:
    """The process may have so many bytes more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_too_large_a_batch_names_the_one_to_try(go: Go, tmp_path: Path) -> None:
    go()  # so that all libraries have what they take
    wide = ("model.args.width=4096", "stages.train.batch_size=1024", "stages.train.epochs=1")
    told = r"^stage 01-train: out of memory with stages.train.batch_size=1024; try half: stages.train.batch_size=512$"
    with little_memory(600_000_000), pytest.raises(CompressError, match=told):
        go(*wide, out="wide")
    assert [path.name for path in (tmp_path / "wide/stages").iterdir()] == ["00-load"]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("std::bad_alloc"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
)
def test_the_words_of_those_who_have_no_memory(error: Exception, tmp_path: Path) -> None:
    half = pytest.raises(CompressError, match=r"stage x: out of (GPU )?memory with a=3; try half: a=1")
    with half, faults.told(tmp_path, "stage x", {"a": 3, "b": 1}):
        raise error
    other = pytest.raises(CompressError, match=r"stage x: out of (GPU )?memory; end other programs")
    with other, faults.told(tmp_path, "stage x", {"b": 1}):
        raise error


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("x"), OSError(2, "No such file", "/x")])
def test_other_errors_stay_what_they_are(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, faults.told(tmp_path):
        raise error
    assert caught.value is error


def altered(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(("damage", "told"), [(altered, "was altered"), (cut, "bytes of"), (Path.unlink, "is missing")])
def test_a_damaged_stage_of_our_own_is_made_again(
    go: Go, tmp_path: Path, said: Said, damage: Callable[[Path], None], told: str
) -> None:
    go()
    before = weights(tmp_path / "run")
    damage(tmp_path / "run/stages/01-train/network/weights.safetensors")
    assert go().ran == ["01-train"]
    assert weights(tmp_path / "run") == before
    (note,) = [note for note in said.notes if "runs again" in note]
    assert note.startswith("01-train: network/weights.safetensors ")
    assert told in note


@pytest.mark.parametrize("damage", [altered, cut])
def test_what_the_user_brings_is_refused_by_its_name_where_it_is_damaged(
    go: Go, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    go()
    damage(tmp_path / "run/stages/01-train/network/weights.safetensors")
    path = "run/stages/01-train/network"
    for given in (
        f"model.weights={path}/weights.safetensors",
        f"stages=[{{use: distill, epochs: 1, teacher: {path}}}]",
    ):
        with pytest.raises(ModelError, match=rf"{path}/weights.safetensors: (was altered|is no whole|does not fit)"):
            go(given, out="again")
        assert not list(tmp_path.glob("again/stages/*"))


def test_weights_that_are_no_numbers_are_refused_before_anything_else(go: Go, tmp_path: Path) -> None:
    go()
    network = checkpoint.load(tmp_path / "run/stages/01-train/network")
    with torch.no_grad():
        network.module[5].bias[3] = torch.nan
    checkpoint.save(network, tmp_path / "broken")
    with pytest.raises(ModelError, match=r"^weights broken/weights.safetensors: `5.bias` holds NaN or inf"):
        go("model.weights=broken/weights.safetensors", out="again")


def test_a_training_that_ends_in_a_guess_says_so(go: Go, tmp_path: Path, said: Said) -> None:
    go("stages.train.lr=1000", out="diverged")
    (note,) = [note for note in said.notes if note.startswith("stage 01-train: the score is 0.")]
    assert "no better than guessing" in note
    assert "try a lower lr" in note
    kept = json.loads((tmp_path / "diverged/stages/01-train/manifest.json").read_text())
    assert note in kept["notes"]
    said.notes.clear()
    go("stages.train.epochs=3")
    assert not [note for note in said.notes if "guessing" in note]


def history(*losses: float) -> dict[str, object]:
    return {"history": [{"epoch": number, "loss": loss} for number, loss in enumerate(losses, 1)]}


@pytest.mark.parametrize(
    ("metrics", "score", "before", "told"),
    [
        (history(1.0, 2.0), 0.5, 0.9, "diverged"),
        (history(1.0, 2.0), 0.88, 0.9, ""),
        (history(2.0, 1.0), 0.5, 0.9, ""),
        (history(2.0, 1.0), 0.2, None, "guessing"),
        ({}, 0.2, None, ""),
        ({"history": [*history(1.0, 0.5)["history"], *history(3.0, 2.0)["history"]]}, 0.5, 0.9, ""),  # type: ignore[misc]
    ],
)
def test_when_a_training_has_diverged(metrics, score, before, told, stripes) -> None:
    found = diverged(metrics, score, before, stripes)
    assert told in found
    assert bool(told) == bool(found)


def test_a_cache_that_cannot_be_written_is_found_before_training(go: Go, tmp_path: Path, said: Said) -> None:
    (tmp_path / "file").touch()
    go()
    shutil.copytree(tmp_path / "run/stages/01-train/network", tmp_path / "teacher")
    stages = "stages=[{use: train, epochs: 1}, {use: distill, epochs: 1, teacher: teacher, cache: file/below}]"
    with pytest.raises(CompressError, match=r"file/below: the teacher's answers cannot be kept here"):
        go(stages, out="cached")
    assert not list(tmp_path.glob("cached/stages/*"))


def test_a_batchnorm_among_the_layers_of_weights_is_found_before_training(go: Go, tmp_path: Path) -> None:
    go()
    teacher = "run/stages/01-train/network"
    stages = f"stages=[{{use: distill, teacher: {teacher}, losses: [{{use: weights, layers: ['1']}}]}}]"
    with pytest.raises(ModelError, match=r"stage distill: losses.0 \(weights\).*`layers: 1` matches no layer"):
        go(stages, out="refused")
    assert not list(tmp_path.glob("refused/stages/*"))


def test_a_number_of_processes_that_torchrun_did_not_set_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(CompressError, match=r"WORLD_SIZE=2: .*RANK expected.*; start it with torchrun"),
        processes.joined(),
    ):
        pass
