"""What of a recipe makes no sense in a task: losses and schemes that read outputs as those of classes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from compress.labels import Task
from compress.losses import LossSettings
from compress.recipe.explain import kinds, uses
from compress.recipe.words import Keys
from compress.schemes import SchemeSettings
from compress.teachers.several import Several

WORDS: dict[Task, str] = {
    "classification": "with one class for each image",
    "multi_label": "in a multi-label task",
    "regression": "in a regression",
}


def task_mistakes(stages: Sequence[Any], task: Task) -> list[tuple[Keys, str]]:
    """(keys, reason) of each setting that makes no sense in the task; `stages` are those of a valid recipe."""
    found: list[tuple[Keys, str]] = []
    for index, stage in enumerate(stages):
        place: Keys = ("stages", index)
        if stage.use == "knowledge" and task != "classification":
            found.append((place, f"`knowledge` compares classes and their probabilities: leave it out {WORDS[task]}"))
        for keys, fit in ((place, stage), ((*place, "finetune"), getattr(stage, "finetune", None))):
            if getattr(fit, "label_smoothing", 0) and task != "classification":
                found.append(((*keys, "label_smoothing"), f"is for classes: leave it out {WORDS[task]}"))
            if getattr(fit, "huber", None) is not None and task != "regression":
                found.append(((*keys, "huber"), f"is for a regression's numbers: leave it out {WORDS[task]}"))
        if (scheme := getattr(stage, "scheme", None)) is not None and task not in scheme.tasks:
            known = _names(SchemeSettings, task)
            found.append(((*place, "scheme"), f"`{scheme.use}` makes no sense {WORDS[task]}; {known}"))
        inside = place if stage.use == "distill" else (*place, "distill")
        block = stage if stage.use == "distill" else getattr(stage, "distill", None)
        if block is not None:
            found += [((*inside, *keys), reason) for keys, reason in _block(block, task)]
    return found


def _block(block: Any, task: Task) -> Iterable[tuple[Keys, str]]:
    for number, loss in enumerate(block.losses or ()):
        if not loss.serves(task):
            known = _names(LossSettings, task)
            other = f"`{loss.use}` on {loss.on}" if task in loss.tasks else f"`{loss.use}`"
            yield ("losses", number), f"{other} makes no sense {WORDS[task]}; {known}"
    if isinstance(block.teacher, Several) and block.teacher.of == "probabilities" and task != "classification":
        yield ("teacher", "of"), f"a mean of probabilities is one of classes: set `of: logits` {WORDS[task]}"


def _names(union: Any, task: Task) -> str:
    settings: list[Any] = list(kinds(union))
    return f"suitable: {', '.join(sorted(name for kind in settings if task in kind.tasks for name in uses(kind)))}"
