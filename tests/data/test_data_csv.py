"""Tables of paths and labels, and each line that can be wrong."""

import csv
import os
import random
import shutil
import zipfile

import numpy as np
import pytest
import torch
from pictures import Notes, picture
from pydantic import ValidationError

from compress.data import Csv, Folder, open_data
from compress.errors import DataError
from compress.product import Preprocess

PREPROCESS = Preprocess(size=8)


@pytest.fixture
def folder(tmp_path):
    """Twelve images, `images/0.png` to `images/11.png`."""
    (tmp_path / "images").mkdir()
    for number in range(12):
        picture(number).save(tmp_path / f"images/{number}.png")
    return tmp_path


def table(folder, rows, header="path,label", name="table.csv"):
    path = folder / name
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def opened(path, progress=None, **settings):
    chosen = Csv(use="csv", path=str(path), **settings)
    return open_data(chosen, PREPROCESS, progress or Notes(), path.parent)


def rows(*labels):
    return [f"images/{number}.png,{label}" for number, label in enumerate(labels)]


CATS = rows(*("cat", "dog") * 6)


def pixels(data, split):
    return torch.cat([batch.images_NCHW for batch in data.batches(split, batch_size=5)])


def test_a_table_is_the_same_data_as_a_folder(folder):
    """The same files, read by another source: the same pixels and classes."""
    for number in range(12):
        place = folder / "photos" / ("train" if number < 8 else "val") / ("cat", "dog")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / f"images/{number}.png", place / f"{number:02d}.png")
    plain = open_data(Folder(use="folder", path=str(folder / "photos")), PREPROCESS, Notes(), folder)
    ordered = sorted(range(12), key=lambda number: (number >= 8, number % 2, number))
    lines = [f"images/{n}.png,{('cat', 'dog')[n % 2]},{'train' if n < 8 else 'test'}" for n in ordered]
    data = opened(table(folder, lines, "path,label,part"), split="part")
    assert data.labels == plain.labels == ("cat", "dog")
    for split in ("train", "evaluation"):
        assert torch.equal(pixels(data, split), pixels(plain, split))
        ours, theirs = (torch.cat([b.labels_N for b in d.batches(split, batch_size=5)]) for d in (data, plain))
        assert torch.equal(ours, theirs)


def test_another_table_for_evaluation(folder):
    other = table(folder, CATS[8:], name="val.csv")
    data = opened(table(folder, CATS[:8]), evaluation=str(other))
    assert (data.count("train"), data.count("evaluation")) == (8, 4)
    assert data.evaluation.names[0] == "val.csv:2: images/8.png"


def test_holdout_and_the_fingerprint_follow_content(folder):
    data = opened(table(folder, CATS), holdout=0.34)
    assert data.count("evaluation") == 4
    assert np.bincount(data.evaluation.targets).tolist() == [2, 2]
    shuffled = random.Random(0).sample(CATS, len(CATS))
    assert opened(table(folder, shuffled), holdout=0.34).fingerprint == data.fingerprint
    assert opened(table(folder, rows(*("dog", "cat") * 6)), holdout=0.34).fingerprint != data.fingerprint
    picture(99).save(folder / "images/3.png")
    assert opened(table(folder, CATS), holdout=0.34).fingerprint != data.fingerprint


def test_where_the_images_are(folder, tmp_path):
    """Beside the table, in a folder, at absolute paths, and in a zip archive."""
    apart = table(folder, CATS, name="elsewhere.csv")
    (folder / "tables").mkdir()
    moved = shutil.copy(apart, folder / "tables/table.csv")
    archive = folder / "images.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for file in sorted((folder / "images").iterdir()):
            packed.write(file, f"train/{file.name}")
    zipped = table(folder, [line.replace("images/", "train/") for line in CATS], name="zipped.csv")
    absolute = table(folder, [f"{folder}/{line}" for line in CATS], name="absolute.csv")
    found = [
        opened(apart, holdout=0.34),
        opened(moved, holdout=0.34, root=str(folder)),
        opened(zipped, holdout=0.34, root=str(archive)),
        opened(absolute, holdout=0.34),
    ]
    expected = sorted(image.numpy().tobytes() for image in pixels(found[0], "evaluation"))
    for data in found[1:]:
        assert sorted(image.numpy().tobytes() for image in pixels(data, "evaluation")) == expected
    with zipfile.ZipFile(archive, "w") as packed:
        for number in range(1, 12):
            packed.write(folder / f"images/{number}.png", f"train/{number}.png")
    with pytest.raises(DataError, match=r"zipped\.csv:2: train/0\.png: has no file"):
        opened(zipped, holdout=0.34, root=str(archive))


def test_several_labels_in_columns_and_in_one(folder):
    names = ("cat", "dog", "fish")
    chosen = [tuple(name for bit, name in enumerate(names) if (number + 1) >> bit & 1) for number in range(12)]
    bits = [",".join("1" if name in found else "0" for name in names) for found in chosen]
    wide = opened(
        table(folder, rows(*bits), "path,cat,dog,fish"), task="multi_label", label=("cat", "dog", "fish"), holdout=0.34
    )
    narrow = opened(
        table(folder, rows(*map(" ; ".join, chosen)), name="b.csv"), task="multi_label", separator=";", holdout=0.34
    )
    assert wide.task == narrow.task == "multi_label"
    assert wide.labels == narrow.labels == names
    batch = next(iter(wide.batches("train", batch_size=3)))
    assert (batch.labels_N.dtype, batch.labels_N.shape) == (torch.float32, (3, 3))
    for data in (wide, narrow):
        for split in (data.train, data.evaluation):
            for name, target in zip(split.names, split.targets, strict=True):
                number = int(name.rpartition("/")[2].removesuffix(".png"))
                assert tuple(n for n, held in zip(names, target, strict=True) if held) == chosen[number]
        assert (data.train.targets.sum(0) > 0).all()


def test_numbers(folder):
    angles = [round(0.37 * number - 2, 3) for number in range(12)]
    data = opened(
        table(folder, rows(*(f"{a},{-a}" for a in angles)), "path,x,y"),
        task="regression",
        label=("x", "y"),
        holdout=0.25,
    )
    assert data.labels == ("x", "y")
    assert (data.count("train"), data.count("evaluation")) == (9, 3)
    for split in (data.train, data.evaluation):
        for name, target in zip(split.names, split.targets, strict=True):
            angle = angles[int(name.rpartition("/")[2].removesuffix(".png"))]
            assert target.tolist() == pytest.approx([angle, -angle])


def test_classes_that_are_numbers_keep_their_order(folder):
    data = opened(table(folder, rows(*(str(number % 3 * 5) for number in range(12)))), holdout=0.3)
    assert data.labels == ("0", "5", "10")


def test_quotes_other_delimiters_and_byte_order_marks(folder):
    path = folder / "table.csv"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["path", "label", "note"])
        for number in range(12):
            writer.writerow([f"images/{number}.png", ("a;b", "c\nd")[number % 2], 'he said "x"'])
    data = opened(path, delimiter=";", holdout=0.34)
    assert data.labels == ("a;b", "c\nd")


@pytest.mark.parametrize(
    ("lines", "header", "settings", "message"),
    [
        (CATS, "path,lable", {}, r"table.csv:1: has no column `label`; did you mean `lable`\?"),
        (CATS, "path;label", {}, r"table.csv:1: has no column `path`; .*is `,` the right `delimiter`\?"),
        (CATS, "path,path", {}, r"table.csv:1: has 2 columns `path`"),
        ([], "path,label", {}, r"table.csv: has no rows"),
        ([*CATS[:3], "images/3.png", *CATS[4:]], "path,label", {}, r"table.csv:5: has 1 cells, the line of names"),
        ([*CATS[:3], ",cat", *CATS[3:]], "path,label", {}, r"table.csv:5: has no path in column `path`"),
        ([*CATS, "images/1.png,cat"], "path,label", {}, r"table.csv:14: has another label for images/1.png than table"),
        (rows(*("cat", "") * 6), "path,label", {}, r"6 lines are wrong: line 3 has no class in column `label`, line 5"),
        (rows(*("cat",) * 12), "path,label", {}, "has one class, `cat`"),
        ([*CATS[:3], 'images/3.png,"cat', *CATS[4:]], "path,label", {}, r"table.csv:\d+: is no line of a CSV file"),
        (
            rows("1", "nan", *"23456789ab"), "path,label", {"task": "regression"},
            r"3 lines are wrong: line 3 has `nan` in column `label`, no finite number, line 12 has `a`",
        ),
        (rows("1e99", *"23456789876"), "path,label", {"task": "regression"}, "table.csv:2: has `1e99` in .*no finite"),
        (
            rows(*("1,0", "0,2") * 6), "path,x,y", {"task": "multi_label", "label": ("x", "y")},
            "line 3 has `2` in column `y`, which must be 0 or 1",
        ),
        (
            rows(*("1,0",) * 12), "path,x,y", {"task": "multi_label", "label": ("x", "y")},
            "label `y` has no training image left",
        ),
    ],
)  # fmt: skip
def test_each_wrong_line_is_named(folder, lines, header, settings, message):
    with pytest.raises(DataError, match=message) as caught:
        opened(table(folder, lines, header), holdout=0.34, **settings)
    assert "\n" not in str(caught.value)


def test_wrong_splits(folder):
    parts = [f"{line},{part}" for line, part in zip(CATS, ["train"] * 8 + ["val"] * 2 + ["test"] * 2, strict=True)]
    path = table(folder, parts, "path,label,part")
    with pytest.raises(DataError, match="column `part` has test and val; say with `evaluate_on` which of"):
        opened(path, split="part")
    progress = Notes()
    data = opened(path, progress, split="part", evaluate_on="val")
    assert (data.count("train"), data.count("evaluation")) == (8, 2)
    assert progress.notes == ["2 rows of `test` left out"]
    with pytest.raises(DataError, match="nowhere says `dev`; it has `test`, `train`, `val`"):
        opened(path, split="part", evaluate_on="dev")
    other = table(folder, rows(*("cat",) * 12)[8:], name="val.csv")
    with pytest.raises(DataError, match="class `dog` has no image for evaluation"):
        opened(table(folder, CATS[:8]), evaluation=str(other))


def test_files_that_are_not_there_or_no_table(folder):
    with pytest.raises(DataError, match=r"nowhere\.csv: cannot be read \(No such file"):
        opened(folder / "nowhere.csv", holdout=0.3)
    (folder / "latin.csv").write_bytes(b"path,label\ncaf\xe9.png,cat\n")
    with pytest.raises(DataError, match=r"latin\.csv: is not UTF-8"):
        opened(folder / "latin.csv", holdout=0.3)
    with pytest.raises(DataError, match="no such folder or zip archive"):
        opened(table(folder, CATS), holdout=0.3, root="nowhere")
    (folder / "images/3.png").unlink()
    (folder / "images/5.png").write_bytes(b"")
    os.mkfifo(folder / "images/7.png") if not (folder / "images/7.png").unlink() else None
    with pytest.raises(DataError) as caught:
        opened(table(folder, CATS), holdout=0.3)
    said = str(caught.value)
    assert "3 images are faulty: table.csv:5: images/3.png cannot be read (No such file or directory)" in said
    assert "table.csv:7: images/5.png is no readable image (it has no bytes)" in said
    assert "table.csv:9: images/7.png is no regular file" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"split": "a", "holdout": 0.3},
        {"holdout": 0.3, "evaluate_on": "val"},
        {"holdout": 0.3, "label": ("a", "b")},
        {"holdout": 0.3, "task": "multi_label"},
        {"holdout": 0.3, "task": "multi_label", "label": ("a", "b"), "separator": ";"},
        {"holdout": 0.3, "separator": ";"},
        {"holdout": 0.3, "task": "ranking"},
    ],
)
def test_settings_that_contradict_each_other(wrong):
    with pytest.raises(ValidationError):
        Csv(use="csv", path="t.csv", **wrong)


def test_classes_that_are_numbers_come_in_their_order_however_long(tmp_path):
    names = ["10", "9", "7" * 5000, "cat"]
    for number in range(len(names) * 2):
        picture(number).save(tmp_path / f"{number}.png")
    rows = [
        f"{number}.png,{name},{split}"
        for number, (name, split) in enumerate((name, split) for name in names for split in ("train", "val"))
    ]
    (tmp_path / "t.csv").write_text("\n".join(["path,label,split", *rows]) + "\n")
    data = open_data(Csv(use="csv", path="t.csv", split="split"), Preprocess(size=8), Notes(), tmp_path)
    assert data.labels == ("9", "10", "7" * 5000, "cat")
