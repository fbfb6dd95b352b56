"""YAML constructs no objects, and no recipe costs more time or memory than its size allows."""

import resource
import time

import pytest

from compress import recipe as recipes
from compress.errors import RecipeError

VALID = """
name: x
model: {use: mobilenet_v2}
data: {use: digits}
preprocess: {size: 32}
stages:
  - {use: train, epochs: 1}
"""

OBJECTS = [
    "!!python/object/apply:os.system ['touch MARK']",
    "!!python/object/new:os.system ['touch MARK']",
    "!!python/object:pathlib.Path {}",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!python/tuple [1, 2]",
    "!!binary aGVsbG8=",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "!include /etc/passwd",
    "!ENV HOME",
    "!<tag:yaml.org,2002:python/object/apply:os.system> ['touch MARK']",
]


@pytest.mark.parametrize("text", OBJECTS)
@pytest.mark.parametrize("place", ["name: {}", "seed: {}", "model: {}", "stages: [{}]", "{}"])
def test_tags_construct_nothing(text, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(place.replace("{}", text) + "\n")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(RecipeError) as caught:
        recipes.load(recipe)
    assert "recipe.yaml" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("text", OBJECTS)
def test_overrides_construct_nothing(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(VALID)
    with pytest.raises(RecipeError):
        recipes.load(tmp_path / "recipe.yaml", [f"name={text}"])
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def laughs(levels: int, each: int) -> str:
    lines = ["a0: &a0 [lol, lol]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * each)}]" for k in range(1, levels)]
    return "\n".join([*lines, f"stages: *a{levels - 1}", VALID])


BOMBS = {
    "billion laughs": laughs(10, 10),
    "mappings of mappings": "a: &a {x: 1}\nb: &b {x: *a, y: *a}\n"
    + "\n".join(f"{chr(c)}: &{chr(c)} {{x: *{chr(c - 1)}, y: *{chr(c - 1)}}}" for c in range(ord("c"), ord("z"))),
    "within itself": "stages: &s [*s]\n",
    "deep lists": "stages: " + "[" * 5000 + "]" * 5000,
    "deep mappings": "\n".join("  " * depth + "a:" for depth in range(500)),
    "merge keys": "a: &a {b: 1}\nc: {<<: [" + ", ".join(["*a"] * 5000) + "]}\n",
    "many keys": "\n".join(f"k{number}: 1" for number in range(20000)),
    "long scalar": "name: " + "x" * 250_000,
    "larger than any recipe": "name: " + "x" * 1_000_000,
    "large number": "seed: " + "9" * 200_000,
    "large octal": "seed: 0o" + "7" * 200_000,
    "exponent": "seed: 1e999999999",
    "quotes": "name: '" + "''" * 100_000 + "'",
    "anchors": "\n".join(f"- &a{number} x" for number in range(20000)),
    "escapes": 'name: "' + "\\x41" * 50_000 + '"',
}


LONG = {"many keys", "anchors", "deep lists"}
"""Seconds of an idle core each."""


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in BOMBS])
def test_a_bomb_is_refused_in_seconds_and_little_memory(name, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(BOMBS[name])
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RecipeError) as caught:
        recipes.load(path)
    assert time.process_time() - began < 15
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300e3  # KiB
    assert all(len(line) < 2000 for line in str(caught.value).splitlines())


def test_text_of_a_recipe_cannot_act_on_a_terminal(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text('name: "\\x1b[2J\\x1b]0;owned\\x07"\n"\\x1b[31mkey": 1\n' + VALID.replace("name: x", ""))
    with pytest.raises(RecipeError) as caught:
        recipes.load(path)
    assert "\x1b" not in str(caught.value)
    assert "\x07" not in str(caught.value)
