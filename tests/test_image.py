"""The Dockerfile and what comes of it: linted and read by default, built and run for linux/arm64 with `-m image`."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import struct
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
SCRIPT = ROOT / ".ci" / "image-arm64"
AGENT = ROOT / "compress" / "targets" / "agent.py"
IN_IMAGE = "/usr/local/lib/python3.11/dist-packages"
QUICK = {**os.environ, "OMP_NUM_THREADS": "1"}


def called(command: list, *, env: dict[str, str] = QUICK, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=timeout, env=env, cwd=ROOT)


# -------------------------------------------------------------------------------------------------------- as it is read


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = called([hadolint, "--failure-threshold", "warning", "Dockerfile"])
    assert (done.returncode, done.stdout) == (0, "")
    careless = subprocess.run([hadolint, "-"], input="FROM debian\nRUN cd /tmp", capture_output=True, text=True)
    assert careless.returncode == 1, "the linter lints"


def test_the_build_sees_every_file_it_copies_and_no_other() -> None:
    copied = {
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
        for source in line.split()[:-1]
        if source != "."
    }
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n")
    assert "*" in ignored
    let_in = {line[1:] for line in ignored if line.startswith("!")}
    assert {"compress", "constraints.txt"} <= copied <= let_in
    assert all((ROOT / name).exists() for name in let_in)
    read_by_pip = {"LICENSE", "pyproject.toml", "README.md"}
    assert let_in - copied == read_by_pip, "what `pip install` of the whole folder reads besides"


def named_by(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement)[0]


def in_the_image() -> set[str]:
    """Names of the packages that the Dockerfile's `wheels` lines install, as imported."""
    lines = re.findall(r"&& wheels /packages/\w+ (.+?)(?: \\)?$", DOCKERFILE, re.MULTILINE)
    assert len(lines) == 4
    todo, found = [(name, "--no-deps" not in line) for line in lines for name in line.split() if name[0] != "-"], set()
    while todo:
        name, with_dependencies = todo.pop()
        name = re.sub(r"[-_.]+", "-", name).lower()
        if name in found:
            continue
        found.add(name)
        if with_dependencies:
            required = importlib.metadata.requires(name) or []
            todo += [(named_by(one), True) for one in required if ";" not in one]
    provided = importlib.metadata.packages_distributions()
    return {module for module, names in provided.items() if found & {re.sub(r"[-_.]+", "-", n).lower() for n in names}}


BLOCKER = """
import importlib.machinery, sys, sysconfig
allowed, site = set({allowed!r}), sysconfig.get_path("purelib")

class OnlyTheImage:
    def find_spec(name, path=None, target=None):
        top = name.partition(".")[0]
        if path is None and top not in allowed and importlib.machinery.PathFinder.find_spec(top, [site]):
            raise ModuleNotFoundError(f"the image has no {{top}}", name=name)

sys.meta_path.insert(0, OnlyTheImage)
"""


def test_bench_imports_only_what_the_image_has(exported, tmp_path: Path) -> None:
    allowed = in_the_image()
    assert {"numpy", "onnxruntime", "ai_edge_litert", "typer", "rich"} <= allowed
    assert not {"torch", "onnx", "matplotlib", "jinja2", "google", "sympy", "scipy"} & allowed
    (tmp_path / "sitecustomize.py").write_text(BLOCKER.format(allowed=sorted(allowed)))  # of the agent's processes too
    env = {**QUICK, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    refused = called([sys.executable, "-c", "import torch"], env=env)
    assert "the image has no torch" in refused.stderr

    files = [exported.files["int8.onnx"], exported.files["int8.tflite"]]
    options = ["--rounds", 1, "--runs", 2, "--json"]
    done = called([sys.executable, "-m", "compress.cli", "bench", *files, *options], env=env)
    assert done.returncode == 0, done.stderr
    assert {row["runtime"] for row in json.loads(done.stdout)["rows"]} == {"onnxruntime", "litert"}


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """An environment whose PATH has a few tools and no engine, for a user who is not root."""
    tools = tmp_path / "tools"
    tools.mkdir()
    needed = "bash env dirname uname mkdir mktemp rm sed awk tac git flock tail grep chmod"
    for name in needed.split():
        (tools / name).symlink_to(shutil.which(name) or pytest.fail(f"{name} is not on this machine"))
    (tools / "id").write_text("#!/bin/sh\necho 1000\n")
    (tools / "id").chmod(0o755)
    return {"PATH": str(tools), "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}


def test_missing_tools_are_one_clear_line(bare: dict[str, str]) -> None:
    done = called([SCRIPT], env=bare)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert "needs Docker with buildx, or buildah podman runc mmdebstrap" in line
    assert "apt-get install" in line


def test_unknown_command_is_one_clear_line(bare: dict[str, str]) -> None:
    done = called([SCRIPT, "bild"], env=bare)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "image-arm64: no command bild; known: build, run, save\n"


def test_where_there_is_docker_buildx_builds(bare: dict[str, str]) -> None:
    """A stand-in for the engine writes down what it is asked; it reads the secrets as buildx would."""
    docker = Path(bare["PATH"]) / "docker"
    docker.write_text(
        "#!/bin/sh\n"
        'echo "$*" >> "$HOME/asked"\n'
        'for word; do case "$word" in id=*,src=*) echo "secret ${word%%,*}" >> "$HOME/asked"; '
        '[ -r "${word#*src=}" ] || exit 1;; esac; done\n'
        'case "$1" in run) echo aarch64;; history) echo 25.5MB COPY;; image) echo 175000000;; esac\n'
    )
    docker.chmod(0o755)
    done = called([SCRIPT], env={**bare, "PIP_CERT": str(ROOT / "README.md")})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["25.5MB COPY", "localhost/compress:runtime-arm64: 175.0 MB"]
    asked = (Path(bare["HOME"]) / "asked").read_text().splitlines()
    (built,) = [line for line in asked if line.startswith("buildx build")]
    assert "--platform linux/arm64" in built
    assert "--target runtime --tag localhost/compress:runtime-arm64" in built
    assert built.endswith("--load .")
    assert {"secret id=pip_conf", "secret id=pip_cert"} <= set(asked)
    assert any(line.startswith("run --rm --network none --platform linux/arm64") for line in asked)


# ---------------------------------------------------------------------------------------------------- as it is built

LIMIT_MB = 250
"""Of the unpacked image; the goal for a board's SD card."""


@pytest.fixture(scope="module")
def built() -> str:
    """What the build printed."""
    done = called([SCRIPT, "build"], timeout=1500)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_image(*words: object, folder: Path | None = None, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """`.ci/image-arm64 run` with a read-only root; `folder` is /models, where the command starts."""
    options: list[object] = ["--read-only", "--tmpfs", "/tmp"]
    if folder is not None:
        options += ["--volume", f"{folder}:/models"]
    return called([SCRIPT, "run", *options, *words], timeout=timeout)


@pytest.fixture
def models(exported, tmp_path: Path) -> Path:
    """Two exported int8 files and images for them, where the image's user may write."""
    folder = tmp_path / "models"
    folder.mkdir()
    for name in ("int8.onnx", "int8.tflite"):
        shutil.copy(exported.files[name], folder / name)
    images = np.random.default_rng(5).uniform(-1, 1, (64, 16, 16, 3)).astype(np.float32)
    np.save(folder / "images.npy", images)
    folder.chmod(0o777)
    return folder


@pytest.fixture(scope="module")
def unpacked(built: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict, Path]]:
    """The image's configuration and its archive, as `docker load` on a board gets it."""
    archive = tmp_path_factory.mktemp("image") / "image.tar"
    done = called([SCRIPT, "save", archive])
    assert done.returncode == 0, done.stderr
    with tarfile.open(archive) as tar:
        (manifest,) = json.load(tar.extractfile("manifest.json"))
        config = json.load(tar.extractfile(manifest["Config"]))
    yield {**config, "layers": manifest["Layers"]}, archive
    archive.unlink()


def load_alignment(elf: bytes) -> int:
    """The smallest alignment, in bytes, of what a 64-bit ELF file has loaded (its PT_LOAD headers)."""
    start, size, count = struct.unpack_from("<Q", elf, 32) + struct.unpack_from("<HH", elf, 54)
    headers = [struct.unpack_from("<II6Q", elf, start + size * index) for index in range(count)]
    return min(header[7] for header in headers if header[0] == 1)


@pytest.mark.image
class TestImage:
    def test_is_for_arm64_and_not_for_root(self, unpacked) -> None:
        config, _ = unpacked
        assert (config["architecture"], config["os"]) == ("arm64", "linux")
        assert config["config"]["User"] == "65532:65532"
        assert config["config"]["Entrypoint"] == ["compress", "bench"]
        assert config["config"]["Labels"]["org.opencontainers.image.title"] == "compress bench"

    def test_is_small_all_arm_and_holds_neither_torch_nor_settings_of_this_machine(self, unpacked) -> None:
        config, archive = unpacked
        size, names, machines, coarsest = 0, set(), set(), []
        with tarfile.open(archive) as tar:
            for layer in config["layers"]:
                with tarfile.open(fileobj=tar.extractfile(layer)) as files:
                    for member in files:
                        size += member.size
                        names.add(member.name.lstrip("./"))
                        assert not (member.isfile() and member.mode & 0o6000), f"{member.name} changes who runs it"
                        if member.isfile() and member.size > 20:
                            binary = files.extractfile(member).read()
                            if binary.startswith(b"\x7fELF"):
                                machines.add(int.from_bytes(binary[18:20], "little"))
                                coarsest.append((load_alignment(binary), member.name))
        assert 50 < size / 1e6 <= LIMIT_MB
        assert machines == {183}, "EM_AARCH64, in elf.h"
        assert min(coarsest)[0] >= 16384, f"{min(coarsest)}: a Raspberry Pi 5 has pages of 16 KiB"
        packages = {name[len(IN_IMAGE) :].split("/")[0] for name in names if name.startswith(IN_IMAGE[1:] + "/")}
        assert {"numpy", "onnxruntime", "ai_edge_litert", "compress"} <= packages
        assert not {"torch", "onnx", "matplotlib"} & packages
        assert not {"etc/pip.conf", "run/pip_cert", "usr/bin/sh", "usr/bin/apt"} & names

    def test_says_its_size_by_layer(self, built: str) -> None:
        assert re.search(r"^\S+ MB COPY from parts /packages/numpy$", built, re.MULTILINE)
        (total,) = re.findall(r"runtime-arm64: ([\d.]+) MB$", built, re.MULTILINE)
        assert 50 < float(total) <= LIMIT_MB

    def test_runs_as_a_user_without_torch(self, built: str) -> None:
        code = (
            "import importlib.util, json, os, platform;"
            "print(json.dumps([platform.machine(), os.getuid(), bool(importlib.util.find_spec('torch'))]))"
        )
        done = run_image("--entrypoint", "python3", "--", "-c", code)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == ["aarch64", 65532, False]

    def test_benchmarks_files(self, built: str, models: Path) -> None:
        done = run_image("--", "int8.onnx", "int8.tflite", "--rounds", 1, "--runs", 2, "--json", folder=models)
        assert done.returncode == 0, done.stderr
        measured = json.loads(done.stdout)
        assert {(row["file"], row["runtime"]) for row in measured["rows"]} == {
            ("int8.onnx", "onnxruntime"),
            ("int8.tflite", "litert"),
        }
        assert all(row["p50_ms"] > 0 for row in measured["rows"])
        if platform.machine() != "aarch64":
            assert measured["conditions"]["emulator"] != "unavailable", "qemu is seen"
            assert all(row["fps"] is None for row in measured["rows"]), "an emulator's time is no ARM fps"
        assert measured["conditions"]["arch"] == "aarch64"

    @pytest.mark.parametrize("name", ["int8.onnx", "int8.tflite"])
    def test_computes_the_hosts_int8_outputs_bit_for_bit(self, built: str, models: Path, name: str) -> None:
        words = ["run", name, "--inputs", "images.npy", "--outputs"]
        entry = ["--entrypoint", "python3", "--", f"{IN_IMAGE}/compress/targets/agent.py"]
        done = run_image(*entry, *words, "there.npy", folder=models)
        assert done.returncode == 0, done.stderr
        subprocess.run(
            [sys.executable, "-P", AGENT, *words, "here.npy"], cwd=models, check=True, capture_output=True, env=QUICK
        )
        here, there = np.load(models / "here.npy"), np.load(models / "there.npy")
        assert here.dtype == there.dtype
        assert 10 < len(np.unique(here)) <= 256, "int8 values that could differ, stored or as real numbers"
        assert here.tobytes() == there.tobytes(), f"{np.count_nonzero(here != there)} of {here.size} differ"
        said = json.loads(done.stdout.splitlines()[-1])
        assert said["outputs_sha256"] == hashlib.sha256(np.ascontiguousarray(here).tobytes()).hexdigest()
        if name.endswith(".onnx"):
            assert said["version"] == onnxruntime.__version__

    @pytest.mark.parametrize(
        ("words", "status", "complaint"),
        [(["nothing.onnx"], 1, "nothing.onnx"), (["--no-such-option"], 2, "--no-such-option"), (["--json"], 2, "FILE")],
    )
    def test_a_mistake_is_one_line(self, built: str, models: Path, words: list, status: int, complaint: str) -> None:
        done = run_image("--", *words, folder=models)
        assert done.returncode == status, done.stdout + done.stderr
        (line,) = done.stderr.strip().splitlines()
        assert complaint in line
        assert done.stdout == ""

    def test_tells_how_it_is_used(self, built: str) -> None:
        done = run_image("--")
        assert done.returncode == 0, done.stderr
        assert "FILE..." in done.stdout
