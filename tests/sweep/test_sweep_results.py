"""Which results nothing else beats, against a plain count over all pairs; repetitions, failures and noise are said."""

import json
import random
import re
import statistics
from pathlib import Path

import pytest

from compress.recipe import Recipe
from compress.sweep.matrix import Cell
from compress.sweep.page import as_html, as_markdown, rows
from compress.sweep.results import Figures, Result, as_json, best, figures, grouped, spread

RECIPE = Recipe.model_validate_json(
    json.dumps({"name": "x", "model": {"use": "mobilenet_v2"}, "data": {"use": "digits"}, "stages": [{"use": "train"}]})
)
STATEMENT = "These are x86 figures on a CPU, not ARM fps."
FACTS = {
    "name": "sweep",
    "recipe": "recipe.yaml",
    "command": "compress sweep recipe.yaml -p 'lr=1,2'",
    "compress": "0",
    "started": "2026-01-01T00:00:00+00:00",
    "finished": "2026-01-01T01:00:00+00:00",
    "engine": {"name": "joblib", "version": "1", "workers": 2, "threads": 1},
    "notes": ["lr=1: its worker was killed"],
}


def result(name: str, accuracy: float | None, latency: float | None, size: int | None, seed: int = 0, **more) -> Result:
    status = more.pop("status", "finished")
    error = more.pop("error", "")
    cell = Cell(f"lr={name}_seed={seed}", (("lr", name), ("seed", str(seed))), (f"lr={name}", f"seed={seed}"), RECIPE)
    found = Figures("int8.onnx", accuracy, "file", latency, size, machine=STATEMENT, **more)
    return Result(cell, status, found if status == "finished" else Figures(), error)


def test_the_best_are_those_that_no_other_dominates():
    drawn = random.Random(0)
    for _ in range(50):
        points = [
            {"accuracy": drawn.randrange(4), "latency_ms": drawn.randrange(4), "size_bytes": drawn.randrange(4)}
            for _ in range(drawn.randrange(1, 12))
        ]
        as_losses = [(-p["accuracy"], p["latency_ms"], p["size_bytes"]) for p in points]
        beaten = [
            any(other != one and all(a <= b for a, b in zip(other, one, strict=True)) for other in as_losses)
            for one in as_losses
        ]
        assert best(points) == [not one for one in beaten]
        assert any(best(points))


def test_equal_points_are_both_among_the_best_and_an_incomplete_one_is_compared_with_none():
    whole = {"accuracy": 0.9, "latency_ms": 1.0, "size_bytes": 10.0}
    assert best([whole, dict(whole), {"accuracy": 1.0}]) == [True, True, False]
    assert best([{"accuracy": 0.9, "size_bytes": 2}, {"accuracy": 0.8, "size_bytes": 3}]) == [True, False]
    assert best([{}, {}]) == [False, False]
    assert best([]) == []


def test_repetitions_are_one_row_with_mean_and_spread():
    groups = grouped([result("1", value, 2.0, 100, seed) for seed, value in enumerate((0.8, 0.9, 0.94))])
    assert len(groups) == 1
    found = groups[0].spreads["accuracy"]
    assert found.mean == pytest.approx(0.88)
    assert found.deviation == pytest.approx(statistics.stdev((0.8, 0.9, 0.94)))
    assert (found.least, found.most, found.count) == (0.8, 0.94, 3)
    assert spread([1.0]).deviation is None
    assert rows(groups)[0]["Accuracy"] == "88.0% ± 7.2%"
    assert rows(groups)[0]["seeds"] == "3 of 3"
    assert groups[0].name == "lr=1"


def test_failed_and_noisy_cells_are_said_and_a_failed_one_has_no_part_in_the_figures():
    groups = grouped(
        [
            result("1", 0.9, 2.0, 100, 0),
            result("1", None, None, None, 1, status="failed", error="stage 01-train: the loss is nan"),
            result("2", 0.8, 1.0, 100, 0, noisy=True),
            result("2", 0.8, 1.2, 100, 1),
            result("3", None, None, None, 0, status="not finished"),
        ]
    )
    assert [group.best for group in groups] == [True, True, False]
    assert groups[0].spreads["accuracy"].count == 1
    said = [row["remarks"] for row in rows(groups)]
    assert said == ["1 failed", "NOISY: its latency is a rough figure (1 of 2)", "not finished"]
    facts = FACTS | as_json(groups, Path("sweeps/x"))
    text, html = as_markdown(facts, groups), as_html(facts, groups)
    for page in (text, html):
        assert "stage 01-train: the loss is nan" in page
        assert "NOISY" in page
        assert STATEMENT in page
    assert json.loads(json.dumps(facts)) == facts
    statuses = [cell["status"] for cell in facts["cells"]]
    assert statuses == ["finished", "failed", "finished", "finished", "not finished"]


def test_the_page_shows_every_setting_and_needs_nothing_but_itself():
    groups = grouped([result(str(n), 0.7 + n / 50, 1.0 + n, 1000 * n, s) for n in (1, 2, 3) for s in (0, 1)])
    html = as_html(FACTS | as_json(groups, Path("x")), groups)
    svg = html[html.index("<svg ") : html.index("</svg>")]
    assert not set(re.findall(r"#[0-9a-fA-F]{6}", svg)), "colours are the page's"
    for number in (1, 2, 3):
        assert f">{number}</text>" in svg
        assert f"lr={number}" in html
    targets = re.findall(r'(?:href|src)="([^"#]+)"', html)
    assert targets == [f"lr%3D{n}_seed%3D{s}/report.html" for n in (1, 2, 3) for s in (0, 1)]
    assert html == as_html(FACTS | as_json(groups, Path("x")), groups), "the same figures give the same page"


def test_a_page_without_latency_draws_size_and_one_without_results_says_so():
    untimed = grouped([result("1", 0.9, None, 100), result("2", 0.8, None, 50)])
    assert "size, MB" in as_html(FACTS | as_json(untimed, Path("x")), untimed)
    assert "(latency not measured)" in as_markdown(FACTS, untimed)
    nothing = grouped([result("1", None, None, None, status="not finished")])
    assert "Nothing finished" in as_html(FACTS | as_json(nothing, Path("x")), nothing)


def test_text_of_a_recipe_is_text_in_the_page():
    groups = grouped([result("<b>&", 0.9, 1.0, 10), result("2", None, None, None, status="failed", error="<script>x")])
    html = as_html(FACTS | as_json(groups, Path("x")), groups)
    assert "<script>x" not in html
    assert "lr=&lt;b&gt;&amp;" in html


def test_a_folder_without_a_run_has_no_figures(tmp_path):
    assert figures(tmp_path) == Figures()
