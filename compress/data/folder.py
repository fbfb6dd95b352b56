"""A folder or a zip archive of images: `train/<class>/<image>` and `val/<class>/<image>`."""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Literal, Protocol

import numpy as np
from PIL import Image, ImageOps
from pydantic import Field

from compress.data.augment import AugmentPhoto
from compress.data.loader import ImageData, Images
from compress.data.split import holdout
from compress.errors import DataError
from compress.product import Preprocess
from compress.progress import Progress
from compress.settings import Settings

TRAIN = "train"


class Folder(Settings):
    """Images in `train/<class>/` and `val/<class>/` of a folder or of a zip archive, which is never unpacked."""

    use: Literal["folder"]
    path: str = Field(min_length=1)
    """The folder or the .zip; a relative path starts at the current directory."""
    evaluation: str = Field(default="val", min_length=1)
    """Name of the folder with the images for evaluation."""
    holdout: float | None = Field(default=None, gt=0, lt=1)
    """Where there is no such folder: the part of `train` to evaluate on, the same images in every run."""
    names: dict[str, str] = Field(default_factory=dict)
    """What the report calls a class, by the name of its folder (`n01440764: tench`)."""
    augment: AugmentPhoto = AugmentPhoto()
    workers: int = Field(default=2, ge=0)
    """Threads that prepare batches ahead; 0 for none."""


class Tree(Protocol):
    """Files by their relative path with `/`."""

    files: list[str]
    folders: set[str]

    def read(self, name: str) -> bytes:
        """Raises DataError if the file cannot be read whole."""
        ...


class FolderTree:
    """Also follows links to other folders."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: list[str] = []
        self.folders: set[str] = set()
        for folder, _, files in os.walk(root, followlinks=True):
            inside = PurePosixPath(Path(folder).relative_to(root).as_posix())
            self.folders.add(str(inside))
            self.files += [str(inside / file) for file in files]

    def read(self, name: str) -> bytes:
        try:
            return (self.root / name).read_bytes()
        except OSError as error:
            raise DataError(self.root / name, f"cannot be read ({error.strerror})") from None


class ZipTree:
    """Members are read from one memory map: `zipfile` itself lets only one thread read at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
            with path.open("rb") as file:
                self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except zipfile.BadZipFile as error:
            raise DataError(path, f"is no whole zip archive ({error})", "download or pack it again") from None
        except OSError as error:
            raise DataError(path, f"cannot be read ({error.strerror})") from None
        top = _wrapper(member.filename for member in members)
        self.members = {m.filename.removeprefix(top): m for m in members if not m.is_dir()}
        self.files = list(self.members)
        self.folders = {m.filename.removeprefix(top).rstrip("/") for m in members if m.is_dir()}
        for folder in {name.rpartition("/")[0] for name in self.files}:
            self.folders |= {folder, *(str(parent) for parent in PurePosixPath(folder).parents)}

    def read(self, name: str) -> bytes:
        member = self.members[name]
        place = f"{self.path}: {name}"
        if member.flag_bits & 1:
            raise DataError(place, "is encrypted")
        # The local header repeats the name and may have extra fields of another length than the directory's.
        start = member.header_offset
        lengths = self.bytes[start + 26 : start + 30]
        start += 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
        content = self.bytes[start : start + member.compress_size]
        try:
            if member.compress_type == zipfile.ZIP_DEFLATED:
                content = zlib.decompress(content, -zlib.MAX_WBITS, member.file_size)
            elif member.compress_type != zipfile.ZIP_STORED:
                raise DataError(place, "is packed in a way other than stored or deflated", "pack it again")
        except zlib.error as error:
            raise DataError(place, f"is damaged ({error})", "download or pack the archive again") from None
        if zlib.crc32(content) != member.CRC:
            raise DataError(place, "is damaged (wrong checksum)", "download or pack the archive again")
        return content


def _wrapper(names: Iterable[str]) -> str:
    """`photos/` for an archive whose whole content lies in a folder `photos`, else an empty string."""
    tops = {name.partition("/")[0] for name in names if not _ignored(name)}
    return f"{tops.pop()}/" if len(tops) == 1 and TRAIN not in tops else ""


def _ignored(name: str) -> bool:
    """True for what systems leave behind: .DS_Store, __MACOSX, Thumbs.db."""
    return any(part.startswith(".") or part in {"__MACOSX", "Thumbs.db"} for part in PurePosixPath(name).parts)


def decode(content: bytes, place: str, enough: int | None = None) -> Image.Image:
    """The RGB image of a file's bytes, upright by its EXIF orientation; transparency is dropped.

    With `enough`, a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size if no side gets shorter than that.
    Raises DataError, naming `place`.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            if enough is not None:
                image.draft(None, (enough, enough))
            image.load()
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16 bits of grey, which convert() would clip at 255
                upright = Image.fromarray((np.asarray(upright).clip(0, 65535) // 257).astype(np.uint8))
            elif upright.mode == "F":
                raise ValueError("floating-point pixels have no known range")
            elif upright.mode == "P" and "transparency" in upright.info:
                upright = upright.convert("RGBA")  # Pillow warns if it has to do this itself
            return upright.convert("RGB")
    except Exception as error:  # Pillow's decoders raise a dozen kinds: OSError, SyntaxError, struct.error ...
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise DataError(place, f"is no readable image ({reason})", "replace or remove it") from None


def pictures(tree: Tree) -> list[str]:
    """All files, sorted, without those that systems leave behind."""
    return sorted(name for name in tree.files if not _ignored(name))


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
    folders = (name.split("/") for name in tree.folders if not _ignored(name))
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
    """The images of a folder or zip archive, each hashed and, unless `checked` is the fingerprint, decoded.

    An image whose very bytes are in both splits is for evaluation only; a note says how many that were.
    Raises DataError for a missing folder, an empty class, classes that differ and files that are no images.
    """
    root = base / Path(settings.path).expanduser()
    tree = open_tree(root)
    parts = _parts(tree, root, settings, progress)
    classes = parts[0].classes
    files = [name for part in parts for name in part.files]

    hashes = inspect(tree, root, files, progress, decoding=checked is None)
    classes_N = np.array([classes.index(_class(name)) for name in files], np.int64)
    if settings.holdout is None:
        evaluation_N = np.arange(len(files)) >= len(parts[0].files)
    else:
        evaluation_N = holdout(hashes, classes_N, settings.holdout)
    held = {hashes[index] for index in np.flatnonzero(evaluation_N)}
    leaked_N = ~evaluation_N & np.array([value in held for value in hashes])
    train_N = ~evaluation_N & ~leaked_N
    if leaked_N.any():
        first = files[int(np.flatnonzero(leaked_N)[0])]
        progress.note(f"{leaked_N.sum()} training images left out that are in the evaluation too, such as {first}")
    left = set(classes_N[train_N].tolist())
    for label, name in enumerate(classes):
        if label not in left:
            raise DataError(f"{root}/{TRAIN}/{name}", "has no image left that is not for evaluation", "add some")

    lines = [f"{name}\t{value}\t{kept}" for name, value, kept in zip(files, hashes, evaluation_N, strict=True)]
    fingerprint = hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()
    if checked is not None and checked != fingerprint:
        inspect(tree, root, files, progress, decoding=True)

    def images(chosen_N: np.ndarray) -> Images:
        names = [files[index] for index in np.flatnonzero(chosen_N)]

        def read(index: int, enough: int | None) -> Image.Image:
            return decode(tree.read(names[index]), f"{root}/{names[index]}", enough)

        return Images(classes_N[chosen_N], read)

    return ImageData(
        labels=tuple(settings.names.get(name, name) for name in classes),
        preprocess=preprocess,
        fingerprint=fingerprint,
        train=images(train_N),
        evaluation=images(evaluation_N),
        augment=settings.augment,
        workers=settings.workers,
        held=frozenset(held),
    )


def open_tree(root: Path) -> Tree:
    if root.is_dir():
        return FolderTree(root)
    if root.is_file():
        return ZipTree(root)
    raise DataError(root, "no such folder or zip archive", f"a relative path starts at {Path.cwd()}")


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
            f"`{folder}` alone has {_few(names)}"
            for folder, names in ((TRAIN, ours - theirs), (settings.evaluation, theirs - ours))
            if names
        ]
        raise DataError(root, "the classes differ", " and ".join(only))
    return [train, evaluation]


def _few(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")


def inspect(tree: Tree, root: Path, files: Sequence[str], progress: Progress, *, decoding: bool) -> list[str]:
    """SHA-256 of every file; with `decoding`, a DataError for the first that is no readable image."""

    def look(name: str) -> str:
        content = tree.read(name)
        if decoding:
            decode(content, f"{root}/{name}")
        return hashlib.sha256(content).hexdigest()

    threads = min(8, os.cpu_count() or 1)
    hashes = []
    label = "checking images" if decoding else "hashing images"
    with progress.steps(label, len(files)) as advance, ThreadPoolExecutor(threads) as pool:
        try:
            for value in pool.map(look, files):
                hashes.append(value)
                advance("")
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return hashes
