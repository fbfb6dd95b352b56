"""The emulator: `qemu-aarch64` of the machine, or Debian's in the cache."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from compress.errors import TargetError
from compress.progress import Progress
from compress.targets.emulated.debian import PLACE, SOURCES, fetched_program

OLDEST = (7, 2)
"""The oldest tried. Cortex-A76 came with 7.0."""

INSTALL = "sudo apt-get install qemu-user, or your system's package of it"


@dataclass(frozen=True)
class Qemu:
    """An emulator of aarch64 programs."""

    command: tuple[str, ...]
    """argv that starts it; `env LD_LIBRARY_PATH=...` first where its libraries lie in the cache."""
    version: str
    plugins: bool = True
    """Whether it can load any, and so count."""

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
    """`qemu-aarch64` that loads plugins: on PATH, of the machine's archive, of that in COMPRESS_APT_SOURCES.

    Where none does (Debian 13's are static), one without: it computes, but nothing can be counted. TargetError for no
    emulator at all.
    """
    path = shutil.which("qemu-aarch64")
    here = asked((str(Path(path).resolve()),)) if path else None
    if here and here.plugins:
        return here
    why = f"{path} cannot load plugins" if path else "qemu-aarch64 is not on this machine"
    found, problem = [here] if here else [], ""
    named = os.environ.get(SOURCES)
    for sources in (None, Path(named)) if named else (None,):
        try:
            fetched = asked(fetched_program("qemu-user", "usr/bin/qemu-aarch64", progress, sources))
        except TargetError as error:
            problem = error.problem
            continue
        if fetched and fetched.plugins:
            return fetched
        found += [fetched] if fetched else []
    if found:
        return found[0]
    raise TargetError(PLACE, f"{why}, and it cannot be fetched ({problem or 'it does not run here'})", INSTALL)


def asked(command: tuple[str, ...]) -> Qemu | None:
    """The emulator that `command` starts; none when it does not start. TargetError when it is too old."""
    version, usage = _said(command, Path(command[-1]).stat().st_mtime_ns)
    match = re.search(r"version (\d+)\.(\d+)\S*", version)
    if not match:
        return None
    if (int(match[1]), int(match[2])) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise TargetError(PLACE, f"{command[-1]} is qemu {match[1]}.{match[2]}", f"{wanted} or newer is needed")
    return Qemu(command, match[0].removeprefix("version "), plugins="QEMU_PLUGIN" in usage)


@functools.cache
def _said(command: tuple[str, ...], changed: int) -> tuple[str, str]:
    """What it prints for --version and for -h; empty when it does not start."""
    try:
        done = [subprocess.run([*command, word], capture_output=True, text=True) for word in ("--version", "-h")]
    except OSError:
        return "", ""
    return done[0].stdout, done[1].stdout
