"""A board that is a process of this machine: an ssh server in a thread, with a home, keys and programs of its own.

What it runs is what a board would run: a login shell, `python3` from its PATH, with the streams of the connection. When
the connection ends it closes those streams and ends nothing, as sshd does.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import asyncssh

PROGRAMS = ("sh", "bash", "uname", "cat", "sleep", "env", "sed", "touch", "head")
SERVER_KEY = asyncssh.generate_private_key("ssh-ed25519")
USER_KEY = asyncssh.generate_private_key("ssh-ed25519")

Watch = Callable[[str, bytes], bool]
"""Sees ("in" or "out", what has gone that way so far); True cuts the connection."""


class StandIn:
    """A context manager. `url` and `config` are for `Ssh`; attributes may be changed while it runs."""

    def __init__(self, folder: Path) -> None:
        self.home, self.programs = folder / "home", folder / "programs"
        self.home.mkdir()
        self.programs.mkdir()
        for name in PROGRAMS:
            (self.programs / name).symlink_to(shutil.which(name))
        self.python = sys.executable
        self.write_program("python3", f'exec {self.python} "$@"')
        self.config = folder / "ssh_config"
        self.known_hosts = folder / "known_hosts"
        self.key = folder / "key"
        USER_KEY.write_private_key(self.key)
        self.key.chmod(0o600)
        self.shell = "sh"
        self.environment = {"HOME": str(self.home), "PATH": str(self.programs), "OMP_NUM_THREADS": "1"}
        self.password_only = False
        self.bytes_per_s: float | None = None
        """Of what comes in."""
        self.watch: Watch = lambda way, seen: False
        self.commands: list[str] = []
        self.processes: list[asyncio.subprocess.Process] = []
        self.received = 0

    @property
    def url(self) -> str:
        return f"ssh://pi@127.0.0.1:{self.port}"

    def write_program(self, name: str, *lines: str) -> None:
        path = self.programs / name
        path.unlink(missing_ok=True)
        path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
        path.chmod(0o755)

    def write_config(self, *lines: str) -> None:
        """ssh's configuration on the user's side; host keys are checked as ssh does by default."""
        own = [f"UserKnownHostsFile {self.known_hosts}", "GlobalKnownHostsFile /dev/null"]
        keys = ["IdentitiesOnly yes", "IdentityAgent none", f"IdentityFile {self.key}"]
        self.config.write_text("\n".join(["Host *", *own, *keys, *lines]) + "\n")

    def know_host(self, key: asyncssh.SSHKey = SERVER_KEY) -> None:
        public = key.export_public_key("openssh").decode().strip()
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {public}\n")

    def left(self) -> list[str]:
        """What lies in the jobs' folder."""
        return [path.name for path in self.home.glob(".cache/compress/jobs/*")]

    def living(self) -> list[str]:
        """Command lines of processes with this board's home in their environment: what still runs there."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                environment = (path / "environ").read_bytes().split(b"\0")
                state = (path / "stat").read_text().rpartition(")")[2].split()[0]
                if f"HOME={self.home}".encode() in environment and state != "Z":
                    found.append((path / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
        return found

    def quiet(self, within_s: float = 15) -> bool:
        """Whether nothing runs there and no job lies there any more, soon."""
        until = time.monotonic() + within_s
        while time.monotonic() < until:
            if not self.living() and not self.left():
                return True
            time.sleep(0.05)
        return False

    # ------------------------------------------------------------------------------------------------- server

    def __enter__(self) -> StandIn:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.server = asyncio.run_coroutine_threadsafe(self._listen(), self.loop).result(30)
        self.port = self.server.sockets[0].getsockname()[1]
        self.write_config()
        self.know_host()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self.loop).result(60)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()

    async def _listen(self) -> asyncssh.SSHAcceptor:
        return await asyncssh.listen(
            "127.0.0.1",
            0,
            server_factory=lambda: _Door(self),
            server_host_keys=[SERVER_KEY],
            process_factory=self._process,
            encoding=None,
            sftp_factory=None,
            allow_scp=False,
        )

    async def _close(self) -> None:
        self.server.close()
        for process in self.processes:
            if process.returncode is None:
                await asyncio.wait_for(process.wait(), 30)
        await self.server.wait_closed()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        await asyncio.wait(others, timeout=5) if others else None

    async def _process(self, channel: asyncssh.SSHServerProcess[bytes]) -> None:
        command = channel.command or ""
        self.commands.append(command)
        process = await asyncio.create_subprocess_exec(
            str(self.programs / self.shell),
            "-c",
            command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**self.environment, "SSH_CLIENT": "127.0.0.1 1 22"},
            cwd=self.home,
            start_new_session=True,
            limit=1 << 20,
        )
        self.processes.append(process)
        relays = [
            asyncio.create_task(self._outwards(process, 1, channel.stdout, channel)),
            asyncio.create_task(self._outwards(process, 2, channel.stderr, channel)),
        ]
        inwards = asyncio.create_task(self._inwards(channel, process.stdin))
        status = await process.wait()
        await asyncio.gather(*relays)
        inwards.cancel()
        if status < 0:
            channel.exit_with_signal("KILL")
        else:
            channel.exit(status)

    async def _inwards(self, channel: asyncssh.SSHServerProcess[bytes], stream: asyncio.StreamWriter) -> None:
        seen = b""
        try:
            while data := await channel.stdin.read(1 << 14):
                if self.bytes_per_s:
                    await asyncio.sleep(len(data) / self.bytes_per_s)
                seen += data
                self.received += len(data)
                if self.watch("in", seen):
                    channel.channel.get_connection().abort()
                    return
                stream.write(data)
                await stream.drain()
        except (OSError, asyncssh.Error):
            pass
        finally:
            stream.close()

    async def _outwards(
        self,
        process: asyncio.subprocess.Process,
        number: int,
        sink: asyncssh.SSHWriter[bytes],
        channel: asyncssh.SSHServerProcess[bytes],
    ) -> None:
        """Ends when nobody listens any more, and closes the pipe: the program hears it as it would from sshd."""
        stream = process.stdout if number == 1 else process.stderr
        seen = b""
        try:
            while data := await stream.read(1 << 16):
                seen += data
                sink.write(data)
                await sink.drain()
                if number == 1 and self.watch("out", seen):
                    channel.channel.get_connection().abort()
        except (OSError, asyncssh.Error, AttributeError):
            process._transport.get_pipe_transport(number).close()


class _Door(asyncssh.SSHServer):
    def __init__(self, board: StandIn) -> None:
        self.board = board

    def begin_auth(self, username: str) -> bool:
        return True

    def public_key_auth_supported(self) -> bool:
        return not self.board.password_only

    def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        return username == "pi" and key.public_data == USER_KEY.public_data

    def password_auth_supported(self) -> bool:
        return True

    def kbdint_auth_supported(self) -> bool:
        return False


def stand_in(tmp_path: Path) -> Iterator[StandIn]:
    """For `board = pytest.fixture(stand_in)`."""
    folder = tmp_path / "board"
    folder.mkdir()
    with StandIn(folder) as board:
        yield board


class Shown:
    """Progress that remembers what it showed."""

    interrupted = False

    def __init__(self) -> None:
        self.labels: list[str] = []
        self.said: list[str] = []
        self.notes: list[str] = []

    @contextlib.contextmanager
    def steps(self, label: str, total: int) -> Iterator[Callable[[str], None]]:
        self.labels.append(label)
        yield self.said.append

    def note(self, text: str) -> None:
        self.notes.append(text)
