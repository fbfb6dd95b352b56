"""How the userland is made and kept: sources, the cache and its damage, the emulator. The slow ones set it up anew."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from compress.errors import TargetError
from compress.progress import Silent
from compress.targets.emulated import counting, debian, qemu, userland

DEB822 = """\
# a comment
Types: deb deb-src
URIs: http://archive.example/debian
Suites: bookworm bookworm-updates
Components: main
  contrib
Architectures: amd64
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://archive.example/debian
Suites: bookworm-backports
Components: main
Enabled: no

Types: deb-src
URIs: http://archive.example/debian
Suites: bookworm
Components: main
"""

ONE_LINE = """\
# deb http://archive.example/debian old main
deb [arch=amd64 signed-by=/k.gpg] http://archive.example/debian bookworm main contrib  # with a comment
deb-src http://archive.example/debian bookworm main
deb http://third.example/debian bookworm stable
"""

BOOKWORM = {"ID": "debian", "VERSION_CODENAME": "bookworm"}


class Heard(Silent):
    """Progress that keeps its notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


# --------------------------------------------------------------------------------------------------------- sources


def test_sources_lose_the_hosts_architecture_and_keep_its_key(tmp_path):
    (tmp_path / "a.sources").write_text(DEB822)
    (stanza,) = debian.stanzas(tmp_path / "a.sources")
    assert stanza == {
        "Types": "deb",
        "Uris": "http://archive.example/debian",
        "Suites": "bookworm bookworm-updates",
        "Components": "main\n  contrib",
        "Signed-By": "/usr/share/keyrings/debian-archive-keyring.gpg",
    }
    (tmp_path / "a.list").write_text(ONE_LINE)
    first, third = debian.stanzas(tmp_path / "a.list")
    assert first == {
        "Types": "deb",
        "Uris": "http://archive.example/debian",
        "Suites": "bookworm",
        "Components": "main contrib",
        "Signed-By": "/k.gpg",
    }
    assert debian.is_debian(first, BOOKWORM)
    assert not debian.is_debian(third, BOOKWORM)


@pytest.mark.parametrize(
    ("uri", "suite", "release", "expected"),
    [
        ("http://archive.example/debian-security", "bookworm-security", BOOKWORM, True),
        ("http://archive.example/debian", "trixie", BOOKWORM, False),
        ("http://third.example/apt", "cloud-sdk-bookworm", BOOKWORM, False),
        ("http://third.example/apt", "bookworm", BOOKWORM, False),
        ("http://archive.example/ubuntu", "noble", {"ID": "ubuntu", "VERSION_CODENAME": "noble"}, False),
        ("http://archive.example/debian", "bookworm", {}, False),
    ],
)
def test_only_debians_own_archive_of_this_release_is_taken(uri, suite, release, expected):
    stanza = {"Types": "deb", "Uris": uri, "Suites": suite, "Components": "main"}
    assert debian.is_debian(stanza, release) is expected


def test_a_machine_without_debians_archive_is_told_the_way_out(monkeypatch):
    monkeypatch.setattr(debian, "_os_release", lambda: {"ID": "ubuntu", "VERSION_CODENAME": "noble"})
    problem = r"emulated: no Debian archive among .* \(Ubuntu's own has no arm64\); name .* in COMPRESS_APT_SOURCES"
    with pytest.raises(TargetError, match=problem):
        debian.Sources.of_machine()


def test_a_sources_file_of_the_user_is_taken_as_it_is(monkeypatch, tmp_path):
    for name, text in {"a.sources": DEB822, "b.list": ONE_LINE}.items():
        (tmp_path / name).write_text(text)
        monkeypatch.setenv("COMPRESS_APT_SOURCES", str(tmp_path / name))
        found = debian.Sources.of_machine()
        assert found.text == text
        assert "bookworm" in found.suites
        assert found.name.endswith(Path(name).suffix)
    for name, problem in {"missing.list": "cannot be read", "empty.list": "names no archive"}.items():
        (tmp_path / "empty.list").touch()
        monkeypatch.setenv("COMPRESS_APT_SOURCES", str(tmp_path / name))
        with pytest.raises(TargetError, match=f"{name}: {problem}"):
            debian.Sources.of_machine()


def test_an_archive_out_of_reach_is_one_error(tmp_path):
    """apt itself makes it a warning, and then misses every package."""
    sources = debian.Sources(
        "deb [trusted=yes] http://127.0.0.1:9/debian bookworm main\n", "sources.list", ("bookworm",)
    )
    apt = debian.Apt(tmp_path, "arm64", sources)
    with pytest.raises(TargetError, match=r"emulated: apt-get update failed: E: .*; try again") as error:
        apt.prepare()
    assert "\n" not in str(error.value)


def test_no_file_of_the_package_names_a_host():
    for path in Path(debian.__file__).parent.iterdir():
        if path.is_file():
            assert "://" not in path.read_text().replace("ssh://", ""), path


# ----------------------------------------------------------------------------------------------------------- cache


def made(folder: Path) -> Path:
    """A userland's folder with a few files, as `_set_up` leaves it."""
    (folder / "root/usr/bin").mkdir(parents=True)
    (folder / "root/usr/bin/python3.11").write_text("a program")
    (folder / "root/usr/bin/python3").symlink_to("python3.11")
    write_manifest(folder)
    return folder


def write_manifest(folder: Path) -> None:
    files = userland._files(folder / "root")
    (folder / "manifest.json").write_text(json.dumps({"python": "3.11", "versions": {}, "files": files}))


def test_damage_of_the_cache_is_noticed(tmp_path):
    folder = made(tmp_path / "userland")
    program, link = folder / "root/usr/bin/python3.11", folder / "root/usr/bin/python3"
    assert userland._damage(folder) == ""
    program.write_text("b program")  # of the same size
    assert userland._damage(folder) == "usr/bin/python3.11 has been changed"
    program.write_text("a program")  # the same bytes at another time are no damage: caches are copied
    os.utime(program, (1, 1))
    assert userland._damage(folder) == ""
    program.write_text("cut")
    assert userland._damage(folder) == "usr/bin/python3.11 has been changed"
    program.unlink()
    assert userland._damage(folder) == "usr/bin/python3.11 is missing"
    program.write_text("a program")
    link.unlink()
    link.symlink_to("/usr/bin/python3")
    assert userland._damage(folder) == "usr/bin/python3 has been changed"


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"files": {}}'])
def test_a_manifest_that_cannot_be_read_is_damage(tmp_path, text):
    folder = made(tmp_path / "userland")
    (folder / "manifest.json").unlink()
    if text is not None:
        (folder / "manifest.json").write_text(text)
    assert userland._damage(folder)
    assert userland._damage(tmp_path / "no such folder") == "it is not there"


def test_a_link_that_leads_out_of_the_userland_is_mended(tmp_path):
    package = tmp_path / "package/DEBIAN"
    package.mkdir(parents=True)
    package.joinpath("control").write_text(
        "Package: linked\nVersion: 1\nArchitecture: all\nMaintainer: test\nDescription: test\n"
    )
    (tmp_path / "package/usr/lib").mkdir(parents=True)
    (tmp_path / "package/usr/lib/real").write_text("inside")
    (tmp_path / "package/usr/lib/link").symlink_to("/usr/lib/real")
    (tmp_path / "package/tmp").mkdir()
    subprocess.run(["dpkg-deb", "--build", tmp_path / "package", tmp_path / "a.deb"], check=True, capture_output=True)
    root = tmp_path / "root"
    root.mkdir()
    debian.unpack([tmp_path / "a.deb"], root)
    assert os.readlink(root / "usr/lib/link") == "real"
    assert (root / "usr/lib/link").read_text() == "inside"
    assert not (root / "tmp").exists()  # it would hide the host's from the emulated program


def test_a_runtime_that_is_not_here_is_named(monkeypatch):
    def missing(name):
        raise userland.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(userland.importlib.metadata, "version", missing)
    with pytest.raises(TargetError, match=r"emulated: numpy is not installed here.*; pip install numpy"):
        userland.ready(Silent())


# -------------------------------------------------------------------------------------------------------- emulator


def fake_qemu(path: Path, version: str, usage: str = "-plugin QEMU_PLUGIN") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = f'#!/bin/sh\n[ "$1" = --version ] && echo "qemu-aarch64 version {version}" || echo "{usage}"\n'
    path.write_text(text)
    path.chmod(stat.S_IRWXU)
    return path


def test_the_emulators_version_is_read(tmp_path):
    found = qemu.asked((str(fake_qemu(tmp_path / "a", "7.2.22 (Debian 1:7.2+dfsg)")),))
    assert found is not None
    assert (found.version, found.plugin_interface) == ("7.2.22", 1)
    for version, interface in {"8.1.0": 1, "8.2.2": 2, "9.0.0": 3, "10.0.3": 3}.items():
        assert qemu.Qemu(("qemu",), version).plugin_interface == interface


def test_an_old_emulator_is_refused(tmp_path):
    with pytest.raises(TargetError, match=r"emulated: .* is qemu 6\.2; 7\.2 or newer is needed"):
        qemu.asked((str(fake_qemu(tmp_path / "b", "6.2.0")),))


def unreachable(package, program, progress, sources=None):
    raise TargetError("emulated", "no network")


def test_an_emulator_with_plugins_is_preferred(tmp_path, monkeypatch):
    """Debian 13's loads none: the machine's archive and then the user's are asked for one that does."""
    fake_qemu(tmp_path / "bin/qemu-aarch64", "10.0.2", usage="no such option")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin")
    monkeypatch.setenv("COMPRESS_APT_SOURCES", "/a/bookworm.list")
    asked = []

    def fetched(package, program, progress, sources=None):
        asked.append(sources)
        usage = "QEMU_PLUGIN" if sources else "no such option"
        return (str(fake_qemu(tmp_path / f"{len(asked)}/qemu-aarch64", "7.2.22", usage=usage)),)

    monkeypatch.setattr(qemu, "fetched_program", fetched)
    found = qemu.find(Silent())
    assert asked == [None, Path("/a/bookworm.list")]
    assert (found.version, found.plugins) == ("7.2.22", True)


def test_without_plugins_it_still_computes_and_counting_says_why_not(tmp_path, monkeypatch):
    fake_qemu(tmp_path / "bin/qemu-aarch64", "10.0.2", usage="no such option")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin")
    monkeypatch.setattr(qemu, "fetched_program", unreachable)
    found = qemu.find(Silent())
    assert (found.version, found.plugins) == ("10.0.2", False)
    with pytest.raises(TargetError, match=r"qemu 10\.0\.2 without plugins.*; install one that loads them"):
        counting.plugin(found, Silent())


def test_no_emulator_at_all_is_one_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(qemu, "fetched_program", unreachable)
    problem = r"emulated: qemu-aarch64 is not on this machine, and it cannot be fetched \(no network\); sudo apt-get"
    with pytest.raises(TargetError, match=problem):
        qemu.find(Silent())


# ------------------------------------------------------------------------------------------------- setting up anew

READY = """
import sys
from compress.progress import RichProgress
from compress.targets.emulated.userland import ready
from rich.console import Console
print(ready(RichProgress(Console(width=200))).folder)
"""


def start(cache: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", READY], env=environment, text=True, start_new_session=True, **pipes)


@pytest.mark.slow
def test_two_at_once_an_interrupted_and_a_damaged_set_up(tmp_path):
    first = start(tmp_path)
    until = time.monotonic() + 120
    while not list(tmp_path.glob("compress/userland-*.partial/root/usr")) and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    (partial,) = tmp_path.glob("compress/userland-*.partial")
    folder = partial.with_suffix("")
    assert not folder.exists()

    both = [start(tmp_path), start(tmp_path)]
    said = [process.communicate(timeout=600) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert [out.splitlines()[-1] for out, _ in said] == [str(folder)] * 2
    assert sum("MB, Python" in out for out, _ in said) == 1  # one set it up, the other waited
    assert sum("which is at work on it" in out for out, _ in said) == 1
    assert not partial.exists()

    numpy = folder / "root/usr/lib/python3/dist-packages/numpy/__init__.py"
    numpy.write_text(numpy.read_text().replace("a", "b", 1))
    third = start(tmp_path)
    out, errors = third.communicate(timeout=600)
    assert third.returncode == 0, errors
    assert "dist-packages/numpy/__init__.py has been changed; it is set up anew" in out
    assert userland._damage(folder) == ""


@pytest.mark.slow
def test_the_emulator_is_fetched_where_there_is_none(tmp_path, monkeypatch):
    """With its libraries, into the cache; it runs a program of the userland."""
    here = userland.ready(Silent())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    which = shutil.which
    monkeypatch.setattr(qemu.shutil, "which", lambda name: None if name == "qemu-aarch64" else which(name))
    found = qemu.find(Silent())
    assert str(tmp_path) in found.command[-1]
    assert not list(tmp_path.glob("compress/*.partial"))
    elsewhere = userland.Userland(here.folder, found, here.key, here.versions)
    for cpu in ("cortex-a53", "cortex-a76"):
        userland.look(elsewhere, cpu)
