"""Only the module that the user names runs: nothing that happens to lie in the current directory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHADOWS = (
    "json",
    "random",
    "yaml",
    "torch",
    "numpy",
    "onnx",
    "PIL",
    "rich",
    "typer",
    "flatbuffers",
    "sitecustomize",
    "usercustomize",
    "compress",
    "conftest",
)
RECIPE = """
name: x
model: {use: mobilenet_v2}
data: {use: digits}
preprocess: {size: 32}
stages: [{use: train, epochs: 1}]
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder full of modules that tell when they are imported."""
    for name in SHADOWS:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r} + '\\n')\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


def called(place: Path, *words: str, starts: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return subprocess.run([*starts, *words], cwd=place, env=kept, capture_output=True, text=True, timeout=300)


SCRIPT = (sys.executable, str(Path(sys.executable).with_name("compress")))


IMPORTS_TORCH = [("check", "recipe.yaml"), ("verify", "nothing.onnx"), ("schema",)]


@pytest.mark.parametrize(
    "words",
    [("--help",), ("bench", "nothing.onnx"), *(pytest.param(words, marks=pytest.mark.slow) for words in IMPORTS_TORCH)],
)
def test_the_script_imports_nothing_of_the_current_directory(words, place):
    if not Path(SCRIPT[1]).exists():
        pytest.fail("the package is not installed, so there is no script to test")
    done = called(place, *words, starts=SCRIPT)
    assert done.returncode in (0, 1), done.stderr
    assert "Traceback" not in done.stderr
    assert not (place / "ran").exists(), (place / "ran").read_text()


def test_python_m_imports_nothing_of_it_with_the_option_p(place):
    """`python -m` itself puts the current directory first, before anything of ours is asked."""
    done = called(place, "bench", "nothing.onnx", starts=(sys.executable, "-P", "-m", "compress.cli"))
    assert done.returncode == 1, done.stderr
    assert not (place / "ran").exists(), (place / "ran").read_text()


@pytest.mark.slow
def test_the_module_that_the_recipe_names_runs_and_no_other(place):
    (place / "mynet.py").write_text(
        "import json\nfrom torch import nn\n"
        "def net(num_classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, num_classes))\n"
    )
    (place / "other.py").write_text(f"open({str(place / 'ran')!r}, 'a').write('other')\n")
    for name in SHADOWS:
        (place / f"{name}.py").unlink()
    (place / "recipe.yaml").write_text(RECIPE.replace("mobilenet_v2", '"mynet:net"'))
    done = called(place, "doctor", "recipe.yaml", "--no-measure", starts=SCRIPT)
    assert "Traceback" not in done.stderr
    assert not (place / "ran").exists()


@pytest.mark.slow
def test_checking_a_recipe_runs_none_of_its_code(place):
    """`check` says what would run; a stranger's recipe can be looked at."""
    for name in SHADOWS:
        (place / f"{name}.py").unlink()
    (place / "evil.py").write_text(f"open({str(place / 'ran')!r}, 'a').write('evil')\n")
    (place / "recipe.yaml").write_text(
        RECIPE.replace("mobilenet_v2", '"evil:net"').replace("{use: digits}", '{use: "evil:data"}')
    )
    done = called(place, "check", "recipe.yaml", starts=SCRIPT)
    assert "Traceback" not in done.stderr
    assert not (place / "ran").exists()
