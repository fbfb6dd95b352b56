"""Completion as bash itself does it: the script is sourced, the function called, COMPREPLY read."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from compress import cli
from compress.cli import completing

SCRIPT = """
source "$1"
COMP_LINE="$2" COMP_POINT=${#2}
# As readline splits a line: at blanks, and = and : are words of their own.
mapfile -t COMP_WORDS < <(printf '%s' "$2" | sed -E 's/([=:])/ \\1 /g' | tr -s ' ' '\\n')
case "$2" in *' ') COMP_WORDS+=("") ;; esac
COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 ))
HELD=no
compopt() { HELD=yes; }
_compress_completion compress "${COMP_WORDS[COMP_CWORD]}" ""
printf '%s\\n' "$HELD" "${COMPREPLY[@]}"
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    for name in ("recipes", "runs/small", "runs/empty", "bin"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "runs/small/run.json").write_text("{}")
    recipe = "name: a\nseed: 0\ndata: {use: digits}\nstages:\n- {use: train, epochs: 3}\n- {use: export}\n"
    (tmp_path / "mine.yaml").write_text(recipe + "- {use: export, formats: [onnx]}\n")
    (tmp_path / "recipes/other.yml").write_text("name: b")
    (tmp_path / "notes.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def completed(place: Path, line: str) -> tuple[bool, list[str]]:
    """What bash offers for the line, and whether it holds back the blank behind it."""
    (place / "bin/compress").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m compress.cli "$@"\n')
    (place / "bin/compress").chmod(0o755)
    (place / "completion").write_text(completing.BASH)
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PATH": f"{place / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": root}
    command = ["bash", "--norc", "-c", SCRIPT, "bash", "completion", line]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.returncode == 0
    held, *offered = done.stdout.split("\n")[:-1]
    return held == "yes", offered


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not on this machine")
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("compress ", [command.name or command.callback.__name__ for command in cli.app.registered_commands]),
        ("compress re", ["report"]),
        ("compress run --q", ["--quiet"]),
        ("compress run m", ["mine.yaml"]),
        ("compress run re", ["recipes/"]),
        ("compress run recipes/", ["recipes/other.yml"]),
        ("compress report ru", ["runs/small", "runs/"]),
        ("compress run mine.yaml stages.tr", ["stages.train.use=", "stages.train.epochs="]),
        ("compress run mine.yaml stages.2", ["stages.2.use=", "stages.2.formats="]),
        ("compress run mine.yaml --track t", ["tensorboard"]),
        ("compress completion ", ["bash", "zsh", "fish"]),
    ],
)
def test_bash_offers(place, line, offered):
    held, got = completed(place, line)
    assert got == offered
    assert held == offered[0].endswith(("/", "="))


def test_each_shell_has_a_script_that_names_the_program(capsys):
    for shell in completing.Shell:
        completing.completion(shell)
        script = capsys.readouterr().out
        assert "_COMPRESS_COMPLETE" in script
        assert f"complete_{shell}" in script


@pytest.mark.parametrize("text", ["- a\n- b", "stages: 3", "stages: [3, {use: []}]", "a: [", "\x00"])
def test_recipes_that_are_none_offer_nothing_that_fails(place, text):
    (place / "mine.yaml").write_text(text)

    class Context:
        params = {"recipe": "mine.yaml"}

    assert isinstance(completing.settings_of_recipe(Context(), "stages"), list)
    assert json.dumps(completing.run_folders("nowhere/")) == "[]"
