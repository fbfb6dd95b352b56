"""Names that come from outside: of files that are no UTF-8, and of classes, which exported files hold."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from compress import recipe as recipes
from compress.cli import main
from compress.pipeline import Outcome, run_recipe
from compress.progress import Silent, read_log

NETWORK = """
import numpy as np
from torch import nn

NAMES = ["finch", "heron"]

def net(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4, num_classes))

def birds():
    images = [np.random.default_rng(n).integers(0, 256, (16, 16, 3)).astype(np.uint8) for n in range(12)]
    return [(image, NAMES[n % 2]) for n, image in enumerate(images)], None
"""
RECIPE = """
name: named
model: {use: "namednet:net"}
data: %s
preprocess: {size: 16}
stages:
  - {use: train, epochs: 1, batch_size: 4}
  - {use: export, formats: [onnx]}
"""


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "namednet.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("namednet", None)


def go(tmp_path: Path) -> Outcome:
    recipe = recipes.load(tmp_path / "recipe.yaml", [])
    return run_recipe(recipe, tmp_path / "run", Silent(), command="compress run", base=tmp_path)


def labels(run: Path) -> list[str]:
    (path,) = run.glob("stages/*-export/*.onnx")
    found = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    return list(json.loads(found["compress.labels"]))


def test_a_renamed_class_is_another_input(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE % '{use: "namednet:birds", holdout: 0.3}')
    assert go(tmp_path).ran == ["00-load", "01-train", "02-export"]
    assert go(tmp_path).ran == []
    sys.modules["namednet"].NAMES[1] = "stork"  # the numbers of the classes stay
    assert go(tmp_path).ran == ["00-load", "01-train", "02-export"]
    assert labels(tmp_path / "run") == ["finch", "stork"]


def test_names_that_are_no_utf8_go_all_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = os.fsencode(tmp_path / "photos")
    for split, count in ((b"train", 6), (b"val", 2)):
        for kind in (b"cat", b"d\xf6g"):
            place = os.path.join(folder, split, kind)
            os.makedirs(place)
            for number in range(count):
                noise = np.random.default_rng((len(split), len(kind), number)).integers(0, 256, (18, 18, 3))
                with open(os.path.join(place, b"\xff%d.png" % number), "wb") as file:
                    Image.fromarray(noise.astype(np.uint8)).save(file, "PNG")
    with open(os.path.join(folder, b"train", b"\xfe.txt"), "w"):
        pass
    (tmp_path / "recipe.yaml").write_text(RECIPE % "{use: folder, path: photos}")
    monkeypatch.setattr(sys, "argv", ["compress", "run", "recipe.yaml", "--out", "run", "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    for line in capsys.readouterr().out.splitlines():
        json.loads(line.encode())
    notes = [line["facts"]["text"] for line in read_log(tmp_path / "run/log.jsonl") if line["event"] == "note"]
    assert any("\udcfe.txt" in note for note in notes)
    assert labels(tmp_path / "run") == ["cat", "d\\udcf6g"]
    json.loads((tmp_path / "run/report.json").read_text(encoding="utf-8"))
    assert "\\udcf6" in (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert go(tmp_path).ran == []


def test_a_run_json_that_says_other_things_of_the_data_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE % '{use: "namednet:birds", holdout: 0.3}')
    go(tmp_path)
    for data in ([], {"fingerprint": 7}):
        (tmp_path / "run/run.json").write_text(json.dumps({"data": data}))
        assert go(tmp_path).ran == []
