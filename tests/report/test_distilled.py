"""What the report says of distillation: the control run without a teacher, and the stages `knowledge`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from test_report import (
    DISTILL,
    EXPORT,
    PRUNE,
    QUANTIZE,
    TRAIN,
    VERIFY,
    WHOLE,
    Page,
    history,
    network,
    verify,
    write_run,
)

from compress.report import read_report, summary_rows, write_report

Rows = dict[str, tuple[float | None, float | None]]
"""Student and teacher, by measure."""

FIGURES: dict[str, Rows] = {
    "answers": {"accuracy": (0.88, 0.91), "agreement": (0.93, None), "agreement_on_mistakes": (0.4, None)},
    "confidence": {"ece": (0.071, 0.052)},
    "corruptions": {"corrupted_accuracy": (0.61, 0.7), "contrast": (0.5, 0.62), "jpeg": (0.72, 0.78)},
    "attacks": {
        "fgsm_accuracy": (0.21, 0.3),
        "fgsm_of_teacher_fools_student": (0.66, None),
        "pgd_accuracy": (0.08, 0.1),
    },
    "invariance": {"invariance_to_flips": (0.95, 0.97)},
}


def knowledge(shift: float = 0.0, **changes: float | None) -> tuple[str, None, dict[str, Any]]:
    """A stage's metrics; every figure of the student moved by `shift`."""
    measures = [
        {"name": name, "group": group, "unit": "fraction", "images": 500, "student": changes.get(name, student + shift),
         "teacher": teacher}
        for group, rows in FIGURES.items()
        for name, (student, teacher) in rows.items()
    ]  # fmt: skip
    measures.insert(3, {"name": "kl", "group": "answers", "unit": "nats", "images": 500, "student": 0.1 - shift})
    metrics = {"images": 500, "attack_images": 200, "eps_255ths": 1.0, "severities": [1, 3, 5], "measures": measures}
    return "knowledge", None, metrics


def quantized(accuracy: float) -> tuple[str, dict[str, Any], dict[str, Any]]:
    return "quantize", network(accuracy, 0.6, "int8 (fake quant)"), {"history": history(3, 0.9)}


def verified(accuracy: float) -> tuple[str, None, dict[str, Any]]:
    found = verify()
    found["files"]["int8.tflite"] = {"runtime": "litert", "accuracy": accuracy, "images": 360}
    return "verify", None, found


def write(folder: Path, stages: tuple[Any, ...], control: tuple[Any, ...] | None, **run: Any) -> Path:
    write_run(folder, stages, controls=["no_distillation"])
    if control is not None:
        place = folder / "controls/no_distillation"
        place.mkdir(parents=True)
        write_run(place, control, controls=[], **run)
    return folder


def texts(folder: Path) -> tuple[dict[str, Any], str, str, str]:
    """The report as JSON, as the page's text, as Markdown, and the page itself."""
    html = write_report(folder).read_text(encoding="utf-8")
    data = json.loads((folder / "report.json").read_text(), parse_constant=pytest.fail)
    return data, Page(html).text, (folder / "report.md").read_text(encoding="utf-8"), html


TRAINED = ("train", network(0.957, 0.6), {"history": history(12, 2.0)})
KEPT = (TRAIN, PRUNE, DISTILL, QUANTIZE, knowledge())


def test_distillation_that_gained_is_told_in_points(tmp_path):
    data, page, markdown, _ = texts(write(tmp_path, KEPT, (TRAIN, PRUNE, TRAINED, quantized(0.9547), knowledge(-0.05))))
    ablation = data["ablation"]
    assert (ablation["of"], ablation["with"], ablation["without"]) == ("torch", 0.9667, 0.9547)
    assert ablation["difference"] == pytest.approx(-0.012)
    for text in (page, markdown):
        assert "Without distillation: 95.5% (−1.2 points)" in text
        assert "Distillation gained 1.2 points: 95.5% without it, 96.7% with it" in text
        assert "one seed" in text
    assert data["headline"]["facts"]["ablation"]["tone"] == ""
    assert not any("istillation" in warning for warning in data["warnings"])
    *_, last = summary_rows(data)
    assert last["network"] == "without distillation"
    assert last["accuracy"] == "95.5% (−1.2 points) (torch)"
    assert last["vs parent"] == "−2.0 points"
    assert last["size"] == last["fps"] == "not measured"
    assert len({tuple(row) for row in summary_rows(data)}) == 1


def test_distillation_that_lost_is_a_warning(tmp_path):
    control = (TRAIN, PRUNE, TRAINED, quantized(0.9707), knowledge())
    data, page, markdown, html = texts(write(tmp_path, KEPT, control))
    sentence = "Distillation lost 0.4 points: 97.1% without it, 96.7% with it"
    assert sentence + " (1 of 360 images, one seed)." in data["warnings"]
    for text in (page, markdown):
        assert "Without distillation: 97.1% (+0.4 points)" in text
        assert sentence in text
    assert re.search(r'class="value bad[^"]*">97\.1% \(\+0\.4 points\)', html)


@pytest.mark.parametrize(
    ("without", "sentence"),
    [
        (0.9667, "Distillation changed nothing: 96.7% with and without it"),
        (0.96675, "Distillation lost less than 0.1 points"),
        (0.96665, "Distillation gained less than 0.1 points"),
    ],
)
def test_small_differences_are_not_made_larger(tmp_path, without, sentence):
    data, page, markdown, _ = texts(write(tmp_path, KEPT[:4], (TRAIN, PRUNE, TRAINED, quantized(without))))
    assert sentence in page
    assert sentence in markdown
    assert any(sentence in warning for warning in data["warnings"]) == ("lost" in sentence)


def test_files_are_compared_where_both_were_measured(tmp_path):
    control = (TRAIN, PRUNE, TRAINED, quantized(0.9), EXPORT, verified(0.9583))
    data, page, _, _ = texts(write(tmp_path, WHOLE, control))
    assert (data["ablation"]["of"], data["ablation"]["with"], data["ablation"]["without"]) == (
        "int8.tflite", 0.9667, 0.9583,
    )  # fmt: skip
    assert "measured on int8.tflite, 360 images; the same training on the labels alone" in page
    assert summary_rows(data)[-1]["network"] == "without distillation, int8.tflite"
    assert summary_rows(data)[-1]["accuracy"] == "95.8% (−0.8 points)"
    again, *_ = texts(write(tmp_path / "torch", WHOLE, control[:4]))  # the control's files were not verified
    assert (again["ablation"]["of"], again["ablation"]["without"]) == ("torch", 0.9)


@pytest.mark.parametrize(
    "control",
    [None, (TRAIN,), (TRAIN, PRUNE, TRAINED)],
    ids=["nothing", "its first stage", "all but the last"],
)
def test_a_control_that_stopped_is_said_to_have(tmp_path, control):
    data, page, markdown, _ = texts(write(tmp_path, KEPT, control, finished=None))
    assert data["ablation"]["without"] is None
    assert not data["ablation"]["finished"]
    assert data["headline"]["facts"]["ablation"]["value"] == "not measured"
    assert any("without distillation did not finish" in warning for warning in data["warnings"])
    for text in (page, markdown):
        assert "The run without distillation did not finish" in text
    assert summary_rows(data)[-1]["accuracy"] == "not measured"


def test_a_control_in_the_folder_that_the_run_does_not_name_is_not_read(tmp_path):
    write(tmp_path, KEPT, (TRAIN, PRUNE, TRAINED, quantized(0.9)))
    run = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(run | {"controls": []}))
    data, page, markdown, _ = texts(tmp_path)
    assert data["ablation"] is None
    assert "ablation" not in data["headline"]["facts"]
    assert "ithout distillation" not in page + markdown


def test_a_control_whose_files_differ_is_told(tmp_path):
    differs = ("verify", None, verify(verdict="FAIL") | {"reason": "int8.onnx and int8.tflite differ by 9 LSB"})
    data, *_ = texts(write(tmp_path, WHOLE, (TRAIN, PRUNE, TRAINED, quantized(0.9), EXPORT, differs)))
    assert any("Parity of the run without distillation failed: int8.onnx and" in text for text in data["warnings"])


def test_three_networks_stand_side_by_side(tmp_path):
    control = (TRAIN, PRUNE, TRAINED, quantized(0.95), knowledge(-0.05))
    data, page, markdown, html = texts(write(tmp_path, KEPT, control))
    (found,) = data["knowledge"]
    assert (found["stage"], found["images"], found["compared"]) == ("05-knowledge", 500, True)
    rows = {row["name"]: row for row in found["measures"]}
    for name, (student, teacher) in (row for figures in FIGURES.values() for row in figures.items()):
        assert (rows[name]["student"], rows[name]["teacher"]) == (student, teacher)
        assert rows[name]["without"] == pytest.approx(student - 0.05)
    assert [rows[name]["change"] for name in ("accuracy", "ece")] == pytest.approx([0.05, 0.05])
    assert [name for name, row in rows.items() if row["worse"]] == ["ece"]  # less is better
    assert rows["kl"]["change"] == pytest.approx(-0.05)
    assert "| Accuracy | 91.0% | 88.0% | 83.0% | +5.0 points |" in markdown
    assert "| Same answer as the teacher | itself | 93.0% | 88.0% | +5.0 points |" in markdown
    assert "| KL divergence from the teacher | itself | 0.100 nats | 0.150 nats | −0.050 |" in markdown
    assert "| Expected calibration error | 5.2% | 7.1% | 2.1% | +5.0 points, worse |" in markdown
    assert "Accuracy 91.0% 88.0% 83.0% +5.0 points" in page
    assert re.search(r'class="bad">\+5\.0 points', html)
    assert "Fooled by FGSM that fools the teacher itself 66.0% 61.0% +5.0 points" in page
    assert "Accuracy under PGD 10.0% 8.0% 3.0% +5.0 points" in page
    for text in (page, markdown):
        assert "500 evaluation images; corruptions at severity 1, 3, 5 of 5; 200 of them attacked, pixels moved" in text
        for leak in ("None", "nan", "Undefined", "{{", "{%"):
            assert leak not in text
    drawing = html.partition("Accuracy on changed images</h3>")[2].partition("</svg>")[0] + "</svg>"
    ElementTree.fromstring(drawing[drawing.index("<svg") :])
    for word in ("as they are", "Contrast", "JPEG", ">FGSM<", ">PGD<", "without distillation", "teacher"):
        assert word in drawing
    assert "corruptions" not in drawing.lower()


def test_worse_is_said_where_less_of_a_measure_is_worse(tmp_path):
    control = (TRAIN, PRUNE, TRAINED, quantized(0.95), knowledge(0.05))
    data, *_ = texts(write(tmp_path, KEPT, control))
    worse = [row["name"] for row in data["knowledge"][0]["measures"] if row["worse"]]
    every = [name for figures in FIGURES.values() for name in figures]
    neither = ("ece", "fgsm_of_teacher_fools_student", "invariance_to_flips")
    assert sorted(worse) == sorted({*every, "kl"} - {*neither})


def test_without_a_control_there_are_two_columns(tmp_path):
    data, page, markdown, html = texts(write_run(tmp_path, (*WHOLE[:4], knowledge(), EXPORT, VERIFY)))
    assert data["ablation"] is None
    assert not data["knowledge"][0]["compared"]
    assert "| Accuracy | 91.0% | 88.0% |\n" in markdown
    assert "Accuracy 91.0% 88.0% Same answer" in page
    assert "without distillation" not in html.lower()


def test_every_stage_has_a_table_of_its_own(tmp_path):
    stages = (TRAIN, PRUNE, knowledge(), DISTILL, knowledge(0.02))
    data, page, _, html = texts(write(tmp_path, stages, (TRAIN, PRUNE, knowledge(), TRAINED, knowledge(0.01))))
    assert [found["stage"] for found in data["knowledge"]] == ["03-knowledge", "05-knowledge"]
    assert [found["measures"][0]["change"] for found in data["knowledge"]] == pytest.approx([0, 0.01])
    assert "Accuracy 91.0% 88.0% 88.0% 0.0 points" in page
    assert len(set(Page(html).ids)) == len(Page(html).ids)


def test_figures_that_do_not_exist_are_said_so(tmp_path):
    nothing = knowledge(agreement_on_mistakes=None)
    data, page, markdown, _ = texts(write_run(tmp_path, (TRAIN, PRUNE, nothing)))
    assert "| Same answer where the teacher errs | itself | no such image |" in markdown
    assert "no such image" in page
    assert read_report(tmp_path) == data


def test_runs_without_either_have_no_such_section(tmp_path):
    _, page, markdown, _ = texts(write_run(tmp_path, WHOLE))
    assert "What was distilled" not in page + markdown
