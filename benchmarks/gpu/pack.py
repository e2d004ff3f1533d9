"""Turn downloaded wheels into the folder that travels, without what is never imported and other GPUs' code.

python benchmarks/gpu/pack.py WHEELS SITE
"""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

from keep_sm90 import blank

LEFT_OUT = re.compile(
    r"""
    \.data/ | /RECORD$ | /licenses/ | /sboms/ | \.(pyi|pxd|pyx|c|cpp|cu|cuh|h|hpp|md|jpg|js|css|map)$
    | ^pycountry/locales/ | ^mistral_common/data/ | ^supervisor/tests/
    | ^vllm/vllm-rs$ | ^vllm/benchmarks/ | ^vllm/vllm_flash_attn/cute/
    | ^vllm/third_party/(deep_gemm|fmha_sm100|tml_fa4|triton_kernels)/
    | ^ray/(jars|rllib|data|serve|tune|train|llm)/ | ^ray/dashboard/client/ | ^ray/core/libjemalloc
    """,
    re.VERBOSE,
)
"""Tests, headers, sources, and what a dense bf16 model with adapters never imports."""

CUDA_LIBRARIES = {
    "vllm/_C_stable_libtorch.abi3.so": None,
    "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so": (
        r"EEELi(64|128)ENS_10bfloat16_t|FlashAttnFwdCombine|EmptyKernel|prepare"
    ),
    "vllm/cumem_allocator.abi3.so": None,
    "vllm/spinloop.abi3.so": None,
}
"""What vLLM loads for such a model on Hopper, and which kernels stay (None: all). Of FlashAttention's those
for bf16 with heads of 64 and 128."""

FATBINS = ("_C_stable_libtorch", "_vllm_fa3_C")
"""Those of them that hold GPU code."""


def unpack(wheel: Path, site: Path) -> None:
    """Unzip what is wanted of a wheel into `site`; programs stay executable."""
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            name = member.filename
            if LEFT_OUT.search(name):
                continue
            if name.startswith("vllm/") and name.endswith(".so") and name not in CUDA_LIBRARIES:
                continue
            target = Path(archive.extract(member, site))
            if member.external_attr >> 16 & 0o111 and target.is_file():
                target.chmod(0o755)


def main(wheels: Path, site: Path) -> None:
    """Fill `site`, which must not exist, from `wheels`."""
    site.mkdir(parents=True)
    for wheel in sorted(wheels.glob("*.whl")):
        unpack(wheel, site)
    for name, pattern in CUDA_LIBRARIES.items():
        library = site / name
        if library.exists() and any(part in name for part in FATBINS):
            blank(library, library, pattern)
    for program in ("raylet/raylet", "gcs/gcs_server"):
        path = site / "ray/core/src/ray" / program
        if path.exists():
            path.chmod(0o755)
            subprocess.run(["strip", path], check=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
