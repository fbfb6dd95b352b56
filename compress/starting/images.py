"""What images are there: how many of which class, how large, in which colours."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from compress.data.folder import listing
from compress.data.trees import TRAIN, Tree, open_tree, pictures, read_file
from compress.errors import CompressError, DataError
from compress.labels import Task
from compress.progress import Progress

LOOKED_AT = 200
"""Images whose header is read, spread evenly over all."""
EVALUATION = ("val", "valid", "validation", "evaluation", "eval", "dev", "test")
"""Names of folders and column values that set images aside."""
HOLDOUT = 0.2
IMAGE = ("path", "image", "file", "filename", "filepath", "image_path", "img")
LABEL = ("label", "class", "category", "target", "species", "y")
SPLIT = ("split", "set", "subset", "partition", "fold")
"""Names of a table's columns, the likeliest first."""
UNEVEN = 5.0
"""The largest class over the smallest, from where it is worth a word."""


@dataclass(frozen=True)
class Seen:
    """Images and their classes."""

    settings: dict[str, Any]
    """The recipe's `data` section."""
    reasons: dict[str, str]
    """Why, by setting."""
    train: int
    evaluation: int
    labels: tuple[str, ...]
    """Names of the outputs."""
    side: int
    """Median of the shorter sides, in pixels."""
    grey: bool
    """Whether all images that were looked at are."""
    task: Task = "classification"
    notes: list[str] = field(default_factory=list)


def look(data: str, base: Path, progress: Progress) -> Seen:
    """What there is in a folder, a zip archive or a table, or `digits`. Raises DataError for none of them."""
    if data == "digits":
        labels = tuple(map(str, range(10)))
        reasons = {"use": "scikit-learn's handwritten digits, 8 x 8 pixels"}
        return Seen({"use": "digits"}, reasons, 1438, 359, labels, 8, True)
    path = base / Path(data).expanduser()
    if not path.exists():
        raise DataError(data, "no such file or folder", f"a relative path starts at {base}")
    if path.suffix.lower() in (".csv", ".tsv"):
        return _look_at_table(data, path, base)
    return _look_at_folder(data, path, progress)


def _look_at_folder(data: str, path: Path, progress: Progress) -> Seen:
    tree = open_tree(path)
    if TRAIN not in tree.folders:
        raise DataError(data, f"has no folder `{TRAIN}`", _layout(tree))
    train = listing(tree, path, TRAIN, progress)
    given = next((name for name in EVALUATION if name in tree.folders), None)
    settings: dict[str, Any] = {"use": "folder", "path": data}
    counts = Counter(name.split("/")[1] for name in train.files)
    reasons = {"path": f"{len(train.classes)} classes; {_spread(counts)}"}
    if given is None:
        settings["holdout"] = HOLDOUT
        reasons["holdout"] = f"no images are set aside for evaluation: {HOLDOUT:.0%} of each class, always the same"
        held = round(len(train.files) * HOLDOUT)
        sizes = len(train.files) - held, held
    else:
        sizes = len(train.files), len(listing(tree, path, given, progress).files)
        if given != "val":
            settings["evaluation"] = given
            reasons["evaluation"] = "the folder of the images for evaluation"
    side, grey = _headers(train.files, tree.read)
    return Seen(settings, reasons, *sizes, tuple(train.classes), side, grey, notes=_uneven(counts))


def _layout(tree: Tree) -> str:
    """What to do with a folder that is laid out otherwise."""
    found = {name.split("/")[0] for name in pictures(tree) if "/" in name}
    beside = sorted(found - set(EVALUATION))
    if len(beside) > 1:
        return f"its classes ({', '.join(beside[:3])}, ...) belong in `{TRAIN}/`: move them there"
    return f"expected {TRAIN}/<class>/<image>, and val/<class>/<image> if images are set aside for evaluation"


def _look_at_table(data: str, path: Path, base: Path) -> Seen:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        text = read_file(path).decode("utf-8-sig")
        rows = list(csv.DictReader(io.StringIO(text), delimiter=delimiter))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(data, f"is no table in UTF-8 ({error})", "save it as CSV in UTF-8") from None
    columns = [name for name in (rows[0] if rows else {}) if name]
    image, label = _column(data, columns, IMAGE, "the images' paths"), _column(data, columns, LABEL, "the labels")
    split = next((name for name in columns if name.lower() in SPLIT), None)
    values = [row[label] or "" for row in rows]
    task: Task = "regression" if _are_measurements(values) else "classification"
    counts = Counter(values)
    settings: dict[str, Any] = {"use": "csv", "path": data, "image": image, "label": label}
    reasons = {"path": f"{len(rows)} rows", "label": f"{len(counts)} classes; {_spread(counts)}"}
    if delimiter != ",":
        settings["delimiter"] = delimiter
    if task != "classification":
        settings["task"] = task
        reasons["label"] = f"{len(counts)} different numbers"
        reasons["task"] = "the labels are numbers with a fraction"
    aside = sum((row[split] or "").lower() in EVALUATION for row in rows) if split else 0
    if split and aside:
        settings["split"] = split
        reasons["split"] = f"{aside} rows are for evaluation"
    else:
        settings["holdout"] = HOLDOUT
        reasons["holdout"] = f"no images are set aside for evaluation: {HOLDOUT:.0%} of them, always the same"
        aside = round(len(rows) * HOLDOUT)
    side, grey = _headers([row[image] or "" for row in rows], lambda name: read_file(path.parent / name))
    labels = tuple(sorted(counts)) if task == "classification" else (label,)
    notes = _uneven(counts) if task == "classification" else []
    return Seen(settings, reasons, len(rows) - aside, aside, labels, side, grey, task, notes)


def _column(data: str, columns: Sequence[str], likely: Sequence[str], what: str) -> str:
    by_name = {name.lower(): name for name in reversed(columns)}
    for name in likely:
        if name in by_name:
            return by_name[name]
    there = ", ".join(columns) or "none"
    raise DataError(data, f"has no column for {what} among {there}", f"call one {likely[0]}")


def _are_measurements(values: Sequence[str]) -> bool:
    """Whether all are numbers and some have a fraction: classes are numbered without."""
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        return False
    return all(map(math.isfinite, numbers)) and any(not number.is_integer() for number in numbers)


def _headers(files: Sequence[str], read: Callable[[str], bytes]) -> tuple[int, bool]:
    """Median shorter side and whether all are grey, of those that are images; `compress run` names the others."""
    sides, modes = [], Counter[bool]()
    for name in files[:: max(1, len(files) // LOOKED_AT)]:
        try:
            with Image.open(io.BytesIO(read(name))) as image:
                sides.append(min(image.size))
                modes[image.mode in ("1", "L", "LA", "I;16", "I", "F")] += 1
        except (CompressError, OSError, ValueError, Image.DecompressionBombError, SyntaxError):
            continue
    if not sides:
        raise DataError(files[0], "is no image, and no other file is", "give a folder of images")
    return round(statistics.median(sides)), not modes[False]


def _spread(counts: Counter[str]) -> str:
    least, most = min(counts.values()), max(counts.values())
    return f"{least} images each" if least == most else f"{least} to {most} images each"


def _uneven(counts: Counter[str]) -> list[str]:
    name, least = min(counts.items(), key=lambda item: item[1])
    most = max(counts.values())
    if most < UNEVEN * least:
        return []
    return [f"the classes are uneven: {name} has {least} images, the largest has {most}; see docs/data.md"]
