"""`--setup`: an environment of ours on the board. What is installed are small packages under the real ones' names."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
import zipfile
from pathlib import Path

import pytest
from stand_in import Shown, StandIn, stand_in

from compress.errors import TargetError
from compress.targets import board as far_end
from compress.targets.ssh import Ssh

board = pytest.fixture(stand_in)

PACKAGES = {"numpy": "numpy", "onnxruntime": "onnxruntime", "ai-edge-litert": "ai_edge_litert"}


def wheel(folder: Path, package: str, text: str = "") -> Path:
    module = PACKAGES[package]
    info = f"{module}-1.0.dist-info"
    files = {
        f"{module}/__init__.py": text or "__version__ = '1.0'",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    path = folder / f"{module}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def wheels(board: StandIn, tmp_path: Path) -> Path:
    """What the board's pip finds; its python3 has no packages."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    board.environment |= {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)}
    board.write_program("python3", f'exec {board.python} -S "$@"')
    for package in PACKAGES:
        wheel(folder, package)
    return folder


def model(tmp_path: Path, suffix: str) -> Path:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"any")
    return path


def test_the_whole_way(board: StandIn, wheels: Path, tmp_path: Path) -> None:
    """Cut, and gone on with; used without --setup later; another runtime when a file needs it; nothing left of it."""
    shown = Shown()
    board.watch = lambda way, seen: way == "out" and b"virtual environment" in seen
    with (
        pytest.raises(TargetError, match=r"the connection to 127\.0\.0\.1 dropped"),
        Ssh(board.url, config=board.config, setup=True, runtimes=["litert"], progress=shown),
    ):
        pass
    assert board.quiet()
    board.watch = lambda way, seen: False
    shown = Shown()
    with Ssh(board.url, config=board.config, setup=True, runtimes=["litert"], progress=shown) as machine:
        assert machine.put(model(tmp_path, ".tflite"))
        found = machine.ask(["probe"], about="probe")
        assert found["python_path"].startswith(f"{board.home}/.cache/compress/venv-3.")
        assert found["numpy"] == "1.0"
    assert shown.labels == ["set up 127.0.0.1"]
    assert shown.said == ["virtual environment", "numpy", "ai-edge-litert"]

    for path in wheels.iterdir():
        path.rename(tmp_path / path.name)  # what is there is not installed again
    with Ssh(board.url, config=board.config, setup=True, runtimes=["litert"], progress=shown):
        pass
    assert shown.said[3:] == ["numpy", "ai-edge-litert"]
    with Ssh(board.url, config=board.config) as machine:
        assert machine.put(model(tmp_path, ".tflite"))
        with pytest.raises(TargetError, match="has no onnxruntime; --setup installs it"):
            machine.put(model(tmp_path, ".onnx"))

    for path in tmp_path.glob("*.whl"):
        path.rename(wheels / path.name)
    with Ssh(board.url, config=board.config, setup=True, progress=shown) as machine:
        assert machine.put(model(tmp_path, ".onnx"))
        assert sorted(machine._there["runtimes"]) == ["litert", "onnxruntime"]

    # pip was stopped in the middle of a package
    [module] = board.home.glob(".cache/compress/venv-*/lib/python*/site-packages/onnxruntime/__init__.py")
    whole = module.read_text()
    module.write_text("raise ImportError('half of it')")
    with Ssh(board.url, config=board.config, setup=True, runtimes=["onnxruntime"]):
        assert module.read_text() == whole

    assert board.quiet()
    assert [path.name for path in board.home.iterdir()] == [".cache"]
    assert [path.name for path in (board.home / ".cache").iterdir()] == ["compress"]
    with Ssh(board.url, config=board.config) as machine:
        machine.remove()
    assert not list(board.home.glob(".cache/*"))


def test_one_at_a_time(board: StandIn, wheels: Path) -> None:
    """The second waits for the first, and finds what that has made."""
    shown = [Shown(), Shown()]
    errors: list[BaseException] = []

    def set_up(progress: Shown) -> None:
        try:
            with Ssh(board.url, config=board.config, setup=True, runtimes=["litert"], progress=progress) as machine:
                assert machine._there["runtimes"] == ["litert"]
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=set_up, args=(progress,)) for progress in shown]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors
    first, second = sorted(shown, key=lambda progress: len(progress.notes))
    assert (first.said, first.notes) == (["virtual environment", "numpy", "ai-edge-litert"], [])
    assert (second.said, second.notes) == (["numpy", "ai-edge-litert"], ["127.0.0.1: waiting for another set-up"])
    assert board.quiet()


def test_a_set_up_that_waits_can_be_stopped(board: StandIn, wheels: Path) -> None:
    class Impatient(Shown):
        def note(self, text: str) -> None:
            raise KeyboardInterrupt

    lock = board.home / ".cache/compress/setup.lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        began = time.monotonic()
        with (
            pytest.raises(KeyboardInterrupt),
            Ssh(board.url, config=board.config, setup=True, runtimes=["litert"], progress=Impatient()),
        ):
            pass
        assert time.monotonic() - began < 10
        assert board.quiet()
    assert not list(lock.parent.glob("venv*"))


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(far_end.fcntl, "flock", no_locks)
    board = far_end.Board(tmp_path, "python3", print)
    monkeypatch.setattr(board, "_made", lambda request: {"made": request})
    assert board.setup({"runtimes": []}) == {"made": {"runtimes": []}}
    board.end()


def failing(board: StandIn) -> str:
    with (
        pytest.raises(TargetError) as raised,
        Ssh(board.url, config=board.config, setup=True, runtimes=["onnxruntime"]),
    ):
        pass
    assert board.quiet()
    assert len(str(raised.value).splitlines()) == 1
    return str(raised.value)


def test_what_can_fail(board: StandIn, wheels: Path) -> None:
    next(wheels.glob("onnxruntime*")).unlink()
    assert "No matching distribution found for onnxruntime" in failing(board)

    wheel(wheels, "onnxruntime", "raise ImportError('libgomp.so.1: cannot open shared object file')")
    text = failing(board)
    assert "ImportError: libgomp.so.1: cannot open shared object file; by hand, there: " in text

    wheel(wheels, "onnxruntime", "#" * 3_000_000)
    board.write_program("python3", f'ulimit -f 2000; exec {board.python} -S "$@"')  # 1 MB a file
    text = failing(board)
    assert "the disk of 127.0.0.1 is full" in text
    assert "make room: " in text


def test_debian_without_python3_venv(board: StandIn, wheels: Path) -> None:
    hidden = "import sys; sys.modules['ensurepip'] = None; c = sys.argv.pop(); exec(c)"
    isolated = f'[ "$1" = -I ] && exec {board.python} -S -c "{hidden}" "$@"'
    board.write_program("python3", isolated, f'exec {board.python} -S "$@"')
    text = failing(board)
    assert "Python there has no module venv; install it there; Debian: sudo apt install python3-venv" in text
    assert not list(board.home.glob(".cache/compress/venv*"))


def test_nothing_is_installed_without_it(board: StandIn, wheels: Path, tmp_path: Path) -> None:
    with Ssh(board.url, config=board.config, runtimes=["litert"]) as machine, pytest.raises(TargetError):
        machine.put(model(tmp_path, ".tflite"))
    assert {path.name for path in board.home.glob(".cache/compress/*")} == {"files", "jobs"}
