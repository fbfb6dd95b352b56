"""Estimated cycles of an inference: the hot blocks of its count through llvm-mca's model of the core.

Each block is taken as a loop of itself: data in the first-level cache, branches foreseen, no wait between blocks. The
estimate of what the blocks do not cover has the average of those they do.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.errors import TargetError
from compress.progress import Progress
from compress.targets.emulated.cores import CORES
from compress.targets.emulated.counting import Block
from compress.targets.emulated.debian import fetched_program

COVERED = 0.995
MOST_BLOCKS = 3000
ITERATIONS = 100
PACKAGE = "llvm-19"
INSTALL = f"sudo apt-get install {PACKAGE} (17 or newer)"

MODELS = {"cortex-a53": "CortexA53Unit", "cortex-a72": "A57Unit", "neoverse-n1": "N1Unit"}
"""How the resources of each model are called. LLVM before 17 takes the Cortex-A57's for the Neoverse-N1."""

FEATURES = "+v8.2a,+dotprod,+fullfp16,+rcpc,+crypto"


@dataclass(frozen=True)
class Mca:
    analyzer: tuple[str, ...]
    disassembler: tuple[str, ...]
    version: str

    def models(self, core: str) -> bool:
        """Whether it knows this core, not only its name."""
        return MODELS[core] in _resources(self.analyzer, core)


@dataclass(frozen=True)
class Estimate:
    cycles: int
    share_covered: float
    """Part of the inference's instructions that lies in blocks the model was asked about."""
    blocks: int


def find(progress: Progress) -> Mca:
    """llvm-mca that models every core: on PATH, the newest first, or Debian's in the cache. Raises TargetError."""
    found = {path.resolve(): path for folder in _path() for path in folder.glob("llvm-mca*")}
    known = [mca for path in found.values() if (mca := _asked((str(path),)))]
    known.sort(key=lambda mca: int(mca.version.partition(".")[0]), reverse=True)
    for mca in known:
        if all(mca.models(core) for core in MODELS):
            return mca
    why = f"llvm-mca {known[0].version} has no model of the Neoverse-N1" if known else "llvm-mca is not on this machine"
    try:
        mca_fetched = _asked(fetched_program(PACKAGE, f"usr/lib/{PACKAGE}/bin/llvm-mca", progress))
    except TargetError as error:
        raise TargetError("cycles", f"{why}, and it cannot be fetched ({error.problem})", INSTALL) from error
    if not mca_fetched:
        raise TargetError("cycles", f"{why}, and Debian's does not run here", INSTALL)
    return mca_fetched


Known = dict[tuple[int, ...], float | None]
"""Cycles of blocks by their instructions; None where the model cannot place one of them."""


def estimate(mca: Mca, blocks: Sequence[Block], cpu: str, known: Known | None = None) -> Estimate:
    """Cycles of one inference on a core; `share_covered` is 0 where the model knows none of the blocks.

    Blocks that `known` has are not asked for again; it learns the others.
    """
    known = {} if known is None else known
    total = sum(block.executed for block in blocks)
    hot: list[Block] = []
    covered = 0
    for block in blocks[:MOST_BLOCKS]:
        if covered >= COVERED * total:
            break
        hot.append(block)
        covered += block.executed
    new = list({block.words: block for block in hot if block.words not in known}.values())
    texts = _assembly(mca, new) if new else []
    placed = [(block, text) for block, text in zip(new, texts, strict=True) if text]
    cycles = _cycles(mca, [text for _, text in placed], CORES[cpu].scheduling)
    known.update(dict.fromkeys((block.words for block in new), None))
    known.update({block.words: own for (block, _), own in zip(placed, cycles, strict=True)})
    answered = [(block, own) for block in hot if (own := known[block.words]) is not None]
    executed = sum(block.executed for block, _ in answered)
    if not executed:
        return Estimate(0, 0.0, 0)
    spent = sum(block.count * own for block, own in answered)
    return Estimate(round(spent * total / executed), executed / total, len(answered))


def _assembly(mca: Mca, blocks: Sequence[Block]) -> list[str]:
    """Each block in the assembler's words; empty for a block with an instruction that LLVM does not know."""
    words = sorted({word for block in blocks for word in block.words})
    lines = [" ".join(f"0x{byte:02x}" for byte in word.to_bytes(4, "little")) for word in words]
    command = [*mca.disassembler, "--disassemble", "-triple=aarch64", f"-mattr={FEATURES}"]
    done = subprocess.run(command, input="\n".join(lines) + "\n", capture_output=True, text=True)
    unknown = {int(number) for number in re.findall(r"^<stdin>:(\d+):\d+: warning", done.stderr, flags=re.MULTILINE)}
    said = [line.strip() for line in done.stdout.splitlines() if line.startswith("\t") and ".text" not in line]
    places = [word for number, word in enumerate(words, 1) if number not in unknown]
    if len(said) != len(places):
        raise TargetError("cycles", f"{mca.disassembler[-1]} read {len(said)} of {len(places)} instructions", INSTALL)
    meaning = dict(zip(places, said, strict=True))
    return [
        "\n".join(meaning.get(word, "") for word in b.words) if set(b.words) <= set(meaning) else "" for b in blocks
    ]


def _cycles(mca: Mca, texts: Sequence[str], core: str) -> list[float | None]:
    """Cycles per pass of each block; None for one with an instruction that the model cannot place."""
    if not texts:
        return []
    regions = [f"# LLVM-MCA-BEGIN b{i}\n{text}\n# LLVM-MCA-END b{i}\n" for i, text in enumerate(texts)]
    command = [*mca.analyzer, "-mtriple=aarch64", f"-mcpu={core}", f"-mattr={FEATURES}", f"-iterations={ITERATIONS}"]
    views = ["-json", "-instruction-info=0", "-resource-pressure=0"]
    done = subprocess.run([*command, *views], input="".join(regions), capture_output=True, text=True)
    if done.returncode == 0:
        found = {region["Name"]: region["SummaryView"] for region in json.loads(done.stdout)["CodeRegions"]}
        return [found[f"b{i}"]["TotalCycles"] / ITERATIONS for i in range(len(texts))]
    if len(texts) == 1:
        return [None]
    half = len(texts) // 2
    return _cycles(mca, texts[:half], core) + _cycles(mca, texts[half:], core)


def _path() -> list[Path]:
    return [Path(folder) for folder in os.get_exec_path() if os.path.isdir(folder)]


def _asked(analyzer: tuple[str, ...]) -> Mca | None:
    """The two programs; none where one does not start."""
    path = analyzer[-1]
    disassembler = (*analyzer[:-1], re.sub(r"mca(?=[^/]*$)", "mc", path))
    if not shutil.which(disassembler[-1]):
        return None
    try:
        said = [_said([*command, "--version"]) for command in (analyzer, disassembler)]
    except OSError:
        return None
    versions = [re.search(r"LLVM version (\S+)", text) for text in said]
    if not versions[0] or not versions[1] or "aarch64" not in said[1]:
        return None
    return Mca(analyzer, disassembler, versions[0][1])


def _said(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


@functools.cache
def _resources(analyzer: tuple[str, ...], core: str) -> str:
    command = [*analyzer, "-mtriple=aarch64", f"-mcpu={core}", "-iterations=1", "-instruction-info=0"]
    done = subprocess.run(command, input="nop\n", capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else ""
