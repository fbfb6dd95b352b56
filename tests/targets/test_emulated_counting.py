"""The plugin that counts, against programs whose instructions are known, and llvm-mca against known code."""

from __future__ import annotations

import contextlib
import stat
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from compress.errors import TargetError
from compress.models.mobilenet_v2 import MobileNetV2
from compress.product import Network, Preprocess, Product, Run, Structure
from compress.progress import Silent
from compress.stages.export import Export
from compress.targets.emulated import counting, cycles
from compress.targets.emulated.counting import Block
from compress.targets.emulated.userland import ready

FOLDER = Path(counting.__file__).parent

LOOP = """
import ctypes, json, mmap, struct, sys, threading
sys.path.insert(0, {folder!r})
import inside

words = [0xF1000400]                                    # subs x0, x0, #1
words += [0xD503201F] * {nops}                          # nop
words += [0x54000001 | (-({nops} + 1) & 0x7FFFF) << 5]  # b.ne to the first
words += [0xD65F03C0]                                   # ret
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(struct.pack(f"<{{len(words)}}I", *words))
loop = ctypes.CFUNCTYPE(None, ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
"""

ONCE_AND_AGAIN = """
for times in {times}:
    inside.window(loop, times, times == {times}[-1])
"""

BESIDE = """
stop = threading.Event()
def work():
    while not stop.is_set():
        loop(1000)
thread = threading.Thread(target=work)
thread.start()
inside.window(loop, 10_000_000, 0)
stop.set()
thread.join()
"""

END = """
inside.syscall(inside.MARK, inside.WRITE, 0)
print(json.dumps({{}}))
"""


@pytest.fixture(scope="module")
def userland():
    return ready(Silent())


@pytest.fixture(scope="module")
def plugin(userland):
    return counting.plugin(userland.qemu, Silent())


def counted(userland, plugin, program, **values):
    text = (LOOP + program + END).format(folder=str(FOLDER), **{"nops": 0, **values})
    _, windows, blocks = counting.counted(userland, plugin, "cortex-a72", ["-c", text], about="a loop")
    return windows, blocks


@pytest.mark.parametrize("nops", [0, 5, 700])
def test_a_loop_costs_exactly_its_instructions(userland, plugin, nops):
    """700 are more than a translation block holds; 5 fit into one."""
    times = [1000, 1000, 1000, 1000, 3000]
    windows, blocks = counted(userland, plugin, ONCE_AND_AGAIN, nops=nops, times=times)
    own = [count for count, _ in windows]
    assert own[3] == own[2]
    assert own[4] - own[3] == 2000 * (nops + 2)
    assert [others for _, others in windows] == [0] * len(times)
    inside_loop = sum(block.executed for block in blocks if block.count >= 2999)
    assert inside_loop == pytest.approx(3000 * (nops + 2), rel=0.001)
    assert sum(block.executed for block in blocks) == own[4]
    hot = {word for block in blocks[:3] for word in block.words}
    assert 0xF1000400 in hot
    assert (0xD503201F in hot) == bool(nops)


def test_work_of_other_threads_is_counted_apart(userland, plugin):
    ((own, others),), _ = counted(userland, plugin, BESIDE)
    assert own == pytest.approx(20_000_000, rel=0.01)
    assert others > 10_000


SECOND_COUNTER = """
/* Counts every instruction of the first thread by itself, one by one: another way than counter.c's. */
#include <inttypes.h>
#include <stdio.h>
#include <stddef.h>
struct qemu_plugin_tb; struct qemu_plugin_insn;
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
extern struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
extern void qemu_plugin_register_vcpu_tb_trans_cb(uint64_t, void (*)(uint64_t, struct qemu_plugin_tb *));
extern void qemu_plugin_register_vcpu_insn_exec_cb(struct qemu_plugin_insn *, void (*)(unsigned, void *), int, void *);
extern void qemu_plugin_register_vcpu_syscall_cb(uint64_t, void (*)(uint64_t, unsigned, int64_t, uint64_t, uint64_t,
    uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t));
int qemu_plugin_version = PLUGIN_VERSION;
static uint64_t total;
static void one(unsigned cpu, void *data) { (void)data; total += cpu == 0; }
static void block(uint64_t id, struct qemu_plugin_tb *tb)
{
    (void)id;
    for (size_t i = 0; i < qemu_plugin_tb_n_insns(tb); i++)
        qemu_plugin_register_vcpu_insn_exec_cb(qemu_plugin_tb_get_insn(tb, i), one, 0, NULL);
}
static void call(uint64_t id, unsigned cpu, int64_t number, uint64_t a, uint64_t b, uint64_t c, uint64_t d,
                 uint64_t e, uint64_t f, uint64_t g, uint64_t h)
{
    (void)id, (void)cpu, (void)a, (void)b, (void)c, (void)d, (void)e, (void)f, (void)g, (void)h;
    if (number == 173) /* getppid */
        fprintf(stderr, "total %" PRIu64 "\\n", total);
}
int qemu_plugin_install(uint64_t id, const void *info, int argc, char **argv)
{
    (void)info, (void)argc, (void)argv;
    qemu_plugin_register_vcpu_tb_trans_cb(id, block);
    qemu_plugin_register_vcpu_syscall_cb(id, call);
    return 0;
}
"""

MANY = """
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("agent", sys.argv[1])
agent = importlib.util.module_from_spec(spec)
sys.modules["agent"] = agent
spec.loader.exec_module(agent)
model = agent.open_model(sys.argv[2], "auto", 1)
array = agent.random_input(model.input)
def run(infer, times):
    for _ in range(times):
        infer(array)
for times in (12, 5, 20):
    os.getppid()
    run(model.infer, times)
os.getppid()
"""


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> dict[str, Path]:
    """Large enough that the C library's allocator, whose work depends on the heap's layout, is lost in it."""
    torch.manual_seed(0)
    preprocess = Preprocess(size=96, mean=(0.5,) * 3, std=(0.5,) * 3, crop=1.0)
    structure = Structure(model={"use": "tests:none"}, num_classes=10, preprocess=preprocess)
    network = Network(MobileNetV2(10, width=0.35, padding="same").eval(), structure)
    data = SimpleNamespace(labels=tuple("abcdefghij"), preprocess=preprocess, task="classification", scale=None)
    folder = tmp_path_factory.mktemp("networks")
    run = Run(folder=folder, data=data, device=torch.device("cpu"), seed=0, progress=Silent(), recipe_hash="0" * 64)
    return dict(Export(use="export", kinds=("parent",)).apply(Product(network), run).files)


@pytest.mark.parametrize("name", ["parent.onnx", "parent.tflite"])
def test_a_count_repeats_within_a_thousandth(userland, plugin, networks, name):
    counts = [counting.count(userland, plugin, networks[name], "cortex-a76") for _ in range(2)]
    assert counts[0].instructions > 1_000_000
    assert counts[1].instructions == pytest.approx(counts[0].instructions, rel=0.001)
    assert max(count.spread_instructions for count in counts) < 0.001 * counts[0].instructions


@pytest.mark.slow
@pytest.mark.parametrize("name", ["parent.onnx", "parent.tflite"])
def test_another_counter_says_the_same(userland, plugin, networks, tmp_path, name):
    """20 inferences less 5, in a plain loop, every instruction of the first thread counted by other code."""
    source, library = tmp_path / "second.c", tmp_path / "second.so"
    source.write_text(SECOND_COUNTER)
    flags = ["-O2", "-shared", "-fPIC", f"-DPLUGIN_VERSION={userland.qemu.plugin_interface}"]
    subprocess.run([*counting.compiler(), *flags, "-o", library, source], check=True)
    command = userland.python("cortex-a72", qemu_options=["-plugin", str(library)])
    arguments = ["-P", "-c", MANY, counting.agent.__file__, str(networks[name])]
    environment = {**userland.environment, **counting.FIXED}
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _, few, more, most = (int(line.split()[1]) for line in done.stderr.splitlines() if line.startswith("total "))
    expected = ((most - more) - (more - few)) / 15
    found = counting.count(userland, plugin, networks[name], "cortex-a72")
    assert found.instructions == pytest.approx(expected, rel=0.001)


def test_a_plugin_that_writes_nothing_is_an_error(userland, plugin):
    with pytest.raises(TargetError, match="x: the emulator's plugin wrote no counts"):
        counting.counted(userland, plugin, "cortex-a72", ["-c", "print({})"], about="x")


def test_a_program_that_fails_is_an_error_with_its_last_words(userland, plugin):
    with pytest.raises(TargetError, match="x: ZeroDivisionError: division by zero"):
        counting.counted(userland, plugin, "cortex-a72", ["-c", "1 / 0"], about="x")


def test_a_file_that_no_runtime_opens_is_named(userland, plugin, tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"not a network")
    with pytest.raises(TargetError, match=r"broken\.onnx on emulated:cortex-a72: .*onnxruntime cannot open it"):
        counting.count(userland, plugin, tmp_path / "broken.onnx", "cortex-a72")


def test_without_a_compiler_there_is_one_clear_error(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(counting.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        TargetError, match=r"counter\.c: no C compiler .*; sudo apt-get install gcc, or pip install ziglang"
    ):
        counting.compiler()


def test_a_compiler_that_fails_is_named(userland, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "false")
    with pytest.raises(TargetError, match=r"counter\.c: false does not compile it"):
        counting.plugin(userland.qemu, Silent())
    assert not list(tmp_path.rglob("*.so"))


# ---------------------------------------------------------------------------------------------------------- cycles

ADD = 0x91000400  # add x0, x0, #1: each waits for the one before, one cycle on every core
UNKNOWN = 0x00000000


@pytest.fixture(scope="module")
def mca():
    return cycles.find(Silent())


@pytest.mark.parametrize("cpu", ["cortex-a72", "cortex-a76"])
def test_a_chain_of_additions_takes_a_cycle_each(mca, cpu):
    found = cycles.estimate(mca, [Block(0, 1000, (ADD,) * 40)], cpu)
    assert found.cycles == pytest.approx(40_000, rel=0.02)
    assert (found.share_covered, found.blocks) == (1.0, 1)


def test_two_chains_run_side_by_side(mca):
    other = ADD | 1 | 1 << 5  # add x1, x1, #1
    found = cycles.estimate(mca, [Block(0, 1000, (ADD, other) * 40)], "cortex-a76")
    assert found.cycles == pytest.approx(40_000, rel=0.02)


def test_what_the_model_does_not_know_is_not_covered(mca):
    """The rest is taken to be as fast as what is known: 40 + 10 instructions, at a cycle each."""
    found = cycles.estimate(mca, [Block(0, 1000, (ADD,) * 40), Block(400, 1000, (UNKNOWN,) * 10)], "cortex-a72")
    assert found.share_covered == pytest.approx(0.8)
    assert found.cycles == pytest.approx(50_000, rel=0.02)
    assert cycles.estimate(mca, [Block(0, 1, (UNKNOWN,))], "cortex-a72").blocks == 0


def fake(folder: Path, name: str, said: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\nprintf '%s\\n' '{said}'\n")
    (folder / name).chmod(stat.S_IRWXU)


def test_an_llvm_that_takes_the_a57_for_the_n1_is_not_used(monkeypatch, tmp_path):
    """LLVM 14 knows the name neoverse-n1 and schedules it as a Cortex-A57: A76 figures would be the A72's."""
    fake(tmp_path, "llvm-mca", "LLVM version 14.0.6 CortexA53Unit A57UnitB")
    fake(tmp_path, "llvm-mc", "LLVM version 14.0.6 aarch64")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")

    def unreachable(package, program, progress):
        raise TargetError("emulated", "no network")

    monkeypatch.setattr(cycles, "fetched_program", unreachable)
    monkeypatch.setattr(cycles, "_path", lambda: [tmp_path])
    problem = r"cycles: llvm-mca 14.0.6 has no model of the Neoverse-N1, .*no network.*; sudo apt-get install llvm-19"
    with pytest.raises(TargetError, match=problem):
        cycles.find(Silent())
    (tmp_path / "llvm-mca").unlink()
    with pytest.raises(TargetError, match="llvm-mca is not on this machine"):
        cycles.find(Silent())


def test_a_count_is_stopped_at_once_and_leaves_no_process(userland, plugin):
    stop, began = threading.Event(), time.monotonic()
    threading.Timer(1.5, stop.set).start()
    program = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    with pytest.raises(TargetError, match=r"^x: was stopped$"):
        counting.counted(userland, plugin, "cortex-a72", ["-c", program], about="x", stop=stop)
    assert time.monotonic() - began < 10
    assert not [line for line in running() if "time.sleep(60)" in line]


def running() -> list[str]:
    """Command lines of all processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return found
