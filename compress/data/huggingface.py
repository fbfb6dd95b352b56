"""Data sets of the `datasets` library: saved by it, as Parquet or Arrow files, folders of images, or from the hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from compress.data.gathered import Gathered, Loading, opened
from compress.data.loader import ImageData
from compress.data.trees import read_file
from compress.errors import DataError
from compress.extras import need
from compress.labels import Task
from compress.product import Preprocess
from compress.progress import Progress

EVALUATION = ("validation", "valid", "val", "dev", "test")
"""Splits to evaluate on, the first that is there, unless the recipe names one."""
BUILDERS = ("arrow", "imagefolder", "parquet")
"""Kinds of files that are read. Others of the library parse more than images: one of them loads pickles."""

Name = Annotated[str, Field(min_length=1)]


class HuggingFace(Loading):
    """A data set of the `datasets` library; needs `pip install 'compress[huggingface]'`. No code of it is ever run."""

    use: Literal["huggingface"]
    path: Name
    """A folder that `save_to_disk` wrote, one of Parquet, Arrow or image files, or a name on the hub (`org/name`)."""
    name: Name | None = None
    """Which of a data set's configurations; null where there is one."""
    revision: Name | None = None
    """Commit, tag or branch on the hub; only a commit stays what it is."""
    train: Name = "train"
    """The split with the training images."""
    evaluation: Name | None = None
    """The split to evaluate on; null for `validation`, else `test`."""
    image: Name | None = None
    """The column of images; null where there is one."""
    label: Name | Annotated[tuple[Name, ...], Field(min_length=1)] | None = None
    """The column with what is to be learned, or a list of columns of numbers; null for the column of classes."""
    task: Task = "classification"


def open_huggingface(
    settings: HuggingFace, preprocess: Preprocess, progress: Progress, base: Path, checked: str | None = None
) -> ImageData:
    """The images of the data set; see `compress.data.gathered.opened`.

    Raises DataError for a data set that cannot be had, for columns that do not fit, and for what any source refuses;
    CompressError where the library is missing.
    """
    place = f"data {settings.path}"
    library = need("datasets", "huggingface", place)
    if int(library.__version__.split(".")[0]) < 4:
        raise DataError(place, f"datasets {library.__version__} may run code of a data set", "pip install -U datasets")
    local = base / Path(settings.path).expanduser()
    splits = _splits(library, settings, local, place, progress)
    parts = _chosen(settings, splits, place)
    image = _image_column(library, settings, parts[0][1], place)
    for name, part in parts:
        for column in (image, *_label_columns(library, settings, parts[0][1], place)):
            if column not in part.column_names:
                raise DataError(f"{place}: {name}", f"has no column `{column}`", _columns(part))
    labels, targets = _targets(library, settings, parts, place)
    raw = [part.select_columns([image]).cast_column(image, library.Image(decode=False)) for _, part in parts]
    starts = np.cumsum([0, *map(len, raw)]).tolist()
    names = [f"{name}[{index}]" for name, part in parts for index in range(len(part))]
    inside = None if local.exists() else [Path(library.config.HF_CACHE_HOME), Path(library.config.HF_DATASETS_CACHE)]

    def content(index: int) -> bytes:
        which = int(np.searchsorted(starts, index, "right")) - 1
        where = f"{place}/{names[index]}"
        cell = raw[which][index - starts[which]][image]
        if cell is None:
            raise DataError(where, "has no image", "leave the row out")
        if cell["bytes"] is not None:
            return bytes(cell["bytes"])
        if cell["path"] is None:
            raise DataError(where, "has no image", "leave the row out")
        path = Path(cell["path"])
        # A table from elsewhere could name any file of this machine.
        if inside is not None and not any(path.resolve().is_relative_to(folder.resolve()) for folder in inside):
            raise DataError(where, f"names a file outside the library's cache, {path}", "leave the row out")
        try:
            return read_file(path)
        except DataError as error:
            raise DataError(where, f"{path} {error.problem}", error.way_out) from None

    found = Gathered(
        place=place,
        names=names,
        targets=targets,
        labels=labels,
        content=content,
        evaluation_N=None if settings.holdout is not None else np.arange(starts[-1]) >= starts[1],
        task=settings.task,
    )
    return opened(found, settings, preprocess, progress, checked)


def _splits(library: ModuleType, settings: HuggingFace, local: Path, place: str, progress: Progress) -> dict[str, Any]:
    """All splits by name; the library's own progress bars stay off."""
    shown = not library.utils.are_progress_bars_disabled()
    library.disable_progress_bars()
    try:
        if any((local / name).is_file() for name in ("dataset_dict.json", "state.json")):
            saved = library.load_from_disk(os.fspath(local))
            return dict(saved) if isinstance(saved, library.DatasetDict) else {settings.train: saved}
        if local.exists():
            builder = library.load_dataset_builder(os.fspath(local), settings.name)
        else:
            if settings.revision is None:
                progress.note(f"{settings.path} may change on the hub; `revision` with a commit would pin it")
            builder = library.load_dataset_builder(settings.path, settings.name, revision=settings.revision)
        kind = type(builder).__module__.rpartition(".")[2]
        if kind not in BUILDERS:
            raise DataError(place, f"has files of the kind `{kind}`", f"only {', '.join(BUILDERS)} are read")
        builder.download_and_prepare()
        return dict(builder.as_dataset())
    except DataError:
        raise
    except Exception as error:  # the library, the hub's client, pyarrow and HTTP have their own trees
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        way_out = "check the name, `revision` and the network" if not local.exists() else "save it again"
        raise DataError(place, f"cannot be loaded ({said})", way_out) from None
    finally:
        if shown:
            library.enable_progress_bars()


def _chosen(settings: HuggingFace, splits: dict[str, Any], place: str) -> list[tuple[str, Any]]:
    """The training images and, without a holdout, those for evaluation."""
    listed = f"it has {', '.join(f'`{name}`' for name in splits)}"
    if settings.train not in splits:
        raise DataError(place, f"has no split `{settings.train}`", listed)
    train = (settings.train, splits[settings.train])
    if settings.holdout is not None:
        if settings.evaluation is not None:
            raise DataError(place, "`evaluation` and `holdout` are both set", "drop one of them")
        return [train]
    evaluation = settings.evaluation or next((name for name in EVALUATION if name in splits), None)
    if evaluation is None:
        raise DataError(place, "has no split to evaluate on", f"{listed}; name one, or set `holdout: 0.2`")
    if evaluation not in splits:
        raise DataError(place, f"has no split `{evaluation}`", listed)
    return [train, (evaluation, splits[evaluation])]


def _columns(part: Any) -> str:
    return f"it has {', '.join(f'`{name}`' for name in part.column_names)}"


def _image_column(library: ModuleType, settings: HuggingFace, part: Any, place: str) -> str:
    images = [name for name, feature in part.features.items() if isinstance(feature, library.Image)]
    if settings.image is not None:
        if settings.image not in images:
            raise DataError(place, f"`{settings.image}` is no column of images", _columns(part))
        return settings.image
    if len(images) != 1:
        several = f"has {len(images)} columns of images" if images else "has no column of images"
        raise DataError(place, several, f"name it with `image`: {_columns(part)}")
    return str(images[0])


def _label_columns(library: ModuleType, settings: HuggingFace, part: Any, place: str) -> tuple[str, ...]:
    if settings.label is not None:
        return (settings.label,) if isinstance(settings.label, str) else settings.label
    classes = [name for name, feature in part.features.items() if _names_of(library, feature)]
    if len(classes) != 1:
        several = f"has {len(classes)} columns of classes" if classes else "has no column of classes (ClassLabel)"
        raise DataError(place, several, f"name one with `label`: {_columns(part)}")
    return (str(classes[0]),)


def _names_of(library: ModuleType, feature: Any) -> tuple[str, ...]:
    """Names of the classes of a column, or of the items of its lists; none where it has no such type."""
    inner = getattr(feature, "feature", feature)
    return tuple(inner.names) if isinstance(inner, library.ClassLabel) else ()


def _targets(
    library: ModuleType, settings: HuggingFace, parts: Sequence[tuple[str, Any]], place: str
) -> tuple[tuple[str, ...], np.ndarray]:
    """Names of the outputs, and what is to be learned of each row. Raises DataError that names the row."""
    columns = _label_columns(library, settings, parts[0][1], place)
    known = {column: _names_of(library, parts[0][1].features[column]) for column in columns}
    for name, part in parts[1:]:
        for column in columns:
            if _names_of(library, part.features[column]) != known[column]:
                raise DataError(f"{place}: {name}", f"column `{column}` has other classes than `{parts[0][0]}`")
    rows = [
        (f"{place}/{name}[{index}]", cells)
        for name, part in parts
        for index, cells in enumerate(zip(*(part[column] for column in columns), strict=True))
    ]
    if settings.task == "regression":
        return columns, np.array([[_number(cell, where) for cell in cells] for where, cells in rows], np.float32)
    names = known[columns[0]]
    if settings.task == "multi_label":
        if len(columns) > 1:
            return columns, np.array(
                [[_zero_or_one(cell, where) for cell in cells] for where, cells in rows], np.float32
            )
        lists = [(where, _listed(cells[0], where)) for where, cells in rows]
        names, number = _classes(names, (item for _, found in lists for item in found))
        targets = np.zeros((len(rows), len(names)), np.float32)
        for row, (where, found) in enumerate(lists):
            for item in found:
                targets[row, number(item, where)] = 1
        return names, targets
    if len(columns) > 1:
        raise DataError(place, "a classification has one column of classes", "or set `task: multi_label`")
    names, number = _classes(names, (cells[0] for _, cells in rows))
    return names, np.array([number(cells[0], where) for where, cells in rows], np.int64)


def _classes(names: tuple[str, ...], cells: Any) -> tuple[tuple[str, ...], Callable[[Any, str], int]]:
    """Names of the classes, and the number of a cell: the library's own where the column has names."""
    if names:

        def known(cell: Any, where: str) -> int:
            if not isinstance(cell, int) or not 0 <= cell < len(names):
                raise DataError(where, f"has label {cell!r}", "leave the split or the row out: it has no known class")
            return cell

        return names, known
    found = {str(cell): cell for cell in cells if isinstance(cell, (str, int)) and not isinstance(cell, bool)}
    ordered = tuple(sorted(found, key=lambda name: (isinstance(found[name], str), found[name])))
    numbers = {name: number for number, name in enumerate(ordered)}

    def number(cell: Any, where: str) -> int:
        if str(cell) not in numbers or cell == "":
            raise DataError(where, f"has label {cell!r}"[:200], "it must be a class's name or number")
        return numbers[str(cell)]

    return ordered, number


def _listed(cell: Any, where: str) -> list[Any]:
    if not isinstance(cell, list):
        raise DataError(where, f"has {cell!r}"[:200], "`task: multi_label` needs a list of labels, or several columns")
    return cell


def _number(cell: Any, where: str) -> float:
    number = isinstance(cell, (int, float)) and not isinstance(cell, bool)
    if not number or not abs(cell) <= float(np.finfo(np.float32).max):
        raise DataError(where, f"has {cell!r}"[:200], "it must be a finite number")
    return float(cell)


def _zero_or_one(cell: Any, where: str) -> float:
    if not isinstance(cell, (bool, int, float)) or cell not in (0, 1):
        raise DataError(where, f"has {cell!r}"[:200], "it must be 0 or 1")
    return float(cell)
