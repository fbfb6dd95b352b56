"""No text of a recipe, a file's name or a board becomes part of a command that a shell reads."""

import ast
import shlex
from pathlib import Path

import pytest

from compress.errors import RecipeError, TargetError
from compress.targets import connection
from compress.targets.connection import REMOTE, Connection, parse

HOSTILE = [
    "ssh://-oProxyCommand=touch${IFS}x",
    "ssh://-oProxyCommand=x@host",
    "ssh://host -oProxyCommand=x",
    "ssh://user@-Fx",
    "ssh://-lroot@host",
    "ssh://host;touch x",
    "ssh://host$(touch x)",
    "ssh://host`touch x`",
    "ssh://'host'",
    'ssh://"host"',
    "ssh://host\ntouch x",
    "ssh://host\x00",
    "ssh://user name@host",
    "ssh://us'er@host",
    "ssh://user@host|x",
    "ssh://user@host:22;x",
    "ssh://user@host:-p",
    "ssh://user@host:99999",
    "ssh://user@host/../x",
    "ssh://host#x",
    "ssh://host?x",
    "ssh://[::1;x]",
    "ssh://[fe80::1%$(x)]",
    "ssh://@host",
    "ssh://",
    "ssh://%h",
    "ssh://user@{host,x}",
    "ssh://ho\\st",
    "ssh://host&x",
    "ssh://host>x",
    "ssh://user:hunter2@host",
    "ssh://host\u202e",
    "ssh://*",
]


@pytest.mark.parametrize("address", HOSTILE)
def test_an_address_that_could_say_more_than_a_host_is_refused(address):
    with pytest.raises(TargetError) as caught:
        parse(address)
    assert "hunter2" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("address", HOSTILE)
def test_the_same_in_a_recipe(address, tmp_path):
    from compress import recipe as recipes

    path = tmp_path / "recipe.yaml"
    path.write_text(
        "name: x\nmodel: {use: mobilenet_v2}\ndata: {use: digits}\npreprocess: {size: 32}\n"
        "stages: [{use: train, epochs: 1}]\n"
    )
    with pytest.raises(RecipeError) as caught:
        recipes.load(
            path, ["target=" + ast.unparse(ast.Constant(address)) if "'" not in address else f'target="{address}"']
        )
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "address", ["ssh://host", "ssh://pi@raspberrypi.local:2222", "ssh://a.b+c@10.0.0.7", "ssh://pi@[fe80::1%eth0]:22"]
)
def test_the_words_of_ssh_end_with_the_host_and_one_constant_command(address):
    command = Connection(address, parse(address), None).command
    assert command[0] == "ssh"
    assert command[-1] == REMOTE
    assert command[-3] == "--"
    assert not command[-2].startswith("-")
    assert sum(word == REMOTE for word in command) == 1
    for option in command[1 : command.index("--")]:
        assert "ProxyCommand" not in option
        assert "LocalCommand" not in option


def test_the_remote_command_is_a_constant_of_the_source():
    """Not formatted, not added to: one literal that a shell reads the same on every board."""
    tree = ast.parse(Path(connection.__file__).read_text(encoding="utf-8"))
    values = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(values["REMOTE"]):
        assert not isinstance(node, ast.Call)
        if isinstance(node, ast.Name):
            assert isinstance(values[node.id], ast.Constant)
    assert shlex.split(REMOTE)


def test_every_command_that_we_start_is_a_list_of_words():
    """No subprocess call of ours has text for a command, which a shell would have to split."""
    root = Path(connection.__file__).parents[1]
    found = 0
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "subprocess.run",
                "subprocess.Popen",
                "subprocess.check_output",
            ):
                found += 1
                assert not isinstance(node.args[0], (ast.JoinedStr, ast.Constant)), f"{path}:{node.lineno}"
    assert found > 10
