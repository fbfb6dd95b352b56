"""Files of images in a folder or in a zip archive, which is never unpacked."""

from __future__ import annotations

import mmap
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Protocol

from compress.errors import DataError

TRAIN = "train"
LARGEST = 2**30
"""Bytes of a file in an archive; more is no image, but an archive that was made to fill the memory."""


def open_tree(root: Path) -> Tree:
    """The files below a folder or in a zip archive. Raises DataError where there is neither."""
    if root.is_dir():
        return FolderTree(root)
    if root.is_file():
        return ZipTree(root)
    raise DataError(root, "no such folder or zip archive", f"a relative path starts at {Path.cwd()}")


def read_file(path: Path) -> bytes:
    """The file's bytes. Raises DataError."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe would wait for ever
            raise DataError(path, "is no regular file", "remove it")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise DataError(path, f"cannot be read ({getattr(error, 'strerror', None) or error})") from None


def pictures(tree: Tree) -> list[str]:
    """All files, sorted, without those that systems leave behind."""
    return sorted(name for name in tree.files if not ignored(name))


class Tree(Protocol):
    """Files by their relative path with `/`."""

    files: list[str]
    folders: set[str]

    def read(self, name: str) -> bytes:
        """Raises DataError if the file cannot be read whole."""
        ...


class FolderTree:
    """Also follows links to other folders. Raises DataError for one that leads back, and for what cannot be listed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: list[str] = []
        self.folders: set[str] = set()
        waiting = [(root, PurePosixPath("."), frozenset[tuple[int, int]]())]
        while waiting:
            folder, inside, above = waiting.pop()
            self.folders.add(str(inside))
            try:
                found = folder.stat()
                here = (found.st_dev, found.st_ino)
                if here in above:
                    raise DataError(folder, "is a link to a folder that it lies in", "remove the link")
                with os.scandir(folder) as entries:
                    for entry in entries:
                        if entry.is_dir():
                            waiting.append((Path(entry.path), inside / entry.name, above | {here}))
                        else:
                            self.files.append(str(inside / entry.name))
            except OSError as error:
                raise DataError(error.filename or folder, f"cannot be read ({error.strerror})") from None

    def read(self, name: str) -> bytes:
        return read_file(self.root / name)


class ZipTree:
    """Members are read from one memory map: `zipfile` itself lets only one thread read at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
            with path.open("rb") as file:
                self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error) as error:
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
            raise DataError(place, "is encrypted", "pack it again without a password")
        if member.file_size > LARGEST:
            raise DataError(place, f"is said to have {member.file_size} bytes, more than an image", "pack it again")
        # The local header repeats the name and may have extra fields of another length than the directory's.
        start = member.header_offset
        lengths = self.bytes[start + 26 : start + 30]
        start += 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
        content = self.bytes[start : start + member.compress_size]
        try:
            if member.compress_type == zipfile.ZIP_DEFLATED:
                # Never more than the directory says: a few kilobytes can inflate to a terabyte.
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, max(1, member.file_size))
            elif member.compress_type != zipfile.ZIP_STORED:
                raise DataError(place, "is packed in a way other than stored or deflated", "pack it again")
        except zlib.error as error:
            raise DataError(place, f"is damaged ({error})", "download or pack the archive again") from None
        if zlib.crc32(content) != member.CRC:
            raise DataError(place, "is damaged (wrong checksum)", "download or pack the archive again")
        return content


def _wrapper(names: Iterable[str]) -> str:
    """`photos/` for an archive whose whole content lies in a folder `photos`, else an empty string."""
    tops = {name.partition("/")[0] for name in names if not ignored(name)}
    return f"{tops.pop()}/" if len(tops) == 1 and TRAIN not in tops else ""


def ignored(name: str) -> bool:
    """True for what systems leave behind: .DS_Store, __MACOSX, Thumbs.db."""
    return any(part.startswith(".") or part in {"__MACOSX", "Thumbs.db"} for part in PurePosixPath(name).parts)
