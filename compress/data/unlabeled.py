"""Images without labels that a teacher explains to the student: more training data where labels are dear.

A student needs the teacher's answers, not the truth (Urner et al., 2011; Hinton et al., 2015, section 2).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pydantic import Field

from compress.data.augment import Augment, AugmentPhoto
from compress.data.gathered import Gathered, inspected
from compress.data.loader import ImageData, Images
from compress.data.trees import open_tree, pictures
from compress.errors import DataError
from compress.labels import Task
from compress.product import NO_LABEL, Batch, Data, Preprocess, Scale, Split
from compress.progress import Progress
from compress.settings import Settings


class Unlabeled(Settings):
    """Images in any folders below `path`, or in a zip archive; names of folders mean nothing.

    They count in all that is measured on a batch: in the teacher's losses, and in the student's BatchNorm statistics.
    """

    path: str = Field(min_length=1)
    """The folder or the .zip; a relative path starts at the current directory."""
    ratio: float = Field(default=1.0, gt=0)
    """So many unlabelled images join a batch for each image of `batch_size`; at least one."""
    augment: AugmentPhoto | None = None
    """null changes them as the labelled images are changed."""
    workers: int = Field(default=2, ge=0)
    """Threads that prepare batches ahead; 0 for none."""


@dataclass(frozen=True)
class WithUnlabeled:
    """The `Data` of labelled images whose training batches also have images with the label `NO_LABEL`, at their end.

    Only batches of `train` that are shuffled and not limited, those of trainings, get longer: samples for calibration
    and everything of the evaluation are the labelled data's. `count` does not know of the others; `numbered` does.
    """

    labelled: Data
    unlabelled: ImageData
    """Its `train`; no evaluation."""
    ratio: float

    @property
    def task(self) -> Task:
        return self.labelled.task

    @property
    def labels(self) -> tuple[str, ...]:
        return self.labelled.labels

    @property
    def scale(self) -> Scale | None:
        return self.labelled.scale

    @property
    def label_weights(self) -> tuple[float, ...] | None:
        return self.labelled.label_weights

    @property
    def preprocess(self) -> Preprocess:
        return self.labelled.preprocess

    @property
    def channels_last(self) -> bool:
        return self.labelled.channels_last

    def in_nchw(self) -> WithUnlabeled:
        """See `compress.product.Data`."""
        return replace(self, labelled=self.labelled.in_nchw(), unlabelled=self.unlabelled.in_nchw())

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the content of the labelled and the unlabelled images."""
        return hashlib.sha256(f"{self.labelled.fingerprint} {self.unlabelled.fingerprint}".encode()).hexdigest()

    def count(self, split: Split) -> int:
        """The labelled images: an epoch is one pass over them."""
        return self.labelled.count(split)

    def batches(
        self,
        split: Split,
        *,
        batch_size: int,
        augment: bool = False,
        shuffle: bool = False,
        seed: int = 0,
        epoch: int = 0,
        limit: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        view: int | None = None,
    ) -> Iterable[Batch]:
        """See `compress.product.Data`; `batch_size` counts the labelled images.

        The unlabelled ones follow one order that starts anew, shuffled, when all have been seen, and goes on from epoch
        to epoch. Where there are so few that one comes again in the same epoch, it has the same augmentation.
        """
        batches = self.labelled.batches(
            split,
            batch_size=batch_size,
            augment=augment,
            shuffle=shuffle,
            seed=seed,
            epoch=epoch,
            limit=limit,
            rank=rank,
            world_size=world_size,
            view=view,
        )
        if split != "train" or not shuffle or limit is not None:
            return batches
        # As `Data.batches` promises: incomplete batches are dropped, but never all of them.
        steps = max(1, self.count("train") // world_size // batch_size)
        extra = max(1, round(self.ratio * batch_size))
        drawn = epoch if view is None else view

        def both() -> Iterator[Batch]:
            groups = turns(
                len(self.unlabelled.train.targets),
                extra,
                seed=seed,
                first=epoch * steps,
                rank=rank,
                world_size=world_size,
            )
            chosen = (next(groups) for _ in range(steps))
            loaded = self.unlabelled.loaded("train", chosen, augment=augment, seed=seed, view=drawn)
            with closing(loaded):
                for labelled, unlabelled in zip(batches, loaded, strict=True):
                    yield appended(labelled, unlabelled)

        return both()


def appended(first: Batch, second: Batch) -> Batch:
    """The images of both, of the first one's view."""
    indices_N = None
    if first.indices_N is not None and second.indices_N is not None:
        indices_N = torch.cat([first.indices_N, second.indices_N])
    return replace(
        first,
        images_NCHW=torch.cat([first.images_NCHW, second.images_NCHW]),
        labels_N=torch.cat([first.labels_N, second.labels_N]),
        indices_N=indices_N,
    )


def turns(count: int, size: int, *, seed: int, first: int, rank: int, world_size: int) -> Iterator[np.ndarray]:
    """Groups of `size` of `count` indices for ever: those of one process, from step `first` on.

    All processes share one endless order, in which each round over the indices is shuffled anew: whatever the number
    of processes, no index comes a third time before all have come twice.
    """
    round_, order = -1, np.empty(0, np.int64)
    start = (first * world_size + rank) * size
    while True:
        group = []
        for position in range(start, start + size):
            if position // count != round_:
                round_ = position // count
                # Other seeds than those of the labelled images: (seed, epoch), (seed, 0, 0, 1), (seed, view, number).
                order = np.random.default_rng((seed, round_, 0, 2)).permutation(count)
            group.append(order[position % count])
        yield np.array(group, np.int64)
        start += world_size * size


def numbered(data: Data) -> int:
    """How many numbers `Batch.indices_N` of the training images can have: all are below this."""
    extra = len(data.unlabelled.train.targets) if isinstance(data, WithUnlabeled) else 0
    return data.count("train") + extra


def with_unlabeled(
    data: Data, settings: Unlabeled, progress: Progress, base: Path, checked: str | None = None
) -> WithUnlabeled:
    """`data`, and the images of a folder or zip archive, each hashed and, unless `checked` is the fingerprint, decoded.

    `checked` is `unlabelled.fingerprint` of an earlier call. An image whose very bytes are in the evaluation is left
    out; a note says how many that were. Raises DataError for a missing folder, for one without images, and for a file
    that is no image.
    """
    found = _listed(settings, base)
    hashes = inspected(found, progress, decoding=checked is None)
    fingerprint = _fingerprint(found.names, hashes)
    if checked is not None and checked != fingerprint:
        inspected(found, progress, decoding=True)
    held = data.held if isinstance(data, ImageData) else frozenset()
    chosen = [index for index, value in enumerate(hashes) if value not in held]
    if not chosen:
        raise DataError(found.place, "has only images that are in the evaluation too", "name other images")
    if left := len(hashes) - len(chosen):
        leaked = next(name for name, value in zip(found.names, hashes, strict=True) if value in held)
        progress.note(f"{left} unlabelled images left out that are in the evaluation, such as {leaked}")

    def read(index: int, enough: int | None) -> Image.Image:
        return found.image(found.content(chosen[index]), found.where(chosen[index]), enough)

    names = [found.names[index] for index in chosen]
    unlabelled = ImageData(
        labels=data.labels,
        preprocess=data.preprocess,
        fingerprint=fingerprint,
        train=Images(_unknown(data, len(names)), read, first=data.count("train"), names=names),
        evaluation=Images(_unknown(data, 0), read),
        augment=settings.augment or augment_of(data),
        workers=settings.workers,
        channels_last=data.channels_last,
        task=data.task,
    )
    return WithUnlabeled(data, unlabelled, settings.ratio)


def _unknown(data: Data, count: int) -> np.ndarray:
    """Targets of `count` images without labels, which join those of `data` in a batch."""
    if data.task == "classification":
        return np.full(count, NO_LABEL, np.int64)
    return np.full((count, len(data.labels)), np.nan, np.float32)


def fingerprint_of(settings: Unlabeled, progress: Progress, base: Path) -> str:
    """SHA-256 over names and content of the images, which are not decoded. Raises DataError as `with_unlabeled`."""
    found = _listed(settings, base)
    return _fingerprint(found.names, inspected(found, progress, decoding=False))


def _listed(settings: Unlabeled, base: Path) -> Gathered:
    root = base / Path(settings.path).expanduser()
    tree = open_tree(root)
    files = pictures(tree)
    if not files:
        raise DataError(root, "has no images", "`unlabeled` needs a folder or zip archive with images, at any depth")
    return Gathered(
        place=str(root),
        names=files,
        targets=np.full(len(files), NO_LABEL, np.int64),
        labels=(),
        content=lambda index: tree.read(files[index]),
        evaluation_N=None,
    )


def _fingerprint(files: Sequence[str], hashes: Sequence[str]) -> str:
    lines = (f"{name}\t{value}" for name, value in zip(files, hashes, strict=True))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def augment_of(data: Data) -> Augment:
    """How the training images change; as photographs do, where the data does not say."""
    return data.augment if isinstance(data, ImageData) else AugmentPhoto()
