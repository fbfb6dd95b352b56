"""What the report says of a goal of speed, from a run folder written by hand."""

import pytest
from test_report_controls import texts, with_pruning

SPEED = {
    "goal": "speedup: 4",
    "target": "local",
    "runtime": "onnxruntime",
    "threads": 1,
    "estimated": False,
    "parent_us": 4000.0,
    "whole_us": 2000.0,
    "most_us": 1000.0,
    "predicted_us": 900.0,
    "measured_us": 1000.0,
    "rounds": [
        {
            "step": 1,
            "most_us": 1000.0,
            "candidates": [
                {"name": "sensitivity", "us": 900.0, "kl": 0.25},
                {"name": "one share for all", "us": 990.0},
            ],
            "chosen": "sensitivity",
            "corrected": True,
        }
    ],
    "frontier": [{"us": 2000.0, "loss": 0.0}, {"us": 500.0, "loss": 12.0}],
}


def test_a_goal_of_speed_is_told_with_what_was_within_reach(tmp_path):
    report, html, markdown = texts(with_pruning(tmp_path, **SPEED))
    found = report["speed"]
    assert found["wrong"] == pytest.approx(-0.1)
    assert found["off"] == pytest.approx(0)
    assert [point["speedup"] for point in found["frontier"]] == [2, 8]
    assert found["rounds"][0]["next"]["name"] == "one share for all"
    assert '<a href="#speed">' in html
    assert "The table of layers was -10.0% off." in html
    for said in (html, markdown):
        assert "speedup: 4" in said
        assert "1,000 fps" in said
        assert "sensitivity" in said
    assert "| int8, measured | 1.0" in markdown


def test_estimated_times_are_never_called_measured(tmp_path):
    estimated = SPEED | {"estimated": True, "target": "emulated:cortex-a72", "runtime": "litert"}
    _, html, markdown = texts(with_pruning(tmp_path, **estimated))
    section = html.partition('<section id="speed">')[2].partition("</section>")[0]
    assert "all times are estimated, none is measured" in section
    assert "int8, estimated" in section
    assert "int8, measured" not in section
    assert "| int8, estimated |" in markdown


def test_a_share_of_the_multiply_adds_is_no_goal_of_speed(tmp_path):
    report, html, markdown = texts(with_pruning(tmp_path))
    assert report["speed"] is None
    assert 'id="speed"' not in html
    assert "Goal of speed" not in markdown
