"""CONTRIBUTING.md, followed to the letter in a copy of the package: files written, lines put in, tests run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL | re.MULTILINE)

RECIPE = """
name: own
model: {use: mobilenet_v2, width: 0.35}
data: {use: digits}
preprocess: {size: 32}
stages:
  - {use: train, epochs: 1}
  - {use: prune, goal: {macs: 0.5}, criterion: {use: spread}}
  - {use: distill, epochs: 1, losses: [{use: cosine, weight: 2.0}]}
"""


def patched(text: str, hunks: list[str]) -> str:
    """The text with each hunk's `+` lines in, and its `-` lines out; its lines must stand there exactly once."""
    for hunk in hunks:
        lines = hunk.strip("\n").splitlines()
        before = "\n".join(line[1:] for line in lines if not line.startswith("+"))
        after = "\n".join(line[1:] for line in lines if not line.startswith("-"))
        assert f"\n{text}\n".count(f"\n{before}\n") == 1, before
        text = f"\n{text}\n".replace(f"\n{before}\n", f"\n{after}\n")[1:-1]
    return text


def followed(folder: Path) -> list[str]:
    """Does what the page says in a copy of the package; the files that it makes."""
    written = []
    for kind, block in BLOCKS:
        if kind == "python":
            name, _, text = block.partition("\n")
            path = folder / name.removeprefix("# ")
            assert not path.exists(), path
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            written.append(name.removeprefix("# "))
        elif kind == "diff":
            first, *hunks = block.split("@@\n")
            path = folder / first.strip().removeprefix("--- ")
            path.write_text(patched(path.read_text(), hunks))
    return written


def test_what_the_page_changes_is_there(tmp_path):
    for package in ("losses", "criteria"):
        (tmp_path / "compress" / package).mkdir(parents=True)
        shutil.copy(ROOT / "compress" / package / "__init__.py", tmp_path / "compress" / package)
    assert followed(tmp_path) == [
        *("compress/losses/cosine.py", "tests/losses/test_cosine.py"),
        *("compress/criteria/spread.py", "tests/criteria/test_spread.py"),
    ]


def test_the_table_names_files_and_unions_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text[text.index("| to add |") : text.index("## A loss")]
    for name in re.findall(r"`(compress/\w+/)`", table):
        assert (ROOT / name).is_dir(), name
    for line in table.splitlines()[2:]:
        if not line.startswith("|"):
            continue
        places = re.findall(r"`((?:\w+/)*\w+\.py)`", line)
        for name in places:
            assert (ROOT / "compress" / name).is_file(), name
        words = [name for name in re.findall(r"`([A-Z]\w+)`", line) if name not in places]
        for name in words:
            assert any(name in (ROOT / "compress" / place).read_text() for place in places), (name, places)


@pytest.mark.slow
def test_following_the_page_adds_a_loss_and_a_criterion(tmp_path):
    shutil.copytree(ROOT / "compress", tmp_path / "compress", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests").mkdir()
    for name in ("pyproject.toml", "tests/conftest.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    made = followed(tmp_path)
    (tmp_path / "own.yaml").write_text(RECIPE)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    for words in (
        ["ruff", "check", *made],
        ["ruff", "format", "--check", *made],
        ["pytest", "-p", "no:cacheprovider", *(name for name in made if name.startswith("tests"))],
        ["compress.cli", "run", "own.yaml", "--out", "run"],
    ):
        command = [sys.executable, "-m", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
    assert "spread" in (tmp_path / "run/stages/02-prune/manifest.json").read_text()
    assert "cosine" in (tmp_path / "run/stages/03-distill/manifest.json").read_text()
