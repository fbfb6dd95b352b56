"""The way to a board: one `ssh` process with `board.py` at its far end.

The user's own configuration, keys, agent, jump hosts and known hosts hold; overruled is only what would ask a question
or print something. The remote command is a constant: it says what the board is and starts `python3`, which is sent
`board.py` and then requests, all over standard input. So files need neither scp nor sftp, which small boards lack, nor
a second login; and when the connection ends the board hears it, ends the agent and removes the job.
"""

from __future__ import annotations

import collections
import contextlib
import ipaddress
import json
import os
import queue
import re
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import TargetError
from compress.targets import board

BOARD = Path(board.__file__)

MARKER = "compress-board:"
REMOTE = (
    f'exec sh -c \'echo; echo "{MARKER} $(uname -s) $(uname -m) $(command -v python3)";'
    ' exec python3 -I -c "import sys; i = sys.stdin.buffer; exec(i.read(int(i.readline())))"\''
)
"""The whole remote command line, whatever the recipe. In single quotes without backslash or exclamation mark it means
the same to sh, dash, bash, busybox, zsh, fish and csh."""

HELLO = """
import json, struct, sys
facts = {"python": sys.version_info[:3], "bits": 8 * struct.calcsize("P")}
sys.stdout.write(TOKEN + json.dumps(facts) + chr(10))
sys.stdout.flush()
exec(compile(i.read(int(i.readline())), "board.py", "exec"))
main(TOKEN)
"""
"""The first thing that the board's Python runs, understood by any Python 3; `board.py` needs a newer one."""

PYTHON = (3, 9)
MACHINES_32_BIT = re.compile(r"arm|armv[3-8]\w*|i[3-6]86|mips|mipsel|ppc|riscv32")
"""Of `uname -m`."""

CONNECT_S = 20
ANSWER_S = 90
"""For one answer of a board that is not measuring; an emulated one takes 4 s to start Python."""
ALIVE_S = 20
"""How often the board hears that we are there; see `board.SILENCE_S`."""

Message = dict[str, Any]


@dataclass(frozen=True)
class Address:
    user: str | None
    host: str
    port: int | None

    @property
    def words(self) -> list[str]:
        """For ssh; the remote command comes after them."""
        port = [] if self.port is None else ["-p", str(self.port)]
        user = [] if self.user is None else ["-l", self.user]
        return [*port, *user, "--", self.host]

    @property
    def shown(self) -> str:
        """As one types it after `ssh` or `ssh-copy-id`: `-p 2222 pi@board`."""
        port = "" if self.port is None else f"-p {self.port} "
        return port + ("" if self.user is None else f"{self.user}@") + self.host

    @property
    def known_as(self) -> str:
        """In known_hosts, where the user's configuration gives no other name or port."""
        return self.host if self.port in (None, 22) else f"[{self.host}]:{self.port}"


def parse(url: str) -> Address:
    """The parts of `ssh://[user@]host[:port]`; an IPv6 address is written in brackets.

    Raises TargetError for anything else. Names hold letters, digits and `._-` only (a user also `+@`), because ssh
    gives them to a shell where the user's configuration has a ProxyCommand.
    """

    def wrong(problem: str) -> TargetError:
        return TargetError(f"target {url!r}"[:200], problem, "write ssh://user@host or ssh://user@host:port")

    rest = url.removeprefix("ssh://")
    if rest == url:
        raise wrong("is no ssh:// address")
    user, at, place = rest.rpartition("@")
    if at and ":" in user:  # before anything that would show it
        raise TargetError("target ssh://...", "holds a password", "leave it out and use a key: ssh-copy-id user@host")
    if any(character in rest for character in "/?#"):
        raise wrong("has a path or a query after the host")
    if at and not re.fullmatch(r"[A-Za-z0-9_.+][A-Za-z0-9_.+@-]*", user):
        raise wrong(f"{user!r} is no user's name")
    found = re.fullmatch(r"(\[[^\]]*\]|[^:\[\]]*)(?::(.*))?", place, re.DOTALL)
    if found is None:
        raise wrong("is no host and port; an IPv6 address goes in brackets: ssh://pi@[fe80::1]:22")
    host, port = found.groups()
    if host.startswith("["):
        host = host[1:-1]
        number, percent, zone = host.partition("%")
        try:
            ipaddress.IPv6Address(number)
        except ValueError as error:
            raise wrong(f"{number!r} is no IPv6 address") from error
        if percent and not re.fullmatch(r"[A-Za-z0-9_.-]+", zone):
            raise wrong(f"{zone!r} is no network interface")
    elif not re.fullmatch(r"[A-Za-z0-9_.][A-Za-z0-9_.-]*", host):
        raise wrong(f"{host!r} is no host's name" if host else "has no host")
    if port is not None and not (re.fullmatch(r"[0-9]{1,5}", port) and 1 <= int(port) <= 65535):
        raise wrong(f"{port!r} is no port")
    return Address(user if at else None, host, None if port is None else int(port))


class Connection:
    """Requests to `board.py` and its answers; TargetError when the link is gone."""

    def __init__(self, name: str, address: Address, config: Path | None) -> None:
        self.name, self.address, self.config = name, address, config
        self.token = f"{secrets.token_hex(8)} "
        options = {
            "BatchMode": "yes",  # a question would wait for ever: an error says what to do
            "ConnectTimeout": str(CONNECT_S),
            "ServerAliveInterval": "15",
            "ServerAliveCountMax": "4",
            "ControlMaster": "no",  # a connection that the user shares is used; ours does not stay as one
            "ClearAllForwardings": "yes",  # the user's tunnels belong to the user's sessions
            "RemoteCommand": "none",
            "RequestTTY": "no",
            "LogLevel": "INFO",
        }
        settings = [f"-o{key}={value}" for key, value in options.items()]
        configured = [] if config is None else ["-F", str(config)]
        self.command = ["ssh", *configured, *settings, "-a", "-x", *address.words, REMOTE]
        self.owed = 0
        """Replies that the board has not sent yet."""
        self._heard: queue.Queue[str | None] = queue.Queue()
        self._errors: collections.deque[str] = collections.deque(maxlen=60)
        self._chatter: collections.deque[str] = collections.deque(maxlen=5)
        self._writing = threading.Lock()
        self._closed = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._threads: list[threading.Thread] = []

    def open(self) -> Message:
        """What the board has: its Python, numpy, runtimes, and the job's folder."""
        try:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is ours: we tell the board; and a jump host has no terminal to ask on
                env=os.environ | {"SSH_ASKPASS_REQUIRE": "never"},
            )
        except OSError as error:
            raise TargetError("ssh", f"cannot be started: {error.strerror}", "apt install openssh-client") from error
        for work in (self._listen, self._listen_to_errors):
            self._start(work)

        system, machine, python = self._introduction()
        way_out = "install a 64-bit system there: the runtimes come for 64 bits only"
        if MACHINES_32_BIT.fullmatch(machine):
            raise TargetError(self.name, f"runs a 32-bit system ({system} {machine})", way_out)
        if not python:
            problem = f"has no python3 ({system} {machine})"
            raise TargetError(self.name, problem, "install it there; Debian: sudo apt install python3-venv")
        self._write(_framed(HELLO.replace("TOKEN", repr(self.token))))
        facts = self._message(self.name, ANSWER_S)
        if tuple(facts["python"]) < PYTHON:
            problem = f"{python} there is Python {'.'.join(map(str, facts['python']))}"
            raise TargetError(self.name, problem, "install Python 3.9 or newer there as python3")
        if facts["bits"] != 64:
            raise TargetError(self.name, f"has a {facts['bits']}-bit Python on a kernel for {machine}", way_out)
        self._write(_framed(BOARD.read_text(encoding="utf-8")))
        self.owed = 1  # it begins
        there = self.answer(self.name, ANSWER_S)
        self._start(self._keep_alive)
        return there

    def send(self, request: Message, block: bytes = b"") -> None:
        self._write(json.dumps(request).encode() + b"\n" + block)
        self.owed += request["op"] not in ("stop", "leave")

    def answers(self, about: str, timeout_s: float) -> Iterator[Message]:
        """Messages up to the reply. Raises TargetError when an error comes instead, or nothing for `timeout_s`."""
        while True:
            message = self._message(about, timeout_s)
            if "error" in message:
                raise self._refused(message["error"], about)
            yield message
            if "reply" in message:
                return

    def answer(self, about: str, timeout_s: float) -> Message:
        *_, last = self.answers(about, timeout_s)
        return last["reply"]

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """Leaves nothing running there and no reply on its way when what is inside fails."""
        try:
            yield
        except BaseException:
            self._stop()
            raise

    def close(self) -> None:
        """Ends the connection, and with it the job; never raises."""
        process = self._process
        if process is None or self._closed.is_set():
            return
        with contextlib.suppress(TargetError):
            self.send({"op": "leave"})
        self._closed.set()
        assert process.stdin is not None
        with self._writing, contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for thread in self._threads:
            thread.join(timeout=5)

    def _stop(self) -> None:
        """Ends what runs there, if the link works; does not raise."""
        until = time.monotonic() + 15
        with contextlib.suppress(TargetError):
            if self.owed:
                self.send({"op": "stop"})
            while self.owed:
                self._message(self.name, max(0.0, until - time.monotonic()))

    def _start(self, work: Any) -> None:
        thread = threading.Thread(target=work, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _listen(self) -> None:
        assert self._process
        assert self._process.stdout
        with self._process.stdout as stream:
            for line in stream:
                if line.endswith(b"\n"):  # else the connection was cut within it
                    self._heard.put(line.decode(errors="replace").rstrip("\r\n"))
        self._heard.put(None)

    def _listen_to_errors(self) -> None:
        assert self._process
        assert self._process.stderr
        with self._process.stderr as stream:
            for line in stream:
                if text := line.decode(errors="replace").strip():
                    self._errors.append(text)

    def _keep_alive(self) -> None:
        with contextlib.suppress(TargetError):
            while not self._closed.wait(ALIVE_S):
                self._write(b"\n")

    def _write(self, content: bytes) -> None:
        assert self._process
        assert self._process.stdin
        try:
            with self._writing:
                self._process.stdin.write(content)
                self._process.stdin.flush()
        except (OSError, ValueError) as error:  # ValueError: closed
            raise self._dropped(self.name) from error

    def _introduction(self) -> tuple[str, str, str]:
        """System, machine and path of python3 as the remote command says them, whatever else is said before."""
        until = time.monotonic() + CONNECT_S + ANSWER_S
        while True:
            try:
                line = self._heard.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                problem = f"its login shell did not answer{self._said()}"
                raise TargetError(self.name, problem, f"does `ssh {self.address.shown} uname` answer?") from None
            if line is None:
                raise self._not_connected()
            _, marker, text = line.partition(MARKER)
            if marker:
                system, machine, *python = text.split(maxsplit=2)
                return system, machine, "".join(python)
            if line.strip():
                self._chatter.append(line.strip()[:200])

    def _said(self) -> str:
        return f"; it said: {self._chatter[-1]}" if self._chatter else ""

    def _message(self, about: str, timeout_s: float) -> Message:
        """The next line of `board.py`; what others print is passed over."""
        until = time.monotonic() + timeout_s
        while True:
            try:
                line = self._heard.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                raise TargetError(about, f"the board said nothing for {timeout_s:g} s") from None
            if line is None:
                self._heard.put(None)  # for whoever asks next
                raise self._dropped(about)
            _, token, text = line.partition(self.token)
            if token:
                try:
                    message = json.loads(text)
                except ValueError as error:
                    problem = "another program there wrote into the board's answer"
                    raise TargetError(about, problem, "what do its login shell's start-up files start?") from error
                self.owed -= "reply" in message or "error" in message
                return message

    def _ended(self) -> tuple[int, list[str]]:
        """The exit status of ssh and what came on its standard error."""
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        for thread in self._threads[:2]:
            thread.join(timeout=5)
        return self._process.returncode or 0, list(self._errors)

    def _dropped(self, about: str) -> TargetError:
        self.owed = 0
        status, errors = self._ended()
        last = f": {errors[-1].rstrip('.')}" if errors else ""
        if status == 255 or status < 0:
            problem = f"the connection to {self.address.host} dropped{last}"
            return TargetError(about, problem, "run the same command again")
        way_out = f"does `ssh {self.address.shown} python3 -V` work?"
        return TargetError(about, f"Python on the board ended with status {status}{last}", way_out)

    def _not_connected(self) -> TargetError:
        """Why ssh ended before the board said anything."""
        status, errors = self._ended()
        if status < 0:
            return TargetError(self.name, f"ssh was ended by {signal_name(-status)}", "run the same command again")
        if status != 255:
            said = self._said() or (f"; it said: {errors[-1]}" if errors else "")
            problem = f"its login shell ran no command{said}"
            return TargetError(self.name, problem, f"does `ssh {self.address.shown} uname` answer?")
        shown, known = self.address.shown, self.address.known_as
        text = "\n".join(errors)
        password = re.search(r"Permission denied \([^)]*(password|keyboard-interactive)", text)
        reasons = {
            r"Could not resolve hostname": (
                "no host of that name is known",
                "is it spelled right, and in this network?",
            ),
            r"Connection refused": ("nothing listens there", "is the board's ssh server on, and the port right?"),
            r"timed out|Timeout|No route to host|is unreachable|Host is down": (
                "no answer",
                "is the board on, in this network, and the port right?",
            ),
            r"IDENTIFICATION HAS CHANGED|differs from the key|REVOKED": (
                "its host key is not the one that this machine knows: another board, or somebody between",
                f"if you know why: ssh-keygen -R '{known}', then ssh {shown} and compare the fingerprint",
            ),
            r"Host key verification failed|host key is known": (
                "its host key is not known here",
                f"run `ssh {shown}` once and compare the fingerprint with the board's",
            ),
            r"Permission denied": (
                "wants a password, which nobody can type here" if password else "takes none of your keys",
                f"ssh-copy-id {shown}; a key with a passphrase: ssh-add",
            ),
            r"Too many authentication failures": (
                "was offered too many keys",
                "name the right one in ~/.ssh/config: IdentityFile and IdentitiesOnly yes",
            ),
        }
        for pattern, (problem, way_out) in reasons.items():
            if found := re.search(f"^.*(?:{pattern}).*$", text, re.MULTILINE):
                return TargetError(self.name, f"{problem} ({_one_line(found.group(0))})", way_out)
        said = f": {_one_line(errors[-1]).rstrip('.')}" if errors else ""
        return TargetError(self.name, f"ssh cannot connect{said}", f"does `ssh {shown} uname` work?")

    def _refused(self, error: Message, about: str) -> TargetError:
        """What `board.py` could not do, in words."""
        kind, text = error["kind"], error["text"]
        if kind == "full":
            return TargetError(about, f"the disk of {self.address.host} is full: {text}", f"make room: {error['disk']}")
        if kind == "folder":
            way_out = "give the user a home that can be written, or set XDG_CACHE_HOME there"
            return TargetError(self.name, f"cannot write {error['path']}: {text}", way_out)
        if kind == "no venv":
            way_out = "install it there; Debian: sudo apt install python3-venv"
            return TargetError(about, "Python there has no module venv", way_out)
        if kind == "setup":
            return TargetError(about, text, f"by hand, there: {error['command']}")
        if kind == "damaged":
            return TargetError(about, f"was damaged on its way, or changed meanwhile: {text}", "run it again")
        if kind == "system":
            return TargetError(about, f"{error['path'] or self.address.host}: {text}")
        return TargetError(about, text or kind)


def signal_name(number: int) -> str:
    """`SIGKILL` of 9; a number that has no name is told as it is."""
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def _framed(program: str) -> bytes:
    content = program.encode()
    return str(len(content)).encode() + b"\n" + content


def _one_line(text: str) -> str:
    return " ".join(text.strip("@ ").split())[:200]
