"""What `ssh://...` may say, and what becomes of it on a command line."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest

from compress.errors import TargetError
from compress.targets.connection import REMOTE, Address, Connection, parse
from compress.targets.ssh import Ssh


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("ssh://board", Address(None, "board", None)),
        ("ssh://pi@raspberrypi.local", Address("pi", "raspberrypi.local", None)),
        ("ssh://pi@192.168.1.7:2222", Address("pi", "192.168.1.7", 2222)),
        ("ssh://[fe80::1%eth0]:22", Address(None, "fe80::1%eth0", 22)),
        ("ssh://pi@[::1]", Address("pi", "::1", None)),
        ("ssh://me@lab.example@gate:22", Address("me@lab.example", "gate", 22)),
        ("ssh://my_board-2", Address(None, "my_board-2", None)),
    ],
)
def test_parts(url: str, address: Address) -> None:
    assert parse(url) == address
    assert Ssh(url).name == url


@pytest.mark.parametrize(
    "url",
    [
        *(
            "ssh://",
            "ssh://pi@",
            "ssh://@board",
            "ssh://board:",
            "ssh://board:0",
            "ssh://board:65536",
            "ssh://board:ssh",
        ),
        *("ssh://board/", "ssh://board/home", "ssh://board?x=1", "ssh://board#x", "ssh://:22", "board", "scp://board"),
        *("ssh://-oProxyCommand=touch@board", "ssh://-oProxyCommand=touch", "ssh://pi@-board", "ssh://-pi@board"),
        *("ssh://bo ard", "ssh://pi me@board", "ssh://board\n", "ssh://pi\n@board", "ssh://board:22\n", "ssh://b\0"),
        *(
            "ssh://$(touch x)@board",
            "ssh://`touch x`",
            "ssh://a;touch",
            "ssh://a|b",
            "ssh://'a'",
            'ssh://"a"',
            "ssh://a&b",
        ),
        *("ssh://fe80::1", "ssh://[fe80::1", "ssh://[board]:22", "ssh://[::1%a b]", "ssh://[::1]22", "ssh://[::1%]"),
        "ssh://bücher",
    ],
)
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(TargetError) as raised:
        parse(url)
    assert raised.value.way_out
    assert len(str(raised.value).splitlines()) == 1


def test_a_password_is_not_repeated() -> None:
    with pytest.raises(TargetError, match="holds a password; leave it out and use a key") as raised:
        parse("ssh://pi:raspberry/9@board")
    assert "raspberry" not in str(raised.value)


def test_ssh_is_started_with_words_and_nothing_of_the_address_is_an_option() -> None:
    command = Connection("x", parse("ssh://pi@board:2222"), Path("a config")).command
    assert command[:3] == ["ssh", "-F", "a config"]
    assert command[-6:] == ["2222", "-l", "pi", "--", "board", REMOTE]
    assert "-oBatchMode=yes" in command
    options = " ".join(command).lower()
    assert "stricthostkeychecking" not in options
    assert "knownhosts" not in options


@pytest.mark.parametrize("shell", ["dash", "bash", "busybox", "fish", "zsh", "tcsh"])
def test_every_login_shell_understands_the_remote_command(shell: str, tmp_path: Path) -> None:
    """Where the shell is not installed: its quoting rule, by hand. In single quotes only these are special to any."""
    inner = shlex.split(REMOTE)
    assert inner[:3] == ["exec", "sh", "-c"]
    assert f"exec sh -c '{inner[3]}'" == REMOTE
    assert not set(inner[3]) & set("'\\!\n")  # sh: '; fish: ' and \; csh: ', ! and newline
    words = {"busybox": ["busybox", "ash"], "tcsh": ["tcsh", "-f"]}.get(shell, [shell])
    try:
        done = subprocess.run([*words, "-c", REMOTE], input=b"14\nprint(chr(42))", capture_output=True, cwd=tmp_path)
    except FileNotFoundError:
        return
    lines = done.stdout.decode().splitlines()
    assert lines[1].startswith("compress-board: Linux x86_64 /") or lines[1].startswith(
        "compress-board: Linux aarch64 /"
    )
    assert lines[2:] == ["*"]
