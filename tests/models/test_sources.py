"""Which files and packages a user's network is made of."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from compress.models.sources import sources


def written(folder: Path, **texts: str) -> Path:
    for name, text in texts.items():
        path = folder / (name.replace("__", "/").replace("/init", "/__init__") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def names(module: str, folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in sources(module, folder).files]


def test_what_is_imported_counts_however_it_is_imported_and_nothing_else(tmp_path: Path) -> None:
    written(
        tmp_path,
        net="import torch\nfrom torch import nn\nimport blocks.wide\nfrom blocks import narrow as n, NOT_A_MODULE\n",
        blocks__init="NOT_A_MODULE = 1\n",
        blocks__wide="from . import shared\nfrom .deep.inner import x\nfrom .. import nothing\n",
        blocks__narrow="def f():\n    import late\n    import importlib\n    importlib.import_module('named')\n",
        blocks__shared="from blocks.wide import y\n",  # a circle
        blocks__deep__init="",
        blocks__deep__inner="x = 1\n",
        blocks__stranger="",
        late="import os, json.decoder\n",
        named="",
        beside="",
    )
    assert names("net", tmp_path) == [
        "blocks/__init__.py",
        "blocks/deep/__init__.py",
        "blocks/deep/inner.py",
        "blocks/narrow.py",
        "blocks/shared.py",
        "blocks/wide.py",
        "late.py",
        "named.py",
        "net.py",
    ]


def test_a_module_in_a_package_brings_the_package_and_relative_imports_lead_up(tmp_path: Path) -> None:
    written(
        tmp_path,
        pkg__init="from . import registry\n",
        pkg__registry="",
        pkg__nets__init="",
        pkg__nets__small="from ..layers import conv\nfrom ...above import nothing\n",
        pkg__layers__conv="",
    )
    assert names("pkg.nets.small", tmp_path) == [
        "pkg/__init__.py",
        "pkg/layers/conv.py",  # of a folder without __init__.py
        "pkg/nets/__init__.py",
        "pkg/nets/small.py",
        "pkg/registry.py",
    ]


def test_nothing_is_run(tmp_path: Path) -> None:
    written(tmp_path, own__init="raise SystemExit('run')\n", own__net="import own.other\n", own__other="1/0\n")
    assert len(sources("own.net", tmp_path).files) == 3
    assert not [name for name in sys.modules if name.partition(".")[0] == "own"]


@pytest.mark.parametrize("text", ["def (", "\x00", "from . import x\nimport . \n"])
def test_code_that_python_cannot_read_counts_by_its_file_alone(tmp_path: Path, text: str) -> None:
    written(tmp_path, net=text)
    assert names("net", tmp_path) == ["net.py"]


def test_installed_packages_count_by_their_versions_and_ours_by_our_own_code(tmp_path: Path) -> None:
    written(tmp_path, net="import PIL.Image, yaml_of_nobody, compress.models, json\nfrom torch import nn\n")
    found = sources("net", tmp_path)
    assert found.versions == {"pillow": version("pillow"), "torch": version("torch")}
    assert len(found.files) == 1
    assert sources("torch.nn", tmp_path).files == ()
    assert sources("torch.nn", tmp_path).versions == {"torch": version("torch")}
    assert sources("no_such_module_at_all", tmp_path).files == ()
