"""The statistics and the order of a comparison, on machines whose times are known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.errors import TargetError
from compress.targets.comparison import by_name, compare, judge, ratio_interval, schedule

FILES = {name: Path(name) for name in ("parent.onnx", "float.onnx", "int8.onnx", "parent.tflite", "int8.tflite")}
CALM = {"throttle": "unavailable", "temperature_c": 50.0}


class Machine:
    """A target that answers from a formula and remembers what it was asked."""

    name = "local"

    def __init__(self, median_ms: Callable[[str, int], float], *, throttled: tuple[str, ...] = ()) -> None:
        self.median_ms = median_ms
        self.throttled = list(throttled)
        self.asked: list[tuple[str, str]] = []
        self.rng = np.random.default_rng(1)

    def probe(self) -> dict[str, Any]:
        return {"board": "unavailable", "cpu": "abacus", "arch": "wood", "is_arm": False, "runtimes": {}, **CALM}

    def time(self, model: Path, *, runtime: str, runs: int, **_: Any) -> dict[str, Any]:
        nth = self.asked.count((runtime, model.name))
        self.asked.append((runtime, model.name))
        samples_ms = self.median_ms(model.name, nth) * self.rng.normal(1, 0.02, runs)
        return {
            "file": model.name, "runtime": runtime, "samples_ms": samples_ms.tolist(), "startup_ms": 100.0,
            "first_ms": 9.0, "peak_rss_mb": 80.0, "idle_rss_mb": 30.0, "size_bytes": 7, "sha256": "f00",
            "settings": {"threads": 1}, "notes": [], "throttled": self.throttled, "before": CALM, "after": CALM,
        }  # fmt: skip


def steady(name: str, nth: int) -> float:
    return {"parent.onnx": 6.0, "float.onnx": 4.0, "int8.onnx": 2.0, "parent.tflite": 5.0, "int8.tflite": 2.5}[name]


class TestOrder:
    def test_files_take_turns_and_the_baseline_runs_twice(self) -> None:
        machine = Machine(steady)
        compare(FILES, target=machine, rounds=2, runs=5)
        onnx = [("onnxruntime", f"{kind}.onnx") for kind in ("parent", "float", "int8", "parent")]
        tflite = [("litert", f"{kind}.tflite") for kind in ("parent", "int8", "parent")]
        assert machine.asked == 2 * (onnx + tflite)

    def test_progress_hears_of_every_process(self) -> None:
        heard: list[str] = []
        compare(FILES, target=Machine(steady), rounds=2, runs=5, on_process=heard.append)
        assert len(heard) == len(schedule(FILES, rounds=2))

    def test_a_single_file_has_no_control(self) -> None:
        comparison = compare({"a.onnx": Path("parent.onnx")}, target=Machine(steady), rounds=3, runs=5)
        assert [sample["control"] for sample in comparison.samples] == [False] * 3
        assert comparison.pairs == []
        assert comparison.rows[0]["samples"] == 15

    def test_nothing_to_measure_is_an_error(self) -> None:
        with pytest.raises(TargetError, match="no file for litert"):
            compare({"a.onnx": Path("a.onnx")}, target=Machine(steady), runtimes=("litert",))


class TestNumbers:
    def test_rows(self) -> None:
        rows = compare(FILES, target=Machine(steady), runs=50, rounds=4, threads=2).rows
        assert [row["file"] for row in rows] == list(FILES)
        for row in rows:
            assert row["fps"] == pytest.approx(1000 / row["p50_ms"], rel=1e-12)
            assert row["p50_ms"] == pytest.approx(steady(row["file"], 0), rel=0.01)
            assert row["min_ms"] <= row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"] <= row["max_ms"]
            assert row["spread"] == pytest.approx((row["p90_ms"] - row["p50_ms"]) / row["p50_ms"])
            assert row["samples"] == 200, "the control's samples are not the row's"
            assert row["threads"] == 2
        assert [row["kind"] for row in rows] == ["parent", "float", "int8", "parent", "int8"]

    def test_pairs_are_against_the_parent_of_the_same_runtime(self) -> None:
        pairs = compare(FILES, target=Machine(steady)).pairs
        found = {(pair["runtime"], pair["baseline"], pair["candidate"]): pair for pair in pairs}
        assert {key: round(pair["speedup"], 1) for key, pair in found.items()} == {
            ("onnxruntime", "parent.onnx", "float.onnx"): 1.5,
            ("onnxruntime", "parent.onnx", "int8.onnx"): 3.0,
            ("litert", "parent.tflite", "int8.tflite"): 2.0,
        }
        for pair in pairs:
            low, high = pair["interval"]
            assert low <= pair["speedup"] <= high
            assert pair["verdict"] == "OK"

    def test_interval_covers_the_true_ratio(self) -> None:
        """95 % nominal; the bound is what 40 repeats of an honest interval miss once in a thousand times."""
        covered = 0
        for seed in range(40):
            rng = np.random.default_rng(seed)
            drift = rng.uniform(1, 1.3, 4)  # shared by the files of a round, as on a machine that warms up
            base, cand = ([list(ms * d * rng.lognormal(0, 0.05, 40)) for d in drift] for ms in (6.0, 2.0))
            low, high = ratio_interval(base, cand, resamples=100, seed=seed)
            covered += low <= 3.0 <= high
            assert high - low < 0.6
        assert covered >= 33

    def test_interval_is_the_same_every_time(self) -> None:
        base, cand = [[3.0, 3.1, 3.3]] * 2, [[1.0, 1.1, 1.2]] * 2
        assert ratio_interval(base, cand, seed=3) == ratio_interval(base, cand, seed=3)


class TestVerdict:
    def test_noisy_when_the_baseline_differs_from_itself(self) -> None:
        def drifting(name: str, nth: int) -> float:
            return steady(name, 0) * (1.2 if name == "parent.onnx" and nth % 2 else 1.0)

        pairs = compare(FILES, target=Machine(drifting)).pairs
        for pair in pairs:
            if pair["runtime"] == "onnxruntime":
                assert pair["verdict"] == "NOISY"
                assert pair["aa_ratio"] == pytest.approx(1 / 1.2, rel=0.02)
                assert "against itself" in pair["reasons"][0]
            else:
                assert pair["verdict"] == "OK"

    def test_noisy_when_throttled(self) -> None:
        comparison = compare(FILES, target=Machine(steady, throttled=("under-voltage during the run",)))
        assert {pair["verdict"] for pair in comparison.pairs} == {"NOISY"}
        assert comparison.conditions["throttled"] == ["under-voltage during the run"]

    @pytest.mark.parametrize(("control_ms", "verdict"), [(1.04, "OK"), (0.96, "OK"), (1.06, "NOISY"), (0.94, "NOISY")])
    def test_tolerance_holds_both_ways(self, control_ms: float, verdict: str) -> None:
        found = judge([[1.0] * 9], [[0.5] * 9], control=[[control_ms] * 9], tolerance=0.05)
        assert found["verdict"] == verdict
        assert found["speedup"] == 2


class TestByName:
    def test_equal_names_become_paths(self, tmp_path: Path) -> None:
        paths = [tmp_path / "a" / "net.onnx", tmp_path / "b" / "net.onnx", tmp_path / "b" / "other.tflite"]
        for path in paths:
            path.parent.mkdir(exist_ok=True)
            path.touch()
        assert by_name(paths) == {str(paths[0]): paths[0], str(paths[1]): paths[1], "other.tflite": paths[2]}

    def test_names_what_is_wrong(self, tmp_path: Path) -> None:
        weights = tmp_path / "net.pt"
        weights.touch()
        network = tmp_path / "net.onnx"
        network.touch()
        for paths, reason in (
            ([tmp_path / "gone.onnx"], "no such file"),
            ([weights], "no runtime reads this kind of file"),
            ([network, network], "given twice"),
        ):
            with pytest.raises(TargetError, match=reason):
                by_name(paths)
