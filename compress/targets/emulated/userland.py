"""An aarch64 Debian with Python, numpy and the runtimes in a cache folder, run by qemu-user; nothing needs root.

    userland = ready(progress)
    subprocess.run([*userland.python("cortex-a72"), "script.py"], env=userland.environment)

Debian packages come by the machine's own `apt-get`, with folders of its own and the architecture set, from the sources
of the machine's configuration that are Debian's (or the file named by COMPRESS_APT_SOURCES). Wheels come by the
machine's own pip, in the versions that are installed here: both sides of a parity check run the same runtime.

    ~/.cache/compress/                      or XDG_CACHE_HOME
        userland-<key>/root/                usr, etc, lib of the userland
        userland-<key>/views/<cpu>-<n>/     what qemu takes for `-L`: links to root, and proc/cpuinfo of that CPU
        userland-<key>/manifest.json        every file of root: size, time, SHA-256; written last
        userland-<key>.partial/             a set-up that has not ended; the next one goes on from its downloads
        userland-<key>.lock                 held by the process that sets up
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from compress import locks
from compress.errors import TargetError
from compress.progress import Progress
from compress.targets import agent
from compress.targets.emulated import qemu
from compress.targets.emulated.cores import CORES, HARMLESS, HWCAP_BITS, cpuinfo
from compress.targets.emulated.debian import PLACE, Apt, Sources, cache_folder, run, unpack
from compress.targets.machine import last_words

ARCHITECTURE = "arm64"
LAYOUT = "1"
"""Of the cached folder; another one is another key."""

PACKAGES = ("python3", "python3-venv", "libstdc++6", "base-files")
"""With all they depend on; python3-venv so that a stand-in board can be set up as a real one is."""

WHEELS = ("numpy", "onnxruntime", "ai-edge-litert")
NEEDED = ("flatbuffers", "protobuf", "packaging", "tqdm", "typing-extensions", "backports.strenum", "ml_dtypes")
"""What importing the runtimes takes, where the installed release asks for it."""

PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")


@dataclass(frozen=True)
class Userland:
    folder: Path
    qemu: qemu.Qemu
    key: str
    versions: dict[str, str]
    """Of what is installed inside: Python, numpy and the runtimes."""

    @property
    def root(self) -> Path:
        return self.folder / "root"

    def view(self, cpu: str) -> Path:
        """The folder that stands for `/` in front of the host's files."""
        if cpu not in CORES:
            raise TargetError(f"{PLACE}:{cpu}", "no such CPU", f"known: {', '.join(CORES)}")
        return self.folder / "views" / f"{cpu}-{_processors()}"

    def python(self, cpu: str, *, qemu_options: Sequence[str] = ()) -> list[str]:
        """argv prefix that runs the userland's Python as on `cpu`; use `environment` with it.

        The CPU is always named: qemu 7.2's default one computes wrong int8 results with LiteRT.
        """
        view = self.view(cpu)
        return [*self.qemu.command, "-cpu", cpu, "-L", str(view), *qemu_options, str(view / "usr/bin/python3")]

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment without what would steer qemu, the loader or Python, for `python`."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(STEERING)}
        return {**kept, **ENVIRONMENT}

    def environment_on(self, cpu: str) -> dict[str, str]:
        """`environment` for the agent, which starts Python itself: the kernel need not know aarch64 programs."""
        return {**self.environment, "COMPRESS_AGENT_PYTHON": json.dumps([*self.python(cpu), "-P"])}

    def write_python3(self, path: Path, cpu: str) -> None:
        """Writes a program that behaves as `python3` of a board with that CPU, as does its `sys.executable`."""
        argv = self.python(cpu)
        lines = [
            "#!/bin/sh",
            "unset QEMU_CPU QEMU_LD_PREFIX QEMU_PLUGIN QEMU_LOG LD_LIBRARY_PATH LD_PRELOAD PYTHONHOME PYTHONPATH",
            *(f"export {key}={shlex.quote(value)}" for key, value in ENVIRONMENT.items()),
            # Named after the script, Python takes it for its own program: children and virtual environments start it.
            f'exec {shlex.join(argv[:-1])} -0 "$0" {shlex.quote(argv[-1])} "$@"',
        ]
        partial = path.with_name(path.name + ".partial")
        partial.write_text("\n".join(lines) + "\n")
        partial.chmod(0o755)
        partial.rename(path)


STEERING = ("QEMU_", "PYTHON", "LD_", "VIRTUAL_ENV", "OPENBLAS_", "ORT_", "TFLITE_")
ENVIRONMENT = {
    "PYTHONDONTWRITEBYTECODE": "1",  # the cache stays as its manifest says
    "PYTHONNOUSERSITE": "1",
    "LANG": "C.UTF-8",
}


def ready(progress: Progress) -> Userland:
    """The userland, set up when the cache has none or a damaged one (about a minute). Raises TargetError.

    Checked each time: every file of the cache, the emulator's version; and, once for each emulator, from inside for
    each CPU: that /proc/cpuinfo and the CPU's features are those of the named core, and that the runtimes import.
    """
    if sys.platform != "linux":
        raise TargetError(PLACE, f"qemu's user mode emulation needs Linux, this is {sys.platform}")
    versions = {name: _version(name) for name in WHEELS}
    needed = {name: version for name in NEEDED if (version := _version(name, missing_ok=True))}
    cache = cache_folder()
    sources = Sources.of_machine()
    pins = [f"{name}=={version}" for name, version in (versions | needed).items()]
    key = _key([LAYOUT, ARCHITECTURE, *sources.suites, *PACKAGES, *pins])
    folder = cache / f"userland-{key}"
    emulator = qemu.find(progress)
    with locks.held(cache / f"{folder.name}.lock", place=folder.name, waiting=progress):
        damage = _damage(folder)
        if damage:
            if folder.exists():
                progress.note(f"{folder}: {damage}; it is set up anew")
                shutil.rmtree(folder)
            _set_up(folder, key, sources, versions | needed, emulator, progress)
        python = json.loads((folder / "manifest.json").read_text())["python"]
        userland = Userland(folder, emulator, key, {"python": python, **versions})
        _make_views(userland)
        _check(userland, progress)
    return userland


def _version(name: str, *, missing_ok: bool = False) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError as error:
        if missing_ok:
            return ""
        raise TargetError(
            PLACE, f"{name} is not installed here, and both sides must run it", f"pip install {name}"
        ) from error


def _key(words: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:12]


def _processors() -> int:
    """As many as the host has: a program asks /proc/cpuinfo and the kernel, and the answers must agree."""
    return os.cpu_count() or 1


# ------------------------------------------------------------------------------------------------------ setting up


def _set_up(
    folder: Path, key: str, sources: Sources, versions: dict[str, str], emulator: qemu.Qemu, progress: Progress
) -> None:
    """Makes `folder`, whole or not at all. Downloads of an earlier attempt are used."""
    partial = folder.with_name(folder.name + ".partial")
    root, wheels = partial / "root", partial / "wheels"
    with progress.steps("aarch64 userland", total=6) as advance:
        try:
            shutil.rmtree(root, ignore_errors=True)
            root.mkdir(parents=True)
            wheels.mkdir(exist_ok=True)
            apt = Apt(partial / "apt", ARCHITECTURE, sources)
            apt.prepare()
            advance("package lists")
            files = apt.fetch(PACKAGES)
            advance(f"{len(files)} Debian packages")
            unpack(files, root)
            python = _python_of(root)
            advance(f"unpacked, Python {python}")
            # An empty folder hides the host's, which lies on Debian's path too.
            (root / f"usr/local/lib/python{python}/dist-packages").mkdir(parents=True)
            _wheels(versions, python, wheels, root)
            advance(f"{len(versions)} wheels")
            emulated = Userland(partial, emulator, key, {"python": python, **versions})
            _make_views(emulated)
            _compile(emulated)
            advance("compiled")
            facts = _files(root)
            manifest = {"python": python, "versions": versions, "files": facts}
            (partial / "manifest.json").write_text(json.dumps(manifest))
            shutil.rmtree(partial / "apt")
            shutil.rmtree(wheels)
            partial.rename(folder)
            advance(f"{sum(size for size, *_ in facts.values()) / 1e6:.0f} MB, Python {python}")
        except OSError as error:
            raise TargetError(str(partial), f"set-up failed: {error.strerror or error}") from error


def _python_of(root: Path) -> str:
    """`3.11`, of the release's own Python."""
    target = os.readlink(root / "usr/bin/python3")
    match = re.fullmatch(r"python(3\.\d+)", target)
    if not match:
        raise TargetError(PLACE, f"python3 of the userland is {target}")
    return match[1]


def _wheels(versions: dict[str, str], python: str, wheels: Path, root: Path) -> None:
    if not importlib.util.find_spec("pip"):
        raise TargetError(PLACE, f"{sys.executable} has no pip to fetch wheels with", "python -m ensurepip")
    wanted = [f"{name}=={version}" for name, version in versions.items()]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "-q"]
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    kind = [*platforms, "--python-version", python, "--implementation", "cp", "--only-binary=:all:", "--no-deps"]
    run([*pip, "download", "-d", str(wheels), *kind, *wanted])
    found = ["--no-index", "--find-links", str(wheels), "--no-compile", "--no-warn-conflicts"]
    try:
        run(
            [*pip, "install", "--target", str(_site(root)), *found, *kind, *wanted],
            {**os.environ, "PIP_FIND_LINKS": ""},
        )
    except TargetError:
        shutil.rmtree(wheels)  # a wheel that an interrupted attempt left half is not used again
        raise


def _compile(userland: Userland) -> None:
    """Writes Python's bytecode beside its modules; without it each emulated Python compiles what it imports.

    All of it by this Python where it is of the userland's version, else what the runtimes import by the userland's.
    """
    python = userland.versions["python"]
    if python == f"{sys.version_info[0]}.{sys.version_info[1]}":
        command = [sys.executable, "-m", "compileall", "-q", "-j", "0", "--invalidation-mode", "unchecked-hash"]
        renamed = ["-s", str(userland.root), "-p", "/"]
        places = [str(userland.root / "usr/lib" / f"python{python}"), str(_site(userland.root))]
        subprocess.run([*command, *renamed, *places], capture_output=True)  # some files are for other Pythons, and fail
    else:
        look(userland, "cortex-a72", {"PYTHONDONTWRITEBYTECODE": ""})


def _site(root: Path) -> Path:
    """Where wheels go: on the path of Debian's Python, and not on that of virtual environments."""
    return root / "usr/lib/python3/dist-packages"


Facts = tuple[int, int, str]


def _files(root: Path) -> dict[str, Facts]:
    """Size, time of change in ns and SHA-256 of each file below `root`; a link counts as its target's name."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_symlink() or path.is_file():
            stat = path.lstat()
            found[str(path.relative_to(root))] = (stat.st_size, stat.st_mtime_ns, _sha256(path))
    return found


def _sha256(path: Path) -> str:
    if path.is_symlink():
        return hashlib.sha256(os.readlink(path).encode()).hexdigest()
    return agent.sha256(path)


def _damage(folder: Path) -> str:
    """Why the cached userland cannot be used, or nothing."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        files, _ = manifest["files"], manifest["python"]
    except FileNotFoundError:
        return "it is not complete" if folder.exists() else "it is not there"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its manifest cannot be read ({error})"
    for name, (size, changed, digest) in files.items():
        path = folder / "root" / name
        try:
            stat = path.lstat()
        except OSError:
            return f"{name} is missing"
        same = stat.st_size == size and (stat.st_mtime_ns == changed or _sha256(path) == digest)
        if not same:
            return f"{name} has been changed"
    return ""


def _make_views(userland: Userland) -> None:
    """For each CPU a folder with the userland's folders and that CPU's /proc/cpuinfo."""
    for cpu, core in CORES.items():
        view = userland.view(cpu)
        links = {path.name: f"../../root/{path.name}" for path in userland.root.iterdir()}
        text = cpuinfo(core, _processors())
        (view / "proc").mkdir(parents=True, exist_ok=True)
        for name, target in links.items():
            link = view / name
            if not link.is_symlink() or os.readlink(link) != target:
                link.unlink(missing_ok=True)
                link.symlink_to(target)
        file = view / "proc/cpuinfo"
        if not file.is_file() or file.read_text() != text:
            file.write_text(text)


# -------------------------------------------------------------------------------------------------------- checking

INSIDE = """
import ctypes, json, platform
auxv = ctypes.CDLL(None).getauxval
auxv.restype, auxv.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
seen = {"machine": platform.machine(), "cpuinfo": open("/proc/cpuinfo").read(), "hwcap": auxv(16), "hwcap2": auxv(26)}
print(json.dumps(seen), flush=True)
import numpy, onnxruntime, ai_edge_litert.interpreter
from importlib.metadata import version
print(json.dumps({name: version(name) for name in ("numpy", "onnxruntime", "ai-edge-litert")}))
"""


def _check(userland: Userland, progress: Progress) -> None:
    """`look` on each CPU, once for each emulator."""
    mark = userland.folder / f"checked-{_key([userland.qemu.fingerprint, str(_processors())])}"
    if mark.exists():
        return
    with progress.steps("check of the emulated CPUs", total=len(CORES)) as advance:
        for cpu in CORES:
            look(userland, cpu)
            advance(cpu)
    mark.touch()


def look(userland: Userland, cpu: str, environment: Mapping[str, str] = MappingProxyType({})) -> None:
    """Raises TargetError for an emulator that shows the host's CPU, another core's features, or breaks a runtime."""
    place = f"{PLACE}:{cpu}"
    command = [*userland.python(cpu), "-c", INSIDE]
    done = subprocess.run(command, capture_output=True, text=True, env={**userland.environment, **environment})
    # What it sees of the CPU first: with a wrong one onnxruntime crashes as it is imported, and would hide why.
    said = [json.loads(line) for line in done.stdout.splitlines()]
    if said and (problem := trap(said[0], cpu)):
        raise TargetError(place, problem, f"qemu {userland.qemu.version}: try another release")
    if done.returncode or len(said) != 2:
        raise TargetError(
            place, f"the userland's Python cannot use the runtimes: {last_words(done.stderr.splitlines())}"
        )
    wrong = {name: version for name, version in said[1].items() if version != userland.versions[name]}
    if wrong:
        raise TargetError(
            place, f"the userland has {wrong}, this machine {userland.versions}", f"rm -r {userland.folder}"
        )


def trap(found: dict[str, Any], cpu: str) -> str:
    """In one sentence, why results under this emulation would not be the core's; nothing when they would."""
    if found["machine"] != "aarch64":
        return f"the emulated program sees a {found['machine']}"
    parts = set(re.findall(r"^CPU part\s*: (\S+)", found["cpuinfo"], flags=re.MULTILINE))
    if parts != {CORES[cpu].part}:
        seen = ", ".join(sorted(parts)) or "no ARM core"
        return (
            f"/proc/cpuinfo shows {seen} to the emulated program, not {CORES[cpu].part}: the host's is passed through"
        )
    features = {name for name, bit in HWCAP_BITS.items() if found["hwcap"] >> bit & 1} - set(HARMLESS)
    known = set(CORES[cpu].features) - set(HARMLESS)
    if features != known:
        return (
            f"the emulated CPU is not a {cpu}: it has {_listed(features - known)} too much and lacks"
            f" {_listed(known - features)}"
        )
    if found["hwcap2"]:
        return f"the emulated CPU is not a {cpu}: it has features of ARMv8.4 or later (AT_HWCAP2 {found['hwcap2']:#x})"
    return ""


def _listed(words: set[str]) -> str:
    return ", ".join(sorted(words)) or "nothing"
