from dataclasses import replace

import pytest
from networks_taught import digest, pruned, stage
from pydantic import ValidationError

from compress.errors import ModelError
from compress.measures import macs
from compress.product import Network
from compress.pruning import MacGoal, Pruning, prune_network
from compress.schemes import assistants
from compress.teachers.teacher import Frozen
from compress.teaching import objective

SIZE = 16
CHAIN = {"use": "assistants", "macs": [0.8, 0.6], "pruning": {"round_to": 2, "batchnorm_images": 64}}
MAPS = [{"use": "fitnets", "layers": ["point", "down"]}]


@pytest.fixture
def student(product, run):
    return pruned(product, run)


@pytest.fixture
def taught(monkeypatch):
    """Who was trained from what by whom, in turn."""
    calls, teach = [], assistants.teach

    def watched(module, settings, product, run, *, label, teacher=None):
        trained, metrics = teach(module, settings, product, run, label=label, teacher=teacher)
        calls.append(
            {"from": module, "of": product, "teacher": teacher, "made": trained, "label": label, "for": settings.epochs}
        )
        return trained, metrics

    monkeypatch.setattr(assistants, "teach", watched)
    return calls


def test_each_is_taught_by_the_one_before_it(product, student, run, taught):
    original, before = digest(product.network.module), digest(student.network.module)
    made = stage({**CHAIN, "epochs": 2}).apply(student, run)
    wide, narrow, last = taught
    assert wide["teacher"] is None  # the recipe's
    assert digest(narrow["teacher"].network.module) == digest(wide["made"])
    assert digest(last["teacher"].network.module) == digest(narrow["made"])
    assert last["from"] is student.network.module
    assert digest(made.network.module) == digest(last["made"])
    assert [call["for"] for call in taught] == [2, 2, 1]
    assert [call["label"] for call in taught] == ["distill assistant 1/2", "distill assistant 2/2", "distill student"]
    assert (digest(product.network.module), digest(student.network.module)) == (original, before)

    whole = macs(product.network.module, SIZE)
    shares = [macs(call["made"], SIZE) / whole for call in taught]
    assert 0.7 < shares[0] <= 0.8
    assert 0.5 < shares[1] <= 0.6
    assert [entry["macs"] for entry in made.metrics["assistants"]] == shares[:2]
    assert [entry.get("assistant") for entry in made.metrics["history"]] == [1, 1, 2, 2, None]


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_assistants_have_all_channels_of_the_student(product, run, criterion):
    """Whatever chose them: here the student's were drawn with another seed."""
    student = pruned(product, replace(run, seed=run.seed + 1), criterion={"use": criterion})
    scheme = stage({**CHAIN, "pruning": {**CHAIN["pruning"], "criterion": {"use": criterion}}}).scheme
    for assistant in scheme.assistants(student, run):
        held = 0
        for name, channels in assistant.structure.kept.items():
            if channels.outputs is not None:
                assert set(student.network.structure.kept[name].outputs) <= set(channels.outputs)
                held += 1
        assert held > 2


def test_kept_channels_are_compared_where_an_assistant_has_them_all_and_an_adaptor_learnt_where_not(
    product, run, student
):
    settings = stage(CHAIN, losses=MAPS)
    around = settings.scheme.assistants(student, run)[1]
    goal = objective(settings, student, run, student=student.network.module, teacher=Frozen(around, run, related=True))
    assert goal.companion is None

    drawn = Pruning.model_validate_json('{"criterion": {"use": "random"}, "round_to": 2}')
    elsewhere = prune_network(product.network, MacGoal(macs=0.6), drawn, run=run)
    kept, there = student.network.structure.kept["down"].outputs, elsewhere.structure.kept["down"].outputs
    assert not set(kept) <= set(there), "or there is nothing to test"
    goal = objective(
        settings, student, run, student=student.network.module, teacher=Frozen(elsewhere, run, related=True)
    )
    assert goal.companion is not None


def test_losses_on_maps_teach_through_the_chain(student, run):
    losses = [{"use": "kd"}, *MAPS]
    made = stage({**CHAIN, "macs": [0.6]}, losses=losses).apply(student, run)
    assert set(made.metrics["layer_losses"]["fitnets"]) == {"point", "down"}


def test_a_quantized_student_has_float_assistants(product, run, taught):
    from compress.stages.quantize import Quantize

    student = pruned(product, run)
    quantized = Quantize(use="quantize", epochs=0, calibration_images=64).apply(student, run)
    made = stage({**CHAIN, "macs": [0.6]}, losses=[{"use": "kd"}, *MAPS]).apply(quantized, run)
    assert taught[0]["of"].network.structure.quantize is None
    assert taught[0]["of"].float_network is None
    assert made.network.structure.quantize is not None


def test_an_assistant_no_wider_than_the_student_is_refused(product, student, run):
    with pytest.raises(ModelError, match=r"an assistant at 0.3 of the multiply-adds is no wider than the student"):
        stage({**CHAIN, "macs": [0.8, 0.3]}).apply(student, run)
    with pytest.raises(ModelError, match="put the stage after one that prunes"):
        stage(CHAIN).apply(replace(product, parent=Network(product.network.module, product.network.structure)), run)


def test_mistakes_are_found_before_training(product, run):
    with pytest.raises(ModelError, match=r"scheme assistants: `goal: \{macs: 0.01\}` is out of reach"):
        stage({**CHAIN, "macs": [0.8, 0.01]}).check(product.network.module, run.data.preprocess)
    with pytest.raises(ValidationError, match="must fall"):
        stage({**CHAIN, "macs": [0.6, 0.8]})
