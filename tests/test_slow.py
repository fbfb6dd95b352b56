"""What takes minutes: the published recipes themselves, and training on two processes."""

import collections
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from test_pipeline import NETWORK, RECIPE

ROOT = Path(__file__).parents[1]
PHOTOGRAPHS = ROOT.parent / "shared" / "data"

pytestmark = pytest.mark.slow


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "160"}


def manifests(run: Path) -> dict[str, dict]:
    found = {path.parent.name: json.loads(path.read_text()) for path in run.glob("stages/*/manifest.json")}
    assert found
    return found


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory) -> tuple[Path, float]:
    """The README's main job, and how long it took."""
    out = tmp_path_factory.mktemp("digits") / "run"
    began = time.perf_counter()
    words = ["run", "recipes/mobilenetv2_arm.yaml", "--out", str(out)]
    subprocess.run([sys.executable, "-m", "compress.cli", *words], cwd=ROOT, env=environment(), check=True)
    return out, time.perf_counter() - began


def test_the_main_job_on_digits(digits_run):
    run, seconds = digits_run
    stages = manifests(run)
    parent, int8 = stages["01-train"]["network"], stages["04-quantize"]["network"]
    verify = stages["06-verify"]["metrics"]
    assert seconds < 300
    assert parent["accuracy"] > 0.95
    assert int8["macs"] <= 0.25 * parent["macs"]
    assert verify["verdict"] == "PASS"
    assert verify["files"]["int8.tflite"]["accuracy"] > parent["accuracy"] - 0.03
    assert (run / "report.html").stat().st_size > 50_000


def test_no_float_convolution_is_left_in_the_int8_file(digits_run, tmp_path):
    run, _ = digits_run
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(run / "stages/05-export/int8.onnx", options, providers=["CPUExecutionProvider"])
    kinds = collections.Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert kinds["QLinearConv"] == 52
    assert kinds["QLinearAdd"] == 10
    assert not {"Conv", "FusedConv", "Add", "Gemm", "MatMul", "GlobalAveragePool"} & kinds.keys()


def test_scales_in_tflite_are_those_of_onnx(digits_run):
    """Read with the runtime's own interpreter, not with our code."""
    from ai_edge_litert.interpreter import Interpreter

    run, _ = digits_run
    model = onnx.load(run / "stages/05-export/int8.onnx")
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    interpreter = Interpreter(model_path=str(run / "stages/05-export/int8.tflite"))
    in_tflite = {detail["name"]: detail["quantization_parameters"] for detail in interpreter.get_tensor_details()}
    compared = 0
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.output[0] in in_tflite:
            parameters = in_tflite[node.output[0]]
            assert parameters["scales"].tolist() == [constants[node.input[1]].item()]
            assert parameters["zero_points"].tolist() == [int(constants[node.input[2]]) - 128]
            compared += 1
        if node.op_type == "DequantizeLinear" and node.input[0] in constants:
            scales = in_tflite[node.input[0]]["scales"]
            assert np.array_equal(scales, constants[node.input[1]])
            compared += 1
    assert compared > 150


@pytest.mark.skipif(
    not PHOTOGRAPHS.is_dir(), reason="needs the photographs of ../shared/data, which are not part of the project"
)
def test_the_photograph_recipe_runs_every_stage(tmp_path):
    """An epoch or two of each training, on the real images and weights; `verify` at its own bounds.

    An untrained pruned network would decide by noise, where rounding changes classes.
    """
    short = [f"stages.{index}.epochs={epochs}" for index, epochs in ((0, 1), (1, 1), (3, 2), (4, 1))]
    quick = ["stages.prune.steps=1", "stages.benchmark.rounds=1"]
    words = ["run", "recipes/mobilenetv2_imagenette.yaml", *short, *quick, "--out", str(tmp_path / "run")]
    subprocess.run([sys.executable, "-m", "compress.cli", *words], cwd=ROOT, env=environment(), check=True)
    stages = manifests(tmp_path / "run")
    assert any(note.startswith("head replaced: 1000 -> 10 classes") for note in stages["00-load"]["notes"])
    assert stages["03-prune"]["metrics"]["reached"] <= 0.33
    assert stages["07-verify"]["metrics"]["verdict"] == "PASS"
    assert stages["07-verify"]["metrics"]["images"] == 3925


def on_two_processes(place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`compress run recipe.yaml ...` under torchrun; a hang is a failure."""
    (place / "mynet.py").write_text(NETWORK)
    (place / "recipe.yaml").write_text(RECIPE)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    job = ["-m", "compress.cli", "run", "recipe.yaml", "--out", "two", *words]
    settings = {**environment(), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*launcher, *job], cwd=place, env=settings, capture_output=True, text=True, timeout=600)


def test_two_processes_under_torchrun(tmp_path):
    """DistributedDataParallel over gloo: same number of steps, a trained network, written once."""
    done = on_two_processes(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("report: ") == 1
    stages = manifests(tmp_path / "two")
    assert json.loads((tmp_path / "two/run.json").read_text())["processes"] == 2
    assert stages["01-train"]["network"]["accuracy"] > 0.8
    assert stages["06-verify"]["metrics"]["verdict"] == "PASS"
    again = on_two_processes(tmp_path)
    # A benchmark that was noisy is measured again.
    noisy = any(pair["verdict"] == "NOISY" for pair in stages["07-benchmark"]["metrics"]["pairs"])
    assert again.stdout.count("unchanged, taken from the run of") == 8 - noisy


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.distill.lr=1e30", "stage 03-distill: the loss is"),  # in both processes
        ("stages.prune.keep=[nothing]", "`keep: nothing` matches no"),  # found by the first alone
        ("stages.train.batch_size=63", "batch_size 63 cannot be shared equally by 2 processes"),
        ("stages.verify.tolerance_float=1e-30", "stage 06-verify: "),
    ],
)
def test_mistakes_under_torchrun_stop_all_processes_and_are_said_once(tmp_path, override, said):
    done = on_two_processes(tmp_path, override, "stages.train.epochs=1")
    assert done.returncode != 0
    assert sum(line.startswith((said, "stage prune: ", "stage 01-train: ")) for line in done.stderr.splitlines()) == 1
    assert said in done.stderr
    assert not list((tmp_path / "two/stages").glob("*.partial"))
