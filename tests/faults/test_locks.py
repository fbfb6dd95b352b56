"""Two processes that want the same: one has it, the other is told who, and nothing stays behind."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from compress import locks
from compress.locks import HeldError, Holder, briefly, held, holder_of

HOLD = """
import sys, time
from pathlib import Path
from compress import locks
with locks.held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def another(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock."""
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


class Said:
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_the_second_process_is_told_who_has_it_at_once_and_a_killed_one_is_remembered(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with another(path) as process:
        holder = holder_of(path)
        assert holder is not None
        assert (holder.pid, holder.host) == (process.pid, os.uname().nodename)
        began = time.perf_counter()
        told = rf"^runs/x: in use by process {process.pid} on .*, since 20..-.*; wait$"
        with pytest.raises(HeldError, match=told), held(path, place="runs/x", way_out="wait"):
            pytest.fail("two have it")
        assert time.perf_counter() - began < 0.5
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert holder_of(path) is None
        with held(path) as before:
            assert before == holder
            assert before.ended_by == "was killed"
    assert not path.exists()
    with held(path) as before:
        assert before is None, "the one before gave it back"


def test_one_that_waits_says_so_and_gets_it(tmp_path: Path) -> None:
    path, said, order = tmp_path / "lock", Said(), list[str]()

    def wait() -> None:
        with held(path, place="userland", waiting=said):  # type: ignore[arg-type]
            order.append("second")

    with held(path):
        thread = threading.Thread(target=wait)
        thread.start()
        while not said.notes:
            time.sleep(0.01)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    assert said.notes[0].startswith(f"userland: waiting for process {os.getpid()} on ")
    assert not path.exists()


def test_many_take_turns_though_each_removes_the_file(tmp_path: Path) -> None:
    path, inside, most, said = tmp_path / "lock", list[int](), list[int](), Said()

    def turns() -> None:
        for _ in range(40):
            with held(path, waiting=said):  # type: ignore[arg-type]
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.0005)
                inside.pop()

    threads = [threading.Thread(target=turns) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(most) == 160
    assert max(most) == 1


def test_a_forked_child_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    reader, writer = os.pipe()
    with contextlib.ExitStack() as stack:
        stack.enter_context(held(path))
        child = os.fork()
        if not child:  # outlives the lock's holder, as a loader's worker may
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)
        assert holder_of(path) is not None, "the child has not given the parent's lock away"
    with held(path):
        assert holder_of(path) is not None
    os.close(writer)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, "was killed"),
        ({"host": "elsewhere", "boot": "0"}, "was killed"),
        ({"boot": "an earlier one"}, "was cut off when the machine stopped"),
        ({"oom_kills": -1}, "was killed; the machine ran out of memory meanwhile"),
    ],
)
def test_what_ended_a_process_is_said_as_far_as_it_is_known(change: dict[str, object], said: str) -> None:
    if not Holder.of_this_process().boot:
        change = change | {"boot": ""}
        said = "was killed"
    facts = {name: getattr(Holder.of_this_process(), name) for name in Holder.__dataclass_fields__}
    assert Holder(**(facts | change)).ended_by == said


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": 1}', '{"pid": 1, "other": 2}', "\x00" * 5000])
def test_a_file_of_anything_else_is_no_obstacle(tmp_path: Path, content: str) -> None:
    path = tmp_path / "lock"
    path.write_text(content)
    with held(path) as before:
        assert before is None
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_somebody_who_looks_is_not_at_work(tmp_path: Path) -> None:
    """`holder_of` asks by taking the lock for a moment."""
    path = tmp_path / "lock"
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        looked = threading.Timer(0.02, fcntl.flock, (file.fileno(), fcntl.LOCK_UN))
        looked.start()
        with held(path):
            pass
        looked.join()


def test_sharing_keeps_out_only_those_who_do_not(tmp_path: Path) -> None:
    path, got = tmp_path / "lock", threading.Event()

    def alone() -> None:
        with briefly(path):
            got.set()

    with briefly(path, shared=True), briefly(path, shared=True):
        thread = threading.Thread(target=alone)
        thread.start()
        assert not got.wait(0.1)
    assert got.wait(10)
    thread.join()


def test_a_file_system_without_locks_keeps_nobody_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", none)
    with held(tmp_path / "lock") as before:
        assert before is None


def test_the_error_survives_a_trip_between_processes() -> None:
    error = HeldError("runs/x", Holder(7, "board", "2026-01-01"), "wait")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.holder) == (str(error), error.holder)
