"""docs/tutorial.md as a reader follows it: files written, commands run, Python executed, in order."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TUTORIAL = (ROOT / "docs/tutorial.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TUTORIAL, re.DOTALL | re.MULTILINE)


def test_the_blocks_are_of_the_kinds_that_are_run():
    assert len(BLOCKS) > 10
    assert {kind for kind, _ in BLOCKS} == {"", "console", "python"}
    for kind, block in BLOCKS:
        if kind == "console":
            assert all(line.startswith("$ ") for line in block.splitlines()), block
        if kind == "":  # the installation, which made the environment that runs this test
            assert "pip install" in block


@pytest.mark.slow
def test_every_block_does_what_the_page_says(tmp_path):
    root = str(ROOT)
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "COLUMNS": "150"}
    (tmp_path / "bin").mkdir()
    for name, words in (("compress", "-m compress.cli"), ("python", "")):
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    environment["PATH"] = f"{tmp_path / 'bin'}:{environment['PATH']}"
    said: dict[str, str] = {}

    def run(words: list[str] | str) -> None:
        shell = isinstance(words, str)
        done = subprocess.run(
            words, cwd=tmp_path, env=environment, shell=shell, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        said[words if isinstance(words, str) else "python"] = done.stdout

    for kind, block in BLOCKS:
        name = re.match(r"# ([\w.]+)\n", block)
        if kind == "console":
            for line in block.splitlines():
                run(line.removeprefix("$ "))
        elif kind == "python" and name:
            (tmp_path / name.group(1)).write_text(block)
        elif kind == "python":
            run([sys.executable, "-c", block])

    first, *_, again = [text for line, text in said.items() if line.startswith("compress run")]
    quiet = next(text for line, text in said.items() if line.startswith("compress run --quiet") and "wide" not in line)
    assert quiet == "runs/shapes/report.html\n"
    assert "train  epoch 4/4" in first
    assert again == "runs/wide/report.html\n"
    # A benchmark that was NOISY, on a busy machine, is measured again.
    assert (tmp_path / "runs/shapes/log.jsonl").read_text().count('"stage_resumed"') in (7, 8)
    assert "finished" in said["compress ls"]
    assert "04-quantize" in said["compress show runs/shapes quantize"]
    assert {path.name for path in (tmp_path / "small").iterdir()} == {"structure.json", "weights.safetensors"}
    assert re.fullmatch(r"[\d.]+ before, [\d.]+ after\n", said["python"])
