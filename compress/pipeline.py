"""Folds the recipe's stages over a product, and keeps a manifest of each in the run's folder.

    runs/<name>/recipe.yaml  run.json  report.html ...
    runs/<name>/stages/00-load/      the network as it came: manifest.json, network/
    runs/<name>/stages/01-train/     one folder per stage, complete or absent
    runs/<name>/stages/02-distill.training/   what the trainings of a stage that is not complete have reached
    runs/<name>/controls/no_distillation/   another such folder: the run without teachers, if the recipe asks for it

A manifest's `key` hashes all that can change the stage's result: its settings, what the stages before it made, data,
seed, our code and the libraries. A stage whose key and files are still those of its manifest is not run again.
"""

from __future__ import annotations

import contextlib
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from compress import __version__, checkpoint, manifest, measures, processes
from compress import recipe as recipes
from compress.data import open_data
from compress.data.unlabeled import fingerprint_of, with_unlabeled
from compress.epochs import Epochs, forget_epochs, prepare_epochs
from compress.errors import CompressError, GateError
from compress.formats.onnx import int8_onnx
from compress.formats.tflite import to_tflite
from compress.models import build, check, file_sha256, inputs, load_weights
from compress.product import Data, Network, Product, Run, Structure
from compress.progress import Progress, Silent
from compress.quantization import freeze, prepare
from compress.quantization.precision import precision
from compress.recipe import Recipe
from compress.recipe.control import NO_DISTILLATION, without_distillation
from compress.stages import StageSettings
from compress.stages.benchmark import MEASURING
from compress.stages.export import Export
from compress.stages.quantize import Quantize
from compress.targets import asking, open_target
from compress.teachers.teacher import refuse_other_task
from compress.teaching import Distillation
from compress.written import read_json, write_json, write_text

TOGETHER = ("train", "distill", "quantize")
"""Stages that all processes of torchrun share; the others run in the first process alone."""
TRAINING = (*TOGETHER, "prune")
OF_FILES = ("export", "verify", "benchmark")
"""Stages whose results depend on the versions of exporters and runtimes."""
ROLES = ("network", "parent", "float_network")
"""The networks of a product."""


@dataclass(frozen=True)
class Outcome:
    """What a finished run leaves."""

    folder: Path
    ran: list[str]
    resumed: list[str]
    control: Outcome | None = None
    """The same without distillation, where the recipe asks for it."""


def run_recipe(
    recipe: Recipe,
    folder: Path,
    progress: Progress,
    *,
    command: str,
    base: Path,
    device: torch.device | None = None,
    setup: bool = False,
) -> Outcome:
    """Runs every stage that is not already in `folder`, in order.

    Relative paths of the recipe start at `base`; `setup` allows an environment of ours on a board.
    Raises CompressError; a stage that fails leaves no result behind, the stages before it stay, and its trainings go on
    from their last epoch next time. A stage whose verdict is FAIL is kept for the report, ends the run with a
    GateError, and runs again next time. A control that cannot be finished is a GateError as well: the run itself is
    complete.
    """
    with processes.joined() as (rank, world_size):
        notes = Notes(progress if rank == 0 else Silent())
        fold = _Fold(
            recipe=recipe,
            folder=folder,
            data=_open(recipe, folder, notes, base),
            device=device or processes.own_device(),
            notes=notes,
            rank=rank,
            world_size=world_size,
            base=base,
            setup=setup,
        )
        fold.ask_network()
        outcome = _run_stages(fold, command)
        if fold.failed:
            raise GateError(*fold.failed)
        if recipe.report.ablate_distillation:
            outcome = replace(outcome, control=_without_distillation(fold, command))
        return outcome


def _run_stages(fold: _Fold, command: str) -> Outcome:
    """Takes the product past every stage; the fold knows whether one of them failed."""
    folder, recipe = fold.folder, fold.recipe
    processes.shared(lambda: _make(folder))
    facts = _facts(fold, command)
    fold.record(facts)
    processes.shared(lambda: write_text(folder / "recipe.yaml", recipes.dump(recipe)))
    ran: list[str] = []
    resumed: list[str] = []
    for index, stage in enumerate((None, *recipe.stages)):
        label = f"{fold.number(index):02d}-{stage.use if stage else 'load'}"
        (resumed if fold.step(index, stage, label) else ran).append(label)
        fold.record(facts | {"stages": sorted([*ran, *resumed])})
        if fold.failed:
            break
    # A control is named only now: the one in the folder may be of another recipe until it has been gone through again.
    controls = [NO_DISTILLATION] if recipe.report.ablate_distillation and not fold.failed else []
    ended = {"finished": _now(), "seconds": fold.seconds, "stages": sorted([*ran, *resumed]), "controls": controls}
    facts |= ended
    fold.record(facts)
    processes.shared(lambda: manifest.forget_others(folder / "stages", facts["stages"]))
    if not fold.failed:  # nothing is left to go on with
        processes.shared(lambda: shutil.rmtree(folder / MEASURING, ignore_errors=True))
    return Outcome(folder, ran, resumed)


def _without_distillation(run: _Fold, command: str) -> Outcome:
    """The same recipe without teachers, in a folder of its own. What does not differ is copied from the run's."""
    control = without_distillation(run.recipe)
    fold = _Fold(
        recipe=control.recipe,
        folder=run.folder / "controls" / NO_DISTILLATION,
        data=run.data,
        device=run.device,
        notes=Notes(Prefixed("control: ", run.notes.shown)),
        rank=run.rank,
        world_size=run.world_size,
        base=run.base,
        setup=run.setup,
        machine=run.machine,
        code=run.code,
        numbers=(0, *control.numbers),
        twin=run.folder,
        asked=True,
    )
    try:
        outcome = _run_stages(fold, command)
    except CompressError as error:
        raise GateError(f"control {NO_DISTILLATION}: {error.place}", error.problem, error.way_out) from error
    if fold.failed:  # of files that nobody ships: the run's own passed
        fold.notes.note(": ".join(fold.failed[:2]))
    return outcome


def open_run(folder: Path, progress: Progress, base: Path) -> tuple[Recipe, Product, Data]:
    """Recipe, last product and data of a run's folder. Raises CompressError where nothing was exported."""
    facts = read_json(folder / "run.json")
    places = (folder / "stages" / name / manifest.NAME for name in sorted(facts.get("stages", [])))
    finished = [found for place in places if (found := read_json(place))]
    if not finished:
        raise CompressError(folder, "not a run with a finished stage", "give the folder that `compress run` wrote")
    refs = finished[-1]["product"]
    if not refs["files"]:
        raise CompressError(folder, "has no exported files", "add `export` to the recipe's stages")
    loaded = recipes.load(folder / "recipe.yaml", [])
    data = open_data(loaded.data, loaded.preprocess, progress, base, facts["data"]["fingerprint"])
    return loaded, _load_product(folder, refs), data


@dataclass
class Notes:
    """Passes notes on and keeps them for the manifest of the stage that runs."""

    shown: Progress
    kept: list[str] = field(default_factory=list)

    def steps(self, label: str, total: int) -> contextlib.AbstractContextManager[Callable[[str], None]]:
        return self.shown.steps(label, total)

    def note(self, text: str) -> None:
        if text in self.kept:  # of another generation, peer or assistant
            return
        self.kept.append(text)
        self.shown.note(text)


@dataclass(frozen=True)
class Prefixed:
    """Progress whose labels and notes begin with a word."""

    prefix: str
    shown: Progress

    def steps(self, label: str, total: int) -> contextlib.AbstractContextManager[Callable[[str], None]]:
        return self.shown.steps(self.prefix + label, total)

    def note(self, text: str) -> None:
        self.shown.note(self.prefix + text)


@dataclass
class _Fold:
    """The fold in progress. The product is loaded from its folders only when a stage has to run on it."""

    recipe: Recipe
    folder: Path
    data: Data
    device: torch.device
    notes: Notes
    rank: int
    world_size: int
    base: Path
    setup: bool = False
    machine: str = ""
    """The CPU that measures, once it has been asked."""
    key: str = ""
    made: dict[str, Any] = field(default_factory=dict)
    """Files of the stage before, by hash: they enter the next key, so that no stage outlives its input."""
    product: Product | None = None
    refs: dict[str, Any] = field(default_factory=dict)
    """Where the product lies: folders of its networks, paths of its files, relative to the run's folder."""
    asked: bool = False
    seconds: float = 0.0
    """Of all stages so far, those of earlier runs included."""
    failed: tuple[str, str, str] | None = None
    code: str = field(default_factory=manifest.own_code)
    numbers: tuple[int, ...] = ()
    """Of the stages, where they are not their places: a control keeps those of its run, and so seeds and folders."""
    twin: Path | None = None
    """A run's folder whose stages of the same key are taken over."""

    def number(self, index: int) -> int:
        """What the stage at `index` goes by; 0 is the network as it came."""
        return self.numbers[index] if self.numbers else index

    def record(self, facts: dict[str, Any]) -> None:
        if self.rank == 0:
            write_json(self.folder / "run.json", facts)

    def step(self, index: int, stage: StageSettings | None, label: str) -> bool:
        """Brings the fold past one stage; whether an earlier run's result served."""
        place = self.folder / "stages" / label
        self.key = self._stage_key(stage) if stage else self._first_key()
        if self.twin is not None:
            source = self.twin / "stages" / label
            processes.shared(lambda: _take(source, place, self.key))
        found = processes.shared(lambda: manifest.valid(place, self.key))
        resumed = found is not None
        if found is not None:
            if self.rank == 0:
                write_json(place / manifest.NAME, found | {"resumed": True})
                self.notes.shown.note(f"{label}: unchanged, taken from the run of {found['finished']}")
            self.product = None
        else:
            self._ask_all()
            if self.product is None and stage is not None:
                self.product = _load_product(self.folder, self.refs)
            found = self._run(index, stage, label, place)
        self.refs, self.made = found["product"], found["files"]
        self.seconds += found["seconds"]
        if found["metrics"].get("verdict") == "FAIL":
            self.failed = (f"stage {label}", found["metrics"]["reason"], "see the report")
        return resumed

    def _run(self, index: int, stage: StageSettings | None, label: str, place: Path) -> dict[str, Any]:
        """Runs a stage in a folder of its own that gets its name when it is complete; its manifest."""
        partial, before = place.with_name(place.name + ".partial"), self.product
        training = place.with_name(place.name + ".training")
        together = stage is not None and stage.use in TOGETHER
        self.notes.kept.clear()
        began = time.perf_counter()
        made: list[Product] = []

        def work() -> None:
            made.append(self._apply(index, stage, label, partial, before, together, Epochs(training)))

        def save() -> dict[str, Any]:
            if not together:
                work()
            return self._save(index, stage, label, place, partial, before, made[0], time.perf_counter() - began)

        try:
            processes.shared(lambda: _empty(partial))
            if stage is not None and stage.use in TRAINING:
                processes.shared(lambda: prepare_epochs(training, self.key))
            if together:
                work()
            found = processes.shared(save)
        except BaseException:
            if self.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
                forget_epochs(training, kept=True)
            raise
        if self.rank == 0:
            forget_epochs(training)
        # Several processes go on with what lies on disk: the same bytes, whatever the rounding of each was.
        alone = self.world_size == 1
        self.product = replace(made[0], files=_files(self.folder, found["product"])) if alone else None
        return found

    def _apply(
        self,
        index: int,
        stage: StageSettings | None,
        label: str,
        folder: Path,
        before: Product | None,
        together: bool,
        epochs: Epochs,
    ) -> Product:
        if stage is None:
            return Product(_first_network(self.recipe, self.data, self.notes, self.base))
        assert before is not None
        run = Run(
            folder=folder,
            data=self.data,
            device=self.device,
            seed=self._seed(index),
            progress=self.notes,
            recipe_hash=self._recipe_hash(index),
            stage=label,
            target=self.recipe.target,
            setup=self.setup,
            rank=self.rank if together else 0,
            world_size=self.world_size if together else 1,
            epochs=epochs,
        )
        torch.manual_seed(run.seed)
        try:
            return stage.apply(before, run)
        except torch.OutOfMemoryError as error:
            raise CompressError(f"stage {label}", "out of GPU memory", "try a smaller batch_size") from error

    def _save(
        self,
        index: int,
        stage: StageSettings | None,
        label: str,
        place: Path,
        partial: Path,
        before: Product | None,
        product: Product,
        seconds: float,
    ) -> dict[str, Any]:
        """Writes network and manifest into `partial`, then puts it in its place as one step; the manifest."""
        changed = before is None or product.network is not before.network
        known = {id(getattr(before, role)): self.refs[role] for role in ROLES if getattr(before, role, None)}
        if changed:
            checkpoint.save(product.network, partial / "network")
            known[id(product.network)] = f"stages/{label}/network"
        networks = {role: known[id(network)] if (network := getattr(product, role)) else None for role in ROLES}
        files = {name: _relative(path, partial, label, self.folder) for name, path in product.files.items()}
        facts = {
            "stage": stage.use if stage else "load",
            "index": self.number(index),
            "folder": label,
            "key": self.key,
            "recipe_hash": self._recipe_hash(index),
            "seed": self._seed(index),
            "settings": stage.model_dump(mode="json") if stage else self.recipe.model.model_dump(mode="json"),
            "seconds": seconds,
            "finished": _now(),
            "resumed": False,
            "product": {**networks, "files": files, "layer_losses": dict(product.layer_losses)},
            "network": _describe(product.network, self.data, self.device, self.notes) if changed else None,
            "metrics": dict(product.metrics),
            "notes": list(self.notes.kept),
            "files": manifest.files_below(partial),
        }
        write_json(partial / manifest.NAME, facts)
        shutil.rmtree(place, ignore_errors=True)
        partial.rename(place)
        return facts

    def _seed(self, index: int) -> int:
        return (self.recipe.seed + 1000 * self.number(index)) % 2**31

    def _recipe_hash(self, index: int) -> str:
        """Of the recipe up to this stage: files do not change with what is done to them later."""
        stages = self.recipe.stages[: max(1, index)]
        return recipes.recipe_hash(self.recipe.model_copy(update={"stages": stages}))

    def _first_key(self) -> str:
        recipe = self.recipe
        return manifest.key(
            recipe.model.model_dump(mode="json"),
            [file_sha256(path) for path in inputs(recipe.model, self.base)],
            recipe.data.model_dump(mode="json", exclude={"path", "workers"}),  # the fingerprint knows the content
            self.data.fingerprint,
            recipe.preprocess.model_dump(mode="json"),
            recipe.seed,
            self.code,
            manifest.versions(manifest.TRAINING_PACKAGES),
            self.device.type,
        )

    def _stage_key(self, stage: StageSettings) -> str:
        machine: list[Any] = []
        if stage.use in OF_FILES:
            machine.append(manifest.versions(manifest.FILE_PACKAGES))
        if stage.use == "benchmark":
            machine += [self.recipe.target, processes.shared(self._measured_by)]
        lessons = processes.shared(lambda: _lessons(stage, self.base, self.notes.shown))
        return manifest.key(self.key, self.made, stage.model_dump(mode="json"), lessons, machine)

    def ask_network(self) -> None:
        """Builds the network once, so that what is wrong with it is said before anything else happens."""
        module = _first_network(self.recipe, self.data, Silent(), self.base).module
        if not _reads_channels_last(module, self.recipe.preprocess.size):
            self.notes.note("the network uses .view, so batches stay in NCHW; .flatten or .reshape would train faster")
            self.data = self.data.in_nchw()

    def _ask_all(self) -> None:
        """Asks every stage about the network before any of them trains: a refusal after an hour helps nobody."""
        if self.asked:
            return
        self.asked = True

        def ask() -> None:
            module = _first_network(self.recipe, self.data, Silent(), self.base).module
            for stage in self.recipe.stages:
                for teacher in _outside_teachers(stage):
                    refuse_other_task(checkpoint.load(self.base / teacher), self.data, teacher)
                for block in _blocks(stage):
                    if block.unlabeled is not None:
                        with_unlabeled(self.data, block.unlabeled, self.notes.shown, self.base)
                if (check_stage := getattr(stage, "check", None)) is not None:
                    check_stage(module, self.recipe.preprocess)
            _write_int8(self.recipe, module)
            if any(stage.use == "benchmark" for stage in self.recipe.stages):
                self._measured_by()

        processes.shared(ask)

    def _measured_by(self) -> str:
        """The CPU that measures, asked once: a board that cannot be reached is found out before hours of training."""
        if not self.machine:
            self.machine = _cpu(self.recipe.target, self.notes.shown, self.setup)
        return self.machine


def _write_int8(recipe: Recipe, module: torch.nn.Module) -> None:
    """Writes the int8 files of the untrained network: ModelError for an operator that only they do not have."""
    quantize: Quantize | None = None
    for stage in recipe.stages:
        if isinstance(stage, Quantize):
            quantize = stage
        elif isinstance(stage, Export) and quantize and not quantize.simulated and "int8" in (stage.kinds or ("int8",)):
            frozen = freeze(prepare(module, quantize.quantization(), recipe.preprocess))
            model = int8_onnx(frozen, recipe.preprocess.size, {})
            if "tflite" in stage.formats:
                to_tflite(model, {})


def _open(recipe: Recipe, folder: Path, notes: Notes, base: Path) -> Data:
    """The data; the first process looks at every image, the others believe it."""
    opened: list[Data] = []

    def first() -> str:
        checked = read_json(folder / "run.json").get("data", {}).get("fingerprint")
        opened.append(open_data(recipe.data, recipe.preprocess, notes, base, checked))
        return opened[0].fingerprint

    fingerprint = processes.shared(first)
    return opened[0] if opened else open_data(recipe.data, recipe.preprocess, notes, base, fingerprint)


def _first_network(recipe: Recipe, data: Data, progress: Progress, base: Path) -> Network:
    """The recipe's network with its weights, as the stages find it."""
    torch.manual_seed(recipe.seed)
    size = recipe.preprocess.size
    module = build(recipe.model, len(data.labels), size, progress)
    check(module, num_classes=len(data.labels), input_size=size, place=recipe.model.use)
    if recipe.model.weights:
        load_weights(module, base / Path(recipe.model.weights).expanduser(), progress)
    structure = Structure(
        model=recipe.model.model_dump(mode="json"), num_classes=len(data.labels), preprocess=recipe.preprocess
    )
    return Network(module.eval(), structure)


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
    layers = measures.layers(module, size)
    with progress.steps("evaluate", -(-count // batch_size)) as advance:

        def batches() -> Iterator[Any]:
            for batch in data.batches("evaluation", batch_size=batch_size):
                yield batch
                advance("")

        accuracy = measures.accuracy(module, batches(), device)
    quantized = network.structure.quantize is not None
    return {
        "accuracy": accuracy,
        "images": count,
        "params": sum(layer["params"] for layer in layers) if quantized else measures.params(module),
        "macs": sum(layer["macs"] for layer in layers),
        "precision": precision(network),
        "layers": layers,
    }


def _load_product(folder: Path, refs: dict[str, Any]) -> Product:
    loaded: dict[str, Network] = {}
    for role in ROLES:
        where = refs[role]
        if where and where not in loaded:
            loaded[where] = checkpoint.load(folder / where)
    network, parent, float_network = (loaded[refs[role]] if refs[role] else None for role in ROLES)
    assert network is not None
    return Product(network, parent, float_network, _files(folder, refs), refs["layer_losses"])


def _files(folder: Path, refs: dict[str, Any]) -> dict[str, Path]:
    return {name: folder / where for name, where in refs["files"].items()}


def _relative(path: Path, partial: Path, label: str, folder: Path) -> str:
    """Where a file will lie once its stage's folder has its final name."""
    if path.is_relative_to(partial):
        return f"stages/{label}/{path.relative_to(partial).as_posix()}"
    return path.relative_to(folder).as_posix()


def _blocks(stage: StageSettings) -> list[Distillation]:
    return [block for block in (stage, getattr(stage, "distill", None)) if isinstance(block, Distillation)]


def _outside_teachers(stage: StageSettings) -> list[str]:
    return [folder for block in _blocks(stage) for folder in block.teacher.folders()]


def _lessons(stage: StageSettings, base: Path, progress: Progress) -> list[str]:
    """Hashes of what a stage is taught with and that lies outside this run: saved teachers, images without labels."""
    folders = [base / teacher for teacher in _outside_teachers(stage)]
    files = [path for folder in folders for path in sorted(folder.glob("*")) if path.is_file()]
    more = [block.unlabeled for block in _blocks(stage) if block.unlabeled is not None]
    return [*map(file_sha256, files), *(fingerprint_of(unlabeled, progress, base) for unlabeled in more)]


def _facts(fold: _Fold, command: str) -> dict[str, Any]:
    recipe, data = fold.recipe, fold.data
    return {
        "name": recipe.name,
        "command": command,
        "started": _now(),
        "finished": None,
        "seconds": None,
        "recipe_hash": recipes.recipe_hash(recipe),
        "compress": __version__,
        "versions": manifest.versions((*manifest.TRAINING_PACKAGES, *manifest.FILE_PACKAGES)),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu("local", Silent()) if fold.rank == 0 else "",
        "threads": torch.get_num_threads(),
        "processes": fold.world_size,
        "device": str(fold.device),
        "seed": recipe.seed,
        "data": {
            "use": recipe.data.use,
            "labels": list(data.labels),
            "train": data.count("train"),
            "evaluation": data.count("evaluation"),
            "fingerprint": data.fingerprint,
            "notes": list(fold.notes.kept),
        },
        "preprocess": recipe.preprocess.model_dump(mode="json"),
        "model": recipe.model.model_dump(mode="json"),
        "stages": [],
        "controls": [],
    }


def _cpu(name: str, progress: Progress, setup: bool = False) -> str:
    """What tells the machine that measures from others."""
    with open_target(name, progress, setup=setup) as machine:
        return str(asking.probe(machine).get("cpu", "unavailable"))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _make(folder: Path) -> None:
    try:
        (folder / "stages").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CompressError(folder, f"cannot be made ({error.strerror})", "choose another folder with --out") from error


def _take(source: Path, place: Path, key: str) -> None:
    """Copies a finished stage of that key to `place`, unless it lies there already."""
    if manifest.valid(place, key) is None and manifest.valid(source, key) is not None:
        partial = place.with_name(place.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial)
        shutil.rmtree(place, ignore_errors=True)
        partial.rename(place)


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
