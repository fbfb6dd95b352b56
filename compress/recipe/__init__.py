"""What to do with a network, as a YAML file; every mistake of that file at once, with its line.

`draft` reads the file, pydantic validates it, `explain` words what pydantic found. Only the rules on the order of
stages, and the notes, know stages by name.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedSeq
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from compress.data import DataSettings
from compress.errors import ModelError, RecipeError
from compress.models import ModelSettings, own_preprocess, refuse_unknown
from compress.product import Preprocess
from compress.quantization.precision import simulated
from compress.recipe.controlled import CONTROLS, ControlName, Controls
from compress.recipe.draft import Mistake, lay_over, read
from compress.recipe.explain import explain, uses
from compress.recipe.target import TargetName
from compress.recipe.task import task_mistakes
from compress.recipe.words import Keys, dotted, plain, shown
from compress.settings import SEVERAL, Settings
from compress.shown import without_secrets
from compress.stages import StageSettings
from compress.stages.export import SIMULATED
from compress.targets import is_emulated
from compress.teachers.stage import mistake

__all__ = [
    "Recipe",
    "describe",
    "dump",
    "kind_mistakes",
    "load",
    "notes",
    "order_mistakes",
    "preprocess_line",
    "recipe_hash",
    "resolved",
    "schema",
    "teacher_mistakes",
    "unsuited",
]

COMPRESSES = ("prune", "factorize", "sparsify", "cluster", "quantize")
"""Stages after which the network is another one than its parent."""
CHANGES = ("train", *COMPRESSES, "distill")
BEFORE = {
    "prune": (("factorize", "sparsify", "cluster"), "channels cannot be taken out of layers that were {} already"),
    "factorize": (("sparsify", "cluster"), "two layers would not have the weights that were {} already"),
    "sparsify": (("cluster",), "zeros would break the values that weights share since they were {}"),
}
"""What has to come after a stage, and why."""
DONE = {"factorize": "factored", "sparsify": "made sparse", "cluster": "clustered"}
"""Stages that return another network than they got."""


class ReportSettings(Settings):
    """What the report says beyond what the stages left."""

    ablate_distillation: bool = False
    """After the last stage, train the same network without any teacher, in `controls/no_distillation` of the run's
    folder, and show what distillation gained or lost. Stages before the first with a teacher do not run again."""
    controls: bool | Controls = False
    """After the last stage, make simpler networks that are as fast and were trained as long, in `controls/` of the
    run's folder, and say which of them the network beats, ties with or loses to. `true`: all, with one seed each."""

    @property
    def asked(self) -> Controls | None:
        """The controls that are asked for, if any."""
        if isinstance(self.controls, Controls):
            return self.controls
        return Controls() if self.controls else None


class Recipe(Settings):
    """A network, its data, and the stages that compress, export and measure it, in their order."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=64)
    """Lower-case letters, digits, `.`, `_` and `-`; results go to `runs/<name>/`."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of every random choice: new weights, the order of images, augmentation, images for calibration."""
    model: ModelSettings
    """The network to start from."""
    data: DataSettings
    """Labelled images to train on, and others to evaluate on."""
    preprocess: Preprocess = Preprocess()
    """From an image to the network's input; what is left out is as a network known by name was trained."""
    target: TargetName = "local"
    """The machine that measures: `local`, a board as `ssh://user@host[:port]`, or `emulated`, an ARM userland."""
    stages: tuple[StageSettings, ...] = Field(min_length=1)
    """What happens to the network, first to last."""
    report: ReportSettings = ReportSettings()
    """What the report says beyond that."""

    @model_validator(mode="after")
    def _stages_in_order(self) -> Self:
        stages = [stage.model_dump(mode="json") for stage in self.stages]
        mistakes = _between_stages(stages)
        if self.report.ablate_distillation and not any(map(_distills, stages)):
            reason = "no stage has a teacher, so there is nothing to leave out; add a `distill`, or take this away"
            mistakes.append((("report", "ablate_distillation"), reason))
        mistakes += _control_mistakes(self.report, stages, self.target)
        mistakes += task_mistakes(self.stages, getattr(self.data, "task", "classification"))
        if mistakes:
            text = "; ".join(f"{dotted(keys)}: {reason}" for keys, reason in mistakes)
            raise PydanticCustomError(SEVERAL, "{text}", {"text": text, "mistakes": mistakes})
        return self


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the file, changed by `overrides` such as `seed=3` or `stages.prune.goal.macs=0.4`.

    A list item is addressed by its index or, if it is the only one, by its `use`; values are YAML. Raises RecipeError
    with every mistake of the file and of the overrides, one line each: place, dotted key, problem, way out.
    """
    draft = read(path)
    for override in overrides:
        lay_over(draft, override)
    if not isinstance(draft.value, dict):
        if not draft.mistakes:
            found = "empty" if draft.value is None else shown(draft.value)
            keys = ", ".join(Recipe.model_fields)
            draft.mistakes.append(Mistake((), f"a recipe is a mapping with {keys}; this file is {found}"))
        raise RecipeError(draft.report())
    try:
        # JSON mode: a list may fill a tuple and an int a float, and nothing else is converted.
        recipe = Recipe.model_validate_json(json.dumps(draft.value))
    except ValidationError as error:
        invalid = [Mistake(*pair) for pair in explain(Recipe, error.errors(include_url=False), draft.value)]
        invalid += _order_of_invalid(draft.value.get("stages"))
        draft.mistakes += [mistake for mistake in invalid if not draft.knows(mistake.keys)]
    if not draft.mistakes:
        try:
            refuse_unknown(recipe.model)
            recipe = resolved(recipe, Path.cwd())
        except ModelError as error:
            named = error.place.startswith("model.")
            where: Keys = tuple(error.place.split(".")) if named else ("model",)
            problem = "; ".join(filter(None, (error.problem, error.way_out)))
            draft.mistakes.append(Mistake(where, problem if named else f"{error.place}: {problem}"))
    if draft.mistakes:
        raise RecipeError(draft.report())
    return recipe


def resolved(recipe: Recipe, base: Path) -> Recipe:
    """The recipe with all of `preprocess` written out: what it leaves out is what its network was made for.

    Networks that do not say leave the defaults. A relative path starts at `base`. Raises ModelError.
    """
    given = recipe.preprocess.model_fields_set
    if given >= Preprocess.model_fields.keys():
        return recipe
    own = own_preprocess(recipe.model, base)
    if not own:
        return recipe
    said = {key: getattr(recipe.preprocess, key) for key in given}
    if said.get("channels", own.get("channels")) != own.get("channels"):
        own = {key: value for key, value in own.items() if key not in ("mean", "std")}
    whole = Preprocess.model_validate(own | said).model_dump()
    return recipe.model_copy(update={"preprocess": Preprocess.model_validate(whole)})


def order_mistakes(stages: Sequence[Mapping[str, Any]]) -> list[tuple[int, str]]:
    """(index, reason) of each stage that cannot stand where it stands. A stage is given as a recipe says it."""
    mistakes: list[tuple[int, str]] = []
    last: dict[str, int] = {}
    unchanged_export: Mapping[str, Any] | None = None
    for index, stage in enumerate(stages):
        use = stage["use"]
        if use == "prune" and "quantize" in last:
            way_out = f"move it before quantize (stages.{last['quantize']})"
            mistakes.append((index, f"fake-quantized layers have no room for channel removal; {way_out}"))
        if use in ("factorize", "sparsify", "cluster") and "quantize" in last:
            way_out = f"move it before quantize (stages.{last['quantize']})"
            mistakes.append((index, f"the network is quantized already; {way_out}"))
        for later in BEFORE[use][0] if use in BEFORE else ():
            if later in last:
                way_out = f"move it before {later} (stages.{last[later]})"
                mistakes.append((index, f"{BEFORE[use][1].format(DONE[later])}; {way_out}"))
        if use == "quantize" and "quantize" in last:
            way_out = "go on training with `train` or `distill`"
            mistakes.append((index, f"the network is quantized already (stages.{last['quantize']}); {way_out}"))
        if _teacher(stage) == "parent" and not last.keys() & {*COMPRESSES}:
            problem = "nothing is pruned or quantized yet, so the teacher `parent` is the student itself"
            mistakes.append((index, f"{problem}; move this stage down or name another teacher"))
        if use == "knowledge" and not last.keys() & {*COMPRESSES}:
            problem = "nothing is pruned or quantized yet, so the network would be compared with itself"
            mistakes.append((index, f"{problem}; move this stage down"))
        if use in ("verify", "benchmark") and "export" not in last:
            mistakes.append((index, f"{use} works on exported files; put an `export` before it"))
        elif use == "verify" and (changed := max((last[c] for c in CHANGES if c in last), default=-1)) > last["export"]:
            why = f"stages.{changed} changed the network after the last export"
            mistakes.append((index, f"{why}, so the files cannot agree with it; put an `export` before verify"))
        if use == "export" and stage == unchanged_export:
            mistakes.append((index, f"the same as stages.{last['export']} and nothing changed since; leave one out"))
        if use == "export":
            unchanged_export = stage
        elif use in CHANGES:
            unchanged_export = None
        last[use] = index
    return mistakes


def kind_mistakes(stages: Sequence[Mapping[str, Any]]) -> list[tuple[Keys, str]]:
    """(keys, reason) of each kind that an export asks for and the stages before it do not make."""
    mistakes: list[tuple[Keys, str]] = []
    pruned, quantized, bits = False, False, ""
    for index, stage in enumerate(stages):
        pruned = pruned or stage["use"] in COMPRESSES[:-1]
        if stage["use"] == "quantize":
            quantized, bits = True, _simulated(stage)
        kinds = stage.get("kinds") if stage["use"] == "export" else None
        for place, kind in enumerate(kinds if isinstance(kinds, list) else []):
            if kind == "float" and not pruned:
                reason = "nothing is pruned before this export, so it would be the parent's file again; leave float out"
            elif kind == "int8" and not quantized:
                reason = "no `quantize` comes before this export; put one there, or leave int8 out"
            elif kind == "int8" and bits:
                reason = f"{SIMULATED.format(bits=bits)}; quantize to 8 bits, or leave int8 out"
            else:
                continue
            mistakes.append((("stages", index, "kinds", place), reason))
    return mistakes


def teacher_mistakes(stages: Sequence[Mapping[str, Any]]) -> list[tuple[Keys, str]]:
    """(keys, reason) of each teacher, and each weight of a layer, that no stage before provides."""
    mistakes: list[tuple[Keys, str]] = []
    weighed: list[Any] = []  # values of any kind: the recipe is not validated yet
    for index, stage in enumerate(stages):
        inside: Keys = () if stage["use"] == "distill" else ("distill",)
        block = stage if stage["use"] == "distill" else stage.get("distill")
        if not isinstance(block, Mapping):
            continue
        before = [earlier["use"] for earlier in stages[:index]]
        for folder in _stages_that_teach(block.get("teacher")):
            if reason := mistake(folder, before):
                mistakes.append((("stages", index, *inside, "teacher"), reason))
        losses = block.get("losses")
        own = [loss for loss in losses if isinstance(loss, Mapping)] if isinstance(losses, (list, tuple)) else []
        for place, loss in enumerate(own):
            if loss.get("layer_weights") == "carried" and loss.get("use") not in weighed:
                reason = f"no stage before has the loss `{loss.get('use')}` whose layers it would weigh; use equal"
                mistakes.append((("stages", index, *inside, "losses", place, "layer_weights"), reason))
        weighed += [loss.get("use") for loss in own]
    return mistakes


def _stages_that_teach(teacher: Any) -> list[str]:
    """The folders of earlier stages that a teacher of a recipe names."""
    if not isinstance(teacher, Mapping):
        return []
    several = teacher.get("teachers")
    inner = [name for one in several for name in _stages_that_teach(one)] if isinstance(several, (list, tuple)) else []
    folder = teacher.get("folder")
    return [*([folder] if teacher.get("use") == "stage" and isinstance(folder, str) else []), *inner]


def _between_stages(stages: Sequence[Mapping[str, Any]]) -> list[tuple[Keys, str]]:
    """(keys, reason) of what is wrong with a stage because of those before it."""
    order: list[tuple[Keys, str]] = [(("stages", index), reason) for index, reason in order_mistakes(stages)]
    return order + kind_mistakes(stages) + teacher_mistakes(stages)


def _simulated(stage: Mapping[str, Any]) -> str:
    """`W4A8` for a quantize stage whose bit widths no runtime executes; a width that is none is another's mistake."""
    return simulated({key: bits for key, bits in stage.items() if isinstance(bits, int) and 2 <= bits <= 8})


def _teacher(stage: Mapping[str, Any]) -> Any:
    """Whom a training stage learns from, or None."""
    block = stage if stage["use"] == "distill" else stage.get("distill") if stage["use"] == "train" else None
    teacher = block.get("teacher", "parent") if isinstance(block, Mapping) else None
    return teacher.get("use") if isinstance(teacher, Mapping) else teacher


def _control_mistakes(
    report: ReportSettings, stages: Sequence[Mapping[str, Any]], target: str
) -> list[tuple[Keys, str]]:
    """(keys, reason) of controls that have nothing to be compared with, or by."""
    asked = report.asked
    if asked is None:
        return []
    keys: Keys = ("report", "controls")
    uses = [stage["use"] for stage in stages]
    changed = max((place for place, use in enumerate(uses) if use in COMPRESSES), default=-1)
    if changed < 0:
        return [(keys, "no stage compresses the network, so there is nothing to compare; add `prune` or `quantize`")]
    if is_emulated(target):
        return [(keys, "controls are as fast as the network, and an emulated target times nothing; name another")]
    exported = max((place for place, use in enumerate(uses) if use == "export"), default=-1)
    if exported < changed or "verify" not in uses[exported:]:
        problem = "files are compared, by time and image by image"
        return [(keys, f"{problem}; put `export` and `verify` behind stages.{changed}")]
    return [
        ((*keys, "which"), f"{name}: {reason}")
        for name in asked.which or ()
        if (reason := unsuited(name, stages)) and name != "mac_pruning"
    ]


def unsuited(name: ControlName, stages: Sequence[Mapping[str, Any]]) -> str:
    """Why these stages leave no room for that control; empty where they do. A stage is given as a recipe says it."""
    prunes = [stage for stage in stages if stage["use"] == "prune"]
    if name == "no_distillation":
        return "" if any(map(_distills, stages)) else "no stage has a teacher, so there is nothing to leave out"
    if name == "ptq_only":
        return "" if any(stage["use"] == "quantize" for stage in stages) else "no stage quantizes"
    if not prunes and name == "lower_resolution":
        return "nothing is pruned, so a network of smaller images would only be faster"
    if not prunes:
        return "no stage prunes"
    if name == "mac_pruning" and all("macs" in stage["goal"] and stage.get("scope") != "local" for stage in prunes):
        return "the recipe prunes to multiply-adds itself"
    return ""


def _distills(stage: Mapping[str, Any]) -> bool:
    """Whether a stage, as a recipe says it, has a teacher."""
    return stage["use"] == "distill" or stage.get("distill") is not None


def _order_of_invalid(stages: Any) -> list[Mistake]:
    """Pydantic judges the order only of stages that are all valid; if their names are known, they will do."""
    if not isinstance(stages, list):
        return []
    known = uses(StageSettings)
    if not all(isinstance(stage, dict) and stage.get("use") in known for stage in stages):
        return []
    return [Mistake(*mistake) for mistake in _between_stages(stages)]


def notes(recipe: Recipe) -> list[str]:
    """What is legitimate but may not be meant, one sentence each."""
    names = [stage.use for stage in recipe.stages]
    exports = "export" in names
    after_export = names[len(names) - names[::-1].index("export") :] if exports else names
    changes = [name for name in after_export if name in CHANGES]
    found = []
    if changes and not exports:
        found.append("no stage exports: the run ends with a network and no file for a board")
    elif changes:
        found.append(f"changes after the last export are in no exported file: {', '.join(changes)}")
    if exports and "verify" not in after_export:
        found.append("no verify follows the last export: the accuracy of its files is not measured")
    for stage in recipe.stages:
        if stage.use == "quantize" and (bits := _simulated(stage.model_dump(mode="json"))):
            found.append(f"{SIMULATED.format(bits=bits)}: no int8 file is written")
    if asked := recipe.report.asked:
        stages = [stage.model_dump(mode="json") for stage in recipe.stages]
        which = [name for name in asked.which or CONTROLS if not unsuited(name, stages)]
        trainings = asked.seeds * (len(which) + 1) - 1
        found.append(f"controls make {trainings} more networks, each trained as long: {', '.join(which)}")
    if recipe.report.ablate_distillation:
        stages = [stage.model_dump(mode="json") for stage in recipe.stages]
        first = next(index for index, stage in enumerate(stages) if _distills(stage))
        again = ", ".join(name for name in names[first:] if name != "benchmark")
        found.append(f"ablate_distillation runs once more, without a teacher: {again}")
        if "knowledge" not in names:
            found.append("ablate_distillation compares accuracy alone; a `knowledge` stage measures what else differs")
    return found


def dump(recipe: Recipe, *, masked: bool = False) -> str:
    """The recipe as YAML with every default written out; loads again to an equal recipe.

    `masked` is without secrets, looked for before YAML quotes them.
    """
    yaml = YAML()
    yaml.width = 1000
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.representer.add_representer(
        type(None), lambda representer, _: representer.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    stream = io.StringIO()
    settings = recipe.model_dump(mode="json")
    yaml.dump(_laid_out(without_secrets(settings) if masked else settings), stream)
    return stream.getvalue()


def _laid_out(value: Any) -> Any:
    """`use` first in its mapping, lists of scalars on one line, text in quotes unless it is a plain word."""
    if isinstance(value, dict):
        return {_laid_out(key): _laid_out(value[key]) for key in sorted(value, key=lambda key: key != "use")}
    if isinstance(value, str) and not re.fullmatch(r"[\w./:-]*", value):
        # Left to itself, ruamel.yaml 0.19 writes `?0` and U+0085 in ways that it reads back as something else.
        return DoubleQuotedScalarString(value)
    if isinstance(value, list):
        items = CommentedSeq(_laid_out(item) for item in value)
        if not any(isinstance(item, (dict, list)) for item in value):
            items.fa.set_flow_style()
        return items
    return value


def recipe_hash(recipe: Recipe) -> str:
    """SHA-256 of all settings, defaults included, but `name` and `report`: they do not say what the results are."""
    settings = recipe.model_dump(mode="json", exclude={"name", "report"})
    return hashlib.sha256(json.dumps(settings, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a recipe file, for completion and checks in an editor.

    With the YAML language server: `# yaml-language-server: $schema=<saved schema>` as the file's first line. It knows
    fields, types and ranges; rules between fields, such as the order of stages, only `load` knows.
    """
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return head | Recipe.model_json_schema() | {"title": "Recipe for compress"}


def describe(recipe: Recipe) -> list[str]:
    """One line per stage: its number, its name, and its own `describe()` or the settings that are not defaults."""
    lines = []
    for number, stage in enumerate(recipe.stages, 1):
        own = getattr(stage, "describe", None)
        settings = stage.model_dump(mode="json", exclude_defaults=True, exclude={"use"})
        text = (
            own()
            if own
            else ", ".join(f"{key} {_compact(value)}".removesuffix(" {}") for key, value in settings.items())
        )
        lines.append(f"{number:02d} {stage.use}" + (f": {text}" if text else ""))
    return lines


def preprocess_line(recipe: Recipe) -> str:
    """What becomes of an image before the network reads it, in one line."""
    return ", ".join(f"{key} {_compact(value)}" for key, value in recipe.preprocess.model_dump(mode="json").items())


def _compact(value: Any) -> str:
    """A value on one line, without needless quotes."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_compact(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_compact, value)) + "]"
    return plain(value) if isinstance(value, str) else json.dumps(value)
