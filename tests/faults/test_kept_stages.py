"""When a finished stage may serve again, and what a kill in the middle of a write leaves."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compress import manifest
from compress.epochs import Epochs, State, prepare_epochs
from compress.pipeline.fold import NOT_NOW, Fold
from compress.written import read_json, read_text, write_bytes, write_json

MACHINE = {"cpu": "4 x Cortex-A76", "governor": "performance", "kernel": "6.6"}


class Said:
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def kept(folder: Path, *, verdict: str = "OK", key: str = "k") -> Path:
    folder.mkdir()
    (folder / "samples.json").write_text("[1, 2]")
    facts: dict[str, Any] = {
        "stage": "benchmark",
        "folder": folder.name,
        "settings": {},
        "seconds": 1.5,
        "product": {"network": "n", "parent": None, "float_network": None, "files": {}, "layer_losses": {}},
        "network": {"accuracy": 0.5, "params": 1, "macs": 2, "precision": "float32"},
        "key": key,
        "finished": "2026-01-02",
        "notes": ["a note"],
        "metrics": {"pairs": [{"verdict": verdict}]},
        "machine": MACHINE,
        "files": manifest.files_below(folder),
    }
    write_json(folder / manifest.NAME, facts)
    return folder


def served(folder: Path, use: str, **fold: Any) -> tuple[dict[str, Any] | None, list[str]]:
    said = Said()
    state = SimpleNamespace(notes=SimpleNamespace(shown=said), key="k", machine=MACHINE)
    vars(state).update(fold)
    found = Fold._served(state, SimpleNamespace(use=use), f"07-{use}", folder)  # type: ignore[arg-type]
    return found, said.notes


def test_a_kept_benchmark_says_of_when_its_times_are_once_and_in_its_manifest(tmp_path: Path) -> None:
    folder = kept(tmp_path / "s")
    for _ in range(2):
        found, (note,) = served(folder, "benchmark")
        assert found is not None
        assert note == f"07-benchmark: {NOT_NOW} on 2026-01-02, with the same files on the same machine."
        assert [text.startswith(NOT_NOW) for text in found["notes"]] == [True, False]
        write_json(folder / manifest.NAME, found)


def test_noisy_times_are_taken_again_and_those_of_another_machine(tmp_path: Path) -> None:
    assert served(kept(tmp_path / "n", verdict="NOISY"), "benchmark") == (
        None,
        ["07-benchmark: measured again, it was NOISY on 2026-01-02"],
    )
    now = MACHINE | {"governor": "powersave"}
    assert served(kept(tmp_path / "m"), "benchmark", key="other", machine=now) == (
        None,
        ["07-benchmark: measured again, the machine has changed (governor was performance, is powersave)"],
    )


def test_another_stage_is_taken_as_it_is(tmp_path: Path) -> None:
    found, (note,) = served(kept(tmp_path / "s"), "verify")
    assert found is not None
    assert found["notes"] == ["a note"]
    assert note == "07-verify: unchanged, taken from the run of 2026-01-02"


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"[1, 3]", "samples.json was altered"), (b"[1", "samples.json has 2 bytes of 6"), (None, "is missing")],
)
def test_damage_is_told_of_the_stage_that_would_serve_and_of_no_other(
    tmp_path: Path, content: bytes | None, said: str
) -> None:
    folder = kept(tmp_path / "s")
    assert manifest.damage(folder, "k") == ""
    if content is None:
        (folder / "samples.json").unlink()
    else:
        (folder / "samples.json").write_bytes(content)
    assert said in manifest.damage(folder, "k")
    assert manifest.damage(folder, "other") == ""
    assert manifest.valid(folder, "k") is None


def killed_while_at(work: Callable[[], None], wait_s: float) -> None:
    """A process that does its work again and again, killed so long after the first time."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        work()
        os.write(writer, b".")
        while True:
            work()
    os.read(reader, 1)
    time.sleep(wait_s)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader)
    os.close(writer)


def test_a_training_killed_while_it_writes_keeps_its_last_epoch_or_the_one_before(tmp_path: Path) -> None:
    prepare_epochs(tmp_path / "t", "a")
    drawn, last = random.Random(0), 0

    def save_next() -> None:
        training = Epochs(tmp_path / "t").begin()
        epoch = training.epoch() + 1
        training.save(State({"x": torch.full((100_000,), epoch)}, {"epoch": epoch}))

    for _ in range(12):
        killed_while_at(save_next, drawn.uniform(0, 0.02))
        training = Epochs(tmp_path / "t").begin()
        epoch = training.epoch()
        assert epoch > last
        assert set(training.load().tensors["x"].tolist()) == {epoch}
        last = epoch


def test_a_manifest_that_says_other_things_than_stages_do_is_none(tmp_path: Path) -> None:
    folder = kept(tmp_path / "s")
    whole = manifest.read(folder)
    assert whole["key"] == "k"
    assert whole["machine"] == MACHINE

    def inside(facts: Any, *path: str) -> list[tuple[str, ...]]:
        below = facts.items() if isinstance(facts, dict) else ()
        return [path, *(found for key, value in below for found in inside(value, *path, key))]

    paths = inside({name: value for name, value in whole.items() if name not in ("metrics", "machine")})[1:]
    for path in paths:
        for wrong in ([1], {"a": [1]}, None):
            may_be_none = path[-1] in ("network", "parent", "float_network")
            if (may_be_none and wrong is None) or (path == ("settings",) and isinstance(wrong, dict)):
                continue
            changed = json.loads(json.dumps(whole))
            at = changed
            for name in path[:-1]:
                at = at[name]
            at[path[-1]] = wrong
            write_json(folder / manifest.NAME, changed)
            assert manifest.read(folder) == {}, path
            assert manifest.valid(folder, "k") is None


def test_a_pipe_in_a_files_place_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert read_json(tmp_path / "pipe") == {}
    with pytest.raises(OSError, match="Is a pipe or a device"):
        read_text(tmp_path / "pipe")


def test_a_file_killed_while_it_is_replaced_is_the_old_one_or_the_new(tmp_path: Path) -> None:
    path, drawn, last = tmp_path / "a.json", random.Random(1), 0

    def write_next() -> None:
        write_json(path, {"n": read_json(path).get("n", 0) + 1, "more": "x" * 200_000})

    for _ in range(12):
        killed_while_at(write_next, drawn.uniform(0, 0.01))
        found = read_json(path)
        assert len(found["more"]) == 200_000
        assert found["n"] > last
        last = found["n"]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    write_bytes(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_bytes(path, b"new")
    assert caught.value.filename == str(path)
    assert (path.read_bytes(), [p.name for p in tmp_path.iterdir()]) == (b"old", ["a"])
