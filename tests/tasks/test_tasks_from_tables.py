"""`compress run` on a table of several labels or numbers, as a user has it: files, report, gate and comparison."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pictured import COLOURS, spots, squares

from compress.cli import main
from compress.gate.record import read_run
from compress.report.report import read_report

pytestmark = pytest.mark.slow

RECIPE = """\
name: {name}
model: {{use: mobilenet_v2, width: 0.35, stem_stride: 1}}
data:
  use: csv
  path: table.csv
  split: split
  task: {task}
  label: [{labels}]
  augment: {{flip: false, crop_scale: [1, 1], color: 0}}
preprocess: {{size: 32, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5], crop: 1.0}}
stages:
  - {{use: train, epochs: 24, batch_size: 32, optimizer: adamw, lr: 0.003}}
  - {{use: prune, goal: {{macs: 0.7}}}}
  - {{use: distill, epochs: 6, batch_size: 32, optimizer: adamw, lr: 0.002}}
  - {{use: quantize, epochs: 2, batch_size: 32, distill: {{}}}}
  - {{use: export}}
  - {{use: verify, tolerance_top1: 0.1}}
  - {{use: benchmark, rounds: 1, runs: 3, warmup_s: 0, accuracy_images: 4}}
report: {{ablate_distillation: true}}
"""


def written(folder: Path, draw) -> Path:
    several = draw is squares
    labels = tuple(COLOURS) if several else ("millimetres", "down")
    rows = [f"path,split,{','.join(labels)}"]
    for split, count, seed in (("train", 384, 1), ("val", 96, 2)):
        for number, (picture, row) in enumerate(zip(*draw(count, seed), strict=True)):
            picture.save(folder / f"{split}{number}.png")
            cells = [str(int(value)) if several else repr(float(value)) for value in row]
            rows.append(",".join([f"{split}{number}.png", split, *cells]))
    (folder / "table.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    recipe = folder / "recipe.yaml"
    task = "multi_label" if several else "regression"
    recipe.write_text(RECIPE.format(name=draw.__name__, task=task, labels=", ".join(labels)), encoding="utf-8")
    return recipe


@pytest.mark.parametrize(("draw", "score", "trivial"), [(squares, "mean average precision", 0.45), (spots, "R2", 0.0)])
def test_a_table_becomes_files_a_report_and_a_baseline(draw, score, trivial, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = written(tmp_path, draw)
    assert command("run", str(recipe)) == 0
    run = tmp_path / "runs" / draw.__name__
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))["data"]
    assert facts["score"] == {"name": score}

    report = read_report(run)
    best = next(file for file in report["files"] if file["file"] == "int8.onnx")
    assert best["accuracy_of"] == "file"
    assert best["accuracy"] > trivial + 0.4
    assert [row["name"] for row in report["outputs"]["rows"]] == facts["labels"]
    page, text = ((run / f"report.{suffix}").read_text(encoding="utf-8") for suffix in ("html", "md"))
    for said in (page, text):
        assert score in said or score.capitalize() in said
        assert "top-1" not in said
        assert facts["labels"][0] in said
    assert report["ablation"]["without"] is not None
    if draw is spots:
        assert "points" not in report["headline"]["sentence"]

    record = read_run(run)
    assert record.task == facts["task"]
    assert record.files["int8.onnx"].accuracy == best["accuracy"]
    capsys.readouterr()
    assert command("gate", str(run), "--write-baseline", "base/baseline.json") == 0
    capsys.readouterr()
    assert command("gate", str(run), "--baseline", "base/baseline.json", "--only", "accuracy,size,parity") == 0
    assert "ACCEPT" in capsys.readouterr().out
    assert command("compare", str(run), str(run)) == 0
    assert set(score.split()) <= set(capsys.readouterr().out.split())  # a narrow column has one word to a line


def command(*words: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["compress", *words])
        try:
            main()
        except SystemExit as ended:
            return int(ended.code or 0)
    return 0
