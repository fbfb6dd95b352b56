"""A teacher's logits, kept so that it looks once at each view of each image: in memory, or on disk for later runs too.

A row is always of a whole batch: an image's logits differ in their last bits (1e-7) with the number of images that are
asked about together, while their order changes nothing (oneDNN, measured). So a training is the same, byte for byte,
with and without a cache. Batches of another size, another number of threads or another processor may differ that much.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from compress import __version__, locks
from compress.data.loader import ImageData
from compress.data.unlabeled import WithUnlabeled, numbered
from compress.errors import DataError
from compress.product import Batch, Data, Run
from compress.settings import Settings
from compress.written import read_json, write_json

Ask = Callable[[Batch], Tensor]
"""(N, K) logits of a batch that lies on the run's device."""

HEADER, LOCK, ROWS = "cache.json", "lock", ".logits"
FORMAT = 1


def asked_once(
    ask: Ask, fingerprint: str | None, run: Run, *, views: int | None, cache: Path | None, augment: bool
) -> Ask:
    """`ask`, which then looks once at each view of each image, as `Distillation.views` and `cache` say.

    `fingerprint` is the teacher's, None for one that changes: that is asked every time, and refused with a `cache`.
    """
    count, classes = numbered(run.data), len(run.data.labels)
    if cache is not None:
        if fingerprint is None:
            raise DataError(
                f"stage {run.stage or 'distill'}",
                "this teacher changes while it teaches, so its answers cannot be kept",
                "leave `cache` out, or name a teacher that stays as it is",
            )
        stored = Cached(ask, cache, fingerprint, run, augment=augment)
        run.progress.note(
            f"The teacher's answers are kept in {cache} (up to {stored.row.itemsize * count / 1e6:.3g} MB a view)."
        )
        return stored
    if views is None or fingerprint is None:
        return ask
    run.progress.note(
        f"The teacher's answers to {views} views of {count} images stay in memory "
        f"({views * count * classes * 4 / 1e6:.3g} MB)."
    )
    return Remembered(ask, count, views, whole=run.world_size == 1)


class Remembered:
    """A teacher that looks once at each view of each image; with several processes, each asks for its own images.

    Where an image of a batch is new, the teacher sees the batch as a `whole`; else the new images alone, whose logits
    then differ in their last bits. Several processes meet new images for many epochs, and whole batches would cost
    them most of what is saved.
    """

    def __init__(self, ask: Ask, images: int, views: int, *, whole: bool = True) -> None:
        self.ask, self.whole = ask, whole
        self.known_VN = torch.zeros(views, images, dtype=torch.bool)
        self.logits_VNK: Tensor | None = None

    def __call__(self, batch: Batch) -> Tensor:
        """float32 logits, in the order of the batch."""
        indices_N, view = _numbers(batch, "views"), batch.view
        known_N = self.known_VN[view, indices_N.cpu()]
        if not known_N.all():
            new_N = (~known_N).to(indices_N.device)
            if self.whole or not known_N.any():
                new_NK = self.ask(batch)[new_N]
            else:
                new_NK = self.ask(replace(batch, images_NCHW=batch.images_NCHW[new_N]))
            if self.logits_VNK is None:
                self.logits_VNK = new_NK.new_empty((*self.known_VN.shape, new_NK.shape[1]), dtype=torch.float32)
            self.logits_VNK[view, indices_N[new_N]] = new_NK.float()
            self.known_VN[view, indices_N.cpu()] = True
        assert self.logits_VNK is not None
        return self.logits_VNK[view, indices_N]


class Cached:
    """A teacher whose logits lie in a folder: whichever process, run or recipe asks first, no other asks again.

    `cache.json` says whose answers to what they are; anything else is refused. `<seed>-<view>.logits` has one row for
    each image: K float32 logits, a checksum of the pixels that were answered, a checksum of the row (0: not known).
    Each batch is read under a lock that processes share, and written under one that excludes them, on one machine or
    on file systems that share locks.
    """

    def __init__(self, ask: Ask, folder: Path, fingerprint: str, run: Run, *, augment: bool) -> None:
        """Makes the folder where it is missing. Raises DataError for a folder with the answers of something else."""
        self.ask, self.folder, self.seed, self.augment = ask, folder, run.seed, augment
        self.images, self.classes = numbered(run.data), len(run.data.labels)
        self.row = np.dtype([("logits", "<f4", (self.classes,)), ("pixels", "<u4"), ("check", "<u4")])
        wanted = facts(run, fingerprint, augment=augment)
        refuse_unusable(folder)
        with locks.briefly(self.folder / LOCK):
            self._open(wanted)

    def __call__(self, batch: Batch) -> Tensor:
        """float32 logits, in the order of the batch. Raises DataError for a file that was cut short or altered."""
        numbers = _numbers(batch, "cache").tolist()
        view = batch.view if self.augment else 0
        path = self.folder / (f"{self.seed}-{view}{ROWS}" if self.augment else f"plain{ROWS}")
        try:
            with locks.briefly(self.folder / LOCK, shared=True):
                rows = self._read(path, numbers)
            if not rows["check"].all():
                logits = self.ask(batch).float().cpu().numpy()
                if logits.shape[1] != self.classes:
                    raise DataError(path, f"a teacher of {logits.shape[1]} classes for data of {self.classes}")
                # Before the lock, which holds up all others; what they answer meanwhile is left as they wrote it.
                places = np.flatnonzero(rows["check"] == 0).tolist()
                new = {place: self._row(path, numbers[place], logits[place], batch, place) for place in places}
                with locks.briefly(self.folder / LOCK):
                    self._write(path, numbers, new)
                    rows = self._read(path, numbers)
        except OSError as error:
            raise DataError(path, f"cannot be read or written ({error.strerror})", "leave `cache` out") from error
        if int(rows["pixels"][0]) != _pixels(batch.images_NCHW[0]):
            raise DataError(
                path,
                f"image {numbers[0]} has other pixels than when the teacher answered it",
                f"the code that prepares images has changed: remove {self.folder}, or name another `cache`",
            )
        return torch.from_numpy(rows["logits"].copy()).to(batch.images_NCHW.device)

    def _open(self, wanted: dict[str, Any]) -> None:
        """Writes the header of a new cache, or compares the one that is there."""
        header = self.folder / HEADER
        way_out = f"remove {self.folder}, or name another folder as `cache`"
        if header.exists():
            found = read_json(header)
            if not found:
                raise DataError(header, "is not readable", way_out)
            if different := _different(found, wanted):
                raise DataError(self.folder, f"is a stale cache: {different}", way_out)
            return
        _refuse_other_content(self.folder)
        write_json(header, wanted)

    def _read(self, path: Path, numbers: list[int]) -> np.ndarray:
        """Records, with check 0 where nothing is known; whoever calls holds the lock."""
        size = self.row.itemsize
        if not path.exists():
            return np.zeros(len(numbers), self.row)
        with path.open("rb") as file:
            self._refuse_cut(path, file)
            rows = np.frombuffer(b"".join(os.pread(file.fileno(), size, n * size) for n in numbers), self.row)
        for number, row in zip(numbers, rows, strict=True):
            if row["check"] and row["check"] != _check(path, number, row):
                raise DataError(
                    path, f"the answer to image {number} was altered or written in part", f"remove {self.folder}"
                )
        return rows

    def _row(self, path: Path, number: int, logits_K: np.ndarray, batch: Batch, place: int) -> bytes:
        row = np.zeros((), self.row)
        row["logits"], row["pixels"] = logits_K, _pixels(batch.images_NCHW[place])
        row["check"] = _check(path, number, row)
        return row.tobytes()

    def _write(self, path: Path, numbers: list[int], new: Mapping[int, bytes]) -> None:
        """Adds what is not known yet of the rows at these places; whoever calls holds the lock that excludes others."""
        size = self.row.itemsize
        if not path.exists():
            started = path.with_name(path.name + ".tmp")
            with started.open("wb") as file:
                file.truncate(self.images * size)
            os.replace(started, path)
        known = self._read(path, numbers)["check"]
        with path.open("r+b", buffering=0) as file:
            for place, row in new.items():
                # The check comes last in the row, so a row that was written in part has none.
                if not known[place] and os.pwrite(file.fileno(), row, numbers[place] * size) != size:
                    raise OSError(0, "written in part")

    def _refuse_cut(self, path: Path, file: BinaryIO) -> None:
        found, wanted = os.fstat(file.fileno()).st_size, self.images * self.row.itemsize
        if found != wanted:
            kind = "was cut short" if found < wanted else "is too long"
            raise DataError(path, f"{kind} ({found} of {wanted} bytes)", f"remove {self.folder}")


def refuse_unusable(folder: Path) -> None:
    """Makes a cache's folder where it is missing. Raises DataError for one that cannot be written, or is no cache."""
    try:
        _refuse_other_content(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with locks.briefly(folder / LOCK):
            pass
    except OSError as error:
        problem = f"the teacher's answers cannot be kept here ({error.strerror})"
        raise DataError(folder, problem, "name another folder as `cache`") from error


def _refuse_other_content(folder: Path) -> None:
    """Raises DataError for a folder with something that is no cache, and leaves it as it is."""
    if not folder.is_dir() or (folder / HEADER).exists():
        return
    others = sorted(path.name for path in folder.iterdir() if path.name not in (LOCK, f"{HEADER}.tmp"))
    if others:
        problem = f"holds {others[0]}, but no {HEADER} that says whose answers these are"
        raise DataError(folder, problem, "name an empty or a new folder as `cache`")


def facts(run: Run, fingerprint: str, *, augment: bool) -> dict[str, Any]:
    """All that decides a teacher's answers but the image, the view and the seed of the view."""
    return {
        "format": FORMAT,
        "compress": __version__,
        "torch": str(torch.__version__),
        "device": run.device.type,
        "channels_last": run.data.channels_last,
        "teacher": fingerprint,
        "data": run.data.fingerprint,
        "images": numbered(run.data),
        "labels": list(run.data.labels),
        "preprocess": run.data.preprocess.model_dump(mode="json"),
        "augment": augmentation(run.data) if augment else None,
    }


def augmentation(data: Data) -> Any:
    """What the data does to its training images, as JSON; the name of its class where it does not say."""
    match data:
        case WithUnlabeled():
            return [augmentation(data.labelled), augmentation(data.unlabelled)]
        case ImageData():
            settings = data.augment.model_dump(mode="json") if isinstance(data.augment, Settings) else {}
            return {"use": type(data.augment).__name__, **settings}
        case _:
            return {"use": type(data).__name__}


def _different(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """`teacher is not 3f2a..., but 77b0...` for each fact that differs; empty where all are equal."""
    return ", ".join(
        f"its {name} was {_short(found.get(name))}, now {_short(wanted.get(name))}"
        for name in {**wanted, **found}
        if found.get(name) != wanted.get(name)
    )


def _short(value: Any) -> str:
    text = str(value)
    if isinstance(value, str) and len(text) == 64:
        return text[:12]
    return text if len(text) <= 200 else text[:199] + "…"


def _numbers(batch: Batch, field: str) -> Tensor:
    if batch.indices_N is None:
        raise DataError("distill", f"`{field}` needs data that numbers its images", f"leave `{field}` out")
    return batch.indices_N


def _pixels(image_CHW: Tensor) -> int:
    image_HWC = image_CHW.detach().cpu().permute(1, 2, 0)  # no copy where the batch is channels_last
    return zlib.crc32(image_HWC.contiguous().numpy().data)


def _check(path: Path, number: int, row: np.ndarray) -> int:
    """Of a row in its place, never 0: rows that changed places are found as well."""
    return zlib.crc32(row.tobytes()[:-4], zlib.crc32(f"{path.name} {number}".encode())) or 1
