"""What goes wrong with a machine while a run works, in one line each: memory, the disk, a run that was killed."""

from __future__ import annotations

import contextlib
import errno
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from compress import locks
from compress.errors import CompressError
from compress.product import Data
from compress.progress import Progress

NO_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|out of memory|bad[ _]alloc|failed to allocate memory"
    r"|cannot allocate memory|unable to mmap|ALLOC_FAILED",
    re.IGNORECASE,
)
"""What torch, oneDNN, CUDA, onnxruntime and the C++ library say where memory is short."""
FULL = (errno.ENOSPC, errno.EDQUOT)
UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)
GOES_ON = "the same command goes on from what is finished"
LOCK = "lock"


@contextlib.contextmanager
def own_folder(folder: Path, progress: Progress) -> Iterator[None]:
    """Keeps other runs from a run's folder, which is made; tells of a run that was killed in it.

    Raises HeldError at once where another run has the folder. A folder that is empty at the end goes again.
    """
    with told(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            problem = f"cannot be made ({error.strerror})"
            raise CompressError(folder, problem, "choose another folder with --out") from error
        with locks.held(
            folder / LOCK, place=folder, way_out="wait until it has ended, or choose another folder with --out"
        ) as before:
            if before is not None:
                progress.note(f"the last run here ({before}) {before.ended_by}; this one goes on with what it finished")
            yield
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextlib.contextmanager
def told(folder: Path, place: object = "", batch_sizes: Mapping[str, int] | None = None) -> Iterator[None]:
    """Raises what goes wrong with the machine as a CompressError; `place` is what was at work, else the folder.

    `batch_sizes` are the recipe's keys that decide how much memory it takes, with their values.
    """
    try:
        yield
    except CompressError:
        raise
    except (MemoryError, OSError, RuntimeError, SafetensorError, ValueError) as error:
        known = _out_of_memory(error, place or folder, batch_sizes or {}) or _of_disk(error, folder)
        if known is None:
            raise
        raise known from error


def diverged(metrics: Mapping[str, Any], score: float, before: float | None, data: Data) -> str:
    """A sentence on a training that left a network no better than a guess, or a worse one at a larger loss; or nothing.

    `before` is the score of the network that it began with.
    """
    losses: list[float] = []  # of the last of a stage's trainings
    for entry in reversed(metrics.get("history", [])):
        losses.insert(0, entry["loss"])
        if entry["epoch"] == 1:
            break
    if not losses:
        return ""
    grown = losses[-1] > 1.1 * losses[0]
    fell = before is not None and score < before - 0.05
    loss = f"the loss went from {losses[0]:.3g} to {losses[-1]:.3g}"
    if score <= _chance(data):
        return f"the score is {score:.3g}, no better than guessing; {loss}: try a lower lr, or more epochs"
    if grown and fell:
        return f"the score fell from {before:.3g} to {score:.3g} and {loss}: it diverged, try a lower lr"
    return ""


def _chance(data: Data) -> float:
    """A score that guessing hardly exceeds: three standard errors above that of one class for all images."""
    if data.task != "classification":
        return 0.0
    share, count = 1 / len(data.labels), max(1, data.count("evaluation"))
    return share + 3 * math.sqrt(share * (1 - share) / count)


def _out_of_memory(error: Exception, place: object, batch_sizes: Mapping[str, int]) -> CompressError | None:
    said = str(error)
    if not isinstance(error, MemoryError) and not (
        isinstance(error, RuntimeError) and (isinstance(error, torch.OutOfMemoryError) or NO_MEMORY.search(said))
    ):
        return None
    what = "out of GPU memory" if isinstance(error, torch.OutOfMemoryError) else "out of memory"
    smaller = {key: size for key, size in batch_sizes.items() if size > 1}
    if smaller:
        sizes = " and ".join(f"{key}={size}" for key, size in smaller.items())
        halves = " ".join(f"{key}={size // 2}" for key, size in smaller.items())
        return CompressError(place, f"{what} with {sizes}", f"try half: {halves}")
    return CompressError(place, what, "end other programs, or try a smaller preprocess.size or network")


def _of_disk(error: Exception, folder: Path) -> CompressError | None:
    number = getattr(error, "errno", None)
    if isinstance(error, SafetensorError) and (found := re.search(r"os error (\d+)", str(error))):
        number = int(found[1])
    name = getattr(error, "filename", None)
    place = str(name) if name else str(folder)
    if number in FULL or (isinstance(error, OSError) and number is None and _free(folder) < 1e6):
        # numpy says how many bytes it wrote, and no number.
        free = f"{_free(folder) / 1e6:.1f} MB are free"
        return CompressError(place, f"the disk is full ({free})", f"make room on it; {GOES_ON}")
    if number in UNWRITABLE and (name is None or Path(str(name)).absolute().is_relative_to(folder.absolute())):
        reason = getattr(error, "strerror", None) or error
        way_out = "make it writable, or choose another folder with --out"
        return CompressError(place, f"cannot be written ({reason})", way_out)
    if number == errno.EIO:
        return CompressError(place, "the disk does not answer as it should (input/output error)", "look at the disk")
    return None


def _free(folder: Path) -> float:
    """Bytes that may still be written near `folder`; inf where that is not known."""
    for near in (folder, *folder.absolute().parents):
        with contextlib.suppress(OSError):
            return float(shutil.disk_usage(near).free)
    return float("inf")
