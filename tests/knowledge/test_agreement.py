"""Agreement, calibration and invariance against hand-worked cases and numpy."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from compress.data.pixels import to_pixels
from compress.knowledge.agreement import agreement, agreement_on_mistakes, mean_js, mean_kl, right
from compress.knowledge.calibration import (
    brier_score,
    expected_calibration_error,
    negative_log_likelihood,
    reliability,
)
from compress.knowledge.invariance import diagonal_shifts, flipped, shifted
from compress.knowledge.pixels import normalized, to_input, to_unit
from compress.product import Preprocess

ODD = Preprocess(size=8, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def random_logits(images: int = 400, classes: int = 4, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(images, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_labels(images: int = 400, classes: int = 4, seed: int = 1) -> torch.Tensor:
    return torch.randint(classes, (images,), generator=torch.Generator().manual_seed(seed))


def one_hot(*classes: int) -> torch.Tensor:
    return torch.eye(3, dtype=torch.float64)[list(classes)]


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits)
    return powers / powers.sum(1, keepdims=True)


def test_agreement_counts_equal_answers():
    assert agreement(one_hot(0, 1, 2, 2), one_hot(0, 1, 1, 0)) == 0.5
    logits = random_logits()
    assert agreement(logits, logits) == 1
    assert agreement(logits, 3 * logits - 7) == 1
    assert agreement(logits, -logits) < 0.5


def test_agreement_on_mistakes_asks_only_where_the_teacher_errs():
    labels = torch.tensor([0, 1, 2, 2])
    teacher, student = one_hot(0, 2, 1, 0), one_hot(1, 2, 1, 1)  # the teacher errs on the last three
    found = agreement_on_mistakes(student_NK=student, teacher_NK=teacher, labels_N=labels)
    assert found == pytest.approx(2 / 3)
    swapped = agreement_on_mistakes(student_NK=teacher, teacher_NK=student, labels_N=labels)
    assert swapped == 0.5  # the student errs on all four
    assert agreement_on_mistakes(student_NK=one_hot(0, 1), teacher_NK=one_hot(1, 0), labels_N=labels[:2]) == 0
    assert agreement_on_mistakes(student_NK=student, teacher_NK=one_hot(0, 1, 2, 2), labels_N=labels) is None
    assert right(teacher, labels).tolist() == [True, False, False, False]


def test_divergences_are_those_of_numpy():
    student, teacher = random_logits(seed=2), random_logits(seed=3)
    p, q = softmax(teacher.numpy()), softmax(student.numpy())
    middle = (p + q) / 2
    expected_kl = (p * np.log(p / q)).sum(1).mean()
    expected_js = 0.5 * ((p * np.log(p / middle)).sum(1) + (q * np.log(q / middle)).sum(1)).mean()
    assert mean_kl(student_NK=student, teacher_NK=teacher) == pytest.approx(expected_kl, rel=1e-12)
    assert mean_kl(student_NK=teacher, teacher_NK=student) != pytest.approx(expected_kl, rel=1e-3)
    assert mean_js(student, teacher) == pytest.approx(expected_js, rel=1e-12)
    assert mean_js(teacher, student) == pytest.approx(expected_js, rel=1e-12)


def test_divergences_at_their_ends():
    logits = random_logits()
    assert mean_kl(student_NK=logits, teacher_NK=logits) == 0
    assert mean_js(logits, logits) == pytest.approx(0, abs=1e-15)
    sure, of_another = 1000 * one_hot(0, 1), 1000 * one_hot(1, 2)
    assert mean_js(sure, of_another) == pytest.approx(math.log(2))
    assert mean_kl(student_NK=sure, teacher_NK=of_another) == pytest.approx(1000)  # grows without a bound


def slow_ece(logits: np.ndarray, labels: np.ndarray, bins: int) -> float:
    """Bin by bin, as the paper writes it: ((m - 1) / M, m / M]."""
    probabilities = softmax(logits)
    confidence, predicted = probabilities.max(1), probabilities.argmax(1)
    error = 0.0
    for m in range(1, bins + 1):
        inside = [i for i in range(len(labels)) if (m - 1) / bins < confidence[i] <= m / bins]
        if inside:
            accuracy = sum(predicted[i] == labels[i] for i in inside) / len(inside)
            error += len(inside) / len(labels) * abs(accuracy - sum(confidence[i] for i in inside) / len(inside))
    return error


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_ece_is_that_of_numpy(bins):
    logits, labels = random_logits(), random_labels()
    found = expected_calibration_error(logits, labels, bins)
    assert found == pytest.approx(slow_ece(logits.numpy(), labels.numpy(), bins), rel=1e-12)
    assert 0 < found < 1


def test_ece_by_hand():
    """Two classes. Three images at 0.7, right twice; one at 0.9, wrong: (3 |2/3 - 0.7| + |0 - 0.9|) / 4 = 0.25."""
    confidence = torch.tensor([0.7, 0.7, 0.7, 0.9], dtype=torch.float64)
    logits = torch.stack([confidence, 1 - confidence], 1).log()
    assert expected_calibration_error(logits, torch.tensor([0, 0, 1, 1])) == pytest.approx((3 * 0.1 / 3 + 0.9) / 4)
    # In a single bin, over- and underconfidence cancel out: |0.5 - 0.75|.
    assert expected_calibration_error(logits, torch.tensor([0, 0, 1, 1]), bins=1) == pytest.approx(0.25)
    used = [part for part in reliability(logits, torch.tensor([0, 0, 1, 1])) if part.images]
    assert [(part.images, part.accuracy) for part in used] == [(3, pytest.approx(2 / 3)), (1, 0.0)]
    assert [part.confidence for part in used] == pytest.approx([0.7, 0.9])


def test_sure_and_right_is_calibrated_sure_and_wrong_is_not():
    labels = torch.tensor([0, 1, 2])
    assert expected_calibration_error(1000 * one_hot(0, 1, 2), labels) == 0
    assert expected_calibration_error(1000 * one_hot(1, 2, 0), labels) == 1
    undecided = torch.zeros(3, 3, dtype=torch.float64)  # says class 0 with a third, and is right in a third
    assert expected_calibration_error(undecided, labels) == pytest.approx(0)
    assert brier_score(1000 * one_hot(0, 1, 2), labels) == 0
    assert brier_score(1000 * one_hot(1, 2, 0), labels) == 2
    assert brier_score(undecided, labels) == pytest.approx(4 / 9 + 1 / 9 + 1 / 9)
    assert negative_log_likelihood(undecided, labels) == pytest.approx(math.log(3))


def test_every_image_is_in_one_bin():
    logits = random_logits()
    parts = reliability(logits, random_labels(), 15)
    assert sum(part.images for part in parts) == len(logits)
    for part in parts:
        assert (part.accuracy is None) == (part.images == 0)
        if part.confidence is not None:
            assert part.low < part.confidence <= part.high


def test_brier_and_nll_are_those_of_numpy():
    logits, labels = random_logits(), random_labels()
    probabilities, target = softmax(logits.numpy()), np.eye(4)[labels.numpy()]
    assert brier_score(logits, labels) == pytest.approx(((probabilities - target) ** 2).sum(1).mean(), rel=1e-12)
    expected = -np.log(probabilities[np.arange(len(labels)), labels.numpy()]).mean()
    assert negative_log_likelihood(logits, labels) == pytest.approx(expected, rel=1e-12)


def test_pixels_come_back_to_the_last_one():
    pixels = np.arange(256 * 3, dtype=np.uint8).reshape(4, 8, 8, 3)
    for channels_last in (True, False):
        images = to_input(pixels, ODD, channels_last=channels_last)
        assert np.array_equal(to_pixels(images, ODD), pixels)
        unit = to_unit(pixels, channels_last=channels_last)
        assert unit.min() == 0
        assert unit.max() == 1
        torch.testing.assert_close(normalized(unit, ODD), images)
        assert images.is_contiguous() != channels_last
        assert unit.is_contiguous() != channels_last


def test_flips_and_shifts_move_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 6, 3), np.uint8)
    mirrored = flipped(pixels)
    assert np.array_equal(mirrored[:, :, 0], pixels[:, :, 5])
    assert np.array_equal(flipped(mirrored), pixels)
    moved = shifted(pixels, right=2, down=-1)
    assert np.array_equal(moved[:, 1:, :4], pixels[:, :-1, 2:])
    assert np.array_equal(moved[:, 0, :4], pixels[:, 0, 2:])  # above the image, its first row again
    assert np.array_equal(moved[:, 1:, 5], pixels[:, :-1, 5])
    assert np.array_equal(shifted(pixels, right=0, down=0), pixels)
    assert set(diagonal_shifts(96, 1 / 16)) == {(-6, -6), (-6, 6), (6, -6), (6, 6)}
    assert (1, 1) in diagonal_shifts(8, 0.01)


def test_a_network_that_ignores_flips_and_shifts_agrees_with_itself():
    """A mean over the image stays when it is mirrored, and when it moves over a border of one colour."""

    class Means(nn.Module):
        def forward(self, images):
            return images.mean((2, 3)) @ torch.linspace(-1, 1, 15, dtype=torch.float64).view(3, 5)

    class Left(nn.Module):
        def forward(self, images):
            return images[:, :, :, : images.shape[3] // 2].mean((2, 3)) - images[:, :, :, -2:].mean((2, 3))

    rng = np.random.default_rng(4)
    pixels = np.full((64, 8, 8, 3), 128, np.uint8)
    pixels[:, 2:-2, 2:-2] = rng.integers(0, 256, (64, 4, 4, 3))

    def said(network: nn.Module, changed: np.ndarray) -> torch.Tensor:
        return network(to_input(changed, ODD, channels_last=True).double())

    for network, invariant in ((Means(), True), (Left(), False)):
        plain = said(network, pixels)
        same = [agreement(plain, said(network, flipped(pixels)))]
        same += [agreement(plain, said(network, shifted(pixels, right=x, down=y))) for x, y in diagonal_shifts(8, 0.1)]
        assert (min(same) == 1) == invariant
