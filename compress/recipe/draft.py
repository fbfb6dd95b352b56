"""A YAML file as plain values that remember their lines, and overrides laid over them.

Nothing is constructed but dict, list, str, int, float, bool and None. What YAML allows and a recipe does not (dates,
tags, merge keys, repeated keys, infinity) is a mistake with a line; the rest of the file is read all the same.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from compress.errors import RecipeError
from compress.recipe.words import Keys, did_you_mean, dotted, plain, shown

# Of a file: its size, its values with every alias followed, its nesting. Ten times what any recipe needs.
MAX_BYTES, MAX_VALUES, MAX_DEPTH = 256 * 1024, 10_000, 40

YAML_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class Mistake:
    keys: Keys
    problem: str
    place: int | str | None = None
    """A line or an override, where it is not the place of `keys`."""


@dataclass
class Draft:
    """A recipe on its way to validation, and what is wrong with it so far."""

    file: str
    value: Any = None
    places: dict[Keys, int | str] = field(default_factory=dict)
    """The line of each value, or the override that set it; values within an overriding one are not listed."""
    mistakes: list[Mistake] = field(default_factory=list)

    def knows(self, keys: Keys) -> bool:
        """Whether a mistake is known of this value or of one around it, which makes a further one doubtful."""
        # A mistake with a line of its own is in an entry that was passed over.
        values = [mistake.keys for mistake in self.mistakes if mistake.keys and not isinstance(mistake.place, int)]
        return any(keys[: len(known)] == known for known in values)

    def report(self) -> list[str]:
        """One sentence per mistake: those of the file by line, then those of the overrides."""
        sentences = []
        for mistake in self.mistakes:
            place = mistake.place or self._place(mistake.keys)
            where = f"{self.file}:{place}" if isinstance(place, int) else place
            sentence = ": ".join([where, *([dotted(mistake.keys)] if mistake.keys else []), mistake.problem])
            sentences.append((place if isinstance(place, int) else math.inf, sentence))
        return list(dict.fromkeys(text for _, text in sorted(sentences, key=lambda sentence: sentence[0])))

    def _place(self, keys: Keys) -> int | str:
        """That of the value, or of the nearest one around it: a missing field has no line, its parent has."""
        around = (keys[:depth] for depth in range(len(keys), -1, -1))
        return next((self.places[outer] for outer in around if outer in self.places), 1)


class _UnreadableError(Exception):
    """Text that no value can be made of, from `line` on."""

    def __init__(self, problem: str, line: int = 1) -> None:
        self.line = line
        super().__init__(problem)


def read(path: Path) -> Draft:
    """The file's values and the mistakes that leave the rest readable. Raises RecipeError for the others."""
    file = plain(str(path))
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except FileNotFoundError:
        siblings = sorted(str(other) for other in path.parent.glob("*.y*ml"))
        raise RecipeError([f"{file}: no such file{did_you_mean(str(path), siblings)}"]) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RecipeError([f"{file}: cannot be read: {plain(reason)}"]) from None
    if len(raw) > MAX_BYTES:
        raise RecipeError([f"{file}: larger than {MAX_BYTES // 1024} KiB, which no recipe is"])
    try:
        return _parse(raw.decode("utf-8-sig"), file)
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = error.object[error.start]
        raise RecipeError([f"{file}:{line}: not UTF-8 (byte 0x{byte:02x}); save it as UTF-8"]) from None
    except _UnreadableError as error:
        raise RecipeError([f"{file}:{error.line}: {error}"]) from None


def _parse(text: str, file: str) -> Draft:
    """Raises _UnreadableError."""
    yaml = YAML(typ="safe", pure=True)
    yaml.max_depth = MAX_DEPTH
    yaml.composer.warn_double_anchors = False
    try:
        root = yaml.compose(text)
    except MarkedYAMLError as error:
        raise _syntax(error) from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        character = f"U+{ord(text[error.position]):04X}"
        raise _UnreadableError(f"not YAML: the character {character} is not allowed", line) from None
    draft = Draft(file)
    if root is not None:
        draft.value = _build(draft, yaml, root, (), root.start_mark.line + 1)
    return draft


def _build(draft: Draft, yaml: YAML, node: Node, keys: Keys, line: int) -> Any:
    """The value of a node; its lines and mistakes go to `draft`."""
    draft.places[keys] = line
    # Both limits are for aliases: an alias is the same node again, perhaps within itself.
    if len(draft.places) > MAX_VALUES:
        raise _UnreadableError(f"more than {MAX_VALUES} values, aliases followed; no recipe is that long", line)
    if len(keys) > MAX_DEPTH:
        raise _UnreadableError(f"nested more than {MAX_DEPTH} deep; no recipe is", line)
    if isinstance(node, SequenceNode) and node.tag == YAML_TAG + "seq":
        items = enumerate(node.value)
        return [_build(draft, yaml, item, (*keys, index), item.start_mark.line + 1) for index, item in items]
    if isinstance(node, MappingNode) and node.tag == YAML_TAG + "map":
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, problem = _key(yaml, key_node)
            here, key_line = (*keys, key), key_node.start_mark.line + 1
            if key in values:
                problem = f"given twice, first on line {draft.places[here]}"
            if problem:
                draft.mistakes.append(Mistake(here, problem, key_line))
            else:
                values[key] = _build(draft, yaml, value_node, here, key_line)
        return values
    value, problem = _scalar(yaml, node)
    if problem:
        draft.mistakes.append(Mistake(keys, problem))
    return value


def _key(yaml: YAML, node: Node) -> tuple[str, str]:
    """A mapping's key, and what is wrong with it."""
    if not isinstance(node, ScalarNode):
        return "?", "a key is text, not a list or a mapping"
    if node.tag == YAML_TAG + "merge":
        return "<<", "YAML 1.2 has no merge key; write the fields out"
    value, problem = _scalar(yaml, node)
    if not problem and not isinstance(value, str):
        problem = "a key is text; put it in quotes"
    return node.value, problem


def _scalar(yaml: YAML, node: Node) -> tuple[Any, str]:
    """The value of a scalar, or what is wrong with it."""
    kind = str(node.tag).removeprefix(YAML_TAG)
    text = node.value
    try:
        match kind if isinstance(node, ScalarNode) else "":
            case "str" | "value":  # `value` is the lone `=` of YAML 1.1
                text.encode()  # "\ud800" is text to YAML, but half a character, which JSON cannot carry.
                return text, ""
            case "null":
                return None, ""
            case "bool":
                return yaml.constructor.construct_yaml_bool(node), ""
            case "int":
                number = yaml.constructor.construct_yaml_int(node)
                # Not the number itself: Python refuses to write one of thousands of digits.
                return (number, "") if abs(number) < 2**63 else (None, f"{shown(text)} is too large a number")
            case "float":
                number = yaml.constructor.construct_yaml_float(node)
                return number, "" if math.isfinite(number) else f"{shown(text)} is no number to calculate with"
            case "timestamp":
                return None, f"{plain(text)} is a date in YAML; put it in quotes if text is meant"
            case _:
                tag = str(node.tag).replace(YAML_TAG, "!!")
                return None, f"the tag {plain(tag)} has no place in a recipe"
    except UnicodeEncodeError:
        return None, f"{shown(text)} holds half a surrogate pair, which is no character"
    except (ValueError, LookupError):
        return None, f"{shown(text)} cannot be read as {kind}"


def _syntax(error: MarkedYAMLError) -> _UnreadableError:
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 1
    match error.problem or error.context or "cannot be read":
        case "but found another document":
            problem = "a second document begins here; a recipe is one"
        case "mapping values are not allowed here":
            problem = "a second `: ` in this line, or wrong indentation; text that holds `: ` needs quotes"
        case text if "maximum depth" in text:
            return _UnreadableError(f"nested more than {MAX_DEPTH} deep; no recipe is", line)
        case text if "'\\t'" in text:
            problem = "a tab where YAML wants spaces"
        case text:
            problem = " ".join([plain(text), plain(error.context or "")]).strip()
            if error.context_mark and error.context_mark.line + 1 != line:
                problem += f" that begins on line {error.context_mark.line + 1}"
    return _UnreadableError(f"not YAML: {problem}", line)


def lay_over(draft: Draft, override: str) -> None:
    """Sets one value of the draft, `key=value` with a dotted key and a YAML value; a failure becomes a mistake.

    A list item is addressed by its index or, if it is the only one, by its `use`.
    """
    place = f"override '{plain(override if len(override) <= 60 else override[:59] + '…')}'"
    target, equals, text = override.partition("=")
    parts = target.strip().split(".")
    try:
        if not equals or not all(parts):
            raise _UnreadableError("write key=value, such as seed=3 or stages.0.epochs=1")
        keys = _resolve(draft.value, parts)
        new = _parse(text, draft.file)
    except _UnreadableError as error:
        draft.mistakes.append(Mistake((), str(error), place))
        return
    # The value replaces what the file says there, and what was wrong with it.
    draft.places = {known: where for known, where in draft.places.items() if known[: len(keys)] != keys}
    draft.mistakes = [mistake for mistake in draft.mistakes if mistake.keys[: len(keys)] != keys]
    draft.mistakes += [Mistake(keys + mistake.keys, mistake.problem, place) for mistake in new.mistakes]
    if draft.value is None:
        draft.value = {}
    container = draft.value
    for depth, key in enumerate(keys[:-1], 1):
        if isinstance(container, dict) and key not in container:
            container[key] = {}
            draft.places[keys[:depth]] = place
        container = container[key]
    container[keys[-1]] = new.value
    draft.places[keys] = place


def _resolve(value: Any, parts: list[str]) -> Keys:
    """The keys that a dotted target means in `value`. Raises _UnreadableError where a part meets nothing."""
    keys: Keys = ()
    for part in parts:
        here = dotted(keys) or "the file"
        if isinstance(value, list):
            index = _item(value, part, here)
            keys, value = (*keys, index), value[index]
        elif isinstance(value, dict) or (value is None and not keys):
            keys, value = (*keys, part), (value or {}).get(part, {})
        else:
            raise _UnreadableError(f"{here} is {shown(value)} and has no fields")
    return keys


def _item(items: list[Any], part: str, here: str) -> int:
    uses = [item.get("use") if isinstance(item, dict) else None for item in items]
    those = [index for index, use in enumerate(uses) if use == part]
    if re.fullmatch(r"[0-9]{1,6}", part) and int(part) < len(items):
        return int(part)
    if len(those) == 1:
        return those[0]
    if those:
        choices = " or ".join(f"{here}.{index}" for index in those)
        raise _UnreadableError(f"{here} has {len(those)} items '{part}'; say {choices}")
    names = {index: use for index, use in enumerate(uses) if isinstance(use, str)}
    listed = ", ".join(f"{index} ({plain(use)})" for index, use in names.items())
    it_has = f"it has {listed or f'{len(items)} items'}"
    raise _UnreadableError(f"{here} has no item '{plain(part)}'" + did_you_mean(part, list(names.values()), it_has))
