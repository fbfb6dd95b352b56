"""Pydantic's errors in plain words, at the keys a recipe's author wrote.

Known names, fields and what a field says of itself come from the annotations of the settings classes, so a new stage or
loss needs nothing here. Pydantic tells the members of a union apart in an error's location; they are taken out.
"""

from __future__ import annotations

import re
import types
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, Tag

from compress.recipe.words import Keys, did_you_mean, plain, shown
from compress.settings import SEVERAL

WANTS = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "path_type": "a path",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "list_type": "a list",
    "tuple_type": "a list",
    "literal_error": "{expected}",
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "multiple_of": "a multiple of {multiple_of}",
}
"""What a value must be, by the type of error. Where all members of a union fail, these are joined by `or`."""


@dataclass(frozen=True)
class _Spot:
    """Where an error is, and what is declared there."""

    keys: Keys
    annotation: Any
    """Of the value; None where nothing is declared."""
    owner: type[BaseModel] | None
    """The innermost settings class on the way; None if it cannot be told."""
    hint: str
    """What the innermost field says of itself."""
    siblings: int
    """Length of the innermost list, where that is fixed."""
    members: Mapping[Keys, str]
    """Unions on the way, each with the member that pydantic tried."""


_Found = tuple[Mapping[str, Any], _Spot]
"""An error (entries of pydantic's ErrorDetails) and its place."""


def explain(root: type[BaseModel], errors: Iterable[Mapping[str, Any]], data: Any) -> Iterator[tuple[Keys, str]]:
    """(keys, problem) of each mistake that made `data`, parsed from JSON, no `root`."""
    found = [(error, _spot(root, error["loc"])) for error in errors]
    by_keys: dict[Keys, list[_Found]] = {}
    for error, spot in _settle_unions(root, found, data):
        by_keys.setdefault(_pointed_at(error, spot), []).append((error, spot))
    for keys, group in by_keys.items():
        if all(error["type"] in WANTS and not _chooses(spot) for error, spot in group):
            yield keys, _must_be([_want(error) for error, _ in group], group[0][0]["input"])
            continue
        for error, spot in group:
            if error["type"] == SEVERAL:
                yield from ((keys + inner, problem) for inner, problem in error["ctx"]["mistakes"])
            elif problem := _problem(error, spot, data):
                yield keys, problem


def uses(annotation: Any) -> list[str]:
    """The names that `use` may have in a value of this type."""
    return [name for settings in kinds(annotation) for name in _literals(settings)]


# Annotations


def _spot(root: type[BaseModel], location: Sequence[str | int]) -> _Spot:
    keys: Keys = ()
    annotation: Any = root
    owner: type[BaseModel] | None = root
    hint, siblings = "", 0
    origin: Any = None
    members: dict[Keys, str] = {}
    for step in location:
        alternatives = _alternatives(annotation)
        if len(alternatives) > 1:
            members[keys] = members.get(keys, "") + str(step)
            annotation = _member(alternatives, str(step))
            continue
        if step == "[key]" and origin is dict:
            continue  # The mistake is in the key itself.
        keys = (*keys, step)
        annotation = alternatives[0] if alternatives else None
        origin, inner = get_origin(annotation), get_args(annotation)
        if _is_settings(annotation):
            owner = annotation
            declared = annotation.model_fields.get(step)
            annotation = declared.annotation if declared else None
            hint = (declared.description or "") if declared else ""
        elif origin in (tuple, list):
            siblings = len(inner)
            each = isinstance(step, int) and step < len(inner) and inner[-1] is not ...
            annotation = inner[int(step)] if each else inner[0]
        elif origin is dict:
            annotation = inner[1]
        else:
            annotation = owner = None
    return _Spot(keys, annotation, owner, hint, siblings, members)


def _alternatives(annotation: Any) -> list[Any]:
    """The members of a union, null left out; any other type alone."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) not in (Union, types.UnionType):
        return [] if annotation is None else [annotation]
    members = [member for member in get_args(annotation) if member is not types.NoneType]
    return _alternatives(members[0]) if len(members) == 1 else members


def kinds(annotation: Any) -> list[type[BaseModel]]:
    """All settings classes that a value of this type may be, those of unions in unions too."""
    members = _alternatives(annotation)
    if len(members) > 1:
        return [settings for member in members for settings in kinds(member)]
    return [member for member in members if _is_settings(member)]


def _is_settings(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _literals(settings: type[BaseModel]) -> tuple[str, ...]:
    use = settings.model_fields.get("use")
    return get_args(use.annotation) if use and get_origin(use.annotation) is Literal else ()


def _member(alternatives: list[Any], label: str) -> Any:
    """The member of a union that pydantic calls `label`: its `use`, its Tag, its class, or a union in the union."""
    for alternative in alternatives:
        tags = [extra.tag for extra in get_args(alternative)[1:] if isinstance(extra, Tag)]
        for settings in kinds(alternative):
            if label in (*tags, *_literals(settings), settings.__name__):
                return settings
    return next((inner for inner in alternatives if len(_alternatives(inner)) > 1), None)


def _chooses(spot: _Spot) -> bool:
    """Whether the value there is one of several settings classes, told apart by `use`."""
    return len(kinds(spot.annotation)) > 1 and bool(uses(spot.annotation))


def _settle_unions(root: type[BaseModel], found: list[_Found], data: Any) -> list[_Found]:
    """The errors, without those of members that pydantic tried but nobody meant (unions without a discriminator)."""
    for union in sorted({keys for _, spot in found for keys in spot.members}, key=len):
        rest = [pair for pair in found if union not in pair[1].members]
        tried = [pair for pair in found if union in pair[1].members]
        # A member that got as far as its own fields or items is of the right shape.
        deeper = [pair for pair in tried if len(pair[1].keys) > len(union)]
        if not deeper or len({spot.members[union] for _, spot in tried}) == 1:
            continue
        others = {spot.members[union] for _, spot in deeper if spot.keys == (*union, "use")}
        meant = [pair for pair in deeper if pair[1].members[union] not in others]
        if meant:
            counts = Counter(spot.members[union] for _, spot in meant)
            fewest = min(counts, key=counts.__getitem__)
            found = rest + [pair for pair in meant if pair[1].members[union] == fewest]
        else:
            wrong = {"type": "union_tag_invalid", "input": _at(data, union)}
            found = [*rest, (wrong, _spot(root, union))]
    return found


# Words


def _pointed_at(error: Mapping[str, Any], spot: _Spot) -> Keys:
    """The keys a sentence begins with: a wrong `use`, or a list that is too short rather than its missing item."""
    if _chooses(spot) and _use(error["input"]) is not None:
        return (*spot.keys, "use")
    if error["type"] == "missing" and isinstance(spot.keys[-1], int):
        return spot.keys[:-1]
    return spot.keys


def _problem(error: Mapping[str, Any], spot: _Spot, data: Any) -> str:
    """What is wrong and what would be right; empty for a mere echo of another error."""
    value, ctx = error["input"], error.get("ctx", {})
    match error["type"]:
        case "missing" if isinstance(spot.keys[-1], int):
            return f"must have {spot.siblings} items, not {len(value)}"
        case "missing":
            return f"missing; {_owner_name(spot, data)} needs it"
        case "extra_forbidden":
            return "unknown field" + _fields(spot, data)
        case "union_tag_invalid" | "union_tag_not_found" | "dict_type" | "model_attributes_type":
            return _wrong_use(spot, value)
        case _ if _chooses(spot):
            return _wrong_use(spot, value, error["msg"])
        case "too_short" | "too_long" | "string_too_short" | "string_too_long":
            return _wrong_length(value, ctx.get("min_length"), ctx.get("max_length"))
        case "string_pattern_mismatch":
            why = f" ({plain(spot.hint).rstrip('.')})" if spot.hint else ""
            return f"{shown(value)} does not fit {ctx['pattern']}{why}"
        case "value_error" | "assertion_error":
            return plain(str(ctx["error"]))
        case _:
            return plain(f"{error['msg']}, not {shown(value)}")


def _wrong_use(spot: _Spot, value: Any, known_text: str = "") -> str:
    """No mapping, or one whose `use` is unknown; `known_text` says what is known where a list of names cannot."""
    known, noun = uses(spot.annotation), _noun(spot.keys)
    if not isinstance(value, dict):
        example = value if value in known else known[0]
        return f"must be a mapping such as `use: {example}`, not {shown(value)}"
    listed = known_text or f"known: {', '.join(known)}"
    if "use" not in value:
        return f"no `use` that says which {noun}; {listed}"
    return f"no {noun} {shown(value['use'])}" + did_you_mean(value["use"], known, listed)


def _noun(keys: Keys) -> str:
    """What an item is called by the name of its list: stages -> stage, losses -> loss."""
    name = next((key for key in reversed(keys) if isinstance(key, str)), "recipe")
    return re.sub(r"(?<=ss)es$|(?<!s)s$", "", name)


def _fields(spot: _Spot, data: Any) -> str:
    """Behind an unknown field: the nearest one, or one of that name further in, and all that there are."""
    if spot.owner is None:
        return ""
    name = str(spot.keys[-1])
    fields = {key: declared for key, declared in spot.owner.model_fields.items() if key != "use"}
    takes = f"{_owner_name(spot, data)} takes {', '.join(fields) or 'no field'}"
    for key, declared in fields.items():
        if any(name in settings.model_fields for settings in kinds(declared.annotation)):
            return f"; did you mean '{key}.{name}'? {takes}"
    return did_you_mean(name, list(fields), takes)


def _owner_name(spot: _Spot, data: Any) -> str:
    """What the innermost mapping calls itself: its `use`, or the key it stands under."""
    keys = spot.keys[:-1]
    under = next((key for key in reversed(keys) if isinstance(key, str)), "a recipe")
    return plain(str(_use(_at(data, keys)) or under))


def _wrong_length(value: Any, low: int | None, high: int | None) -> str:
    if low is not None and len(value) >= low:
        return ""  # Items that failed do not count for pydantic, but they are there.
    bound, limit = ("at most", high) if low is None else ("at least", low)
    unit = "character" if isinstance(value, str) else "item"
    return f"must have {bound} {limit} {unit}{'' if limit == 1 else 's'}, not {len(value)}"


def _want(error: Mapping[str, Any]) -> str:
    # Pydantic makes 0.0 of the bound `gt=0` where the field is a float.
    context = error.get("ctx", {}).items()
    bounds = {name: f"{bound:g}" if isinstance(bound, float) else bound for name, bound in context}
    return WANTS[error["type"]].format_map(bounds)


def _must_be(wants: list[str], value: Any) -> str:
    alternatives = " or ".join(dict.fromkeys(wants))
    hint = did_you_mean(value, re.findall(r"'([^']*)'", alternatives))
    if isinstance(value, str) and "number" in alternatives and re.fullmatch(r"[-+0-9.eE]*[0-9.]", value):
        hint = "; take the quotes away"
    return f"must be {alternatives}, not {shown(value)}{hint}"


def _at(data: Any, keys: Keys) -> Any:
    for key in keys:
        data = data[key]
    return data


def _use(value: Any) -> Any:
    return value.get("use") if isinstance(value, dict) else None
