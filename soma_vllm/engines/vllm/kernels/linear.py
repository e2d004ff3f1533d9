"""Linear layers of vLLM's engines on a CPU without bf16 products in hardware, by the compiled kernel.

Where a CPU has AVX2 and no AVX-512, vLLM 0.32 finds no oneDNN product for bf16 weights and takes
`torch.nn.functional.linear`, at a tenth to a fifth of what the processor can do in float32. `_linear_cpu.cpp`
keeps the weights in bf16 and multiplies in float32. Guarantees:

* Results differ from torch's by the rounding of float32 sums; a row's result does not depend on its batch.
* Only 2-D bf16 weights on a CPU are taken over; every other layer goes to vLLM's own dispatch, unchanged.
* Where vLLM gives a layer's weight up after packing it, so does this, and memory is what it was. Where it keeps
  the weight (an embedding that is also the head), the packed copy is one more, made at the first product: a
  table that is only looked up in is never packed.

`engines/vllm/general_plugin.py` puts it in place; `benchmarks/cpu_products.py` compares it with vLLM's own.
"""

from __future__ import annotations

import importlib
import itertools
import os
import weakref
from collections.abc import Callable
from typing import Any

import torch

from soma_vllm.machine import LINEAR_ENV, InstructionSet, instruction_set

Dispatch = Callable[..., None]
"""vLLM's `dispatch_cpu_unquantized_gemm(layer, remove_weight)`: gives a layer its `cpu_linear`."""

_COMPILED: Any
try:
    _COMPILED = importlib.import_module("soma_vllm.engines.vllm.kernels._linear_cpu")
except ImportError:  # setup.py builds it where there is a C++ compiler
    _COMPILED = None


def compiled_kernel() -> Any:
    """The compiled kernel's module; None where it was not built, or this CPU does not run it."""
    return _COMPILED if _COMPILED is not None and _COMPILED.supported() else None


def is_worthwhile() -> bool:
    """Whether the engines of this machine should use it: the kernel runs, and stock has nothing as good."""
    if os.environ.get(LINEAR_ENV) == "stock" or compiled_kernel() is None:
        return False
    return instruction_set() is InstructionSet.AVX2


class PackedLinear:
    """One layer's weight as the kernel reads it, and its product. Drop-in for a layer's `cpu_linear`."""

    def __init__(self, weight: torch.Tensor) -> None:
        """Copy `weight`: (out, in), bf16, on the CPU.

        Raises:
            ValueError: it is something else.
        """
        if not fits(weight):
            raise ValueError(
                f"weight: found {weight.dtype} of shape {tuple(weight.shape)} on {weight.device}; expected a "
                "matrix of bfloat16 on the CPU"
            )
        kernel = compiled_kernel()
        rows = weight.detach() if weight.stride(1) == 1 else weight.detach().contiguous()
        self.out, self.width = rows.shape
        self._multiply = kernel.multiply
        self._packed = kernel.pack(rows.data_ptr(), self.out, self.width, rows.stride(0))
        self._bias: tuple[torch.Tensor | None, int, torch.Tensor | None] = (None, 0, None)
        self._number = next(_NUMBERS)
        _LAYERS[self._number] = self

    def __call__(self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
        """x @ W.T + bias. x: (..., in); bias: (out,); both bf16. The result: (..., out). `weight` is not read.

        Raises:
            ValueError: x is of another width or type than the layer's.
        """
        if torch.compiler.is_compiling():
            result: torch.Tensor = _linear(x, bias, self._number, self.out)
            return result
        return self.multiply(x, bias)

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`__call__`, outside torch.compile."""
        if x.dtype is not torch.bfloat16 or x.shape[-1] != self.width:
            raise ValueError(
                f"x: found {x.dtype} of shape {tuple(x.shape)}; expected bfloat16 of width {self.width}"
            )
        rows = x.reshape(-1, self.width)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        y = torch.empty((*x.shape[:-1], self.out), dtype=torch.bfloat16)
        self._multiply(
            self._packed,
            y.data_ptr(),
            self.out,
            rows.data_ptr(),
            rows.stride(0),
            rows.shape[0],
            0 if bias is None else self._widened(bias).data_ptr(),
        )
        return y

    def _widened(self, bias: torch.Tensor) -> torch.Tensor:
        """The bias in float32, made once: a layer has one, which does not change after loading."""
        seen, version, wide = self._bias
        if wide is None or seen is not bias or version != bias._version:
            if bias.shape != (self.out,):
                raise ValueError(f"bias: found shape {tuple(bias.shape)}; expected ({self.out},)")
            wide = bias.detach().float().contiguous()
            self._bias = (bias, bias._version, wide)
        return wide


class LazilyPacked:
    """A PackedLinear that is made of the weight it is first called with, and of no other after that."""

    def __init__(self) -> None:
        self._packed: PackedLinear | None = None

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """As `PackedLinear.__call__`."""
        if self._packed is None:
            self._packed = PackedLinear(weight)
        return self._packed(x, None, bias)


def fits(weight: torch.Tensor) -> bool:
    """Whether the kernel takes such a weight."""
    return (
        weight.dim() == 2
        and weight.dtype is torch.bfloat16
        and weight.device.type == "cpu"
        and weight.numel() > 0
    )


def dispatching(stock: Dispatch) -> Dispatch:
    """vLLM's dispatch with the kernel before it: every layer that `fits` gets a PackedLinear."""

    def dispatch_cpu_unquantized_gemm(layer: Any, remove_weight: bool) -> None:
        weight: torch.Tensor = layer.weight
        if not fits(weight):
            stock(layer, remove_weight)
            return
        if not remove_weight:
            layer.cpu_linear = LazilyPacked()
            return
        layer.cpu_linear = PackedLinear(weight)
        # As vLLM does once it has packed a weight.
        layer.weight = torch.nn.Parameter(torch.empty(0, dtype=weight.dtype), requires_grad=False)

    return dispatch_cpu_unquantized_gemm


# torch.compile cannot look into a C extension: there the product is an operation of torch, which finds its
# layer by number.
_NUMBERS = itertools.count()
_LAYERS: weakref.WeakValueDictionary[int, PackedLinear] = weakref.WeakValueDictionary()


@torch.library.custom_op("soma_vllm::linear", mutates_args=(), device_types="cpu")
def _linear(x: torch.Tensor, bias: torch.Tensor | None, layer: int, out: int) -> torch.Tensor:
    return _LAYERS[layer].multiply(x, bias)


@_linear.register_fake
def _linear_shape(x: torch.Tensor, bias: torch.Tensor | None, layer: int, out: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out))
