"""Which recipes a sweep is made of, and what it is called and refused for."""

import itertools
from pathlib import Path

import pytest

from compress import recipe as recipes
from compress.errors import RecipeError
from compress.sweep.matrix import cell_names, cells, parameter, short_keys

RECIPE = """
name: small
seed: 5
model: {use: mobilenet_v2}
data: {use: digits}
stages:
  - {use: train, epochs: 3}
  - {use: prune, goal: {macs: 0.5}}
  - {use: distill, epochs: 2}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "recipe.yaml"


def test_every_combination_is_the_recipe_that_its_overrides_make(recipe):
    wanted = ["stages.prune.goal.macs=0.25,0.5", "stages.distill.epochs=1,2,3"]
    found = cells(recipe, wanted, ["stages.train.lr=0.1"])
    assert [(cell.recipe.stages[1].goal.macs, cell.recipe.stages[2].epochs) for cell in found] == [
        *itertools.product((0.25, 0.5), (1, 2, 3))
    ]
    for cell in found:
        assert cell.recipe == recipes.load(recipe, cell.overrides)
        assert cell.recipe.stages[0].lr == 0.1
    assert [cell.name for cell in found][:2] == ["macs=0.25_epochs=1", "macs=0.25_epochs=2"]


def test_values_are_yaml_with_lists_mappings_and_quotes(recipe):
    losses = "stages.distill.losses=[{use: kd, temperature: 2}],[{use: kd, temperature: 4}, {use: at}]"
    assert parameter(losses).values == ("[{use: kd, temperature: 2}]", "[{use: kd, temperature: 4}, {use: at}]")
    assert parameter("key='a,b',\"c,d\", e").values == ("'a,b'", '"c,d"', "e")
    assert parameter("key=null,true").values == ("null", "true")
    assert parameter("key=it's,b").values == ("it's", "b")
    first, second = cells(recipe, ["stages.distill.losses=[{use: kd, temperature: 2}],[{use: kd, temperature: 4}]"])
    assert [loss.temperature for cell in (first, second) for loss in cell.recipe.stages[2].losses] == [2, 4]


def test_seeds_count_from_the_recipes_own_and_make_repetitions(recipe):
    found = cells(recipe, ["stages.prune.goal.macs=0.25,0.5"], seeds=3)
    assert [cell.recipe.seed for cell in found] == [5, 6, 7, 5, 6, 7]
    assert len({cell.setting for cell in found}) == 2
    assert [cell.recipe.seed for cell in cells(recipe, [], ["seed=9"][:0], seeds=2)] == [5, 6]


def test_all_mistakes_of_all_combinations_are_said_at_once_and_each_once(recipe):
    with pytest.raises(RecipeError) as caught:
        cells(recipe, ["stages.prune.goal.macs=0.25,7", "stages.distill.temprature=1,2"])
    lines = caught.value.lines
    assert len(lines) == len(set(lines)) == 3
    assert sum("macs=7" in line for line in lines) == 1
    assert sum("temprature" in line for line in lines) == 2


def test_a_mistake_of_a_combination_names_it(recipe):
    with pytest.raises(RecipeError) as caught:
        cells(recipe, ["stages.1.use=prune,export", "stages.train.epochs=1,2"])
    assert any(line.startswith("use=export_epochs=1 and 1 more: ") for line in caught.value.lines)


@pytest.mark.parametrize(
    ("parameters", "overrides", "seeds", "said"),
    [
        (["epochs"], [], None, "write key=value,value"),
        (["stages.train.epochs=1,,2"], [], None, "a value is empty"),
        (["stages.train.epochs=1,2,1"], [], None, "1 is given twice"),
        (["seed=1", "seed=2"], [], None, "-p seed: given 2 times"),
        (["stages.train.epochs=1,2"], ["stages.train.epochs=3"], None, "also set by the override"),
        (["seed=1,2"], [], 3, "the seed is given already"),
        ([], ["seed=1"], 3, "the seed is given already"),
        ([], [], None, "nothing to sweep over"),
        ([f"seed={','.join(map(str, range(1001)))}"], [], None, "1,001 combinations"),
    ],
)
def test_what_is_no_matrix_is_refused(recipe, parameters, overrides, seeds, said):
    with pytest.raises(RecipeError, match=said):
        cells(recipe, parameters, overrides, seeds)


def test_names_are_short_plain_and_all_different():
    assert short_keys(["stages.prune.goal.macs", "seed"]) == {"stages.prune.goal.macs": "macs", "seed": "seed"}
    assert short_keys(["stages.train.lr", "stages.distill.lr"]) == {
        "stages.train.lr": "train.lr",
        "stages.distill.lr": "distill.lr",
    }
    values = ["a/b", "a b", "A-B", "../x", "-1", "1", "ü", "é", "x" * 500, "x" * 501, "[{use: kd}]"]
    names = cell_names([[("a.key", value)] for value in values])
    assert len({name.lower() for name in names}) == len(values)
    for name in names:
        assert name.startswith("key=")
        assert len(name) < 160
        assert not set(name) & set(" /\\'\"[]{}:*?<>|&;$")
    assert names[-1] == "key=use-kd"
    assert names[4] == "key=-1"
