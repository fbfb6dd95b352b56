"""A training that was stopped ends as one that was not, byte by byte."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compress.epochs import Epochs, State, prepare_epochs
from compress.product import Product, Run
from compress.stages.distill import Distill
from compress.stages.prune import Prune
from compress.stages.quantize import Quantize
from compress.stages.train import Train
from compress.tensors import under

EPOCHS = 3
FIT = {"epochs": EPOCHS, "batch_size": 16, "lr": 0.02, "warmup_epochs": 1}


class Killed(BaseException):
    """The end of the process, as far as a test can have it and go on."""


class Lethal:
    """Progress under which the process dies in a training step, counted over the whole stage."""

    def __init__(self, at: int) -> None:
        self.at, self.steps_taken, self.notes = at, 0, list[str]()

    @contextlib.contextmanager
    def steps(self, label: str, total: int) -> Iterator[Callable[[str], None]]:
        def advance(said: str) -> None:
            if "  epoch " in label:
                self.steps_taken += 1
                if self.steps_taken == self.at:
                    raise Killed

        yield advance

    def note(self, text: str) -> None:
        self.notes.append(text)

    def event(self, kind: str, **facts: object) -> None:
        pass


def digest(module: nn.Module) -> str:
    state = module.state_dict()
    return hashlib.sha256(b"".join(name.encode() + t.numpy().tobytes() for name, t in state.items())).hexdigest()


def figures(metrics: Any) -> Any:
    """What was measured, without what a clock said."""
    if isinstance(metrics, dict):
        return {key: figures(value) for key, value in metrics.items() if key != "seconds"}
    return [figures(value) for value in metrics] if isinstance(metrics, list) else metrics


@pytest.fixture
def student(product: Product, run: Run) -> Product:
    settings = {"use": "prune", "goal": {"macs": 0.4}, "round_to": 2, "batchnorm_images": 64}
    return Prune.model_validate_json(json.dumps(settings)).apply(product, run)


def train(**more: Any) -> Train:
    return Train.model_validate_json(json.dumps({"use": "train", **FIT, **more}))


def distill(**more: Any) -> Distill:
    return Distill.model_validate_json(json.dumps({"use": "distill", **FIT, **more}))


def quantize(**more: Any) -> Quantize:
    return Quantize.model_validate_json(json.dumps({"use": "quantize", **FIT, "calibration_images": 32, **more}))


KD = {"use": "kd"}
GENERATOR = {"latent": 16, "channels": 16, "steps": 4}
STAGES: dict[str, Any] = {
    "sgd": train(),
    "adamw and ema": train(optimizer="adamw", lr=1e-3, ema=0.9),
    "scales pulled to zero": train(sparsity={"use": "bn_scale", "weight": 0.05}, ema=0.9),
    "channels pulled to zero by a growing force": distill(
        losses=[KD], sparsity={"use": "growing", "goal": {"macs": 0.7}, "round_to": 2, "criterion": {"use": "random"}}
    ),
    "only the head": train(only=["head.*"]),
    "kd and hints": distill(losses=[KD, {"use": "fitnets", "layers": {"down": "down"}}]),
    "views": distill(losses=[KD], views=2),
    "carried losses": distill(losses=[{"use": "attention", "layers": {"down": "down", "point": "point"}}]),
    "moving average": distill(teacher={"use": "moving_average", "decay": 0.8}, losses=[KD]),
    "earlier epochs": distill(teacher={"use": "earlier_epochs", "ago": 2}, losses=[KD]),
    "one of several": distill(
        teacher={"use": "several", "teachers": ["parent", {"use": "moving_average"}], "combine": "random"}, losses=[KD]
    ),
    "born again": distill(scheme={"use": "born_again", "generations": 2}, losses=[KD]),
    "mutual": distill(scheme={"use": "mutual"}, losses=[KD]),
    "netaug": distill(scheme={"use": "netaug"}, losses=[KD]),
    "one": distill(scheme={"use": "one"}, losses=[KD]),
    "okddip": distill(scheme={"use": "okddip"}, losses=[KD]),
    "deeper to shallower": distill(scheme={"use": "deeper_to_shallower"}, losses=[KD]),
    "data free": distill(scheme={"use": "data_free", **GENERATOR}, losses=[KD]),
    "hard examples": distill(scheme={"use": "hard_examples", "student_steps": 3, **GENERATOR}, losses=[KD]),
    "qat": quantize(),
    "qat with a teacher and ema": quantize(distill={"losses": [KD]}, ema=0.9),
    "narrowed while it is trained": Prune.model_validate_json(
        json.dumps(
            {"use": "prune", "goal": {"macs": 0.3}, "round_to": 2, "criterion": {"use": "fisher"}, "images": 32}
            | {"schedule": {"use": "progressive", "end": 0.8, "every": 0.5}, "distill": {"losses": [KD]}}
            | {"finetune": FIT | {"ema": 0.9}}
        )
    ),
    "narrowed while adamw trains it": Prune.model_validate_json(
        json.dumps(
            {"use": "prune", "goal": {"macs": 0.3}, "round_to": 2, "criterion": {"use": "random"}}
            | {"schedule": {"use": "progressive"}, "finetune": FIT | {"optimizer": "adamw", "lr": 1e-3}}
        )
    ),
    "pruned in steps": Prune.model_validate_json(
        json.dumps(
            {"use": "prune", "goal": {"macs": 0.3}, "round_to": 2, "steps": 2, "batchnorm_images": 64}
            | {"finetune": FIT | {"epochs": 2}}
        )
    ),
}


@pytest.fixture
def stage(request: pytest.FixtureRequest) -> Any:
    return STAGES[request.param]


@pytest.mark.parametrize("stage", STAGES, indirect=True)
def test_a_stage_killed_again_and_again_ends_as_one_that_was_not(
    stage: Any, product: Product, student: Product, run: Run, tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    before = product if stage.use in ("train", "prune") else student
    whole = Lethal(at=0)
    torch.manual_seed(run.seed)  # as the pipeline does
    expected = stage.apply(before, replace(run, progress=whole))
    total, folder = whole.steps_taken, tmp_path / "training"
    drawn = torch.rand(3)
    attempts, taken = 0, 0
    while True:
        # Beyond one epoch each time, so that it gets on: an epoch has four steps.
        progress = Lethal(at=random.Random(attempts).randint(5, 7))
        torch.manual_seed(run.seed)
        prepare_epochs(folder, "key")
        try:
            found = stage.apply(before, replace(run, progress=progress, epochs=Epochs(folder)))
        except Killed:
            attempts += 1
            taken += progress.steps_taken
            assert attempts < 20
            continue
        break
    assert attempts >= 1
    assert any("goes on after epoch" in note for note in progress.notes)
    assert taken + progress.steps_taken < total * 2.1, "what was done is not done again, but for the epoch that died"
    assert digest(found.network.module) == digest(expected.network.module)
    assert figures(dict(found.metrics)) == figures(dict(expected.metrics))
    assert found.layer_losses == expected.layer_losses
    assert torch.equal(torch.rand(3), drawn), "what comes after draws the same random numbers"


@pytest.mark.parametrize("stage", ["sgd", "carried losses", "qat with a teacher and ema"], indirect=True)
def test_a_training_that_is_over_is_not_trained_again(stage: Any, product: Product, run: Run, tmp_path: Path) -> None:
    prepare_epochs(tmp_path / "t", "key")
    once = stage.apply(product, replace(run, epochs=Epochs(tmp_path / "t")))
    progress = Lethal(at=1)
    again = stage.apply(product, replace(run, progress=progress, epochs=Epochs(tmp_path / "t")))
    assert digest(again.network.module) == digest(once.network.module)
    assert progress.steps_taken == 0
    assert again.metrics == once.metrics
    assert again.layer_losses == once.layer_losses


def test_what_earlier_attempts_took_is_counted(product: Product, run: Run, tmp_path: Path) -> None:
    prepare_epochs(tmp_path / "t", "key")
    first = Epochs(tmp_path / "t")
    with pytest.raises(Killed):
        train().apply(product, replace(run, progress=Lethal(at=9), epochs=first))
    second = Epochs(tmp_path / "t")
    history = train().apply(product, replace(run, epochs=second)).metrics["history"]
    assert first.earlier_s == 0
    assert second.earlier_s == pytest.approx(sum(entry["seconds"] for entry in history[:2]))


@pytest.mark.parametrize("damage", ["cut", "altered", "gone", "header cut", "header gone", "header altered"])
def test_a_damaged_state_is_noticed_and_the_training_begins_again(
    product: Product, run: Run, tmp_path: Path, damage: str
) -> None:
    torch.set_num_threads(1)
    folder = tmp_path / "t"
    prepare_epochs(folder, "key")
    once = train().apply(product, replace(run, epochs=Epochs(folder)))
    (state,) = (folder / "00").glob("*.safetensors")
    header = folder / "00" / "epoch.json"
    match damage:
        case "cut":
            state.write_bytes(state.read_bytes()[:-1])
        case "altered":
            content = bytearray(state.read_bytes())
            content[len(content) // 2] ^= 1
            state.write_bytes(content)
        case "gone":
            state.unlink()
        case "header cut":
            header.write_bytes(header.read_bytes()[:-5])
        case "header gone":
            header.unlink()
        case "header altered":
            header.write_text(header.read_text().replace('"loss": ', '"loss": 1'))
    progress = Lethal(at=0)
    again = train().apply(product, replace(run, progress=progress, epochs=Epochs(folder)))
    assert progress.steps_taken == EPOCHS * 4
    assert digest(again.network.module) == digest(once.network.module)


def test_another_key_begins_again_and_leaves_nothing_of_the_first(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    prepare_epochs(folder, "a")
    training = Epochs(folder).begin()
    training.save(State({"x": torch.arange(3)}, {"epoch": 1}))
    prepare_epochs(folder, "a")
    assert Epochs(folder).begin().epoch() == 1
    prepare_epochs(folder, "b")
    assert Epochs(folder).begin().epoch() == 0
    assert [path.name for path in folder.iterdir()] == ["begun.json"]


def test_only_the_last_epoch_takes_place_on_the_disk(tmp_path: Path) -> None:
    prepare_epochs(tmp_path / "t", "a")
    training = Epochs(tmp_path / "t").begin()
    for epoch in (1, 2, 3):
        training.save(State({"x": torch.full((4,), epoch)}, {"epoch": epoch}))
    assert [path.name for path in (tmp_path / "t/00").glob("*.safetensors")] == ["3.safetensors"]
    found = Epochs(tmp_path / "t").begin()
    assert (found.epoch(), found.load().tensors["x"].tolist()) == (3, [3, 3, 3, 3])


def test_tensors_that_share_memory_are_kept_each(tmp_path: Path) -> None:
    prepare_epochs(tmp_path / "t", "a")
    training, x = Epochs(tmp_path / "t").begin(), torch.arange(6.0).reshape(2, 3)
    training.save(State({"a": x, "b": x.T, "c": x[0]}, {"epoch": 1}))
    found = training.load().tensors
    assert all(torch.equal(found[name], value) for name, value in (("a", x), ("b", x.T), ("c", x[0])))


def test_under_is_a_namespace() -> None:
    x = torch.zeros(1)
    assert list(under({"a.b": x, "a.c.d": x, "ab": x, "b.a.x": x}, "a.")) == ["b", "c.d"]
