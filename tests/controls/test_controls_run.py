"""Controls of a whole run: with times that are worked out from the files, and once with those of this machine."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnx
import pytest

from compress import recipe as recipes
from compress.errors import GateError, TrainingError
from compress.pipeline import run_recipe
from compress.progress import Silent
from compress.report import read_report, summary_rows, write_report
from compress.targets import Comparison, asking

pytestmark = pytest.mark.slow  # 50 s together on an idle core: eight networks are trained, exported and verified

NETWORK = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(
            nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))
"""
RECIPE = """
name: small
model: {use: "slim:Net"}
data: {use: digits}
preprocess: {size: 24, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}
stages:
  - {use: train, epochs: 2, lr: 0.05}
  - {use: prune, goal: {macs: 0.4}, round_to: 4}
  - {use: distill, epochs: 1, lr: 0.02}
  - {use: quantize, epochs: 1, calibration_images: 32}
  - {use: export, formats: [onnx], kinds: [parent, int8]}
  - {use: verify}
report: {controls: {which: [uniform_width, lower_resolution, mac_pruning, ptq_only], seeds: 2}}
"""


def time_ms(path: Path) -> float:
    """Of a file, worked out: multiply-adds of its convolutions, and a little for being called."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    shapes = {one.name: [dim.dim_value for dim in one.type.tensor_type.shape.dim] for one in model.graph.value_info}
    constants = {one.name: list(one.dims) for one in model.graph.initializer}
    made = {output: node for node in model.graph.node for output in node.output}
    macs = 0
    for node in model.graph.node:
        if node.op_type == "Conv":
            weight = node.input[1]
            while weight not in constants:  # behind a DequantizeLinear
                weight = made[weight].input[0]
            macs += math.prod(constants[weight]) * math.prod(shapes[node.output[0]][2:])
    return 0.01 + macs * (1e-6 if "int8" in path.name else 4e-6)


class StandIn:
    """In place of `asking.compare`: the same answer every time, and a count of what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, machine: Any, files: Mapping[str, Path], measuring: Any, **_: Any) -> Comparison:
        self.asked.append(list(files))
        times = {name: time_ms(path) for name, path in files.items()}
        first, *others = times
        rows = [{"file": name, "runtime": "onnxruntime", "p50_ms": ms} for name, ms in times.items()]
        pairs = [
            {"baseline": first, "candidate": name, "speedup": times[first] / times[name], "verdict": "OK",
             "interval": [0.999 * times[first] / times[name], 1.001 * times[first] / times[name]]}
            for name in others
        ]  # fmt: skip
        return Comparison({"target": "local", "cpu": "a stand-in", "arch": "x86_64", "is_arm": False}, rows, pairs, [])


def go(place: Path, *overrides: str) -> Any:
    recipe = recipes.load(place / "recipe.yaml", overrides)
    return run_recipe(recipe, place / "run", Silent(), command="compress run", base=place)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("controls")
    (folder / "slim.py").write_text(NETWORK)
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def ran(place: Path) -> tuple[Path, StandIn]:
    stand_in = StandIn()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(asking, "compare", stand_in)
        go(place)
    return place / "run", stand_in


@pytest.fixture(autouse=True)
def _inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def manifest(folder: Path, label: str) -> dict[str, Any]:
    return read(folder / "stages" / label / "manifest.json")


def test_run_json_says_what_came_of_it(ran):
    run, _ = ran
    facts = read(run / "run.json")
    found = facts["equal_latency"]
    assert found["finished"]
    assert (found["file"], found["runtime"], found["seeds"], found["target"]) == (
        "int8.onnx",
        "onnxruntime",
        2,
        "local",
    )
    networks = {one["name"]: one for one in found["networks"]}
    assert list(networks) == ["ours", "uniform_width", "lower_resolution", "mac_pruning", "ptq_only"]
    assert networks["mac_pruning"]["left_out"] == "the recipe prunes to multiply-adds itself"
    folders = [folder for one in networks.values() for folder in one["folders"]]
    assert folders == [
        ".", "controls/ours-2", "controls/uniform_width", "controls/uniform_width-2", "controls/lower_resolution",
        "controls/lower_resolution-2", "controls/ptq_only", "controls/ptq_only-2",
    ]  # fmt: skip
    assert sorted(facts["controls"]) == sorted(Path(folder).name for folder in folders if folder != ".")
    for name, one in networks.items():
        for folder, accuracy in zip(one["folders"], one["accuracy"], strict=True):
            assert manifest(run / folder, "06-verify")["metrics"]["files"]["int8.onnx"]["accuracy"] == accuracy
            file = run / folder / "stages/05-export/int8.onnx"
            assert one["latency_ms"] == pytest.approx(time_ms(file), rel=1e-9), name
        if one["accuracy"]:
            assert one["mean"] == pytest.approx(sum(one["accuracy"]) / 2)


def test_equal_is_what_was_measured(ran):
    run, _ = ran
    networks = {one["name"]: one for one in read(run / "run.json")["equal_latency"]["networks"]}
    own = time_ms(run / "stages/05-export/int8.onnx")
    parent = time_ms(run / "stages/05-export/parent.onnx")
    for name, one in networks.items():
        if one["left_out"]:
            continue
        assert one["ratio"] == pytest.approx(one["latency_ms"] / own, rel=1e-9), name
        assert one["speedup"] == pytest.approx(parent / one["latency_ms"], rel=1e-9), name
    for name in ("uniform_width", "lower_resolution"):
        one = networks[name]
        off = [abs(math.log(tried["ratio"])) for tried in one["search"]]
        assert abs(math.log(one["ratio"])) == pytest.approx(min(off), abs=1e-6)  # the nearest of all, trained or not
        assert min(off) < 0.12  # widths come in fours and sizes in pixels
    assert networks["ptq_only"]["ratio"] > 1.3
    assert networks["lower_resolution"]["setting"]["size"] < 24
    assert 0 < networks["uniform_width"]["setting"]["macs"] < 1


def test_every_control_begins_with_the_parent_and_has_its_own_seeds(ran):
    run, _ = ran
    weights = (run / "stages/01-train/network/weights.safetensors").read_bytes()
    for name in ("ours-2", "uniform_width", "uniform_width-2", "ptq_only"):
        assert (run / "controls" / name / "stages/01-train/network/weights.safetensors").read_bytes() == weights
    small = run / "controls/lower_resolution"
    assert (small / "stages/00-load/network/weights.safetensors").stat().st_size == len(weights)
    assert manifest(small, "03-distill")["settings"]["teacher"]["path"] == "run/stages/01-train/network"
    for name in ("uniform_width", "lower_resolution", "ptq_only"):
        one, two = (manifest(run / "controls" / folder, "04-quantize") for folder in (name, f"{name}-2"))
        assert one["seed"] == manifest(run, "04-quantize")["seed"]
        assert two["seed"] != one["seed"]
        assert two["key"] != one["key"]
    one, two = ((run / folder / "stages/03-distill/network/weights.safetensors").read_bytes()
                for folder in ("controls/uniform_width", "controls/uniform_width-2"))  # fmt: skip
    assert one != two


def test_the_channels_of_uniform_width_are_the_same_share(ran):
    run, _ = ran
    channels = manifest(run / "controls/uniform_width", "02-prune")["metrics"]["channels"]
    shares = [one["after"][0] / one["before"][0] for one in channels[:-1]]
    assert max(shares) - min(shares) <= 4 / 32
    assert channels[-1]["after"][0] == channels[-1]["before"][0] == 10
    for before, after in pairwise(channels):
        assert after["after"][1] == before["after"][0]


def test_again_nothing_is_trained_or_timed(place, ran, monkeypatch):
    run, stand_in = ran
    before, asked = read(run / "run.json")["equal_latency"], len(stand_in.asked)

    def trains(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(asking, "compare", trains)
    assert go(place).ran == []
    assert read(run / "run.json")["equal_latency"] == before
    assert len(stand_in.asked) == asked
    # Cut off in the search and in a training: both go on, and what is kept is not measured again.
    (run / "controls/times.json").unlink()
    second = StandIn()
    monkeypatch.setattr(asking, "compare", second)
    go(place)
    assert len(second.asked) == 1
    assert read(run / "run.json")["equal_latency"] == before


def test_the_report_says_who_won(ran):
    run, _ = ran
    html = write_report(run).read_text()
    report, markdown = read_report(run), (run / "report.md").read_text()
    rows = {row["name"]: row for row in report["controls"]["rows"]}
    assert set(rows) == {"this network", "uniform width", "lower resolution", "PTQ only"}
    for name, row in rows.items():
        assert " ± " in row["accuracy_said"]
        assert row["accuracy_said"] in markdown
        assert row["accuracy_said"] in html
        if name != "this network":
            assert row["said"] in markdown.replace("\\", "")
            assert f"control {name}" in " ".join(one["network"] for one in summary_rows(report))
    assert "mean ± standard deviation over 2 seeds" in html
    assert "no MAC pruning: the recipe prunes to multiply-adds itself" in markdown


def test_a_control_that_fails_keeps_the_others(place, ran, monkeypatch):
    run, stand_in = ran
    monkeypatch.setattr(asking, "compare", stand_in)

    def fails(self: Any, product: Any, run: Any) -> None:
        raise TrainingError(f"stage {run.stage}", "the loss is nan at epoch 1, step 1", "try a lower lr")

    before = read(run / "run.json")["equal_latency"]["networks"]
    monkeypatch.setattr("compress.stages.distill.Distill.apply", fails)
    damaged = run / "controls/uniform_width-2/stages/03-distill/manifest.json"
    kept = damaged.read_bytes()
    damaged.unlink()
    with pytest.raises(GateError, match=r"uniform width: the loss is nan.*the run itself is complete"):
        go(place)
    networks = {one["name"]: one for one in read(run / "run.json")["equal_latency"]["networks"]}
    assert networks["uniform_width"]["failed"]
    assert len(networks["uniform_width"]["accuracy"]) == 1
    assert networks["lower_resolution"] == next(one for one in before if one["name"] == "lower_resolution")
    assert any("uniform width failed" in warning for warning in read_report(run)["warnings"])
    damaged.parent.mkdir(exist_ok=True)
    damaged.write_bytes(kept)
    monkeypatch.undo()


def test_on_this_machine(tmp_path, monkeypatch):
    """Everything with real times."""
    (tmp_path / "slim.py").write_text(NETWORK)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    asked = "report.controls={which: [uniform_width], searches: 4}"
    recipe = recipes.load(tmp_path / "recipe.yaml", [asked, "preprocess.size=32"])
    said = recipe.model_dump(mode="json")
    said["stages"].append({"use": "benchmark", "runtimes": ["onnxruntime"], "rounds": 3, "runs": 60, "warmup_s": 0.1})
    recipe = type(recipe).model_validate_json(json.dumps(said))
    run_recipe(recipe, tmp_path / "run", Silent(), command="compress run", base=tmp_path)
    networks = {one["name"]: one for one in read(tmp_path / "run/run.json")["equal_latency"]["networks"]}
    # Neighbours on this machine may take half of it at any time.
    assert 0.5 < networks["uniform_width"]["ratio"] < 2
    assert networks["uniform_width"]["verdict"] in ("win", "tie", "lose", "trade")
    assert networks["ours"]["speedup"] > 0
    assert "Controls at equal latency" in write_report(tmp_path / "run").read_text()
