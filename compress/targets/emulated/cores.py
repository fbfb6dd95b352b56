"""The ARM cores that can be emulated, and how each shows itself to a program.

qemu-user hands the host's `/proc/cpuinfo` to the emulated program; onnxruntime reads it and crashes on an x86 one.
Emulation therefore gives the program a file written here. Its features are those that qemu puts into AT_HWCAP for
the core, which the set-up compares (`userland.look`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Core:
    part: str
    """Part number of implementer 0x41 (Arm), as in the Main ID Register."""
    variant: str
    revision: int
    features: tuple[str, ...]
    """In the kernel's words; `asimddp` (the int8 dot product) is what divides the A76 from the older two."""
    scheduling: str
    """What llvm-mca calls the core, or the nearest it has a model of."""
    found_in: str
    mhz: int
    """Of the first board named."""


ARMV8_0 = ("fp", "asimd", "aes", "pmull", "sha1", "sha2", "crc32", "cpuid")
ARMV8_2 = ("atomics", "fphp", "asimdhp", "asimdrdm", "lrcpc", "dcpop", "asimddp")

CORES = {
    "cortex-a53": Core("0xd03", "0x0", 4, ARMV8_0, "cortex-a53", "Raspberry Pi 3, Zero 2 W", 1200),
    "cortex-a72": Core("0xd08", "0x0", 3, ARMV8_0, "cortex-a72", "Raspberry Pi 4", 1500),
    "cortex-a76": Core("0xd0b", "0x4", 1, ARMV8_0 + ARMV8_2, "neoverse-n1", "Raspberry Pi 5", 2400),
}
"""By the name that qemu takes for `-cpu`."""

HWCAP_BITS = {
    "fp": 0, "asimd": 1, "evtstrm": 2, "aes": 3, "pmull": 4, "sha1": 5, "sha2": 6, "crc32": 7, "atomics": 8,
    "fphp": 9, "asimdhp": 10, "cpuid": 11, "asimdrdm": 12, "jscvt": 13, "fcma": 14, "lrcpc": 15, "dcpop": 16,
    "sha3": 17, "sm3": 18, "sm4": 19, "asimddp": 20, "sha512": 21, "sve": 22, "asimdfhm": 23, "dit": 24,
    "uscat": 25, "ilrcpc": 26, "flagm": 27, "ssbs": 28, "sb": 29, "paca": 30, "pacg": 31,
}  # fmt: skip
"""Of AT_HWCAP: arch/arm64/include/uapi/asm/hwcap.h of Linux."""


HARMLESS = ("evtstrm", "cpuid", "ssbs")
"""Bits that emulators set or leave out and no kernel of a runtime asks for."""


def cpuinfo(core: Core, processors: int) -> str:
    """What `/proc/cpuinfo` of a board with `processors` such cores says."""
    lines = []
    for index in range(processors):
        lines += [
            f"processor\t: {index}",
            "BogoMIPS\t: 108.00",
            f"Features\t: {' '.join(core.features)}",
            "CPU implementer\t: 0x41",
            "CPU architecture: 8",
            f"CPU variant\t: {core.variant}",
            f"CPU part\t: {core.part}",
            f"CPU revision\t: {core.revision}",
            "",
        ]
    return "\n".join(lines) + "\n"
