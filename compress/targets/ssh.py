"""A board at the other end of ssh: `ssh://user@host[:port]`.

Files are kept there under their content's hash, results in a folder of the job that is removed with it; see `board.py`
for what happens there and `connection.py` for the way there.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import hashlib
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from compress.errors import TargetError
from compress.progress import Progress
from compress.targets import agent, board
from compress.targets.connection import ANSWER_S, Connection, Message, parse, signal_name
from compress.targets.machine import Lines, OnLine, last_words

__all__ = ["Ssh", "parse"]

AGENT = Path(agent.__file__)
CONFIG = "COMPRESS_SSH_CONFIG"
"""Environment variable: a configuration file for ssh instead of the user's."""
SETUP_S = 1800
"""Without a word of pip's: unpacking 50 MB onto a slow card takes minutes."""
BLOCK = 1 << 16
AHEAD = 16
"""Blocks sent before the board has said that it wrote the first of them."""
FULL = re.compile("No space left on device|Disk quota exceeded|File too large")
SHOWN_AFTER_S = 1.0
"""A copy that takes longer gets a progress bar."""


@dataclass
class Ssh:
    """A `Machine` over ssh. Without `setup` nothing is installed there."""

    name: str
    setup: bool = False
    """Whether to make an environment there, with numpy and `runtimes`."""
    runtimes: Sequence[str] = ()
    """Those that the files need; a file that needs another one gets it when it is put there."""
    progress: Progress | None = None
    config: Path | None = None
    """For `ssh -F`; default $COMPRESS_SSH_CONFIG, else ssh's own."""

    def __post_init__(self) -> None:
        self.address = parse(self.name)
        named = os.environ.get(CONFIG)
        if self.config is None and named:
            self.config = Path(named)
        self._connection: Connection | None = None
        self._there: Message = {}
        self._agent = ""
        self._names: dict[str, Path] = {}

    def __enter__(self) -> Self:
        self._connection = Connection(self.name, self.address, self.config)
        try:
            self._there = self._connection.open()
            if self.setup and self.runtimes:
                self._set_up(self.runtimes)
        except BaseException:
            self._connection.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._link.close()

    def put(self, path: Path) -> str:
        """As `Machine.put`. A model's runtime must be there, or comes with `setup`."""
        runtime = agent.SUFFIXES.get(path.suffix)
        if runtime is not None:
            missing = [] if self._there["numpy"] else ["numpy"]
            missing += [] if runtime in self._there["runtimes"] else [board.INSTALL[runtime]]
            if missing and self.setup:
                self._set_up([runtime])
            elif missing:
                way_out = f"--setup installs it in a folder of its own, or there: pip install {' '.join(missing)}"
                raise TargetError(self.name, f"{self._there['python']} has no {' and no '.join(missing)}", way_out)
        return self._put(path, path.name)

    def place(self, name: str) -> str:
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise ValueError(f"{name!r} is no name for a file")
        return f"{self._there['job']}/{name}"

    def get(self, name: str, path: Path) -> None:
        self.place(name)
        hashed, link, part = hashlib.sha256(), self._link, path.with_name(f"{path.name}.part")
        link.send({"op": "fetch", "name": name})
        try:
            with (
                link.settled(),
                self._copying(f"fetch {name} from {self.address.host}") as copied,
                part.open("wb") as file,
            ):
                for message in link.answers(self.name, ANSWER_S):
                    if "data" in message:
                        block = base64.b64decode(message["data"])
                        hashed.update(block)
                        file.write(block)
                        copied(len(block), message["size"])
            if hashed.hexdigest() != message["reply"]["sha256"]:
                raise TargetError(self.name, f"{name} was damaged on its way here", "run it again")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def ask(
        self, arguments: Sequence[str], *, about: str, on_line: OnLine | None = None, timeout_s: float = 900
    ) -> Message:
        link, lines = self._link, Lines(on_line)
        errors: collections.deque[str] = collections.deque(maxlen=20)
        if not self._agent:  # only now: a board whose disk is full can be entered to remove what is there
            self._agent = self._put(AGENT, "the agent")
        link.send({"op": "ask", "agent": self._agent, "arguments": list(arguments)})
        with link.settled():
            for message in link.answers(about, timeout_s):
                if "out" in message:
                    lines.take(message["out"])
                if "err" in message:
                    errors.append(message["err"])
        self._check(message["reply"], about, last_words(errors))
        return lines.result(about)

    def remove(self) -> int:
        """Bytes of the files that it has removed from the board: all of ours, also what other jobs there use.

        Neither models nor the environment of a set-up stay; 0 where nothing was. Nothing can be put or asked after it.
        """
        return self._asked({"op": "remove"}, self.name)["bytes"]

    def _check(self, ended: Message, about: str, said: str) -> None:
        """Raises TargetError unless the agent ended well."""
        status = ended["status"]
        if not status:
            return
        said = self._with_names(said, about)
        number = -status if status < 0 else status - 128  # a shell between the agent and us adds 128
        if ended["killed_for_memory"]:
            way_out = "end other programs there, or measure a smaller network"
            raise TargetError(about, f"the board ran out of memory and its kernel ended a process: {said}", way_out)
        if number in set(signal.Signals):
            said = f"the agent was ended by {signal_name(number)}; its last message: {said}"
            raise TargetError(about, said, "run the same command again")
        raise TargetError(about, said, f"make room: {ended['disk']}" if FULL.search(said) else "")

    def _with_names(self, said: str, about: str) -> str:
        """What the board said, with files called as they are here: there each is called by its content's hash."""
        names = [path.name for path in self._names.values()]
        for there, path in self._names.items():
            here = path.name if names.count(path.name) == 1 else str(path)
            said = said.replace(there, here).replace(Path(there).name, here)
            if here in about:
                said = said.removeprefix(f"{here}: ")
        return said

    @property
    def _link(self) -> Connection:
        if self._connection is None:
            raise RuntimeError("a Machine is used inside `with`")
        return self._connection

    def _asked(self, request: Message, about: str) -> Message:
        self._link.send(request)
        return self._link.answer(about, ANSWER_S)

    def _put(self, path: Path, shown: str) -> str:
        try:
            with path.open("rb") as file:
                sha256, size = hashlib.file_digest(file, "sha256").hexdigest(), os.fstat(file.fileno()).st_size
                suffix = path.suffix if re.fullmatch(r"\.[A-Za-z0-9]{1,16}", path.suffix) else ""
                found = self._asked({"op": "open", "sha256": sha256, "size": size, "suffix": suffix}, shown)
                if found["path"] is None:
                    file.seek(0)
                    self._upload(iter(lambda: file.read(BLOCK), b""), size, shown)
                    found = self._asked({"op": "close", "sha256": sha256}, shown)
        except OSError as error:
            raise TargetError(path, f"cannot be read: {error.strerror}") from error
        self._names[found["path"]] = path
        return found["path"]

    def _upload(self, blocks: Iterator[bytes], size: int, shown: str) -> None:
        """Sends blocks, at most `AHEAD` of them beyond what the board has written."""
        link = self._link
        waiting: collections.deque[int] = collections.deque()
        with link.settled(), self._copying(f"upload {shown} to {self.address.host}") as copied:

            def written() -> None:
                link.answer(shown, ANSWER_S)
                copied(waiting.popleft(), size)

            for block in blocks:
                if len(waiting) == AHEAD:
                    written()
                link.send({"op": "data", "size": len(block)}, block)
                waiting.append(len(block))
            while waiting:
                written()

    def _set_up(self, runtimes: Sequence[str]) -> None:
        """The environment there with numpy and the runtimes; shows each step."""
        self._link.send({"op": "setup", "runtimes": list(runtimes)})
        label, steps, waiting = f"set up {self.address.host}", len(runtimes) + 2, False
        with (
            self._link.settled(),
            contextlib.nullcontext(_silent) if self.progress is None else self.progress.steps(label, steps) as advance,
        ):
            for message in self._link.answers(f"set-up of {self.name}", SETUP_S):
                if "step" in message:
                    advance(message["step"])
                if message.get("said") == board.WAITING and self.progress and not waiting:
                    waiting = True
                    self.progress.note(f"{self.address.host}: {board.WAITING}")
        self._there |= message["reply"]

    @contextlib.contextmanager
    def _copying(self, label: str) -> Iterator[Callable[[int, int], None]]:
        """Takes (bytes copied, bytes in all), and shows them once they take long."""
        began, done, shown = time.monotonic(), 0, 0
        advance: Callable[[str], None] | None = None
        with contextlib.ExitStack() as stack:

            def copied(count: int, total: int) -> None:
                nonlocal done, shown, advance
                done += count
                passed_s = time.monotonic() - began
                if advance is None and self.progress and passed_s > SHOWN_AFTER_S and done < total:
                    advance = stack.enter_context(self.progress.steps(label, 100))
                while advance and shown < 100 * done // total:
                    shown += 1
                    advance(f"{done / 1e6:.2f} of {total / 1e6:.2f} MB, {done / passed_s / 1e3:.0f} kB/s")

            yield copied


def _silent(_: Any) -> None:
    pass
