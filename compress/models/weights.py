"""Weights from a file into a network, without running any code that the file may hold."""

from __future__ import annotations

import hashlib
import pickle
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from compress.errors import ModelError
from compress.models.head import find_head, head_replaced
from compress.progress import Progress

WRAPPERS = ("state_dict", "model", "model_state_dict")
"""Keys under which training scripts store the weights."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pth or .pt file by name, on the CPU.

    Wrappers such as {"state_dict": ...} and the prefix that DataParallel adds to names are taken off. Raises ModelError
    for a file that is missing, broken or holds anything but tensors.
    """
    if not path.is_file():
        raise ModelError(path, "no such file", f"a relative path starts at {Path.cwd()}")
    broken = ModelError(path, "is no whole weights file", "expected .safetensors or what torch.save writes")
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about pickle protocols, before the error that says what is wrong
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if re.search("[Uu]nsupported (global|class)|unrecognized function", str(error)) is None:
            raise broken from error
        raise ModelError(
            path,
            "holds Python objects, which could run code when loaded",
            "save the weights alone: torch.save(model.state_dict(), ...)",
        ) from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, OSError, LookupError) as error:
        raise broken from error
    for key in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ModelError(path, "holds no weights", "expected tensors by name, as in a state_dict")
    if all(name.startswith("module.") for name in content):
        content = {name.removeprefix("module."): tensor for name, tensor in content.items()}
    return content


def load_weights(module: nn.Module, path: Path, progress: Progress) -> None:
    """Fills `module` with the file's weights, in the module's own precision.

    If the file's head is for another number of classes, the network keeps its own and a note says so. Any other
    difference is a ModelError that counts and names what is missing, unexpected or of another shape.
    """
    given, wanted = read_weights(path), module.state_dict()
    note = _drop_foreign_head(given, module)
    skipped = {name for name in wanted if name.endswith("num_batches_tracked")}
    if note is not None:
        head = find_head(module)
        assert head is not None
        skipped |= {f"{head[0]}.weight", f"{head[0]}.bias"}
    common = given.keys() & wanted.keys()
    differences = [
        _counted(wanted.keys() - given.keys() - skipped, "missing"),
        _counted(given.keys() - wanted.keys(), "not in the network"),
        _counted(
            (
                f"{name} ({list(given[name].shape)} for {list(wanted[name].shape)})"
                for name in common
                if given[name].shape != wanted[name].shape
            ),
            "of another shape",
        ),
    ]
    if any(differences):
        raise ModelError(path, f"does not fit the network: {'; '.join(filter(None, differences))}")
    module.load_state_dict(given, strict=False)
    if note is not None:
        progress.note(note)


def _drop_foreign_head(given: dict[str, Tensor], module: nn.Module) -> str | None:
    """Takes a head that differs in its classes alone out of `given`; a sentence that says so, or None."""
    found = find_head(module)
    if found is None:
        return None
    name, head = found
    weight = given.get(f"{name}.weight")
    if weight is None or weight.ndim != 2 or weight.shape[1] != head.in_features:
        return None
    if weight.shape[0] == head.out_features:
        return None
    given.pop(f"{name}.weight")
    given.pop(f"{name}.bias", None)
    return head_replaced(weight.shape[0], head.out_features)


def _counted(names: Iterable[str], what: str) -> str:
    """`3 missing: a, b, c`, with the first few names; an empty string for none."""
    ordered = sorted(names)
    if not ordered:
        return ""
    more = ", ..." if len(ordered) > 3 else ""
    return f"{len(ordered)} {what}: {', '.join(ordered[:3])}{more}"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
