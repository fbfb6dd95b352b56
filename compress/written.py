"""Files that are replaced as one step: a reader finds the old content or the new, after a power cut as well.

A file's content is on the disk before its name points to it. Without that, many file systems keep the name and lose the
content: an empty file under a good name.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

from compress.shown import without_secrets

PIPE = "Is a pipe or a device and no file; remove it"


def read_text(path: Path) -> str:
    """The file's text. Raises OSError or ValueError where there is none; a pipe or a device is not waited for."""
    with open(path, encoding="utf-8", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, PIPE, str(path))
        return file.read()


def read_json(path: Path) -> dict[str, Any]:
    """The file's object; empty where there is none or it was cut short."""
    try:
        value = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def write_json(path: Path, value: Any) -> None:
    """Replaces the file as one step. Secrets of the environment become `***`."""
    write_text(path, json.dumps(without_secrets(value), indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replaces the file as one step. A name of a file that is no UTF-8 becomes `\\udcff`, as in JSON."""
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces the file as one step. Where that fails, as on a full disk, the old one is still there, and no other.

    Raises OSError, which names `path`.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _settle(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def refuse_pipes(folder: Path) -> None:
    """Raises OSError for the first thing in a folder that is neither file, folder nor link: reading could never end."""
    for inside, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(inside, name)
            with contextlib.suppress(FileNotFoundError):
                if not stat.S_ISREG(os.stat(path).st_mode):
                    raise OSError(errno.EINVAL, PIPE, path)


def put_in_place(partial: Path, place: Path) -> None:
    """Gives a finished folder its name; all that is in it is on the disk before, and what had the name goes then."""
    for folder, _, names in os.walk(partial):
        for name in names:
            _settle(Path(folder, name))
        _settle(Path(folder))
    shutil.rmtree(place, ignore_errors=True)
    partial.rename(place)
    _settle(place.parent)


def _settle(path: Path) -> None:
    """Waits until a file's content, or a folder's names, are on the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno != errno.EINVAL:  # what some file systems say of a folder
            raise
    finally:
        os.close(opened)
