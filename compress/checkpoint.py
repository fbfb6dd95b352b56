"""A network in a folder: `structure.json` says how to build it, `weights.safetensors` holds its state. No pickle."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialized

from compress.errors import ModelError
from compress.models import AnyModel, ModelSettings, build
from compress.models.rebuild import rebuild
from compress.models.weights import refuse_altered, seal
from compress.product import Network, Structure
from compress.quantization import Quantization, prepare
from compress.tensors import load_state
from compress.written import write_bytes, write_text

STRUCTURE, WEIGHTS = "structure.json", "weights.safetensors"


def save(network: Network, folder: Path) -> None:
    """Writes the two files; the folder is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    # Clones: safetensors refuses tensors that share memory, as tied weights do.
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in network.module.state_dict().items()}
    structure = network.structure.model_dump_json(indent=1) + "\n"
    write_bytes(folder / WEIGHTS, serialized(state, seal(state, structure)))
    write_text(folder / STRUCTURE, structure)


def load(folder: Path) -> Network:
    """The network as it was saved, built by its original factory and then cut to the blocks and channels it kept.

    Raises ModelError where the folder holds no network, weights that do not fit the structure, or either is not what
    was saved.
    """
    structure, settings, text = described(folder)
    module = build(settings, structure.num_classes, structure.preprocess.size, channels=structure.preprocess.channels)
    rebuild(module, structure)
    if structure.quantize is not None:
        quantization = Quantization.model_validate_json(json.dumps(structure.quantize))
        module = prepare(module, quantization, structure.preprocess)
    try:
        state = load_file(folder / WEIGHTS)
        refuse_altered(folder / WEIGHTS, state, text)
        load_state(module, state)
    except (OSError, SafetensorError, RuntimeError) as error:
        problem = f"does not fit the structure beside it ({_first_line(error)})"
        raise ModelError(folder / WEIGHTS, problem, "save the network again") from error
    return Network(module.eval(), structure)


def described(folder: Path) -> tuple[Structure, AnyModel, str]:
    """The structure of a saved network, what it is built by, and the text of the file. Raises ModelError."""
    try:
        text = (folder / STRUCTURE).read_text(encoding="utf-8")
        structure = Structure.model_validate_json(text)
    except FileNotFoundError as error:
        raise ModelError(
            folder, f"no {STRUCTURE} here", "name a folder such as runs/x/stages/01-train/network"
        ) from error
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise ModelError(
            folder / STRUCTURE, f"not readable ({_first_line(error)})", "save the network again"
        ) from error
    try:
        settings = TypeAdapter(ModelSettings).validate_json(json.dumps(structure.model))
    except ValidationError as error:
        raise ModelError(folder / STRUCTURE, "names no network we know", "save the network again") from error
    return structure, settings, text


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
