"""What a report shows of single images and classes: confusions, what compression cost, what the network sees."""

from __future__ import annotations

import base64
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_report import TRAIN, WHOLE, Page, history, network, verify, write_run

from compress.data.pictures import save_picture
from compress.report import read_report, write_report
from compress.report.pictures import LARGEST, embedded
from compress.verification.mistakes import compared, confusion


def mistaken(labels_N: np.ndarray, parent_N: np.ndarray, said_N: np.ndarray, classes: int) -> dict[str, Any]:
    """What verify says of two files that answered so."""
    sure = {"parent": np.linspace(0.5, 1, len(labels_N)), "compressed": np.linspace(1, 0.4, len(labels_N))}
    wrong = compared(labels_N, parent_N, said_N, sure)
    for number, example in enumerate(wrong["examples"]):
        example["image"] = f"wrong/{number:02d}.png"
    return {
        "confusion": {"int8.tflite": confusion(labels_N, said_N, classes)}
        | {"parent.tflite": confusion(labels_N, parent_N, classes)},
        "wrong": {"file": "int8.tflite", "parent": "parent.tflite"} | wrong,
    }


def write_pictures(folder: Path) -> None:
    """Those that the run's verify stage names."""
    stage = folder / "stages" / "06-verify"
    metrics = json.loads((stage / "manifest.json").read_text())["metrics"]
    for number, example in enumerate(metrics["wrong"]["examples"]):
        ramp = np.add.outer(np.arange(32), np.arange(32))[..., None] * np.array([1, 2, 3]) + 9 * number
        save_picture(stage / example["image"], ramp.astype(np.uint8))


@pytest.fixture
def answers() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    labels_N = rng.integers(0, 10, 360)
    parent_N = np.where(rng.random(360) < 0.05, rng.integers(0, 10, 360), labels_N)
    said_N = np.where(rng.random(360) < 0.1, rng.integers(0, 10, 360), labels_N)
    return labels_N, parent_N, said_N


def test_mistakes_are_counted_shown_and_told_in_both_directions(
    tmp_path: Path, answers: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    labels_N, parent_N, said_N = answers
    checked = verify() | mistaken(*answers, 10)
    write_run(tmp_path, (*WHOLE[:5], ("verify", None, checked), WHOLE[6]))
    write_pictures(tmp_path)
    html = write_report(tmp_path).read_text(encoding="utf-8")
    text, markdown = Page(html).text, (tmp_path / "report.md").read_text(encoding="utf-8")
    right, was = said_N == labels_N, parent_N == labels_N
    counts = [(~right & was).sum(), (right & ~was).sum(), (~right & ~was).sum(), (right & was).sum()]
    for title, count in zip(
        ("Right before, wrong now", "Wrong before, right now", "Wrong in both", "Right in both"), counts, strict=True
    ):
        assert f"{title} {count} " in text
        assert f"| {title.lower()} | {count} |" in markdown
    pictures = re.findall(r'<img src="data:image/png;base64,([^"]*)" alt="([^"]*)"', html)
    assert len(pictures) == min(16, counts[0])
    for (content, alt), example in zip(pictures, checked["wrong"]["examples"], strict=True):
        assert base64.b64decode(content) == (tmp_path / "stages/06-verify" / example["image"]).read_bytes()
        assert alt.endswith(f", {example['true']}, taken for {example['compressed']}")
    matrix = re.search(r"Confusion matrix of int8.tflite.*?</table>", html, flags=re.S)
    assert matrix
    rows = re.findall(r'<th scope="row".*?</tr>', matrix.group(), flags=re.S)
    cells = [[0 if c == "·" else int(c) for c in re.findall(r"<td[^>]*>([^<]*)</td>", row)] for row in rows]
    assert cells == checked["confusion"]["int8.tflite"]["matrix"]
    recall = read_report(tmp_path)["recall"]
    worst = recall["classes"][0]
    own = labels_N == int(worst["label"])
    assert worst["compressed"] == pytest.approx(right[own].mean())
    assert worst["parent"] == pytest.approx(was[own].mean())


def test_a_thousand_classes_are_a_table_of_the_worst(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels_N = rng.integers(0, 1000, 4000)
    said_N = np.where(labels_N == 17, 400, np.where(rng.random(4000) < 0.2, rng.integers(0, 1000, 4000), labels_N))
    checked = verify() | mistaken(labels_N, labels_N, said_N, 1000)
    labels = [f"class-{k}" for k in range(1000)]
    data = {"use": "folder", "labels": labels, "train": 9, "evaluation": 4000, "fingerprint": "0" * 64}
    html = write_report(write_run(tmp_path, (*WHOLE[:5], ("verify", None, checked), WHOLE[6]), data=data)).read_text(
        encoding="utf-8"
    )
    text = Page(html).text
    assert "1000 classes are too many for a matrix" in text
    assert f"class-17 class-400 {(labels_N == 17).sum()} {(labels_N == 17).sum()}" in text
    assert 'class="matrix"' not in html
    assert len(html) < 400_000
    assert "class-17 taken for class-400" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_pictures_that_are_not_there_or_not_pictures_are_left_out(
    tmp_path: Path, answers: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    checked = verify() | mistaken(*answers, 10)
    outside = tmp_path / "secret.png"
    save_picture(outside, np.zeros((4, 4, 3), np.uint8))
    folder = tmp_path / "run"
    checked["wrong"]["examples"][0]["image"] = "../../../secret.png"
    checked["wrong"]["examples"][1]["image"] = str(outside)
    write_run(folder, (*WHOLE[:5], ("verify", None, checked), WHOLE[6]))
    assert "<img" not in write_report(folder).read_text(encoding="utf-8")
    stage = folder / "stages" / "06-verify"
    (stage / "wrong").mkdir()
    (stage / "wrong" / "02.png").symlink_to(outside)
    (stage / "wrong" / "03.png").write_text("<svg onload=alert(1)>")
    (stage / "wrong" / "04.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(LARGEST))
    os.mkfifo(tmp_path / "pipe.png")
    assert embedded(tmp_path, "pipe.png") == ""
    assert "<img" not in write_report(folder).read_text(encoding="utf-8")
    save_picture(stage / "wrong" / "06.png", np.zeros((4, 4, 3), np.uint8))
    assert write_report(folder).read_text(encoding="utf-8").count("<img") == 1
    assert embedded(folder, "stages/06-verify/wrong/\0.png") == ""


def test_samples_and_counts_of_classes_are_shown(tmp_path: Path) -> None:
    samples = [{"image": f"samples/{split}-{k}.png", "split": split, "label": "seven"}
               for split in ("train", "evaluation") for k in range(3)]  # fmt: skip
    loaded = ("load", network(0.1), {"samples": samples})
    write_run(tmp_path, (loaded, TRAIN))
    for sample in samples:
        save_picture(tmp_path / "stages" / "01-load" / sample["image"], np.zeros((8, 8, 1), np.uint8))
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert html.count("<img") == 6
    assert re.search(r"Train seven seven seven Evaluation seven seven seven", Page(html).text)
    assert "1,437 images to train on; 360 images to judge by; 10 classes" in Page(html).text


def test_an_older_run_has_no_such_sections(tmp_path: Path) -> None:
    html = write_report(write_run(tmp_path, WHOLE)).read_text(encoding="utf-8")
    assert 'id="mistakes"' not in html
    assert "<img" not in html
    assert read_report(tmp_path)["recall"] is None


def log_of(*lines: dict[str, Any]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def test_a_run_that_was_stopped_says_where_by_what_and_what_is_missing(tmp_path: Path) -> None:
    write_run(tmp_path, (TRAIN,), finished=None, seconds=None)
    (tmp_path / "recipe.yaml").write_text("stages:\n- {use: train}\n- {use: prune}\n- {use: export}\n")
    started = {"event": "stage_started", "stage": "02-prune", "facts": {"key": "k"}}
    epochs = [{"event": "epoch", "stage": "02-prune", "facts": epoch} for epoch in history(3, 1.0)]
    signal = {"event": "signal", "time": "2026-11-21T10:04:00Z", "facts": {"name": "SIGTERM"}}
    (tmp_path / "log.jsonl").write_text(log_of({"event": "run_started"}, started, *epochs, signal) + '{"cut')
    text = Page(write_report(tmp_path).read_text(encoding="utf-8")).text
    said = "stopped by SIGTERM in 02-prune after epoch 3 on 2026-11-21 10:04 UTC; 02-prune, 03-export have not ended"
    assert f"This run is not finished: {said}. The same command goes on with it." in text
    assert said in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "02-prune, not finished " in text
    assert "3 epochs so far, loss" in text
    assert "Not reached: 03-export has not ended." in text
    assert "File size not measured not reached: 03-export has not ended" in text
    # It goes on from the second epoch it kept, and is killed: nothing tells how.
    again = [{"event": "run_started"}, started, *epochs[1:2]]
    (tmp_path / "log.jsonl").write_text(log_of(started, *epochs, signal, *again))
    stopped = read_report(tmp_path)["stopped"]
    assert [epoch["epoch"] for epoch in stopped["training"]] == [1, 2]
    assert stopped["ended"] == ""
    assert "ended in 02-prune after epoch 2" in read_report(tmp_path)["warnings"][-1]
    for line in ("[]", '{"event": "epoch", "facts": {"epoch": "x"}}', '{"event": 3, "stage": [], "facts": 7}', "\x00"):
        (tmp_path / "log.jsonl").write_text(line + "\n")
        assert read_report(tmp_path)["stopped"]["training"] == []
    (tmp_path / "recipe.yaml").write_text("stages: [")
    assert "This run is not finished. The same" in read_report(tmp_path)["warnings"][-1]


def test_times_of_an_earlier_run_are_called_so(tmp_path: Path) -> None:
    write_run(tmp_path, WHOLE)
    assert not any("earlier run" in warning for warning in read_report(tmp_path)["warnings"])
    path = tmp_path / "stages" / "07-benchmark" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"resumed": True}))
    text = Page(write_report(tmp_path).read_text(encoding="utf-8")).text
    assert "The times were measured by an earlier run, 2026-11-21 10:02 UTC: this one took them over." in text
    assert "measured earlier, 2026-11-21 10:02 UTC" in text
    assert "n = 1,024 samples a file, measured 2026-11-21 10:02 UTC" in text


def test_the_pictures_of_a_test_are_real_ones(tmp_path: Path) -> None:
    save_picture(tmp_path / "a.png", np.full((8, 8, 3), 7, np.uint8))
    with Image.open(tmp_path / "a.png") as picture:
        assert np.asarray(picture).tolist() == np.full((8, 8, 3), 7).tolist()
    assert embedded(tmp_path, "a.png").startswith("data:image/png;base64,iVBOR")
