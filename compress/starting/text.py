"""The recipe as a person would write it: one setting a line, and why beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.starting.images import Seen
from compress.starting.network import Chosen
from compress.starting.plan import Planned

COLUMN = 28
"""Where comments begin."""
WIDTH = 116
PLAIN = re.compile(r"[A-Za-z_./](?:[\w./ -]|:(?=\w))*", re.ASCII)
"""Texts that YAML reads as texts without quotes."""
NO_TEXT = {"true", "false", "null", "yes", "no", "on", "off", "y", "n", "~"}


def recipe_text(name: str, place: Path, images: Seen, network: Chosen, stages: Sequence[Planned], target: str) -> str:
    """YAML that loads as a recipe."""
    lines = [
        f"# {len(images.labels)} outputs, {images.train} images for training, {images.evaluation} for evaluation.",
        f"# compress check {place} says what it would run, compress doctor what int8 will do to the network.",
        f"name: {name}",
    ]
    if target != "local":
        lines.append(_line("", "target", target, "where the files are measured"))
    lines += ["model:", *_section("  ", network.settings, network.reasons)]
    lines += ["data:", *_section("  ", images.settings, images.reasons)]
    if network.written:
        lines += ["preprocess:", *_section("  ", network.written, network.preprocess_reasons)]
    else:
        lines += [f"# preprocess: {network.preprocess_reasons['']}"]
    lines.append("stages:")
    for stage in stages:
        lines += _stage(stage)
    return "\n".join(lines) + "\n"


def _stage(stage: Planned) -> Iterator[str]:
    first = ["  - ", "    "]
    if stage.refused:
        yield from _wrapped(f"left out, as the network does not allow it: {stage.refused}")
        first = ["  # - ", "  #   "]
    for index, (key, value) in enumerate(stage.settings.items()):
        yield _line(first[min(index, 1)], key, value, stage.reasons.get(key, ""))


def _section(indent: str, settings: Mapping[str, Any], reasons: Mapping[str, str]) -> Iterator[str]:
    for key, value in settings.items():
        yield _line(indent, key, value, reasons.get(key, ""))


def _line(indent: str, key: str, value: Any, reason: str) -> str:
    line = f"{indent}{key}: {as_yaml(value)}"
    return f"{line:<{COLUMN - 1}} # {_one_line(reason)}" if reason else line


def _wrapped(text: str) -> Iterator[str]:
    line = "  #"
    for word in _one_line(text).split():
        if len(line) + len(word) > WIDTH:
            yield line
            line = "  #"
        line += f" {word}"
    yield line


def _one_line(text: str) -> str:
    """Names of columns and messages of libraries end no comment early."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def as_yaml(value: Any) -> str:
    """A setting in flow style."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {as_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str) and PLAIN.fullmatch(value) and value.lower() not in NO_TEXT and value == value.strip():
        return value
    return json.dumps(value, ensure_ascii=True)
