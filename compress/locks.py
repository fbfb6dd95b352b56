"""Files that keep processes apart, on one machine or on file systems that share locks.

The kernel gives a lock back when the process that took it ends, however it ends. What `held` leaves in the file says
who has it; in a file that nobody holds, it says who was killed. (`targets/board.py` runs on boards, where this package
is not, and has a lock of its own.)
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from compress.errors import CompressError

if TYPE_CHECKING:
    from compress.progress import Progress

BOOT, KILLED = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/vmstat")
LOOKS, LOOK_S = 3, 0.02
_open: set[IO[bytes]] = set()
"""Files with locks of this process. A forked child would hold them on after its parent's death."""
_held: set[Path] = set()
"""Those that `held` removes at its end."""


@dataclass(frozen=True)
class Holder:
    """A process that took a lock."""

    pid: int
    host: str
    since: str
    """UTC."""
    boot: str = ""
    """Of the machine, where it says."""
    oom_kills: int = 0
    """How many processes the machine had killed by then for want of memory, since it was started."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    @classmethod
    def of_this_process(cls) -> Holder:
        since = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(os.getpid(), socket.gethostname(), since, _boot(), _oom_kills())

    @property
    def ended_by(self) -> str:
        """What is known of the end of a process that did not give its lock back."""
        if self.host != socket.gethostname() or not self.boot or not _boot():
            return "was killed"
        if self.boot != _boot():
            return "was cut off when the machine stopped"
        if _oom_kills() > self.oom_kills:
            return "was killed; the machine ran out of memory meanwhile"
        return "was killed"


class HeldError(CompressError):
    """Another process has the lock; `holder` is None where it does not say who it is."""

    def __init__(self, place: object, holder: Holder | None, way_out: str = "") -> None:
        self.holder = holder
        super().__init__(place, f"in use by {holder or 'another process'}", way_out)

    def __reduce__(self) -> tuple[Any, ...]:
        return HeldError, (self.place, self.holder, self.way_out)


@contextlib.contextmanager
def held(
    path: Path, *, place: object = "", way_out: str = "", waiting: Progress | None = None
) -> Iterator[Holder | None]:
    """Keeps all other processes from whatever `path` stands for; the file is gone again at the end.

    Yields who took the lock before and was killed with it, else None. While another process has it: HeldError at once,
    at `place`, or, with `waiting`, a note there and patience. Raises OSError for a file that cannot be made. A file
    system without locks keeps nobody apart.
    """
    while True:
        file = path.open("ab+")
        try:
            if not _taken_soon(file):
                holder = _holder(file)
                if waiting is None:
                    raise HeldError(place or path, holder, way_out)
                waiting.note(f"{place or path.stem}: waiting for {holder or 'another process'}, which is at work on it")
                _taken(file, fcntl.LOCK_EX)
            if not _same(file, path):  # its last holder has removed it meanwhile
                file.close()
                continue
        except BaseException:
            file.close()
            raise
        break
    with file, _not_inherited(file):
        before = _holder(file)
        file.truncate(0)
        file.write(json.dumps(asdict(Holder.of_this_process())).encode() + b"\n")
        file.flush()
        _held.add(path)
        try:
            yield before
        finally:
            _held.discard(path)
            _remove(path)


@contextlib.contextmanager
def briefly(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Waits for the lock, which is never held for long; `shared` holders keep out only those who are not.

    The file stays. Raises OSError where it cannot be made, or the file system has no locks.
    """
    with path.open("ab") as file, _not_inherited(file):
        fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield


def give_back() -> None:
    """Gives back all that `held` holds in this process, which is about to end without coming to their ends."""
    for path in list(_held):
        _remove(path)


def holder_of(path: Path) -> Holder | None:
    """Who holds the lock at this moment; None where nobody does."""
    try:
        with path.open("rb") as file:
            free = _taken(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None if free else _holder(file)
    except OSError:
        return None


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):  # of a folder that is gone, or not ours to write any more
        path.unlink(missing_ok=True)


def _taken(file: IO[bytes], kind: int) -> bool:
    """Whether the lock is ours now; also where the file system has none."""
    try:
        fcntl.flock(file, kind)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _taken_soon(file: IO[bytes]) -> bool:
    """Whether the lock is ours now. `holder_of` holds it for a moment while it looks: that is nobody at work."""
    for _ in range(LOOKS):
        if _taken(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
            return True
        time.sleep(LOOK_S)
    return False


def _same(file: IO[bytes], path: Path) -> bool:
    """Whether `path` is still the file that was opened."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _holder(file: IO[bytes]) -> Holder | None:
    """Who wrote the file; None where that cannot be read from it."""
    try:
        file.seek(0)
        return Holder(**json.loads(file.read(4096)))
    except (OSError, ValueError, TypeError):
        return None


@contextlib.contextmanager
def _not_inherited(file: IO[bytes]) -> Iterator[None]:
    _prepare_for_forks()
    _open.add(file)
    try:
        yield
    finally:
        _open.discard(file)


def _forget_inherited() -> None:
    """In a forked child, which has copies of the files: closes them, and with them no lock of the parent."""
    for file in _open:
        file.close()
    _open.clear()
    _held.clear()


@functools.cache
def _prepare_for_forks() -> None:
    os.register_at_fork(after_in_child=_forget_inherited)


def _boot() -> str:
    try:
        return BOOT.read_text().strip()
    except OSError:
        return ""


def _oom_kills() -> int:
    try:
        lines = KILLED.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
