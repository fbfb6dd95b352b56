"""Confusions and the images that compression cost, counted again the slow way."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix

from compress.data.pictures import SIDE, save_picture
from compress.gate import answers
from compress.product import Run
from compress.stages.verify import Verify, mistakes
from compress.verification import Verification, of_split
from compress.verification.mistakes import EXAMPLES, WORST, compared, confidence, confusion


def drawn(images: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels_N = rng.integers(0, classes, images)
    wrong_N = rng.random(images) < 0.3
    return labels_N, np.where(wrong_N, rng.integers(0, classes, images), labels_N)


def test_a_confusion_matrix_is_scikit_learns() -> None:
    labels_N, said_N = drawn(500, 7)
    found = confusion(labels_N, said_N, 7)
    expected = confusion_matrix(labels_N, said_N, labels=range(7))
    assert found["matrix"] == expected.tolist()
    assert found["recall"] == [[int(row.sum()), int(row[k])] for k, row in enumerate(expected)]
    off = expected - np.diag(np.diag(expected))
    assert found["mistakes"] == off.sum() == (labels_N != said_N).sum()
    true, said, count = found["worst"][0]
    assert count == off.max() == expected[true, said]
    assert true != said
    counts = [cell[2] for cell in found["worst"]]
    assert counts == sorted(counts, reverse=True)


def test_many_classes_have_their_worst_confusions_and_no_matrix() -> None:
    labels_N, said_N = drawn(20_000, 1000)
    found = confusion(labels_N, said_N, 1000)
    assert found["matrix"] is None
    assert len(found["worst"]) == WORST
    for true, said, count in found["worst"]:
        assert count == ((labels_N == true) & (said_N == said)).sum()
    assert sum(images for images, _ in found["recall"]) == 20_000
    assert len(json.dumps(found)) < 20_000


def test_images_without_a_label_and_answers_beyond_the_classes_are_no_crash() -> None:
    labels_N, said_N = np.array([0, -1, 1, 1]), np.array([0, 1, 4, 1])
    found = confusion(labels_N, said_N, 2)
    assert found["matrix"] == [[1, 0, 0, 0, 0], [0, 1, 0, 0, 1]]
    assert found["worst"] == [[1, 4, 1]]
    assert compared(labels_N, said_N, said_N, {"parent": labels_N, "compressed": labels_N})["images"] == 3


def test_confidence_is_that_of_softmax_whatever_the_size_of_the_logits() -> None:
    logits_NK = np.random.default_rng(1).normal(size=(50, 6)).astype(np.float32) * 300
    expected = torch.from_numpy(logits_NK).double().softmax(1).max(1).values.numpy()
    assert confidence(logits_NK) == pytest.approx(expected, rel=1e-12)


def test_lost_and_gained_are_counted_and_the_examples_are_spread_over_classes() -> None:
    labels_N, parent_N = drawn(400, 4)
    said_N = drawn(400, 4, seed=5)[1]
    sure_N = np.random.default_rng(2).random(400)
    found = compared(labels_N, parent_N, said_N, {"parent": sure_N, "compressed": sure_N / 2})
    rows = list(zip(labels_N, parent_N, said_N, strict=True))
    assert found["lost"] == sum(p == t and c != t for t, p, c in rows)
    assert found["gained"] == sum(p != t and c == t for t, p, c in rows)
    assert found["both"] == sum(p != t and c != t for t, p, c in rows)
    examples = found["examples"]
    assert len(examples) == EXAMPLES
    for example in examples:
        assert labels_N[example["index"]] == example["true"] == example["parent"]
        assert said_N[example["index"]] == example["compressed"] != example["true"]
        assert example["parent_confidence"] == pytest.approx(sure_N[example["index"]], abs=1e-4)
    per_class = [sum(example["true"] == label for example in examples) for label in range(4)]
    assert per_class == [4, 4, 4, 4]
    for label in range(4):  # of every class those that the parent was surest of
        own = [index for index, (t, p, c) in enumerate(rows) if t == label == p and c != t]
        best = sorted(own, key=lambda index: -sure_N[index])[:4]
        assert [example["index"] for example in examples if example["true"] == label] == best


@pytest.fixture
def verified(exported, run: Run) -> Verification:
    """Of a parent that is always right."""
    found = Verify(use="verify", threads=1).verify(exported, run.data, run.progress)
    assert found.labels_N is not None
    return replace(found, top1=found.top1 | dict.fromkeys(("parent.onnx", "parent.tflite"), found.labels_N))


def test_pictures_are_the_pixels_that_the_network_saw(verified: Verification, run: Run, tmp_path: Path) -> None:
    metrics = mistakes(verified, of_split(run.data), replace(run, folder=tmp_path))
    found = metrics["wrong"]
    assert found["file"].startswith("int8.")
    assert found["lost"] == (verified.top1[found["file"]] != verified.labels_N).sum() > 0
    assert found["gained"] == found["both"] == 0
    for file, table in metrics["confusion"].items():
        assert table["matrix"] == confusion_matrix(verified.labels_N, verified.top1[file], labels=range(5)).tolist()
    images_NCHW = run.data.splits["evaluation"][0]
    for example in found["examples"]:
        with Image.open(tmp_path / example["image"]) as picture:
            pixels = np.asarray(picture)
        seen = run.data.preprocess.normalize(pixels[None])[0].transpose(2, 0, 1)
        assert np.abs(seen - images_NCHW[example["index"]].numpy()).max() <= 1 / 255 + 1e-6  # half a step of 2/255
    pictures = {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("wrong/*")}
    assert pictures == {example["image"] for example in found["examples"]} != set()


def test_verify_keeps_what_its_answers_say(exported, run: Run, tmp_path: Path) -> None:
    done = Verify(use="verify", threads=1).apply(exported, replace(run, folder=tmp_path))
    kept = answers.from_dict(json.loads((tmp_path / answers.NAME).read_text()))
    for file, table in done.metrics["confusion"].items():
        assert table["mistakes"] == (kept.top1[file] != kept.labels_N).sum()
        assert 1 - table["mistakes"] / 40 == pytest.approx(done.metrics["files"][file]["accuracy"])
    found = done.metrics["wrong"]
    lost = (kept.top1[found["parent"]] == kept.labels_N) & (kept.top1[found["file"]] != kept.labels_N)
    assert found["lost"] == lost.sum()
    json.dumps(done.metrics, allow_nan=False)


def test_a_task_without_classes_has_no_confusion(verified: Verification, run: Run, tmp_path: Path) -> None:
    run.data.task = "regression"
    assert mistakes(verified, of_split(run.data), replace(run, folder=tmp_path)) == {}
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_large_picture_is_made_small_and_always_the_same(tmp_path: Path, channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (300, 200, channels), dtype=np.uint8)
    save_picture(tmp_path / "a" / "1.png", pixels)
    save_picture(tmp_path / "a" / "2.png", pixels)
    assert (tmp_path / "a" / "1.png").read_bytes() == (tmp_path / "a" / "2.png").read_bytes()
    with Image.open(tmp_path / "a" / "1.png") as picture:
        assert max(picture.size) == SIDE
        assert picture.mode == ("L" if channels == 1 else "RGB")
