"""From the images that a source has found to data that can be trusted: every image looked at, no image in both splits.

Every source ends here, so all of them refuse the same faults and know the same fingerprint.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import Field

from compress.data.augment import AugmentPhoto
from compress.data.balance import Balance
from compress.data.decoded import Decoded, default_folder
from compress.data.decoding import decode
from compress.data.loader import ImageData, Images
from compress.data.split import alike, holdout
from compress.errors import DataError
from compress.labels import Task
from compress.product import Preprocess
from compress.progress import Progress
from compress.settings import Settings

NAMED = 10
"""Faulty files that an error names; it counts the others."""


MOVED = (
    "training images are cropped and mirrored, and their numbers stay: where a number depends on place or side, set "
    "`augment: {flip: false, crop_scale: [1, 1]}` in `data`"
)


class Loading(Settings):
    """What every source of images can be told."""

    holdout: float | None = Field(default=None, gt=0, lt=1)
    """Where no images are set aside for evaluation: the part of the training images to take, the same in every run."""
    augment: AugmentPhoto = AugmentPhoto()
    workers: int = Field(default=2, ge=0)
    """Threads that prepare batches ahead; 0 for none."""
    cache: Literal["none", "decoded"] = "none"
    """`decoded` keeps decoded images in the user's cache folder: worth it for large photographs, see docs/data.md."""
    cache_gb: float = Field(default=20.0, gt=0)
    """Size of that folder at most, for all recipes together."""
    balance: Balance = "none"
    """Where some classes have few images: `sampler` draws each class equally often, `loss` weighs their mistakes."""
    standardize: bool = True
    """In a regression: the network's outputs are (number - mean) / std over the training images, see docs/tasks.md;
    false for a network that already gives the numbers themselves."""


@dataclass(frozen=True)
class Gathered:
    """Images with what is to be learned of them, as a source lists them."""

    place: str
    """What errors about the whole name."""
    names: Sequence[str]
    """Of each image: its file, or where in the source it is."""
    targets: np.ndarray
    """int64 (N,) classes, or float32 (N, K)."""
    labels: tuple[str, ...]
    content: Callable[[int], bytes]
    """All that makes up the image of an index, for its hash. Raises DataError."""
    evaluation_N: np.ndarray | None
    """bool (N,): the images for evaluation; None where `holdout` chooses them."""
    task: Task = "classification"
    image: Callable[[bytes, str, int | None], Image.Image] = decode
    """From that content to the RGB image; see `decode`."""

    def where(self, index: int) -> str:
        """The place of an image in an error about it."""
        return f"{self.place}/{self.names[index]}"


def opened(
    found: Gathered,
    settings: Loading,
    preprocess: Preprocess,
    progress: Progress,
    checked: str | None = None,
    *,
    said: Sequence[str] | None = None,
) -> ImageData:
    """The images, each hashed and, unless `checked` is the fingerprint, decoded.

    `said` is what the fingerprint says of each image besides its content and split: its name and target, unless given.
    An image whose very bytes are in both splits is for evaluation only; a note says how many those were.
    Raises DataError for faulty images, all of them at once, and for classes that are not in both splits.
    """
    # Exported files hold the names, and have room for nothing but UTF-8.
    labels = tuple(name.encode(errors="backslashreplace").decode() for name in found.labels)
    found = replace(found, labels=labels)
    if settings.balance != "none" and found.task == "regression":
        raise DataError(found.place, "`balance` is for classes and labels", "leave it out of a regression")
    if not settings.standardize and found.task != "regression":
        raise DataError(found.place, "`standardize` is for the numbers of a regression", "leave it out")
    if found.task == "regression" and (settings.augment.flip or settings.augment.crop_scale != (1, 1)):
        progress.note(MOVED)
    hashes = inspected(found, progress, decoding=checked is None)
    groups_N = alike(found.targets, found.task)
    if found.evaluation_N is not None:
        evaluation_N = found.evaluation_N
    elif settings.holdout is None:
        raise DataError(found.place, "has no images for evaluation", "set `holdout: 0.2` to set a part aside")
    else:
        # By the hashes alone where there are no classes: tenths of numbers would move with every new image.
        spread_N = groups_N if found.task != "regression" else np.zeros(len(groups_N), np.int64)
        evaluation_N = holdout(hashes, spread_N, settings.holdout)
    held = {hashes[index] for index in np.flatnonzero(evaluation_N)}
    leaked_N = ~evaluation_N & np.fromiter((value in held for value in hashes), bool, len(hashes))
    train_N = ~evaluation_N & ~leaked_N
    if leaked_N.any():
        first = found.names[int(np.flatnonzero(leaked_N)[0])]
        progress.note(f"{leaked_N.sum()} training images left out that are in the evaluation too, such as {first}")
    _refuse_missing(found, train_N, evaluation_N, progress)
    _note_contradictions(found, hashes, ~leaked_N, progress)

    if said is None:
        said = [f"{name}\t{_text(target)}" for name, target in zip(found.names, found.targets, strict=True)]
    lines = [f"{name}\t{value}\t{kept}" for name, value, kept in zip(said, hashes, evaluation_N, strict=True)]
    fingerprint = hashlib.sha256("\n".join(sorted(lines)).encode("utf-8", "surrogateescape")).hexdigest()
    if checked is not None and checked != fingerprint:
        inspected(found, progress, decoding=True)

    kept = Decoded(default_folder(), int(settings.cache_gb * 1e9)) if settings.cache == "decoded" else None

    def decoded(index: int, enough: int | None) -> Image.Image:
        return found.image(found.content(index), found.where(index), enough)

    def images(chosen_N: np.ndarray) -> Images:
        chosen = np.flatnonzero(chosen_N)

        def read(index: int, enough: int | None) -> Image.Image:
            which = int(chosen[index])
            if kept is None:
                return decoded(which, enough)
            return kept.image(hashes[which], enough, lambda: decoded(which, enough))

        return Images(found.targets[chosen_N], read, names=[found.names[index] for index in chosen.tolist()])

    return ImageData(
        labels=found.labels,
        preprocess=preprocess,
        fingerprint=fingerprint,
        train=images(train_N),
        evaluation=images(evaluation_N),
        augment=settings.augment,
        workers=settings.workers,
        held=frozenset(held),
        task=found.task,
        balance=settings.balance,
        standardize=settings.standardize,
    )


def inspected(found: Gathered, progress: Progress, *, decoding: bool) -> list[str]:
    """SHA-256 of every image's content. Raises DataError for all that cannot be read or, with `decoding`, seen."""

    def look(index: int) -> str | DataError:
        try:
            content = found.content(index)
            if decoding:
                found.image(content, found.where(index), None)
        except DataError as error:
            return error
        return hashlib.sha256(content).hexdigest()

    threads = min(8, os.cpu_count() or 1)
    hashes: list[str] = []
    faults: list[tuple[str, DataError]] = []
    label = "checking images" if decoding else "hashing images"
    with progress.steps(label, len(found.names)) as advance, ThreadPoolExecutor(threads) as pool:
        try:
            for name, value in zip(found.names, pool.map(look, range(len(found.names))), strict=True):
                if isinstance(value, DataError):
                    faults.append((name, value))
                else:
                    hashes.append(value)
                advance("")
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    if len(faults) == 1:
        raise faults[0][1]
    if faults:
        named = ", ".join(f"{name} {error.problem}" for name, error in faults[:NAMED])
        more = f" and {len(faults) - NAMED} more" if len(faults) > NAMED else ""
        raise DataError(found.place, f"{len(faults)} images are faulty: {named}{more}", "replace or remove them")
    return hashes


def few(names: Iterable[str]) -> str:
    """`a, b, c and 4 more`, sorted."""
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")


def _refuse_missing(found: Gathered, train_N: np.ndarray, evaluation_N: np.ndarray, progress: Progress) -> None:
    """Nothing can be learned of a class that no training image has, and nothing said of one that none is judged by."""
    if found.task == "regression":
        for images_N, split in ((train_N, "training"), (evaluation_N, "evaluation")):
            if not images_N.any():
                raise DataError(found.place, f"has no image left for {split}", "add images")
        return
    train_K, evaluation_K = (_counts(found, images_N) for images_N in (train_N, evaluation_N))
    kind = "class" if found.task == "classification" else "label"
    if kind == "class" and len(found.labels) < 2:
        raise DataError(found.place, f"has one class, `{found.labels[0]}`", "two or more are needed")
    problems = []
    for counts_K, problem in (
        (train_K, "has no training image left that is not for evaluation"),
        (evaluation_K, "has no image for evaluation"),
    ):
        without = [f"`{name}`" for name, count in zip(found.labels, counts_K.tolist(), strict=True) if not count]
        if without and (kind == "class" or counts_K is train_K):
            problems.append(f"{kind} {few(without)} {problem}")
        elif without:
            progress.note(f"{kind} {few(without)} {problem}: how well it is told cannot be said")
    if problems:
        raise DataError(found.place, " and ".join(problems), "add some, or leave it out")
    single = [name for name, count in zip(found.labels, train_K.tolist(), strict=True) if count == 1]
    if single:
        progress.note(f"one training image is all there is of {kind} {few(single)}")


def _counts(found: Gathered, images_N: np.ndarray) -> np.ndarray:
    """int64 (K,): images of each class, or that have each label."""
    chosen = found.targets[images_N]
    if found.task == "classification":
        return np.bincount(chosen, minlength=len(found.labels))
    return (chosen > 0.5).sum(0)


def _note_contradictions(found: Gathered, hashes: Sequence[str], kept_N: np.ndarray, progress: Progress) -> None:
    """Says which images are there twice with different targets: at most one of them is right."""
    first: dict[str, int] = {}
    differing = []
    for index in np.flatnonzero(kept_N).tolist():
        earlier = first.setdefault(hashes[index], index)
        if earlier != index and not np.array_equal(found.targets[earlier], found.targets[index]):
            differing.append((earlier, index))
    if differing:
        one, other = (found.names[index] for index in differing[0])
        progress.note(f"{len(differing)} images are there again with another label, such as {one} and {other}")


def _text(target: np.ndarray) -> str:
    return " ".join(repr(value) for value in np.atleast_1d(target).tolist())
