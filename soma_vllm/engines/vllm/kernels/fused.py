"""The compiled LoRA kernel (`_lora_cpu.cpp`), and one layer's weights as it reads them.

Guarantees: without a compiled kernel, or on a CPU that does not run it, `compiled_kernel` is None and nothing
here is used; a layer of another shape or type than the kernel computes is told apart before the kernel sees it.
Every call tells the kernel the sizes of its tensors: what does not belong together is a `ValueError`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from soma_vllm.machine import InstructionSet, instruction_set

KERNEL_ENV = "SOMA_LORA_CPU"
"""Set to "torch" to leave the compiled kernel out, for comparisons."""

_COMPILED: ModuleType | None
try:
    _COMPILED = importlib.import_module("soma_vllm.engines.vllm.kernels._lora_cpu")
except ImportError:  # setup.py builds it where there is a C++ compiler
    _COMPILED = None


@dataclass(frozen=True)
class Kernel:
    """The compiled kernel as one instruction set computes it."""

    isa: InstructionSet
    module: Any

    def plan(self, slots: torch.Tensor) -> Any:
        """What a step needs to know of its rows, given the slot of each (int64; -1: none); None without any."""
        return self.module.plan(self.isa.value, slots.data_ptr(), len(slots))


def compiled_kernel() -> Kernel | None:
    """The compiled kernel at the best level that may be used here; None where there is none."""
    if _COMPILED is None or os.environ.get(KERNEL_ENV) == "torch":
        return None
    levels = list(InstructionSet)
    allowed = levels[levels.index(instruction_set()) :]
    isa = next((level for level in allowed if level in _COMPILED.instruction_sets()), None)
    return Kernel(isa, _COMPILED) if isa else None


class Fused:
    """One layer's stacked weights, as the compiled kernel reads them: by address, never copied.

    vLLM allocates them once per layer and writes adapters into them in place.
    """

    def __init__(self, kernel: Kernel, a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> None:
        self._weights = (a, b)  # kept alive: the kernel has their addresses
        self._first = a[0]
        slots, _, rank, width = a[0].shape
        self._add = kernel.module.add
        self._module = kernel.module.module(
            tuple(part.data_ptr() for part in a),
            tuple(part.data_ptr() for part in b),
            tuple(part.shape[-2] for part in b),
            slots,
            width,
            rank,
        )

    @staticmethod
    def fits(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor], outs: Sequence[int]) -> bool:
        """Whether the kernel computes such a layer: bf16, whole slots, ranks of 8, 16 .. 512."""
        weights = (*a, *b)
        return (
            len(a) == len(b) == len(outs) <= 4
            and all(part.dtype is torch.bfloat16 and part.is_contiguous() for part in weights)
            and all(part.dim() == 4 and part.shape[1] == 1 for part in weights)
            and all(part.shape == a[0].shape for part in a)
            and all(part.shape[2] == out for part, out in zip(b, outs, strict=True))
            and all(part.shape[3] == a[0].shape[2] for part in b)
            and a[0].shape[2] % 8 == 0
            and 0 < a[0].shape[2] <= 512
        )

    def add(self, plan: Any, y: torch.Tensor, x: torch.Tensor, scale: float) -> bool:
        """y += B A x * scale for the plan's rows. y: (rows, out); x: (rows, in).

        False, with nothing done, where they are not bf16 or neighbours in a row are not neighbours in memory.
        """
        (x_stride, x_step), (y_stride, y_step) = x.stride(), y.stride()
        if not (x.dtype is y.dtype is torch.bfloat16 and x_step == y_step == 1):
            return False
        # Every adapter that enters or leaves a slot is written in place, which moves the version on.
        self._add(
            self._module,
            plan,
            y.data_ptr(),
            *y.shape,
            y_stride,
            x.data_ptr(),
            *x.shape,
            x_stride,
            scale,
            self._first._version,
        )
        return True
