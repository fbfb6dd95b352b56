"""The tree of a sweep: each stage once, nothing before what it needs, what is timed last and alone."""

import itertools
import json

import pytest

from compress.recipe import Recipe
from compress.sweep.steps import Step, steps

TRAIN, PRUNE, EXPORT = {"use": "train"}, {"use": "prune", "goal": {"macs": 0.5}}, {"use": "export"}
TIMED = {"use": "benchmark"}


def recipe(*stages: dict, seed: int = 0, threads: int = 1) -> Recipe:
    made = [{**stage, "threads": threads} if stage["use"] == "benchmark" else stage for stage in stages]
    model = {"use": "mobilenet_v2"}
    values = {"name": "x", "seed": seed, "model": model, "data": {"use": "digits"}, "stages": made}
    return Recipe.model_validate_json(json.dumps(values))


def pruned(macs: float) -> dict:
    return {"use": "prune", "goal": {"macs": macs}}


def computed(recipes: list[Recipe], found: list[Step]) -> list[tuple]:
    """Goes through the steps as workers would, with a store by what decides a result; what was computed, in order."""
    reached = [0] * len(recipes)
    store, order = set(), []
    for step in found:
        own = recipes[step.cell]
        until = len(own.stages) if step.until is None else step.until
        for number in range(reached[step.cell], until + 1):
            head = own.model_dump_json(include={"seed", "model", "data"})
            known = (head, *(stage.model_dump_json() for stage in own.stages[:number]))
            timed = number and own.stages[number - 1].use == "benchmark"
            if timed:
                assert step.alone
            if known not in store or timed:
                order.append(known)
                store.add(known)
        reached[step.cell] = until
    assert reached == [len(own.stages) for own in recipes]
    return order


CASES = {
    "one": [recipe(TRAIN)],
    "branch": [recipe(TRAIN, pruned(macs), EXPORT) for macs in (0.25, 0.5, 0.75)],
    "first stage": [recipe({"use": "train", "epochs": epochs}, EXPORT) for epochs in (1, 2)],
    "seeds": [recipe(TRAIN, pruned(macs), seed=seed) for macs in (0.25, 0.5) for seed in (0, 1)],
    "deep": [
        recipe(TRAIN, pruned(macs), {"use": "distill", "epochs": epochs}, EXPORT, TIMED)
        for macs in (0.25, 0.5)
        for epochs in (1, 2, 3)
    ],
    "only timed": [recipe(TRAIN, EXPORT, TIMED, threads=threads) for threads in (1, 2)],
    "one ends early": [recipe(TRAIN), recipe(TRAIN, PRUNE), recipe(TRAIN, PRUNE, EXPORT)],
    "trains after": [recipe(TRAIN, EXPORT, TIMED, {"use": "train", "epochs": epochs}) for epochs in (1, 2)],
    "twice the same": [recipe(TRAIN, EXPORT), recipe(TRAIN, EXPORT)],
}


@pytest.mark.parametrize("recipes", CASES.values(), ids=CASES)
def test_every_cell_is_finished_and_nothing_but_what_is_timed_is_computed_twice(recipes):
    found = steps(recipes)
    order = [stage for stage in computed(recipes, found) if '"use":"benchmark"' not in stage[-1]]
    assert len(order) == len(set(order))


@pytest.mark.parametrize("recipes", CASES.values(), ids=CASES)
def test_no_two_steps_that_may_work_at_once_want_the_same_stage(recipes):
    """A step waits for the one that computes what it shares with another; so no worker waits for a worker."""
    found = steps(recipes)

    def before(number: int) -> set[int]:
        after = found[number].after
        return set() if after is None else {after} | before(after)

    def ahead(number: int) -> set[tuple]:
        """What the step would compute, given what those before it have."""
        order = computed_by(recipes, found, before(number))
        return set(computed_by(recipes, found, before(number) | {number})) - set(order)

    for one, other in itertools.combinations(range(len(found)), 2):
        apart = one in before(other) or other in before(one) or found[one].alone or found[other].alone
        shared = {stage for stage in ahead(one) & ahead(other) if len(stage) > 1} if not apart else set()
        assert not shared


def computed_by(recipes: list[Recipe], found: list[Step], numbers: set[int]) -> list[tuple]:
    done = set()
    for number in sorted(numbers):
        own = recipes[found[number].cell]
        until = len(own.stages) if found[number].until is None else found[number].until
        head = own.model_dump_json(include={"seed", "model", "data"})
        for last in range(until + 1):
            done.add((head, *(stage.model_dump_json() for stage in own.stages[:last])))
    return sorted(done)


def test_steps_wait_only_for_earlier_ones_and_what_is_timed_comes_last():
    found = steps(CASES["deep"])
    assert all(step.after is None or step.after < number for number, step in enumerate(found))
    assert [step.alone for step in found] == sorted(step.alone for step in found)
    assert [step.cell for step in found if step.alone] == [*range(6)]
    roots = [step for step in found if step.after is None]
    assert roots == [Step(0, 1, None)], "the parent is trained once, before anything else"


def test_the_machine_that_measures_does_not_part_what_is_trained():
    recipes = [CASES["deep"][0], CASES["deep"][0].model_copy(update={"target": "ssh://user@host"})]
    shared = [step for step in steps(recipes) if step.after is None]
    assert len(shared) == 1
