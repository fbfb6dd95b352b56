"""A folder or a zip archive of images: `train/<class>/<image>` and `val/<class>/<image>`."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from compress.data.gathered import Gathered, Loading, few, opened
from compress.data.loader import ImageData
from compress.data.trees import TRAIN, Tree, ignored, open_tree, pictures
from compress.errors import DataError
from compress.product import Preprocess
from compress.progress import Progress


class Folder(Loading):
    """Images in `train/<class>/` and `val/<class>/` of a folder or of a zip archive, which is never unpacked."""

    use: Literal["folder"]
    path: str = Field(min_length=1)
    """The folder or the .zip; a relative path starts at the current directory."""
    evaluation: str = Field(default="val", min_length=1)
    """Name of the folder with the images for evaluation."""
    names: dict[str, str] = Field(default_factory=dict)
    """What the report calls a class, by the name of its folder (`n01440764: tench`)."""


@dataclass(frozen=True)
class Listing:
    """The images of one folder of classes."""

    files: list[str]
    classes: list[str]
    """Class names, sorted."""


def listing(tree: Tree, root: Path, split: str, progress: Progress) -> Listing:
    """The images under `split`, sorted. Raises DataError for a split or a class without any."""
    files: list[str] = []
    beside: list[str] = []
    for name in pictures(tree):
        folder, _, rest = name.partition("/")
        if folder == split:
            (files if "/" in rest else beside).append(name)
    if beside:
        progress.note(f"{len(beside)} files beside the class folders left out, such as {beside[0]}")
    folders = (name.split("/") for name in tree.folders if not ignored(name))
    classes = sorted(parts[1] for parts in folders if len(parts) == 2 and parts[0] == split)
    if not files:
        raise DataError(f"{root}/{split}", "has no images", f"they belong in {split}/<class>/")
    empty = sorted(set(classes) - {_class(name) for name in files})
    if empty:
        raise DataError(f"{root}/{split}/{empty[0]}", "has no images", "fill or remove the folder")
    return Listing(files, classes)


def _class(name: str) -> str:
    return name.split("/")[1]


def open_folder(
    settings: Folder, preprocess: Preprocess, progress: Progress, base: Path, checked: str | None = None
) -> ImageData:
    """The images of a folder or zip archive; see `compress.data.gathered.opened`.

    Raises DataError for a missing folder, an empty class, classes that differ and files that are no images.
    """
    root = base / Path(settings.path).expanduser()
    tree = open_tree(root)
    parts = _parts(tree, root, settings, progress)
    classes = parts[0].classes
    files = [name for part in parts for name in part.files]
    numbers = {name: number for number, name in enumerate(classes)}
    found = Gathered(
        place=str(root),
        names=files,
        targets=np.array([numbers[_class(name)] for name in files], np.int64),
        labels=tuple(settings.names.get(name, name) for name in classes),
        content=lambda index: tree.read(files[index]),
        evaluation_N=None if settings.holdout is not None else np.arange(len(files)) >= len(parts[0].files),
    )
    return opened(found, settings, preprocess, progress, checked, said=files)  # a file's name has its class


def _parts(tree: Tree, root: Path, settings: Folder, progress: Progress) -> list[Listing]:
    """The training images and, without a holdout, the evaluation images; their classes agree."""
    layout = f"{TRAIN}/<class>/<image> and {settings.evaluation}/<class>/<image>"
    if TRAIN not in tree.folders:
        raise DataError(root, f"has no folder `{TRAIN}`", f"expected {layout}")
    given = settings.evaluation in tree.folders
    if settings.holdout is not None and given:
        raise DataError(root, f"has a folder `{settings.evaluation}`, but `holdout` is set", "drop one of them")
    if settings.holdout is None and not given:
        raise DataError(
            root,
            f"has no folder `{settings.evaluation}`",
            f"name it with `evaluation`, or set `holdout: 0.2` to evaluate on a part of `{TRAIN}`",
        )
    train = listing(tree, root, TRAIN, progress)
    for name in settings.names:
        if name not in train.classes:
            near = get_close_matches(name, train.classes, 1)
            raise DataError(root, f"`names` has `{name}`, no class", f"did you mean `{near[0]}`?" if near else "")
    if len(train.classes) < 2:
        raise DataError(f"{root}/{TRAIN}", f"has one class, `{train.classes[0]}`", "two or more are needed")
    if settings.holdout is not None:
        return [train]
    evaluation = listing(tree, root, settings.evaluation, progress)
    ours, theirs = set(train.classes), set(evaluation.classes)
    if ours != theirs:
        only = [
            f"`{folder}` alone has {few(names)}"
            for folder, names in ((TRAIN, ours - theirs), (settings.evaluation, theirs - ours))
            if names
        ]
        raise DataError(root, "the classes differ", " and ".join(only))
    return [train, evaluation]
