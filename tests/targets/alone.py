"""The agent as a board gets it: a copy, without this repository, its environment or the user's packages."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from compress.targets import agent

AGENT = Path(agent.__file__)


def command(folder: Path, *arguments: object) -> list[str]:
    copy = folder / "agent.py"
    copy.write_bytes(AGENT.read_bytes())
    return [sys.executable, "-I", str(copy), *map(str, arguments)]


def alone(folder: Path, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(folder, *arguments), capture_output=True, text=True, cwd=folder, env={})
    assert done.returncode == code, done.stderr
    return done


def answer(done: subprocess.CompletedProcess[str]) -> dict:
    return json.loads(done.stdout.splitlines()[-1])


def lines(done: subprocess.CompletedProcess[str], key: str) -> list[dict]:
    """What the agent printed before its answer."""
    return [value[key] for value in map(json.loads, done.stdout.splitlines()) if key in value]
