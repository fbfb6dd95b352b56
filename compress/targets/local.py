"""This machine, measured by `agent.py` in fresh processes as a board would be."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from compress.errors import TargetError
from compress.targets import agent
from compress.targets.machine import Lines, OnLine, last_words

AGENT = Path(agent.__file__)


@dataclass
class Local:
    command: Sequence[str] = (sys.executable, "-P")
    """Starts Python; -P keeps this folder's modules from hiding others of the same name in the agent's process."""
    environment: Mapping[str, str] | None = None
    """Of the agent; default this process's."""
    name: str = "local"
    folder: Path = field(default=Path(), init=False)

    def __enter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="compress-"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def put(self, path: Path) -> str:
        return str(path.absolute())

    def place(self, name: str) -> str:
        return str(self.folder / name)

    def get(self, name: str, path: Path) -> None:
        shutil.copyfile(self.folder / name, path)

    def ask(
        self, arguments: Sequence[str], *, about: str, on_line: OnLine | None = None, timeout_s: float = 900
    ) -> dict[str, Any]:
        try:
            process = subprocess.Popen(
                [*self.command, str(AGENT), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                env=self.environment,
                start_new_session=True,  # Ctrl-C is ours: the agent is ended below, with its own processes
            )
        except OSError as error:
            raise TargetError(about, f"cannot start {self.command[0]}: {error.strerror}") from error
        return listen(process, about=about, on_line=on_line, timeout_s=timeout_s)


def listen(process: subprocess.Popen[str], *, about: str, on_line: OnLine | None, timeout_s: float) -> dict[str, Any]:
    """The result of an agent whose streams are ours; see `Machine.ask`. The process has ended when this returns."""
    lines, errors = Lines(on_line), list[str]()
    silent, heard = threading.Event(), threading.Event()
    assert process.stdout is not None
    assert process.stderr is not None

    def listen_to_errors(stream: Iterable[str]) -> None:
        for text in stream:
            heard.set()
            errors.append(text)

    def watch() -> None:
        """Ends an agent that has said nothing on either stream for too long."""
        while heard.wait(timeout_s):
            heard.clear()
            if process.poll() is not None:
                return
        silent.set()
        process.kill()

    threads = [threading.Thread(target=listen_to_errors, args=(process.stderr,)), threading.Thread(target=watch)]
    for thread in threads:
        thread.daemon = True
        thread.start()
    try:
        for text in process.stdout:
            heard.set()
            lines.take(text)
        status = process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        heard.set()
        for thread in threads:
            thread.join(timeout=5)
        process.stdout.close()
        process.stderr.close()
    if silent.is_set():
        raise TargetError(about, f"no result within {timeout_s:g} s")
    if status:
        said = last_words(errors)
        if status < 0:
            said = f"the agent was ended by {signal.Signals(-status).name}; its last message: {said}"
        raise TargetError(about, said)
    return lines.result(about)


def open_model(path: Path, runtime: str = "auto", threads: int = 1) -> agent.Model:
    """`agent.open_model` for use inside `compress`: what goes wrong is a TargetError."""
    try:
        return agent.open_model(path, runtime, threads)
    except agent.AgentError as error:
        raise TargetError(path.name, str(error).removeprefix(f"{path}: ")) from error
