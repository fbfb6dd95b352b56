"""The far end of an ssh connection: keeps files on the board, makes the environment there, runs the agent.

`ssh.py` sends this file as text to `python3` on the board, one process per connection, and talks to it over its
standard streams. So nothing of a recipe or a file's name is ever part of a command line: it travels as JSON. It needs
Python 3.9 and nothing but its standard library.

A request is a line with a JSON object, `{"op": ...}`; `data` is followed by as many bytes as it says. Every request
but `stop` and `leave` has one reply, `{"reply": ...}` or `{"error": ...}`; before it `ask`, `setup` and `fetch` send
lines of their own. An empty line says that the host is alive. Each line to the host begins with a token of the
connection, so that nothing else that writes to the same stream is taken for an answer.

When the connection ends, for whatever reason, the agent is ended and the job's folder removed: no orphan stays.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import re
import select
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

SILENCE_S = 180
"""The host is gone when it has said nothing for so long: it says something every 20 s."""

DAY_S = 86_400
FRESH_S = 60
"""A job takes its lock within this time of its folder's making."""
KEPT_BYTES = 1 << 30
"""Of files kept for the next time; the longest unused go first."""
RECENT_S = 3600
"""A file used within this time may be in use by another host's job: it is not removed for room."""
BLOCK = 1 << 16
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

SETUP_LOCK = "setup.lock"
LOCK_WAIT_S = 0.2
"""Between two attempts at a lock that another process holds."""
WAITING = "waiting for another set-up"
WAITING_S = 60
"""How often that is said: the host takes silence for a fault."""

PACKAGES = {"onnxruntime": ("onnxruntime",), "litert": ("ai_edge_litert", "tflite_runtime"), "ncnn": ("ncnn",)}
"""Modules that provide a runtime, as in `agent.py`."""
INSTALL = {"onnxruntime": "onnxruntime", "litert": "ai-edge-litert", "ncnn": "ncnn"}

PIP = (
    *("-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--progress-bar=off"),
    "--no-cache-dir",  # what is downloaded is installed: a second copy would fill small cards
    "--only-binary=:all:",  # a compiler would run for hours here, and end out of memory
)

FACTS = """
import importlib.util, json, sys
names = sys.argv[1].split()
print(json.dumps([name for name in names if importlib.util.find_spec(name)]))
"""


class HostGoneError(Exception):
    """The connection ended, or the host has been silent for too long."""


class RefusedError(Exception):
    """What the board cannot do: `kind` for the host's words, and facts."""

    def __init__(self, kind: str, text: str = "", **facts: Any) -> None:
        super().__init__(text)
        self.facts = {"kind": kind, "text": text, **facts}


class Inbox:
    """What the host says. Read without Python's buffers, so that waiting can have an end."""

    def __init__(self, stream: int, silence_s: float = SILENCE_S) -> None:
        self.stream, self.silence_s = stream, silence_s
        self.pending = bytearray()

    def line(self) -> bytes:
        while (end := self.pending.find(b"\n")) < 0:
            self._more()
        return self._taken(end + 1)

    def block(self, size: int) -> bytes:
        while len(self.pending) < size:
            self._more()
        return self._taken(size)

    def _taken(self, size: int) -> bytes:
        found = bytes(self.pending[:size])
        del self.pending[:size]
        return found

    def _more(self) -> None:
        if not select.select([self.stream], [], [], self.silence_s)[0]:
            raise HostGoneError
        block = os.read(self.stream, BLOCK)
        if not block:
            raise HostGoneError
        self.pending += block


class Outbox:
    """Lines to the host, from any thread; what it does not take any more is lost."""

    def __init__(self, stream: int, token: str) -> None:
        self.stream, self.token = stream, token
        self.lock = threading.Lock()

    def say(self, message: dict[str, Any]) -> None:
        rest = memoryview((self.token + json.dumps(message) + "\n").encode())
        with self.lock, contextlib.suppress(OSError):
            while rest:
                rest = rest[os.write(self.stream, rest) :]


class Board:
    """The job of one connection, in its own folder below `base`."""

    def __init__(self, base: Path, python: str, say: Callable[[dict[str, Any]], None]) -> None:
        self.base, self.python, self.say = base, python, say
        self.files, self.jobs = base / "files", base / "jobs"
        for folder in (self.files, self.jobs):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._remove_leftovers()
        self.job = Path(tempfile.mkdtemp(dir=self.jobs))
        self.lock = os.open(self.job, os.O_RDONLY)  # held, and with it the lock, as long as this process lives
        _lock(self.lock)
        self.venv = base / f"venv-{sys.version_info[0]}.{sys.version_info[1]}"
        self.used: set[Path] = set()
        self.upload: Upload | None = None
        self.running: subprocess.Popen[bytes] | None = None
        self.stopped = False
        self.worker: threading.Thread | None = None
        self.make_room(0)

    def _remove_leftovers(self) -> None:
        """What a board that lost power in the middle of a job, or whose memory ran out, has kept of it.

        A living job holds a lock. Where the file system has no locks, and for uploads, which hold none, a day decides.
        """
        now = time.time()
        for path in self.files.glob(".*.part"):
            with contextlib.suppress(OSError):
                if now - path.stat().st_mtime > DAY_S:
                    path.unlink()
        for path in self.jobs.iterdir():
            with contextlib.suppress(OSError):
                age_s = now - path.stat().st_mtime
                if age_s > FRESH_S:  # else our attempt may come between the job and its lock
                    self._remove_unless_living(path, age_s)

    def _remove_unless_living(self, job: Path, age_s: float) -> None:
        handle = os.open(job, os.O_RDONLY)
        try:
            dead = _lock(handle)
            if dead or (dead is None and age_s > DAY_S):
                _remove(job)
        finally:
            os.close(handle)

    # ------------------------------------------------------------------------------------------------ files

    def open(self, request: dict[str, Any]) -> dict[str, Any]:
        """Whether the file is here, whole; else its bytes are awaited."""
        path = self.files / (request["sha256"] + request["suffix"])
        self.used.add(path)
        if path.is_file() and path.stat().st_size == request["size"] and _sha256(path) == request["sha256"]:
            os.utime(path)  # used now: the last to be removed for room
            return {"path": str(path)}
        self.make_room(request["size"])
        self.upload = Upload(path, request["size"])
        return {"path": None}

    def data(self, block: bytes) -> dict[str, Any]:
        if self.upload is None:  # it failed before: the host has not heard of it yet
            raise RefusedError("upload")
        try:
            self.upload.add(block)
        except OSError:
            self.upload.forget()
            self.upload = None
            raise
        return {"received": self.upload.received}

    def close(self, request: dict[str, Any]) -> dict[str, Any]:
        if self.upload is None:
            raise RefusedError("upload")
        upload, self.upload = self.upload, None
        try:
            return {"path": upload.finished(request["sha256"])}
        finally:
            upload.forget()

    def fetch(self, request: dict[str, Any]) -> dict[str, Any]:
        """Sends a result of this job, as base64."""
        hashed = hashlib.sha256()
        with (self.job / request["name"]).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            while block := file.read(48 * 1024):
                hashed.update(block)
                self.say({"data": base64.b64encode(block).decode(), "size": size})
        return {"sha256": hashed.hexdigest()}

    def make_room(self, size: int) -> None:
        """Removes the longest unused files: down to the limit, and further where `size` bytes would not fit."""
        free = shutil.disk_usage(self.files).free
        found = []
        for path in self.files.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another job's upload has got its name, or is given up
                facts = path.stat()
                found.append((facts.st_mtime, facts.st_size, path))
        found.sort()
        kept = sum(length for _, length, _ in found)
        for used, length, path in found:
            if kept + size <= KEPT_BYTES and size <= free:
                return
            if path not in self.used and time.time() - used > RECENT_S:
                with contextlib.suppress(FileNotFoundError):  # another job makes room as well
                    path.unlink()
                    kept, free = kept - length, free + length
        if size > free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.files))

    def remove(self) -> dict[str, Any]:
        """Removes everything of ours, also what other jobs use; nothing can be asked after it.

        `bytes` counts the files that are gone, not their folders.
        """
        ours = (self.files, self.jobs, *self.base.glob("venv-*"), self.base / SETUP_LOCK)
        size = sum(_bytes(path) for path in ours)
        for path in ours:
            _remove(path)
        size -= sum(_bytes(path) for path in ours)
        with contextlib.suppress(OSError):  # not empty: what else lies there is not ours
            self.base.rmdir()
        return {"bytes": size}

    # ---------------------------------------------------------------------------------------------- programs

    def begun(self) -> dict[str, Any]:
        ours = self.venv / "bin" / "python"
        modules = self.modules(str(ours)) if (self.venv / "made").exists() else None
        if modules is not None:
            self.python = str(ours)
        else:
            modules = self.modules(self.python)
        return {"job": str(self.job), **self._environment(modules)}

    def _environment(self, modules: list[str] | None) -> dict[str, Any]:
        runtimes = [name for name, known in PACKAGES.items() if set(known) & set(modules or [])]
        return {"python": self.python, "runtimes": runtimes, "numpy": "numpy" in (modules or [])}

    def modules(self, python: str) -> list[str] | None:
        """Which of numpy and the runtimes that Python has; None where it does not start."""
        names = ["numpy", *(module for modules in PACKAGES.values() for module in modules)]
        with contextlib.suppress(OSError, ValueError, IndexError, subprocess.SubprocessError):
            asked = [python, "-c", FACTS, " ".join(names)]
            done = subprocess.run(asked, capture_output=True, cwd=self.job, stdin=subprocess.DEVNULL, timeout=120)
            if not done.returncode:
                return json.loads(done.stdout.splitlines()[-1])
        return None

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Runs the agent; its lines go to the host as they come."""
        killed_before = _killed_for_memory()
        command = [self.python, request["agent"], *request["arguments"]]
        status = self._run(command, lambda stream, text: self.say({stream: text}))
        killed = _killed_for_memory() - killed_before
        return {"status": status, "killed_for_memory": killed > 0, "disk": _disk(self.job)}

    def setup(self, request: dict[str, Any]) -> dict[str, Any]:
        """The environment with numpy and the runtimes; each step is said before it is done.

        One at a time on a board: the next one finds what is there.
        """
        with self._alone():
            return self._made(request)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Waits while another process holds the lock of the set-up, until the host stops it."""
        handle, said_at = self._setup_lock(), 0.0
        try:
            while _lock(handle) is False:
                if self.stopped:
                    raise RefusedError("stopped")
                if not said_at or time.monotonic() - said_at > WAITING_S:
                    self.say({"said": WAITING})
                    said_at = time.monotonic()
                time.sleep(LOCK_WAIT_S)
                if not os.fstat(handle).st_nlink:  # everything was removed meanwhile
                    os.close(handle)
                    handle = self._setup_lock()
            yield
        finally:
            os.close(handle)

    def _setup_lock(self) -> int:
        return os.open(self.base / SETUP_LOCK, os.O_RDWR | os.O_CREAT, 0o600)

    def _made(self, request: dict[str, Any]) -> dict[str, Any]:
        python = self.venv / "bin" / "python"
        if not (self.venv / "made").exists() or self.modules(str(python)) is None:
            if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
                raise RefusedError("no venv")
            self.say({"step": "virtual environment"})
            _remove(self.venv)
            self._install([self._system_python(), "-m", "venv", str(self.venv)])
            if self.modules(str(python)) is None:
                raise RefusedError("setup", f"{python} does not start", command=f"{python} -V")
            (self.venv / "made").touch()
        for package, module in [("numpy", "numpy"), *((INSTALL[r], PACKAGES[r][0]) for r in request["runtimes"])]:
            self.say({"step": package})
            imports = [str(python), "-c", f"import {module}"]
            if not self._silent(imports):
                present = module in (self.modules(str(python)) or [])
                mend = ["--force-reinstall"] if present else []  # an earlier attempt was cut in the middle
                self._install([str(python), *PIP, *mend, package])
                self._install(imports)
        self.python = str(python)
        return self._environment(self.modules(self.python))

    def _system_python(self) -> str:
        return shutil.which("python3") or sys.executable

    def _install(self, command: Sequence[str]) -> None:
        """Runs a step of the set-up; RefusedError with its last word when it fails."""
        words: list[str] = []

        def heard(stream: str, text: str) -> None:
            if text.strip():
                words.append(text.strip())
                self.say({"said": words[-1]})

        if self._run(command, heard):
            last = next(
                (line for line in reversed(words) if "error" in line.lower()), "".join(words[-1:]) or "no message"
            )
            full = any(os.strerror(number) in line for line in words for number in FULL)
            raise RefusedError("full" if full else "setup", last, disk=_disk(self.base), command=shlex.join(command))

    def _silent(self, command: Sequence[str]) -> bool:
        return self._run(command, lambda stream, text: None) == 0

    def _run(self, command: Sequence[str], heard: Callable[[str, str], None]) -> int:
        """The exit status of a process that `end_process` can end; `heard` gets ("out" or "err", line)."""
        if self.stopped:
            raise RefusedError("stopped")
        environment = {
            **os.environ,
            "TMPDIR": str(self.job),  # /tmp may lie in memory, and be small
            "PIP_USER": "0",
            "COMPRESS_AGENT_PYTHON": json.dumps([self.python]),  # may be a wrapper that sys.executable does not name
        }
        self.running = process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # ends with this process, however that ends
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self.job,
            env=environment,
            start_new_session=True,
        )

        def relay(stream: str, lines: Any) -> None:
            for line in lines:
                heard(stream, line.decode(errors="replace").rstrip("\r\n"))

        readers = [
            threading.Thread(target=relay, args=("out", process.stdout), daemon=True),
            threading.Thread(target=relay, args=("err", process.stderr), daemon=True),
        ]
        for reader in readers:
            reader.start()
        if self.stopped:  # while it started
            self.end_process()
        status = process.wait()
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)  # what the process has left behind; it would hold the streams open
        self.running = None
        for reader in readers:
            reader.join(timeout=5)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                stream.close()
        return status

    def start(self, work: Callable[[dict[str, Any]], dict[str, Any]], request: dict[str, Any]) -> None:
        """Does what takes long beside the reading of requests, so that the host can stop it, or be missed."""
        self.stopped = False
        self.worker = threading.Thread(target=lambda: self.say(answered(work, request)), daemon=True)
        self.worker.start()

    def stop(self) -> None:
        self.stopped = True
        self.end_process()

    def end_process(self) -> None:
        """Ends the running process and those that it started."""
        process = self.running
        if process is None:
            return
        for number, wait_s in ((signal.SIGTERM, 2), (signal.SIGKILL, 5)):
            with contextlib.suppress(OSError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=wait_s)
                return

    def end(self) -> None:
        """Leaves nothing of the job behind."""
        self.stop()
        if self.worker is not None:
            self.worker.join(timeout=5)
        if self.upload is not None:
            self.upload.forget()
        _remove(self.job)


class Upload:
    """A file on its way: it appears under its name when it is whole."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size, self.received = path, size, 0
        handle, part = tempfile.mkstemp(prefix=".", suffix=".part", dir=path.parent)
        self.part = Path(part)
        self.file = os.fdopen(handle, "wb", buffering=0)

    def add(self, block: bytes) -> None:
        rest = memoryview(block)
        while rest:
            rest = rest[self.file.write(rest) :]
        self.received += len(block)

    def finished(self, sha256: str) -> str:
        os.fsync(self.file.fileno())
        self.file.close()
        found = _sha256(self.part)  # as it lies on the disk
        if found != sha256 or self.received != self.size:
            raise RefusedError("damaged", f"{self.received} bytes with sha256 {found[:12]}")
        self.part.replace(self.path)
        return str(self.path)

    def forget(self) -> None:
        self.file.close()
        with contextlib.suppress(OSError):
            self.part.unlink()


def answered(work: Callable[[dict[str, Any]], dict[str, Any]], request: dict[str, Any]) -> dict[str, Any]:
    """The reply of `work`, or its error as facts."""
    try:
        return {"reply": work(request)}
    except RefusedError as refused:
        return {"error": refused.facts}
    except OSError as error:
        full = error.errno in FULL
        base = cache_folder()
        facts = {"path": str(error.filename or ""), "disk": _disk(base if base.exists() else Path.home())}
        return {"error": {"kind": "full" if full else "system", "text": error.strerror or str(error), **facts}}


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/compress`, by default `~/.cache/compress`."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(named) if os.path.isabs(named) else Path.home() / ".cache") / "compress"


def serve(inbox: Inbox, outbox: Outbox) -> None:
    """Says what is here, then answers the host until it leaves; nothing of the job is left then."""

    board: Board | None = None

    def made(_: dict[str, Any]) -> dict[str, Any]:
        nonlocal board
        base = cache_folder()
        try:
            board = Board(base, shutil.which("python3") or sys.executable, outbox.say)
        except OSError as error:
            if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR):
                raise RefusedError("folder", error.strerror or str(error), path=str(base)) from error
            raise
        return board.begun()

    try:
        outbox.say(answered(made, {}))
        while board is not None:
            line = inbox.line()
            if not line.strip():
                continue
            request = json.loads(line)
            if request["op"] == "leave":
                return
            _act(board, request, inbox, outbox)
    except HostGoneError:
        pass
    finally:
        if board is not None:
            board.end()


def _act(board: Board, request: dict[str, Any], inbox: Inbox, outbox: Outbox) -> None:
    name = request["op"]
    if name == "stop":
        board.stop()
    elif name in ("ask", "setup"):
        board.start(board.ask if name == "ask" else board.setup, request)
    elif name == "data":
        block = inbox.block(request["size"])
        outbox.say(answered(lambda _: board.data(block), request))
    elif name == "remove":
        outbox.say(answered(lambda _: board.remove(), request))
    else:
        works = {"open": board.open, "close": board.close, "fetch": board.fetch}
        outbox.say(answered(works[name], request))


def _lock(handle: int) -> bool | None:
    """Whether the file's lock is ours now, as long as it is open; None where the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _bytes(path: Path) -> int:
    """Of the file, or of all files in the folder; 0 for what is not there."""
    size = 0
    for found in (path, *path.rglob("*")):
        with contextlib.suppress(OSError):  # removed meanwhile
            facts = found.lstat()
            size += 0 if stat.S_ISDIR(facts.st_mode) else facts.st_size
    return size


def _sha256(path: Path) -> str:
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        for block in _blocks(file):
            hashed.update(block)
    return hashed.hexdigest()


def _blocks(file: Any) -> Iterator[bytes]:
    while block := file.read(1 << 20):
        yield block


def _disk(path: Path) -> str:
    """`12 MB of 14800 MB free in /home/pi`."""
    try:
        usage = shutil.disk_usage(path)
    except OSError as error:
        return f"{path}: {error.strerror}"
    return f"{usage.free // 1_000_000} MB of {usage.total // 1_000_000} MB free in {path}"


def _killed_for_memory() -> int:
    """How many processes the kernel has ended since boot because memory ran out; 0 where it does not say."""
    with contextlib.suppress(OSError):
        found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
        return int(found.group(1)) if found else 0
    return 0


def _gone(*_: Any) -> NoReturn:
    raise HostGoneError


def main(token: str) -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _gone)
    with contextlib.suppress(HostGoneError):
        serve(Inbox(sys.stdin.fileno()), Outbox(sys.stdout.fileno(), token))
