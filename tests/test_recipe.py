"""Every mistake of a recipe at once, with its line; what is right loads, and loads again from its own dump."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError, model_validator

from compress import recipe as recipes
from compress.errors import RecipeError
from compress.models.factory import Factory
from compress.recipe.draft import read
from compress.recipe.explain import explain
from compress.settings import Settings

GOOD = """\
name: demo
seed: 3
model:
  use: mobilenet_v2
  width: 0.5
data: {use: digits}
preprocess:
  size: 32
  mean: [0.5, 0.5, 0.5]
target: local
stages:
  - use: train
    epochs: 2
  - use: prune
    goal: {macs: 0.4}
    criterion: {use: magnitude}
  - use: distill
    losses:
      - use: kd
        temperature: 2
  - use: quantize
  - use: export
  - use: verify
  - use: benchmark
"""
STAGES = "train, prune, distill, quantize, export, verify, benchmark"
KNOWN = STAGES.replace("prune", "prune, factorize, sparsify, cluster").replace("quantize", "quantize, knowledge")
SOURCES = "known: folder, csv, cifar, huggingface, digits, or package.module:function for your own"
KEYS = "name, seed, model, data, preprocess, target, stages, report"

Write = Callable[[str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes demo.yaml where its path is just this name."""
    monkeypatch.chdir(tmp_path)

    def write(text: str | bytes) -> Path:
        path = Path("demo.yaml")
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.fixture
def good(write: Write) -> recipes.Recipe:
    return recipes.load(write(GOOD))


def mistakes(path: Path, overrides: Sequence[str] = ()) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        recipes.load(path, overrides)
    assert str(caught.value) == "\n".join(caught.value.lines)
    return caught.value.lines


def changed(*changes: tuple[str, str]) -> str:
    text = GOOD
    for old, new in changes:
        assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
        text = text.replace(old, new)
    return text


def test_a_recipe_loads_with_its_defaults(write: Write) -> None:
    recipe = recipes.load(write(GOOD))
    assert recipe.name == "demo"
    assert recipe.preprocess.mean == (0.5, 0.5, 0.5)
    assert recipe.preprocess.crop == 0.875
    assert [stage.use for stage in recipe.stages] == STAGES.split(", ")
    assert recipes.load(write("\ufeff" + GOOD)) == recipe
    assert recipes.load(write(GOOD.replace("\n", "\r\n"))) == recipe


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            ("temperature: 2", "temprature: 2"),
            "20: stages.2.losses.0.temprature: unknown field; did you mean 'temperature'? "
            "kd takes weight, active, temperature, standardize",
        ),
        (
            ("temperature: 2", "zzz: 2"),
            "20: stages.2.losses.0.zzz: unknown field; kd takes weight, active, temperature, standardize",
        ),
        (("seed: 3", "sed: 3"), f"2: sed: unknown field; did you mean 'seed'? a recipe takes {KEYS}"),
        (
            ("  - use: prune", "  - use: prun"),
            f"14: stages.1.use: no stage 'prun'; did you mean 'prune'? known: {KNOWN}",
        ),
        (("use: digits", "use: digit"), f"6: data.use: no data 'digit'; did you mean 'digits'? {SOURCES}"),
        (("use: digits", "use: 7"), f"6: data.use: no data 7; {SOURCES}"),
        (("{use: digits}", "digits"), "6: data: must be a mapping such as `use: digits`, not 'digits'"),
        (("{use: digits}", "{}"), f"6: data: no `use` that says which data; {SOURCES}"),
        (("data: {use: digits}\n", ""), "1: data: missing; a recipe needs it"),
        (
            ("use: mobilenet_v2", "use: mobilnet_v2"),
            "4: model.use: no model 'mobilnet_v2'; did you mean 'mobilenet_v2'? `use` must be mobilenet_v2, "
            "torchvision, timm, huggingface, or package.module:factory for a network of your own",
        ),
        (("    goal: {macs: 0.4}\n", ""), "14: stages.1.goal: missing; prune needs it"),
        (("macs: 0.4", "macs: 40"), "15: stages.1.goal.macs: must be below 1, not 40"),
        (("macs: 0.4", "macs: 0"), "15: stages.1.goal.macs: must be above 0, not 0"),
        (("macs: 0.4", "macs: '0.4'"), "15: stages.1.goal.macs: must be a number, not '0.4'; take the quotes away"),
        (("macs: 0.4", "macs: 40%"), "15: stages.1.goal.macs: must be a number, not '40%'"),
        (("macs: 0.4", "macs: null"), "15: stages.1.goal.macs: must be a number, not null"),
        (("macs: 0.4", "macs: .inf"), "15: stages.1.goal.macs: '.inf' is no number to calculate with"),
        (("macs: 0.4", "macs: 1e999"), "15: stages.1.goal.macs: '1e999' is no number to calculate with"),
        (("goal: {macs: 0.4}", "goal: 0.4"), "15: stages.1.goal: must be a mapping, not 0.4"),
        (("epochs: 2", "epochs: 2.0"), "13: stages.0.epochs: must be a whole number, not 2.0"),
        (("epochs: 2", "epochs: true"), "13: stages.0.epochs: must be a whole number, not true"),
        (("epochs: 2", "augment: yes"), "13: stages.0.augment: must be true or false, not 'yes'"),
        (("epochs: 2", "only: classifier.*"), "13: stages.0.only: must be a list, not 'classifier.*'"),
        (
            ("epochs: 2", "optimizer: sdg"),
            "13: stages.0.optimizer: must be 'sgd' or 'adamw', not 'sdg'; did you mean 'sgd'?",
        ),
        (
            ("criterion: {use: magnitude}", "criterion: magnitude"),
            "16: stages.1.criterion: must be a mapping such as `use: magnitude`, not 'magnitude'",
        ),
        (
            ("losses:\n      - use: kd\n        temperature: 2", "losses: []"),
            "18: stages.2.losses: must have at least 1 item, not 0",
        ),
        (("[0.5, 0.5, 0.5]", "[0.5]"), "9: preprocess.mean: must have 3 numbers, one for each of R, G and B, not 1"),
        (
            ("[0.5, 0.5, 0.5]", "[1, 1, 1, 1]"),
            "9: preprocess.mean: must have 3 numbers, one for each of R, G and B, not 4",
        ),
        (("[0.5, 0.5, 0.5]", "[1, a, 1]"), "9: preprocess.mean.1: must be a number, not 'a'"),
        (("[0.5, 0.5, 0.5]", "0.5"), "9: preprocess.mean: must be a list, not 0.5"),
        (
            ("size: 32", "size: 99999999999999999999"),
            "8: preprocess.size: '99999999999999999999' is too large a number",
        ),
        (("seed: 3", "seed: -1"), "2: seed: must be at least 0, not -1"),
        (("seed: 3", "seed: 4294967296"), "2: seed: must be below 4294967296, not 4294967296"),
        (
            ("name: demo", "name: My Demo"),
            "1: name: 'My Demo' does not fit ^[a-z0-9][a-z0-9._-]*$ (Lower-case letters, digits, `.`, `_` and `-`; "
            "results go to `runs/<name>/`)",
        ),
        (("name: demo", "name: " + "x" * 65), "1: name: must have at most 64 characters, not 65"),
        (
            ("name: demo", "name: 2026-11-21"),
            "1: name: 2026-11-21 is a date in YAML; put it in quotes if text is meant",
        ),
        (("name: demo", 'name: "\\ud800"'), "1: name: '\\ud800' holds half a surrogate pair, which is no character"),
        (
            ("target: local", "target: locl"),
            "10: target: 'locl': no such target; did you mean 'local'? known: local, emulated, emulated:cortex-a53, "
            "emulated:cortex-a72, emulated:cortex-a76, ssh://user@host[:port]",
        ),
        (("seed: 3", "seed: 3\nseed: 4"), "3: seed: given twice, first on line 2"),
        (("seed: 3", "seed: !!int x"), "2: seed: 'x' cannot be read as int"),
        (
            ("seed: 3", "seed: " + "1" * 5000),
            "2: seed: '111111111111111111111111111111111111111…' cannot be read as int",
        ),
        (("seed: 3", "1: 2"), "2: 1: a key is text; put it in quotes"),
        (("seed: 3", "? [a]\n: 2"), "2: ?: a key is text, not a list or a mapping"),
        (("seed: 3", "<<: {seed: 3}"), "2: <<: YAML 1.2 has no merge key; write the fields out"),
        (
            ("{use: digits}", "!!python/object/apply:os.system [ls]"),
            "6: data: the tag !!python/object/apply:os.system has no place in a recipe",
        ),
        (
            ("criterion: {use: magnitude}", "epochs: 2"),
            "16: stages.1.epochs: unknown field; did you mean 'finetune.epochs'? prune takes ",
        ),
        (
            ("criterion: {use: magnitude}", "distill: {}"),
            "14: stages.1: `distill` teaches while `finetune` trains: give both, or let a stage `distill` follow",
        ),
        (
            ("criterion: {use: magnitude}", "layer_ratios: {'re:(': 0.5}"),
            "16: stages.1.layer_ratios.re:(: not a regular expression: ",
        ),
        (
            ("criterion: {use: magnitude}", "layer_ratios: {features.3.*: 2}"),
            "16: stages.1.layer_ratios.features.3.*: must be below 1, not 2",
        ),
    ],
)
def test_a_mistake_is_one_line(write: Write, change: tuple[str, str], expected: str) -> None:
    (line,) = mistakes(write(changed(change)))
    # An expectation that ends in a space leaves out what other files may change: a list of fields, Python's own words.
    assert line == f"demo.yaml:{expected}" or (expected.endswith(" ") and line.startswith(f"demo.yaml:{expected}"))


def test_all_mistakes_are_reported_at_once_in_the_order_of_the_file(write: Write) -> None:
    text = changed(
        ("name: demo", "nam: demo"),
        ("seed: 3", "seed: x\nseed: 4"),
        ("use: digits", "use: nowhere"),
        ("epochs: 2", "epochs: -1"),
        ("macs: 0.4", "mac: 0.4"),
        ("temperature: 2", "temprature: 2"),
        ("  - use: export\n", ""),
    )
    assert mistakes(write(text)) == [
        "demo.yaml:1: name: missing; a recipe needs it",
        f"demo.yaml:1: nam: unknown field; did you mean 'name'? a recipe takes {KEYS}",
        "demo.yaml:2: seed: must be a whole number, not 'x'",
        "demo.yaml:3: seed: given twice, first on line 2",
        f"demo.yaml:7: data.use: no data 'nowhere'; {SOURCES}",
        "demo.yaml:14: stages.0.epochs: must be at least 0, not -1",
        "demo.yaml:16: stages.1.goal.macs: missing; goal needs it",
        "demo.yaml:16: stages.1.goal.mac: unknown field; did you mean 'macs'? goal takes macs",
        "demo.yaml:21: stages.2.losses.0.temprature: unknown field; did you mean 'temperature'? "
        "kd takes weight, active, temperature, standardize",
        "demo.yaml:23: stages.4: verify works on exported files; put an `export` before it",
        "demo.yaml:24: stages.5: benchmark works on exported files; put an `export` before it",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", f":1: a recipe is a mapping with {KEYS}; this file is empty"),
        ("# nothing\n", f":1: a recipe is a mapping with {KEYS}; this file is empty"),
        ("- a", f":1: a recipe is a mapping with {KEYS}; this file is a list"),
        ("train", f":1: a recipe is a mapping with {KEYS}; this file is 'train'"),
        ("2026-11-21", ":1: 2026-11-21 is a date in YAML; put it in quotes if text is meant"),
        ("a:\n\tb: 1", ":2: not YAML: a tab where YAML wants spaces"),
        (
            "a: b: c",
            ":1: not YAML: a second `: ` in this line, or wrong indentation; text that holds `: ` needs quotes",
        ),
        (
            "a: [1,\n2",
            ":2: not YAML: expected ',' or ']', but got '<stream end>' while parsing a flow sequence "
            "that begins on line 1",
        ),
        ("a: 'x", ":1: not YAML: found unexpected end of stream while scanning a quoted scalar"),
        ("a: 1\n---\nb: 1", ":2: not YAML: a second document begins here; a recipe is one"),
        ("a: *b", ":1: not YAML: found undefined alias 'b'"),
        ("a: 1\nb: \x07", ":2: not YAML: the character U+0007 is not allowed"),
        (b"a: 1\nb: \xff", ":2: not UTF-8 (byte 0xff); save it as UTF-8"),
        ("[" * 5000, ":1: nested more than 40 deep; no recipe is"),
        ("a: &a [*a]", ":1: nested more than 40 deep; no recipe is"),
        ("a" * 300_000, ": larger than 256 KiB, which no recipe is"),
    ],
)
def test_a_file_without_values_is_one_line(write: Write, text: str | bytes, expected: str) -> None:
    assert mistakes(write(text)) == [f"demo.yaml{expected}"]


def test_files_that_cannot_be_read(write: Write) -> None:
    path = write(GOOD)
    assert mistakes(path.with_name("dmo.yaml")) == ["dmo.yaml: no such file; did you mean 'demo.yaml'?"]
    assert mistakes(Path("x/y/z.yaml")) == ["x/y/z.yaml: no such file"]
    assert mistakes(Path(".")) == [".: cannot be read: Is a directory"]


def test_aliases_are_followed_but_not_without_end(write: Write) -> None:
    shared = changed(
        ("use: train\n    epochs: 2", "use: train\n    only: &some [features.*]"), ("goal:", "keep: *some\n    goal:")
    )
    assert recipes.load(write(shared)).stages[1].keep == ("features.*",)
    laughs = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    )
    assert mistakes(write(laughs)) == ["demo.yaml:1: more than 10000 values, aliases followed; no recipe is that long"]
    anchors = changed(("seed: 3", "seed: &x 3"), ("size: 32", "size: &x 32"), ("epochs: 2", "epochs: *x"))
    assert recipes.load(write(anchors)).stages[0].epochs == 32


# Overrides


def test_overrides_change_the_file(write: Write) -> None:
    path = write(GOOD.replace("preprocess:\n  size: 32\n  mean: [0.5, 0.5, 0.5]\n", ""))
    changes = [
        "seed=5",
        "stages.1.goal.macs=0.25",
        "stages.train.epochs=1",
        "preprocess.size=64",
        "model={use: 'my.net:small', args: {depth: 3}}",
        "model.args.width=1e-3",
        "stages.distill.losses.kd.weight=1",
        "name= other ",
    ]
    recipe = recipes.load(path, changes)
    assert (recipe.seed, recipe.name, recipe.preprocess.size) == (5, "other", 64)
    assert recipe.stages[0].epochs == 1
    assert recipe.stages[1].goal.macs == 0.25
    assert recipe.stages[2].losses[0].weight == 1.0
    assert recipe.model.args == {"depth": 3, "width": 0.001}


def test_an_override_mends_what_the_file_had_wrong(write: Write) -> None:
    text = changed(("seed: 3", "seed: 2026-11-21"), ("epochs: 2", "epochs: many"), ("macs: 0.4", "mac: 0.4"))
    assert recipes.load(write(text), ["seed=1", "stages.0.epochs=1", "stages.prune.goal={macs: 0.5}"]).seed == 1


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=x", "seed: must be a whole number, not 'x'"),
        ("seed=", "seed: must be a whole number, not null"),
        ("sed=1", f"sed: unknown field; did you mean 'seed'? a recipe takes {KEYS}"),
        ("stages.prune.goal.macs=4", "stages.1.goal.macs: must be below 1, not 4"),
        ("stages.1.goal={mac: 2, macs: 0.5}", "stages.1.goal.mac: unknown field; did you mean 'macs'? goal takes macs"),
        ("stages.5={use: verfy}", f"stages.5.use: no stage 'verfy'; did you mean 'verify'? known: {KNOWN}"),
        ("seed=2026-11-21", "seed: 2026-11-21 is a date in YAML; put it in quotes if text is meant"),
        ("seed", "write key=value, such as seed=3 or stages.0.epochs=1"),
        ("=3", "write key=value, such as seed=3 or stages.0.epochs=1"),
        ("stages..epochs=3", "write key=value, such as seed=3 or stages.0.epochs=1"),
        ("seed=[1", "not YAML: expected ',' or ']', but got '<stream end>' while parsing a flow sequence"),
        ("seed.x=1", "seed is 3 and has no fields"),
        (
            "stages.prun.images=1",
            "stages has no item 'prun'; did you mean 'prune'? it has 0 (train), 1 (prune), 2 (distill), 3 (quantize), "
            "4 (export), 5 (verify), 6 (benchmark)",
        ),
        ("preprocess.mean.3=1", "preprocess.mean has no item '3'; it has 3 items"),
    ],
)
def test_a_mistake_in_an_override_names_the_override(write: Write, override: str, expected: str) -> None:
    assert mistakes(write(GOOD), [override]) == [f"override '{override}': {expected}"]


def test_a_use_that_several_stages_have_is_no_address(write: Write) -> None:
    path = write(changed(("  - use: quantize", "  - use: quantize\n  - use: train")))
    assert mistakes(path, ["stages.train.epochs=1"]) == [
        "override 'stages.train.epochs=1': stages has 2 items 'train'; say stages.0 or stages.4"
    ]


def test_long_overrides_are_shortened_and_come_after_the_file(write: Write) -> None:
    lines = mistakes(write(changed(("epochs: 2", "epochs: -1"))), ["seed=" + "9\n" * 50, "name=A"])
    assert lines[0] == "demo.yaml:13: stages.0.epochs: must be at least 0, not -1"
    assert lines[1].startswith("override 'name=A': name: 'A' does not fit")
    assert lines[2].startswith("override 'seed=9 9 9 ")
    assert "…': seed: must be a whole number, not '9 9 9 " in lines[2]
    assert len(lines) == 3


# The order of stages

BEFORE_EXPORT = "works on exported files; put an `export` before it"
OWN_TEACHER = (
    "nothing is pruned or quantized yet, so the teacher `parent` is the student itself; "
    "move this stage down or name another teacher"
)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (STAGES, []),
        ("export benchmark", []),
        ("export verify train export verify", []),
        ("train prune train prune distill quantize train distill export", []),
        ("quantize distill", []),
        (
            "prune distill quantize export export",
            [(4, "the same as stages.3 and nothing changed since; leave one out")],
        ),
        ("export verify export", [(2, "the same as stages.0 and nothing changed since; leave one out")]),
        ("export train export", []),
        (
            "quantize prune",
            [(1, "fake-quantized layers have no room for channel removal; move it before quantize (stages.0)")],
        ),
        (
            "train quantize quantize",
            [(2, "the network is quantized already (stages.1); go on training with `train` or `distill`")],
        ),
        ("distill prune distill", [(0, OWN_TEACHER)]),
        (
            "verify train benchmark export verify",
            [(0, f"verify {BEFORE_EXPORT}"), (2, f"benchmark {BEFORE_EXPORT}")],
        ),
        (
            "export train verify benchmark",
            [
                (
                    2,
                    "stages.1 changed the network after the last export, so the files cannot agree with it; "
                    "put an `export` before verify",
                )
            ],
        ),
    ],
)
def test_order(names: str, expected: list[tuple[int, str]]) -> None:
    stages = [{"use": name} for name in names.replace(",", "").split()]
    assert recipes.order_mistakes(stages) == expected


def test_teachers_that_no_stage_before_left() -> None:
    """A stage may learn from those before it, alone or as one of several, and from none after it."""
    stages = [
        {"use": "train"},
        {"use": "distill", "teacher": {"use": "stage", "folder": "01-train"}},
        {"use": "quantize", "distill": {"teacher": {"use": "several", "teachers": ["parent", {**LATER}]}}},
        {"use": "distill", "teacher": {**LATER}},
    ]
    known = "they are 00-load, 01-train, 02-distill"
    reason = f"no stage `03-quantize` comes before this one; {known}"
    assert recipes.teacher_mistakes(stages) == [(("stages", 2, "distill", "teacher"), reason)]


LATER = {"use": "stage", "folder": "03-quantize"}


def test_layer_weights_are_carried_from_a_stage_before() -> None:
    carried = {"use": "attention", "layer_weights": "carried"}
    stages = [
        {"use": "distill", "losses": [carried, {"use": "kd"}]},
        {"use": "quantize", "distill": {"losses": [carried]}},
    ]
    reason = "no stage before has the loss `attention` whose layers it would weigh; use equal"
    assert recipes.teacher_mistakes(stages) == [(("stages", 0, "losses", 0, "layer_weights"), reason)]


AGAIN = "nothing is pruned before this export, so it would be the parent's file again; leave float out"
NO_INT8 = "no `quantize` comes before this export; put one there, or leave int8 out"
W4A8 = "W4A8 is simulated in training and no runtime here executes it"
PARENT, FLOAT, INT8, SMALL = ({"use": "export", "kinds": [kind]} for kind in ("parent", "float", "int8", "float16"))


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ([PARENT, SMALL], []),
        ([{"use": "export"}], []),
        ([FLOAT, INT8], [((0, 0), AGAIN), ((1, 0), NO_INT8)]),
        ([{"use": "prune"}, FLOAT, {"use": "quantize"}, INT8], []),
        ([{"use": "quantize"}, {"use": "train"}, FLOAT], [((2, 0), AGAIN)]),
        ([INT8, {"use": "quantize"}], [((0, 0), NO_INT8)]),
        ([{"use": "quantize", "weight_bits": 8, "activation_bits": 8}, INT8], []),
        (
            [{"use": "quantize", "weight_bits": 4}, {"use": "export", "kinds": ["float16", "int8"]}],
            [((1, 1), f"{W4A8}; quantize to 8 bits, or leave int8 out")],
        ),
        ([{"use": "quantize", "weight_bits": 4}, {"use": "export", "kinds": None}], []),
        ([{"use": "quantize", "weight_bits": "4"}, INT8], []),  # a mistake of its own, elsewhere
    ],
)
def test_kinds_that_the_stages_before_do_not_make(
    stages: list[dict[str, Any]], expected: list[tuple[tuple[int, int], str]]
) -> None:
    found = [(("stages", stage, "kinds", kind), reason) for (stage, kind), reason in expected]
    assert recipes.kind_mistakes(stages) == found


def test_a_kind_that_is_not_made_has_its_line(write: Write) -> None:
    text = changed(
        ("  - use: prune\n    goal: {macs: 0.4}\n    criterion: {use: magnitude}\n", ""),
        ("  - use: quantize\n", "  - use: quantize\n    activation_bits: 6\n"),
        ("  - use: export\n", "  - use: export\n    kinds:\n      - parent\n      - float\n      - int8\n"),
        ("  - use: distill\n    losses:\n      - use: kd\n        temperature: 2\n", ""),
    )
    expected = [
        f"demo.yaml:19: stages.2.kinds.1: {AGAIN}",
        "demo.yaml:20: stages.2.kinds.2: W8A6 is simulated in training and no runtime here executes it; "
        "quantize to 8 bits, or leave int8 out",
    ]
    assert mistakes(write(text)) == expected
    # They are said of a recipe that has other mistakes as well.
    assert mistakes(write(text.replace("seed: 3", "seed: x")))[1:] == expected


def test_bits_that_no_runtime_has_are_noted_and_bad_ones_explained(write: Write) -> None:
    def quantized(field: str) -> str:
        return changed(("  - use: quantize\n", f"  - use: quantize\n    {field}\n"))

    recipe = recipes.load(write(quantized("weight_bits: 4")))
    assert f"{W4A8}: no int8 file is written" in recipes.notes(recipe)
    assert "04 quantize: weight_bits 4" in recipes.describe(recipe)
    assert not any("simulated" in note for note in recipes.notes(recipes.load(write(GOOD))))
    for field, problem in (
        ("weight_bits: 1", "stages.3.weight_bits: must be at least 2, not 1"),
        ("activation_bits: 9", "stages.3.activation_bits: must be at most 8, not 9"),
        ("weight_bits: '4'", "stages.3.weight_bits: must be a whole number, not '4'; take the quotes away"),
        ("keep_float: head", "stages.3.keep_float: must be a list, not 'head'"),
        ("keep_float: [3]", "stages.3.keep_float.0: must be text, not 3"),
        ("keep_float: ['re:(']", "stages.3.keep_float: `re:(` is no regular expression"),
        ("keep_flot: []", "stages.3.keep_flot: unknown field; did you mean 'keep_float'?"),
    ):
        (line,) = mistakes(write(quantized(field)))
        assert line.startswith(f"demo.yaml:22: {problem}")


def test_a_teacher_of_ones_own_may_teach_at_once() -> None:
    elsewhere = {"teacher": "runs/other/stages/01-train/network"}
    assert recipes.order_mistakes([{"use": "distill", **elsewhere}, {"use": "train", "distill": elsewhere}]) == []
    assert recipes.order_mistakes([{"use": "train", "distill": {}}]) == [(0, OWN_TEACHER)]
    assert recipes.order_mistakes([{"use": "train", "distill": None}]) == []


def test_order_mistakes_have_the_line_of_their_stage(write: Write) -> None:
    text = changed(("  - use: train\n    epochs: 2\n", "  - use: distill\n  - use: verify\n  - use: quantize\n"))
    assert mistakes(write(text)) == [
        f"demo.yaml:12: stages.0: {OWN_TEACHER}",
        f"demo.yaml:13: stages.1: verify {BEFORE_EXPORT}",
        "demo.yaml:15: stages.3: fake-quantized layers have no room for channel removal; "
        "move it before quantize (stages.2)",
        "demo.yaml:22: stages.5: the network is quantized already (stages.2); go on training with `train` or `distill`",
    ]
    assert mistakes(write(GOOD), ["stages.train={use: benchmark}"]) == [
        f"override 'stages.train={{use: benchmark}}': stages.0: benchmark {BEFORE_EXPORT}"
    ]


def test_the_order_holds_for_recipes_made_in_python(good: recipes.Recipe) -> None:
    with pytest.raises(ValidationError, match=r"stages.0: verify works on exported files"):
        recipes.Recipe(**dict(good) | {"stages": good.stages[5:]})


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("train export verify", []),
        ("export verify benchmark", []),
        ("train", ["no stage exports: the run ends with a network and no file for a board"]),
        ("export benchmark", ["no verify follows the last export: the accuracy of its files is not measured"]),
        (
            "export verify quantize train",
            ["changes after the last export are in no exported file: quantize, train"],
        ),
        (
            "export verify quantize export",
            ["no verify follows the last export: the accuracy of its files is not measured"],
        ),
    ],
)
def test_notes(write: Write, names: str, expected: list[str]) -> None:
    stages = ", ".join(f"{{use: {name}}}" for name in names.split())
    assert recipes.notes(recipes.load(write(GOOD), [f"stages=[{stages}]"])) == expected


# What a recipe becomes


def every_recipe() -> list[Path]:
    return sorted(Path(__file__).parents[1].joinpath("recipes").rglob("*.yaml"))


def test_every_published_recipe_loads_fits_the_schema_and_survives_its_dump(tmp_path: Path) -> None:
    assert every_recipe(), "recipes/ holds no recipe"
    validator = jsonschema.Draft202012Validator(recipes.schema())
    for path in every_recipe():
        recipe = recipes.load(path)
        validator.validate(read(path).value)
        validator.validate(recipe.model_dump(mode="json"))
        resolved = tmp_path / "resolved.yaml"
        resolved.write_text(recipes.dump(recipe), encoding="utf-8")
        assert recipes.load(resolved) == recipe


def test_the_schema_is_valid_and_tells_right_from_wrong(write: Write) -> None:
    schema = recipes.schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["title"] == "Recipe for compress"
    assert all(schema["properties"][key].get("description") for key in KEYS.split(", "))
    validator = jsonschema.Draft202012Validator(schema)
    good = recipes.load(write(GOOD)).model_dump(mode="json")
    assert validator.is_valid(good)
    assert not validator.is_valid(good | {"sed": 1})
    assert not validator.is_valid(good | {"stages": [{"use": "prun"}]})
    assert not validator.is_valid(good | {"data": {"use": "digits", "workers": -1}})
    assert not validator.is_valid(good | {"name": "My Demo"})
    del good["model"]
    assert not validator.is_valid(good)


def test_the_hash_is_of_the_settings_and_not_of_their_spelling(write: Write) -> None:
    path = write(GOOD)
    recipe = recipes.load(path)
    same = [
        [],
        ["name=other"],
        ["preprocess.crop=0.875"],
        ["stages.distill.losses.0={weight: 0.9, temperature: 2.0, use: kd}"],
    ]
    assert {recipes.recipe_hash(recipes.load(path, overrides)) for overrides in same} == {recipes.recipe_hash(recipe)}
    other = [["seed=4"], ["stages.prune.goal.macs=0.41"], ["preprocess.crop=1"], ["stages.train.epochs=3"]]
    assert len({recipes.recipe_hash(recipes.load(path, overrides)) for overrides in [[], *other]}) == 5


def test_a_masked_dump_knows_secrets_before_they_are_quoted(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", 'it\'s "my" secret')
    model = {"use": "a:b", "args": {"token": os.environ["HF_TOKEN"]}}
    recipe = recipes.load(write(GOOD)).model_copy(update={"model": Factory.model_validate(model)})
    assert "secret" in recipes.dump(recipe)
    assert "secret" not in recipes.dump(recipe, masked=True)


def test_a_dump_reads_well(good: recipes.Recipe) -> None:
    text = recipes.dump(good)
    assert text.startswith("name: demo\nseed: 3\nmodel:\n  use: mobilenet_v2\n  width: 0.5\n")
    assert "  mean: [0.5, 0.5, 0.5]\n" in text
    assert "  - use: prune\n    goal:\n      macs: 0.4\n" in text
    assert "\n    ema: null\n" in text


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    # Surrogates and the noncharacters U+FFFE and U+FFFF cannot stand in a YAML file.
    | st.text(st.characters(codec="utf-8"), max_size=20)
    | st.sampled_from(
        [
            "yes",
            "null",
            "~",
            "1e3",
            "0x10",
            "2026-11-21",
            "<<",
            "=",
            "a: b",
            "- a",
            "#",
            "'",
            '"',
            "\n",
            " ",
            "%",
            "&a",
            "*a",
        ]
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(args=st.dictionaries(st.text(st.characters(codec="utf-8"), min_size=1, max_size=8), json_values, max_size=4))
def test_any_value_survives_its_dump(write: Write, good: recipes.Recipe, args: dict[str, Any]) -> None:
    recipe = good.model_copy(update={"model": Factory(use="a:b", args=args)})
    again = recipes.load(write(recipes.dump(recipe)))
    assert again == recipe
    assert recipes.recipe_hash(again) == recipes.recipe_hash(recipe)


def test_describe_says_what_is_not_default(good: recipes.Recipe) -> None:
    lines = recipes.describe(good)
    assert lines[0] == "01 train: epochs 2"
    assert lines[2] == "03 distill: losses [{use: kd, temperature: 2.0}]"
    assert [line.split()[1].rstrip(":") for line in lines] == STAGES.split(", ")


# Explanations know no settings class by name


class Circle(Settings):
    use: Literal["circle"]
    radius: float = Field(gt=0)


class Square(Settings):
    use: Literal["square", "box"]
    side: float
    turned: Literal["no"] | int | tuple[int, ...] = "no"


class Named(Settings):
    use: str = Field(pattern=":")
    size: int = 0


class ByShare(Settings):
    share: float


class ByCount(Settings):
    count: int
    least: int = 0


class Nested(Settings):
    shapes: tuple[Annotated[Circle | Square, Field(discriminator="use")], ...] = ()


class Everything(Settings):
    shape: Circle | Square | Named | None = None
    goal: ByShare | ByCount | None = None
    tree: dict[str, Nested] = Field(default_factory=dict)
    pair: tuple[int, str] = (0, "")

    @model_validator(mode="after")
    def _never_both(self) -> Everything:
        if self.shape and self.goal:
            raise ValueError("shape or goal,\nnot both")
        return self


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"shape": {"use": "circle", "radius": 0}}, ["shape.radius: must be above 0, not 0"]),
        ({"shape": {"use": "a:b", "size": "x"}}, ["shape.size: must be a whole number, not 'x'"]),
        ({"shape": {"use": "a:b", "sise": 1}}, ["shape.sise: unknown field; did you mean 'size'? a:b takes size"]),
        (
            {"shape": {"use": "circel", "radius": 1}},
            ["shape.use: no shape 'circel'; did you mean 'circle'? known: circle, square, box"],
        ),
        ({"shape": {}}, ["shape: no `use` that says which shape; known: circle, square, box"]),
        ({"shape": 3}, ["shape: must be a mapping, not 3"]),
        ({"goal": {"share": "x"}}, ["goal.share: must be a number, not 'x'"]),
        ({"goal": {"count": 1.5, "least": 0}}, ["goal.count: must be a whole number, not 1.5"]),
        ({"goal": 3}, ["goal: must be a mapping, not 3"]),
        (
            {"tree": {"shapes": {"shapes": [{"use": "box", "sde": 1, "side": 2}]}}},
            ["tree.shapes.shapes.0.sde: unknown field; did you mean 'side'? box takes side, turned"],
        ),
        (
            {"shape": {"use": "box", "side": 1, "turned": "yes"}},
            ["shape.turned: must be 'no' or a whole number or a list, not 'yes'"],
        ),
        (
            {"shape": {"use": "box", "side": 1, "turned": [1, "x"]}},
            ["shape.turned.1: must be a whole number, not 'x'"],
        ),
        ({"pair": [1, 2]}, ["pair.1: must be text, not 2"]),
        ({"pair": []}, ["pair: must have 2 items, not 0"]),
        ({"shape": {"use": "a:b"}, "goal": {"share": 1}}, [": shape or goal, not both"]),
    ],
)
def test_explanations_follow_the_annotations(data: dict[str, Any], expected: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        Everything.model_validate_json(json.dumps(data))
    found = explain(Everything, caught.value.errors(), data)
    assert list(dict.fromkeys(f"{'.'.join(map(str, keys))}: {problem}" for keys, problem in found)) == expected


# Whatever the file holds, it is a recipe or a list of mistakes


def outcome(path: Path, overrides: Sequence[str]) -> recipes.Recipe | list[str]:
    try:
        return recipes.load(path, overrides)
    except RecipeError as error:
        return error.lines


def check_that_it_loads_or_says_why(path: Path, overrides: Sequence[str] = ()) -> None:
    result = outcome(path, overrides)
    if isinstance(result, list):
        assert result
        assert all(line.isprintable() and line.startswith(("demo.yaml:", "override '")) for line in result)
        return
    path.write_text(recipes.dump(result), encoding="utf-8")
    assert recipes.load(path) == result
    assert all(line.isprintable() for line in recipes.describe(result))
    recipes.notes(result)


SNIPPETS = [
    *"\n\t :-[]{},&*!|>'\"%@`#?~=<01\x00\x85\ufeffé\U0001f600",
    *(
        "  - ",
        "use: ",
        "train",
        "kd",
        "null",
        "true",
        "-1",
        "1e9",
        ".nan",
        "2026-11-21",
        "&a ",
        "*a",
        "!!set ",
        "<<: *a",
    ),
    *("--- ", "%YAML 1.1\n---\n"),
]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(GOOD)), st.integers(0, 12), st.sampled_from(SNIPPETS)), min_size=1, max_size=4
    )
)
def test_a_recipe_with_random_edits(write: Write, edits: list[tuple[int, int, str]]) -> None:
    text = GOOD
    for at, length, new in edits:
        text = text[:at] + new + text[at + length :]
    check_that_it_loads_or_says_why(write(text))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode(errors="surrogatepass")))
def test_random_bytes(write: Write, raw: bytes) -> None:
    check_that_it_loads_or_says_why(write(raw))


def addresses(value: Any, keys: tuple[str, ...] = ()) -> list[str]:
    """Every dotted key of a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    inner = [address for key, item in items for address in addresses(item, (*keys, str(key)))]
    return [".".join(keys), *inner] if keys else inner


@pytest.mark.parametrize("value", ["[]", "{}", "[1]", "{a: 1}", "null", "3"])
@pytest.mark.parametrize(
    "address", ["model.use", "stages.2.use", "stages.2.losses.0.use", "stages.2.teacher.use", "target"]
)
def test_a_name_that_is_no_text_is_a_mistake(write: Write, address: str, value: str) -> None:
    with pytest.raises(RecipeError):
        recipes.load(write(GOOD), [f"{address}={value}"])


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_recipe_with_values_of_any_kind(write: Write, good: recipes.Recipe, data: st.DataObject) -> None:
    path = write(GOOD)
    known = addresses(good.model_dump(mode="json"))
    address = st.sampled_from(known) | st.sampled_from(known).map(lambda key: f"{key}x") | st.text(max_size=8)
    value = json_values.map(json.dumps) | st.sampled_from(SNIPPETS) | st.text(max_size=8)
    overrides = data.draw(st.lists(st.tuples(address, value).map("=".join), min_size=1, max_size=3))
    check_that_it_loads_or_says_why(path, overrides)
