"""What the agent's commands answer: on processes of their own, on boards made of files, on a clock made of numbers."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from alone import AGENT, alone, answer, command, lines
from onnx import TensorProto, helper
from stacks import convolutions

from compress.product import Product
from compress.targets import agent


@pytest.fixture
def network(tmp_path: Path) -> Path:
    return convolutions(tmp_path / "stack.onnx", layers=2)


def last_word(done: subprocess.CompletedProcess[str]) -> str:
    return done.stderr.splitlines()[-1].removeprefix("agent: error: ")


class TestProbe:
    def test_of_this_machine(self, tmp_path: Path) -> None:
        machine = answer(alone(tmp_path, "probe"))
        assert machine["machine"] == machine["arch"] == platform.machine()
        assert machine["bits"] == 64
        assert machine["libc"] == " ".join(platform.libc_ver())
        assert machine["python_path"] == sys.executable
        assert machine["agent"] == hashlib.sha256(AGENT.read_bytes()).hexdigest()
        assert machine["numpy"] == np.__version__
        assert set(machine["cores_fastest"]) <= os.sched_getaffinity(0)
        free_mb = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize / 2**20
        assert machine["disk_free_mb"] == pytest.approx(free_mb, rel=0.2)

    def test_without_numpy_and_runtimes(self, tmp_path: Path, network: Path) -> None:
        """A Python that has its standard library only: `-S` leaves site-packages out."""
        words = command(tmp_path, "probe")
        words.insert(1, "-S")
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        machine = answer(done)
        assert machine["numpy"] == "unavailable"
        assert machine["runtimes"] == {"onnxruntime": "unavailable", "litert": "unavailable", "ncnn": "unavailable"}
        assert machine["venv"] is True
        for arguments in (["time", network], ["compare", network], ["sustain", network]):
            words = command(tmp_path, *arguments)
            words.insert(1, "-S")
            done = subprocess.run(words, capture_output=True, text=True)
            assert done.returncode == 1
            assert last_word(done) == "numpy is not installed or cannot be imported; python -m pip install numpy"

    def test_with_a_python_that_cannot_make_environments(self, tmp_path: Path) -> None:
        """As Debian's without python3-venv: `venv` is there, `ensurepip` is not."""
        check = "import sys, runpy; sys.modules['ensurepip'] = None; sys.argv = ['agent.py', 'probe'];"
        check += f"runpy.run_path({str(AGENT)!r}, run_name='__main__')"
        done = subprocess.run([sys.executable, "-I", "-c", check], capture_output=True, text=True, check=True)
        assert answer(done)["venv"] is False

    def test_with_a_broken_numpy(self, tmp_path: Path) -> None:
        (tmp_path / "numpy").mkdir()
        (tmp_path / "numpy" / "__init__.py").write_text("raise ImportError('built for another CPU')")
        done = subprocess.run(
            [sys.executable, "-S", str(AGENT), "probe"],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONPATH": str(tmp_path)},
        )
        assert answer(done)["numpy"] == "unavailable"


class TestTime:
    def test_says_where_it_ran(self, tmp_path: Path, network: Path) -> None:
        timing = answer(alone(tmp_path, "time", network, "--min-s=0.5", "--threads=auto", "--cores=any"))
        allowed = sorted(os.sched_getaffinity(0))
        assert timing["cores"] == allowed
        assert timing["threads"] == timing["settings"]["threads"] == len(agent.fastest_cores())
        sampled_s = sum(timing["samples_ms"]) / 1000
        assert 0 < timing["cpu_s"] < 1.5 * sampled_s * len(allowed)

    def test_runs_on_the_chosen_core(self, tmp_path: Path, network: Path) -> None:
        chosen = max(os.sched_getaffinity(0))
        timing = answer(alone(tmp_path, "time", network, "--runs=3", f"--cores={chosen}", "--threads=auto"))
        assert timing["cores"] == [chosen]
        assert timing["threads"] == 1

    def test_refuses_a_core_that_it_may_not_use(self, tmp_path: Path, network: Path) -> None:
        allowed = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        done = alone(tmp_path, "time", network, "--cores=0,4095", code=1)
        assert last_word(done) == f"cores 0,4095: allowed are {allowed}"

    @pytest.mark.parametrize(
        ("option", "problem"),
        [
            ("--threads=0", "argument --threads: 0 is not a number from 1"),
            ("--threads=many", "argument --threads: many is not a number from 1"),
            ("--cores=first", "argument --cores: first is not auto, any or numbers like 0,1"),
            ("--min-s=-1", "argument --min-s: -1 is not a number from 0"),
            ("--min-s=nan", "argument --min-s: nan is not a number from 0"),
            ("--hurry", "unrecognized arguments: --hurry"),
        ],
    )
    def test_says_which_option_is_wrong(self, tmp_path: Path, network: Path, option: str, problem: str) -> None:
        assert last_word(alone(tmp_path, "time", network, option, code=1)) == problem

    def test_of_a_32_bit_system(
        self, network: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(agent.sys, "maxsize", 2**31 - 1)
        assert agent.probe()["bits"] == 32
        for arguments in (["time"], ["sustain"], ["compare"]):
            assert agent.main([*arguments, str(network)]) == 1
            assert "32-bit, and the runtimes need a 64-bit OS; install" in capsys.readouterr().err.splitlines()[-1]

    @pytest.mark.parametrize("part", [0.0, 0.3, 0.9])
    @pytest.mark.parametrize("name", ["int8.onnx", "int8.tflite"])
    def test_a_file_that_was_cut_short_is_one_line(
        self, tmp_path: Path, exported: Product, name: str, part: float
    ) -> None:
        content = exported.files[name].read_bytes()
        (tmp_path / name).write_bytes(content[: int(part * len(content))])
        done = alone(tmp_path, "time", name, code=1)
        assert last_word(done).startswith(f"{name}: ")
        assert "cannot open it: " in last_word(done)
        assert "Traceback" not in done.stderr


class Board:
    """Files of /sys below a folder, and the CPUs that the kernel lets a process have."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, cpus: int) -> None:
        self.root, self.cores = root, set(range(cpus))
        monkeypatch.setattr(agent, "ROOT", root)
        monkeypatch.setattr(agent.os, "sched_getaffinity", lambda _: set(self.cores))
        monkeypatch.setattr(agent.os, "sched_setaffinity", self.pin)

    def pin(self, process: int, cores: set[int]) -> None:
        self.cores = set(cores)

    def write(self, name: str, values: list[object]) -> None:
        for cpu, value in enumerate(values):
            path = self.root / f"sys/devices/system/cpu/cpu{cpu}/{name}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{value}\n")


class TestCores:
    """Capacities and clocks as the kernels of such boards give them."""

    @pytest.fixture
    def board(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Board]:
        return lambda cpus: Board(tmp_path, monkeypatch, cpus)

    def test_four_small_and_four_big(self, board: Callable[[int], Board]) -> None:
        """A Rock 5: four Cortex-A55, then two pairs of Cortex-A76 whose clocks differ a little."""
        rock = board(8)
        rock.write("cpu_capacity", [530] * 4 + [1024, 1024, 1015, 1015])
        assert agent.fastest_cores() == [4, 5, 6, 7]
        assert agent.probe()["cores_fastest"] == [4, 5, 6, 7]
        assert agent.place_process("auto", "any") == {"threads": 4, "cores": list(range(8))}
        assert agent.place_process("auto", "auto") == {"threads": 4, "cores": [4, 5, 6, 7]}

    def test_more_threads_than_big_cores_take_the_next_ones(self, board: Callable[[int], Board]) -> None:
        """Three kinds of core, as in a telephone: the fastest of the slower ones follow."""
        telephone = board(8)
        telephone.write("cpu_capacity", [300] * 4 + [800] * 3 + [1024])
        assert agent.place_process("auto", "any")["threads"] == 1
        assert agent.place_process(3, "auto")["cores"] == [4, 5, 7]

    def test_cores_of_one_kind_are_left_to_the_kernel(self, board: Callable[[int], Board]) -> None:
        raspberry = board(4)
        raspberry.write("cpufreq/cpuinfo_max_freq", [2400000] * 4)
        assert agent.place_process(1, "auto") == {"threads": 1, "cores": [0, 1, 2, 3]}
        assert agent.place_process("auto", "auto") == {"threads": 4, "cores": [0, 1, 2, 3]}

    def test_without_capacities_the_highest_clock_decides(self, board: Callable[[int], Board]) -> None:
        hybrid = board(6)
        hybrid.write("cpu_capacity", [1024] * 6)
        hybrid.write("cpufreq/cpuinfo_max_freq", [5200000, 5000000, 3800000, 3800000, 3800000, 3800000])
        assert agent.place_process("auto", "auto") == {"threads": 2, "cores": [0, 1]}

    def test_only_allowed_cores_count(self, board: Callable[[int], Board]) -> None:
        rock = board(8)
        rock.write("cpu_capacity", [530] * 4 + [1024] * 4)
        rock.cores = {0, 1, 5}
        assert agent.place_process("auto", "auto") == {"threads": 1, "cores": [5]}
        rock.cores = {0, 1}
        assert agent.place_process("auto", "auto") == {"threads": 2, "cores": [0, 1]}

    def test_chosen_cores_decide_the_threads(self, board: Callable[[int], Board]) -> None:
        rock = board(8)
        rock.write("cpu_capacity", [530] * 4 + [1024] * 4)
        assert agent.place_process("auto", "0,1,2") == {"threads": 3, "cores": [0, 1, 2]}

    def test_unknown_speeds_are_equal_ones(self, board: Callable[[int], Board]) -> None:
        board(3).write("cpu_capacity", [1024, 300])  # the third has no file: offline, or another kernel
        assert agent.fastest_cores() == [0, 1, 2]

    def test_the_clock_is_that_of_the_cores_in_use(self, board: Callable[[int], Board]) -> None:
        rock = board(8)
        rock.write("cpufreq/scaling_cur_freq", [1800000] * 4 + [2400000] * 4)
        spec = agent.TensorSpec("x", (1, 1), np.dtype(np.float32))
        model = agent.Model(Path("fake"), "onnxruntime", "0", spec, (spec,), lambda array: [array], {})
        arrays = [np.zeros((1, 1), np.float32)]
        assert agent.measure(model, arrays, runs=1, warmup_s=0, min_s=0).mhz == 2400
        rock.cores = {0, 1}
        assert agent.measure(model, arrays, runs=1, warmup_s=0, min_s=0).mhz == 1800


class TestFirmware:
    """Throttle flags of a Raspberry Pi: from its tool, else from the kernel, as inside a container."""

    def flags(self, root: Path, text: str | None, monkeypatch: pytest.MonkeyPatch, *, tool: str | None = None) -> Any:
        def run(*_: object, **__: object) -> SimpleNamespace:
            if tool is None:
                raise FileNotFoundError("vcgencmd")
            return SimpleNamespace(stdout=tool)

        monkeypatch.setattr(agent, "ROOT", root)
        monkeypatch.setattr(agent.subprocess, "run", run)
        path = root / "sys/devices/platform/soc/soc:firmware/get_throttled"
        path.parent.mkdir(parents=True, exist_ok=True)
        if text is not None:
            path.write_text(text)
        return agent.conditions()["throttle"]

    def test_from_the_kernel(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        found = self.flags(tmp_path, "50004\n", monkeypatch)
        assert found["now"] == ["throttled"]
        assert found["since_boot"] == ["under-voltage", "throttled"]
        assert self.flags(tmp_path, "0\n", monkeypatch)["since_boot"] == []

    def test_the_tool_comes_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.flags(tmp_path, "4\n", monkeypatch, tool="throttled=0x1\n")["now"] == ["under-voltage"]
        assert self.flags(tmp_path, "4\n", monkeypatch, tool="VCHI initialization failed\n")["now"] == ["throttled"]

    def test_neither(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert self.flags(tmp_path, None, monkeypatch) == "unavailable"


class TestRun:
    def test_writes_what_the_file_stores(self, tmp_path: Path, exported: Product) -> None:
        images_NCHW = np.random.default_rng(0).normal(size=(6, 3, 16, 16)).astype(np.float32)
        np.save(tmp_path / "x.npy", images_NCHW)
        path = exported.files["int8.tflite"]
        found = answer(alone(tmp_path, "run", path, "--inputs=x.npy", "--outputs=y.npy"))
        outputs = np.load(tmp_path / "y.npy")
        model = agent.open_model(path)
        assert outputs.dtype == model.outputs[0].dtype == np.int8
        assert not list(tmp_path.glob("*.part"))
        expected = np.concatenate([model.infer(model.feed(image))[0] for image in images_NCHW])
        np.testing.assert_array_equal(outputs, expected)
        np.testing.assert_array_equal(model.predict(images_NCHW), model.outputs[0].real(outputs))
        assert found["outputs_sha256"] == hashlib.sha256(outputs.tobytes()).hexdigest()
        assert (found["images"], found["file"]) == (6, "int8.tflite")
        assert "correct" not in found

    def test_stored_inputs_give_the_answers_of_real_ones(self, tmp_path: Path, exported: Product) -> None:
        path = exported.files["int8.tflite"]
        model = agent.open_model(path)
        real = np.random.default_rng(1).normal(size=(4, 3, 16, 16)).astype(np.float32)
        stored = np.concatenate([model.feed(image) for image in real])
        assert stored.dtype == np.int8
        hashes = set()
        for name, array in (("real", real), ("stored", stored)):
            np.save(tmp_path / f"{name}.npy", array)
            done = alone(tmp_path, "run", path, f"--inputs={name}.npy", "--outputs=y.npy")
            hashes.add(answer(done)["outputs_sha256"])
        assert len(hashes) == 1
        np.save(tmp_path / "other.npy", np.clip(stored.astype(int) + 60, -128, 127).astype(np.int8))
        assert (
            answer(alone(tmp_path, "run", path, "--inputs=other.npy", "--outputs=y.npy"))["outputs_sha256"]
            not in hashes
        )

    def identity(self, folder: Path) -> Path:
        """A network whose answers are its four inputs."""
        ends = [helper.make_tensor_value_info(name, TensorProto.INT8, ["batch", 4]) for name in ("x", "y")]
        graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "identity", ends[:1], ends[1:])
        path = folder / "identity.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
        return path

    def test_of_equal_outputs_the_lowest_index_is_the_answer(self, tmp_path: Path) -> None:
        rows = [[5, 7, 7, 0], [9, 9, 9, 9], [-1, -1, -2, -1], [0, 0, 0, 127], [-128, 1, 2, 2]]
        np.save(tmp_path / "x.npy", np.array(rows, np.int8))
        network = self.identity(tmp_path)
        for labels, correct in (([1, 0, 0, 3, 2], 5), ([2, 0, 0, 3, 3], 3), ([2, 1, 1, 0, 3], 0)):
            np.save(tmp_path / "l.npy", np.array(labels))
            done = alone(tmp_path, "run", network, "--inputs=x.npy", "--outputs=y.npy", "--labels=l.npy")
            assert answer(done)["correct"] == correct
        assert np.load(tmp_path / "y.npy").tolist() == rows

    def test_labels_that_do_not_fit(self, tmp_path: Path, network: Path) -> None:
        np.save(tmp_path / "x.npy", np.zeros((3, 16, 32, 32), np.float32))
        for labels, problem in (
            (np.zeros(2, int), "l.npy: wants one integer per image, 3 in all"),
            (np.zeros(3), "l.npy: wants one integer per image, 3 in all"),
            (np.zeros(3, int), f"{network}: gives (16, 32, 32) per image, not one number per class"),
        ):
            np.save(tmp_path / "l.npy", labels)
            done = alone(tmp_path, "run", network, "--inputs=x.npy", "--outputs=y.npy", "--labels=l.npy", code=1)
            assert last_word(done) == problem

    @pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"no array at all"])
    def test_inputs_that_are_no_array(self, tmp_path: Path, network: Path, content: bytes) -> None:
        (tmp_path / "x.npy").write_bytes(content)
        done = alone(tmp_path, "run", network, "--inputs=x.npy", "--outputs=y.npy", code=1)
        assert last_word(done).startswith("x.npy: not a .npy file of images: ")

    def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(self, tmp_path: Path, network: Path) -> None:
        """A limit on the size of files stands for the disk: the write fails half way just so."""
        np.save(tmp_path / "x.npy", np.zeros((8, 16, 32, 32), np.float32))
        words = shlex.join(command(tmp_path, "run", network, "--inputs=x.npy", "--outputs=y.npy"))
        limited = ["sh", "-c", f"ulimit -f 128; exec {words}"]  # blocks of 512 bytes: 64 KiB of 512
        done = subprocess.run(limited, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 1
        assert last_word(done) == "y.npy: cannot be written: File too large"
        assert not list(tmp_path.glob("y.npy*"))
        (tmp_path / "y.npy").write_text("of an earlier run")
        subprocess.run(limited, capture_output=True, cwd=tmp_path)
        assert (tmp_path / "y.npy").read_text() == "of an earlier run"

    def test_a_folder_that_is_not_there(self, tmp_path: Path, network: Path) -> None:
        np.save(tmp_path / "x.npy", np.zeros((1, 16, 32, 32), np.float32))
        done = alone(tmp_path, "run", network, "--inputs=x.npy", "--outputs=gone/y.npy", code=1)
        assert last_word(done) == "gone/y.npy: cannot be written: No such file or directory"

    def test_nobody_reads_its_answer(self, tmp_path: Path, network: Path) -> None:
        np.save(tmp_path / "x.npy", np.zeros((1, 16, 32, 32), np.float32))
        words = command(tmp_path, "run", network, "--inputs=x.npy", "--outputs=y.npy")
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
        os.close(writer)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert "BrokenPipe" not in done.stderr


class Clock:
    """Time that passes only while a network computes."""

    def __init__(self, latency_s: Callable[[float], float]) -> None:
        self.now, self.latency_s = 0.0, latency_s

    def infer(self, array: np.ndarray) -> list[np.ndarray]:
        self.now += self.latency_s(self.now)
        return [array]

    def perf_counter(self) -> float:
        return self.now

    def perf_counter_ns(self) -> int:
        return round(self.now * 1e9)


class TestSustain:
    def sustained(
        self, monkeypatch: pytest.MonkeyPatch, root: Path, latency_s: Callable[[float], float], **options: Any
    ) -> dict[str, Any]:
        clock = Clock(latency_s)
        monkeypatch.setattr(agent, "time", clock)
        monkeypatch.setattr(agent, "ROOT", root)
        spec = agent.TensorSpec("x", (1, 1), np.dtype(np.float32))
        model = agent.Model(Path("fake"), "onnxruntime", "0", spec, (spec,), clock.infer, {})
        return agent.sustain(model, np.zeros((1, 1), np.float32), **{"seconds": 300, "every_s": 5, **options})

    def test_a_network_that_slows_down(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """0.1 s an image for two minutes, then slower and slower, 0.15 s in most of the last minute."""
        found = self.sustained(
            monkeypatch, tmp_path, lambda now: 0.1 if now < 120 else 0.13 if now < 235 else 0.15 if now < 290 else 0.2
        )
        assert len(found["series"]) == 60
        assert [point["t_s"] for point in found["series"]] == pytest.approx(range(5, 301, 5), abs=0.3)
        assert found["first_minute_p50_ms"] == pytest.approx(100)
        assert found["last_minute_p50_ms"] == pytest.approx(150)
        assert found["slowdown"] == pytest.approx(1.5)
        assert found["verdict"] == "THROTTLED"
        assert found["throttled"] == ["the last minute took 1.50 times as long as the first"]
        counted = sum(point["samples"] for point in found["series"])
        assert counted == pytest.approx(120 / 0.1 + 115 / 0.13 + 55 / 0.15 + 10 / 0.2, abs=5)

    def test_a_steady_network(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        heard: list[dict[str, Any]] = []
        found = self.sustained(monkeypatch, tmp_path, lambda now: 0.1, on_point=heard.append)
        assert heard == found["series"]
        assert (found["verdict"], found["throttled"]) == ("OK", [])
        assert found["slowdown"] == pytest.approx(1)
        assert {point["mhz"] for point in heard} == {"unavailable"}

    def test_a_short_run_compares_its_halves(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        found = self.sustained(monkeypatch, tmp_path, lambda now: 0.01 if now < 10.02 else 0.03, seconds=20)
        assert len(found["series"]) == 4
        assert found["slowdown"] == pytest.approx(3)

    def test_an_image_that_takes_longer_than_a_point(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        found = self.sustained(monkeypatch, tmp_path, lambda now: 40.0, seconds=100)
        assert [point["samples"] for point in found["series"]] == [1, 1, 1]
        assert found["verdict"] == "OK"

    def test_the_machines_own_word(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A kernel that cools the CPU for a while, and a clock that falls meanwhile: told, at unchanged times."""
        cooling = tmp_path / "sys/class/thermal/cooling_device0"
        cooling.mkdir(parents=True)
        (cooling / "type").write_text("cpufreq-cpu0")
        clocks = [tmp_path / f"sys/devices/system/cpu/cpu{cpu}/cpufreq" for cpu in os.sched_getaffinity(0)]
        for folder in clocks:
            folder.mkdir(parents=True)

        def latency_s(now: float) -> float:
            (cooling / "cur_state").write_text("2" if 100 < now < 200 else "0")
            for folder in clocks:
                (folder / "scaling_cur_freq").write_text("1500000" if 150 < now < 280 else "2400000")
            return 2.5

        found = self.sustained(monkeypatch, tmp_path, latency_s)
        assert found["throttled"] == [
            "the kernel caps the CPU's frequency to cool it",
            "the clock went from 2400 to 1500 MHz",
        ]
        assert found["verdict"] == "THROTTLED"
        capped = [point["t_s"] for point in found["series"] if point["throttled"]]
        assert min(capped) == pytest.approx(105, abs=2.5)
        assert max(capped) == pytest.approx(200, abs=5)

    def test_on_a_process_of_its_own(self, tmp_path: Path, network: Path) -> None:
        done = alone(tmp_path, "sustain", network, "--minutes=0.02", "--every-s=0.3", "--tolerance=100")
        points, found = lines(done, "point"), answer(done)
        assert found["series"] == points
        assert len(points) == 4
        assert found["verdict"] == "OK"
        assert (found["file"], found["threads"], found["minutes"]) == ("stack.onnx", 1, 0.02)
        assert found["sha256"] == hashlib.sha256(network.read_bytes()).hexdigest()
        assert json.dumps(found)
