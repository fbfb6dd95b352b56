"""What other packages call distillation, as settings of ours: the same number for the same logits.

Each formula is written here with numpy from that package's source. `labels` is the weight of the cross entropy, and the
weight of `kd` takes in what the package multiplies, or does not: ours has temperature**2 in it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax

from compress.losses.kd import SoftTargets
from compress.losses.lesson import NO_LABEL
from compress.observation import Answers
from compress.product import Batch
from compress.teaching.objective import Distillation, objective

N, K = 12, 5
rng = np.random.default_rng(5)
STUDENT, TEACHER = rng.normal(size=(N, K)), rng.normal(size=(N, K)) * 3
LABELS = rng.integers(0, K, N)


def cross_entropy(student: np.ndarray, labels: np.ndarray) -> float:
    return -log_softmax(student, axis=1)[np.arange(len(labels)), labels].mean()


def kl(student: np.ndarray, teacher: np.ndarray, temperature: float) -> float:
    """KL(teacher || student): summed over classes, averaged over images."""
    p, q = softmax(teacher / temperature, axis=1), softmax(student / temperature, axis=1)
    return (p * (np.log(p) - np.log(q))).sum(1).mean()


def keras(alpha: float, temperature: float) -> float:
    """keras.io/examples/vision/knowledge_distillation, `Distiller.compute_loss`. KLDivergence clips at 1e-7."""
    p, q = (np.clip(softmax(z / temperature, axis=1), 1e-7, 1) for z in (TEACHER, STUDENT))
    distillation = (p * np.log(p / q)).sum(1).mean() * temperature**2
    return alpha * cross_entropy(STUDENT, LABELS) + (1 - alpha) * distillation


def keras_2020(alpha: float, temperature: float) -> float:
    """The same example as first published: no temperature**2."""
    return alpha * cross_entropy(STUDENT, LABELS) + (1 - alpha) * kl(STUDENT, TEACHER, temperature)


def distiller(student_wt: float, distill_wt: float, temperature: float) -> float:
    """Neural Network Distiller, knowledge_distillation.py, `before_backward_pass`: no temperature**2 in its source."""
    return student_wt * cross_entropy(STUDENT, LABELS) + distill_wt * kl(STUDENT, TEACHER, temperature)


def scaledown(alpha: float, temperature: float) -> float:
    """scaledown 0.0.5, `KnowledgeDistillation._tensorflow_distiller` with Keras' losses: no temperature**2."""
    return alpha * cross_entropy(STUDENT, LABELS) + (1 - alpha) * kl(STUDENT, TEACHER, temperature)


def mdistiller(ce_weight: float, kd_weight: float, temperature: float) -> float:
    """mdistiller and RepDistiller, KD.py: what our defaults are."""
    return ce_weight * cross_entropy(STUDENT, LABELS) + kd_weight * kl(STUDENT, TEACHER, temperature) * temperature**2


def ours(run, product, distillation: Distillation, labels: np.ndarray = LABELS) -> float:
    """The value that training minimises, with two networks that say STUDENT and TEACHER."""

    @dataclass
    class Says:
        network = None
        fingerprint = None
        related = False

        def answers(self, batch: Batch, layers: object, *, differentiable: bool = False) -> Answers:
            return Answers(torch.tensor(TEACHER))

        def follow(self, student: object, batch: Batch) -> None:
            pass

    module = product.network.module
    goal = objective(distillation, product, run, student=module, teacher=Says())
    batch = Batch(torch.zeros(N, 3, 16, 16), torch.tensor(labels), torch.arange(N))
    return goal.judge(Answers(torch.tensor(STUDENT)), batch, module).item()


def settings(labels: float, weight: float, temperature: float) -> Distillation:
    return Distillation(labels=labels, losses=(SoftTargets(use="kd", weight=weight, temperature=temperature),))


@pytest.mark.parametrize(
    ("theirs", "labels", "weight", "temperature"),
    [
        pytest.param(lambda: keras(0.1, 10), 0.1, 0.9, 10.0, id="keras"),
        pytest.param(lambda: keras_2020(0.1, 10), 0.1, 0.9 / 10**2, 10.0, id="keras as of 2020"),
        pytest.param(lambda: distiller(0.5, 0.5, 1), 0.5, 0.5, 1.0, id="distiller"),
        pytest.param(lambda: distiller(0.7, 0.3, 4), 0.7, 0.3 / 4**2, 4.0, id="distiller at temperature 4"),
        pytest.param(lambda: scaledown(0.3, 1), 0.3, 0.7, 1.0, id="scaledown"),
        pytest.param(lambda: scaledown(0.3, 5), 0.3, 0.7 / 5**2, 5.0, id="scaledown at temperature 5"),
        pytest.param(lambda: mdistiller(0.1, 0.9, 4), 0.1, 0.9, 4.0, id="mdistiller"),
    ],
)
def test_the_same_number(run, product, theirs: Callable[[], float], labels, weight, temperature):
    assert ours(run, product, settings(labels, weight, temperature)) == pytest.approx(theirs(), rel=1e-9)


def test_the_conventions_differ_from_each_other():
    """So that one of ours cannot stand for all of theirs."""
    values = [keras(0.1, 10), keras_2020(0.1, 10), distiller(0.5, 0.5, 1), scaledown(0.3, 1), mdistiller(0.1, 0.9, 4)]
    assert all(abs(a - b) > 0.01 * a for i, a in enumerate(values) for b in values[:i])


def test_our_defaults_are_mdistillers(run, product):
    assert ours(run, product, Distillation()) == pytest.approx(mdistiller(0.1, 0.9, 4), rel=1e-9)


def test_images_without_a_label_count_where_none_is_needed(run, product):
    """`kd` hears all images, `dkd` and the labels those that have one; a batch without any leaves `dkd` out."""
    some = np.where(np.arange(N) % 3 == 0, NO_LABEL, LABELS)
    with_label = some != NO_LABEL
    losses = ({"use": "dkd", "warmup": 0.0, "beta": 2.0},)
    alone = ours(run, product, Distillation(labels=0.0, losses=losses), some)
    p = softmax(TEACHER / 4, axis=1)[with_label]
    q = softmax(STUDENT / 4, axis=1)[with_label]
    target, rest = [], []
    for p_i, q_i, label in zip(p, q, LABELS[with_label], strict=True):
        pair = np.array([[r[label], 1 - r[label]] for r in (p_i, q_i)])
        target.append((pair[0] * np.log(pair[0] / pair[1])).sum())
        a, b = (np.delete(r, label) / (1 - r[label]) for r in (p_i, q_i))
        rest.append((a * np.log(a / b)).sum())
    assert alone == pytest.approx(16 * (np.mean(target) + 2 * np.mean(rest)), rel=1e-9)
    soft = ours(run, product, settings(0.0, 1.0, 1.0), some)
    assert soft == pytest.approx(kl(STUDENT, TEACHER, 1.0), rel=1e-9)
    none = np.full(N, NO_LABEL)
    assert ours(run, product, Distillation(labels=0.0, losses=losses), none) == 0
