"""`compress completion`, and what a shell is offered for recipes, runs and settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

BASH = """\
_compress_completion() {
    local IFS=$'\\n'
    COMPREPLY=( $( env COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD=$COMP_CWORD _COMPRESS_COMPLETE=complete_bash "$1" ) )
    # No blank behind a folder, which goes on, and behind KEY=, which wants its value.
    case "${COMPREPLY[0]-}" in */|*=) compopt -o nospace ;; esac
}
complete -o default -F _compress_completion compress
"""


class Shell(StrEnum):
    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def completion(shell: Annotated[Shell, typer.Argument(metavar="SHELL", help="bash, zsh or fish.")]) -> None:
    """Print a script that makes a shell complete commands.

    It knows commands, options, recipes, runs, and the settings of the recipe on the line.

    bash: compress completion bash > ~/.local/share/bash-completion/completions/compress; zsh: a file _compress in a
    folder of $fpath; fish: ~/.config/fish/completions/compress.fish.
    """
    from typer.completion import get_completion_script

    if shell is Shell.BASH:
        print(BASH, end="")
    else:
        print(get_completion_script(prog_name="compress", complete_var="_COMPRESS_COMPLETE", shell=shell))


def recipe_files(incomplete: str) -> list[str]:
    """YAML files, and folders to go on in."""
    return [name for name in _entries(incomplete) if name.endswith(("/", ".yaml", ".yml"))]


def run_folders(incomplete: str) -> list[str]:
    """Folders of runs, in `runs` and where the word leads; and folders to go on in."""
    known = [f"runs/{path.parent.name}" for path in sorted(Path("runs").glob("*/run.json"))]
    found = [name for name in known if name.startswith(incomplete)]
    for name in _entries(incomplete):
        if name.endswith("/"):
            found.append(name.rstrip("/") if (Path(name) / "run.json").is_file() else name)
    return list(dict.fromkeys(found))


def settings_of_recipe(context: typer.Context, incomplete: str) -> list[str]:
    """KEY= of each setting that the recipe on the line has: `stages.train.epochs=`."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        recipe = YAML(typ="safe", pure=True).load(Path(str(context.params["recipe"])).read_text(encoding="utf-8"))
    except (OSError, YAMLError, ValueError, KeyError):
        return []
    return [f"{key}=" for key in dict.fromkeys(_keys("", recipe)) if key.startswith(incomplete)]


def _keys(prefix: str, value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _keys(f"{prefix}.{key}" if prefix else str(key), item)
    elif prefix == "stages" and isinstance(value, list):
        named = [stage["use"] for stage in value if isinstance(stage, Mapping) and isinstance(stage.get("use"), str)]
        for index, stage in enumerate(value):
            use = stage.get("use") if isinstance(stage, Mapping) else None
            yield from _keys(f"stages.{use if named.count(use) == 1 else index}", stage)
    else:
        yield prefix


def _entries(incomplete: str) -> list[str]:
    """What the word may become: files and, with a slash behind them, folders."""
    place, _, begun = incomplete.rpartition("/")
    folder = f"{place}/" if "/" in incomplete else ""
    try:
        paths = sorted(Path(folder or ".").expanduser().iterdir())
    except OSError:
        return []
    return [
        f"{folder}{path.name}{'/' if path.is_dir() else ''}"
        for path in paths
        if path.name.startswith(begun) and (begun.startswith(".") or not path.name.startswith("."))
    ]
