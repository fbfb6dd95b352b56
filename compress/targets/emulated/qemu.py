"""The emulator: `qemu-aarch64` of the machine, or Debian's in the cache."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from compress.errors import TargetError
from compress.progress import Progress
from compress.targets.emulated.debian import PLACE, fetched_program

OLDEST = (7, 2)
"""The oldest tried. Cortex-A76 came with 7.0."""

INSTALL = "sudo apt-get install qemu-user, or your system's package of it"


@dataclass(frozen=True)
class Qemu:
    """An emulator that loads plugins."""

    command: tuple[str, ...]
    """argv that starts it; `env LD_LIBRARY_PATH=...` first where its libraries lie in the cache."""
    version: str

    @property
    def path(self) -> Path:
        return Path(self.command[-1])

    @property
    def fingerprint(self) -> str:
        """Another one for another build."""
        stat = self.path.stat()
        return f"{self.version} {self.path} {stat.st_size} {stat.st_mtime_ns}"

    @property
    def plugin_interface(self) -> int:
        """The version of the plugin interface that `counter.c` is compiled for."""
        major, minor = (int(number) for number in self.version.split(".")[:2])
        if (major, minor) < (8, 2):
            return 1
        return 2 if major < 9 else 3


def find(progress: Progress) -> Qemu:
    """`qemu-aarch64` with plugin support: the one on PATH, or Debian's package in the cache. Raises TargetError."""
    path = shutil.which("qemu-aarch64")
    if path and (qemu := asked((str(Path(path).resolve()),))):
        return qemu
    why = f"{path} cannot load plugins" if path else "qemu-aarch64 is not on this machine"
    try:
        command = fetched_program("qemu-user", "usr/bin/qemu-aarch64", progress)
    except TargetError as error:
        raise TargetError(PLACE, f"{why}, and it cannot be fetched ({error.problem})", INSTALL) from error
    if qemu := asked(command):
        return qemu
    raise TargetError(PLACE, f"{why}, and {command[-1]} does not run", INSTALL)


def asked(command: tuple[str, ...]) -> Qemu | None:
    """The emulator that `command` starts; none when it cannot load plugins. TargetError when it is too old."""
    version, usage = _said(command, Path(command[-1]).stat().st_mtime_ns)
    match = re.search(r"version (\d+)\.(\d+)\S*", version)
    if not match or "QEMU_PLUGIN" not in usage:
        return None
    if (int(match[1]), int(match[2])) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise TargetError(PLACE, f"{command[-1]} is qemu {match[1]}.{match[2]}", f"{wanted} or newer is needed")
    return Qemu(command, match[0].removeprefix("version "))


@functools.cache
def _said(command: tuple[str, ...], changed: int) -> tuple[str, str]:
    """What it prints for --version and for -h; empty when it does not start."""
    try:
        done = [subprocess.run([*command, word], capture_output=True, text=True) for word in ("--version", "-h")]
    except OSError:
        return "", ""
    return done[0].stdout, done[1].stdout
