"""The virtual teacher: against numpy, as label smoothing, and as KD with a teacher of that name."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from torch.nn import functional as F

from compress.errors import ModelError
from compress.losses.lesson import Facts, Lesson
from compress.losses.teacher_free import TeacherFree, teacher_free, virtual_teacher

N, K = 6, 5
rng = np.random.default_rng(3)
STUDENT = rng.normal(size=(N, K))
LABELS = np.array([0, 4, 2, 2, 1, 3])


def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(STUDENT, requires_grad=True), torch.tensor(LABELS)


def test_the_virtual_teacher_is_right_and_shares_the_rest():
    p = virtual_teacher(torch.tensor(LABELS), K, 0.9).exp().numpy()
    expected = np.full((N, K), 0.1 / (K - 1))
    expected[np.arange(N), LABELS] = 0.9
    np.testing.assert_allclose(p, expected, rtol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 20.0])
@pytest.mark.parametrize("correct", [0.9, 0.99])
def test_against_numpy(correct, temperature):
    """Softening a distribution is taking the root of it: softmax(log p / T) = p ** (1 / T) / sum."""
    p = np.full((N, K), (1 - correct) / (K - 1))
    p[np.arange(N), LABELS] = correct
    soft = p ** (1 / temperature)
    soft /= soft.sum(1, keepdims=True)
    expected = (soft * (np.log(soft) - log_softmax(STUDENT / temperature, axis=1))).sum(1).mean() * temperature**2
    got = teacher_free(*tensors(), correct=correct, temperature=temperature)
    assert got.item() == pytest.approx(expected, rel=1e-11)


def test_at_temperature_1_it_trains_like_label_smoothing():
    """Section 4 of the paper: label smoothing is distillation from a virtual teacher."""
    student, labels = tensors()
    correct = 0.9
    (ours,) = torch.autograd.grad(teacher_free(student, labels, correct=correct, temperature=1.0), student)
    smoothing = (1 - correct) * K / (K - 1)
    (smoothed,) = torch.autograd.grad(F.cross_entropy(student, labels, label_smoothing=smoothing), student)
    torch.testing.assert_close(ours, smoothed, rtol=1e-10, atol=1e-14)


def test_a_student_that_is_the_virtual_teacher_has_nothing_to_learn():
    labels = torch.tensor(LABELS)
    ideal = virtual_teacher(labels, K, 0.99) + 3
    assert teacher_free(ideal, labels, correct=0.99, temperature=20.0).item() == pytest.approx(0, abs=1e-12)
    surer = 2 * ideal
    assert teacher_free(surer, labels, correct=0.99, temperature=20.0) > 0.1


def test_the_teachers_logits_play_no_part():
    student, labels = tensors()
    loss = TeacherFree(use="teacher_free")
    values = [
        loss(Lesson(student_NK=student, teacher_NK=teacher, labels_N=labels))
        for teacher in (torch.zeros(N, K), torch.full((N, K), torch.nan))
    ]
    assert values[0] == values[1]
    assert values[0].item() == teacher_free(student, labels, correct=0.99, temperature=20.0).item()
    assert TeacherFree.needs_labels


def test_gradients():
    student, labels = tensors()
    loss = TeacherFree(use="teacher_free")
    assert torch.autograd.gradcheck(
        lambda s: loss(Lesson(student_NK=s, teacher_NK=s.detach(), labels_N=labels)), (student,)
    )
    dead = torch.zeros(N, K, requires_grad=True)
    loss(Lesson(student_NK=dead, teacher_NK=dead, labels_N=labels)).backward()
    assert dead.grad.isfinite().all()
    assert (dead.grad.argmin(1) == labels).all()  # a step downhill raises the label's logit


def test_a_teacher_that_only_guesses_is_refused():
    facts = Facts((), (), (), classes=5, images=10)
    assert TeacherFree(use="teacher_free").parts(facts) is None
    with pytest.raises(ModelError, match=r"`correct: 0.2` is no more than a guess among 5 classes"):
        TeacherFree(use="teacher_free", correct=0.2).parts(facts)
