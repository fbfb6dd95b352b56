"""Networks of the user's own files, and what can be wrong with them."""

import sys
from itertools import count

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from compress.errors import ModelError
from compress.models import ModelSettings, build
from compress.models.factory import Factory

NUMBERS = count()
HEAD = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes=7, hidden=4):
        super().__init__()
        self.body = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, hidden), nn.ReLU())
        self.head = nn.Linear(hidden, num_classes, bias=False)
    def forward(self, x):
        return self.head(self.body(x))
"""


class Notes:
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes a module into the current directory; the recipe's name for it, without the function."""
    monkeypatch.chdir(tmp_path)
    names = []

    def write(code):
        names.append(f"own_net_{next(NUMBERS)}")
        (tmp_path / f"{names[-1]}.py").write_text(HEAD + code)
        return names[-1]

    yield write
    for name in names:
        sys.modules.pop(name, None)


def built(use, progress=None, **args):
    chosen = TypeAdapter(ModelSettings).validate_python({"use": use, "args": args})
    assert isinstance(chosen, Factory)
    return build(chosen, 10, 16, progress)


def test_a_factory_that_takes_num_classes(written):
    path = list(sys.path)
    network = built(f"{written('')}:Net", hidden=6)
    assert network(torch.rand(2, 3, 16, 16)).shape == (2, 10)
    assert network.head.in_features == 6
    assert not network.training
    assert sys.path == path


@pytest.mark.parametrize("code", ["def make():\n    return Net()", "def make(**options):\n    return Net(7)"])
def test_the_head_is_replaced_and_said(written, code):
    progress = Notes()
    network = built(f"{written(code)}:make", progress)
    assert network(torch.rand(2, 3, 16, 16)).shape == (2, 10)
    assert network.head.bias is None
    assert progress.notes == ["head replaced: 7 -> 10 classes"]


def test_a_helper_beside_the_file_can_be_imported_late(written):
    helper = written("")
    assert built(f"{written(f'def make():{chr(10)}    from {helper} import Net{chr(10)}    return Net(10)')}:make")


@pytest.mark.parametrize(
    ("code", "name", "message"),
    [
        ("", "Nett", r"has no `Nett`; did you mean Net"),
        ("size = 3", "size", r"`size` is int, not a function"),
        ("def make():\n    return 3", "make", r"returned int; it must return a torch.nn.Module"),
        ("def make():\n    raise KeyError('a\\nb')", "make", r"raised KeyError: 'a"),
        ("raise ValueError('on import')", "Net", r"raised ValueError: on import"),
        ("import argparse\nargparse.ArgumentParser().parse_args(['--no-such'])", "Net", r"raised SystemExit: 2"),
        ("def make():\n    raise SystemExit('no data')", "make", r"raised SystemExit: no data"),
        ("import not_installed", "Net", r"raised ModuleNotFoundError: No module named 'not_installed'"),
        ("def (", "Net", r"raised SyntaxError"),
        ("def make():\n    return nn.Linear(5, 10)", "make", r"fails on an image of 16x16 pixels \(RuntimeError"),
        (
            "def make():\n    return nn.Conv2d(3, 10, 1)",
            "make",
            r"returns shape \(1, 10, 16, 16\); it must return logits",
        ),
        ("class Two(Net):\n    def forward(self, x):\n        return x, x", "Two", r"returns tuple"),
        (
            "def make():\n    return nn.Sequential(nn.Conv2d(3, 7, 16), nn.Flatten())",
            "make",
            r"no linear layer to replace",
        ),
        (
            "class Cut(Net):\n    def forward(self, x):\n        return self.body(x)",
            "Cut",
            r"has 4 outputs, but the data has 10 classes",
        ),
    ],
)
def test_each_mistake_is_one_line(written, code, name, message):
    with pytest.raises(ModelError, match=message) as caught:
        built(f"{written(code)}:{name}")
    assert "\n" not in str(caught.value)


def test_no_such_module(written):
    with pytest.raises(ModelError, match="no module `no_such_package`; searched in"):
        built("no_such_package.nets:small")


def test_num_classes_is_not_the_recipes_business(written):
    with pytest.raises(ModelError, match="leave it out"):
        built(f"{written('')}:Net", num_classes=3)


def test_a_network_of_an_installed_package():
    with pytest.raises(ModelError, match="raised TypeError"):
        built("torch.nn:Linear")
    assert issubclass(nn.Linear, nn.Module)
