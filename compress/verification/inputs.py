"""What the files are fed with: a split of the recipe, the user's images, or seeded synthetic ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from compress.data.decoding import decode
from compress.data.pixels import pixels
from compress.data.trees import Tree, open_tree
from compress.errors import DataError
from compress.formats.metadata import preprocess_of, task_said
from compress.product import Data, Preprocess
from compress.verification.ncnn_file import NcnnFile
from compress.verification.onnx_file import OnnxFile
from compress.verification.tflite_file import TFLiteFile

SYNTHETIC = 16
"""Images, where the user gives none."""
BATCH = 32
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
SPLITS = ("val", "test", "validation", "evaluation", "train")
"""Folders that hold class folders, the first that is there; others are class folders themselves."""

Batches = Iterable[tuple[np.ndarray, np.ndarray | None]]


@dataclass(frozen=True)
class Inputs:
    """Real-valued images, channels first if they have channels."""

    about: str
    """`40 images of the evaluation split`."""
    count: int
    batches: Callable[[], Batches]
    """Images (N, ...) and, where they are known, labels (N,); the same ones each time."""
    notes: tuple[str, ...] = ()
    synthetic: bool = False

    def pick(self, indices: Sequence[int]) -> np.ndarray:
        """The images at `indices`, in that order."""
        found: dict[int, np.ndarray] = {}
        seen = 0
        for images, _ in self.batches():
            for index in indices:
                if seen <= index < seen + len(images):
                    found[index] = images[index - seen]
            seen += len(images)
            if len(found) == len(set(indices)):
                break
        return np.ascontiguousarray(np.stack([found[index] for index in indices]))


def of_split(data: Data, limit: int | None = None) -> Inputs:
    """The evaluation split of a recipe's data, whole or `limit` images spread over its classes."""

    def batches() -> Batches:
        for batch in data.batches("evaluation", batch_size=BATCH, limit=limit):
            yield np.ascontiguousarray(batch.images_NCHW.numpy()), batch.labels_N.numpy()

    count = data.count("evaluation") if limit is None else min(limit, data.count("evaluation"))
    return Inputs(f"{count} images of the evaluation split", count, batches)


def for_files(
    files: Sequence[OnnxFile | TFLiteFile | NcnnFile], images: Path | None, limit: int | None, seed: int, outputs: int
) -> Inputs:
    """The user's images as the files want them, or synthetic ones. Raises DataError for images that do not fit."""
    shape = channels_first(files[0].model.input.shape[1:])
    if images is not None and images.suffix == ".npy":
        return _of_array(images, shape, limit)
    preprocess, note = _preprocess(files, shape)
    if images is None:
        return _synthetic(shape, preprocess, limit or SYNTHETIC, seed, note)
    if len(shape) != 3 or shape[0] not in (1, 3) or shape[1] != shape[2]:
        problem = f"the files want inputs of shape {shape}, no square RGB or grey images"
        raise DataError(images, problem, "give a .npy of them")
    return _of_folder(images, preprocess, limit, files[0].metadata, outputs, note)


def channels_first(shape: tuple[int, ...]) -> tuple[int, ...]:
    """HWC to CHW, where the last axis is the shortest."""
    if len(shape) == 3 and shape[2] < min(shape[:2]) and shape[0] not in (1, 3):
        return (shape[2], shape[0], shape[1])
    return shape


def _of_array(path: Path, shape: tuple[int, ...], limit: int | None) -> Inputs:
    try:
        array = np.load(path, allow_pickle=False, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(path, f"not a .npy file of images ({reason})", "save one float32 array (N, ...)") from error
    if not isinstance(array, np.ndarray):
        raise DataError(path, "not a .npy file of images but an archive", "save one float32 array (N, ...)")
    if array.ndim != len(shape) + 1 or not len(array) or array.dtype.kind not in "fiu":
        raise DataError(path, f"holds {array.dtype} {array.shape}, wanted real numbers (N, {_shown(shape)})")
    order: tuple[int, ...] = tuple(range(array.ndim))
    if array.shape[1:] != shape and array.ndim == 4 and (array.shape[3], *array.shape[1:3]) == shape:
        order = (0, 3, 1, 2)
    if tuple(array.shape[axis] for axis in order[1:]) != shape:
        raise DataError(path, f"holds images of shape {array.shape[1:]}", f"the files want {_shown(shape)}")
    count = len(array) if limit is None else min(limit, len(array))

    def batches() -> Batches:
        for start in range(0, count, BATCH):
            part = np.asarray(array[start : min(start + BATCH, count)], np.float32)
            yield np.ascontiguousarray(part.transpose(order)), None

    return Inputs(f"{count} images of {path.name}", count, batches)


def _of_folder(
    root: Path, preprocess: Preprocess, limit: int | None, metadata: dict[str, str], outputs: int, note: str
) -> Inputs:
    tree = open_tree(root)
    names, classes = _listing(tree)
    if not names:
        raise DataError(root, "has no images", f"known kinds are {', '.join(sorted(SUFFIXES))}")
    if limit is not None and limit < len(names):
        names = [names[index] for index in np.linspace(0, len(names) - 1, limit).round().astype(int).tolist()]
    labels, label_note = _labels(names, classes, metadata, outputs)

    def batches() -> Batches:
        for start in range(0, len(names), BATCH):
            chosen = names[start : start + BATCH]
            rows = [pixels(decode(tree.read(name), f"{root}/{name}"), preprocess) for name in chosen]
            images_NHWC = preprocess.normalize(np.stack(rows))
            own = None if labels is None else labels[start : start + BATCH]
            yield np.ascontiguousarray(images_NHWC.transpose(0, 3, 1, 2)), own

    notes = tuple(filter(None, (note, label_note)))
    return Inputs(f"{len(names)} images of {root.name}", len(names), batches, notes)


def _listing(tree: Tree) -> tuple[list[str], list[str]]:
    """The images, and the names of their classes; no classes where the images lie in no folders."""
    names = [name for name in sorted(tree.files) if Path(name).suffix.lower() in SUFFIXES and "__MACOSX" not in name]
    split = next((split for split in SPLITS if any(name.startswith(f"{split}/") for name in names)), "")
    if split:
        names = [name for name in names if name.startswith(f"{split}/")]
    depth = 1 if split else 0
    parts = [name.split("/") for name in names]
    if any(len(part) < depth + 2 for part in parts):
        return names, []
    return names, sorted({part[depth] for part in parts})


def _labels(
    names: Sequence[str], classes: Sequence[str], metadata: dict[str, str], outputs: int
) -> tuple[np.ndarray | None, str]:
    """int64 (N,), or None and why accuracy cannot be told."""
    if (task := task_said(metadata)) != "classification":
        return None, f"the files are for {task}, and folders do not say what is right there: no score is measured"
    if not classes:
        return None, "the images lie in no class folders, so no accuracy is measured"
    depth = 1 if names[0].split("/")[0] in SPLITS else 0
    try:
        known = json.loads(metadata.get("compress.labels", "[]"))
    except ValueError:
        known = []
    if set(classes) <= set(known):
        places = {name: known.index(name) for name in classes}
    elif len(classes) == outputs:
        places = {name: index for index, name in enumerate(classes)}
    else:
        return None, f"{len(classes)} class folders and {outputs} outputs: no accuracy is measured"
    guessed = "" if set(classes) <= set(known) else "class folders in alphabetical order are taken for the outputs"
    return np.array([places[name.split("/")[depth]] for name in names], np.int64), guessed


def _preprocess(files: Sequence[OnnxFile | TFLiteFile | NcnnFile], shape: tuple[int, ...]) -> tuple[Preprocess, str]:
    """From pixels to real numbers: as the files say, else over the range of an input grid, else 0 to 1."""
    size = shape[-1] if len(shape) == 3 and shape[1] == shape[2] and shape[1] >= 8 else 8
    for file in files:
        if (said := preprocess_of(file.metadata)) is not None:
            return said, ""
    grid = next((file.input_grid for file in files if file.input_grid is not None), None)
    low, high, why = (0.0, 1.0, "as no file says") if grid is None else (grid.low, grid.high, "the input grid's range")
    span = high - low
    mean, std = -low / span, 1 / span
    channels: Literal[1, 3] = 1 if shape[0] == 1 else 3
    preprocess = Preprocess(size=size, channels=channels, mean=(mean,) * channels, std=(std,) * channels, crop=1.0)
    return preprocess, f"inputs lie between {low:g} and {high:g}: {why}"


def _synthetic(shape: tuple[int, ...], preprocess: Preprocess, count: int, seed: int, note: str) -> Inputs:
    """Noise of several grains, so that flat areas and edges both occur; uniform noise where there is no image."""
    means, stds = np.asarray(preprocess.mean), np.asarray(preprocess.std)
    low, high = float(((0 - means) / stds).min()), float(((1 - means) / stds).max())

    def images() -> Iterator[np.ndarray]:
        rng = np.random.default_rng(seed)
        for _ in range(count):
            image = rng.random(shape)
            for grain in (4, 16) if len(shape) == 3 else ():
                coarse = rng.random((shape[0], -(-shape[1] // grain), -(-shape[2] // grain)))
                blocks = coarse.repeat(grain, 1).repeat(grain, 2)[:, : shape[1], : shape[2]]
                image = blocks + (image - 0.5) * 0.3
            yield (low + (high - low) * image.clip(0, 1)).astype(np.float32)

    def batches() -> Batches:
        rows: list[np.ndarray] = []
        for image in images():
            rows.append(image)
            if len(rows) == BATCH:
                yield np.stack(rows), None
                rows = []
        if rows:
            yield np.stack(rows), None

    notes = (
        "no images given: synthetic ones test the arithmetic; accuracy, agreement and SQNR on photographs differ",
        note,
    )
    about = f"{count} synthetic images, seed {seed}"
    return Inputs(about, count, batches, tuple(filter(None, notes)), synthetic=True)


def _shown(shape: Sequence[int]) -> str:
    return ", ".join(map(str, shape))
