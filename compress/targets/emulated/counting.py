"""Instructions that one inference executes on an ARM core, counted by a plugin in the emulator; no time is involved.

What is counted is one call of `Model.infer` of the agent with one thread, after three others: the runtime's kernels,
feeding the input and fetching the outputs, and Python's share of the call. Start-up, loading and warm-up are not. The
call lies between two marks (`inside.py`, `counter.c`); what the marks cost is counted with nothing between them and
taken off, and what an empty Python function costs in the same place is reported as the overhead, not taken off.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress import locks
from compress.errors import TargetError
from compress.progress import Progress
from compress.targets import agent
from compress.targets.emulated.debian import PLACE, SOURCES, cache_folder
from compress.targets.emulated.qemu import Qemu
from compress.targets.emulated.userland import Userland
from compress.targets.machine import last_words

HERE = Path(__file__).parent
PROGRAM = HERE / "counter.c"
INSIDE = HERE / "inside.py"

WINDOWS = 3
OTHER_THREADS = 0.05
"""Largest part of the instructions that may run beside the counted thread before a count is refused: onnxruntime keeps
a thread that wakes now and then (0.1 % seen on a busy machine); a split inference would have near half."""

FIXED = {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
"""What would make one process differ from the next, or start threads."""


@dataclass(frozen=True)
class Block:
    """Instructions that are executed one after the other, as qemu translated them."""

    address: int
    count: int
    """How often one inference enters it."""
    words: tuple[int, ...]
    """The instructions' 32-bit encodings."""

    @property
    def executed(self) -> int:
        return self.count * len(self.words)


@dataclass(frozen=True)
class Count:
    instructions: int
    """Of one inference: the median of `WINDOWS` calls."""
    overhead_instructions: int
    """Of these, what calling an empty Python function takes."""
    spread_instructions: int
    """Largest minus smallest of the calls."""
    blocks: tuple[Block, ...]
    """Of one inference, those that executed most first; with the marks', some 5,000 instructions."""
    runtime: str
    version: str


def count(
    userland: Userland,
    plugin: Path,
    path: Path,
    cpu: str,
    *,
    runtime: str = "auto",
    image: Path | None = None,
    timeout_s: float = 900,
    stop: threading.Event | None = None,
) -> Count:
    """Instructions of one inference of the file on an emulated core. `image` is an .npy of real-valued images, of which
    the first is taken; without it the input is random and the same each time. Raises TargetError, also when another
    thread sets `stop`."""
    about = f"{path.name} on {PLACE}:{cpu}"
    words = [str(Path(agent.__file__)), str(path.absolute()), runtime, "--windows", str(WINDOWS)]
    if image:
        words += ["--inputs", str(image)]
    program = [str(INSIDE), *words]
    found, windows, blocks = counted(userland, plugin, cpu, program, about=about, timeout_s=timeout_s, stop=stop)
    if len(windows) < 3 * WINDOWS:
        raise TargetError(about, f"{len(windows)} windows were counted, not {3 * WINDOWS}")
    last = windows[-3 * WINDOWS :]  # those before are the warm-up's
    marks, empty, inference = (
        [own for own, _ in last[start : start + WINDOWS]] for start in range(0, len(last), WINDOWS)
    )
    beside = sum(others for _, others in last[-WINDOWS:])
    if beside > OTHER_THREADS * sum(inference):
        share = beside / (beside + sum(inference))
        raise TargetError(about, f"{share:.1%} of its instructions ran in other threads", "no count of one thread")
    cost = statistics.median(marks)
    return Count(
        instructions=round(statistics.median(inference) - cost),
        overhead_instructions=round(statistics.median(empty) - cost),
        spread_instructions=max(inference) - min(inference),
        blocks=blocks,
        runtime=found["runtime"],
        version=found["version"],
    )


def count_each(
    userland: Userland, plugin: Path, paths: Sequence[Path], cpu: str, runtime: str, *, stop: threading.Event
) -> tuple[list[tuple[Block, ...]], str]:
    """For each file the blocks of one inference, all in one process, and the runtime's version. Raises TargetError."""
    about = f"{len(paths)} files on {PLACE}:{cpu}"
    with tempfile.TemporaryDirectory(prefix="compress-") as folder:
        listed, out = Path(folder) / "list.json", Path(folder) / "counts"
        listed.write_text(json.dumps([str(path.absolute()) for path in paths]))
        program = [str(INSIDE), str(Path(agent.__file__)), str(listed), runtime, "--each"]
        answer = _run(userland, plugin, cpu, program, out, about=about, timeout_s=900, stop=stop)
        found = []
        for number in range(1, len(paths) + 1):
            windows, blocks = _read(Path(f"{out}.{number}"), about)
            own, others = windows[-1]
            if others > OTHER_THREADS * own:
                share = others / (own + others)
                raise TargetError(about, f"{share:.1%} of its instructions ran in other threads", "run it again")
            found.append(blocks)
    return found, json.loads(answer.splitlines()[-1])["version"]


def counted(
    userland: Userland,
    plugin: Path,
    cpu: str,
    arguments: Sequence[str],
    *,
    about: str,
    timeout_s: float = 900,
    stop: threading.Event | None = None,
) -> tuple[dict[str, Any], list[tuple[int, int]], tuple[Block, ...]]:
    """What a Python program prints last, its windows (own, other threads' instructions) and its blocks.

    Raises TargetError about `about`.
    """
    with tempfile.TemporaryDirectory(prefix="compress-") as folder:
        out = Path(folder) / "counts"
        answer = _run(userland, plugin, cpu, arguments, out, about=about, timeout_s=timeout_s, stop=stop)
        windows, blocks = _read(out, about)
    return json.loads(answer.splitlines()[-1]), windows, blocks


def _run(
    userland: Userland,
    plugin: Path,
    cpu: str,
    arguments: Sequence[str],
    out: Path,
    *,
    about: str,
    timeout_s: float,
    stop: threading.Event | None,
) -> str:
    """What the emulated Python program prints; the plugin writes to `out`."""
    options = ["-plugin", f"{plugin},out={out}"]
    command = [*userland.python(cpu, qemu_options=options), "-P", *arguments]
    environment = {**userland.environment, **FIXED}
    return _finished(command, environment, about, timeout_s, stop or threading.Event())


def _read(path: Path, about: str) -> tuple[list[tuple[int, int]], tuple[Block, ...]]:
    """The windows and the blocks that the plugin wrote, those that executed most first."""
    lines = path.read_text().splitlines() if path.exists() else []
    if lines[-1:] != ["end"]:
        raise TargetError(about, "the emulator's plugin wrote no counts", "is its qemu newer than this program?")
    windows, blocks = [], []
    for line in lines[:-1]:
        kind, *values = line.split()
        if kind == "window":
            windows.append((int(values[0]), int(values[1])))
        else:
            text = values[2]
            code = tuple(int(text[i : i + 8], 16) for i in range(0, len(text), 8))
            blocks.append(Block(int(values[0], 16), int(values[1]), code))
    blocks.sort(key=lambda block: (-block.executed, block.address))
    return windows, tuple(blocks)


def _finished(
    command: Sequence[str], environment: Mapping[str, str], about: str, timeout_s: float, stop: threading.Event
) -> str:
    """What the command prints. It has ended when this returns or raises."""
    pipe, end = subprocess.PIPE, time.monotonic() + timeout_s
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        try:
            while True:
                try:
                    answer, errors = process.communicate(timeout=0.3)
                    break
                except subprocess.TimeoutExpired as error:
                    if stop.is_set():
                        raise TargetError(about, "was stopped") from error
                    if time.monotonic() > end:
                        raise TargetError(about, f"no count within {timeout_s:g} s") from error
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise TargetError(about, last_words(errors.splitlines()))
    return answer


def plugin(qemu: Qemu, progress: Progress) -> Path:
    """The plugin for this emulator, compiled on its first use into the cache. Raises TargetError without a compiler,
    and for an emulator that loads none."""
    if not qemu.plugins:
        raise TargetError(
            PLACE,
            f"{qemu.path} is qemu {qemu.version} without plugins, which count the instructions",
            f"install one that loads them (Debian 12's qemu-user does), or name Debian 12 in {SOURCES}",
        )
    key = agent.sha256(PROGRAM)[:12]
    path = cache_folder() / f"counter-{key}-{qemu.plugin_interface}.so"
    with locks.held(path.with_suffix(".lock"), place=path.stem, waiting=progress):
        if not path.is_file():
            partial = path.with_suffix(".partial")
            flags = ["-O2", "-shared", "-fPIC", "-fvisibility=hidden", f"-DPLUGIN_VERSION={qemu.plugin_interface}"]
            command = [*compiler(), *flags, "-o", str(partial), str(PROGRAM)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise TargetError(
                    PROGRAM.name, f"{command[0]} does not compile it: {last_words(done.stderr.splitlines())}"
                )
            os.replace(partial, path)
    return path


def compiler() -> list[str]:
    """argv of a C compiler for this machine: that of CC, cc, gcc, clang, or PyPI's ziglang. Raises TargetError."""
    if named := os.environ.get("CC"):
        return shlex.split(named)
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return [path]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc"]
    raise TargetError(
        PROGRAM.name, "no C compiler for the plugin that counts", "sudo apt-get install gcc, or pip install ziglang"
    )
