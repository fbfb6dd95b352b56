"""Commands run in a world of their own: what they said, how they ended, and what they touched.

One process imports everything heavy once and forks for each command, so that a case takes milliseconds, a runtime that
crashes ends its own case only, and one that hangs can be killed.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
OF_TORCH = "torchinductor_"
"""A folder that torch itself makes for temporary files, and leaves empty."""
MEMORY_GB = 6
"""Of address space, beyond what the process had when it was forked."""
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""What a terminal obeys; a tab and a line's end are none of it."""
PROGRESS = re.compile(r"  |INFO: Created TensorFlow Lite XNNPACK delegate|agent: (?!error)")
"""Lines on standard error that are no mistake: of our bars and notes, and LiteRT's own."""
FORKED = r"""
import contextlib, json, os, resource, select, signal, sys, time
sys.path.insert(0, sys.argv[1])
memory = int(sys.argv[2])
import numpy, onnx, onnxruntime, PIL.Image, torch
from ai_edge_litert import interpreter, schema_py_generated
import compress.pipeline, compress.report, compress.gate, compress.verification, compress.benching, compress.doctor
import compress.cli
from compress.targets import agent
PIL.Image.init()
numpy.zeros(1) @ numpy.zeros(1)
answer = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
signal.signal(signal.SIGALRM, signal.SIG_DFL)

def watched(allowed, log):
    def inside(path):
        real = os.path.realpath(path)
        return any(real == root or real.startswith(root + "/") for root in allowed)
    def hook(event, args):
        if event == "open":
            path, mode, flags = args
            writes = (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not writes or not isinstance(path, (str, bytes)):
                return
            paths = [path]
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.chown"):
            paths = [args[0]]
        elif event in ("os.rename", "os.link", "os.symlink"):
            paths = [args[0], args[1]] if event == "os.rename" else [args[1]]
        elif event in ("pickle.find_class", "os.system", "socket.connect"):
            log.append([event, repr(args)[:200]])
            return
        else:
            return
        for path in paths:
            path = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
            if path and not path.startswith(("/dev/", "/proc/")) and not inside(path):
                log.append([event, path])
    sys.addaudithook(hook)

def child(case):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setpgid(0, 0)
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(case[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, number)
        os.close(file)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.chdir(case["cwd"])
    os.environ.clear()
    os.environ.update(case["environment"])
    import tempfile
    tempfile.tempdir = None
    said = int(open("/proc/self/statm").read().split()[0]) * 4096
    resource.setrlimit(resource.RLIMIT_AS, (said + memory * 2**30, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.argv = ["compress", *case["words"]]
    log = []
    watched(case["allowed"], log)
    status = 99
    try:
        if case["entry"] == "agent":
            status = agent.main(case["words"])
        else:
            exec(case["before"])
            compress.cli.main()
            status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else (0 if ended.code is None else 1)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        if log:
            with contextlib.suppress(Exception):
                os.write(case["pipe"], json.dumps(log[:20]).encode())
        os._exit(status if isinstance(status, int) and 0 <= status < 256 else 98)

print("ready", file=answer, flush=True)
for line in sys.stdin:
    case = json.loads(line)
    began = time.monotonic()
    reading, case["pipe"] = os.pipe()
    pid = os.fork()
    if pid == 0:
        answer.close()
        os.close(reading)
        child(case)
    os.close(case["pipe"])
    late = False
    handle = os.pidfd_open(pid)
    if case["signal_s"] and not select.select([handle], [], [], case["signal_s"])[0]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGINT)
    if not select.select([handle], [], [], case["timeout_s"] - (case["signal_s"] or 0))[0]:
        late = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(ProcessLookupError):  # what it left behind
        os.killpg(pid, signal.SIGKILL)
    os.close(handle)
    os.set_blocking(reading, False)
    try:
        touched = os.read(reading, 1 << 16)
    except BlockingIOError:
        touched = b""
    os.close(reading)
    code = os.waitstatus_to_exitcode(status)
    print(json.dumps({
        "status": code, "late": late, "touched": json.loads(touched or b"[]"), "seconds": time.monotonic() - began,
    }), file=answer, flush=True)
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended: `status` is its exit status, or minus the signal that killed it."""

    words: list[str]
    status: int
    late: bool
    touched: list[list[str]]
    """Files outside the sandbox that were written, classes that a pickle asked for, connections."""
    seconds: float
    out: str
    err: str

    def wrong(self, *, statuses: tuple[int, ...] = (0, 1, 2), lines: int = 1) -> str:
        """What the command did that none may do; empty if all is well."""
        if self.late:
            return f"did not end within {self.seconds:.0f} s"
        if self.status < 0:
            return f"was killed by signal {-self.status}"
        if "Traceback (most recent call last)" in self.err + self.out:
            return "ended with a traceback"
        if self.status not in statuses:
            return f"exit status {self.status}"
        if self.touched:
            return f"touched {self.touched}"
        said = [line for line in self.err.splitlines() if line.strip() and not PROGRESS.match(line)]
        if self.status in (1, 2) and not said:
            return "failed without a word"
        if self.status in (1, 2) and len(said) > lines:
            return f"{len(said)} lines on standard error"
        if found := CONTROL.search(self.out + self.err):
            return f"printed the control character {found.group()!r}"
        return ""


_running: list[subprocess.Popen[str]] = []


def forker() -> subprocess.Popen[str]:
    """The process that forks, one for all tests of a session."""
    if not _running:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        process = subprocess.Popen(
            [sys.executable, "-c", FORKED, str(ROOT), str(MEMORY_GB)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(process.stderr.read())
        _running.append(process)
        atexit.register(_end)
    return _running[0]


def _end() -> None:
    with _running.pop() as process:
        process.kill()


@dataclass(frozen=True)
class Sandbox:
    """`cwd`, `home` and `tmp` of commands in a folder of their own."""

    folder: Path

    def __post_init__(self) -> None:
        for name in ("cwd", "home", "tmp", "streams"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)

    @property
    def cwd(self) -> Path:
        return self.folder / "cwd"

    def empty(self) -> None:
        """Removes what lies in `cwd`, `home` and `tmp`."""
        for name in ("cwd", "home", "tmp"):
            shutil.rmtree(self.folder / name)
            (self.folder / name).mkdir()

    def run(
        self,
        *words: str | Path,
        entry: str = "cli",
        timeout_s: float = 30,
        signal_s: float | None = None,
        environment: dict[str, str] | None = None,
        before: str = "",
    ) -> Ended:
        """What becomes of `compress WORDS`, or of `agent.py WORDS`; `before` is Python that its process runs first.

        After `signal_s` seconds it is interrupted as by Ctrl-C, after `timeout_s` killed.
        """
        process = forker()
        assert process.stdin is not None
        assert process.stdout is not None
        streams = {name: str(self.folder / "streams" / name) for name in ("out", "err")}
        case = {
            "words": [str(word) for word in words],
            "entry": entry,
            "cwd": str(self.cwd),
            "timeout_s": timeout_s,
            "signal_s": signal_s,
            "allowed": [os.path.realpath(self.folder)],
            "environment": {
                "PATH": os.environ["PATH"],
                "HOME": str(self.folder / "home"),
                "TMPDIR": str(self.folder / "tmp"),
                "OMP_NUM_THREADS": "1",
                "COLUMNS": "300",
                "PYTHONPATH": str(ROOT),
                "MPLCONFIGDIR": str(self.folder / "streams"),
                "XDG_CACHE_HOME": str(self.folder / "home" / ".cache"),
                **(environment or {}),
            },
            "before": before,
            **streams,
        }
        process.stdin.write(json.dumps(case) + "\n")
        process.stdin.flush()
        found = json.loads(process.stdout.readline())
        texts = {name: Path(path).read_text(encoding="utf-8", errors="replace") for name, path in streams.items()}
        return Ended(words=case["words"], **found, **texts)  # type: ignore[arg-type]

    def listing(self, *except_below: Path) -> dict[str, str]:
        """Every file around a command: its kind, and the hash of its content; not those below the given folders."""
        found = {}
        for top in ("cwd", "home", "tmp"):
            for folder, folders, files in os.walk(self.folder / top):
                here = Path(folder)
                folders[:] = [
                    name for name in folders if here / name not in except_below and not name.startswith(OF_TORCH)
                ]
                for name in folders:
                    found[str(here / name)] = "link" if (here / name).is_symlink() else "folder"
                for path in (here / name for name in files if here / name not in except_below):
                    if path.is_symlink():
                        found[str(path)] = f"link to {os.readlink(path)}"
                    elif not path.is_file():
                        found[str(path)] = "no file"
                    else:
                        found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found
