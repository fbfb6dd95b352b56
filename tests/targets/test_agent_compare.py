"""A comparison: its order, its statistics on series that are known, and the processes it starts, keeps and loses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from alone import alone, answer, command, lines
from stacks import convolutions

from compress.targets import agent

FILES = ("parent.onnx", "float.onnx", "int8.onnx", "parent.tflite", "int8.tflite")
STEADY_MS = {"parent.onnx": 6.0, "float.onnx": 4.0, "int8.onnx": 2.0, "parent.tflite": 5.0, "int8.tflite": 2.5}
QUICK = ("--rounds=2", "--runs=3", "--warmup-s=0", "--tolerance=10")


def processes(
    median_ms: Callable[[str, int], float] = lambda file, nth: STEADY_MS[file],
    *,
    rounds: int = 4,
    runs: int = 50,
    mhz: Callable[[str, int], Any] = lambda file, nth: 2400,
    throttled: tuple[str, ...] = (),
) -> list[dict[str, Any]]:
    """What `time` would answer on a machine that follows a formula; `nth` counts the processes of a file."""
    rng, seen = np.random.default_rng(1), list[str]()
    found = []
    for slot in agent.schedule(FILES, rounds=rounds):
        file = FILES[slot.index]
        nth = seen.count(file)
        seen.append(file)
        found.append(
            {
                "file": file, "samples_ms": (median_ms(file, nth) * rng.normal(1, 0.02, runs)).tolist(),
                "startup_ms": 100.0 + nth, "first_ms": 9.0, "peak_rss_mb": 80.0 + nth, "idle_rss_mb": "unavailable",
                "size_bytes": 7, "sha256": "f00", "notes": [f"of {slot.runtime}"], "throttled": list(throttled),
                "threads": 2, "cores": [0, 1], "mhz": mhz(file, nth), **vars(slot),
            }
        )  # fmt: skip
    return found


class TestOrder:
    def test_files_take_turns_and_the_baseline_runs_twice(self) -> None:
        slots = agent.schedule(FILES, rounds=2)
        onnx = [("onnxruntime", 0, False), ("onnxruntime", 1, False), ("onnxruntime", 2, False)]
        tflite = [("litert", 3, False), ("litert", 4, False)]
        a_round = [*onnx, ("onnxruntime", 0, True), *tflite, ("litert", 3, True)]
        assert [(slot.runtime, slot.index, slot.control) for slot in slots] == 2 * a_round
        assert [slot.round for slot in slots] == [0] * len(a_round) + [1] * len(a_round)

    def test_a_single_file_has_no_control(self) -> None:
        slots = agent.schedule(["a.onnx"], rounds=3)
        assert slots == [agent.Slot(number, "onnxruntime", 0) for number in range(3)]

    def test_the_chosen_runtimes_only(self) -> None:
        assert {slot.runtime for slot in agent.schedule(FILES, runtimes=["litert"])} == {"litert"}
        assert agent.schedule(["a.onnx"], runtimes=["litert"]) == []


class TestNumbers:
    def test_rows(self) -> None:
        rows = agent.summary(processes())["rows"]
        assert [row["file"] for row in rows] == list(FILES)
        assert [row["index"] for row in rows] == list(range(5))
        for row in rows:
            assert row["fps"] == pytest.approx(1000 / row["p50_ms"], rel=1e-12)
            assert row["p50_ms"] == pytest.approx(STEADY_MS[row["file"]], rel=0.01)
            assert row["min_ms"] <= row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"] <= row["max_ms"]
            assert row["spread"] == pytest.approx((row["p90_ms"] - row["p50_ms"]) / row["p50_ms"])
            assert row["samples"] == 200, "the control's samples are not the row's"
            assert (row["threads"], row["cores"]) == (2, [0, 1])
            assert row["idle_rss_mb"] is None
        assert [row["kind"] for row in rows] == ["parent", "float", "int8", "parent", "int8"]

    def test_pairs_are_against_the_parent_of_the_same_runtime(self) -> None:
        pairs = agent.summary(processes())["pairs"]
        found = {(pair["runtime"], pair["baseline_index"], pair["candidate_index"]): pair for pair in pairs}
        assert {key: round(pair["speedup"], 1) for key, pair in found.items()} == {
            ("onnxruntime", 0, 1): 1.5,
            ("onnxruntime", 0, 2): 3.0,
            ("litert", 3, 4): 2.0,
        }
        for pair in pairs:
            low, high = pair["interval"]
            assert low <= pair["speedup"] <= high
            assert pair["verdict"] == "OK"
            assert (pair["baseline"], pair["candidate"]) == (
                FILES[pair["baseline_index"]],
                FILES[pair["candidate_index"]],
            )

    def test_notes_are_said_once(self) -> None:
        assert agent.summary(processes())["notes"] == ["of onnxruntime", "of litert"]


class TestInterval:
    def test_covers_the_true_ratio(self) -> None:
        """95 % nominal; the bound is what 40 repeats of an honest interval miss once in a thousand times."""
        covered = 0
        for seed in range(40):
            rng = np.random.default_rng(seed)
            drift = rng.uniform(1, 1.3, 4)  # shared by the files of a round, as on a machine that warms up
            base, cand = ([list(ms * d * rng.lognormal(0, 0.05, 40)) for d in drift] for ms in (6.0, 2.0))
            low, high = agent.ratio_interval(base, cand, resamples=100, seed=seed)
            covered += low <= 3.0 <= high
            assert high - low < 0.6
        assert covered >= 33

    def test_of_two_constant_rounds_is_their_two_ratios(self) -> None:
        """Three of the four draws of rounds have ratios 2, 3 (the mean of both rounds) and 4, each in over 2.5 %."""
        assert agent.ratio_interval([[2.0] * 5, [4.0] * 5], [[1.0] * 5] * 2) == (2.0, 4.0)

    def test_rounds_are_drawn_together(self) -> None:
        """A machine twice as slow in one round is so for both files: the ratio is certain."""
        assert agent.ratio_interval([[2.0] * 5, [4.0] * 5], [[1.0] * 5, [2.0] * 5]) == (2.0, 2.0)

    def test_of_one_round_is_that_of_its_samples(self) -> None:
        """Against the exact distribution of a resampled median, by counting draws at or below each value."""
        base = [float(value) for value in range(1, 10)]
        low, high = agent.ratio_interval([base], [[1.0] * 9], resamples=4000)

        def at_most(value: float) -> float:
            """P(median of 9 draws <= value): at least five of nine draws are at most the value."""
            p = value / 9
            return sum(np.prod([(9 - i) / (i + 1) for i in range(k)]) * p**k * (1 - p) ** (9 - k) for k in range(5, 10))

        exact = [next(v for v in base if at_most(v) >= q) for q in (0.025, 0.975)]
        assert [low, high] == exact

    def test_is_the_same_every_time(self) -> None:
        base, cand = [[3.0, 3.1, 3.3]] * 2, [[1.0, 1.1, 1.2]] * 2
        assert agent.ratio_interval(base, cand, seed=3) == agent.ratio_interval(base, cand, seed=3)


class TestVerdict:
    def test_noisy_when_the_baseline_differs_from_itself(self) -> None:
        def drifting(file: str, nth: int) -> float:
            return STEADY_MS[file] * (1.2 if file == "parent.onnx" and nth % 2 else 1.0)

        for pair in agent.summary(processes(drifting))["pairs"]:
            if pair["runtime"] == "onnxruntime":
                assert pair["verdict"] == "NOISY"
                assert pair["aa_ratio"] == pytest.approx(1 / 1.2, rel=0.02)
                assert "against itself" in pair["reasons"][0]
            else:
                assert pair["verdict"] == "OK"

    def test_noisy_when_throttled(self) -> None:
        found = agent.summary(processes(throttled=("under-voltage during the run",)))
        assert {pair["verdict"] for pair in found["pairs"]} == {"NOISY"}
        assert found["throttled"] == ["under-voltage during the run"]

    def test_noisy_when_a_files_clock_changes_between_its_processes(self) -> None:
        pairs = agent.summary(processes(mhz=lambda file, nth: 1500 if (file, nth) == ("int8.onnx", 2) else 2400))
        verdicts = {(pair["runtime"], pair["candidate"]): pair for pair in pairs["pairs"]}
        assert verdicts["onnxruntime", "int8.onnx"]["reasons"] == ["int8.onnx ran at 1500 to 2400 MHz"]
        assert verdicts["onnxruntime", "int8.onnx"]["verdict"] == "NOISY"
        assert verdicts["onnxruntime", "float.onnx"]["verdict"] == "OK"

    def test_a_slower_clock_that_belongs_to_the_file_is_no_noise(self) -> None:
        pairs = agent.summary(processes(mhz=lambda file, nth: 2100 if file == "int8.onnx" else 2400))["pairs"]
        pairs += agent.summary(processes(mhz=lambda file, nth: "unavailable"))["pairs"]
        assert {pair["verdict"] for pair in pairs} == {"OK"}

    @pytest.mark.parametrize(("control_ms", "verdict"), [(1.04, "OK"), (0.96, "OK"), (1.06, "NOISY"), (0.94, "NOISY")])
    def test_tolerance_holds_both_ways(self, control_ms: float, verdict: str) -> None:
        found = agent.judge([[1.0] * 9], [[0.5] * 9], control=[[control_ms] * 9], tolerance=0.05)
        assert found["verdict"] == verdict
        assert found["speedup"] == 2


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
    return [convolutions(folder / "deep.onnx", layers=8), convolutions(folder / "flat.onnx", layers=2)]


class Python:
    """How the agent starts Python again: a script that keeps a list of the processes, and may end one of them."""

    def __init__(self, folder: Path, *, fault: str = "", at: int = 0) -> None:
        self.log = folder / "started"
        self.log.write_text("")
        script = folder / "python"
        hurt = f'[ "$(wc -l < {self.log})" -eq {at} ] && {fault}' if fault else ""
        script.write_text(f'#!/bin/sh\necho $$ >> {self.log}\n{hurt}\nexec {sys.executable} -I "$@"\n')
        script.chmod(0o755)
        self.option = f"--launcher={json.dumps([str(script)])}"

    @property
    def started(self) -> list[int]:
        return [int(pid) for pid in self.log.read_text().split()]


class TestProcesses:
    def test_each_measurement_is_a_fresh_process_in_the_order_of_the_schedule(
        self, tmp_path: Path, files: list[Path]
    ) -> None:
        python = Python(tmp_path)
        done = alone(tmp_path, "compare", *files, *QUICK, python.option)
        printed = lines(done, "process")
        assert len(set(python.started)) == len(printed) == 6
        slots = agent.schedule(files, rounds=2)
        assert [{key: process[key] for key in vars(slots[0])} for process in printed] == [vars(slot) for slot in slots]
        for process in printed:
            assert process["file"] == files[process["index"]].name
            assert len(process["samples_ms"]) == 3
            assert process["before"].keys() == process["after"].keys() == agent.conditions().keys()
        found = answer(done)
        assert found["reused"] == []
        (pair,) = found["pairs"]
        low, high = pair["interval"]
        assert pair["verdict"] == ("NOISY" if high > 2 * low else "OK"), "of three samples each, on a busy machine"
        assert [row["file"] for row in found["rows"]] == ["deep.onnx", "flat.onnx"]
        conditions = found["conditions"]
        assert conditions["cores_used"] == printed[0]["cores"]
        assert conditions["threads"] == 1
        assert conditions["runtimes"]["onnxruntime"] == printed[0]["version"]
        assert (conditions["runs"], conditions["rounds"], conditions["tolerance"]) == (3, 2, 10)

    def test_a_process_is_told_of_when_it_is_done(self, tmp_path: Path, files: list[Path]) -> None:
        with subprocess.Popen(
            command(tmp_path, "compare", *files, "--rounds=1", "--runs=3", "--min-s=1"),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            assert process.stdout is not None
            times = [time.monotonic() for _ in process.stdout]
        assert process.returncode == 0
        assert len(times) == 4
        assert all(later - earlier > 0.9 for earlier, later in pairwise(times[:3]))

    def test_the_environment_says_how_to_start_python(self, tmp_path: Path, files: list[Path]) -> None:
        python = Python(tmp_path)
        words = command(tmp_path, "compare", files[0], "--rounds=1", "--runs=1")
        words.remove("-I")
        environment = {"COMPRESS_AGENT_PYTHON": python.option.partition("=")[2]}
        done = subprocess.run(words, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert len(python.started) == 1

    def test_a_launcher_that_is_none(self, tmp_path: Path, files: list[Path]) -> None:
        done = alone(tmp_path, "compare", files[0], "--launcher=python3 -I", code=1)
        assert done.stderr.splitlines()[-1].startswith("agent: error: argument --launcher: python3 -I is not a JSON")
        done = alone(tmp_path, "compare", files[0], '--launcher=["/no/such/python"]', code=1)
        assert done.stderr.splitlines()[-1] == (
            "agent: error: deep.onnx on onnxruntime: cannot start /no/such/python: No such file or directory;"
            " say how with --launcher"
        )

    def test_a_killed_process_is_one_line_and_what_was_measured_is_printed(
        self, tmp_path: Path, files: list[Path]
    ) -> None:
        python = Python(tmp_path, fault="echo 'agent: half way' >&2 && kill -9 $$", at=3)
        done = alone(tmp_path, "compare", *files, *QUICK, python.option, code=1)
        assert len(lines(done, "process")) == 2
        assert done.stderr.splitlines()[-1] == (
            "agent: error: deep.onnx on onnxruntime: its process was ended by SIGKILL; too little memory?;"
            " it last said: agent: half way"
        )

    def test_a_process_that_ends_without_a_result(self, tmp_path: Path, files: list[Path]) -> None:
        for fault, problem in (
            ("exit 0", "ended with status 0, no result; it last said: nothing"),
            ("echo strange >&2 && exit 7", "ended with status 7, no result; it last said: strange"),
            ("kill -SEGV $$", "was ended by SIGSEGV; it last said: nothing"),
            ("exit 139", "was ended by SIGSEGV; it last said: nothing"),
        ):
            python = Python(tmp_path, fault=fault, at=1)
            done = alone(tmp_path, "compare", *files, *QUICK, python.option, code=1)
            assert done.stderr.splitlines()[-1] == f"agent: error: deep.onnx on onnxruntime: its process {problem}"

    def test_a_damaged_file_is_one_line(self, tmp_path: Path, files: list[Path]) -> None:
        damaged = tmp_path / "damaged.onnx"
        damaged.write_bytes(files[0].read_bytes()[:2000])
        done = alone(tmp_path, "compare", files[0], damaged, *QUICK, code=1)
        assert len(lines(done, "process")) == 1
        last = done.stderr.splitlines()[-1]
        assert last.startswith("agent: error: damaged.onnx: onnxruntime cannot open it: ")
        assert "Traceback" not in done.stderr

    def test_a_missing_runtime_is_known_before_anything_is_measured(
        self, tmp_path: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "a.tflite").write_bytes(b"")
        for module in ("ai_edge_litert", "tflite_runtime"):
            monkeypatch.setitem(sys.modules, module, None)
        python = Python(tmp_path)
        assert agent.main(["compare", str(files[0]), str(tmp_path / "a.tflite"), python.option]) == 1
        assert capsys.readouterr().err.splitlines()[-1] == (
            "agent: error: litert is not installed; python -m pip install ai-edge-litert"
        )
        assert python.started == []

    def test_nothing_to_measure_is_an_error(self, tmp_path: Path) -> None:
        last = alone(tmp_path, "compare", "a.onnx", "--runtime=litert", code=1).stderr.splitlines()[-1]
        assert last == "agent: error: no file for litert; export the network first"
        last = alone(tmp_path, "compare", "gone.onnx", code=1).stderr.splitlines()[-1]
        assert last == "agent: error: gone.onnx: No such file or directory"


@pytest.fixture(scope="module")
def attempt(tmp_path_factory: pytest.TempPathFactory, files: list[Path]) -> list[str]:
    """The lines of an attempt whose fourth process was killed."""
    folder = tmp_path_factory.mktemp("attempt")
    python = Python(folder, fault="kill -9 $$", at=4)
    done = alone(folder, "compare", *files, *QUICK, python.option, code=1)
    assert len(lines(done, "process")) == 3
    return done.stdout.splitlines()


class TestDone:
    def again(self, folder: Path, files: list[Path], kept: list[str], *options: str) -> tuple[Python, list[dict], dict]:
        python = Python(folder)
        (folder / "done.jsonl").write_text("\n".join(kept))
        done = alone(folder, "compare", *files, *QUICK, *options, "--done=done.jsonl", python.option)
        return python, lines(done, "process"), answer(done)

    def test_what_is_done_is_not_measured_again(self, tmp_path: Path, files: list[Path], attempt: list[str]) -> None:
        python, printed, found = self.again(tmp_path, files, attempt)
        slots = agent.schedule(files, rounds=2)
        assert len(python.started) == 3
        assert [(line["round"], line["index"], line["control"]) for line in printed] == [
            (slot.round, slot.index, slot.control) for slot in slots[3:]
        ]
        assert found["reused"] == [vars(slot) for slot in slots[:3]]
        assert "3 of 6 processes were measured in an earlier attempt" in found["conditions"]["notes"]
        together = [json.loads(line)["process"] for line in attempt] + printed
        for row in found["rows"]:
            own = [p["samples_ms"] for p in together if p["index"] == row["index"] and not p["control"]]
            assert len(own) == 2
            assert row["p50_ms"] == np.median(own)
            assert row["rounds_p50_ms"] == [np.median(samples_ms) for samples_ms in own]

    def test_all_of_it_starts_no_process(self, tmp_path: Path, files: list[Path], attempt: list[str]) -> None:
        _, printed, found = self.again(tmp_path, files, attempt)
        everything = attempt + [json.dumps({"process": process}) for process in printed]
        python, printed, again = self.again(tmp_path, files, everything)
        assert (python.started, printed) == ([], [])
        assert (again["rows"], again["pairs"]) == (found["rows"], found["pairs"])

    def test_answers_to_other_questions_are_passed_over(
        self, tmp_path: Path, files: list[Path], attempt: list[str]
    ) -> None:
        first, second, third = (json.loads(line)["process"] for line in attempt)
        first["sha256"] = "0" * 64
        second["version"] = "0.1"
        third["asked"]["threads"] = 2
        beyond = {**json.loads(attempt[0])["process"], "index": 7}
        kept = [json.dumps({"process": process}) for process in (first, second, third, beyond)]
        kept += [attempt[0][: len(attempt[0]) // 2], "[]", "7", json.dumps({"conditions": {}})]
        python, printed, found = self.again(tmp_path, files, kept)
        assert len(python.started) == len(printed) == 6
        assert found["reused"] == []

    def test_other_settings_ask_another_question(self, tmp_path: Path, files: list[Path], attempt: list[str]) -> None:
        python, _, found = self.again(tmp_path, files, attempt, "--runs=4")
        assert len(python.started) == 6
        assert {row["samples"] for row in found["rows"]} == {8}

    def test_a_changed_file_is_measured_again(self, tmp_path: Path, files: list[Path], attempt: list[str]) -> None:
        changed = convolutions(tmp_path / "flat.onnx", layers=3)
        python, printed, found = self.again(tmp_path, [files[0], changed], attempt)
        assert [line["index"] for line in printed] == [1, 0, 1, 0]
        assert len(python.started) == 4
        assert [slot["index"] for slot in found["reused"]] == [0, 0]


class TestEnd:
    """Nothing is left running on a board, however its agent ends."""

    def start(self, folder: Path, files: list[Path]) -> tuple[subprocess.Popen[str], int]:
        """A comparison whose first process measures for a minute, and that process."""
        python = Python(folder)
        words = command(folder, "compare", *files, "--runs=1", "--min-s=60", python.option)
        process = subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=heeds_signals,
        )
        until(lambda: bool(python.started))
        (child,) = python.started
        until(lambda: b"time" in Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0"))
        return process, child

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
    @pytest.mark.parametrize("later_s", [0, 1])
    def test_its_process_ends_with_it(
        self, tmp_path: Path, files: list[Path], number: signal.Signals, later_s: float
    ) -> None:
        process, child = self.start(tmp_path, files)
        time.sleep(later_s)  # at once: Python is starting; later: it measures
        process.send_signal(number)
        _, said = process.communicate(timeout=10)
        assert process.returncode in (-number, 130)
        assert "Traceback" not in said
        until(lambda: not runs(child))

    def test_it_ends_when_nobody_reads_it(self, tmp_path: Path, files: list[Path]) -> None:
        process, child = self.start(tmp_path, files)
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.wait(timeout=10) == 1
        assert "Traceback" not in process.stderr.read()
        process.stderr.close()
        until(lambda: not runs(child))

    def test_a_killed_child_does_not_take_the_agents_word(self, tmp_path: Path, files: list[Path]) -> None:
        process, child = self.start(tmp_path, files)
        os.kill(child, signal.SIGKILL)
        _, said = process.communicate(timeout=10)
        assert process.returncode == 1
        assert said.splitlines()[-1].startswith(
            "agent: error: deep.onnx on onnxruntime: its process was ended by SIGKILL; too little memory?"
        )


def heeds_signals() -> None:
    """What nohup and a shell's `&` switch off, the children of a test have again."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def until(true: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)


def runs(pid: int) -> bool:
    """Also false for a process that ended and that nobody has asked about yet."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
