"""Decoded images kept on disk, for photographs so large that to decode them costs more than to train on them.

    ~/.cache/compress/decoded/3f/3f2a...-438    an image of that SHA-256, decoded where 438 pixels a side are enough

Every program of the user shares the folder. A file is put there as one step and checked when it is read: one that is
cut or altered is decoded anew, and one that another program removes is as good as never made.
"""

from __future__ import annotations

import contextlib
import os
import struct
import tempfile
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

import PIL
from PIL import Image

FORMAT = 1
HEADER = struct.Struct("<4sIIII")
"""Magic, format, width, height, CRC-32 of the RGB pixels."""
MAGIC = b"CDEC"
KEPT = 0.8
"""The part of the bound that is left when old images are removed."""


def default_folder() -> Path:
    """The user's cache, as the XDG base directories have it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "compress" / "decoded"


class Decoded:
    """A folder of decoded images that together have at most `most_bytes`, give or take what other programs add."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder = folder / f"{FORMAT}-pillow{PIL.__version__}"  # another release may decode to other pixels
        self.most_bytes = most_bytes
        self.total = _shrunk(folder, most_bytes)
        self.lock = threading.Lock()

    def image(self, sha256: str, enough: int | None, decode: Callable[[], Image.Image]) -> Image.Image:
        """What `decode` returns for the content of that hash, from the folder if it is there."""
        path = self.folder / sha256[:2] / f"{sha256}-{enough or 'all'}"
        found = _read(path)
        if found is None:
            found = decode()
            self._write(path, found)
        return found

    def _write(self, path: Path, image: Image.Image) -> None:
        """Keeps the image, if there is room; a disk that refuses is no reason to stop a training."""
        pixels = image.tobytes()
        size = HEADER.size + len(pixels)
        with self.lock:
            if self.total + size > self.most_bytes:
                return
            self.total += size
        temporary = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
                temporary = file.name
                file.write(HEADER.pack(MAGIC, FORMAT, image.width, image.height, zlib.crc32(pixels)))
                file.write(pixels)
            os.replace(temporary, path)
        except OSError:
            if temporary is not None:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)


def _read(path: Path) -> Image.Image | None:
    """The image of a whole file; None where there is none."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if len(content) < HEADER.size:
        return None
    magic, version, width, height, check = HEADER.unpack_from(content)
    pixels = memoryview(content)[HEADER.size :]
    whole = magic == MAGIC and version == FORMAT and len(pixels) == width * height * 3 and zlib.crc32(pixels) == check
    return Image.frombytes("RGB", (width, height), pixels) if whole else None


def _shrunk(folder: Path, most_bytes: int) -> int:
    """Bytes below `folder`, after the oldest files were removed if they were more than `most_bytes`."""
    found = []
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                status = os.stat(os.path.join(place, name))
                found.append((status.st_mtime, status.st_size, os.path.join(place, name)))
    total = sum(size for _, size, _ in found)
    if total > most_bytes:
        for _, size, path in sorted(found):
            if total <= most_bytes * KEPT:
                break
            with contextlib.suppress(OSError):
                os.unlink(path)
            total -= size
    return total
