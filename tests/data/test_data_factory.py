"""Images of a function of one's own, and what such a function can do wrong."""

import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import Notes, picture

from compress.data import FactoryData, open_data
from compress.errors import DataError
from compress.product import Preprocess

PREPROCESS = Preprocess(size=8)
SOURCE = """
import numpy as np
from PIL import Image

def pictures(count=12, start=0, label=lambda n: ("cat", "dog")[n % 2]):
    noise = [np.random.default_rng(start + n).integers(0, 256, (16, 20, 3)).astype(np.uint8) for n in range(count)]
    return [(Image.fromarray(image), label(n)) for n, image in enumerate(noise)]

def pair(count=12): return pictures(count), pictures(4, 100)
def one(): return pictures(), None
def numbers(): return pictures(label=lambda n: n % 3), pictures(6, 100, label=lambda n: n % 3)
def angles(): return pictures(label=lambda n: n / 2), pictures(4, 100, label=lambda n: [n])
def tags(): return pictures(label=lambda n: (n % 2, 1)), pictures(4, 100, label=lambda n: (1, n % 2))

class Broken(list):
    def __getitem__(self, index):
        if index == 3:
            raise RuntimeError("disk\\non fire")
        return super().__getitem__(index)

class Endless(list):
    def __len__(self):
        raise TypeError("a stream")

def leaves(): raise SystemExit(2)
def raises(): raise ValueError("no such bird")
def broken(): return Broken(pictures()), pictures(4, 100)
def endless(): return Endless(pictures()), pictures(4, 100)
def single(): return pictures()
def generator(): return iter(pictures()), pictures(4, 100)
def triple(): return [(*item, 1) for item in pictures()], pictures(4, 100)
def floats(): return [(np.asarray(i) / 255, l) for i, l in pictures()], pictures(4, 100)
def words(): return [("cat.png", l) for i, l in pictures()], pictures(4, 100)
def mixed(): return pictures(label=lambda n: n if n else "cat"), pictures(4, 100)
def negative(): return pictures(label=lambda n: n - 1), pictures(4, 100)
def nan(): return pictures(label=lambda n: float("nan") if n == 5 else 1.0), pictures(4, 100, label=lambda n: 0.0)
def shapes():
    grey = [(np.asarray(i)[:, :, 0], l) for i, l in pictures()]
    return grey, [(np.asarray(i)[:, :, :1], l) for i, l in pictures(4, 100)]
not_a_function = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "birds.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    yield "birds"
    sys.modules.pop("birds", None)


def opened(use, **settings):
    return open_data(FactoryData(use=use, **settings), PREPROCESS, Notes(), Path.cwd())


def test_two_sequences(module):
    data = opened("birds:pair")
    assert data.labels == ("cat", "dog")
    assert (data.count("train"), data.count("evaluation")) == (12, 4)
    assert data.train.names[5] == "train[5]"
    image = np.array(data.train.read(5, None))
    assert np.array_equal(image, np.array(picture(5)))


def test_a_holdout_and_the_fingerprint_follow_content(module):
    data = opened("birds:one", holdout=0.34)
    assert (data.count("train"), data.count("evaluation")) == (8, 4)
    assert opened("birds:one", holdout=0.34).fingerprint == data.fingerprint
    assert opened("birds:pair").fingerprint != opened("birds:pair", args={"count": 11}).fingerprint
    assert opened("birds:pair", args={"count": 12}).fingerprint == opened("birds:pair").fingerprint


def test_other_labels_and_tasks(module):
    assert opened("birds:numbers").labels == ("0", "1", "2")
    assert opened("birds:numbers", labels=("a", "b", "c")).labels == ("a", "b", "c")
    angles = opened("birds:angles", task="regression", labels=("angle",))
    assert angles.train.targets[:3].tolist() == [[0.0], [0.5], [1.0]]
    tags = opened("birds:tags", task="multi_label", labels=("odd", "any"))
    assert tags.train.targets.sum(0).tolist() == [6, 12]


def test_grey_arrays_become_rgb(module):
    data = opened("birds:shapes")
    expected = np.array(picture(0))[:, :, 0]
    for split, seed in ((data.train, 0), (data.evaluation, 100)):
        expected = np.array(picture(seed))[:, :, 0]
        assert np.array_equal(np.array(split.read(0, None)), np.repeat(expected[..., None], 3, 2))


@pytest.mark.parametrize(
    ("use", "settings", "message"),
    [
        ("birds:nowhere", {}, "data birds:nowhere: `birds` has no `nowhere`"),
        ("birds:not_a_function", {}, "`not_a_function` is int, not a function"),
        ("no_such_module:x", {}, "no module `no_such_module`"),
        ("birds:raises", {}, "data birds:raises: raised ValueError: no such bird"),
        ("birds:leaves", {}, "data birds:leaves: raised SystemExit: 2"),
        ("birds:pair", {"args": {"cuont": 3}}, "raised TypeError: .*cuont"),
        ("birds:broken", {}, r"data birds:broken/train\[3\]: raised RuntimeError: disk on fire"),
        ("birds:endless", {}, "data birds:endless: train: its length raised TypeError: a stream"),
        ("birds:single", {}, r"returned list of length 12; it must return \(training images"),
        ("birds:generator", {}, "train: is list_iterator; give a list"),
        ("birds:triple", {}, r"train\[0\]: is tuple of length 3; each item must be \(image, label\)"),
        ("birds:floats", {}, r"12 images are faulty: train\[0\] has an array of float64 .* and 2 more"),
        ("birds:words", {}, r"train\[0\] has str for an image"),
        ("birds:mixed", {}, r"train\[0\]: has label 'cat'; it must be a class's name or number"),
        ("birds:negative", {}, r"train\[0\]: has label -1"),
        ("birds:pair", {"labels": ("cat",)}, r"train\[1\]: has class `dog`; it is not in `labels`"),
        ("birds:nan", {"task": "regression", "labels": ("x",)}, r"train\[5\]: has label nan; it must be a finite"),
        ("birds:angles", {"task": "regression"}, "`task: regression` needs `labels`"),
        ("birds:angles", {"task": "multi_label", "labels": ("x",)}, "it must be 0 or 1 for each of `labels`"),
        ("birds:one", {}, "returned no images for evaluation"),
        ("birds:pair", {"holdout": 0.3}, "returned images for evaluation, but `holdout` is set"),
    ],
)  # fmt: skip
def test_each_mistake_of_the_function_is_one_line(module, use, settings, message):
    with pytest.raises(DataError, match=message) as caught:
        opened(use, **settings)
    assert "\n" not in str(caught.value)


def test_threads_ask_at_the_same_time_unless_told_not_to(module, monkeypatch):
    """`concurrent: false` never has two threads in the user's code; by default they are."""
    import importlib

    birds = importlib.import_module("birds") if str(Path.cwd()) in sys.path else None
    sys.path.insert(0, str(Path.cwd()))
    try:
        birds = birds or importlib.import_module("birds")
    finally:
        sys.path.remove(str(Path.cwd()))
    inside, most = [], []
    meeting = threading.Barrier(2)

    class Watched(list):
        together = False

        def __getitem__(self, index):
            inside.append(1)
            most.append(len(inside))
            if self.together and threading.current_thread() is not threading.main_thread():
                meeting.wait(10)
            found = super().__getitem__(index)
            inside.pop()
            return found

    monkeypatch.setattr(birds, "watched", lambda: (Watched(birds.pictures()), birds.pictures(4, 100)), raising=False)
    data = opened("birds:watched", concurrent=False, workers=3)
    assert torch.cat([b.labels_N for b in data.batches("train", batch_size=2)]).shape == (12,)
    assert max(most) == 1
    Watched.together = True  # each waits until another is inside
    data = open_data(
        FactoryData(use="birds:watched", workers=2), PREPROCESS, Notes(), Path.cwd(), checked=data.fingerprint
    )
    assert data.count("train") == 12
    assert max(most) >= 2
