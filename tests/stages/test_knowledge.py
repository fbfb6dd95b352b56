"""The comparison with the original: identities, figures computed anew, and a product that stays as it is."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SmallNet, Stripes, randomized
from pydantic import ValidationError

from compress.errors import ModelError
from compress.knowledge.corruptions import CORRUPTIONS, corrupt
from compress.product import Network, Product, Run
from compress.stages.knowledge import Knowledge
from compress.stages.quantize import Quantize

BOTH = "student", "teacher"


def settings(**values: Any) -> Knowledge:
    small = {"corruptions": ("contrast", "gaussian_noise"), "severities": (2,), "attack_images": 20, "pgd_steps": 2}
    return Knowledge(**{"use": "knowledge", "eps": 16.0, **small, **values})


@pytest.fixture
def compressed(product: Product) -> Product:
    """Another network of the same shape, so that the two disagree."""
    other = Network(randomized(SmallNet(), seed=5), product.network.structure)
    return replace(product, network=other, parent=product.network)


def rows(metrics: Any) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in metrics["measures"]}


def test_a_network_has_all_that_it_has_itself(product, run):
    metrics = settings().apply(replace(product, parent=product.network), run).metrics
    found = rows(metrics)
    for row in found.values():
        if row["teacher"] is not None:
            assert row["student"] == row["teacher"], row["name"]
    for name in ("agreement", "agreement_on_mistakes", "corrupted_agreement", "fgsm_agreement", "pgd_agreement"):
        assert found[name]["student"] == 1, name
    assert found["kl"]["student"] == pytest.approx(0, abs=1e-12)
    assert found["js"]["student"] == pytest.approx(0, abs=1e-12)
    for attack in ("fgsm", "pgd"):
        assert found[f"{attack}_of_teacher_fools_student"]["student"] in (1, None)
        assert found[f"{attack}_accuracy"] | {"name": ""} == found[f"{attack}_transfer_accuracy"] | {"name": ""}


def test_figures_are_those_of_numpy(compressed, run):
    metrics = settings().apply(compressed, run).metrics
    found = rows(metrics)
    images, labels = run.data.splits["evaluation"]
    pixels = np.rint((images.permute(0, 2, 3, 1).numpy() * 0.5 + 0.5) * 255).clip(0, 255).astype(np.uint8)

    def said(network: Network, pixels_NHWC: np.ndarray) -> np.ndarray:
        inputs = (pixels_NHWC.astype(np.float64) / 255 - 0.5) / 0.5
        with torch.no_grad():
            return network.module.double()(torch.from_numpy(inputs).permute(0, 3, 1, 2)).numpy()

    student, teacher = said(compressed.network, pixels), said(compressed.parent, pixels)
    target = labels.numpy()
    assert found["accuracy"]["student"] == pytest.approx((student.argmax(1) == target).mean())
    assert found["accuracy"]["teacher"] == pytest.approx((teacher.argmax(1) == target).mean())
    assert found["agreement"]["student"] == pytest.approx((student.argmax(1) == teacher.argmax(1)).mean())
    wrong = teacher.argmax(1) != target
    assert found["agreement_on_mistakes"]["images"] == wrong.sum() > 0
    same = (student.argmax(1) == teacher.argmax(1))[wrong].mean()
    assert found["agreement_on_mistakes"]["student"] == pytest.approx(same)
    mirrored = said(compressed.network, pixels[:, :, ::-1].copy()).argmax(1)
    assert found["invariance_to_flips"]["student"] == pytest.approx((mirrored == student.argmax(1)).mean())
    noisy = np.stack([corrupt(image, "gaussian_noise", 2, seed=0, image=i) for i, image in enumerate(pixels)])
    accuracy = (said(compressed.parent, noisy).argmax(1) == target).mean()
    assert found["gaussian_noise"]["teacher"] == pytest.approx(accuracy)
    both = [found["gaussian_noise"]["teacher"], found["contrast"]["teacher"]]
    assert found["corrupted_accuracy"]["teacher"] == pytest.approx(sum(both) / 2)


def test_the_product_stays_as_it_is(compressed, run):
    def state(product: Product) -> list[Any]:
        modules = (product.network.module, product.parent.module)
        tensors = [(name, value.clone()) for module in modules for name, value in module.state_dict().items()]
        flags = [parameter.requires_grad for module in modules for parameter in module.parameters()]
        grads = [parameter.grad for module in modules for parameter in module.parameters()]
        return [tensors, flags, grads, [module.training for module in modules]]

    before = state(compressed)
    result = settings().apply(compressed, run)
    after = state(compressed)
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(before[0], after[0], strict=True))
    assert before[1:] == after[1:]
    assert replace(result, metrics={}) == compressed
    assert list(run.folder.iterdir()) == []


def test_every_figure_has_a_unit_and_its_images(compressed, run):
    metrics = settings().apply(compressed, run).metrics
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
    assert (metrics["images"], metrics["attack_images"], metrics["eps_255ths"]) == (40, 20, 16.0)
    for row in metrics["measures"]:
        assert row["unit"] in ("fraction", "nats", "squared distance")
        assert row["images"] == (20 if row["group"] == "attacks" else 40) or row["name"] == "agreement_on_mistakes"
        if row["unit"] == "fraction":
            assert all(row[who] is None or 0 <= row[who] <= 1 for who in BOTH)
    assert {row["group"] for row in metrics["measures"]} == {
        "answers", "confidence", "corruptions", "attacks", "invariance",
    }  # fmt: skip
    assert len(metrics["corruptions"]) == 2
    for who in BOTH:
        assert sum(part["images"] for part in metrics["reliability"][who]) == 40


def test_attacks_fool_the_network_they_are_made_for(compressed, run):
    found = rows(settings(attack_images=40, pgd_steps=5).apply(compressed, run).metrics)
    for who in BOTH:
        assert found["pgd_accuracy"][who] <= found["fgsm_accuracy"][who] < found["accuracy"][who]
        assert found["pgd_accuracy"][who] < found["pgd_transfer_accuracy"][who]


def test_twice_the_same(compressed, run):
    first, again = (settings().apply(compressed, run).metrics for _ in range(2))
    assert first == again
    other_seed = settings().apply(compressed, replace(run, seed=99)).metrics  # the same images and noise in every run
    assert first == other_seed


def test_a_fake_quantized_network_is_compared_and_attacked(product, run):
    quantized = Quantize(use="quantize", epochs=0, calibration_images=64).apply(product, run)
    found = rows(settings(attack_images=40).apply(quantized, run).metrics)
    assert found["agreement"]["student"] > 0.9
    assert found["pgd_accuracy"]["student"] < found["accuracy"]["student"]


def test_only_what_was_asked_for(compressed, run):
    metrics = settings(images=12, corruptions=(), attacks=()).apply(compressed, run).metrics
    assert (metrics["images"], metrics["attack_images"]) == (12, 0)
    assert {row["group"] for row in metrics["measures"]} == {"answers", "confidence", "invariance"}
    assert rows(settings(images=None, corruptions=(), attacks=()).apply(compressed, run).metrics)["kl"]["images"] == 40


@pytest.mark.parametrize(
    "values", [{}, {"attack_images": 1}, {"images": 7}, {"attacks": ("pgd",)}, {"corruptions": ()}]
)
def test_the_bar_ends_where_it_says(compressed, run, values):
    class Bar:
        total, seen = 0, 0

        @contextlib.contextmanager
        def steps(self, label, total):
            self.total += total
            yield self.advance

        def advance(self, text):
            self.seen += 1

        def note(self, text):
            pytest.fail(text)

    bar = Bar()
    big = replace(run, data=Stripes(evaluation=130), progress=bar)  # three batches
    settings(**values).apply(compressed, big)
    assert bar.seen == bar.total > 0


def test_images_without_numbers_are_told_apart(compressed, run):
    """Data need not number its images; the noise of two is different all the same."""

    class Unnumbered(Stripes):
        def batches(self, split, **options):
            for batch in super().batches(split, **options):
                yield replace(batch, indices_N=None)

    numbered, unnumbered = (
        settings().apply(compressed, replace(run, data=data)).metrics for data in (Stripes(), Unnumbered())
    )
    assert numbered == unnumbered


def test_an_uncompressed_network_is_refused(product, run: Run):
    with pytest.raises(ModelError, match=r"stage knowledge: nothing is pruned or quantized.*move the stage down"):
        settings().apply(product, run)


def test_settings_know_their_ranges():
    assert Knowledge(use="knowledge").corruptions == CORRUPTIONS
    for wrong in ({"severities": (6,)}, {"severities": ()}, {"eps": 0.0}, {"images": 0}, {"corruptions": ("rain",)}):
        with pytest.raises(ValidationError):
            Knowledge(use="knowledge", **wrong)
