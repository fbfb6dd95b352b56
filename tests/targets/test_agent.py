"""The agent as a board gets it: one file, an isolated interpreter, real runtimes."""

from __future__ import annotations

import ast
import hashlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from alone import AGENT, alone, answer
from onnx import TensorProto, helper, numpy_helper

from compress.targets import agent

MLPERF = Path(__file__).parents[3] / "shared" / "data" / "mlperf_tiny"


def save(path: Path, nodes: list, inputs: dict, constants: dict[str, np.ndarray]) -> Path:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def mean_of_channels(path: Path, shape: list) -> Path:
    """A network whose result is easy to know: the mean of each channel."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["y"]),
    ]
    return save(path, nodes, {"x": shape}, {})


@pytest.fixture
def network(tmp_path: Path) -> Path:
    return mean_of_channels(tmp_path / "mean.onnx", ["batch", 3, 8, 8])


@pytest.fixture
def images() -> np.ndarray:
    """NHWC."""
    return np.random.default_rng(0).normal(size=(5, 8, 8, 3)).astype(np.float32)


class TestAlone:
    def test_needs_the_standard_library_numpy_and_a_runtime_only(self) -> None:
        tree = ast.parse(AGENT.read_text(), feature_version=(3, 9))
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert "numpy" in names
        others = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
        assert others == {"numpy"}, "runtimes are imported by name, when a model is opened"

    def test_importing_it_loads_no_runtime(self) -> None:
        check = (
            "import sys; sys.path.insert(0, sys.argv[1]); import agent;"
            "print([m for m in ('onnxruntime', 'ai_edge_litert', 'tflite_runtime') if m in sys.modules])"
        )
        command = [sys.executable, "-I", "-c", check, str(AGENT.parent)]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"

    def test_probe(self, tmp_path: Path) -> None:
        machine = answer(alone(tmp_path, "probe"))
        assert machine["runtimes"]["onnxruntime"] == ort.__version__
        assert machine["python"] == ".".join(map(str, sys.version_info[:3]))
        assert machine["cores"] >= 1
        expected = {"board", "cpu", "arch", "features", "ram_gb", "os", "kernel", "governor", "min_mhz", "max_mhz"}
        assert expected | {"current_mhz", "temperature_c", "throttle", "load_1min"} <= set(machine)

    def test_time(self, tmp_path: Path, network: Path) -> None:
        arguments = ("time", network, "--runs", 30, "--warmup-s", 0.01)
        timing = answer(alone(tmp_path, *arguments))
        assert len(timing["samples_ms"]) == 30
        assert min(timing["samples_ms"]) > 0
        assert timing["startup_ms"] == timing["import_ms"] + timing["load_ms"]
        assert timing["import_ms"] > 1, "a fresh process has to import its runtime"
        assert timing["first_ms"] > 0
        assert timing["peak_rss_mb"] >= timing["idle_rss_mb"] > 0
        assert timing["sha256"] == hashlib.sha256(network.read_bytes()).hexdigest()
        assert timing["size_bytes"] == network.stat().st_size
        assert timing["version"] == ort.__version__
        assert timing["batch"] == 1
        assert timing["before"].keys() == timing["after"].keys()
        exact = timing["settings"].get("session.x64quantprecision") == "1"
        assert exact == agent.saturates() == any("VNNI" in note for note in timing["notes"])

    def test_run_takes_either_layout(self, tmp_path: Path, network: Path, images: np.ndarray) -> None:
        for layout, array in (("NHWC", images), ("NCHW", images.transpose(0, 3, 1, 2))):
            np.save(tmp_path / f"{layout}.npy", array)
            outputs = tmp_path / f"{layout}.out.npy"
            done = alone(tmp_path, "run", network, "--inputs", f"{layout}.npy", "--outputs", outputs)
            np.testing.assert_allclose(np.load(outputs), images.mean((1, 2)), atol=1e-6)
            assert answer(done)["images"] == 5
            assert "image 5 of 5" in done.stderr

    def test_peak_memory_is_not_the_parents(self, tmp_path: Path, network: Path) -> None:
        ballast = np.ones(2**25)  # 256 MiB, resident
        timing = answer(alone(tmp_path, "time", network, "--runs", 1, "--warmup-s", 0))
        assert timing["peak_rss_mb"] < ballast.nbytes / 2**20 / 2

    def test_says_what_is_wrong_in_its_last_line(self, tmp_path: Path) -> None:
        (tmp_path / "broken.onnx").write_bytes(b"no protobuf")
        done = alone(tmp_path, "time", "broken.onnx", code=1)
        assert done.stdout == ""
        last = done.stderr.splitlines()[-1]
        assert last.startswith("agent: error: broken.onnx: onnxruntime cannot open it: ")


class TestOpenModel:
    def test_names_the_file_that_is_missing(self, tmp_path: Path) -> None:
        with pytest.raises(agent.AgentError, match=r"gone\.onnx: no such file"):
            agent.open_model(tmp_path / "gone.onnx")

    def test_refuses_a_kind_it_does_not_know(self, tmp_path: Path) -> None:
        with pytest.raises(agent.AgentError, match=r"model\.pt: unknown kind of file; known are \.onnx"):
            agent.open_model(tmp_path / "model.pt")

    def test_refuses_a_broken_tflite_file(self, tmp_path: Path) -> None:
        path = tmp_path / "broken.tflite"
        path.write_bytes(b"no flatbuffer, but long enough to be looked at")
        with pytest.raises(agent.AgentError, match=r"broken\.tflite: litert cannot open it: ") as caught:
            agent.open_model(path)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("shape", "reason"),
        [([2, 3, 8, 8], "fixed batch of 2"), (["n", 3, "h", "w"], "open size"), ([1, 3, "h", 8], "open size")],
    )
    def test_refuses_shapes_it_cannot_feed(self, tmp_path: Path, shape: list, reason: str) -> None:
        with pytest.raises(agent.AgentError, match=reason):
            agent.open_model(mean_of_channels(tmp_path / "mean.onnx", shape))

    def test_refuses_two_inputs(self, tmp_path: Path) -> None:
        nodes = [helper.make_node("Add", ["a", "b"], ["y"])]
        path = save(tmp_path / "add.onnx", nodes, {"a": [1, 3], "b": [1, 3]}, {})
        with pytest.raises(agent.AgentError, match="has 2 inputs"):
            agent.open_model(path)

    def test_refuses_images_of_another_size(self, network: Path) -> None:
        with pytest.raises(agent.AgentError, match=r"wants images of shape \(3, 8, 8\), given \(9, 9, 3\)"):
            agent.open_model(network).predict(np.zeros((1, 9, 9, 3), np.float32))

    @pytest.mark.parametrize(
        ("runtime", "modules", "install"),
        [
            ("onnxruntime", ["onnxruntime"], "python -m pip install onnxruntime"),
            ("litert", ["ai_edge_litert", "tflite_runtime"], "python -m pip install ai-edge-litert"),
        ],
    )
    def test_says_how_to_install_a_missing_runtime(
        self, network: Path, monkeypatch: pytest.MonkeyPatch, runtime: str, modules: list[str], install: str
    ) -> None:
        for module in modules:
            monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(agent.AgentError) as caught:
            agent.open_model(network, runtime)
        assert str(caught.value) == f"{runtime} is not installed; {install}"

    @pytest.mark.skipif(not MLPERF.is_dir(), reason=f"no reference models at {MLPERF}")
    def test_int8_tflite_agrees_with_its_float_original(self) -> None:
        quantized = agent.open_model(MLPERF / "pretrainedResnet_quant.tflite")
        original = agent.open_model(MLPERF / "pretrainedResnet.tflite")
        assert quantized.input.dtype == np.int8
        assert quantized.input.scale is not None
        assert original.input.scale is None
        images_NHWC = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3)).astype(np.float32)
        found, expected = quantized.predict(images_NHWC), original.predict(images_NHWC)
        # One network up to rounding; a wrong scale or layout gives unrelated classes.
        assert (found.argmax(1) == expected.argmax(1)).mean() >= 0.75
        assert np.abs(found - expected).mean() < 0.05


class TestTensorSpec:
    spec = agent.TensorSpec("x", (1, 6), np.dtype(np.int8), scale=0.5, zero_point=-3)

    def test_halves_round_to_even_and_ends_saturate(self) -> None:
        real = np.array([0.25, 0.75, -0.25, -0.75, 1e4, -1e4], np.float32)
        assert self.spec.store(real).tolist() == [-3, -1, -3, -5, 127, -128]

    def test_real_is_the_inverse_of_store(self) -> None:
        stored = np.arange(-128, 128).astype(np.int8)
        assert self.spec.store(self.spec.real(stored)).tolist() == stored.tolist()

    def test_refuses_real_values_for_integers_of_unknown_scale(self) -> None:
        with pytest.raises(agent.AgentError, match="no scale"):
            agent.TensorSpec("x", (1, 3), np.dtype(np.uint8)).store(np.zeros(3, np.float32))


class TestMeasure:
    def model(self) -> tuple[agent.Model, list[float]]:
        seen: list[float] = []
        spec = agent.TensorSpec("x", (1, 1), np.dtype(np.float32))

        def infer(array: np.ndarray) -> list[np.ndarray]:
            seen.append(float(array[0, 0]))
            return [array]

        return agent.Model(Path("fake"), "onnxruntime", "0", spec, (spec,), infer, {}), seen

    def test_feeds_the_arrays_in_turn(self) -> None:
        model, seen = self.model()
        arrays = [np.full((1, 1), value, np.float32) for value in (1, 2, 3)]
        timing = agent.measure(model, arrays, runs=7, warmup_s=0, min_s=0)
        assert len(timing.samples_ms) == 7
        assert seen == [1, 1, 2, 3, 1, 2, 3, 1]

    def test_goes_on_until_the_seconds_are_over(self) -> None:
        model, _ = self.model()
        timing = agent.measure(model, [np.zeros((1, 1), np.float32)], runs=1, warmup_s=0, min_s=0.05)
        assert len(timing.samples_ms) > 100


class TestConditions:
    def board(self, root: Path, files: dict[str, str]) -> None:
        for path, text in files.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text)

    @pytest.mark.parametrize(
        ("files", "expected"),
        [
            ({"proc/self/comm": "python3", "proc/self/smaps": "55d0-55e0 r-xp 0 fe:00 1 /usr/bin/python3.11"}, None),
            ({"proc/self/comm": "qemu-aarch64"}, "qemu-aarch64"),
            (
                {"proc/self/smaps": "55d0-55e0 r--p 0 fe:00 1   /usr/bin/qemu-aarch64-static\nSize: 4 kB"},
                "qemu-aarch64-static",
            ),
            ({"proc/self/smaps": "1-2 r--p 0 fe:00 1 /usr/libexec/qemu-binfmt/aarch64-binfmt-P\n"}, "aarch64-binfmt-P"),
            ({"proc/self/smaps": "1-2 r--p 0 fe:00 1 /home/qemu-user/lib/python3\n"}, None),
        ],
    )
    def test_an_emulator_is_told_from_a_cpu(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: str | None
    ) -> None:
        monkeypatch.setattr(agent, "ROOT", tmp_path)
        monkeypatch.delenv("QEMU_CPU", raising=False)
        self.board(tmp_path, files)
        assert agent.emulator() == (expected or agent.UNAVAILABLE)
        monkeypatch.setenv("QEMU_CPU", "cortex-a72")
        assert agent.emulator() == (expected or "qemu")

    def test_missing_is_a_value(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(agent, "ROOT", tmp_path)
        monkeypatch.setattr(agent.subprocess, "run", self.no_such_program)
        machine = agent.probe()
        for key in ("board", "features", "ram_gb", "governor", "min_mhz", "max_mhz", "current_mhz", "temperature_c"):
            assert machine[key] == "unavailable", key
        assert machine["throttle"] == "unavailable"
        assert agent.throttled(machine, machine) == []

    def test_a_raspberry_pi(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        core = "processor : 0\nFeatures : fp asimd crc32 asimddp\nCPU implementer : 0x41\nCPU part : 0xd0b\n"
        policy = "sys/devices/system/cpu/cpufreq/policy0"
        self.board(
            tmp_path,
            {
                "proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
                "proc/cpuinfo": f"{core}\n" * 4,
                "proc/meminfo": "MemTotal:        8388608 kB\n",
                "etc/os-release": 'NAME="Debian"\nPRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\n',
                f"{policy}/scaling_governor": "ondemand\n",
                f"{policy}/cpuinfo_min_freq": "1500000\n",
                f"{policy}/cpuinfo_max_freq": "2400000\n",
                f"{policy}/scaling_cur_freq": "2400000\n",
                "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
                "sys/class/thermal/thermal_zone0/temp": "61200\n",
                "sys/class/thermal/cooling_device0/type": "cpufreq-cpu0\n",
                "sys/class/thermal/cooling_device0/cur_state": "0\n",
            },
        )
        monkeypatch.setattr(agent, "ROOT", tmp_path)
        monkeypatch.setattr(agent.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout="throttled=0x50000\n"))
        machine = agent.probe()
        assert machine["board"] == "Raspberry Pi 5 Model B Rev 1.0"
        assert machine["cpu"] == "4 x Cortex-A76"
        assert machine["features"] == ["asimd", "asimddp"]
        assert machine["ram_gb"] == 8
        assert machine["os"] == "Debian GNU/Linux 12 (bookworm)"
        assert machine["governor"] == "ondemand"
        assert (machine["min_mhz"], machine["max_mhz"], machine["current_mhz"]) == (1500, 2400, 2400)
        assert machine["temperature_c"] == 61.2
        assert machine["throttle"]["since_boot"] == ["under-voltage", "throttled"]
        assert agent.throttled(machine, machine) == [], "what happened before the run is not the run's fault"

    def test_throttled_says_why(self) -> None:
        calm = {"now": [], "since_boot": [], "count": 3, "cooling": 0}

        def reasons(**later: object) -> list[str]:
            return agent.throttled({"throttle": calm}, {"throttle": {**calm, **later}})

        assert reasons() == []
        assert reasons(since_boot=["under-voltage"]) == ["under-voltage during the run"]
        assert reasons(now=["throttled"], since_boot=["throttled"]) == ["throttled during the run"]
        assert reasons(count=5) == ["the CPU counted 2 throttle events"]
        assert reasons(cooling=1) == ["the kernel caps the CPU's frequency to cool it"]

    def test_x86_without_vnni_saturates(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(agent, "ROOT", tmp_path)
        monkeypatch.setattr(agent.platform, "machine", lambda: "x86_64")
        assert agent.saturates(), "unknown features are taken for the worse case"
        for flags, expected in (("avx2 avx512f", True), ("avx2 avx_vnni", False), ("avx512_vnni", False)):
            self.board(tmp_path, {"proc/cpuinfo": f"flags\t\t: fpu {flags}\n"})
            assert agent.saturates() is expected
        self.board(tmp_path, {"proc/cpuinfo": "Features : asimd\n"})
        monkeypatch.setattr(agent.platform, "machine", lambda: "aarch64")
        assert not agent.saturates()

    @staticmethod
    def no_such_program(*_: object, **__: object) -> None:
        raise FileNotFoundError


class TestExactIntegers:
    """onnxruntime's int8 kernels against int64 arithmetic, with weights and pixels at the ends of their ranges."""

    X_SCALE = np.float32(1 / 64)
    X_ZERO, Y_ZERO = np.uint8(3), np.uint8(100)

    CASES = pytest.mark.parametrize(
        ("op", "x_shape", "w_shape", "attributes"),
        [
            pytest.param("Conv", (1, 64, 14, 14), (96, 64, 1, 1), {}, id="pointwise"),
            pytest.param("Conv", (1, 32, 15, 15), (48, 32, 3, 3), {"pads": [1] * 4}, id="3x3"),
            pytest.param("Conv", (1, 3, 32, 32), (32, 3, 3, 3), {"pads": [1] * 4, "strides": [2, 2]}, id="stem"),
            pytest.param("Conv", (1, 32, 9, 9), (48, 8, 3, 3), {"pads": [1] * 4, "group": 4}, id="grouped"),
            pytest.param("Conv", (1, 90, 9, 9), (90, 1, 3, 3), {"pads": [1] * 4, "group": 90}, id="depthwise"),
            pytest.param("Gemm", (1, 256), (100, 256), {"transB": 1}, id="gemm"),
        ],
    )

    @CASES
    def test_our_session_is_within_one_step(
        self, tmp_path: Path, op: str, x_shape: tuple, w_shape: tuple, attributes: dict
    ) -> None:
        path, x, expected, y_scale = self.case(tmp_path, op, x_shape, w_shape, attributes)
        model = agent.open_model(path)
        steps = np.rint(model.infer(x)[0] / y_scale) + int(self.Y_ZERO)
        assert np.abs(steps - expected).max() <= 1

    def test_a_plain_session_is_wrong_exactly_where_we_say_so(self, tmp_path: Path) -> None:
        path, x, expected, y_scale = self.case(tmp_path, "Conv", (1, 64, 14, 14), (96, 64, 1, 1), {})
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        steps = np.rint(session.run(None, {"x": x})[0] / y_scale) + int(self.Y_ZERO)
        assert (np.abs(steps - expected).max() > 1) == agent.saturates()

    def case(
        self, folder: Path, op: str, x_shape: tuple, w_shape: tuple, attributes: dict
    ) -> tuple[Path, np.ndarray, np.ndarray, np.float32]:
        """A one-operator QDQ file, its input, the expected stored outputs and the output's scale."""
        rng = np.random.default_rng(0)
        outputs, terms = w_shape[0], int(np.prod(w_shape[1:]))
        w = np.where(rng.random(w_shape) < 0.8, 127, -127).astype(np.int8)
        w_scale = (rng.uniform(0.5, 2, outputs) / 127).astype(np.float32)
        bias = rng.integers(-20000, 20000, outputs).astype(np.int32)
        y_scale = np.float32(1.6 * terms / 127)
        stored = np.where(rng.random(x_shape) < 0.8, 255, rng.integers(0, 256, x_shape))
        constants = {
            "w": w, "ws": w_scale, "wz": np.zeros(outputs, np.int8), "xs": self.X_SCALE, "xz": self.X_ZERO,
            "b": bias, "bs": self.X_SCALE * w_scale, "bz": np.zeros(outputs, np.int32),
            "ys": y_scale, "yz": self.Y_ZERO,
        }  # fmt: skip
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
            helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
            helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
            helper.make_node("DequantizeLinear", ["b", "bs", "bz"], ["bd"], axis=0),
            helper.make_node(op, ["xd", "wd", "bd"], ["real"], **attributes),
            helper.make_node("QuantizeLinear", ["real", "ys", "yz"], ["yq"]),
            helper.make_node("DequantizeLinear", ["yq", "ys", "yz"], ["y"]),
        ]
        constants = {name: np.asarray(value) for name, value in constants.items()}
        path = save(folder / f"{op}.onnx", nodes, {"x": list(x_shape)}, constants)

        steps = stored.astype(np.int64) - int(self.X_ZERO)
        sums = steps @ w.astype(np.int64).T if op == "Gemm" else convolve(steps, w.astype(np.int64), **attributes)
        per_channel = (1, -1) + (1,) * (sums.ndim - 2)
        sums = sums + bias.astype(np.int64).reshape(per_channel)
        scale = self.X_SCALE.astype(np.float64) * w_scale / y_scale
        expected = np.clip(np.rint(sums * scale.reshape(per_channel)) + int(self.Y_ZERO), 0, 255)
        return path, (steps * self.X_SCALE).astype(np.float32), expected, y_scale


def convolve(
    x_NCHW: np.ndarray,
    w: np.ndarray,
    *,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
    group: int = 1,
) -> np.ndarray:
    """Integer convolution with equal pads and strides on both axes."""
    pad, stride = (pads or [0])[0], (strides or [1])[0]
    padded = np.pad(x_NCHW, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, w.shape[2:], (2, 3))[:, :, ::stride, ::stride]
    images, channels, height, width = windows.shape[:4]
    grouped = windows.reshape(images, group, channels // group, height, width, *w.shape[2:])
    sums = np.einsum("ngchwij,gocij->ngohw", grouped, w.reshape(group, -1, *w.shape[1:]))
    return sums.reshape(images, len(w), height, width)
