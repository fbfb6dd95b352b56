"""A multi-label network and a regression learn, are pruned, distilled and quantized, and their files are judged."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import SmallNet
from pictured import pictured, spots, squares
from sklearn.metrics import average_precision_score, r2_score

from compress.errors import ModelError
from compress.gate import answers
from compress.product import Network, Product, Run, Structure
from compress.progress import Silent
from compress.stages.benchmark import Benchmark
from compress.stages.distill import Distill
from compress.stages.export import Export
from compress.stages.prune import Prune
from compress.stages.quantize import Quantize
from compress.stages.train import Train
from compress.stages.verify import Verify
from compress.teachers.teacher import refuse_other_task
from compress.verification.verify import verify_files

STAGES = (
    Train(use="train", epochs=8, batch_size=32, lr=0.05, augment=False),
    Prune.model_validate({"use": "prune", "goal": {"macs": 0.7}, "criterion": {"use": "taylor"}}),
    Distill(use="distill", epochs=4, batch_size=32, augment=False),
    Quantize.model_validate({"use": "quantize", "epochs": 1, "augment": False, "distill": {}}),
    Export(use="export"),
    Verify(use="verify"),
    Benchmark(use="benchmark", rounds=1, runs=1, warmup_s=0, accuracy_images=4),
)
SOFT = {"multi_label": "binary_kd", "regression": "mse"}
SCORES = {
    "multi_label": lambda labels, outputs: average_precision_score(labels, outputs, average="macro"),
    "regression": r2_score,
}


@pytest.fixture(scope="module", params=[squares, spots], ids=["multi_label", "regression"])
def taken(request, tmp_path_factory):
    """The data, and what each stage made of a fresh network, by the stage's name."""
    data = pictured(request.param)
    torch.manual_seed(0)
    structure = Structure(
        model={"use": "tests:none"},
        num_classes=len(data.labels),
        preprocess=data.preprocess,
        task=data.task,
        scale=data.scale,
    )
    product = Product(Network(SmallNet(len(data.labels)).eval(), structure))
    products = {"fresh": product}
    for stage in STAGES:
        folder = tmp_path_factory.mktemp("run") / "stages" / stage.use
        folder.mkdir(parents=True)
        run = Run(folder, data, torch.device("cpu"), seed=1, progress=Silent(), recipe_hash="0" * 64, stage=stage.use)
        products[stage.use] = product = stage.apply(product, run)
    return data, products


def truth(data) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, C, H, W) and what is right, in the data's own unit."""
    batches = list(data.batches("evaluation", batch_size=64))
    return np.concatenate([batch.images_NCHW.numpy() for batch in batches]), data.evaluation.targets


def in_units(data, outputs: np.ndarray) -> np.ndarray:
    return outputs if data.scale is None else outputs * data.scale.std + data.scale.mean


def test_training_learns_far_more_than_the_mean_and_compression_keeps_it(taken):
    data, products = taken
    images, right = truth(data)

    def score(name: str) -> float:
        with torch.no_grad():
            outputs = products[name].network.module(torch.from_numpy(images)).numpy()
        return SCORES[data.task](right, in_units(data, outputs))

    trivial = right.mean() if data.task == "multi_label" else 0
    assert abs(score("fresh") - trivial) < 0.2
    assert score("train") > 0.85
    assert score("quantize") > score("train") - 0.08


def test_the_default_loss_follows_the_task(taken):
    data, products = taken
    soft = SOFT[data.task]
    assert [loss["use"] for loss in products["distill"].metrics["losses"]] == [soft, "fitnets"]
    assert [loss["use"] for loss in products["quantize"].metrics["losses"]] == [soft]


def test_files_are_verified_and_scored_as_scikit_learn_would(taken):
    data, products = taken
    metrics = products["verify"].metrics
    assert metrics["verdict"] == "PASS"
    assert metrics["task"] == data.task
    assert set(metrics["files"]) == {f"{k}.{s}" for k in ("parent", "float", "int8") for s in ("onnx", "tflite")}
    images, right = truth(data)
    for name in ("parent.onnx", "int8.onnx"):
        session = onnxruntime.InferenceSession(products["export"].files[name])
        (name_of_input,) = [value.name for value in session.get_inputs()]
        # Int8 files take real numbers and give them: their first and last operators are the grids.
        outputs = np.concatenate([session.run(None, {name_of_input: image[None]})[0] for image in images])
        file = metrics["files"][name]
        expected = SCORES[data.task](right, in_units(data, outputs))
        assert file["accuracy"] == pytest.approx(expected, abs=1e-6)
        assert [row["name"] for row in file["outputs"]] == list(data.labels)
        if data.task == "regression":
            errors = np.abs(in_units(data, outputs) - right).mean(0)
            assert [row["mae"] for row in file["outputs"]] == pytest.approx(errors.tolist(), rel=1e-4)
        else:
            assert [row["positives"] for row in file["outputs"]] == right.sum(0).tolist()


def test_the_runtimes_agree_and_rounding_is_judged_by_the_tasks_decisions(taken):
    _, products = taken
    pairs = {(pair["a"], pair["b"]): pair for pair in products["verify"].metrics["agreement"]}
    assert pairs[("int8.onnx", "int8.tflite")]["max_lsb"] <= 1
    assert pairs[("trained torch int8", "frozen torch int8")]["top1_agreement"] > 0.95
    assert all(pair["verdict"] == "PASS" for pair in pairs.values())


def test_files_say_what_their_outputs_are(taken, tmp_path):
    data, products = taken
    verification = verify_files([products["export"].files[f"int8.{s}"] for s in ("onnx", "tflite")], progress=Silent())
    assert verification.task == data.task
    assert verification.passed
    session = onnxruntime.InferenceSession(products["export"].files["int8.onnx"])
    about = session.get_modelmeta().custom_metadata_map
    assert about["compress.task"] == data.task
    assert json.loads(about["compress.labels"]) == list(data.labels)
    if data.task == "regression":
        assert json.loads(about["compress.units"]) == data.scale.model_dump(mode="json")
    else:
        assert "compress.units" not in about


def test_answers_are_kept_for_paired_comparisons(taken):
    data, products = taken
    place = products["export"].files["parent.onnx"].parents[1]  # of another run folder: each stage has its own here
    assert place.is_dir()
    metrics = products["verify"].metrics
    content = answers.from_dict(
        answers.Answers(data.evaluation.targets, {"int8.onnx": data.evaluation.targets}).as_dict()
    )
    assert np.array_equal(content.labels_N, data.evaluation.targets)
    assert metrics["images"] == len(content.labels_N)


def test_the_benchmark_counts_no_right_answers(taken):
    _, products = taken
    metrics = products["benchmark"].metrics
    assert {row["file"] for row in metrics["rows"]} == set(products["export"].files)
    assert [sample["accuracy"] for sample in metrics["accuracy"]] == [None] * len(products["export"].files)
    assert all(sample["equal"] for sample in metrics["accuracy"])


def test_a_teacher_of_another_task_or_unit_is_refused(taken):
    data, products = taken
    network = products["train"].network
    refuse_other_task(network, data, "saved")
    other = "regression" if data.task == "multi_label" else "multi_label"
    with pytest.raises(ModelError, match=f"trained for {data.task}, the data is for {other}"):
        refuse_other_task(network, dataclasses.replace(data, task=other), "saved")
    if data.task == "regression":
        with pytest.raises(ModelError, match="another unit"):
            refuse_other_task(network, dataclasses.replace(data, standardize=False), "saved")


def test_pictures_folder_is_clean(taken, tmp_path: Path):
    """Nothing of a confusion of classes is measured where there are none."""
    _, products = taken
    assert not {"confusion", "wrong"} & set(products["verify"].metrics)
