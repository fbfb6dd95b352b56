"""The recipes of docs/data.md, each opened on data that fits it."""

import json
import re
import sys
from pathlib import Path

import pytest
from pictures import Notes, picture
from pydantic import TypeAdapter
from ruamel.yaml import YAML

from compress.data import SOURCES, DataSettings, FactoryData, open_data
from compress.errors import DataError
from compress.product import Preprocess

DOCS = Path(__file__).resolve().parents[2] / "docs/data.md"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", DOCS.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
RECIPES = [text for kind, text in BLOCKS if kind == "yaml"]


def settings_of(text):
    section = YAML(typ="safe", pure=True).load(text)
    assert set(section) == {"data"}
    return TypeAdapter(DataSettings).validate_json(json.dumps(section["data"]))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """All that the page's recipes name, but what needs a download or an extra."""
    monkeypatch.chdir(tmp_path)
    names = ("n01440764", "other")
    table, tags, angles = ["path,label,split"], ["path,tags"], ["file,yaw,pitch"]
    for number in range(16):
        split = "train" if number < 10 else "val"
        folder = tmp_path / "photos" / split / names[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{number}.png"
        picture(number).save(file)
        at = file.relative_to(tmp_path)
        table.append(f"{at},{names[number % 2]},{split}")
        tags.append(f"{at},{('cat;indoors', 'cat', 'indoors')[number % 3]}")
        angles.append(f"{at},{number / 3:.2f},{-number}")
    for name, lines in (("photos", table), ("tags", tags), ("angles", angles)):
        (tmp_path / f"{name}.csv").write_text("\n".join(lines))
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"another file of that name")
    (code,) = (text for kind, text in BLOCKS if kind == "python")
    (tmp_path / "my_data.py").write_text(code)
    yield tmp_path
    sys.modules.pop("my_data", None)


def test_every_source_has_a_recipe():
    used = [settings_of(text) for text in RECIPES]
    assert {"factory" if isinstance(settings, FactoryData) else settings.use for settings in used} == {
        *SOURCES,
        "factory",
    }


@pytest.mark.parametrize("text", [text for text in RECIPES if "huggingface" not in text])
def test_the_recipe_opens(text, place):
    settings = settings_of(text)
    if settings.use == "cifar":  # 160 MB, not here: known by its checksum
        with pytest.raises(DataError, match=r"is none of cifar-10-binary\.tar\.gz, cifar-100-binary\.tar\.gz"):
            open_data(settings, Preprocess(size=16), Notes(), place)
        return
    data = open_data(settings, Preprocess(size=16), Notes(), place)
    assert data.count("train")
    assert next(iter(data.batches("train", batch_size=4, augment=True, shuffle=True))).images_NCHW.shape[0] == 4
    if settings.use == "folder":
        assert data.labels[0] == ("tench" if settings.names else "n01440764")


@pytest.mark.extras
def test_the_hugging_face_recipe_opens(place):
    datasets = pytest.importorskip("datasets", exc_type=ImportError)
    features = datasets.Features({"photo": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b"])})
    parts = {
        name: datasets.Dataset.from_dict(
            {"photo": [picture(start + n) for n in range(6)], "kind": [n % 2 for n in range(6)]}, features=features
        )
        for name, start in (("train", 0), ("test", 50))
    }
    datasets.DatasetDict(parts).save_to_disk(place / "saved")
    (text,) = (text for text in RECIPES if "huggingface" in text)
    assert open_data(settings_of(text), Preprocess(size=16), Notes(), place).count("evaluation") == 6
