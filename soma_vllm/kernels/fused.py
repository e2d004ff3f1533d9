"""The compiled LoRA kernel (`_lora_cpu.cpp`), and one layer's weights as it reads them.

Guarantees: without a compiled kernel, or on a CPU that does not run it, `compiled_kernel` is None and nothing
here is used; a layer of another shape or type than the kernel computes is told apart before the kernel sees it.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

KERNEL_ENV = "SOMA_LORA_CPU"
"""Set to "torch" to leave the compiled kernel out, for comparisons."""

_COMPILED: ModuleType | None
try:
    _COMPILED = importlib.import_module("soma_vllm.kernels._lora_cpu")
except ImportError:  # setup.py builds it where there is a C++ compiler
    _COMPILED = None


def compiled_kernel() -> Any:
    """The compiled kernel's module; None where it was not built, or this CPU does not run it."""
    if _COMPILED is None or os.environ.get(KERNEL_ENV) == "torch" or not _COMPILED.supported():
        return None
    return _COMPILED


class Fused:
    """One layer's stacked weights, as the compiled kernel reads them: by address, never copied.

    vLLM allocates them once per layer and writes adapters into them in place.
    """

    def __init__(self, kernel: Any, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> None:
        self._weights = (a, b)  # kept alive: the kernel has their addresses
        self._first = a[0]
        slots, _, rank, width = a[0].shape
        self._add = kernel.add
        self._module = kernel.module(
            tuple(part.data_ptr() for part in a),
            tuple(part.data_ptr() for part in b),
            tuple(part.shape[-2] for part in b),
            slots,
            width,
            rank,
        )

    @staticmethod
    def fits(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], outs: Sequence[int]) -> bool:
        """Whether the kernel computes such a layer: bf16, whole slots, ranks that are multiples of 8."""
        weights = (*a, *b)
        return (
            len(a) == len(b) == len(outs) <= 4
            and all(part.dtype is torch.bfloat16 and part.is_contiguous() for part in weights)
            and all(part.dim() == 4 and part.shape[1] == 1 for part in weights)
            and all(part.shape == a[0].shape for part in a)
            and all(part.shape[2] == out for part, out in zip(b, outs, strict=True))
            and all(part.shape[3] == a[0].shape[2] for part in b)
            and a[0].shape[2] % 8 == 0
        )

    def add(self, plan: Any, y: torch.Tensor, x: torch.Tensor, scale: float) -> None:
        """y += B A x * scale for the plan's rows. y: (rows, out); x: (rows, in); bf16, neighbours in a row."""
        # Every adapter that enters or leaves a slot is written in place, which moves the version on.
        self._add(
            self._module,
            plan,
            y.data_ptr(),
            y.stride(0),
            x.data_ptr(),
            x.stride(0),
            scale,
            self._first._version,
        )
