"""What this machine's processor computes fast, found without importing torch.

Guarantees: the answer is the same in every process of a server (it is read from /proc/cpuinfo and one
environment variable, both inherited); an unknown processor is `OTHER`, never an error.
"""

from __future__ import annotations

import functools
import os
import platform
from enum import StrEnum
from pathlib import Path

from soma_vllm.errors import ConfigError

ISA_ENV = "SOMA_CPU_ISA"
"""Set to "avx2" to leave AVX-512 unused by everything of ours, for comparisons on one machine.
`lowered_environment` has what does the same to torch and oneDNN."""


LINEAR_ENV = "SOMA_LINEAR_CPU"
"""Set to "stock" to leave vLLM's own products of base weights in place, for comparisons."""


class InstructionSet(StrEnum):
    """The x86 levels at which a different product is the fastest."""

    AVX512_BF16 = "avx512_bf16"
    """bf16 products in hardware (Zen 4, Cooper Lake, Sapphire Rapids)."""
    AVX512 = "avx512"
    """AVX-512 without bf16 products (Skylake-X to Ice Lake)."""
    AVX2 = "avx2"
    """AVX2 and FMA (Haswell, Zen 1 to 3, most desktops and laptops)."""
    OTHER = "other"
    """Neither, or no x86."""


def instruction_set() -> InstructionSet:
    """The best level that may be used here.

    Raises:
        ConfigError: the variable that lowers it holds something else than "avx2".
    """
    found, asked = detected(), os.environ.get(ISA_ENV, "").lower()
    if asked not in ("", "avx2"):
        raise ConfigError("environment", [f"{ISA_ENV}: found {asked}; expected avx2, or nothing"])
    return InstructionSet.AVX2 if asked and found is not InstructionSet.OTHER else found


@functools.cache
def detected() -> InstructionSet:
    """The best level that the processor has."""
    return level(_cpuinfo("flags"))


def level(flags: str) -> InstructionSet:
    """The level that a line of flags of /proc/cpuinfo has."""
    has = set(flags.split())
    if {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"} <= has:
        return InstructionSet.AVX512_BF16
    if {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= has:
        return InstructionSet.AVX512
    if {"avx2", "fma"} <= has:
        return InstructionSet.AVX2
    return InstructionSet.OTHER


def has_fast_bf16() -> bool:
    """Whether bf16 products are faster than float32's here."""
    return instruction_set() is InstructionSet.AVX512_BF16


def training_dtype(configured: str, device: str) -> str:
    """What `training.dtype` means here: "bfloat16" or "float32" for "auto", else what is configured.

    `engines/arithmetic.py` decides whether float32 fits in memory together with a server.
    """
    if configured != "auto":
        return configured
    return "bfloat16" if device == "cuda" or has_fast_bf16() else "float32"


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def describe() -> str:
    """The machine in a few words, for reports: "2 cores of AMD EPYC, avx2"."""
    count = cores()
    model = _cpuinfo("model name") or platform.machine()
    lowered = " (of " + detected() + ")" if instruction_set() is not detected() else ""
    return f"{count} core{'s' if count != 1 else ''} of {model}, {instruction_set()}{lowered}"


def lowered_environment() -> dict[str, str]:
    """Variables under which torch, oneDNN and this package use AVX2 only, whatever the processor has.

    vLLM's own attention kernels are chosen by the processor and cannot be lowered.
    """
    return {
        ISA_ENV: "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    }


@functools.cache
def _cpuinfo(key: str) -> str:
    """The first processor's value of `key` in /proc/cpuinfo, or an empty text."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next(
        (value.strip() for name, _, value in (line.partition(":") for line in lines) if name.strip() == key), ""
    )
