"""CIFAR-10 and CIFAR-100 in the archives that their authors publish, which are never unpacked.

A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009; 60,000 images of 32x32 pixels. Of the three
versions this reads the binary one. The Python version holds pickles, and the Matlab version needs another library: both
have the same images.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from compress.data.augment import AugmentPhoto
from compress.data.gathered import Gathered, Loading, opened
from compress.data.loader import ImageData
from compress.errors import DataError
from compress.models import file_sha256
from compress.product import Preprocess
from compress.progress import Progress

SHA256 = {
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd": "cifar-10-binary.tar.gz",
    "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec": "cifar-100-binary.tar.gz",
}
"""The archives as TensorFlow Datasets, MLDatasets and others pin them; their MD5 is on the authors' page."""
OTHER_VERSIONS = {
    "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce": "cifar-10-binary.tar.gz",
    "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7": "cifar-100-binary.tar.gz",
}
"""The Python versions, and what to download instead."""
PIXELS = 3 * 32 * 32
BATCHES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
LARGEST = 256 * 2**20
"""Bytes of a file in the archive; the largest of the published ones has 154 million."""


class Cifar(Loading):
    """CIFAR-10 or CIFAR-100 as `cifar-10-binary.tar.gz` or `cifar-100-binary.tar.gz`; its test images are evaluated on.

    With `holdout` the test images stay unused, and a part of the training images is evaluated on.
    """

    use: Literal["cifar"]
    path: str = Field(min_length=1)
    """The archive; a relative path starts at the current directory."""
    coarse: bool = False
    """CIFAR-100's 20 superclasses instead of its 100 classes."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """Of the archive, where it is one of your own in the same layout; null takes only the published ones."""
    augment: AugmentPhoto = AugmentPhoto(crop_scale=(0.6, 1.0), color=0.0)


def open_cifar(
    settings: Cifar, preprocess: Preprocess, progress: Progress, base: Path, checked: str | None = None
) -> ImageData:
    """The images of the archive; see `compress.data.gathered.opened`.

    Raises DataError for an archive with another checksum, before anything in it is looked at.
    """
    path = base / Path(settings.path).expanduser()
    _refuse_unknown(path, settings.sha256)
    members = _members(path)
    if "train.bin" in members:
        parts: dict[str, tuple[str, ...]] = {"train": ("train.bin",), "test": ("test.bin",)}
        label_bytes, which = 2, 0 if settings.coarse else 1
        names_of = "coarse_label_names.txt" if settings.coarse else "fine_label_names.txt"
    elif BATCHES[0] in members:
        parts = {"train": BATCHES, "test": ("test_batch.bin",)}
        label_bytes, which, names_of = 1, 0, "batches.meta.txt"
        if settings.coarse:
            raise DataError(path, "is CIFAR-10, which has no superclasses", "leave `coarse` out")
    else:
        raise DataError(
            path,
            "is not the binary version of CIFAR",
            "the Python version holds pickles, which are never loaded: download the binary version",
        )
    if settings.holdout is not None:
        parts = {"train": parts["train"]}
    for name in (*(name for files in parts.values() for name in files), names_of):
        if name not in members:
            raise DataError(path, f"has no {name}", "download it again")
    labels = tuple(members[names_of].decode("utf-8", "replace").split())
    rows, names, evaluation = [], [], []
    for split, files in parts.items():
        for name in files:
            row = label_bytes + PIXELS
            if not members[name] or len(members[name]) % row:
                raise DataError(
                    path, f"{name} has {len(members[name])} bytes, no multiple of {row}", "download it again"
                )
            rows.append(np.frombuffer(members[name], np.uint8).reshape(-1, row))
            names += [f"{name}#{number}" for number in range(len(rows[-1]))]
            evaluation += [split == "test"] * len(rows[-1])
    rows_NB = np.concatenate(rows)
    targets = rows_NB[:, which].astype(np.int64)
    if int(targets.max()) >= len(labels):
        raise DataError(path, f"has an image of class {targets.max()}, but {len(labels)} names", "download it again")
    found = Gathered(
        place=str(path),
        names=names,
        targets=targets,
        labels=labels,
        content=lambda index: rows_NB[index, label_bytes:].tobytes(),
        evaluation_N=None if settings.holdout is not None else np.array(evaluation),
        image=_image,
    )
    return opened(found, settings, preprocess, progress, checked)


def _image(content: bytes, place: str, enough: int | None) -> Image.Image:
    planes_CHW = np.frombuffer(content, np.uint8).reshape(3, 32, 32)
    return Image.fromarray(np.ascontiguousarray(planes_CHW.transpose(1, 2, 0)))


def _refuse_unknown(path: Path, wanted: str | None) -> None:
    if not path.is_file():
        raise DataError(path, "no such archive", f"a relative path starts at {Path.cwd()}")
    try:
        found = file_sha256(path)
    except OSError as error:
        raise DataError(path, f"cannot be read ({error.strerror})") from None
    if wanted is not None:
        if found != wanted:
            raise DataError(path, f"has SHA-256 {found}, not {wanted}", "download it again, or correct `sha256`")
    elif found in OTHER_VERSIONS:
        problem = "is the Python version of CIFAR, which holds pickles, and those are never loaded"
        raise DataError(path, problem, f"download {OTHER_VERSIONS[found]}: the same images")
    elif found not in SHA256:
        way_out = f"download one again; if this one is your own, set `sha256: {found}`"
        raise DataError(path, f"is none of {', '.join(SHA256.values())}: its SHA-256 is another", way_out)


def _members(path: Path) -> Mapping[str, bytes]:
    """Content of the regular .bin and .txt files by their names without folders; nothing is written to disk."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                if not member.isreg() or PurePosixPath(name).suffix not in (".bin", ".txt"):
                    continue
                if member.size > LARGEST:
                    raise DataError(path, f"{name} is said to have {member.size} bytes", "download it again")
                file = archive.extractfile(member)
                found[name] = file.read() if file else b""
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(path, f"is no whole .tar.gz archive ({error})", "download it again") from None
    return found
