"""The agent on a board: what it says arrives, and it ends when nobody wants it any more."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from stacks import convolutions
from stand_in import StandIn, stand_in

from compress.errors import TargetError
from compress.targets import Measuring, asking
from compress.targets.ssh import Ssh

board = pytest.fixture(stand_in)

QUICK = Measuring(rounds=1, runs=3, warmup_s=0.0, tolerance=10.0)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    return asking.by_name([convolutions(folder / f"{n}.onnx", layers=n) for n in (2, 3)])


@pytest.fixture
def run(board: StandIn, tmp_path: Path) -> Any:
    """Runs a program on the board in the agent's place."""

    def run(text: str, **options: Any) -> dict[str, Any]:
        (tmp_path / "program.py").write_text(text)
        with Ssh(board.url, config=board.config) as machine:
            machine._agent = machine.put(tmp_path / "program.py")
            return machine.ask([], about="a program", **options)

    return run


def counted(path: Path) -> list[str]:
    """The processes in a journal."""
    return path.read_text().splitlines()[1:] if path.exists() else []


# ------------------------------------------------------------------------------------------------- what it says


def test_events_come_while_it_runs_and_the_last_line_is_the_result(board: StandIn, run: Callable[..., Any]) -> None:
    heard: list[tuple[float, Any]] = []
    text = """
import json, time
for n in range(3):
    print(json.dumps({"point": n}), flush=True)
    time.sleep(0.4)
print(json.dumps({"sum": 3}))
"""
    assert run(text, on_line=lambda line: heard.append((time.monotonic(), line))) == {"sum": 3}
    assert [line for _, line in heard] == [{"point": 0}, {"point": 1}, {"point": 2}]
    assert heard[2][0] - heard[0][0] > 0.5
    assert board.quiet()


def test_chatter_between_is_no_answer_and_long_lines_arrive_whole(run: Callable[..., Any]) -> None:
    text = """
import json, os, sys
print("Welcome"); print("[1, 2]"); print("17"); print("{not json"); print('{"reply": {"status": 1}}'); print()
sys.stdout.flush(); os.write(1, bytes(range(128, 256)) + b"\\n")
print(json.dumps({"process": {"x": "y" * 5_000_000}}))
print("warning " * 100_000, file=sys.stderr)
print(json.dumps({"z": "z" * 3_000_000}))
print("Created delegate")
"""
    heard: list[dict[str, Any]] = []
    assert run(text, on_line=heard.append) == {"z": "z" * 3_000_000}
    assert heard == [{"process": {"x": "y" * 5_000_000}}]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("import sys; print('agent: error: no such thing', file=sys.stderr); sys.exit(1)", "a program: no such thing"),
        ("import sys; print('agent: error: x: No space left on device', file=sys.stderr); sys.exit(1)", "make room: "),
        ("print('{}')", None),
        ("", "the agent ended without a result"),
        ("import sys; sys.exit(3)", "no message"),
        ("import os; os.kill(os.getpid(), 9)", "the agent was ended by SIGKILL; its last message: no message"),
        ("import os; os.abort()", "the agent was ended by SIGABRT"),
        ("import sys; sys.exit(137)", "the agent was ended by SIGKILL"),
        ("import sys; sys.exit(__file__ + ': cannot be opened')", "a program: program.py: cannot be opened"),
    ],
)
def test_how_it_may_end(run: Callable[..., Any], board: StandIn, text: str, says: str | None) -> None:
    if says is None:
        assert run(text) == {}
    else:
        with pytest.raises(TargetError) as raised:
            run(text)
        assert says in str(raised.value)
        assert len(str(raised.value).splitlines()) == 1
    assert board.quiet()


def test_a_file_that_cannot_be_opened_is_called_as_the_user_calls_it(board: StandIn, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    paths = [tmp_path / "broken.onnx", tmp_path / "other/broken.onnx"]
    for path in paths:
        path.write_bytes(os.fsencode(path))
    with Ssh(board.url, config=board.config) as machine:
        for path, shown in zip(paths, ("broken.onnx", str(paths[1])), strict=True):
            there = machine.put(path)
            with pytest.raises(TargetError) as raised:
                machine.ask(["time", there], about="benchmark on the board")
            assert str(raised.value).startswith(f"benchmark on the board: {shown}: onnxruntime cannot open it")
            assert Path(there).stem not in str(raised.value)
        with pytest.raises(TargetError, match=rf"^{paths[1]}: onnxruntime cannot open it"):  # named once
            machine.ask(["time", there], about=str(paths[1]))
        said = machine._with_names(f"process 2 of 9: {Path(there).name} on onnxruntime", "benchmark")
        assert said == f"process 2 of 9: {paths[1]} on onnxruntime"


def test_memory_that_ran_out_is_named(board: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel counts it; the process that it ended may be the agent's, which says so in its own words."""
    machine = Ssh(board.url, config=board.config)
    with pytest.raises(TargetError, match="the board ran out of memory and its kernel ended a process: no message"):
        machine._check({"status": -9, "killed_for_memory": True, "disk": ""}, "x", "no message")


def test_silence_has_an_end(run: Callable[..., Any], board: StandIn) -> None:
    with pytest.raises(TargetError, match="a program: the board said nothing for 1 s"):
        run("import subprocess; subprocess.run(['sleep', '100'])", timeout_s=1)
    assert board.quiet()


# --------------------------------------------------------------------------------------------- nobody wants it more


FAMILY = """
import json, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
open(sys.argv[0] + ".txt", "w").close()
print(json.dumps({"point": child.pid}), flush=True)
time.sleep(100)
"""
"""Does not heed SIGTERM, and has a child."""


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_an_exception_here_ends_it_there(board: StandIn, run: Callable[..., Any], error: type[BaseException]) -> None:
    def stop(_: dict[str, Any]) -> None:
        raise error("enough")

    with pytest.raises(error, match="enough"):
        run(FAMILY, on_line=stop)
    assert board.quiet()


def test_after_it_was_stopped_the_board_can_be_asked_again(board: StandIn, tmp_path: Path) -> None:
    (tmp_path / "family.py").write_text(FAMILY)

    def stop(_: dict[str, Any]) -> None:
        raise RuntimeError

    with Ssh(board.url, config=board.config) as machine:
        own, machine._agent = machine._agent, machine.put(tmp_path / "family.py")
        assert own == ""  # the agent itself comes when it is first asked
        for _ in range(2):
            with pytest.raises(RuntimeError):
                machine.ask([], about="x", on_line=stop)
            assert not any("sleep" in line for line in board.living())
        machine._agent = own
        assert machine.ask(["probe"], about="probe")["bits"] == 64
    assert board.quiet()


def end(board: StandIn, wanted: str, number: int = signal.SIGKILL) -> bool:
    """Whether a process of the board, which this ends, had a command line with `wanted` in it."""
    ended = False
    for path in Path("/proc").glob("[0-9]*"):
        try:
            here = f"HOME={board.home}".encode() in (path / "environ").read_bytes().split(b"\0")
            if here and re.search(wanted.encode(), (path / "cmdline").read_bytes().replace(b"\0", b" ")):
                os.kill(int(path.name), number)
                ended = True
        except OSError:
            continue
    return ended


def end_once_there(board: StandIn, wanted: str) -> None:
    """Ends such a process as soon as it runs, within two minutes."""
    until = time.monotonic() + 120
    while not end(board, wanted) and time.monotonic() < until:
        time.sleep(0.1)


def test_the_agent_is_killed(board: StandIn, files: dict[str, Path], tmp_path: Path) -> None:
    journal, heard = tmp_path / "journal.jsonl", list[str]()

    def kill(said: str) -> None:
        heard.append(said)
        if len(heard) == 1:
            end(board, r"\.py compare ")

    with (
        Ssh(board.url, config=board.config) as machine,
        pytest.raises(TargetError, match=r"the agent was ended by SIGKILL.*; run the same command again"),
    ):
        asking.compare(machine, files, QUICK, journal=journal, on_process=kill)
    assert board.quiet()
    assert len(counted(journal)) >= 1
    resumed(board, files, journal)


def test_a_process_of_the_agent_is_killed(board: StandIn, files: dict[str, Path], tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    slow = Measuring(rounds=1, runs=3, warmup_s=0.0, min_s=2.0)
    with Ssh(board.url, config=board.config) as machine:
        ending = threading.Thread(target=end_once_there, args=(board, r"\.py time "))
        ending.start()
        with pytest.raises(TargetError, match="its process was ended by SIGKILL"):
            asking.compare(machine, files, slow, journal=journal)
        ending.join()
    assert board.quiet()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_the_far_end_is_killed(board: StandIn, files: dict[str, Path], number: int) -> None:
    with (
        Ssh(board.url, config=board.config) as machine,
        pytest.raises(TargetError, match=r"the connection to 127\.0\.0\.1 dropped|ended with status|ended by SIGTERM"),
    ):
        asking.compare(machine, files, QUICK, on_process=lambda said: end(board, "import sys; i = sys.stdin", number))
    until = time.monotonic() + 15
    while board.living() and time.monotonic() < until:
        time.sleep(0.05)
    assert not board.living()
    if number != signal.SIGKILL:
        assert not board.left()


def test_ssh_is_killed(board: StandIn, files: dict[str, Path], tmp_path: Path) -> None:
    with Ssh(board.url, config=board.config) as machine:

        def kill(said: str) -> None:
            machine._link._process.kill()

        with pytest.raises(TargetError, match=r"the connection to 127\.0\.0\.1 dropped"):
            asking.compare(machine, files, QUICK, on_process=kill)
        with pytest.raises(TargetError, match=r"the connection to 127\.0\.0\.1 dropped"):
            machine.put(files["2.onnx"])
    assert board.quiet()


# ------------------------------------------------------------------------------------------------ a cut connection


def resumed(board: StandIn, files: dict[str, Path], journal: Path) -> None:
    """A second attempt measures what the first has not, and nothing else."""
    total, kept = len(QUICK.slots(files)), counted(journal)
    measured: list[dict[str, Any]] = []

    class Watched(Ssh):
        def ask(self, arguments: Any, *, about: str, on_line: Any = None, timeout_s: float = 900) -> dict[str, Any]:
            def hear(line: dict[str, Any]) -> None:
                measured.append(line)
                on_line(line)

            return super().ask(arguments, about=about, on_line=on_line and hear, timeout_s=timeout_s)

    with Watched(board.url, config=board.config) as machine:
        found = asking.compare(machine, files, QUICK, journal=journal)
    assert len(measured) == total - len(kept)
    assert len(found.samples) == total
    assert [row["file"] for row in found.rows] == list(files)
    assert not journal.exists()
    assert board.quiet()


@pytest.mark.parametrize("after", [0, 1, 2])
def test_what_was_measured_before_a_cut_is_kept(
    board: StandIn, files: dict[str, Path], tmp_path: Path, after: int
) -> None:
    journal = tmp_path / "journal.jsonl"
    heard: list[str] = []

    def cut(way: str, seen: bytes) -> bool:
        return way == "out" and len(heard) >= after and seen.count(b'\\"process\\"') > after

    board.watch = cut
    with (
        pytest.raises(
            TargetError,
            match=r"the connection to 127\.0\.0\.1 dropped.*; run the same command again",
        ),
        Ssh(board.url, config=board.config) as machine,
    ):
        asking.compare(machine, files, QUICK, journal=journal, on_process=heard.append)
    assert board.quiet()
    assert len(counted(journal)) in (after, after + 1)  # the line in which it was cut may have come through
    board.watch = lambda way, seen: False
    resumed(board, files, journal)


@pytest.mark.parametrize("size", [1, 500, 20_000, 40_000, 75_000])
def test_a_cut_while_something_is_sent(board: StandIn, files: dict[str, Path], tmp_path: Path, size: int) -> None:
    """In the program, in the agent, in a request: at any byte."""
    board.watch = lambda way, seen: way == "in" and len(seen) >= size
    with (
        pytest.raises(TargetError, match=r"the connection to 127\.0\.0\.1 dropped"),
        Ssh(board.url, config=board.config) as machine,
    ):
        asking.compare(machine, files, QUICK, journal=tmp_path / "journal.jsonl")
    assert board.quiet()
    assert not list(board.home.glob(".cache/compress/files/.*"))
    board.watch = lambda way, seen: False
    with Ssh(board.url, config=board.config) as machine:
        assert Path(machine.put(files["2.onnx"])).read_bytes() == files["2.onnx"].read_bytes()


def test_a_cut_while_a_result_is_fetched(board: StandIn, tmp_path: Path) -> None:
    with Ssh(board.url, config=board.config) as machine:
        Path(machine.place("y")).write_bytes(bytes(5_000_000))
        board.watch = lambda way, seen: way == "out" and len(seen) >= 2_000_000
        with pytest.raises(TargetError, match=r"the connection to 127\.0\.0\.1 dropped"):
            machine.get("y", tmp_path / "y")
    assert board.quiet()
    assert not list(tmp_path.glob("y*"))


# ---------------------------------------------------------------------------------------------------- what it finds


def test_a_timer_that_is_not_to_be_trusted(board: StandIn, files: dict[str, Path]) -> None:
    """Every third process takes twice the time: the control, which is the baseline once more."""
    clock = "import runpy, sys, time; c = time.perf_counter_ns; time.perf_counter_ns = lambda: 2 * c();"
    start = "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    board.write_program(
        "python3",
        f'case "$*" in *".py time "*) echo >>{board.home}/count; n=$(cat {board.home}/count | wc -l)',
        f'[ $((n % 3)) = 0 ] && exec {board.python} -c "{clock} {start}" "$@";; esac',
        f'exec {board.python} "$@"',
    )
    (board.programs / "wc").symlink_to("/usr/bin/wc")
    careful = Measuring(rounds=2, runs=30, warmup_s=0.1, tolerance=0.3)
    with Ssh(board.url, config=board.config) as machine:
        found = asking.compare(machine, files, careful)
    assert [pair["verdict"] for pair in found.pairs] == ["NOISY"]
    assert 0.3 < found.pairs[0]["aa_ratio"] < 0.77
    assert "the baseline against itself" in found.pairs[0]["reasons"][-1]


def test_a_board_without_numpy(board: StandIn, files: dict[str, Path]) -> None:
    board.write_program("python3", f'exec {board.python} -S "$@"')
    with Ssh(board.url, config=board.config) as machine:
        found = machine.ask(["probe"], about="probe")
        assert found["numpy"] == "unavailable"
        assert set(found["runtimes"].values()) == {"unavailable"}
        with pytest.raises(TargetError, match=r"has no numpy and no onnxruntime; --setup installs it .* install numpy"):
            machine.put(files["2.onnx"])


def test_a_board_without_the_runtime(board: StandIn, files: dict[str, Path], tmp_path: Path) -> None:
    hidden = "import sys, runpy; sys.modules['onnxruntime'] = None; c = sys.argv.pop(1); exec(c)"
    board.write_program(
        "python3", f'[ "$1" = -c ] && shift && exec {board.python} -c "{hidden}" "$@"; exec {board.python} "$@"'
    )
    with Ssh(board.url, config=board.config) as machine:
        with pytest.raises(TargetError, match=r"has no onnxruntime; --setup installs it .* pip install onnxruntime"):
            machine.put(files["2.onnx"])
        (tmp_path / "any.tflite").write_bytes(b"x")
        assert machine.put(tmp_path / "any.tflite")
