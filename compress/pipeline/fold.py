"""The fold over the stages: which of them serve again, and how one that runs gets its folder."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from compress import checkpoint, manifest, processes
from compress import recipe as recipes
from compress.data.samples import write_samples
from compress.data.unlabeled import fingerprint_of, with_unlabeled
from compress.epochs import Epochs, forget_epochs, prepare_epochs
from compress.models import file_sha256, inputs, packages
from compress.pipeline.facts import describe, measured_by, now, results
from compress.pipeline.faults import diverged, told
from compress.pipeline.notes import Notes, Prefixed
from compress.pipeline.preflight import (
    blocks,
    first_network,
    outside_teachers,
    reads_channels_last,
    refuse_unsuited,
    write_int8,
)
from compress.pipeline.store import put, shelved, take
from compress.product import Data, Network, Product, Run
from compress.progress import Progress, Silent
from compress.pruning import TimeGoal
from compress.recipe import Recipe
from compress.recipe.control import Control
from compress.stages import StageSettings
from compress.teachers.teacher import refuse_other_task
from compress.teaching.cache import refuse_unusable
from compress.written import put_in_place, write_json

TOGETHER = ("train", "distill", "quantize")
"""Stages that all processes of torchrun share; the others run in the first process alone."""
TRAINING = (*TOGETHER, "prune")
OF_FILES = ("export", "verify", "benchmark")
"""Stages whose results depend on the versions of exporters and runtimes."""
ROLES = ("network", "parent", "float_network")
"""The networks of a product."""
SPEED = {"path", "workers", "cache", "cache_gb"}
"""Settings of data that change nothing but where it lies and how fast it comes."""
DEVICE = ("board", "cpu", "arch", "runtimes")
"""What of the target decides how fast a layer is."""
CONTROLS_FOLDER = "controls"
"""In a run's folder: runs that its own network is compared with."""
NOT_NOW = "These times were not taken now but"
"""How the note begins that a kept benchmark carries."""


@dataclass
class Fold:
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
    machine: dict[str, Any] = field(default_factory=dict)
    """What measures, once it has been asked: CPU, system, runtimes, governor."""
    key: str = ""
    """Of the stage that is being passed."""
    chain: str = ""
    """The key of the last stage that the next one builds on. None builds on times, which are other ones every time."""
    made: dict[str, Any] = field(default_factory=dict)
    """Files of that stage, by hash: they enter the next key, so that no stage outlives its input."""
    score: float | None = None
    """Of the network as it is."""
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
    reseeded: tuple[int, int] = (0, 0)
    """From which stage's number on seeds are others, and by how much: trainings of one parent that differ in chance."""
    store: Path | None = None
    """Where runs share finished stages; see `compress.pipeline.store`."""

    def beside(
        self,
        control: Control,
        name: str,
        prefix: str,
        *,
        data: Data | None = None,
        reseeded: tuple[int, int] = (0, 0),
    ) -> Fold:
        """The fold of a control in `controls/<name>`, which says `prefix` first; what does not differ is copied."""
        return Fold(
            recipe=control.recipe,
            folder=self.folder / CONTROLS_FOLDER / name,
            data=self.data if data is None else data,
            device=self.device,
            notes=Notes(Prefixed(prefix, self.notes.shown)),
            rank=self.rank,
            world_size=self.world_size,
            base=self.base,
            setup=self.setup,
            machine=self.machine,
            code=self.code,
            numbers=(0, *control.numbers),
            twin=self.folder,
            store=self.store,
            asked=True,
            reseeded=reseeded,
        )

    def number(self, index: int) -> int:
        """What the stage at `index` goes by; 0 is the network as it came."""
        return self.numbers[index] if self.numbers else index

    def record(self, facts: dict[str, Any]) -> None:
        if self.rank == 0:
            write_json(self.folder / "run.json", facts)

    def step(self, index: int, stage: StageSettings | None, label: str) -> bool:
        """Brings the fold past one stage; whether an earlier run's result served."""
        place = self.folder / "stages" / label
        self.key = self._stage_key(index, stage) if stage else self._first_key()
        # What was timed elsewhere says nothing of now.
        store = self.store if self.rank == 0 and not (stage and stage.use == "benchmark") else None
        with shelved(store, self.key, label, self.notes.shown) as shelf:
            twin = self.twin / "stages" / label if self.twin else None

            def take_over() -> None:
                for source in filter(None, (twin, shelf)):
                    take(source, place, self.key)

            processes.shared(take_over)
            resumed = self._reach(index, stage, label, place)
            if shelf is not None and not resumed:
                put(place, shelf, self.key)
        return resumed

    def _reach(self, index: int, stage: StageSettings | None, label: str, place: Path) -> bool:
        """As `step`, once the stage's key is known and what others have finished has been taken."""
        found = processes.shared(lambda: self._served(stage, label, place))
        resumed = found is not None
        if found is not None:
            if self.rank == 0:
                write_json(place / manifest.NAME, found)
            self.notes.event("stage_resumed", stage=label, finished=found["finished"], **results(found))
            self.product = None
        else:
            self._ask_all()
            if self.product is None and stage is not None:
                self.product = load_product(self.folder, self.refs)
            self.notes.event("stage_started", stage=label, key=self.key)
            found = self._run(index, stage, label, place)
            self.notes.event("stage_finished", stage=label, **results(found))
        self.refs, self.score = found["product"], (found["network"] or {}).get("accuracy", self.score)
        if stage is None or stage.use != "benchmark":
            self.chain, self.made = self.key, found["files"]
        self.seconds += found["seconds"]
        if found["metrics"].get("verdict") == "FAIL":
            self.failed = (f"stage {label}", found["metrics"]["reason"], "see the report")
        return resumed

    def _served(self, stage: StageSettings | None, label: str, place: Path) -> dict[str, Any] | None:
        """The manifest of an earlier run's result that serves, and a note that says so; None where none does."""
        say, timed = self.notes.shown.note, stage is not None and stage.use == "benchmark"
        found = manifest.valid(place, self.key)
        if found is None:
            if damage := manifest.damage(place, self.key):
                say(f"{label}: {damage}; the stage runs again")
            elif timed and (differs := manifest.other_machine(place, self.machine)):
                say(f"{label}: measured again, the machine has changed ({differs})")
            return None
        if timed and manifest.noisy(found):
            say(f"{label}: measured again, it was NOISY on {found['finished']}")
            return None
        notes = [note for note in found["notes"] if not note.startswith(NOT_NOW)]
        if timed:
            notes = [f"{NOT_NOW} on {found['finished']}, with the same files on the same machine.", *notes]
            say(f"{label}: {notes[0]}")
        else:
            say(f"{label}: unchanged, taken from the run of {found['finished']}")
        return found | {"resumed": True, "notes": notes}

    def _run(self, index: int, stage: StageSettings | None, label: str, place: Path) -> dict[str, Any]:
        """Runs a stage in a folder of its own that gets its name when it is complete; its manifest."""
        partial, before = place.with_name(place.name + ".partial"), self.product
        training = place.with_name(place.name + ".training")
        together = stage is not None and stage.use in TOGETHER
        self.notes.kept.clear()
        began, epochs = time.perf_counter(), Epochs(training)
        made: list[Product] = []

        def work() -> None:
            made.append(self._apply(index, stage, label, partial, before, together, epochs))

        def save() -> dict[str, Any]:
            if not together:
                work()
            seconds = epochs.earlier_s + time.perf_counter() - began
            return self._save(index, stage, label, place, partial, before, made[0], seconds)

        def safe_save() -> dict[str, Any]:
            with told(self.folder, f"stage {label}"):
                return save()

        try:
            processes.shared(lambda: empty(partial))
            if stage is not None and stage.use in TRAINING:
                conditions = {"threads": torch.get_num_threads(), "processes": self.world_size}
                for other in processes.shared(lambda: prepare_epochs(training, self.key, conditions)):
                    self.notes.note(f"{other}: the result may differ in its last bits from that of one go")
            if together:
                work()
            found = processes.shared(safe_save)
        except BaseException:
            if self.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
                forget_epochs(training, kept=True)
            raise
        if self.rank == 0:
            forget_epochs(training)
        # Several processes go on with what lies on disk: the same bytes, whatever the rounding of each was.
        alone = self.world_size == 1
        self.product = replace(made[0], files=files_of(self.folder, found["product"])) if alone else None
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
            network = first_network(self.recipe, self.data, self.notes, self.base)
            return Product(network, metrics=write_samples(self.data, folder, self.recipe.seed))
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
        with told(self.folder, f"stage {label}", _batch_sizes(self.recipe, stage)):
            return stage.apply(before, run)

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
        network = describe(product.network, self.data, self.device, self.notes) if changed else None
        if network and stage is not None and stage.use in TRAINING:
            said = diverged(product.metrics, network["accuracy"], self.score, self.data)
            if said:
                self.notes.note(f"stage {label}: {said}")
        facts = {
            "stage": stage.use if stage else "load",
            "index": self.number(index),
            "folder": label,
            "key": self.key,
            "recipe_hash": self._recipe_hash(index),
            "seed": self._seed(index),
            "settings": stage.model_dump(mode="json") if stage else self.recipe.model.model_dump(mode="json"),
            "seconds": seconds,
            "finished": now(),
            "resumed": False,
            "product": {**networks, "files": files, "layer_losses": dict(product.layer_losses)},
            "network": network,
            "metrics": dict(product.metrics),
            "notes": list(self.notes.kept),
            "files": manifest.files_below(partial),
        }
        if stage is not None and stage.use == "benchmark":
            facts["machine"] = self.machine
        write_json(partial / manifest.NAME, facts)
        put_in_place(partial, place)
        return facts

    def _seed(self, index: int) -> int:
        number = self.number(index)
        return (self.recipe.seed + 1000 * number + self._more(number)) % 2**31

    def _more(self, number: int) -> int:
        """What a stage's seed is moved by."""
        first, more = self.reseeded
        return more if number >= first else 0

    def _recipe_hash(self, index: int) -> str:
        """Of the recipe up to this stage: files do not change with what is done to them later."""
        stages = self.recipe.stages[: max(1, index)]
        return recipes.recipe_hash(self.recipe.model_copy(update={"stages": stages}))

    def _first_key(self) -> str:
        recipe = self.recipe
        return manifest.key(
            recipe.model.model_dump(mode="json"),
            [file_sha256(path) for path in inputs(recipe.model, self.base, self.notes.shown)],
            recipe.data.model_dump(mode="json", exclude=SPEED),  # the fingerprint knows the content
            self.data.fingerprint,
            list(self.data.labels),  # which exported files name
            recipe.preprocess.model_dump(mode="json"),
            recipe.seed,
            self.code,
            manifest.versions((*manifest.TRAINING_PACKAGES, *packages(recipe.model))),
            self.device.type,
        )

    def _stage_key(self, index: int, stage: StageSettings) -> str:
        machine: list[Any] = []
        if more := self._more(self.number(index)):
            machine.append(["seed", more])
        if stage.use in OF_FILES:
            machine.append(manifest.versions(manifest.FILE_PACKAGES))
        if stage.use == "benchmark":
            machine += [self.recipe.target, processes.shared(self.what_measures)]
        elif timed(stage):  # a training hangs on it: only what another choice of widths could come from
            found = processes.shared(self.what_measures)
            machine += [self.recipe.target, {fact: found[fact] for fact in DEVICE}]
        lessons = processes.shared(lambda: lessons_of(stage, self.base, self.notes.shown))
        return manifest.key(self.chain, self.made, stage.model_dump(mode="json"), lessons, machine)

    def ask_network(self) -> None:
        """Builds the network once, so that what is wrong with it is said before anything else happens."""
        module = first_network(self.recipe, self.data, Silent(), self.base).module
        if not reads_channels_last(module, self.recipe.preprocess):
            self.notes.note("the network uses .view, so batches stay in NCHW; .flatten or .reshape would train faster")
            self.data = self.data.in_nchw()

    def _ask_all(self) -> None:
        """Asks every stage about the network before any of them trains: a refusal after an hour helps nobody."""
        if self.asked:
            return
        self.asked = True

        def ask() -> None:
            refuse_unsuited(self.recipe, self.data)
            module = first_network(self.recipe, self.data, Silent(), self.base).module
            for stage in self.recipe.stages:
                for teacher in outside_teachers(stage):
                    refuse_other_task(checkpoint.load(self.base / teacher), self.data, teacher)
                for block in blocks(stage):
                    if block.cache is not None:
                        refuse_unusable(Path(block.cache).expanduser())
                    if block.unlabeled is not None:
                        with_unlabeled(self.data, block.unlabeled, self.notes.shown, self.base)
                if (check_stage := getattr(stage, "check", None)) is not None:
                    check_stage(module, self.recipe.preprocess)
            write_int8(self.recipe, module)
            if any(stage.use == "benchmark" or timed(stage) for stage in self.recipe.stages):
                self.what_measures()

        processes.shared(ask)

    def what_measures(self) -> dict[str, Any]:
        """What measures, asked once: a board that cannot be reached is found out before hours of training."""
        if not self.machine:
            self.machine = measured_by(self.recipe.target, self.notes.shown, self.setup)
        return self.machine


def timed(stage: StageSettings) -> bool:
    """Whether the network that comes out depends on how fast the target is."""
    return isinstance(getattr(stage, "goal", None), TimeGoal)


def load_product(folder: Path, refs: dict[str, Any]) -> Product:
    loaded: dict[str, Network] = {}
    for role in ROLES:
        where = refs[role]
        if where and where not in loaded:
            loaded[where] = checkpoint.load(folder / where)
    network, parent, float_network = (loaded[refs[role]] if refs[role] else None for role in ROLES)
    assert network is not None
    return Product(network, parent, float_network, files_of(folder, refs), refs["layer_losses"])


def files_of(folder: Path, refs: dict[str, Any]) -> dict[str, Path]:
    return {name: folder / where for name, where in refs["files"].items()}


def _batch_sizes(recipe: Recipe, stage: StageSettings) -> dict[str, int]:
    """What a stage's batch sizes are, by the keys under which a recipe changes them."""
    those = [index for index, other in enumerate(recipe.stages) if other.use == stage.use]
    name = stage.use if len(those) == 1 else next(i for i in those if recipe.stages[i] is stage)
    found = {f"stages.{name}.batch_size": getattr(stage, "batch_size", None)}
    if inner := getattr(stage, "finetune", None):
        found[f"stages.{name}.finetune.batch_size"] = inner.batch_size
    return {key: size for key, size in found.items() if size}


def _relative(path: Path, partial: Path, label: str, folder: Path) -> str:
    """Where a file will lie once its stage's folder has its final name."""
    if path.is_relative_to(partial):
        return f"stages/{label}/{path.relative_to(partial).as_posix()}"
    return path.relative_to(folder).as_posix()


def lessons_of(stage: StageSettings, base: Path, progress: Progress) -> list[str]:
    """What a stage is taught with and that lies outside this run: hashes of saved teachers, with the versions of the
    packages that build them, and of images without labels."""
    folders = [base / teacher for teacher in outside_teachers(stage)]
    models = [checkpoint.described(folder)[1] for folder in folders]
    files = [path for folder in folders for path in sorted(folder.glob("*")) if path.is_file()]
    files += [path for model in models for path in inputs(model, base, progress)]
    built_by = [f"{name} {number}" for model in models for name, number in manifest.versions(packages(model)).items()]
    more = [block.unlabeled for block in blocks(stage) if block.unlabeled is not None]
    return [*map(file_sha256, files), *built_by, *(fingerprint_of(unlabeled, progress, base) for unlabeled in more)]


def empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
