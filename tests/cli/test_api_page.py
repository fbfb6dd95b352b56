"""docs/api.md: every public function of compress.api as the code has it, and examples that run."""

import inspect
import re
import types
from pathlib import Path

import pytest
from test_api import place  # noqa: F401
from test_pipeline import NETWORK

from compress import api

PAGE = (Path(__file__).parents[2] / "docs/api.md").read_text()


def functions():
    return {
        name: value
        for name, value in vars(api).items()
        if isinstance(value, types.FunctionType) and value.__module__ == api.__name__ and not name.startswith("_")
    }


def entry(name: str, function: types.FunctionType) -> str:
    """What the page has to say of a function."""
    signature = str(inspect.signature(function)).replace("'", "")
    return f"### {name}\n\n`{name}{signature}`\n\n{inspect.getdoc(function)}\n"


def test_every_public_function_is_on_the_page_as_the_code_has_it():
    assert len(functions()) > 6
    for name, function in functions().items():
        assert entry(name, function) in PAGE, f"docs/api.md should have:\n\n{entry(name, function)}"
    assert re.findall(r"^### (\w+)$", PAGE, re.MULTILINE) == list(functions())


@pytest.mark.slow
def test_the_examples_run(place):  # noqa: F811
    Path("mynet.py").write_text(NETWORK)
    Path("mine.yaml").write_text(
        "name: mine\nmodel: {use: 'mynet:Net'}\ndata: {use: digits}\npreprocess: {size: 16}\n"
        "stages: [{use: train, epochs: 1}, {use: export}]\n"
    )
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert len(blocks) > 2
    made: dict = {}
    for block in blocks:
        exec(compile(block, "docs/api.md", "exec"), made)
    assert Path("runs/mine/report.html").is_file()
    assert Path("student/structure.json").is_file()
