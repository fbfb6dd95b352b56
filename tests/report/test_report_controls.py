"""What the report says of controls and of sensitivity, from run folders written by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from test_report import WHOLE, Page, write_run
from torch import nn

from compress.report import read_report, summary_rows, write_report
from compress.stages.prune import changed_channels

CONDITIONS = {"target": "local", "cpu": "a CPU", "arch": "x86_64", "is_arm": False, "threads": 1}


def network(name: str, accuracy: list[float], ratio: float = 1.0, **more: Any) -> dict[str, Any]:
    mean = sum(accuracy) / len(accuracy)
    return {
        "name": name, "folders": ["."], "left_out": "", "failed": [], "setting": {}, "search": [],
        "accuracy": accuracy, "mean": mean, "sd": 0.01 if len(accuracy) > 1 else None, "size_bytes": 24_500,
        "macs": 2_000_000, "params": 17_000, "latency_ms": 0.5 * ratio, "ratio": ratio,
        "ratio_interval": [0.99 * ratio, 1.01 * ratio], "speedup": 6 / ratio, "noisy": False,
        "verdict": None, "said": "", "difference": None, "images_p": None, "seeds_p": None,
    } | more  # fmt: skip


OURS = network("ours", [0.91, 0.92, 0.93])
LOST = network(
    "uniform_width",
    [0.94, 0.95, 0.93],
    setting={"macs": 0.345},
    verdict="lose",
    difference=-0.02,
    said="loses by 2.0 points of accuracy, equal latency (images p 0.001, 3 seeds p 0.01)",
)
TIE = network(
    "lower_resolution",
    [0.92, 0.92, 0.91],
    setting={"size": 112},
    verdict="tie",
    difference=0.003,
    said="a tie: 0.3 points of accuracy ahead are within the noise (images p 0.4, 3 seeds p 0.5)",
)
WON = network(
    "random_criterion",
    [0.8, 0.81, 0.82],
    verdict="win",
    difference=0.11,
    said="wins by 11.0 points of accuracy, equal latency (images p below 0.0001, 3 seeds p 0.002)",
)
TRADE = network(
    "ptq_only",
    [0.95],
    1.6,
    verdict="trade",
    difference=-0.03,
    said="a trade: the control is 60% slower and 3.0 points of accuracy better (images p 0.001, one seed)",
)
NONE = {"name": "mac_pruning", "left_out": "the recipe prunes to multiply-adds itself"}


def write(folder: Path, *networks: dict[str, Any], finished: bool = True, seeds: int = 3) -> Path:
    found = {"finished": finished, "file": "int8.tflite", "runtime": "litert", "target": "local", "threads": 1,
             "tolerance": 0.02, "seeds": seeds, "conditions": CONDITIONS, "networks": list(networks)}  # fmt: skip
    return write_run(folder, WHOLE, equal_latency=found)


def texts(folder: Path) -> tuple[dict[str, Any], str, str]:
    html = write_report(folder).read_text()
    return read_report(folder), html, (folder / "report.md").read_text()


def test_a_network_that_loses_is_said_to_lose_everywhere(tmp_path):
    report, html, markdown = texts(write(tmp_path, OURS, LOST, TIE, WON, TRADE, NONE))
    assert report["headline"]["sentence"].endswith("; loses to uniform width")
    assert report["headline"]["facts"]["controls"]["tone"] == "bad"
    assert report["headline"]["facts"]["controls"]["detail"] == "1 win, 1 tie, 1 trade, 1 loss"
    lost = [
        text for text in report["warnings"] if text.startswith("It loses to the control uniform width by 2.0 points")
    ]
    assert len(lost) == 1
    for text in (html, markdown):
        assert "loses to uniform width" in text
        assert "It loses to the control uniform width by 2.0 points" in text
        assert "92.0% ± 1.0" in text
        assert "+2.0 points" in text
        assert "35% of the multiply-adds" in text or "34% of the multiply-adds" in text
        assert "112 px" in text
        assert "the recipe prunes to multiply-adds itself" in text
        for leak in ("None", "nan", "Undefined", "{{", "{%"):
            assert leak not in text
    assert re.search(r'class="alert bad">It loses to the control uniform width', html)
    names = {row["network"]: row for row in summary_rows(report)}
    assert names["control uniform width: better"]["accuracy"] == "94.0% ± 1.0"
    assert names["control random criterion: beaten"]["p50"] == "0.50 ms"
    assert names["control PTQ only: a trade"]["speed-up"] == "3.75×"
    assert len(set(Page(html).ids)) == len(Page(html).ids)


def test_a_tie_is_no_win(tmp_path):
    report = read_report(write(tmp_path, OURS, TIE))
    assert report["headline"]["sentence"].endswith("; beats none of 1 controls")
    assert report["headline"]["facts"]["controls"]["tone"] == ""
    assert any("Against lower resolution it is a tie" in text for text in report["warnings"])


def test_one_seed_is_said(tmp_path):
    won = network("ptq_only", [0.8], verdict="win", difference=0.1, said="wins by 10.0 points of accuracy")
    report, html, markdown = texts(write(tmp_path, network("ours", [0.9]), won, seeds=1))
    assert report["headline"]["sentence"].endswith("; beats 1 of 1 controls")
    for text in (html, markdown):
        assert "one seed, so without a spread" in text
        assert "Each control was trained once" in text


def test_controls_that_are_not_finished_are_no_verdict(tmp_path):
    report, html, markdown = texts(write(tmp_path, finished=False))
    assert report["headline"]["facts"]["controls"]["value"] == "not measured"
    assert "control" not in report["headline"]["sentence"]
    for text in (html, markdown):
        assert "The controls did not finish" in text


def test_a_failed_control_and_one_without_times(tmp_path):
    untimed = dict.fromkeys(("latency_ms", "ratio", "ratio_interval", "speedup"))
    tie = {"verdict": "tie", "difference": 0.0, "said": "a tie: 0.0 points of accuracy behind are within the noise"}
    failed = network("uniform_width", [0.9]) | untimed | tie | {"failed": ["the loss is nan"]}
    report = read_report(write(tmp_path, OURS, failed))
    assert any("uniform width failed: the loss is nan" in text for text in report["warnings"])
    row = next(row for row in report["controls"]["rows"] if row["name"] == "uniform width")
    assert row["of_our_time"] == "not measured"
    assert summary_rows(report)[-1]["p50"] == "not measured"


def test_without_controls_nothing_is_said_of_them(tmp_path):
    report, html, markdown = texts(write_run(tmp_path, WHOLE))
    assert report["controls"] is None
    assert "ontrols" not in html + markdown
    assert "Sensitivity" not in html + markdown


def svg(html: str, section: str) -> ElementTree.Element:
    found = html.partition(f'<section id="{section}">')[2].partition("</svg>")[0]
    return ElementTree.fromstring(found[found.index("<svg") :] + "</svg>")


def test_the_drawing_has_a_row_for_each_network(tmp_path):
    _, html, _ = texts(write(tmp_path, OURS, LOST, TIE, WON, TRADE, NONE))
    said = " ".join(svg(html, "controls").itertext())
    for name in (
        "this network",
        "uniform width",
        "lower resolution",
        "random criterion",
        "PTQ only",
        "p50, ms",
        "better",
    ):
        assert name in said
    assert "MAC pruning" not in said


def curves(count: int = 52) -> list[dict[str, Any]]:
    """Of a network with many sets; the first is not touched, the second was only measured by accuracy."""
    sets = []
    for k in range(count):
        units = (32, 96, 144, 960)[k % 4]
        widths = list(range(units, units // 5, -8))
        cost = [0.01 * (k + 1) * (1 - width / units) ** 2 for width in widths]
        accuracy, kept = [0.9 - one for one in cost], widths[k % len(widths)]
        name = f"features.{k}.conv.0.0"
        sets.append({"name": name, "units": units, "kept": kept, "widths": widths, "kl": cost, "accuracy": accuracy})
    return sets


def with_pruning(folder: Path, **metrics: Any) -> Path:
    write_run(folder, WHOLE)
    path = next(folder.glob("stages/*-prune/manifest.json"))
    manifest = json.loads(path.read_text())
    manifest["metrics"] |= metrics
    path.write_text(json.dumps(manifest))
    return folder


def test_sensitivity_of_many_layers(tmp_path):
    blocks = [{"name": "features.3", "kl": 0.4, "dropped": True}, {"name": "features.5", "kl": 1.2, "dropped": False}]
    report, html, markdown = texts(with_pruning(tmp_path, sensitivity=curves(), blocks=blocks))
    found = report["sensitivity"]
    assert (len(found["sets"]), found["by"]) == (52, "kl")
    eighth = found["sets"][7]  # 960 channels, of which 8 * 60 is half
    assert eighth["kl_at_half"] == pytest.approx(0.01 * 8 * 0.25)
    assert eighth["kl_at_kept"] == pytest.approx(0.01 * 8 * (1 - eighth["share"]) ** 2)
    drawing = svg(html, "sensitivity")
    said = " ".join(drawing.itertext())
    assert all(f"features.{k}.conv.0.0" in said for k in range(52))
    assert len(re.findall("<svg", html)) >= 3
    size = len(html.partition('<section id="sensitivity">')[2].partition("</svg>")[0])
    assert size < 400_000  # widths of 120 steps are not 120 rectangles
    assert "| features.7.conv.0.0 | 960 |" in markdown
    assert "block features.3: 0.400 nats without it, left out" in markdown
    assert "left out" in html


def test_the_stronger_colour_is_the_greater_loss(tmp_path):
    one = {"name": "a", "units": 6, "widths": [6, 5, 4, 3, 2, 1], "kl": [0.0, 0.01, 0.04, 0.09, 0.16, 0.9]}
    _, html, _ = texts(with_pruning(tmp_path, sensitivity=[one]))
    drawing = html.partition('<section id="sensitivity"')[2].partition("</svg>")[0]
    alphas = [float(alpha) for alpha in re.findall(r"fill: var\(--bad\); opacity: ([\d.]+)", drawing)]
    assert alphas[:3] == pytest.approx([0.25, 0.5, 0.75])  # roots of the parts of 0.16, the most but for one


def test_only_accuracy(tmp_path):
    one = {"name": "a", "units": 4, "kept": None, "widths": [4, 2], "accuracy": [0.9, 0.5]}
    report, html, _ = texts(with_pruning(tmp_path, sensitivity=[one]))
    assert report["sensitivity"]["by"] == "accuracy"
    assert "Colour: accuracy lost." in html


def test_blocks_alone_are_a_table(tmp_path):
    blocks = [{"name": "features.3", "kl": None, "dropped": False}]
    assert read_report(with_pruning(tmp_path, blocks=blocks))["sensitivity"]["blocks"] == blocks


def test_channels_before_and_after():
    before = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1))
    after = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Identity(), nn.Conv2d(6, 4, 1))
    assert changed_channels(before, after, 8) == [
        {"layer": "0", "before": [8, 3], "after": [6, 3]},
        {"layer": "2", "before": [8, 8], "after": [0, 0]},
        {"layer": "3", "before": [4, 8], "after": [4, 6]},
    ]
