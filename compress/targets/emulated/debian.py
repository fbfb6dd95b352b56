"""Debian's packages without root, fetched by the machine's own `apt-get` with folders of its own.

No address of an archive is written here: they are those of the machine's apt configuration, or of the sources file that
the user names in COMPRESS_APT_SOURCES.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compress import locks
from compress.errors import TargetError
from compress.progress import Progress
from compress.targets import cache

PLACE = "emulated"

SOURCES = "COMPRESS_APT_SOURCES"
"""Environment variable: a file as in /etc/apt/sources.list.d, `.list` or `.sources`."""

KEPT = ("usr", "etc", "lib", "lib64", "bin", "sbin")
"""Of the unpacked packages; an empty /tmp or /home would hide the host's from an emulated program."""

HOST_LIBRARIES = ("libc6_", "libgcc-s1_", "libstdc++6_")
"""Packages that a fetched program takes from the host: the loader does not mix with another build of the C library."""


def cache_folder() -> Path:
    """Where userlands, emulators and compiled plugins are kept; made when it is not there. Raises TargetError."""
    folder = cache.cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TargetError(str(folder), f"cannot be made: {error.strerror}", "set XDG_CACHE_HOME") from error
    return folder


@dataclass(frozen=True)
class Sources:
    """Where apt finds Debian, as the text of a sources file."""

    text: str
    name: str
    """`sources.list` or `debian.sources`: apt tells the two formats apart by the ending."""
    suites: tuple[str, ...]

    @classmethod
    def of_machine(cls) -> Sources:
        """Those that the user names, or Debian's among those of the machine's apt. Raises TargetError for neither."""
        if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
            raise TargetError(
                PLACE, "the userland is made with Debian's apt-get and dpkg-deb, which are not on this machine"
            )
        if named := os.environ.get(SOURCES):
            return cls.of_file(Path(named))
        found = [stanza for path in _apt_files() for stanza in stanzas(path)]
        debian = [stanza for stanza in found if is_debian(stanza, _os_release())]
        if not debian:
            raise TargetError(
                PLACE,
                f"no Debian archive among this machine's {len(found)} apt sources (Ubuntu's own has no arm64)",
                f"name a sources file for Debian in {SOURCES}",
            )
        texts = ["\n".join(f"{key}: {value}" for key, value in stanza.items()) for stanza in debian]
        return cls("\n\n".join(texts) + "\n", "debian.sources", _suites(debian))

    @classmethod
    def of_file(cls, path: Path) -> Sources:
        """Those in a file, as they are. Raises TargetError."""
        try:
            found, text = stanzas(path), path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise TargetError(f"{SOURCES}={path}", f"cannot be read: {error}") from error
        if not found:
            raise TargetError(f"{SOURCES}={path}", "names no archive", "see `man 5 sources.list`")
        return cls(text, "debian.sources" if path.suffix == ".sources" else "sources.list", _suites(found))


def _suites(found: Sequence[dict[str, str]]) -> tuple[str, ...]:
    return tuple(sorted({suite for stanza in found for suite in stanza["Suites"].split()}))


def _apt_files() -> list[Path]:
    settings = run(["apt-config", "shell", "LIST", "Dir::Etc::sourcelist/f", "PARTS", "Dir::Etc::sourceparts/d"])
    words = dict(word.split("=", 1) for word in shlex.split(settings) if "=" in word)
    parts = Path(words.get("PARTS", "/etc/apt/sources.list.d"))
    named = [path for path in (Path(words.get("LIST", "/etc/apt/sources.list")),) if path.is_file()]
    return named + sorted(path for path in parts.glob("*") if path.suffix in (".list", ".sources"))


def stanzas(path: Path) -> list[dict[str, str]]:
    """The enabled binary sources of one file as the fields of `man 5 sources.list`, for every architecture."""
    text = "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("#"))
    if path.suffix == ".sources":
        found = []
        for block in re.split(r"\n\s*\n", text):
            fields = re.findall(r"^([A-Za-z-]+):[ \t]*(.*(?:\n[ \t].*)*)", block, flags=re.MULTILINE)
            found.append({key.title(): value.rstrip() for key, value in fields})
    else:
        found = [_stanza(line) for line in text.splitlines()]
    wanted = [s for s in found if "deb" in s.get("Types", "").split() and s.get("Enabled", "yes").lower() != "no"]
    return [
        {**{key: value for key, value in s.items() if key not in ("Architectures", "Enabled")}, "Types": "deb"}
        for s in wanted
        if "Uris" in s and "Suites" in s
    ]


def _stanza(line: str) -> dict[str, str]:
    """`deb [option=value ...] uri suite component ...` as fields."""
    match = re.fullmatch(r"\s*deb\s+(?:\[([^]]*)\]\s+)?(\S+)\s+(\S+)\s*(.*?)\s*", line.partition("#")[0])
    if not match:
        return {}
    options = dict(option.split("=", 1) for option in (match[1] or "").split() if "=" in option)
    fields = {"Types": "deb", "Uris": match[2], "Suites": match[3], "Components": match[4]}
    known = {"signed-by": "Signed-By", "trusted": "Trusted", "check-valid-until": "Check-Valid-Until"}
    return fields | {known[key]: value for key, value in options.items() if key in known}


def is_debian(stanza: dict[str, str], release: dict[str, str]) -> bool:
    """Whether it is Debian's own archive, of the release in `os-release`.

    Third parties name suites after Debian's releases, and put `debian` into addresses, but not both with the
    component `main`.
    """
    codename = release.get("VERSION_CODENAME", "")
    if release.get("ID") != "debian" or not codename:
        return False
    suites = {codename, *(f"{codename}-{part}" for part in ("updates", "security"))}
    named = "debian" in stanza["Uris"].lower() or "debian-archive" in stanza.get("Signed-By", "")
    return named and "main" in stanza.get("Components", "").split() and bool(suites & set(stanza["Suites"].split()))


def _os_release() -> dict[str, str]:
    with contextlib.suppress(OSError):
        return platform.freedesktop_os_release()
    return {}


@dataclass(frozen=True)
class Apt:
    """`apt-get` with folders of its own: no root, no lock and no list of the machine's."""

    folder: Path
    architecture: str
    sources: Sources | None = None
    """None: the machine's own."""

    def prepare(self) -> None:
        """Writes the settings and fetches the package lists."""
        for name in ("state/lists/partial", "cache/archives/partial", "empty/partial", "etc"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "status").touch()
        settings = {
            "APT::Architecture": self.architecture,
            "APT::Architectures::": self.architecture,
            "APT::Sandbox::User": "root",  # apt as root would fetch as a user who cannot write here
            "APT::Install-Recommends": "false",
            "APT::Update::Error-Mode": "any",  # else an archive out of reach is a warning, and packages are missing
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
            "Dir::State": str(self.folder / "state"),
            "Dir::State::status": str(self.folder / "status"),
            "Dir::Cache": str(self.folder / "cache"),
            "Dir::Etc::parts": "/dev/null",
            "Dir::Etc::main": "/dev/null",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
        }
        if self.sources:
            source = self.folder / "etc" / self.sources.name
            source.write_text(self.sources.text)
            settings |= {"Dir::Etc::sourcelist": str(source), "Dir::Etc::sourceparts": "/dev/null"}
        # Of the machine's settings only how to reach an archive: its hooks and indexes are for its own upgrades.
        reached = [
            line
            for line in run(["apt-config", "dump"]).splitlines()
            if re.match(r"Acquire::(https?|ftp|proxy|Check-|Force|Allow)\S* ", line, flags=re.IGNORECASE)
        ]
        own = [f'{key} "{value}";' for key, value in settings.items()]
        (self.folder / "apt.conf").write_text("\n".join([*reached, *own]) + "\n")
        self.get("update")

    def get(self, *words: str) -> str:
        return run(["apt-get", *words, "-qq", "-y"], {**os.environ, "APT_CONFIG": str(self.folder / "apt.conf")})

    def fetch(self, packages: Sequence[str]) -> list[Path]:
        """The files of these packages and of all they depend on; what was fetched before is not fetched again."""
        # Of what it has already, `--print-uris` says nothing: it is asked with an empty folder.
        wanted = self.get("install", "--print-uris", "-o", f"Dir::Cache::archives={self.folder / 'empty'}", *packages)
        names = re.findall(r"^'[^']+' (\S+)", wanted, flags=re.MULTILINE)
        self.get("install", "--download-only", *packages)
        return [self.folder / "cache/archives" / name for name in names]


def unpack(files: Sequence[Path], root: Path) -> None:
    """Puts the packages' files below `root`; no script of theirs is run."""
    for file in files:
        run(["dpkg-deb", "--extract", str(file), str(root)])
    for path in root.iterdir():
        if path.name not in KEPT:
            shutil.rmtree(path)
    for path in root.rglob("*"):
        if path.is_symlink() and os.path.isabs(os.readlink(path)):  # would lead out of `root`
            inside = root / os.readlink(path).lstrip("/")
            path.unlink()
            if inside.exists():
                path.symlink_to(os.path.relpath(inside, path.parent))


def fetched_program(
    package: str, program: str, progress: Progress, sources_file: Path | None = None
) -> tuple[str, ...]:
    """argv that starts a program of a Debian package for this machine, kept in the cache. Raises TargetError.

    `program` is its path below `/`. The host's C library serves it; all other libraries come with it. It is fetched
    from the machine's own archive, or from those in `sources_file`.
    """
    sources = Sources.of_file(sources_file) if sources_file else None
    folder = cache_folder() / "-".join(["debian", package, *(sources.suites[:1] if sources else ())])
    with locks.held(folder.with_name(f"{folder.name}.lock"), place=folder.name, waiting=progress):
        if not (folder / program).is_file():
            _fetch(package, folder, sources, progress)
    if not (folder / program).is_file():
        raise TargetError(PLACE, f"Debian's package {package} has no /{program}")
    libraries = sorted({str(file.parent) for file in folder.rglob("*.so*")})
    return ("env", f"LD_LIBRARY_PATH={':'.join(libraries)}", str(folder / program))


def _fetch(package: str, folder: Path, sources: Sources | None, progress: Progress) -> None:
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise TargetError(PLACE, f"no apt-get to fetch {package} with")
    partial = folder.with_name(f"{folder.name}.partial")
    root = partial / "root"
    with progress.steps(f"Debian's {package}", total=3) as advance:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        apt = Apt(partial / "apt", run(["dpkg", "--print-architecture"]).strip(), sources)
        apt.prepare()
        advance("package lists")
        files = apt.fetch([package])
        advance(f"{len(files)} packages")
        unpack([file for file in files if not file.name.startswith(HOST_LIBRARIES)], root)
        shutil.rmtree(folder, ignore_errors=True)
        root.rename(folder)
        shutil.rmtree(partial)
        advance("unpacked")


def run(command: Sequence[str], environment: dict[str, str] | None = None) -> str:
    """What the program prints. TargetError with its last words when it fails or is missing."""
    words = " ".join(command[:2]) if command[0].startswith(("apt", "dpkg")) else command[0]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, check=False)
    except OSError as error:
        raise TargetError(PLACE, f"cannot start {command[0]}: {error.strerror}") from error
    if done.returncode:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith(("E:", "ERROR"))] or lines[-1:] or ["no message"]
        raise TargetError(PLACE, f"{words} failed: {errors[0]}", "try again: what was fetched is kept")
    return done.stdout
