"""Files that go to a board and come back."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from stacks import convolutions
from stand_in import Shown, StandIn, stand_in

from compress.errors import TargetError
from compress.targets import asking
from compress.targets import board as far_end
from compress.targets.connection import REMOTE
from compress.targets.ssh import Ssh

board = pytest.fixture(stand_in)

HOSTILE = (
    *("with space.bin", "'quoted'.bin", '"quoted".bin', "$(touch canary).bin", "`touch canary`.bin", "a;touch canary"),
    *("-rf", "--help", "new\nline.bin", "*.bin", "~", "a\\b.bin", "%s%n", "{}", "é.bin", "x.'; touch canary; '", "#"),
    *("a&b", "a|b", ">canary", "<canary", "$HOME", "!!", "\x1b[31m", "\udc80.bin"),
)


def test_no_name_means_anything_to_a_shell(board: StandIn, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    with Ssh(board.url, config=board.config) as machine:
        for name in HOSTILE:
            (folder / name).write_bytes(b"content of " + os.fsencode(name))
            put = Path(machine.put(folder / name))
            assert put.read_bytes() == (folder / name).read_bytes()
            shutil.copyfile(put, machine.place(name))  # as the agent would: the path as it is
            machine.get(name, tmp_path / "back")
            assert (tmp_path / "back").read_bytes() == (folder / name).read_bytes()
        for name in ("$(touch canary)", "'; touch canary; '", "-rf", "`touch canary`", "a\nb"):
            with pytest.raises(TargetError, match="argument --runtime: invalid choice") as raised:
                machine.ask(["time", name, f"--runtime={name}"], about="a hostile word")
            assert repr(name) in str(raised.value)
    assert board.quiet()
    assert {path.name for path in folder.iterdir()} == set(HOSTILE)
    assert {path.name for path in board.home.iterdir()} == {".cache"}
    assert not [path for path in board.home.rglob("*") if "canary" in path.name]
    assert board.commands == [REMOTE]


def test_results_lie_in_the_job_s_folder(board: StandIn, tmp_path: Path) -> None:
    with Ssh(board.url, config=board.config) as machine:
        for name in ("", ".", "..", "../x", "/etc/passwd", "a/b", "a\0b"):
            with pytest.raises(ValueError, match="no name for a file"):
                machine.place(name)
            with pytest.raises(ValueError, match="no name for a file"):
                machine.get(name, tmp_path / "x")


def test_a_file_is_copied_once(board: StandIn, tmp_path: Path) -> None:
    model = convolutions(tmp_path / "a.onnx", layers=2)
    places = []
    for _ in range(2):
        before = board.received
        with Ssh(board.url, config=board.config) as machine:
            places += [machine.put(model), machine.put(shutil.copyfile(model, tmp_path / "same.onnx"))]
            machine.ask(["probe"], about="probe")
        copied = board.received - before
    assert len(set(places)) == 1
    assert Path(places[0]).name == hashlib.sha256(model.read_bytes()).hexdigest() + ".onnx"
    assert copied < len(Path(far_end.__file__).read_bytes()) + 4000  # neither the model nor the agent


@pytest.mark.parametrize("damage", [b"", b"x"])
def test_a_file_that_was_damaged_there_is_copied_again(board: StandIn, tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"y" * 100_000)
    with Ssh(board.url, config=board.config) as machine:
        there = Path(machine.put(path))
        there.write_bytes(damage * 100_000)
        assert machine.put(path) == str(there)
        assert there.read_bytes() == path.read_bytes()


def test_a_file_that_changes_while_it_is_copied_is_refused(board: StandIn, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"y" * 3_000_000)
    with Ssh(board.url, config=board.config) as machine:
        start = board.received

        def change(way: str, _: bytes) -> bool:
            if way == "in" and board.received > start + 200_000:
                path.write_bytes(b"z" * 3_000_000)
            return False

        board.watch = change
        board.bytes_per_s = 10e6
        with pytest.raises(TargetError, match=r"a\.bin: was damaged on its way, or changed meanwhile"):
            machine.put(path)
        board.watch = lambda way, seen: False
        assert Path(machine.put(path)).read_bytes() == path.read_bytes()
    assert not list(board.home.glob(".cache/compress/files/.*"))


def test_a_file_that_is_not_there(board: StandIn, tmp_path: Path) -> None:
    with (
        Ssh(board.url, config=board.config) as machine,
        pytest.raises(TargetError, match=r"cannot be read: No such file or directory"),
    ):
        machine.put(tmp_path / "missing.bin")


def test_a_result_that_is_not_there(board: StandIn, tmp_path: Path) -> None:
    with Ssh(board.url, config=board.config) as machine:
        with pytest.raises(TargetError, match=r"outputs\.npy: No such file or directory"):
            machine.get("outputs.npy", tmp_path / "outputs.npy")
        assert machine.ask(["probe"], about="probe")["bits"] == 64  # the link still works
    assert not list(tmp_path.glob("outputs*"))


def test_a_large_result_comes_back_whole(board: StandIn, tmp_path: Path) -> None:
    content = np.random.default_rng(0).bytes(5_000_000)
    with Ssh(board.url, config=board.config) as machine:
        Path(machine.place("y")).write_bytes(content)
        machine.get("y", tmp_path / "y")
    assert (tmp_path / "y").read_bytes() == content


def test_a_slow_link_shows_how_far_it_is(board: StandIn, tmp_path: Path) -> None:
    path, shown = tmp_path / "model.bin", Shown()
    path.write_bytes(os.urandom(600_000))
    with Ssh(board.url, config=board.config, progress=shown) as machine:
        assert not shown.labels  # what is quick shows nothing
        board.bytes_per_s = 250_000
        assert Path(machine.put(path)).read_bytes() == path.read_bytes()
    assert shown.labels == ["upload model.bin to 127.0.0.1"]
    assert len(shown.said) == 100
    assert shown.said[0].endswith("kB/s")
    assert shown.said[-1].startswith("0.60 of 0.60 MB, ")


def test_the_disk_fills_up(board: StandIn, tmp_path: Path) -> None:
    board.write_program("python3", f'ulimit -f 1000; exec {board.python} "$@"')  # 512,000 bytes a file
    small, large = tmp_path / "small.bin", tmp_path / "large.bin"
    small.write_bytes(b"s" * 400_000)
    large.write_bytes(b"l" * 4_000_000)
    with Ssh(board.url, config=board.config) as machine:
        with pytest.raises(
            TargetError, match=r"large\.bin: the disk of 127\.0\.0\.1 is full: .*; make room: .* MB free"
        ):
            machine.put(large)
        assert Path(machine.put(small)).read_bytes() == small.read_bytes()  # the link still works
    assert not list(board.home.glob(".cache/compress/files/.*"))
    assert board.quiet()


def test_a_result_does_not_fit_the_disk(board: StandIn, tmp_path: Path) -> None:
    board.write_program("python3", f'ulimit -f 1000; exec {board.python} "$@"')  # 512,000 bytes a file
    model = convolutions(tmp_path / "a.onnx", layers=2)
    with Ssh(board.url, config=board.config) as machine:
        for images, fits in ((4, True), (20, False)):  # of 65,536 bytes
            with Path(machine.place("x.npy")).open("wb") as file:
                np.save(file, np.zeros((images, 16, 32, 32), np.float32))
            words = [f"--inputs={machine.place('x.npy')}", f"--outputs={machine.place('y.npy')}"]
            with contextlib.nullcontext() if fits else pytest.raises(TargetError, match=r"y\.npy.*File too large"):
                machine.ask(["run", machine.put(model), *words], about="images")
    assert board.quiet()


def test_everything_can_be_removed(board: StandIn, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"x" * 1_000_000)
    kept = board.home / ".cache/other"
    kept.mkdir(parents=True)
    with Ssh(board.url, config=board.config) as machine:
        machine.put(path)
    (board.home / ".cache/compress/not ours").write_bytes(b"x" * 5000)
    board.write_program("python3", f'ulimit -f 8; exec {board.python} "$@"')  # 4096 bytes: no room for the agent
    for freed in (1_000_000, 0):
        with Ssh(board.url, config=board.config) as machine:
            assert machine.remove() == freed
        assert board.quiet()
        assert [path.name for path in (board.home / ".cache/compress").iterdir()] == ["not ours"]
    (board.home / ".cache/compress/not ours").unlink()
    with Ssh(board.url, config=board.config) as machine:
        machine.remove()
    assert [path.name for path in (board.home / ".cache").iterdir()] == ["other"]


def test_what_a_board_computes_is_what_this_machine_computes(board: StandIn, tmp_path: Path) -> None:
    model = convolutions(tmp_path / "it's $HOME; a model.onnx", layers=3)
    images = np.random.default_rng(0).normal(size=(5, 16, 32, 32)).astype(np.float32)
    with Ssh(board.url, config=board.config) as machine:
        found = asking.answers(machine, model, images)
    expected = np.stack([asking.open_model(model).infer(image[None])[0][0] for image in images])
    np.testing.assert_array_equal(found.outputs_NK, expected)


# ------------------------------------------------------------------------------------------- the board's own part


def kept(base: Path, name: str, size: int, age_s: float) -> Path:
    path = base / "files" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def test_the_longest_unused_files_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(far_end, "KEPT_BYTES", 250)
    ages = {"new": 10, "recent": 3000, "old": 7200, "older": 9000, "oldest": 99999}
    paths = {name: kept(tmp_path, name, 100, age) for name, age in ages.items()}
    far_end.Board(tmp_path, "python3", print).end()
    assert [name for name, path in paths.items() if path.exists()] == ["new", "recent"]
    monkeypatch.setattr(far_end, "KEPT_BYTES", 0)
    far_end.Board(tmp_path, "python3", print).end()
    assert paths["new"].exists()  # another job may be using it
    assert paths["recent"].exists()


def test_room_is_made_of_files_that_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = kept(tmp_path, "old", 1000, 9000)
    board = far_end.Board(tmp_path, "python3", print)
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(far_end.shutil, "disk_usage", lambda path: real._replace(free=500))
    found = far_end.answered(board.open, {"sha256": "a" * 64, "suffix": ".onnx", "size": 1200})
    assert found == {"reply": {"path": None}}
    assert not old.exists()
    found = far_end.answered(board.open, {"sha256": "b" * 64, "suffix": ".onnx", "size": 5_000_000})
    assert found["error"]["kind"] == "full"
    assert "0 MB of " in found["error"]["disk"]
    board.end()


@pytest.mark.parametrize("locks", [True, False])
def test_what_a_dead_job_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool) -> None:
    """After a minute; after a day where a file system without locks does not tell who lives, and for uploads."""

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    if not locks:
        monkeypatch.setattr(far_end.fcntl, "flock", no_locks)
    living = far_end.Board(tmp_path, "python3", print)
    ages = {"yesterday": 100_000, "before": 90, "now": 30}
    parts = {name: kept(tmp_path, f".{name}.part", 10, age) for name, age in ages.items()}
    for name, age in ages.items():
        (tmp_path / "jobs" / name).mkdir()
        (tmp_path / "jobs" / name / "y.npy").touch()
        os.utime(tmp_path / "jobs" / name, (time.time() - age,) * 2)
    os.utime(living.job, (time.time() - (100_000 if locks else 80_000),) * 2)
    far_end.Board(tmp_path, "python3", print).end()
    left = {"now"} if locks else {"now", "before"}
    assert {path.name for path in (tmp_path / "jobs").iterdir()} == {*left, living.job.name}
    assert [name for name, part in parts.items() if part.exists()] == ["before", "now"]
    living.end()
    assert {path.name for path in (tmp_path / "jobs").iterdir()} == left


def test_files_that_vanish_while_room_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between listing and stat: renamed. Between stat and unlink: removed by another job."""
    board = far_end.Board(tmp_path, "python3", print)
    listed = kept(tmp_path, "listed", 100, 9000)
    removed = kept(tmp_path, "removed", 100, 9000)
    real_stat, real_unlink = Path.stat, Path.unlink

    def stat(path: Path, **options: bool) -> os.stat_result:
        if path == listed:
            path.unlink(missing_ok=True)
        return real_stat(path, **options)

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path == removed:
            real_unlink(path, missing_ok=True)
        real_unlink(path, missing_ok)

    with monkeypatch.context() as patched:
        patched.setattr(far_end, "KEPT_BYTES", 0)
        patched.setattr(Path, "stat", stat)
        patched.setattr(Path, "unlink", unlink)
        board.make_room(0)
    assert not list(board.files.iterdir())
    board.end()


def test_a_host_that_says_nothing_is_gone() -> None:
    read, write = os.pipe()
    with pytest.raises(far_end.HostGoneError):
        far_end.Inbox(read, silence_s=0.05).line()
    os.write(write, b"half a line")
    os.close(write)
    with pytest.raises(far_end.HostGoneError):
        far_end.Inbox(read).line()
    os.close(read)
