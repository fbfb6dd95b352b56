import json
import shutil
from pathlib import Path

import pytest
import torch

from compress import recipe as recipes
from compress.errors import CompressError, GateError, ModelError, TrainingError
from compress.pipeline import Outcome, run_recipe
from compress.progress import Silent
from compress.report import write_report

NETWORK = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2))
        self.head = nn.Linear(32 * 4 * 4, num_classes)

    def forward(self, x):
        x = self.body(x)
        return self.head(x.view(x.size(0), -1))
"""

RECIPE = """
name: small
model: {use: "mynet:Net"}
data: {use: digits}
preprocess: {size: 16, mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}
stages:
  - {use: train, epochs: 3, lr: 0.05}
  - {use: prune, goal: {macs: 0.5}}
  - {use: distill, epochs: 2, lr: 0.02}
  - {use: quantize, epochs: 1}
  - {use: export}
  - {use: verify}
  - {use: benchmark, rounds: 1, runs: 5, warmup_s: 0.0, tolerance: 10.0}
"""

ALL = ["00-load", "01-train", "02-prune", "03-distill", "04-quantize", "05-export", "06-verify", "07-benchmark"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: a network, a recipe, and one finished run of it."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "mynet.py").write_text(NETWORK)
    (folder / "recipe.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        go(folder)
    return folder


@pytest.fixture(autouse=True)
def _inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def go(place: Path, *overrides: str, out: str = "run") -> Outcome:
    recipe = recipes.load(place / "recipe.yaml", overrides)
    return run_recipe(recipe, place / out, Silent(), command="compress run", base=place)


def manifest(place: Path, label: str, out: str = "run") -> dict:
    return json.loads((place / out / "stages" / label / "manifest.json").read_text())


def measured_again(place: Path, out: str = "run") -> list[str]:
    """The benchmark, where it was NOISY: on a busy machine that is no fault, and the next run measures again."""
    pairs = manifest(place, ALL[-1], out)["metrics"]["pairs"]
    return ALL[-1:] if any(pair["verdict"] == "NOISY" for pair in pairs) else []


def test_every_stage_leaves_a_manifest_whose_files_are_there(place):
    facts = json.loads((place / "run/run.json").read_text())
    assert facts["stages"] == ALL
    assert sorted(path.name for path in (place / "run/stages").iterdir()) == ALL
    for label in ALL:
        for name, file in manifest(place, label)["files"].items():
            assert (place / "run/stages" / label / name).stat().st_size == file["size_bytes"]


def test_the_whole_chain_did_its_work(place):
    trained, pruned, quantized = (manifest(place, label)["network"] for label in (ALL[1], ALL[2], ALL[4]))
    assert trained["accuracy"] > 0.8
    assert 0.4 < pruned["macs"] / trained["macs"] <= 0.5
    assert quantized["precision"] == "int8 (fake quant)"
    assert quantized["accuracy"] > trained["accuracy"] - 0.1
    verify = manifest(place, "06-verify")["metrics"]
    assert verify["verdict"] == "PASS"
    assert verify["files"]["int8.tflite"]["accuracy"] == pytest.approx(quantized["accuracy"], abs=0.01)
    assert {row["file"] for row in manifest(place, "07-benchmark")["metrics"]["rows"]} == set(verify["files"])


def test_a_network_that_views_is_trained_in_nchw_and_told(place):
    notes = json.loads((place / "run/run.json").read_text())["data"]["notes"]
    assert any("uses .view" in note for note in notes)


def test_the_second_run_resumes_everything_and_changes_no_result(place):
    before, noisy = {label: manifest(place, label)["files"] for label in ALL}, measured_again(place)
    outcome = go(place)
    assert outcome.ran == noisy
    assert outcome.resumed == [label for label in ALL if label not in noisy]
    assert all(manifest(place, label)["files"] == before[label] for label in outcome.resumed)


def test_the_written_recipe_is_the_same_recipe(place):
    resolved = recipes.load(place / "run/recipe.yaml")
    assert resolved == recipes.load(place / "recipe.yaml")


def test_a_changed_stage_and_what_follows_run_again_with_the_same_result_as_from_scratch(place):
    changed = "stages.quantize.epochs=0"
    go(place, out="other")
    resumed = go(place, changed, out="other")
    assert resumed.resumed == ALL[:4]
    assert resumed.ran == ALL[4:]
    fresh = go(place, changed, out="fresh")
    assert fresh.ran == ALL
    for name in ("int8.onnx", "int8.tflite", "parent.onnx", "float.tflite"):
        path = f"stages/05-export/{name}"
        assert (place / "fresh" / path).read_bytes() == (place / "other" / path).read_bytes()


def test_an_altered_file_is_noticed_and_its_stage_runs_again(place):
    path = place / "run/stages/05-export/int8.onnx"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    noisy = measured_again(place)
    outcome = go(place)
    assert outcome.ran == ["05-export", *noisy]
    assert path.read_bytes() == whole


def test_stages_that_the_recipe_no_longer_has_go(place):
    go(place, "stages=[{use: train, epochs: 1}, {use: export}]", out="shorter")
    go(place, "stages=[{use: train, epochs: 1}]", out="shorter")
    assert sorted(path.name for path in (place / "shorter/stages").iterdir()) == ["00-load", "01-train"]


def test_a_diverging_stage_keeps_what_was_finished_and_leaves_no_half(place):
    with pytest.raises(TrainingError, match=r"stage 03-distill: the loss is (nan|inf)"):
        go(place, "stages.distill.lr=1e30", "stages.distill.clip_norm=null", out="diverging")
    assert sorted(path.name for path in (place / "diverging/stages").iterdir()) == ALL[:3]


def test_a_failed_parity_ends_the_run_keeps_the_report_and_is_no_result_to_resume(place):
    always = ["stages.verify.tolerance_float=1e-30"]
    for _ in range(2):
        with pytest.raises(GateError, match=r"stage 06-verify: .* differ by .*; see the report"):
            go(place, *always, out="failing")
        assert manifest(place, "06-verify", "failing")["metrics"]["verdict"] == "FAIL"
        assert not (place / "failing/stages/07-benchmark").exists()
    html = write_report(place / "failing").read_text()
    assert "FAIL" in html


def test_what_int8_cannot_do_is_refused_before_training(place):
    (place / "shrinks.py").write_text(NETWORK.replace("nn.ReLU()", "nn.Hardshrink()"))
    with pytest.raises(ModelError, match=r"layer body.2: operator Hardshrink has no int8 counterpart"):
        go(place, 'model.use="shrinks:Net"', out="refused")
    assert list((place / "refused/stages").iterdir()) == []


def test_a_run_folder_that_cannot_be_made(place):
    (place / "file").write_text("")
    with pytest.raises(CompressError, match=r"file/run: cannot be made"):
        go(place, out="file/run")


def test_weights_of_the_first_stage_load_elsewhere(place):
    """A trained network starts another recipe: the same accuracy, to the image."""
    weights = "run/stages/01-train/network/weights.safetensors"
    go(place, f"model.weights={weights}", "stages=[{use: export}]", out="again")
    assert (
        manifest(place, "00-load", "again")["network"]["accuracy"] == manifest(place, "01-train")["network"]["accuracy"]
    )


def test_the_saved_network_can_teach(place):
    teacher = "run/stages/01-train/network"
    go(place, f"stages=[{{use: distill, epochs: 1, teacher: {teacher}}}]", out="taught")
    assert manifest(place, "01-distill", "taught")["metrics"]["teacher"] == {"use": "saved", "path": teacher}


def test_a_changed_factory_or_teacher_is_another_input(place):
    taught = "stages=[{use: distill, epochs: 1, teacher: teacher}]"
    shutil.copytree(place / "run/stages/01-train/network", place / "teacher")
    shutil.copy(place / "mynet.py", place / "mynet2.py")
    model = 'model.use="mynet2:Net"'
    assert go(place, taught, model, out="inputs").ran == ["00-load", "01-distill"]
    assert go(place, taught, model, out="inputs").ran == []
    shutil.copytree(place / "run/stages/03-distill/network", place / "teacher", dirs_exist_ok=True)
    assert go(place, taught, model, out="inputs").ran == ["01-distill"]
    with (place / "mynet2.py").open("a") as file:
        file.write("# changed\n")
    assert go(place, taught, model, out="inputs").ran == ["00-load", "01-distill"]


def test_a_teacher_that_another_package_built_is_another_input(place, monkeypatch):
    from compress.pipeline import fold

    recipe = recipes.load(place / "recipe.yaml", ["stages=[{use: distill, teacher: run/stages/01-train/network}]"])
    monkeypatch.setattr(fold, "packages", lambda model: ("torchpacked",))
    keys = []
    for number in ("1.0", "2.0"):
        monkeypatch.setattr(fold.manifest, "versions", lambda names, number=number: dict.fromkeys(names, number))
        keys.append(fold.lessons_of(recipe.stages[0], place, Silent()))
    assert keys[0] != keys[1]


def test_random_state_of_the_caller_does_not_matter(place):
    torch.manual_seed(99)
    go(place, "stages=[{use: train, epochs: 3, lr: 0.05}]", out="seeded")
    a, b = (manifest(place, "01-train", out)["files"]["network/weights.safetensors"] for out in ("seeded", "run"))
    assert a == b
