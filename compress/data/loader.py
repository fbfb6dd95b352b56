"""Batches for training and evaluation, the same ones whatever the number of threads and processes.

Images are prepared by threads, not by processes: Pillow releases the GIL while it decodes and resizes, an epoch
starts at once, and nothing forks a process in which OpenMP and progress threads already run (Python 3.12 warns
of that, and 3.14 no longer does it).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from PIL import Image

from compress import processes
from compress.data.augment import Augment
from compress.data.balance import Balance, drawn_equally, label_weights
from compress.data.pixels import pixels
from compress.data.split import alike
from compress.errors import DataError
from compress.labels import Task
from compress.product import Batch, Preprocess, Scale, Split
from compress.tasks.regression import scale_of, standardized


@dataclass(frozen=True)
class Images:
    """One split."""

    targets: np.ndarray
    """What is to be learned of each image: int64 (N,) classes, or float32 (N, K) for the other tasks."""
    read: Callable[[int, int | None], Image.Image]
    """The RGB image of an index; given a number of pixels, it may come smaller, but no side shorter than that."""
    first: int = 0
    """What batches call the image of index 0, where other images have the numbers before."""
    names: Sequence[str] = ()
    """Of the file, or where in its source an image is; empty where the source names none."""


@dataclass(frozen=True)
class ImageData:
    """The `Data` of every source."""

    labels: tuple[str, ...]
    preprocess: Preprocess
    fingerprint: str
    train: Images
    evaluation: Images
    augment: Augment
    workers: int
    """Threads that prepare batches ahead of their use; 0 prepares each when it is asked for."""
    channels_last: bool = True
    held: frozenset[str] = frozenset()
    """SHA-256 of the files of the evaluation; empty where the images are no files."""
    task: Task = "classification"
    standardize: bool = True
    """Whether a regression's batches have its numbers standardised; else they are as `targets` has them."""
    balance: Balance = "none"

    @cached_property
    def scale(self) -> Scale | None:
        """See `compress.product.Data`."""
        return scale_of(self.train.targets) if self.task == "regression" and self.standardize else None

    @cached_property
    def label_weights(self) -> tuple[float, ...] | None:
        """See `compress.product.Data`."""
        return label_weights(self.train.targets, len(self.labels), self.task) if self.balance == "loss" else None

    def in_nchw(self) -> ImageData:
        """See `compress.product.Data`."""
        return replace(self, channels_last=False)

    def count(self, split: Split) -> int:
        return len(self._images(split).targets)

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
        """See `compress.product.Data`."""
        images = self._images(split)
        drawn = epoch if view is None else view
        groups_N = alike(images.targets, self.task)
        if self.balance == "sampler" and split == "train" and shuffle and limit is None:
            chosen_N = drawn_equally(groups_N, seed=seed, epoch=epoch)
            if view is not None:  # the pixels of an image in a view are promised to be the same
                chosen_N %= len(groups_N)
        else:
            chosen_N = spread(groups_N, limit, seed)
        groups = shares(chosen_N, batch_size, shuffle=shuffle, seed=seed, epoch=epoch, rank=rank, world_size=world_size)
        return self.loaded(split, groups, augment=augment, seed=seed, view=drawn)

    def loaded(
        self, split: Split, groups: Iterable[np.ndarray], *, augment: bool, seed: int, view: int
    ) -> Generator[Batch, None, None]:
        """One batch for each group of indices, prepared ahead by the threads.

        An index beyond the images, by a multiple of their number, is one of them with another augmentation.
        """
        images, scale = self._images(split), self.scale
        # From pinned memory a batch goes to the GPU while the GPU computes; the threads pin, not the training.
        pinned = processes.own_device().type == "cuda"

        def load(numbers: np.ndarray) -> Batch:
            again, indices = np.divmod(numbers, len(images.targets))
            side, channels = self.preprocess.size, self.preprocess.channels
            pixels_NHWC = np.empty((len(indices), side, side, channels), np.uint8)
            for row, index, drawn in zip(pixels_NHWC, indices.tolist(), again.tolist(), strict=True):
                row[:] = self._augmented(images, index, seed, view, drawn) if augment else self._exact(images, index)
            images_NHWC = torch.from_numpy(self.preprocess.normalize(pixels_NHWC))
            if pinned:
                images_NHWC = images_NHWC.pin_memory()
            # Seen as NCHW, memory in the order NHWC is what torch calls channels_last.
            images_NCHW = images_NHWC.permute(0, 3, 1, 2)
            if not self.channels_last:
                images_NCHW = images_NCHW.contiguous()
            targets = images.targets[indices]
            labels_N = torch.from_numpy(targets if scale is None else standardized(targets, scale))
            return Batch(images_NCHW, labels_N, torch.from_numpy(images.first + indices), view)

        return ahead(load, groups, self.workers)

    def _images(self, split: Split) -> Images:
        return self.train if split == "train" else self.evaluation

    def _exact(self, images: Images, index: int) -> np.ndarray:
        return pixels(images.read(index, None), self.preprocess)

    def _augmented(self, images: Images, index: int, seed: int, view: int, again: int) -> np.ndarray:
        # numpy pads seeds with zeros: (seed, epoch) of the shuffle is (seed, epoch, 0), hence the + 1.
        rng = np.random.default_rng((seed, view, images.first + index + 1, again))
        enough = int(self.preprocess.size / self.augment.smallest_part) + 1
        return self.augment(images.read(index, enough), self.preprocess, rng)


def spread(classes: np.ndarray, limit: int | None, seed: int) -> np.ndarray:
    """`limit` indices in ascending order, each class as often as the others while it lasts; None takes all."""
    if limit is None or limit >= len(classes):
        return np.arange(len(classes))
    shuffled = np.random.default_rng((seed, 0, 0, 1)).permutation(len(classes))
    turn = np.empty(len(classes), np.int64)  # the how-manieth of its class an image is
    for label in np.unique(classes):
        members = classes[shuffled] == label
        turn[members] = np.arange(members.sum())
    return np.sort(shuffled[np.argsort(turn, kind="stable")][:limit])


def shares(
    indices_N: np.ndarray,
    batch_size: int,
    *,
    shuffle: bool,
    seed: int,
    epoch: int,
    rank: int,
    world_size: int,
) -> list[np.ndarray]:
    """The indices of each batch of one process; see `Data.batches` for the rules.

    Raises DataError where there are fewer images than processes.
    """
    if len(indices_N) < world_size:
        raise DataError("data", f"{len(indices_N)} images cannot be shared by {world_size} processes")
    if shuffle:
        order = np.random.default_rng((seed, epoch)).permutation(indices_N)
        share = order[rank::world_size][: len(order) // world_size]
        full = len(share) // batch_size
        return np.split(share[: full * batch_size], full) if full else [share]
    share = indices_N[rank::world_size]
    largest = -(-len(indices_N) // world_size)
    number = -(-largest // batch_size)
    if -(-len(share) // batch_size) == number:
        return [share[start : start + batch_size] for start in range(0, len(share), batch_size)]
    # One image fewer than rank 0 would be one batch fewer: cut smaller ones (at batch size 1, the last is empty).
    return np.array_split(share, number)


def ahead(
    load: Callable[[np.ndarray], Batch], groups: Iterable[np.ndarray], workers: int
) -> Generator[Batch, None, None]:
    """`load(group)` of every group, in order; `workers` threads work up to two groups each ahead."""
    if workers == 0:
        yield from map(load, groups)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="data") as pool:
        waiting: deque[Future[Batch]] = deque()
        try:
            for group in groups:
                waiting.append(pool.submit(load, group))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
