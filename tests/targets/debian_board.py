"""A board with Debian's own sshd: users, chroot and processes of an arm64 Debian, in namespaces of this machine.

Needs root, for the mounts; the kernel runs the programs through qemu (binfmt_misc). Everything mounted lies in a
private namespace and goes with it; a registration with binfmt_misc that was not there before is taken back.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from compress.errors import TargetError
from compress.targets.cache import cache_folder
from compress.targets.connection import parse
from compress.targets.emulated.cores import CORES, cpuinfo
from compress.targets.emulated.debian import Apt, Sources
from compress.targets.emulated.userland import PLATFORMS

PACKAGES = ("dash", "coreutils", "python3", "python3-venv", "libstdc++6", "base-files", "procps")
CPU = "cortex-a72"
UID = 54_321
"""Of the board's user: tells its processes from the machine's."""

BINFMT = Path("/proc/sys/fs/binfmt_misc")
ELF_AARCH64 = r"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
MASK = r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"

PRIVATE = """
set -e
mount -t tmpfs -o mode=755 tmpfs /mnt
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /mnt/board /mnt/keys /run/sshd
cp {folder}/authorized /mnt/keys/authorized
mount --bind {root} /mnt/board
mount -t proc proc /mnt/board/proc
mount --bind {folder}/cpuinfo /mnt/board/proc/cpuinfo
mount --bind /dev /mnt/board/dev
mount --bind /sys /mnt/board/sys
mount --bind {folder}/passwd /etc/passwd
mount -t proc proc /proc
exec /usr/sbin/sshd -D -e -f {folder}/sshd_config
"""
"""sshd wants every folder above the chroot to be root's alone; a test's folder lies below /tmp. /sys is needed: without
it LiteRT's int8 outputs are others (20 of 200 differed, by 1)."""


class DebianBoard:
    """A context manager; `url` and `config` are for `Ssh`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = folder / "ssh_config"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.root = _userland()
        self.home = self.root / "home/pi"

    @property
    def url(self) -> str:
        return f"ssh://pi@127.0.0.1:{self.port}"

    def __enter__(self) -> DebianBoard:
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(_arm_programs())
        shutil.rmtree(self.home, ignore_errors=True)
        self.home.mkdir(parents=True)
        shutil.chown(self.home, UID, UID)
        self._write_settings()
        script = PRIVATE.format(folder=shlex.quote(str(self.folder)), root=shlex.quote(str(self.root)))
        own = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"]
        self.log = self._stack.enter_context((self.folder / "sshd.log").open("w"))
        self.process = subprocess.Popen([*own, "sh", "-c", script], stderr=self.log, stdin=subprocess.DEVNULL)
        until = time.monotonic() + 30
        while not self._listens():
            if self.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError((self.folder / "sshd.log").read_text())
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()  # its child goes with it, and with that the namespace
        self.process.wait()
        self._stack.close()

    def living(self) -> list[str]:
        """Command lines of the board's user's processes."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                status = (path / "status").read_text()
                if f"\nUid:\t{UID}\t" in status and "\nState:\tZ" not in status:
                    found.append((path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        return found

    def quiet(self, within_s: float = 30) -> bool:
        """Whether nothing of the user's runs there and no job lies there any more, soon."""
        until = time.monotonic() + within_s
        while time.monotonic() < until:
            if not self.living() and not list(self.home.glob(".cache/compress/jobs/*")):
                return True
            time.sleep(0.1)
        return False

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def _write_settings(self) -> None:
        folder = self.folder
        for name in ("host", "user"):
            (folder / name).unlink(missing_ok=True)
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
        shutil.copy(folder / "user.pub", folder / "authorized")
        (folder / "cpuinfo").write_text(cpuinfo(CORES[CPU], os.cpu_count() or 1))
        (folder / "passwd").write_text(
            Path("/etc/passwd").read_text() + f"pi:x:{UID}:{UID}:board's user:/home/pi:/bin/sh\n"
        )
        (folder / "sshd_config").write_text(f"""
ListenAddress 127.0.0.1:{self.port}
HostKey {folder}/host
PidFile none
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
AuthorizedKeysFile /mnt/keys/authorized
ChrootDirectory /mnt/board
SetEnv QEMU_CPU={CPU} PIP_NO_INDEX=1 PIP_FIND_LINKS=/wheels PIP_CONFIG_FILE=/dev/null
""")
        host_key = (folder / "host.pub").read_text().split()
        (folder / "known_hosts").write_text(f"{parse(self.url).known_as} {host_key[0]} {host_key[1]}\n")
        self.config.write_text(f"""
Host *
UserKnownHostsFile {folder}/known_hosts
GlobalKnownHostsFile /dev/null
IdentityFile {folder}/user
IdentitiesOnly yes
IdentityAgent none
""")


def _userland() -> Path:
    """An arm64 Debian that can be logged into, and wheels for its pip; made once."""
    folder = cache_folder() / "debian-board"
    root, done = folder / "root", folder / "done"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        root.mkdir(parents=True)
        apt = Apt(folder / "apt", "arm64", Sources.of_machine())
        apt.prepare()
        for name in ("bin", "lib", "sbin"):  # as Debian's installer lays it out
            (root / "usr" / name).mkdir(parents=True)
            (root / name).symlink_to(f"usr/{name}")
        for package in apt.fetch(PACKAGES):
            subprocess.run(["dpkg-deb", "--extract", str(package), str(root)], check=True)
        for name in ("proc", "sys", "dev", "tmp", "home", "wheels"):
            (root / name).mkdir(exist_ok=True)
        (root / "tmp").chmod(0o1777)
        platforms = [word for name in PLATFORMS for word in ("--platform", name)]
        pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--only-binary=:all:"]
        python = next((root / "usr/bin").glob("python3.*[0-9]")).name.removeprefix("python")
        wanted = ["numpy", "ai-edge-litert"]
        subprocess.run([*pip, *platforms, "--python-version", python, "-d", str(root / "wheels"), *wanted], check=True)
        shutil.rmtree(folder / "apt")
        root.chmod(0o755)
        done.touch()
    return root


@contextlib.contextmanager
def _arm_programs() -> Iterator[None]:
    """The kernel starts programs for aarch64, also in a chroot."""
    if not (BINFMT / "register").exists():
        subprocess.run(["mount", "-t", "binfmt_misc", "binfmt_misc", str(BINFMT)], check=True)
    for path in BINFMT.glob("*aarch64*"):
        text = path.read_text()
        if text.startswith("enabled") and "F" in text.partition("flags:")[2].split()[0]:
            yield
            return
    qemu = shutil.which("qemu-aarch64-static")
    if qemu is None:
        raise TargetError("qemu-aarch64-static", "is not on this machine", "apt-get install qemu-user-static")
    (BINFMT / "register").write_text(f":compress-aarch64:M::{ELF_AARCH64}:{MASK}:{qemu}:F")
    try:
        yield
    finally:
        (BINFMT / "compress-aarch64").write_text("-1")
