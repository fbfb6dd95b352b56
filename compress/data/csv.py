"""A table of paths and labels, as text: one line for each image."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from compress.data.gathered import NAMED, Gathered, Loading, opened
from compress.data.loader import ImageData
from compress.data.trees import ZipTree, read_file
from compress.errors import DataError
from compress.labels import Task
from compress.product import Preprocess
from compress.progress import Progress

EVALUATION = ("val", "valid", "validation", "evaluation", "eval", "dev", "test")
"""What the rows for evaluation are called in a column of splits, unless the recipe says it."""

Name = Annotated[str, Field(min_length=1)]


class Csv(Loading):
    """Images named by a CSV file, with a class, several labels or numbers for each.

    The images for evaluation have a column that says so (`split`), a table of their own (`evaluation`), or are taken
    from the others (`holdout`).
    """

    use: Literal["csv"]
    path: Name
    """The table; a relative path starts at the current directory. UTF-8, with a line of column names."""
    root: str | None = None
    """Where the images' relative paths start, a folder or a .zip; null for the folder of the table."""
    image: Name = "path"
    """The column with the images' paths."""
    label: Name | Annotated[tuple[Name, ...], Field(min_length=1)] = "label"
    """The column of classes; for the other tasks a column, or a list of columns with a 0 or 1, or a number, each."""
    task: Task = "classification"
    separator: str | None = Field(default=None, min_length=1)
    """`multi_label` with one column: what stands between the labels of an image (`cat;dog`)."""
    split: Name | None = None
    """The column that says which images are for training (`train`) and which for evaluation."""
    evaluate_on: Name | None = None
    """What that column says of images for evaluation; null for `val`, `test` and the like, if it has one of them."""
    evaluation: Name | None = None
    """Another table, with the same columns, of the images for evaluation."""
    delimiter: str = Field(default=",", min_length=1, max_length=1)

    @model_validator(mode="after")
    def _one_way(self) -> Csv:
        ways = {"split": self.split, "evaluation": self.evaluation, "holdout": self.holdout}
        given = [name for name, value in ways.items() if value is not None]
        if len(given) != 1:
            found = f"it has {' and '.join(given)}" if given else "it has none of them"
            raise ValueError(f"the images for evaluation need one of split, evaluation and holdout; {found}")
        if self.evaluate_on is not None and self.split is None:
            raise ValueError("`evaluate_on` needs `split`, the column it is a value of")
        several = not isinstance(self.label, str)
        if several and self.task == "classification":
            raise ValueError("`label` is one column in a classification; `task: multi_label` takes several")
        if self.task == "multi_label" and several == (self.separator is not None):
            raise ValueError("`multi_label` takes a list of columns, or one column and a `separator`")
        if self.separator is not None and self.task != "multi_label":
            raise ValueError("`separator` is for `task: multi_label`")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """Those with what is to be learned."""
        return (self.label,) if isinstance(self.label, str) else self.label


@dataclass
class Row:
    """A line of a table."""

    table: Path
    line: int
    image: str
    said: tuple[str, ...]
    """What the columns of `label` say."""
    split: str = ""

    def __str__(self) -> str:
        return f"{self.table.name}:{self.line}: {self.image}"


@dataclass
class Mistakes:
    """Of one table, each with its line; raised together."""

    table: Path
    found: list[tuple[int, str]] = field(default_factory=list)

    def add(self, line: int, problem: str) -> None:
        self.found.append((line, problem))

    def refuse(self) -> None:
        """Raises DataError if there are any."""
        if len(self.found) == 1:
            line, problem = self.found[0]
            raise DataError(f"{self.table}:{line}", problem, "correct the line")
        if self.found:
            named = ", ".join(f"line {line} {problem}" for line, problem in sorted(self.found)[:NAMED])
            more = f" and {len(self.found) - NAMED} more" if len(self.found) > NAMED else ""
            raise DataError(self.table, f"{len(self.found)} lines are wrong: {named}{more}", "correct them")


def open_csv(
    settings: Csv, preprocess: Preprocess, progress: Progress, base: Path, checked: str | None = None
) -> ImageData:
    """The images of a table; see `compress.data.gathered.opened`. Raises DataError that names the table's line."""
    table = base / Path(settings.path).expanduser()
    tables = [(table, _read(table, settings))]
    if settings.evaluation is not None:
        other = base / Path(settings.evaluation).expanduser()
        tables.append((other, _read(other, settings)))
    rows = [row for _, part in tables for row in part]
    evaluation_N: np.ndarray | None = None
    if settings.evaluation is not None:
        evaluation_N = np.array([row.table is not table for row in rows])
    elif settings.split is not None:
        rows, evaluation_N = _by_split(rows, settings, table, progress)
    _refuse_contradictions(tables, rows, settings, progress)
    labels, targets = _targets(settings, rows, tables)
    content = _reader(table.parent if settings.root is None else base / Path(settings.root).expanduser(), rows)
    found = Gathered(
        place=str(table.parent),
        names=[str(row) for row in rows],
        targets=targets,
        labels=labels,
        content=content,
        evaluation_N=evaluation_N,
        task=settings.task,
    )
    # By path, so that lines may change places.
    said = ["\t".join((row.image, *row.said)) for row in rows]
    return opened(found, settings, preprocess, progress, checked, said=said)


def _read(table: Path, settings: Csv) -> list[Row]:
    """All rows with a path and as many cells as the header."""
    mistakes, rows = Mistakes(table), []
    wanted = [settings.image, *settings.columns, *([settings.split] if settings.split else [])]
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=settings.delimiter, strict=True)
            header = [cell.strip() for cell in next(reader, [])]
            places = [_place(name, header, table, settings) for name in wanted]
            for cells in reader:
                if not any(cell.strip() for cell in cells):
                    continue
                if len(cells) != len(header):
                    mistakes.add(reader.line_num, f"has {len(cells)} cells, the line of names has {len(header)}")
                    continue
                image, *said = (cells[place].strip() for place in places)
                split = said.pop() if settings.split else ""
                if not image:
                    mistakes.add(reader.line_num, f"has no path in column `{settings.image}`")
                rows.append(Row(table, reader.line_num, image, tuple(said), split))
    except UnicodeDecodeError as error:
        raise DataError(table, f"is not UTF-8 ({error.reason} at byte {error.start})", "save it as UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{table}:{reader.line_num}", f"is no line of a CSV file ({error})", "correct it") from None
    except OSError as error:
        raise DataError(
            table, f"cannot be read ({error.strerror})", f"a relative path starts at {Path.cwd()}"
        ) from None
    mistakes.refuse()
    if not rows:
        raise DataError(table, "has no rows", "a line for each image follows the line of names")
    return rows


def _place(name: str, header: Sequence[str], table: Path, settings: Csv) -> int:
    often = list(header).count(name)
    if often == 1:
        return list(header).index(name)
    if often:
        raise DataError(f"{table}:1", f"has {often} columns `{name}`", "rename them")
    near = get_close_matches(name, header, 1)
    hint = f"did you mean `{near[0]}`?" if near else f"it has {', '.join(f'`{cell}`' for cell in header[:12])}"
    if len(header) == 1:
        hint += f"; is `{settings.delimiter}` the right `delimiter`?"
    raise DataError(f"{table}:1", f"has no column `{name}`", hint)


def _by_split(rows: Sequence[Row], settings: Csv, table: Path, progress: Progress) -> tuple[list[Row], np.ndarray]:
    """The rows of both splits, and which are for evaluation."""
    found = sorted({row.split for row in rows})
    known = [name for name in found if name.lower() in EVALUATION]
    wanted = settings.evaluate_on or (known[0] if len(known) == 1 else None)
    listed = ", ".join(f"`{name}`" for name in found[:8])
    if wanted is None:
        way_out = f"say with `evaluate_on` which of {listed} is for evaluation"
        several = f"has {' and '.join(known)}" if known else "has no value for evaluation"
        raise DataError(table, f"column `{settings.split}` {several}", way_out)
    for name in ("train", wanted):
        if not any(row.split == name for row in rows):
            raise DataError(table, f"column `{settings.split}` nowhere says `{name}`", f"it has {listed}")
    kept = [row for row in rows if row.split in ("train", wanted)]
    if len(kept) < len(rows):
        others = ", ".join(f"`{name}`" for name in found if name not in ("train", wanted))
        progress.note(f"{len(rows) - len(kept)} rows of {others} left out")
    return kept, np.array([row.split == wanted for row in kept])


def _refuse_contradictions(
    tables: Iterable[tuple[Path, list[Row]]], rows: Sequence[Row], settings: Csv, progress: Progress
) -> None:
    """Raises DataError where a path comes again and its line says something else; a note where it says the same."""
    mistakes = {table: Mistakes(table) for table, _ in tables}
    first: dict[str, Row] = {}
    again = 0
    for row in rows:
        earlier = first.setdefault(row.image, row)
        if earlier is row:
            continue
        if earlier.said != row.said:
            there = f"{earlier.table.name}:{earlier.line}"
            mistakes[row.table].add(row.line, f"has another label for {row.image} than {there}")
        again += 1
    for found in mistakes.values():
        found.refuse()
    if again:
        progress.note(f"{again} lines name an image that an earlier line names too; it counts as often")


def _targets(
    settings: Csv, rows: Sequence[Row], tables: Iterable[tuple[Path, list[Row]]]
) -> tuple[tuple[str, ...], np.ndarray]:
    """Names of the outputs, and what is to be learned of each row. Raises DataError for cells that do not fit."""
    mistakes = {table: Mistakes(table) for table, _ in tables}

    def cells(read: Callable[[str, str], float]) -> np.ndarray:
        values = np.zeros((len(rows), len(settings.columns)), np.float32)
        for number, row in enumerate(rows):
            for place, (column, cell) in enumerate(zip(settings.columns, row.said, strict=True)):
                try:
                    values[number, place] = read(column, cell)
                except ValueError as error:
                    mistakes[row.table].add(row.line, str(error))
        return values

    if settings.task == "regression":
        labels, targets = settings.columns, cells(_number)
    elif settings.separator is None and settings.task == "multi_label":
        labels, targets = settings.columns, cells(_zero_or_one)
    elif settings.separator is not None:
        said = [{part.strip() for part in row.said[0].split(settings.separator)} - {""} for row in rows]
        labels = tuple(sorted(set().union(*said), key=_in_order))
        targets = np.array([[name in names for name in labels] for names in said], np.float32)
        if not labels:
            raise DataError(rows[0].table, f"column `{settings.label}` has no label in any line")
    else:
        for row in rows:
            if not row.said[0]:
                mistakes[row.table].add(row.line, f"has no class in column `{settings.label}`")
        labels = tuple(sorted({row.said[0] for row in rows}, key=_in_order))
        numbers = {name: number for number, name in enumerate(labels)}
        targets = np.array([numbers[row.said[0]] for row in rows], np.int64)
    for found in mistakes.values():
        found.refuse()
    return labels, targets


def _number(column: str, cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or abs(value) > float(np.finfo(np.float32).max):
        raise ValueError(f"has `{cell}` in column `{column}`, no finite number")
    return value


def _zero_or_one(column: str, cell: str) -> float:
    if cell not in ("0", "1"):
        raise ValueError(f"has `{cell}` in column `{column}`, which must be 0 or 1")
    return float(cell)


def _in_order(name: str) -> tuple[int, int, str]:
    """10 after 9, and numbers before words."""
    counts = name.isdecimal() and len(name) < 100  # Python refuses to read thousands of digits
    return (0, int(name), name) if counts else (1, 0, name)


def _reader(root: Path, rows: Sequence[Row]) -> Callable[[int], bytes]:
    """The bytes of a row's image; a DataError names its line."""
    tree = ZipTree(root) if root.is_file() else None
    if tree is None and not root.is_dir():
        raise DataError(root, "no such folder or zip archive", "`root` is where the images' paths start")

    def content(index: int) -> bytes:
        row = rows[index]
        try:
            if tree is None:
                return read_file(root / row.image)
            if row.image not in tree.members:
                raise DataError(tree.path, f"has no file {row.image}")
            return tree.read(row.image)
        except DataError as error:
            raise DataError(f"{row.table}:{row.line}: {row.image}", error.problem, error.way_out) from None

    return content
