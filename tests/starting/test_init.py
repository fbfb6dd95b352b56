"""`compress init`: what it writes for images and networks of several kinds is a recipe, and runs."""

import csv
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from compress import recipe as recipes
from compress.data import open_data
from compress.errors import CompressError
from compress.progress import Silent
from compress.recipe import describe
from compress.starting import start
from compress.starting.text import as_yaml

NETWORK = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.head = nn.Linear(64, num_classes)

    def forward(self, x):
        return self.head(self.body(x).flatten(1))


class Fixed(Net):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.body[-1] = nn.MaxPool2d(2)
        self.head = nn.Linear(64 * 12 * 12, num_classes)


def head(num_classes):
    return nn.Linear(3, num_classes)


def three(num_classes):
    return nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head(num_classes))
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    (tmp_path / "mynet.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def photos(root: Path, *splits: str, count=6, size=(40, 34), classes=("red", "green", "blue"), mode="RGB") -> Path:
    generator = np.random.default_rng(0)
    for split in splits:
        for number, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 120, (size[1], size[0], 3), np.uint8)
                pixels[..., number % 3] += 120
                Image.fromarray(pixels).convert(mode).save(folder / f"{index}.png")
    return root


def begun(data="photos", model="mynet:Net", **asked):
    given = {"weights": None, "target": "local", "path": Path("new.yaml")} | asked
    made = start(model=model, data=data, progress=Silent(), base=Path.cwd(), **given)
    return made, recipes.load(made.path, [])


def test_a_folder_with_images_set_aside(place):
    photos(place / "photos", "train", "val")
    made, recipe = begun()
    assert recipe.name == "new"
    assert recipe.preprocess.size == 32  # the largest multiple of 32 that the images have
    assert [stage.use for stage in recipe.stages] == [
        *("train", "prune", "distill", "quantize", "export", "verify", "benchmark")
    ]
    data = open_data(recipe.data, recipe.preprocess, Silent(), place)
    assert f"{data.count('train')} images for training, {data.count('evaluation')} for evaluation" in made.text
    assert "3 classes; 6 images each" in made.text
    assert describe(recipe)
    for line in made.text.splitlines():
        assert len(line) <= 120


def test_a_folder_without_gives_a_part_of_its_own(place):
    photos(place / "photos", "train", count=10)
    made, recipe = begun()
    assert recipe.data.holdout == 0.2
    data = open_data(recipe.data, recipe.preprocess, Silent(), place)
    assert f"{data.count('train')} images for training, {data.count('evaluation')} for evaluation" in made.text


def test_a_zip_whose_images_for_evaluation_are_called_test(place):
    photos(place / "photos", "train", "test")
    with zipfile.ZipFile("some photos.zip", "w") as archive:
        for path in sorted((place / "photos").rglob("*.png")):
            archive.write(path, path.relative_to(place / "photos"))
    _, recipe = begun("some photos.zip", path=None)
    assert recipe.name == "net_some_photos"
    assert recipe.data.evaluation == "test"
    assert open_data(recipe.data, recipe.preprocess, Silent(), place).count("evaluation") == 18


@pytest.mark.parametrize(
    ("label", "split", "task"),
    [
        (lambda index: ("cat", "dog")[index // 4 % 2], True, "classification"),
        (lambda index: str(index % 3), False, "classification"),
        (lambda index: str(index / 7), True, "regression"),
    ],
)
def test_a_table(place, label, split, task):
    photos(place / "photos", "all", count=8)
    rows = [
        {
            "Image": path.relative_to(place).as_posix(),
            "class": label(index),
            "subset": "val" if index % 4 == 0 else "train",
        }
        for index, path in enumerate(sorted((place / "photos").rglob("*.png")))
    ]
    with open("table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [name for name in rows[0] if split or name != "subset"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    made, recipe = begun("table.csv")
    assert recipe.data.task == task
    data = open_data(recipe.data, recipe.preprocess, Silent(), place)
    assert data.task == task
    assert data.count("train") + data.count("evaluation") == 24
    assert f"# {len(data.labels)} outputs" in made.text
    assert (recipe.data.split is None) != split


def test_grey_images_make_a_grey_network_of_ours_and_small_ones_keep_their_resolution(place):
    photos(place / "photos", "train", "val", mode="L")
    _, recipe = begun(model="mobilenet_v2")
    assert recipe.preprocess.channels == 1
    assert recipe.model.stem_stride == 1
    assert recipe.preprocess.crop == 1.0


def test_a_network_that_takes_one_size_gets_it(place):
    photos(place / "photos", "train", "val", size=(100, 100))
    _, recipe = begun(model="mynet:Fixed")
    assert recipe.preprocess.size == 48


def test_what_a_network_does_not_allow_is_left_out_with_the_reason(place):
    photos(place / "photos", "train", "val")
    made, recipe = begun(model="mynet:three")
    assert "left out, as the network does not allow it" in made.text
    assert [stage.use for stage in recipe.stages] == ["train", "quantize", "export", "verify", "benchmark"]


def test_nothing_is_overwritten(place):
    photos(place / "photos", "train", "val")
    Path("new.yaml").write_text("mine")
    with pytest.raises(CompressError, match=r"^new\.yaml: is there already; choose another name with -o"):
        begun()
    assert Path("new.yaml").read_text() == "mine"
    os.remove("new.yaml")
    os.symlink("elsewhere", "new.yaml")
    with pytest.raises(CompressError, match="is there already"):
        begun()
    assert not Path("elsewhere").exists()


@pytest.mark.parametrize(
    ("data", "model", "said"),
    [
        ("nowhere", "mynet:Net", "nowhere: no such file or folder"),
        ("bare", "mynet:Net", r"its classes \(blue, green, red, ...\) belong in `train/`"),
        ("mynet.py", "mynet:Net", "mynet.py: is no whole zip archive"),
        ("empty.csv", "mynet:Net", "no column for the images' paths among a, b"),
        ("photos", "mobilenet_v4", "--model mobilenet_v4: .*mobilenet_v2"),
        ("photos", "mynet:Nett", "did you mean"),
        ("photos", "torchvision:", "--model torchvision:"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_no_file(place, data, model, said):
    photos(place / "photos", "train", "val")
    photos(place / "bare", "")
    Path("empty.csv").write_text("a,b\n1,2\n")
    with pytest.raises(CompressError, match=said) as caught:
        begun(data, model)
    assert len(str(caught.value).splitlines()) == 1
    assert not Path("new.yaml").exists()


def test_uneven_classes_are_told(place):
    photos(place / "photos", "train", "val", classes=("red", "green"))
    photos(place / "more", "train", count=40, classes=("red",))
    for path in (place / "more/train/red").iterdir():
        path.rename(place / "photos/train/red" / f"more{path.name}")
    made, _ = begun()
    assert made.notes == ["the classes are uneven: green has 6 images, the largest has 46; see docs/data.md"]


@pytest.mark.parametrize(
    "text", ["null", "a: b", "# a", "true", "1e3", "", " a", "{a", "x\ny", "é", "don't", "mynet:Net"]
)
def test_texts_come_back_from_yaml_as_they_were(text):
    from ruamel.yaml import YAML

    assert YAML(typ="safe", pure=True).load(f"a: {as_yaml(text)}  # said")["a"] == text


def test_names_of_a_stranger_end_no_comment_and_no_line(place):
    photos(place / "photos", "train", "val", classes=("a\nb: c", "# d", "'e"))
    _, recipe = begun()
    assert recipe.data.path == "photos"


@pytest.mark.extras
@pytest.mark.parametrize("model", ["torchvision:resnet18", "timm:mobilenetv3_small_050"])
def test_networks_by_name_bring_their_own_input(place, model):
    photos(place / "photos", "train", "val")
    made, recipe = begun(model=model)
    assert recipe.model.use == model.partition(":")[0]
    assert "preprocess: left out" in made.text
    assert recipes.resolved(recipe, place).preprocess.size == 224


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["--data", "photos", "--model", "mynet:Net"],
        ["--data", "grey", "--model", "mobilenet_v2"],
        ["--data", "digits", "--model", "mynet:Net"],
    ],
)
def test_the_recipe_runs_from_start_to_report(place, words):
    photos(place / "photos", "train", "val", count=20)
    photos(place / "grey", "train", count=30, mode="L")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}

    def compress(*words: str) -> str:
        command = [sys.executable, "-m", "compress.cli", *words]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    compress("init", *words, "-o", "new.yaml")
    compress("check", "new.yaml")
    short = ["stages.train.epochs=2", "stages.distill.epochs=1", "stages.quantize.epochs=1"]
    # So short a training leaves classes that hang on a hair: how many change by rounding is not what is asked here.
    untrained = ["stages.verify.tolerance_grown=0.99", "stages.verify.tolerance_top1=0.99"]
    compress("run", "new.yaml", *short, *untrained, "stages.benchmark.rounds=1", "--out", "run")
    assert json.loads(Path("run/run.json").read_text())["finished"]
    assert Path("run/report.html").is_file()
