"""Any images: a Python function `package.module:function` that returns them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from pydantic import Field

from compress.data.decoding import as_rgb
from compress.data.gathered import Gathered, Loading, opened
from compress.data.loader import ImageData
from compress.errors import CompressError, DataError
from compress.labels import Task
from compress.models.factory import find, importable
from compress.product import Preprocess
from compress.progress import Progress


class Pairs(Protocol):
    """A list, or anything else with a length whose items are (image, label).

    The image is a Pillow image or a uint8 array (height, width), (height, width, 1) or (height, width, 3); the label a
    class's name or number, or K numbers. Threads ask for items, at the same time: `__getitem__` must allow that.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, Any]: ...


class FactoryData(Loading):
    """Images of your own function: `my_data:birds` is `birds` of ./my_data.py.

    It returns the training images and those for evaluation, two sequences of (image, label); the second may be None if
    there is a `holdout`. The recipe runs this code: name only what you trust.
    """

    use: str = Field(pattern=r"^[^\s:]+:[^\s:]+$")
    """`package.module:name` of the function. The current directory is searched first."""
    args: dict[str, Any] = Field(default_factory=dict)
    """What the function is called with."""
    task: Task = "classification"
    labels: tuple[str, ...] = ()
    """What the outputs are called: classes in the order of their numbers, or a name for each number of a label."""
    concurrent: bool = True
    """Whether threads may ask for items at the same time; false lets them wait for each other."""


def open_factory(
    settings: FactoryData, preprocess: Preprocess, progress: Progress, base: Path, checked: str | None = None
) -> ImageData:
    """The function's images; see `compress.data.gathered.opened`.

    Raises DataError for whatever goes wrong in the function and for what it returns, naming split and item.
    """
    place = f"data {settings.use}"
    with importable(Path.cwd()):
        try:
            function = find(settings.use, place)
        except CompressError as error:
            raise DataError(error.place, error.problem, error.way_out) from error
        try:
            returned = function(**settings.args)
        except (Exception, SystemExit) as error:
            raise DataError(place, f"raised {_said(error)}", "correct the function, or `args`") from error
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise DataError(place, f"returned {_kind(returned)}", "it must return (training images, images for evaluation)")
    splits = [(name, part) for name, part in zip(("train", "evaluation"), returned, strict=True) if part is not None]
    for name, part in splits:
        if not hasattr(part, "__len__") or not hasattr(part, "__getitem__"):
            raise DataError(
                f"{place}: {name}", f"is {_kind(part)}", "give a list, or an object with a length and items"
            )
        try:
            len(part)
        except Exception as error:
            raise DataError(f"{place}: {name}", f"its length raised {_said(error)}", "correct the function") from error
    if len(splits) == (2 if settings.holdout is not None else 1):
        says = "images for evaluation, but `holdout` is set" if settings.holdout else "no images for evaluation"
        raise DataError(place, f"returned {says}", "give either the one or the other")
    reader = Reader(place, splits, threading.Lock() if not settings.concurrent else None)
    labels, targets = _targets(settings, reader)
    found = Gathered(
        place=place,
        names=reader.names,
        targets=targets,
        labels=labels,
        content=reader.content,
        evaluation_N=None
        if settings.holdout is not None
        else np.array([name == "evaluation" for name, part in splits for _ in range(len(part))]),
        task=settings.task,
        image=_image,
    )
    return opened(found, settings, preprocess, progress, checked)


class Reader:
    """Asks the user's sequences for items, and says which item it was that went wrong."""

    def __init__(self, place: str, splits: Sequence[tuple[str, Pairs]], lock: threading.Lock | None) -> None:
        self.place, self.lock = place, lock
        self.items = [(part, index) for _, part in splits for index in range(len(part))]
        self.names = [f"{name}[{index}]" for name, part in splits for index in range(len(part))]

    def item(self, number: int) -> tuple[Any, Any]:
        part, index = self.items[number]
        where = f"{self.place}/{self.names[number]}"
        try:
            if self.lock is None:
                found = part[index]
            else:
                with self.lock:
                    found = part[index]
        except Exception as error:
            raise DataError(where, f"raised {_said(error)}", "correct the function") from error
        if not isinstance(found, (tuple, list)) or len(found) != 2:
            raise DataError(where, f"is {_kind(found)}", "each item must be (image, label)")
        return found[0], found[1]

    def content(self, number: int) -> bytes:
        """Width, height and RGB pixels, so that the hash knows the image and nothing else."""
        image = self.item(number)[0]
        where = f"{self.place}/{self.names[number]}"
        if isinstance(image, np.ndarray):
            shaped = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
            if image.dtype != np.uint8 or shaped.ndim not in (2, 3) or (shaped.ndim == 3 and shaped.shape[2] != 3):
                problem = f"has an array of {image.dtype} {image.shape}"
                raise DataError(where, problem, "give uint8 (height, width), or (height, width, 3)")
            if not image.size:
                raise DataError(where, f"has an array without pixels {image.shape}", "leave the item out")
            image = Image.fromarray(np.ascontiguousarray(shaped))
        if not isinstance(image, Image.Image):
            raise DataError(where, f"has {_kind(image)} for an image", "give a Pillow image or a uint8 array")
        try:
            rgb = as_rgb(image)
        except Exception as error:
            raise DataError(where, f"has an image that cannot be read ({error})", "correct the function") from None
        return rgb.width.to_bytes(4, "little") + rgb.height.to_bytes(4, "little") + rgb.tobytes()


def _image(content: bytes, place: str, enough: int | None) -> Image.Image:
    width, height = int.from_bytes(content[:4], "little"), int.from_bytes(content[4:8], "little")
    return Image.frombytes("RGB", (width, height), content[8:])


def _targets(settings: FactoryData, reader: Reader) -> tuple[tuple[str, ...], np.ndarray]:
    said = [reader.item(number)[1] for number in range(len(reader.items))]

    def where(number: int) -> str:
        return f"{reader.place}/{reader.names[number]}"

    if settings.task != "classification":
        return _numbers(settings, said, where)
    names = settings.labels
    words = [isinstance(label, str) for label in said]
    if all(words):
        names = names or tuple(sorted(set(said)))
        numbers = {name: number for number, name in enumerate(names)}
        for number, label in enumerate(said):
            if label not in numbers:
                raise DataError(where(number), f"has class `{label}`", "it is not in `labels`")
        return names, np.array([numbers[label] for label in said], np.int64)
    for number, label in enumerate(said):
        whole = isinstance(label, (int, np.integer)) and not isinstance(label, (bool, np.bool_))
        if not whole or label < 0 or (names and label >= len(names)):
            allowed = f"a number below {len(names)}" if names else "a class's name or number, as all the others"
            raise DataError(where(number), f"has label {label!r}"[:200], f"it must be {allowed}")
    classes_N = np.array(said, np.int64)
    return names or tuple(map(str, range(int(classes_N.max()) + 1))), classes_N


def _numbers(
    settings: FactoryData, said: Sequence[Any], where: Callable[[int], str]
) -> tuple[tuple[str, ...], np.ndarray]:
    if not settings.labels:
        raise DataError(where(0), f"`task: {settings.task}` needs `labels`", "give a name for each number of a label")
    rows = []
    for number, label in enumerate(said):
        try:
            with np.errstate(over="ignore"):  # too large becomes infinite, which is refused below
                row = np.atleast_1d(np.asarray(label, np.float32))
        except (TypeError, ValueError):
            row = np.empty(0, np.float32)
        fits = row.shape == (len(settings.labels),) and bool(np.isfinite(row).all())
        if not fits or (settings.task == "multi_label" and not np.isin(row, (0, 1)).all()):
            kind = "0 or 1" if settings.task == "multi_label" else "a finite number"
            raise DataError(where(number), f"has label {label!r}"[:200], f"it must be {kind} for each of `labels`")
        rows.append(row)
    return settings.labels, np.stack(rows)


def _kind(value: Any) -> str:
    return (
        f"{type(value).__name__} of length {len(value)}" if isinstance(value, (tuple, list)) else type(value).__name__
    )


def _said(error: BaseException) -> str:
    """Kind and message in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
