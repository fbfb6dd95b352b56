"""Several teachers as one: means against numpy, draws that repeat, maps of another teacher."""

import math
from dataclasses import replace
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from conftest import SmallNet, randomized
from pydantic import TypeAdapter, ValidationError
from ruamel.yaml import YAML
from torch import Tensor, nn

from compress import checkpoint, recipe
from compress.errors import ModelError, RecipeError
from compress.losses.kd import soft_targets
from compress.observation import Answers
from compress.product import Batch, Network, Product, Run
from compress.stages.distill import Distill
from compress.teachers import TeacherSettings, changes, everyone, has_features, stages_named
from compress.teachers.several import Ensemble, Several, mean_log_probabilities, mean_logits
from compress.teaching import Distillation, objective


def parsed(value: Any) -> Any:
    return TypeAdapter(TeacherSettings).validate_python(value)


class Fixed:
    """A teacher that says the same to every batch and remembers what it was asked."""

    related = True

    def __init__(self, logits_NK: Tensor, fingerprint: str | None = "x") -> None:
        self.logits_NK, self.fingerprint = logits_NK, fingerprint
        self.network: Network | None = Network(nn.Identity(), None)  # type: ignore[arg-type]
        self.asked, self.followed = [], 0

    def answers(self, batch: Batch, layers: Any, *, differentiable: bool = False) -> Answers:
        self.asked.append((tuple(layers), differentiable))
        return Answers(self.logits_NK, dict.fromkeys(layers, self.logits_NK))

    def follow(self, student: nn.Module, batch: Batch) -> None:
        self.followed += 1


def fixed(count: int = 3) -> list[Fixed]:
    random = np.random.default_rng(0)
    return [Fixed(torch.from_numpy(random.normal(0, 3, (4, 5))), f"print {number}") for number in range(count)]


@pytest.fixture
def batch(run: Run) -> Batch:
    return next(iter(run.data.batches("train", batch_size=4)))


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def test_means_against_numpy():
    logits_MNK = np.random.default_rng(1).normal(0, 4, (3, 6, 5))
    for weights in ([1, 1, 1], [0.2, 3.0, 0.7], [0, 1, 4]):
        shares = np.asarray(weights) / np.sum(weights)
        given = [torch.from_numpy(logits) for logits in logits_MNK]
        arithmetic = np.einsum("m,mnk->nk", shares, softmax(logits_MNK))
        np.testing.assert_allclose(mean_log_probabilities(given, weights).numpy(), np.log(arithmetic), rtol=1e-12)
        np.testing.assert_allclose(torch.softmax(mean_log_probabilities(given, weights), 1).numpy(), arithmetic)
        np.testing.assert_allclose(mean_logits(given, weights), np.einsum("m,mnk->nk", shares, logits_MNK), atol=1e-12)
        geometric = np.prod(softmax(logits_MNK) ** shares[:, None, None], axis=0)
        geometric /= geometric.sum(1, keepdims=True)
        np.testing.assert_allclose(torch.softmax(mean_logits(given, weights), 1).numpy(), geometric)


def test_means_by_hand_and_at_the_limits():
    sure, opposite = torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([[math.log(3.0), 0.0]])
    torch.testing.assert_close(mean_log_probabilities([sure, opposite], [1, 1]).exp(), torch.tensor([[0.5, 0.5]]))
    torch.testing.assert_close(mean_log_probabilities([sure, opposite], [3, 1]).exp(), torch.tensor([[0.375, 0.625]]))
    torch.testing.assert_close(mean_logits([sure, opposite], [2, 2]), torch.full((1, 2), math.log(3.0) / 2))
    alone = mean_log_probabilities([sure, opposite], [0, 7])
    torch.testing.assert_close(alone, torch.log_softmax(opposite, 1))
    far = [torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]])]
    torch.testing.assert_close(mean_log_probabilities(far, [1, 1]).exp(), torch.tensor([[0.5, 0.5]]))
    infinite = torch.tensor([[float("inf"), 0.0]])
    assert mean_log_probabilities([sure, infinite], [1, 0]).isfinite().all()


@pytest.mark.parametrize("mean", [mean_log_probabilities, mean_logits])
def test_gradients(mean):
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(3, 4, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *logits: mean(logits, [0.5, 2.0, 1.0]), given)


def test_one_teacher_twice_is_that_teacher(batch):
    """Mean of probabilities or of logits: the same softmax, so the same soft targets."""
    member = fixed(1)[0]
    student = torch.randn(4, 5, dtype=torch.float64)
    for of in ("probabilities", "logits"):
        said = Ensemble([member, member], of=of).answers(batch, ()).logits_NK
        torch.testing.assert_close(soft_targets(student, said, 1.0), soft_targets(student, member.logits_NK, 1.0))
        torch.testing.assert_close(torch.softmax(said, 1), torch.softmax(member.logits_NK, 1))


def test_maps_come_from_one_and_logits_from_the_others(batch):
    first, second, third = members = fixed()
    ensemble = Ensemble(members, weights=[1, 1, 0], features_from=2)
    said = ensemble.answers(batch, ("a", "b"), differentiable=True)
    assert set(said.maps) == {"a", "b"}
    assert said.maps["a"] is third.logits_NK
    torch.testing.assert_close(said.logits_NK, mean_log_probabilities([first.logits_NK, second.logits_NK], [1, 1]))
    assert [member.asked for member in members] == [[((), True)], [((), True)], [(("a", "b"), True)]]
    assert ensemble.network is third.network
    assert ensemble.related
    ensemble.answers(batch, ())
    assert len(third.asked) == 1  # it has nothing to say without a loss on features


def test_a_teacher_of_logits_and_features_is_asked_once(batch):
    members = fixed(2)
    Ensemble(members, features_from=0).answers(batch, ("a",))
    assert [len(member.asked) for member in members] == [1, 1]


def test_layers_without_a_teacher_to_give_them_are_refused(batch):
    ensemble = Ensemble(fixed())
    assert ensemble.network is None
    assert not ensemble.related
    with pytest.raises(ModelError, match="layer a, and no teacher was named to give it; set `features_from: 0`"):
        ensemble.answers(batch, ("a",))


def test_one_at_random_for_each_step(batch):
    """The same draws in every process and again with the same seed; by their weights."""

    def draws(seed: int, weights: Any = None, steps: int = 300) -> list[int]:
        members = fixed()
        ensemble = Ensemble(members, combine="random", weights=weights, seed=seed)
        found = []
        for step in range(steps):
            ensemble.follow(nn.Identity(), replace(batch, step=step))
            said = ensemble.answers(batch, ()).logits_NK
            assert torch.equal(said, ensemble.answers(batch, ()).logits_NK)  # one a step, however often it is asked
            found.append(next(i for i, member in enumerate(members) if said is member.logits_NK))
        assert all(member.followed == steps for member in members)
        return found

    first = draws(4)
    assert first == draws(4)
    assert first != draws(5)
    counts = np.bincount(first, minlength=3)
    assert (counts > 70).all()  # of 300; a fair draw has 100 with a standard deviation of 8
    weighted = np.bincount(draws(4, weights=[1, 0, 3]), minlength=3)
    assert weighted[1] == 0
    assert 180 < weighted[2] < 270


def test_random_logits_and_steady_features(batch):
    members = fixed()
    ensemble = Ensemble(members, combine="random", weights=[1, 1, 0], features_from=2)
    said = ensemble.answers(batch, ("a",))
    assert said.maps["a"] is members[2].logits_NK
    assert said.logits_NK is not members[2].logits_NK


def test_fingerprints():
    """Of all that logits depend on; None where they change."""
    members = fixed()
    base = Ensemble(members).fingerprint
    assert base == Ensemble(members, features_from=1).fingerprint
    others = [
        Ensemble(members[:2]),
        Ensemble(members[::-1]),
        Ensemble(members, of="logits"),
        Ensemble(members, weights=[1, 2, 1]),
    ]
    assert None not in {other.fingerprint for other in others}
    assert len({base, *(other.fingerprint for other in others)}) == 5
    assert Ensemble(members, combine="random").fingerprint is None
    members[1].fingerprint = None
    assert Ensemble(members).fingerprint is None
    assert Ensemble(members, weights=[1, 0, 1], features_from=1).fingerprint is not None


def test_from_a_recipe(product: Product, run: Run, tmp_path, monkeypatch, batch):
    """Parent, a saved network and the student itself; the mean of what the networks say."""
    monkeypatch.chdir(tmp_path)
    structure = product.network.structure.model_copy(update={"model": {"use": "conftest:SmallNet", "weights": None}})
    outside = Network(randomized(SmallNet(), seed=11), structure)
    checkpoint.save(outside, tmp_path / "outside")
    parent = Network(randomized(SmallNet(), seed=9), product.network.structure)
    product = replace(product, parent=parent)
    settings = parsed({"use": "several", "teachers": ("parent", "outside", {"use": "itself"}), "features_from": 0})
    assert settings.folders() == ("outside",)
    assert [teacher.use for teacher in everyone(settings)] == ["parent", "saved", "itself"]
    teacher = settings.open(product, run)
    assert teacher.network is parent
    said = teacher.answers(batch, ("stem",))
    modules = [parent.module, outside.module, product.network.module]
    expected = sum(torch.softmax(module(batch.images_NCHW), 1) for module in modules) / 3
    torch.testing.assert_close(torch.softmax(said.logits_NK, 1), expected)
    torch.testing.assert_close(
        said.maps["stem"], parent.module.stem(nn.functional.pad(batch.images_NCHW, (0, 1, 0, 1)))
    )


def test_a_training_with_several(product: Product, run: Run):
    product = replace(product, parent=Network(randomized(SmallNet(), seed=9), product.network.structure))
    teacher = {"use": "several", "teachers": ("parent", {"use": "moving_average"}), "combine": "random"}
    options = {"use": "distill", "epochs": 1, "batch_size": 16, "lr": 0.01, "teacher": teacher}
    trained = [Distill(**options).apply(product, run).network.module.state_dict() for _ in range(2)]
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
    before = product.network.module.state_dict()
    assert not all(torch.equal(trained[0][name], before[name]) for name in before)


def test_features_of_one_in_an_objective(product: Product, run: Run, batch):
    parent = Network(randomized(SmallNet(), seed=9), product.network.structure)
    product = replace(product, parent=parent)
    losses = ({"use": "attention", "layers": ("stem",)},)
    alone = Distillation(losses=losses, labels=0.0)
    both = Distillation(
        losses=losses,
        labels=0.0,
        teacher={"use": "several", "teachers": ({"use": "itself"}, "parent"), "features_from": 1},
    )
    student = product.network.module
    values = [objective(each, product, run, student=student).loss(student, batch) for each in (alone, both)]
    assert values[0] > 0
    torch.testing.assert_close(values[0], values[1])


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"teachers": ("parent",)}, "at least 2"),
        ({"weights": (1.0,)}, "1 weights for 2 teachers"),
        ({"weights": (0.0, 0.0)}, "all 0"),
        ({"weights": (1.0, -1.0)}, "greater than or equal to 0"),
        ({"features_from": 2}, "is no teacher: the last of 2 is 1"),
        ({"combine": "best"}, "'mean' or 'random'"),
        ({"teachers": ({"use": "several", "teachers": ("parent", "parent")}, "parent")}, "does not match any of"),
    ],
)
def test_mistakes_are_refused(fields, match):
    with pytest.raises(ValidationError, match=match):
        Several(**{"use": "several", "teachers": ("parent", "x"), **fields})


RECIPE = """
name: x
model: {{use: mobilenet_v2}}
data: {{use: digits}}
preprocess: {{size: 32}}
stages:
  - {{use: prune, goal: {{macs: 0.5}}}}
  - use: distill
    teacher: {teacher}
"""
GOOD = "{use: several, teachers: [parent, runs/y, {use: moving_average, decay: 0.9}], weights: [1, 0.5, 1]}"


def test_a_recipe_file(tmp_path):
    """Lists fill tuples and integers floats, as everywhere in a recipe; short forms are allowed, in an editor too."""
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format(teacher=GOOD))
    loaded = recipe.load(file)
    teacher = loaded.stages[1].teacher
    assert [each.use for each in teacher.teachers] == ["parent", "saved", "moving_average"]
    assert teacher.weights == (1.0, 0.5, 1.0)
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(recipe.dump(loaded))
    assert recipe.load(dumped) == loaded
    schema = recipe.schema()
    jsonschema.validate(YAML(typ="safe").load(file), schema)
    file.write_text(RECIPE.format(teacher=GOOD.replace("moving_average", "movin_average")))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(YAML(typ="safe").load(file), schema)


@pytest.mark.parametrize(
    ("teacher", "line"),
    [
        (GOOD.replace("moving", "movin"), "teachers.2.use: no teacher 'movin_average'; did you mean 'moving_average'?"),
        (GOOD.replace("decay", "deca"), "teachers.2.deca: unknown field; did you mean 'decay'? moving_average takes"),
        (GOOD.replace("runs/y", "3"), "teachers.1: must be a mapping such as `use: parent`, not 3"),
        ("{use: several, teachers: [parent]}", "teachers: must have at least 2 items, not 1"),
        (GOOD.replace("1, 0.5, 1", "1"), "1 weights for 3 teachers"),
        ("{use: severl}", "use: no teacher 'severl'; did you mean 'several'?"),
        ("{use: stage, folder: distill}", "no stage `distill` comes before this one; they are 00-load, 01-prune"),
    ],
)
def test_mistakes_of_a_recipe_file(tmp_path, teacher, line):
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format(teacher=teacher))
    with pytest.raises(RecipeError) as error:
        recipe.load(file)
    assert len(error.value.lines) == 1
    assert error.value.lines[0].startswith(f"{file}:9: stages.1.teacher")
    assert line in error.value.lines[0]


def test_what_a_recipe_says_of_its_teachers():
    average, stage = {"use": "moving_average"}, {"use": "stage", "folder": "01-train"}
    both = {"use": "several", "teachers": ("parent", average)}
    assert [changes(parsed(each)) for each in ("parent", "x", {"use": "itself"}, stage)] == [False] * 4
    assert [changes(parsed(each)) for each in (average, {"use": "earlier_epochs"}, both)] == [True] * 3
    fixed_ones = {"use": "several", "teachers": ("parent", stage)}
    assert [changes(parsed(fixed_ones)), changes(parsed(fixed_ones | {"combine": "random"}))] == [False, True]
    assert [has_features(parsed(each)) for each in ("parent", fixed_ones)] == [True, False]
    assert has_features(parsed(fixed_ones | {"features_from": 0}))
    assert stages_named(parsed(fixed_ones)) == ("01-train",)
    assert parsed("parent").use == "parent"
    assert parsed("runs/x").path == "runs/x"
