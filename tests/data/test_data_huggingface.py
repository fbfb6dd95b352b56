"""Data sets that the `datasets` library made here: saved by it, as Parquet, as a folder of images."""

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import Notes, picture

from compress.data import HuggingFace, open_data
from compress.errors import DataError
from compress.product import Preprocess

pytestmark = pytest.mark.extras
PREPROCESS = Preprocess(size=8)
NAMES = ["cat", "dog", "fish"]


@pytest.fixture
def library(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", exc_type=ImportError)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return datasets


def split(datasets, start, count, label=lambda n: n % 3, feature=None, **columns):
    values = {"photo": [picture(start + n) for n in range(count)], "kind": [label(n) for n in range(count)]}
    features = {"photo": datasets.Image(), "kind": feature or datasets.ClassLabel(names=NAMES)}
    for name, (type_, read) in columns.items():
        values[name], features[name] = [read(n) for n in range(count)], datasets.Value(type_)
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


def both(datasets, evaluation="test", **options):
    return datasets.DatasetDict(
        {"train": split(datasets, 0, 12, **options), evaluation: split(datasets, 100, 6, **options)}
    )


def opened(path, progress=None, **settings):
    return open_data(
        HuggingFace(use="huggingface", path=str(path), **settings), PREPROCESS, progress or Notes(), Path.cwd()
    )


def everything(data, name):
    batches = list(data.batches(name, batch_size=4))
    return torch.cat([b.images_NCHW for b in batches]), torch.cat([b.labels_N for b in batches])


def expected(start, count):
    from compress.data.pixels import pixels

    return torch.from_numpy(
        PREPROCESS.normalize(np.stack([pixels(picture(start + n), PREPROCESS) for n in range(count)]))
    )


def test_saved_by_the_library(library, tmp_path):
    both(library).save_to_disk(tmp_path / "saved")
    data = opened(tmp_path / "saved")
    assert data.labels == tuple(NAMES)
    for name, start, count in (("train", 0, 12), ("evaluation", 100, 6)):
        images, labels = everything(data, name)
        assert torch.equal(images.permute(0, 2, 3, 1), expected(start, count))
        assert labels.tolist() == [n % 3 for n in range(count)]
    assert data.train.names[3] == "train[3]"
    assert not library.utils.are_progress_bars_disabled()
    single = split(library, 0, 12)
    single.save_to_disk(tmp_path / "single")
    assert opened(tmp_path / "single", holdout=0.34).count("evaluation") == 3


def test_parquet_and_image_folders_are_the_same_data(library, tmp_path):
    saved = both(library)
    saved.save_to_disk(tmp_path / "saved")
    (tmp_path / "tables").mkdir()
    for name, part in saved.items():
        part.to_parquet(tmp_path / f"tables/{name}.parquet")
        for number in range(len(part)):
            folder = tmp_path / "photos" / name / NAMES[number % 3]
            folder.mkdir(parents=True, exist_ok=True)
            picture((0 if name == "train" else 100) + number).save(folder / f"{number:02d}.png")
    first, tables, photos = (opened(tmp_path / name) for name in ("saved", "tables", "photos"))
    assert first.labels == tables.labels == photos.labels == tuple(NAMES)
    assert first.fingerprint == tables.fingerprint
    for name in ("train", "evaluation"):
        ours, theirs = everything(first, name), everything(tables, name)
        assert all(map(torch.equal, ours, theirs))
        folders = everything(photos, name)
        assert sorted(i.numpy().tobytes() for i in folders[0]) == sorted(i.numpy().tobytes() for i in ours[0])


def test_the_fingerprint_knows_images_and_labels(library, tmp_path):
    both(library).save_to_disk(tmp_path / "a")
    both(library, label=lambda n: (n + 1) % 3).save_to_disk(tmp_path / "b")
    assert opened(tmp_path / "a").fingerprint == opened(tmp_path / "a").fingerprint
    assert opened(tmp_path / "a").fingerprint != opened(tmp_path / "b").fingerprint


def test_words_numbers_lists_and_columns(library, tmp_path):
    words = both(library, label=lambda n: NAMES[n % 3], feature=library.Value("string"))
    words.save_to_disk(tmp_path / "words")
    assert opened(tmp_path / "words", label="kind").labels == tuple(NAMES)
    lists = both(library, label=lambda n: [n % 3, (n + 1) % 3], feature=library.List(library.ClassLabel(names=NAMES)))
    lists.save_to_disk(tmp_path / "lists")
    data = opened(tmp_path / "lists", task="multi_label")
    assert data.labels == tuple(NAMES)
    assert data.train.targets.sum(1).tolist() == [2.0] * 12
    columns = both(
        library, x=("float32", lambda n: n / 4), y=("int64", lambda n: -n), odd=("bool", lambda n: bool(n % 2)),
        any=("int64", lambda n: 1),
    )  # fmt: skip
    columns.save_to_disk(tmp_path / "columns")
    numbers = opened(tmp_path / "columns", task="regression", label=("x", "y"))
    assert numbers.train.targets[2].tolist() == [0.5, -2.0]
    tags = opened(tmp_path / "columns", task="multi_label", label=("odd", "any"))
    assert tags.train.targets.sum(0).tolist() == [6, 12]


def test_each_mistake_is_one_line(library, tmp_path):
    both(library).save_to_disk(tmp_path / "good")
    both(library, label=lambda n: -1 if n == 4 else n % 3).save_to_disk(tmp_path / "unknown")
    both(library, feature=library.Value("float32"), label=lambda n: float("nan") if n == 4 else 1.0).save_to_disk(
        tmp_path / "nan"
    )
    damaged = library.Dataset.from_dict(
        {"photo": [{"bytes": b"no image", "path": None}] * 3, "kind": [0, 1, 0]},
        features=library.Features({"photo": library.Image(decode=False), "kind": library.ClassLabel(names=NAMES[:2])}),
    ).cast_column("photo", library.Image())
    damaged.save_to_disk(tmp_path / "damaged")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/train.csv").write_text("photo,kind\na.png,cat\n")
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles/train.pkl").write_bytes(pickle.dumps([1]))
    (tmp_path / "cut").mkdir()
    table = io.BytesIO()
    both(library)["train"].to_parquet(table)
    (tmp_path / "cut/train.parquet").write_bytes(table.getvalue()[:-100])
    for path, settings, message in (
        ("good", {"train": "all"}, "has no split `all`; it has `train`, `test`"),
        ("good", {"evaluation": "dev"}, "has no split `dev`"),
        ("good", {"evaluation": "test", "holdout": 0.3}, "are both set"),
        ("good", {"label": "knid"}, "has no column `knid`; it has `photo`, `kind`"),
        ("good", {"image": "kind"}, "`kind` is no column of images"),
        ("unknown", {}, r"unknown/train\[4\]: has label -1; leave the split or the row out"),
        ("nan", {"task": "regression", "label": "kind"}, r"train\[4\]: has nan; it must be a finite number"),
        ("nan", {}, r"has no column of classes \(ClassLabel\); name one with `label`"),
        ("damaged", {"holdout": 0.4}, r"3 images are faulty: train\[0\] is no readable image"),
        ("texts", {}, "has files of the kind `csv`; only arrow, imagefolder, parquet are read"),
        ("pickles", {}, "cannot be loaded"),
        ("cut", {}, "cannot be loaded"),
        ("nowhere/at_all", {}, "cannot be loaded .*check the name, `revision` and the network"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            opened(tmp_path / path if "/" not in path else path, **settings)
        assert "\n" not in str(caught.value)


def test_a_table_from_elsewhere_names_no_file_of_this_machine(library, tmp_path, monkeypatch):
    """A row of the hub whose image is a path outside the library's cache is refused; one of a local folder is read."""
    picture(1).save(tmp_path / "private.png")
    rows = {"photo": [{"bytes": None, "path": str(tmp_path / "private.png")}] * 4, "kind": [0, 1, 0, 1]}
    features = library.Features({"photo": library.Image(decode=False), "kind": library.ClassLabel(names=NAMES[:2])})
    table = library.Dataset.from_dict(rows, features=features).cast_column("photo", library.Image())
    monkeypatch.setattr("compress.data.huggingface._splits", lambda *_: {"train": table})
    with pytest.raises(DataError, match=r"train\[0\] names a file outside the library's cache"):
        opened("somebody/photos", holdout=0.3)
