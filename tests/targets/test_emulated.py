"""The emulated ARM cores: what they compute, what they refuse, and what `examine` says. All of it really runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from compress.errors import TargetError
from compress.progress import Silent
from compress.targets import agent, asking, open_target
from compress.targets.agent import UNAVAILABLE
from compress.targets.emulated import Emulated, counting, cycles, examine, parse
from compress.targets.emulated.cores import CORES, cpuinfo
from compress.targets.emulated.userland import look, ready, trap
from compress.targets.outputs import compared

IMAGES = 3


@pytest.fixture(scope="module")
def userland():
    return ready(Silent())


def emulated(userland, cpu: str, program: str, *arguments: str) -> str:
    command = [*userland.python(cpu), "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=userland.environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ------------------------------------------------------------------------------------------------------------- CPU

SEEN = """
import ctypes, json, os, platform
auxv = ctypes.CDLL(None).getauxval
auxv.restype, auxv.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
print(json.dumps({"machine": platform.machine(), "cpuinfo": open("/proc/cpuinfo").read(), "hwcap": auxv(16),
                  "hwcap2": auxv(26), "cpus": os.cpu_count()}))
"""


@pytest.mark.parametrize(
    ("cpu", "part", "dot_product"), [("a53", "0xd03", 0), ("a72", "0xd08", 0), ("a76", "0xd0b", 1)]
)
def test_a_program_sees_the_named_core(userland, cpu, part, dot_product):
    found = json.loads(emulated(userland, f"cortex-{cpu}", SEEN))
    assert found["machine"] == "aarch64"
    assert set(re.findall(r"CPU part\t: (\S+)", found["cpuinfo"])) == {part}
    assert set(re.findall(r"CPU implementer\t: (\S+)", found["cpuinfo"])) == {"0x41"}
    assert found["cpuinfo"].count("processor\t:") == found["cpus"]
    assert ("asimddp" in found["cpuinfo"].split()) == bool(dot_product)
    assert found["hwcap"] >> 20 & 1 == dot_product  # ASIMDDP of AT_HWCAP: what a runtime's kernels go by
    assert not found["hwcap"] >> 22 & 1  # SVE, with which qemu 7.2's default CPU computes wrong int8
    assert trap(found, f"cortex-{cpu}") == ""


def test_the_emulators_default_cpu_is_a_trap(userland):
    """With `-cpu max`, what qemu takes when no CPU is named."""
    command = [word if word != "cortex-a72" else "max" for word in userland.python("cortex-a72")]
    found = json.loads(subprocess.run([*command, "-c", SEEN], capture_output=True, env=userland.environment).stdout)
    assert re.search("not a cortex-a72: it has .*sve", trap(found, "cortex-a72"))


def test_another_core_is_a_trap(userland):
    found = json.loads(emulated(userland, "cortex-a76", SEEN))
    found["cpuinfo"] = cpuinfo(CORES["cortex-a72"], 2)
    assert "not a cortex-a72: it has asimddp" in trap(found, "cortex-a72")


def test_the_hosts_cpuinfo_is_a_trap(userland):
    """qemu passes it through where the userland has none; the next `ready` puts it back."""
    file = userland.view("cortex-a53") / "proc/cpuinfo"
    file.rename(file.with_name("elsewhere"))
    try:
        with pytest.raises(TargetError, match=r"emulated:cortex-a53: /proc/cpuinfo shows .* passed through"):
            look(userland, "cortex-a53")
    finally:
        file.with_name("elsewhere").unlink()
        ready(Silent())
    look(userland, "cortex-a53")


def test_a_python_without_a_named_cpu_is_refused(userland):
    with pytest.raises(TargetError, match="emulated:max: no such CPU; known: cortex-a53, cortex-a72, cortex-a76"):
        userland.python("max")


def test_what_steers_qemu_or_python_does_not_reach_the_userland(userland, monkeypatch):
    for key, value in {"QEMU_CPU": "max", "PYTHONHOME": "/nowhere", "QEMU_STRACE": "1", "LD_PRELOAD": "x"}.items():
        monkeypatch.setenv(key, value)
    assert (
        emulated(userland, "cortex-a72", "import os; print(sorted(set(os.environ) & {'QEMU_CPU', 'PYTHONHOME'}))")
        == "[]\n"
    )


# ------------------------------------------------------------------------------------------------------ stand-in


def test_the_written_python3_starts_itself_again(userland, tmp_path):
    python3 = tmp_path / "a board" / "python3"
    python3.parent.mkdir()
    userland.write_python3(python3, "cortex-a76")
    child = "import platform, sys; print(platform.machine(), sys.executable)"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    done = subprocess.run([python3, "-c", program], capture_output=True, text=True)
    assert done.stdout == f"aarch64 {python3}\n", done.stderr


def test_a_virtual_environment_of_the_written_python3_is_one_without_the_wheels(userland, tmp_path):
    userland.write_python3(tmp_path / "python3", "cortex-a72")
    subprocess.run([tmp_path / "python3", "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    program = "import importlib.util as i, sys; print(sys.prefix, i.find_spec('numpy'))"
    done = subprocess.run([tmp_path / "venv/bin/python", "-c", program], capture_output=True, text=True)
    assert done.stdout == f"{tmp_path / 'venv'} None\n", done.stderr


# -------------------------------------------------------------------------------------------------------- machine


def test_names():
    assert parse("emulated") == ("cortex-a53", "cortex-a72", "cortex-a76")
    assert parse("emulated:cortex-a76") == ("cortex-a76",)
    for wrong in ("emulated:", "emulated:cortex-a77", "emulator", "emulated:cortex-a76:2"):
        with pytest.raises(TargetError, match=f"target {wrong}: no such target; known: emulated, emulated:cortex-a53"):
            parse(wrong)


def test_the_agent_finds_an_arm_machine(userland):
    with open_target("emulated:cortex-a53", Silent()) as machine:
        found = asking.probe(machine)
    assert (found["machine"], found["bits"]) == ("aarch64", 64)
    assert "Cortex-A53" in found["cpu"]
    assert "asimddp" not in found["features"]
    assert found["agent"] == agent.sha256(Path(agent.__file__))


@pytest.mark.parametrize("command", ["time", "compare", "sustain"])
def test_time_is_refused(userland, command):
    problem = f"x: `{command}` measures time, and emulated time is not ARM time; "
    with Emulated("emulated", Silent(), userland) as machine, pytest.raises(TargetError, match=problem):
        machine.ask([command, "net.onnx"], about="x")


def test_the_agents_last_word_is_the_error(userland, tmp_path):
    with (
        Emulated("emulated", Silent(), userland) as machine,
        pytest.raises(TargetError, match=r"x: .*no\.npy.*No such file"),
    ):
        machine.ask(["run", "net.onnx", f"--inputs={tmp_path / 'no.npy'}", "--outputs=b"], about="x")


# -------------------------------------------------------------------------------------------------------- examine


@pytest.fixture(scope="module")
def examined(request):
    """`examine` of an int8 network in both formats on all CPUs, once for all tests below."""
    made = {}

    def examine_once(files, images):
        if not made:
            made["answer"] = examine(files, images, progress=Silent())
        return made["answer"]

    return examine_once


@pytest.fixture
def images(stripes) -> np.ndarray:
    return stripes.splits["evaluation"][0][:IMAGES].numpy()


@pytest.fixture
def int8(exported) -> dict[str, Path]:
    return {name: exported.files[name] for name in ("int8.onnx", "int8.tflite")}


@pytest.mark.slow
def test_int8_outputs_are_the_hosts_bit_for_bit(examined, int8, images):
    rows = examined(int8, images)["parity"]
    assert {(row["file"], row["cpu"]) for row in rows} == {(name, cpu) for name in int8 for cpu in CORES}
    for row in rows:
        here = agent.open_model(int8[row["file"]]).answers(images)
        assert len(np.unique(here)) > IMAGES  # constants would be equal on any kernel
        assert (row["outputs"], row["differing"], row["max_lsb"]) == (here.size, 0, 0)
        assert row["outputs_sha256"] == agent.hashlib.sha256(here.tobytes()).hexdigest()


def test_a_differing_output_is_counted():
    here = np.array([[1, -128], [127, 0]], np.int8)
    there = np.array([[1, 127], [126, 0]], np.int8)
    assert compared(here, here)["differing"] == 0
    found = compared(there, here)
    assert (found["outputs"], found["differing"], found["max_lsb"]) == (4, 2, 255)
    assert found["outputs_sha256"] != compared(here, here)["outputs_sha256"]
    floats = compared(np.float32([0.0, np.nan, 1.5]), np.float32([-0.0, np.nan, 1.0]))
    assert (floats["differing"], floats["max_lsb"], floats["max_difference"]) == (2, None, 0.5)


@pytest.mark.slow
def test_every_file_is_counted_twice_on_every_core(examined, int8, images):
    rows = examined(int8, images)["counts"]
    assert {row["runtime"] for row in rows} == {"onnxruntime", "litert"}
    assert len(rows) == len(int8) * len(CORES)
    for row in rows:
        # So small that the allocator shows: what it does for a call depends on the heap's layout.
        assert row["repeat_instructions"] == pytest.approx(row["instructions"], rel=0.001, abs=3000)
        assert 0 < row["overhead_instructions"] < 2000 < row["instructions"]
        assert row["size_bytes"] == int8[row["file"]].stat().st_size
        assert row["sha256"] == agent.sha256(int8[row["file"]])


@pytest.mark.slow
def test_the_dot_product_needs_fewer_instructions(examined, int8, images):
    """`asimddp` is what the A76's int8 kernels have and the A72's lack."""
    counts = {(row["file"], row["cpu"]): row["instructions"] for row in examined(int8, images)["counts"]}
    assert all(counts[name, "cortex-a76"] < counts[name, "cortex-a72"] for name in int8)


@pytest.mark.slow
def test_cycles_are_named_estimated_and_nothing_is_a_time(examined, int8, images):
    answer = examined(int8, images)
    for row in answer["counts"]:
        assert not [key for key in row if re.search(r"(^|_)(ms|fps|s|seconds|time)($|_)", key)]
        assert 0.95 < row["share_covered"] <= 1
        assert 0.1 * row["instructions"] < row["cycles_estimated"] < 10 * row["instructions"]
    by_cpu = {row["cpu"]: row["cycles_estimated"] for row in answer["counts"] if row["file"] == "int8.tflite"}
    assert by_cpu["cortex-a76"] < by_cpu["cortex-a72"] < by_cpu["cortex-a53"]
    assert "no time is measured" in answer["conditions"]["statement"]
    assert "estimated" in answer["conditions"]["statement"]
    json.dumps(answer)


@pytest.mark.slow
def test_conditions_say_what_ran(examined, int8, images, userland):
    conditions = examined(int8, images)["conditions"]
    assert conditions["qemu"] == userland.qemu.version
    assert conditions["userland"] == userland.key
    assert conditions["threads"] == 1
    assert conditions["cpus"] == list(CORES)
    assert conditions["runtimes"] == {
        "onnxruntime": agent._version_of("onnxruntime"),
        "litert": userland.versions["ai-edge-litert"],
    }


def test_without_llvm_mca_cycles_are_unavailable(int8, monkeypatch):
    def missing(progress):
        raise TargetError("cycles", "llvm-mca is not on this machine", cycles.INSTALL)

    monkeypatch.setattr(cycles, "find", missing)
    name = "int8.tflite"
    answer = examine({name: int8[name]}, None, cpus=["cortex-a72"], progress=Silent())
    (row,) = answer["counts"]
    assert (row["cycles_estimated"], row["share_covered"]) == (UNAVAILABLE, UNAVAILABLE)
    assert row["instructions"] > 10_000
    assert "apt-get install" in answer["conditions"]["statement"]
    assert answer["parity"][0]["images"] == 4


def test_without_a_plugin_there_is_parity_and_no_count(int8, monkeypatch):
    def missing(qemu, progress):
        raise TargetError("emulated", "qemu 10.0.2 without plugins")

    monkeypatch.setattr(counting, "plugin", missing)
    answer = examine({"int8.onnx": int8["int8.onnx"]}, None, cpus=["cortex-a76"], progress=Silent())
    assert answer["counts"] == []
    assert [row["differing"] for row in answer["parity"]] == [0]
    assert "No instructions are counted: emulated: qemu 10.0.2 without plugins" in answer["conditions"]["statement"]


def test_nothing_to_examine_is_an_error(int8):
    with pytest.raises(TargetError, match="no file for onnxruntime; export"):
        examine({"int8.tflite": int8["int8.tflite"]}, None, runtimes=["onnxruntime"], progress=Silent())


def test_the_package_needs_no_torch():
    program = "import sys, compress.targets.emulated as e; print({'torch', 'pydantic', 'onnx'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "set()\n"
