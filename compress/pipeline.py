"""Folds the recipe's stages over a product, and keeps a manifest of each in the run's folder.

    runs/<name>/recipe.yaml  run.json  report.html ...
    runs/<name>/stages/00-load/      the network as it came: manifest.json, network/
    runs/<name>/stages/01-train/     one folder per stage, complete or absent

A manifest's `key` hashes all that can change the stage's result: its settings, the stages before it, data, seed,
our code and the libraries. A stage whose key and files are still those of the manifest is not run again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from compress import __version__, checkpoint, measures
from compress import recipe as recipes
from compress.data import open_data
from compress.errors import CompressError, GateError
from compress.models import build, check, file_sha256, inputs, load_weights
from compress.product import Data, Network, Product, Progress, Run, Structure
from compress.recipe import Recipe
from compress.stages import StageSettings
from compress.stages.distill import Distillation
from compress.targets import target

PACKAGES = ("torch", "torch-pruning", "onnx", "onnxscript", "onnxruntime", "ai-edge-litert", "numpy", "pillow")
MANIFEST = "manifest.json"
TOGETHER = ("train", "distill", "quantize")
"""Stages that all processes of torchrun share; the others run in the first process alone."""


@dataclass(frozen=True)
class Outcome:
    """What a finished run leaves."""

    folder: Path
    ran: list[str]
    resumed: list[str]


def run_recipe(
    recipe: Recipe, folder: Path, progress: Progress, *, command: str, base: Path, device: torch.device | None = None
) -> Outcome:
    """Runs every stage that is not already in `folder`, in order.

    Relative paths of the recipe start at `base`. Raises CompressError; a stage that fails leaves no folder behind, and
    the stages before it stay. A stage whose verdict is FAIL is kept for the report, ends the run with a GateError, and
    runs again next time.
    """
    with _processes() as (rank, world_size):
        device = device or _device()
        quiet = progress if rank == 0 else Silent()
        _make(folder, rank)
        previous = _read_json(folder / "run.json")
        data = _in_first(
            rank,
            lambda: open_data(
                recipe.data, recipe.preprocess, recipe.seed, quiet, base, previous.get("data", {}).get("fingerprint")
            ),
        )
        began = time.perf_counter()
        notes = Notes(quiet)
        state = _State(recipe, folder, data, device, notes, rank, world_size, base)
        state.data = _preflight(state)
        facts = _facts(state, command)
        if rank == 0:
            write_json(folder / "run.json", facts)
            _write(folder / "recipe.yaml", recipes.dump(recipe))
        ran: list[str] = []
        resumed: list[str] = []
        for index, stage in enumerate((None, *recipe.stages)):
            label = f"{index:02d}-{stage.use if stage else 'load'}"
            (resumed if state.step(index, stage, label) else ran).append(label)
            if state.failed:
                break
        if rank == 0:
            _forget_other_stages(folder, [*ran, *resumed])
            facts |= {"finished": _now(), "seconds": time.perf_counter() - began, "stages": sorted([*ran, *resumed])}
            write_json(folder / "run.json", facts)
        if state.failed:
            raise GateError(*state.failed)
        return Outcome(folder, ran, resumed)


@dataclass
class Notes:
    """Passes notes on and keeps them for the manifest of the stage that runs."""

    shown: Progress
    kept: list[str] = field(default_factory=list)

    def steps(self, label: str, total: int) -> contextlib.AbstractContextManager[Callable[[str], None]]:
        return self.shown.steps(label, total)

    def note(self, text: str) -> None:
        self.kept.append(text)
        self.shown.note(text)


class Silent:
    """Progress that nobody sees: of torchrun's other processes, and in tests."""

    @contextlib.contextmanager
    def steps(self, label: str, total: int) -> Iterator[Callable[[str], None]]:
        yield lambda text: None

    def note(self, text: str) -> None:
        pass


@dataclass
class _State:
    """The fold in progress. The product is loaded from its folders only when a stage has to run on it."""

    recipe: Recipe
    folder: Path
    data: Data
    device: torch.device
    notes: Notes
    rank: int
    world_size: int
    base: Path
    key: str = ""
    product: Product | None = None
    refs: dict[str, Any] = field(default_factory=dict)
    """Where the product lies: folders of its networks, paths of its files, relative to the run's folder."""
    failed: tuple[str, str, str] | None = None

    def step(self, index: int, stage: StageSettings | None, label: str) -> bool:
        """Brings the fold past one stage; whether an earlier run's result served."""
        self.key = _hash([self.key, stage.model_dump(mode="json"), _teachers(stage)]) if stage else self._first_key()
        place = self.folder / "stages" / label
        manifest = _shared(self.rank, lambda: _valid_manifest(place, self.key))
        if manifest is not None:
            if self.rank == 0:
                write_json(place / MANIFEST, manifest | {"resumed": True})
                self.notes.shown.note(f"{label}: unchanged, taken from the run of {manifest['finished']}")
            self.refs, self.product = manifest["product"], None
            return True
        product = self.product
        if product is None and stage is not None:
            product = _load_product(self.folder, self.refs)
        self._run(index, stage, label, place, product)
        return False

    def _run(self, index: int, stage: StageSettings | None, label: str, place: Path, before: Product | None) -> None:
        partial = place.with_name(place.name + ".partial")
        together = stage is not None and stage.use in TOGETHER
        if self.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        _barrier()
        self.notes.kept.clear()
        began = time.perf_counter()
        try:
            if together or self.rank == 0:
                product = self._apply(index, stage, partial, before, together)
                if self.rank == 0:
                    self._save(index, stage, label, place, partial, before, product, began)
        except BaseException:
            if self.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        manifest = _shared(self.rank, lambda: _read_json(place / MANIFEST))
        self.refs = manifest["product"]
        # Every process goes on with what lies on disk: the same bytes, whatever its own rounding was.
        self.product = product if self.world_size == 1 else None
        if self.world_size == 1:
            self.product = replace(product, files=_files(self.folder, self.refs))
        if manifest["metrics"].get("verdict") == "FAIL":
            self.failed = (f"stage {label}", manifest["metrics"]["reason"], "see the report")

    def _apply(
        self, index: int, stage: StageSettings | None, folder: Path, before: Product | None, together: bool
    ) -> Product:
        if stage is None:
            return Product(_first_network(self.recipe, self.data, self.notes, self.base))
        assert before is not None
        run = Run(
            folder=folder,
            data=self.data,
            device=self.device,
            seed=(self.recipe.seed + 1000 * index) % 2**31,
            progress=self.notes,
            recipe_hash=recipes.recipe_hash(self.recipe),
            target=self.recipe.target,
            rank=self.rank if together else 0,
            world_size=self.world_size if together else 1,
        )
        torch.manual_seed(run.seed)
        try:
            return stage.apply(before, run)
        except torch.OutOfMemoryError as error:
            raise CompressError(f"stage {stage.use}", "out of GPU memory", "try a smaller batch_size") from error

    def _save(
        self,
        index: int,
        stage: StageSettings | None,
        label: str,
        place: Path,
        partial: Path,
        before: Product | None,
        product: Product,
        began: float,
    ) -> None:
        """Writes networks and manifest into `partial`, then puts it in its place as one step."""
        seconds = time.perf_counter() - began
        changed = before is None or product.network is not before.network
        known = {id(getattr(before, role)): self.refs[role] for role in _ROLES if getattr(before, role, None)}
        if changed:
            checkpoint.save(product.network, partial / "network")
            known[id(product.network)] = f"stages/{label}/network"
        manifest = {
            "stage": stage.use if stage else "load",
            "index": index,
            "folder": label,
            "key": self.key,
            "settings": stage.model_dump(mode="json") if stage else self.recipe.model.model_dump(mode="json"),
            "seconds": seconds,
            "finished": _now(),
            "resumed": False,
            "notes": list(self.notes.kept),
            "product": {role: known[id(n)] if (n := getattr(product, role)) else None for role in _ROLES}
            | {"files": {name: _relative(path, partial, label, self.folder) for name, path in product.files.items()}},
            "network": _describe(product.network, self.data, self.device, self.notes) if changed else None,
            "metrics": dict(product.metrics),
            "files": {
                path.relative_to(partial).as_posix(): {"sha256": file_sha256(path), "size_bytes": path.stat().st_size}
                for path in sorted(partial.rglob("*"))
                if path.is_file()
            },
        }
        write_json(partial / MANIFEST, manifest)
        shutil.rmtree(place, ignore_errors=True)
        partial.rename(place)

    def _first_key(self) -> str:
        return _hash(
            [
                self.recipe.model.model_dump(mode="json"),
                [file_sha256(path) for path in inputs(self.recipe.model, self.base)],
                self.recipe.data.model_dump(mode="json"),
                self.data.fingerprint,
                self.recipe.preprocess.model_dump(mode="json"),
                self.recipe.seed,
                self.recipe.target,
                _own_code(),
                _versions(),
                self.device.type,
            ]
        )


def _teachers(stage: StageSettings) -> list[str]:
    """Hashes of the files of a teacher that lies outside this run."""
    blocks = (block for block in (stage, getattr(stage, "distill", None)) if isinstance(block, Distillation))
    folders = [Path(block.teacher) for block in blocks if block.teacher != "parent"]
    return [file_sha256(path) for folder in folders for path in sorted(folder.glob("*")) if path.is_file()]


_T = TypeVar("_T")
_ROLES = ("network", "parent", "float_network")


def _first_network(recipe: Recipe, data: Data, progress: Progress, base: Path) -> Network:
    """The recipe's network with its weights, as the stages find it."""
    torch.manual_seed(recipe.seed)
    size = recipe.preprocess.size
    module = build(recipe.model, len(data.labels), size, progress)
    check(module, num_classes=len(data.labels), input_size=size, place=recipe.model.use)
    if recipe.model.weights:
        load_weights(module, base / recipe.model.weights, progress)
    structure = Structure(
        model=recipe.model.model_dump(mode="json"), num_classes=len(data.labels), preprocess=recipe.preprocess
    )
    return Network(module.eval(), structure)


def _preflight(state: _State) -> Data:
    """Asks every stage about the network before any of them trains: a refusal after an hour helps nobody.

    Returns the data in the memory order that the network can read.
    """
    recipe = state.recipe
    module = _first_network(recipe, state.data, Silent(), state.base).module
    for stage in recipe.stages:
        ask = getattr(stage, "check", None)
        if ask is not None:
            ask(module, recipe.preprocess)
    if _reads_channels_last(module, recipe.preprocess.size):
        return state.data
    state.notes.note("the network uses .view, so batches stay in NCHW order; .flatten or .reshape would train faster")
    return state.data.in_nchw()


def _reads_channels_last(module: torch.nn.Module, size: int) -> bool:
    images = torch.zeros(2, 3, size, size).to(memory_format=torch.channels_last)
    try:
        with torch.no_grad():
            module(images)
    except RuntimeError:  # in NCHW it has just answered `models.check`
        return False
    return True


def _describe(network: Network, data: Data, device: torch.device, progress: Progress) -> dict[str, Any]:
    """What the report says of a network after a stage; the accuracy is torch's, on the whole evaluation split."""
    module, size = network.module, network.structure.preprocess.size
    count, batch_size = data.count("evaluation"), 64
    steps = -(-count // batch_size)
    layers = measures.layers(module, size)
    with progress.steps("evaluate", steps) as advance:

        def batches() -> Iterator[Any]:
            for batch in data.batches("evaluation", batch_size=batch_size):
                yield batch
                advance("")

        accuracy = measures.accuracy(module, batches(), device)
    return {
        "accuracy": accuracy,
        "images": count,
        "params": measures.params(module)
        if network.structure.quantize is None
        else sum(layer["params"] for layer in layers),
        "macs": sum(layer["macs"] for layer in layers),
        "precision": "int8 (fake quant)" if network.structure.quantize is not None else "float32",
        "layers": layers,
    }


def _load_product(folder: Path, refs: dict[str, Any]) -> Product:
    loaded: dict[str, Network] = {}
    for role in _ROLES:
        where = refs[role]
        if where and where not in loaded:
            loaded[where] = checkpoint.load(folder / where)
    network, parent, float_network = (loaded[refs[role]] if refs[role] else None for role in _ROLES)
    assert network is not None
    return Product(network, parent, float_network, _files(folder, refs))


def _files(folder: Path, refs: dict[str, Any]) -> dict[str, Path]:
    return {name: folder / where for name, where in refs["files"].items()}


def _relative(path: Path, partial: Path, label: str, folder: Path) -> str:
    """Where a file will lie once its stage's folder has its final name."""
    if path.is_relative_to(partial):
        return f"stages/{label}/{path.relative_to(partial).as_posix()}"
    return path.relative_to(folder).as_posix()


def _valid_manifest(place: Path, key: str) -> dict[str, Any] | None:
    """The manifest, if it has this key, no failed verdict, and every file it lists is there unaltered."""
    manifest = _read_json(place / MANIFEST)
    if manifest.get("key") != key or manifest.get("metrics", {}).get("verdict") == "FAIL":
        return None
    for name, facts in manifest["files"].items():
        path = place / name
        if not path.is_file() or path.stat().st_size != facts["size_bytes"] or file_sha256(path) != facts["sha256"]:
            return None
    return manifest


def _forget_other_stages(folder: Path, labels: list[str]) -> None:
    """Removes folders of stages that this recipe no longer has, so that the report cannot pick them up."""
    for path in (folder / "stages").iterdir():
        if path.is_dir() and path.name not in labels:
            shutil.rmtree(path, ignore_errors=True)


def _facts(state: _State, command: str) -> dict[str, Any]:
    recipe, data = state.recipe, state.data
    return {
        "name": recipe.name,
        "command": command,
        "started": _now(),
        "finished": None,
        "seconds": None,
        "recipe_hash": recipes.recipe_hash(recipe),
        "compress": __version__,
        "versions": _versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": target("local").probe().get("cpu", "unavailable") if state.rank == 0 else "",
        "threads": torch.get_num_threads(),
        "processes": state.world_size,
        "device": str(state.device),
        "seed": recipe.seed,
        "data": {
            "use": recipe.data.use,
            "labels": list(data.labels),
            "train": data.count("train"),
            "evaluation": data.count("evaluation"),
            "fingerprint": data.fingerprint,
            "notes": list(state.notes.kept),
        },
        "preprocess": recipe.preprocess.model_dump(mode="json"),
        "model": recipe.model.model_dump(mode="json"),
        "stages": [],
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _own_code() -> str:
    """SHA-256 over our sources, without those that only show results."""
    root = Path(__file__).parent
    sources = [p for p in sorted(root.rglob("*.py")) if p.parent.name != "report" and p.name != "cli.py"]
    return _hash([[p.relative_to(root).as_posix(), file_sha256(p)] for p in sources])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_json(path: Path, value: Any) -> None:
    """Replaces the file as one step: a reader finds the old content or the new."""
    _write(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _read_json(path: Path) -> dict[str, Any]:
    """The file's object; empty where there is none or it was cut short."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _make(folder: Path, rank: int) -> None:
    if rank != 0:
        return
    try:
        (folder / "stages").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CompressError(folder, f"cannot be made ({error.strerror})", "choose another folder with --out") from error


# --- several processes, started by torchrun -----------------------------------------------------------------------


@contextlib.contextmanager
def _processes() -> Iterator[tuple[int, int]]:
    """(rank, world size); joins torchrun's processes where its environment variables are set."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield 0, 1
        return
    device = _device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield dist.get_rank(), world_size
    finally:
        dist.destroy_process_group()


def is_first_process() -> bool:
    """Whether this process is the one that writes and speaks; always so without torchrun."""
    return os.environ.get("RANK", "0") == "0"


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _in_first(rank: int, work: Callable[[], _T]) -> _T:
    """Lets the first process do `work` (checking every image, say) before the others repeat it."""
    if rank != 0:
        _barrier()
    result = work()
    if rank == 0:
        _barrier()
    return result


def _shared(rank: int, find: Callable[[], Any]) -> Any:
    """What the first process finds, in all of them."""
    if not dist.is_initialized():
        return find()
    box = [find() if rank == 0 else None]
    dist.broadcast_object_list(box)
    return box[0]
