"""Weights from a file into a network, without running any code that the file may hold."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from compress.errors import ModelError
from compress.models.grey import added_up
from compress.models.head import find_head, head_replaced
from compress.progress import Progress
from compress.tensors import load_state

SEAL = "compress"
"""The name of what a .safetensors file of ours says of itself."""
WRAPPERS = (
    *("state_dict", "model_state_dict", "model_state", "model", "network", "net"),
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema"),
)
"""Keys under which training scripts store the weights; averages of them are taken where nothing else is there."""
COMPILED = "_orig_mod."
"""What torch.compile puts before names."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pth or .pt file by name, on the CPU.

    Wrappers such as {"state_dict": ...} are taken off. Raises ModelError for a file that is missing, broken or holds
    anything but tensors.
    """
    if not path.is_file():
        raise ModelError(path, "no such file", f"a relative path starts at {Path.cwd()}")
    broken = ModelError(path, "is no whole weights file", "expected .safetensors or what torch.save writes")
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
            refuse_altered(path, content)
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
    content = content if isinstance(content, dict) else {}
    for _ in WRAPPERS:  # one in another; a pickle may hold itself
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), None)
        if inner is None:
            break
        content = inner
    content.pop("n_averaged", None)  # torch's AveragedModel counts there
    if not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(path, "holds no weights", "expected tensors by name, as in a state_dict")
    return content


def load_weights(module: nn.Module, path: Path, progress: Progress) -> None:
    """Fills `module` with the file's weights, in the module's own precision; see `fill`."""
    fill(module, read_weights(path), path, progress)


def fill(module: nn.Module, given: Mapping[str, Tensor], place: object, progress: Progress) -> None:
    """Fills `module` with weights by name.

    Prefixes that DataParallel, torch.compile and wrapping modules add to all names do not matter. If the head is for
    another number of classes, the network keeps its own and a note says so; so it does where weights for RGB images are
    added up for grey ones. Any other difference is a ModelError that counts and names what is missing, unexpected or of
    another shape.
    """
    wanted = module.state_dict()
    given = _named_alike(given, wanted)
    skipped = {name for name in wanted if name.endswith("num_batches_tracked")}
    notes = []
    if heads := _foreign_heads(given, wanted, module):
        left_out = [name for head in heads for name in (f"{head}.weight", f"{head}.bias") if name in wanted]
        classes = [state[f"{heads[-1]}.weight"].shape[0] for state in (given, wanted)]
        notes.append(f"{head_replaced(classes[0], classes[1])}; the file's {', '.join(left_out)} left out")
        skipped |= set(left_out)
        given = {name: tensor for name, tensor in given.items() if name not in left_out}
    if stem := _coloured_stem(given, wanted):
        given[stem] = added_up(given[stem])
        notes.append(f"{stem}: the weights of the three colours are added up for grey images")
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
        raise ModelError(place, f"does not fit the network: {'; '.join(filter(None, differences))}")
    load_state(module, given, strict=False)
    for note in notes:
        progress.note(note)


def _named_alike(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, without what stands before all of their names and not before those of the network."""
    renamed = {name.replace(COMPILED, ""): tensor for name, tensor in given.items()}
    while renamed and not renamed.keys() & wanted.keys():
        first = {name.partition(".")[0] for name in renamed}
        if len(first) > 1 or not all("." in name for name in renamed):
            break
        renamed = {name.partition(".")[2]: tensor for name, tensor in renamed.items()}
    if renamed.keys() & wanted.keys():
        return renamed
    inner = {name.partition(".")[0] for name in wanted}
    if len(inner) == 1:  # the network is the one that wraps
        (prefix,) = inner
        wrapped = {f"{prefix}.{name.replace(COMPILED, '')}": tensor for name, tensor in given.items()}
        if wrapped.keys() & wanted.keys():
            return wrapped
    return dict(given)


def _foreign_heads(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], module: nn.Module) -> list[str]:
    """The layers that give the classes, where the given ones differ in the number of classes alone."""
    found = find_head(module)
    if found is None:
        return []
    heads = []
    for name, layer in module.named_modules():
        key = f"{name}.weight"
        if not isinstance(layer, type(found[1])) or key not in given or key not in wanted:
            continue
        ours, theirs = wanted[key].shape, given[key].shape
        # One that was trained for distillation has two of them.
        if ours[0] == len(found[1].weight) and theirs[1:] == ours[1:] and theirs[0] != ours[0]:
            heads.append(name)
    return heads if found[0] in heads else []


def _coloured_stem(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """The convolution that reads three channels in the file and one in the network; nothing where there is none."""
    for name in given.keys() & wanted.keys():
        theirs, ours = given[name].shape, wanted[name].shape
        if len(ours) == 4 and ours[1] == 1 and theirs[1:2] == (3,) and (theirs[0], *theirs[2:]) == (ours[0], *ours[2:]):
            return name
    return ""


def _counted(names: Iterable[str], what: str) -> str:
    """`3 missing: a, b, c`, with the first few names; an empty string for none."""
    ordered = sorted(names)
    if not ordered:
        return ""
    more = ", ..." if len(ordered) > 3 else ""
    return f"{len(ordered)} {what}: {', '.join(ordered[:3])}{more}"


def state_sha256(state: Mapping[str, Tensor], before: str = "") -> str:
    """SHA-256, in hexadecimal, over a text and every name, type, shape and bit of a state."""
    found = hashlib.sha256(before.encode())
    for name, tensor in state.items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def seal(state: Mapping[str, Tensor], structure: str) -> dict[str, str]:
    """What a .safetensors file says of itself, so that it can be told from one that was altered.

    One entry: several are written in an order that changes from run to run.
    """
    hashes = {"state": state_sha256(dict(sorted(state.items()))), "structure": _text_sha256(structure)}
    return {SEAL: json.dumps(hashes)}


def refuse_altered(path: Path, state: Mapping[str, Tensor], structure: str | None = None) -> None:
    """Raises ModelError where a file that we have saved is no longer what it was; files of others say nothing."""
    with safe_open(path, "pt") as file:
        found = (file.metadata() or {}).get(SEAL)
    if found is None:
        return
    try:
        hashes = json.loads(found)
        whole = hashes["state"] == state_sha256(dict(sorted(state.items())))
        fits = structure is None or hashes["structure"] == _text_sha256(structure)
    except (ValueError, LookupError, TypeError):
        whole = fits = False
    if not whole:
        raise ModelError(path, "was altered after it was saved: it has another hash", "save or copy it again")
    if not fits:
        raise ModelError(path, "was saved with another structure than the one beside it", "save or copy both again")


def _text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
