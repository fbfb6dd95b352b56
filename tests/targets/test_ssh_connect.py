"""Ways in which a board cannot be used, each told in one line with a way out."""

from __future__ import annotations

import ast
import socket
import sys
from pathlib import Path

import asyncssh
import pytest
from stand_in import StandIn, stand_in

from compress.errors import TargetError
from compress.targets import board as far_end
from compress.targets import connection
from compress.targets.ssh import CONFIG, Ssh

board = pytest.fixture(stand_in)


def refused(board: StandIn, url: str = "", within: str = "") -> str:
    """What the user reads; the board is left clean."""
    with pytest.raises(TargetError) as raised, Ssh(url or board.url, config=board.config):
        pass
    text = str(raised.value)
    assert len(text.splitlines()) == 1
    assert raised.value.way_out
    assert board.quiet()
    return text


def test_a_board_says_what_it_is(board: StandIn) -> None:
    with Ssh(board.url, config=board.config) as machine:
        found = machine.ask(["probe"], about="probe")
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["bits"] == 64
    assert board.quiet()
    assert board.commands == [connection.REMOTE]


def test_the_configuration_may_come_from_the_environment(board: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CONFIG, str(board.config))
    with Ssh(board.url) as machine:
        assert machine.ask(["probe"], about="probe")["bits"] == 64


def test_an_alias_of_the_configuration_is_a_host(board: StandIn) -> None:
    board.write_config("Host myboard", "HostName 127.0.0.1", f"Port {board.port}", "User pi")
    with Ssh("ssh://myboard", config=board.config) as machine:
        assert machine.ask(["probe"], about="probe")["bits"] == 64


def test_settings_meant_for_the_user_s_own_sessions_do_not_disturb(board: StandIn) -> None:
    settings = [
        "RemoteCommand echo hello",
        "RequestTTY force",
        "LocalForward 1 localhost:1",
        "ExitOnForwardFailure yes",
    ]
    board.write_config(*settings, "ControlMaster auto", f"ControlPath {board.home}/socket", "ControlPersist 60")
    with Ssh(board.url, config=board.config) as machine:
        assert machine.ask(["probe"], about="probe")["bits"] == 64
    assert not (board.home / "socket").exists()


def test_no_such_host(board: StandIn) -> None:
    assert "no host of that name is known" in refused(board, "ssh://pi@no-such-board.invalid")


def test_nothing_listens(board: StandIn) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    assert "nothing listens there" in refused(board, f"ssh://pi@127.0.0.1:{port}")


def test_no_answer(board: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "CONNECT_S", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert "no answer" in refused(board, f"ssh://pi@127.0.0.1:{silent.getsockname()[1]}")


def test_not_an_ssh_server(board: StandIn) -> None:
    board.know_host()
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.listen()
        port = other.getsockname()[1]

        def answer() -> None:
            link, _ = other.accept()
            link.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 200)
            link.close()

        import threading

        thread = threading.Thread(target=answer)
        thread.start()
        assert "ssh cannot connect" in refused(board, f"ssh://pi@127.0.0.1:{port}")
        thread.join()


def test_unknown_host_key(board: StandIn) -> None:
    board.known_hosts.write_text("")
    text = refused(board)
    assert "its host key is not known here" in text
    assert f"`ssh -p {board.port} pi@127.0.0.1`" in text
    assert board.known_hosts.read_text() == ""
    assert not board.commands


def test_wrong_host_key(board: StandIn) -> None:
    board.know_host(asyncssh.generate_private_key("ssh-ed25519"))
    text = refused(board)
    assert "its host key is not the one that this machine knows" in text
    assert f"ssh-keygen -R '[127.0.0.1]:{board.port}'" in text
    assert not board.commands


def test_a_password_is_wanted(board: StandIn) -> None:
    board.password_only = True
    text = refused(board)
    assert "wants a password, which nobody can type here" in text
    assert f"ssh-copy-id -p {board.port} pi@127.0.0.1" in text


def test_another_user(board: StandIn) -> None:
    assert "Permission denied" in refused(board, board.url.replace("pi@", "root@"))


def test_no_ssh_here(board: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(board.home))
    assert refused(board) == "ssh: cannot be started: No such file or directory; apt install openssh-client"


def test_no_python3(board: StandIn) -> None:
    (board.programs / "python3").unlink()
    text = refused(board)
    assert "has no python3 (Linux " in text
    assert "sudo apt install python3-venv" in text


def test_ssh_is_killed_before_the_board_answers(
    board: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ssh").write_text("#!/bin/sh\nkill -9 $$\n")
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refused(board) == f"{board.url}: ssh was ended by SIGKILL; run the same command again"


def test_a_python3_that_does_not_start(board: StandIn) -> None:
    board.write_program("python3", "echo 'libpython3: cannot open shared object file' >&2; exit 127")
    assert "ended with status 127: libpython3: cannot open shared object file" in refused(board)


def test_python_too_old(board: StandIn) -> None:
    old = f"""exec {sys.executable} -c 'import sys; sys.version_info = (3, 7, 3); exec(sys.argv[-1])' "$@" """
    board.write_program("python3", old)
    text = refused(board)
    assert f"{board.programs}/python3 there is Python 3.7.3; install Python 3.9 or newer" in text


def test_32_bit_system(board: StandIn) -> None:
    board.write_program("uname", 'case "$1" in -s) echo Linux;; *) echo armv7l;; esac')
    assert "runs a 32-bit system (Linux armv7l); install a 64-bit system there" in refused(board)


def test_32_bit_python_on_a_64_bit_kernel(board: StandIn) -> None:
    narrow = (
        f"""exec {sys.executable} -c 'import struct, sys; struct.calcsize = lambda _: 4; exec(sys.argv[-1])' "$@" """
    )
    board.write_program("python3", narrow)
    assert "has a 32-bit Python on a kernel for" in refused(board)


def test_an_account_without_a_shell(board: StandIn) -> None:
    board.write_program("nologin", "echo This account is currently not available.; exit 1")
    board.shell = "nologin"
    assert "its login shell ran no command; it said: This account is currently not available." in refused(board)


@pytest.mark.parametrize("folder", ["/proc/nowhere", "/dev/null/cache"])
def test_a_home_that_cannot_be_written(board: StandIn, folder: str) -> None:
    board.environment["XDG_CACHE_HOME"] = folder
    text = refused(board)
    assert f"cannot write {folder}/compress: " in text
    assert "set XDG_CACHE_HOME there" in text


def test_the_cache_may_lie_elsewhere(board: StandIn) -> None:
    board.environment["XDG_CACHE_HOME"] = str(board.home / "other")
    with Ssh(board.url, config=board.config) as machine:
        assert machine.place("x").startswith(str(board.home / "other/compress/jobs"))


def test_disk_full(board: StandIn) -> None:
    board.write_program("python3", f'ulimit -f 8; exec {sys.executable} "$@"')
    with Ssh(board.url, config=board.config) as machine:
        with pytest.raises(TargetError) as raised:
            machine.ask(["probe"], about="probe")
        assert "the disk of 127.0.0.1 is full: File too large; make room: " in str(raised.value)
        assert " MB free in " in str(raised.value)
        assert len(str(raised.value).splitlines()) == 1
    assert board.quiet()
    assert not list(board.home.glob(".cache/compress/files/*"))
    assert not list(board.home.glob(".cache/compress/files/.*"))


def test_what_a_login_shell_prints_is_no_answer(board: StandIn) -> None:
    rc = ["echo Welcome to the board", "echo '{\"reply\": {}}'", "echo some words >&2", "printf 'no end of line'"]
    (board.home / ".bashrc").write_text("\n".join([*rc, "(sleep 0.7; printf 'late {\"error\": 1}') &"]) + "\n")
    board.shell = "bash"
    with Ssh(board.url, config=board.config) as machine:
        assert machine.ask(["probe"], about="probe")["bits"] == 64


def test_two_boards_at_once(board: StandIn, tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    with (
        StandIn(tmp_path / "second") as other,
        Ssh(board.url, config=board.config) as one,
        Ssh(other.url, config=other.config) as two,
    ):
        places = {machine.put(Path(__file__)) for machine in (one, two)}
        assert {place.split("/.cache/")[0] for place in places} == {str(board.home), str(other.home)}


def test_what_runs_there_is_written_for_the_python_that_is_asked_for() -> None:
    ast.parse(Path(far_end.__file__).read_text(), feature_version=connection.PYTHON)
    ast.parse(connection.HELLO, feature_version=(3, 4))
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(Path(far_end.__file__).read_text()))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported <= sys.stdlib_module_names
