"""The benchmark stage with real runtimes, on this machine and on one that pretends to be a board."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from pydantic import ValidationError

from compress.errors import TargetError
from compress.product import Network, Product, Run, Structure
from compress.report import parts
from compress.report.board import board
from compress.stages import benchmark
from compress.stages.benchmark import Benchmark, Kept, agreement, difference
from compress.targets import open_target
from compress.targets.asking import Answers
from compress.targets.local import Local

MLPERF = Path(__file__).parents[3] / "shared" / "data" / "mlperf_tiny"


class Progress:
    def __init__(self) -> None:
        self.total = 0
        self.heard: list[str] = []
        self.notes: list[str] = []

    @contextmanager
    def steps(self, label: str, total: int) -> Iterator[Callable[[str], None]]:
        self.total = total
        yield self.heard.append

    def note(self, text: str) -> None:
        self.notes.append(text)


def dense(path: Path, *, width: int) -> Path:
    weights = np.random.default_rng(0).normal(0, 0.1, (width, 3)).astype(np.float32)
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size]) for name, size in (("x", 3), ("y", width))
    ]
    nodes = [helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)]
    graph = helper.make_graph(nodes, "dense", ends[:1], ends[1:], [numpy_helper.from_array(weights, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


@pytest.fixture
def timed(tmp_path: Path) -> Product:
    """Named in an order that is not the order of measuring."""
    files = {name: dense(tmp_path / name, width=width) for name, width in (("int8.onnx", 4), ("parent.onnx", 400))}
    return Product(Network(torch.nn.Identity(), Structure(model={}, num_classes=4)), files=files)


@pytest.fixture
def stage(stripes: Any, tmp_path: Path) -> Run:
    """In a run's folder as the pipeline has it while the stage works."""
    folder = tmp_path / "run" / "stages" / "07-benchmark.partial"
    folder.mkdir(parents=True)
    return Run(folder, stripes, torch.device("cpu"), seed=0, progress=Progress(), recipe_hash="", stage="07-benchmark")


def short(**fields: Any) -> Benchmark:
    return Benchmark(use="benchmark", **{"rounds": 2, "runs": 5, "warmup_s": 0.01, **fields})


def test_measures_every_file_against_the_parent(timed: Product, stage: Run) -> None:
    after = short(runtimes=("onnxruntime",), rounds=1).apply(timed, stage)
    assert after.files == timed.files
    assert after.network is timed.network
    assert timed.metrics == {}
    assert set(after.metrics) == {"conditions", "rows", "pairs", "accuracy", "sustained"}
    assert [row["file"] for row in after.metrics["rows"]] == ["parent.onnx", "int8.onnx"]
    assert [row["kind"] for row in after.metrics["rows"]] == ["parent", "int8"]
    for row in after.metrics["rows"]:
        assert row["fps"] == pytest.approx(1000 / row["p50_ms"])
        assert row["size_bytes"] == timed.files[row["file"]].stat().st_size
    (pair,) = after.metrics["pairs"]
    assert (pair["baseline"], pair["candidate"]) == ("parent.onnx", "int8.onnx")
    assert after.metrics["conditions"]["batch"] == 1
    json.dumps(after.metrics, allow_nan=False)


def test_keeps_the_raw_samples_and_shows_progress(timed: Product, stage: Run) -> None:
    short(runtimes=("onnxruntime",)).apply(timed, stage)
    samples = json.loads((stage.folder / "samples.json").read_text())
    assert [(s["round"], s["file"], s["control"]) for s in samples] == [
        (number, file, control)
        for number in (0, 1)
        for file, control in (("parent.onnx", False), ("int8.onnx", False), ("parent.onnx", True))
    ]
    assert all(len(sample["samples_ms"]) == 5 for sample in samples)
    progress: Any = stage.progress
    assert len(progress.heard) == progress.total == 6


def test_says_which_runtime_had_nothing_to_measure(timed: Product, stage: Run) -> None:
    short(rounds=1, runs=1).apply(timed, stage)
    progress: Any = stage.progress
    assert "litert: no file of its kind, not measured" in progress.notes


def test_needs_exported_files(timed: Product, stage: Run) -> None:
    with pytest.raises(TargetError, match="export the network first"):
        short().apply(Product(timed.network), stage)


@pytest.mark.skipif(not MLPERF.is_dir(), reason=f"no reference models at {MLPERF}")
def test_measures_tflite_too(timed: Product, stage: Run) -> None:
    files = {
        **timed.files,
        "parent.tflite": MLPERF / "pretrainedResnet.tflite",
        "int8.tflite": MLPERF / "pretrainedResnet_quant.tflite",
    }
    metrics = short(rounds=1).apply(Product(timed.network, files=files), stage).metrics
    assert {row["runtime"] for row in metrics["rows"]} == {"onnxruntime", "litert"}
    assert [pair["runtime"] for pair in metrics["pairs"]] == ["onnxruntime", "litert"]
    assert {"onnxruntime", "litert"} <= set(metrics["conditions"]["runtimes"])


@pytest.mark.parametrize("fields", [{"rounds": 0}, {"runtimes": ()}, {"runtimes": ("tvm",)}, {"threads": 0}])
def test_refuses_settings_out_of_range(fields: dict) -> None:
    with pytest.raises(ValidationError):
        short(**fields)


# ------------------------------------------------------------------------------------------------------ a board

BOARD = "ssh://pi@board:22"


@dataclasses.dataclass
class Board:
    """This machine under a board's name, with faults: cut after so many processes, other bits, another runtime."""

    name: str = BOARD
    cut_after: int | None = None
    """Processes of a comparison until the connection drops."""
    fails_at: str = ""
    """A command of the agent that the board does not survive."""
    flips: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    """By file: how many of the outputs are off, and by how many LSB."""
    version: str | None = None
    asked: list[str] = dataclasses.field(default_factory=list)
    measured: int = 0
    """Processes that were really started."""
    here: Local = dataclasses.field(default_factory=Local)

    def __enter__(self) -> Board:
        self.here.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self.here.__exit__(*raised)

    def put(self, path: Path) -> str:
        return self.here.put(path)

    def place(self, name: str) -> str:
        return self.here.place(name)

    def get(self, name: str, path: Path) -> None:
        self.here.get(name, path)

    def ask(self, arguments: Any, *, about: str, on_line: Any = None, timeout_s: float = 900) -> dict[str, Any]:
        self.asked.append(arguments[0])
        if arguments[0] == self.fails_at:
            raise TargetError(about, "the connection was closed", "try again")

        def heard(line: dict[str, Any]) -> None:
            if "process" in line:
                if self.cut_after == self.measured:
                    raise TargetError(about, "the connection was closed", "try again")
                self.measured += 1
            on_line(line)

        answer = self.here.ask(arguments, about=about, on_line=heard if on_line else None, timeout_s=timeout_s)
        if arguments[0] == "run":
            self._tamper(Path(arguments[1]).name, answer)
        return answer

    def _tamper(self, file: str, answer: dict[str, Any]) -> None:
        if self.version:
            answer["version"] = self.version
        if file in self.flips:
            count, lsb = self.flips[file]
            path = Path(self.place("outputs.npy"))
            outputs = np.load(path)
            flat = outputs.reshape(-1)
            flat[:count] += np.where(flat[:count] > 0, -lsb, lsb).astype(flat.dtype)
            np.save(path, outputs)
            answer["outputs_sha256"] = hashlib.sha256(outputs.tobytes()).hexdigest()


@pytest.fixture
def boards(monkeypatch: pytest.MonkeyPatch) -> Callable[[Board], Board]:
    """Puts a board at the end of the line."""

    def there(board: Board) -> Board:
        def opened(name: str, *arguments: Any, **options: Any) -> Any:
            return board if name == BOARD else open_target(name, *arguments, **options)

        monkeypatch.setattr(benchmark, "open_target", opened)
        return board

    return there


def on_board(stage: Run) -> Run:
    return dataclasses.replace(stage, target=BOARD)


def heard(run: Run) -> list[str]:
    progress: Any = run.progress
    return progress.notes


def test_a_board_computes_a_sample_of_the_images_with_every_file(exported: Product, stage: Run, boards: Any) -> None:
    boards(Board())
    found = short(rounds=1, runs=1, accuracy_images=20).apply(exported, on_board(stage)).metrics["accuracy"]
    assert {sample["file"] for sample in found} == set(exported.files)
    images, labels = benchmark.sample_images(stage.data, 20, stage.seed)
    assert images.shape == (20, 3, 16, 16)
    for sample in found:
        assert (sample["images"], sample["outputs"], sample["differing"]) == (20, 100, 0)
        assert sample["equal"]
        assert sample["board_version"] == sample["host_version"]
        assert sample["accuracy"] == sample["host_accuracy"] == sample["correct"] / 20
    # The parent's answers once more, by the runtime itself.
    session = onnxruntime.InferenceSession(exported.files["parent.onnx"], providers=["CPUExecutionProvider"])
    (source,) = session.get_inputs()
    outputs = np.concatenate([session.run(None, {source.name: image[None]})[0] for image in images])
    parent = next(sample for sample in found if sample["file"] == "parent.onnx")
    assert parent["correct"] == int((outputs.argmax(1) == labels).sum())
    assert parent["outputs_sha256"] == hashlib.sha256(outputs.astype(np.float32).tobytes()).hexdigest()


def test_outputs_that_differ_are_counted_and_told_with_both_versions(
    exported: Product, stage: Run, boards: Any
) -> None:
    boards(Board(flips={"int8.tflite": (7, 3)}, version="2.14.0 (tflite-runtime)"))
    metrics = short(rounds=1, runs=1, runtimes=("litert",)).apply(exported, on_board(stage)).metrics
    found = {sample["file"]: sample for sample in metrics["accuracy"]}
    assert set(found) == {"parent.tflite", "int8.tflite"}
    int8 = found["int8.tflite"]
    assert (int8["images"], int8["outputs"]) == (40, 200)  # 64 are asked for, the split has 40
    assert (int8["differing"], int8["max_lsb"], int8["equal"]) == (7, 3, False)
    assert int8["outputs_sha256"] != int8["host_sha256"]
    assert found["parent.tflite"]["equal"]
    assert any(
        "int8.tflite: 7 of 200 outputs differ from those computed here, by at most 3 LSB (litert 2.14.0" in note
        for note in heard(stage)
    )


def test_local_is_not_compared_with_itself_unless_asked(exported: Product, stage: Run) -> None:
    quick = {"rounds": 1, "runs": 1, "runtimes": ("onnxruntime",)}
    assert short(**quick).apply(exported, stage).metrics["accuracy"] == []
    asked = short(**quick, accuracy_images=5).apply(exported, stage).metrics["accuracy"]
    assert [(sample["file"], sample["images"], sample["equal"]) for sample in asked] == [
        ("parent.onnx", 5, True),
        ("int8.onnx", 5, True),
    ]


def test_what_was_measured_before_a_cut_is_kept_and_not_measured_again(timed: Product, stage: Run, boards: Any) -> None:
    settings = short(runtimes=("onnxruntime",), accuracy_images=0)
    first = boards(Board(cut_after=4))
    with pytest.raises(TargetError, match="connection was closed"):
        settings.apply(timed, on_board(stage))
    assert first.measured == 4
    run_folder = stage.folder.parent.parent
    (journal,) = (run_folder / "measuring").glob("*.jsonl")
    kept = [line["process"]["samples_ms"] for line in map(json.loads, journal.read_text().splitlines()[1:])]
    assert len(kept) == 4

    shutil.rmtree(stage.folder)  # as the pipeline does with a stage that failed
    stage.folder.mkdir()
    second = boards(Board())
    metrics = settings.apply(timed, on_board(stage)).metrics
    assert second.measured == 2
    samples = json.loads((stage.folder / "samples.json").read_text())
    assert [sample["samples_ms"] for sample in samples[:4]] == kept
    assert len(samples) == 6
    assert len(metrics["rows"]) == 2
    assert any(note.startswith("4 of 6 processes were measured before, from 20") for note in heard(stage))
    assert not (run_folder / "measuring").exists()


def test_a_fault_after_the_comparison_does_not_lose_it(timed: Product, stage: Run, boards: Any) -> None:
    settings = short(runtimes=("onnxruntime",), rounds=1, accuracy_images=0, sustained_minutes=0.01)
    boards(Board(fails_at="sustain"))
    with pytest.raises(TargetError, match="connection was closed"):
        settings.apply(timed, on_board(stage))
    assert (stage.folder.parent.parent / "measuring" / "07-benchmark.json").is_file()
    again = boards(Board())
    metrics = settings.apply(timed, on_board(stage)).metrics
    assert "compare" not in again.asked
    assert len(metrics["rows"]) == 2
    assert [series["file"] for series in metrics["sustained"]] == ["int8.onnx"]
    assert any(note.startswith("comparison was measured on 20") for note in heard(stage))
    assert not (stage.folder.parent.parent / "measuring").exists()


def test_what_was_kept_of_something_else_is_measured_again(stage: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = {"board": "Raspberry Pi 5", "load_1min": 0.1}
    monkeypatch.setattr(benchmark.asking, "probe", lambda _: dict(machine))

    def opened(
        run: Run = stage, name: str = BOARD, settings: tuple[Any, ...] = ("5 runs", "sha256 of the file")
    ) -> Kept:
        return Kept.open(run, Board(name), list(settings))

    assert opened().part("comparison", lambda: [1, 2]) == [1, 2]
    machine["load_1min"] = 3.0  # changes with the hour
    assert opened().part("comparison", pytest.fail) == [1, 2]
    others = (
        opened(settings=("6 runs", "sha256 of the file")),
        opened(settings=("5 runs", "sha256 of another")),
        opened(name="ssh://pi@other:22"),
        opened(dataclasses.replace(stage, seed=1)),
    )
    machine["board"] = "Raspberry Pi 4"
    for kept in (*others, opened()):
        assert kept.part("accuracy", lambda: 3) == 3
        assert "comparison" not in kept.parts
    (stage.folder.parent.parent / "measuring" / "07-benchmark.json").write_text('{"asked": ')  # the disk was full
    assert opened().parts == {}


def test_a_sustained_run_is_a_series(timed: Product, stage: Run) -> None:
    settings = short(runtimes=("onnxruntime",), rounds=1, runs=1, sustained_minutes=0.02)
    (series,) = settings.apply(timed, stage).metrics["sustained"]
    assert (series["file"], series["runtime"]) == ("int8.onnx", "onnxruntime")
    assert len(series["series"]) >= 6
    assert series["series"][-1]["t_s"] == pytest.approx(1.2, abs=0.3)
    assert series["slowdown"] == pytest.approx(series["last_minute_p50_ms"] / series["first_minute_p50_ms"])
    assert series["verdict"] in ("OK", "THROTTLED")
    json.dumps(series, allow_nan=False)


def test_a_noisy_machine_is_measured_on_and_told_of_with_its_state(timed: Product, stage: Run) -> None:
    metrics = short(runtimes=("onnxruntime",), rounds=1, tolerance=1e-9).apply(timed, stage).metrics
    assert [pair["verdict"] for pair in metrics["pairs"]] == ["NOISY"]
    assert any(note.startswith("int8.onnx on onnxruntime: NOISY, the baseline against") for note in heard(stage))
    for state in (metrics["conditions"]["before"], metrics["conditions"]["after"]):
        assert {"temperature_c", "current_mhz", "throttle", "governor"} <= set(state)
    samples = json.loads((stage.folder / "samples.json").read_text())
    row = next(row for row in metrics["rows"] if row["file"] == "int8.onnx")
    own = [ms for sample in samples if sample["file"] == "int8.onnx" for ms in sample["samples_ms"]]
    assert row["sampled_s"] == pytest.approx(sum(own) / 1000)


def test_cores_and_threads_reach_the_agent(timed: Product, stage: Run) -> None:
    metrics = short(runtimes=("onnxruntime",), rounds=1, runs=1, cores=(0,), threads="auto").apply(timed, stage).metrics
    assert metrics["conditions"]["cores_used"] == [0]
    assert isinstance(metrics["rows"][0]["threads"], int)


def answered(outputs: np.ndarray, **facts: Any) -> Answers:
    told = {"runtime": "litert", "version": "2.3.0", "outputs_sha256": hashlib.sha256(outputs.tobytes()).hexdigest()}
    return Answers(outputs, None, len(outputs), told | facts)


def test_agreement_compares_bits() -> None:
    int8 = np.array([[-128, 127], [0, 5]], np.int8)
    far = agreement(answered(int8), answered(np.array([[127, -128], [0, 5]], np.int8)))
    assert (far["differing"], far["max_lsb"], far["equal"]) == (2, 255, False)  # no overflow
    nan = np.array([[np.nan, 0.0]], np.float32)
    assert agreement(answered(nan), answered(nan.copy()))["equal"]
    zero = agreement(answered(np.float32([[0.0, 1.0]])), answered(np.float32([[-0.0, 1.5]])))
    assert (zero["differing"], zero["max_difference"]) == (2, 0.5)
    other = agreement(answered(nan), answered(np.float32([[1.0, 0.25]])))
    assert (other["differing"], other["max_difference"]) == (2, None)  # there is no such number
    json.dumps(other, allow_nan=False)


def test_only_integers_that_differ_are_worth_a_note() -> None:
    close = np.float32([[0.1, 0.2]]), np.float32([[0.1, 0.2000001]])
    found = agreement(answered(close[0]), answered(close[1]))
    assert difference({"file": "float.tflite", **found}) == ""
    found = agreement(answered(close[0]), answered(close[1]), int8=True)
    assert "1 of 2 outputs differ" in difference({"file": "int8.tflite", **found})


@pytest.mark.parametrize(
    "fields",
    [{"cores": "0,1"}, {"cores": ()}, {"cores": (-1,)}, {"threads": "all"}, {"accuracy_images": -1},
     {"sustained_minutes": -1.0}],
)  # fmt: skip
def test_refuses_what_no_board_could_do(fields: dict) -> None:
    with pytest.raises(ValidationError):
        short(**fields)


def test_the_report_reads_what_the_stage_measured(exported: Product, stage: Run, boards: Any) -> None:
    boards(Board())
    settings = short(rounds=1, runs=1, runtimes=("litert",), accuracy_images=3, sustained_minutes=0.01)
    metrics = json.loads(json.dumps(settings.apply(exported, on_board(stage)).metrics, allow_nan=False))
    read = board(parts.Benchmark.model_validate(metrics))
    assert [(sample["file"], sample["equal"]) for sample in read["accuracy"]] == [
        ("parent.tflite", True),
        ("int8.tflite", True),
    ]
    assert read["sustained"][0]["series"]
    names = {name for group in read["groups"] for name, _ in group["items"]}
    assert {"Target", "CPU", "Kernel", "LiteRT", "Threads", "Affinity", "Warm-up", "Each process"} <= names
    assert {name for name, *_ in read["changing"]} == {"Temperature", "Frequency", "Throttling", "Load, 1 minute"}
    assert dict(read["files"]) == {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in exported.files.items()
        if name.endswith(".tflite")
    }
    assert "not met" in read["mlperf"]


def names_in(value: Any) -> set[str]:
    """Every key, at any depth."""
    if isinstance(value, dict):
        return set(value) | set().union(*map(names_in, value.values()))
    return set().union(*map(names_in, value)) if isinstance(value, list) else set()


@pytest.mark.slow
def test_an_emulated_core_computes_and_is_counted_and_is_never_timed(exported: Product, stage: Run) -> None:
    settings = short(runtimes=("litert",), accuracy_images=2)
    metrics = settings.apply(exported, dataclasses.replace(stage, target="emulated:cortex-a72")).metrics
    files = {"parent.tflite", "int8.tflite"}
    found = {entry["file"]: entry for entry in metrics["parity"]}
    assert set(found) == {count["file"] for count in metrics["counts"]} == files
    for entry in found.values():
        assert (entry["cpu"], entry["runtime"], entry["images"], entry["outputs"]) == ("cortex-a72", "litert", 2, 10)
    assert (found["int8.tflite"]["differing"], found["int8.tflite"]["max_lsb"]) == (0, 0)
    for count in metrics["counts"]:
        assert count["repeat_instructions"] == pytest.approx(count["instructions"], rel=1e-3)
    assert not {name for name in names_in(metrics) if name.endswith(("_ms", "_s")) or "fps" in name}
    assert metrics["rows"] == metrics["pairs"] == []
    read = board(parts.Benchmark.model_validate(json.loads(json.dumps(metrics, allow_nan=False))))
    assert read["title"] == "The emulated cores"
    assert {count["file"] for count in read["counts"]} == files
    assert read["mlperf"] == ""
