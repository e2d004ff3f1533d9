"""Are vLLM's LoRA kernels right on this card?

vLLM 0.32's `lora_expand` runs layers of one slice (o_proj, down_proj) with `block_n=128, num_stages=2`, which
is reported to be miscompiled on Hopper; 0.33 sets `num_stages=1` there. One process for each variant:

    default     what vLLM 0.32 takes
    one-stage   num_stages=1, as in 0.33
    narrow      block_n=64, two stages
    tuned       num_stages=1 by a file that vLLM reads (`tuned.py`)

A case mixes rows of random adapters and of none; low-rank values are NaN before the shrink. Results are
compared with products in fp64, and rows without an adapter must keep their bits. Without a GPU the same is
done in torch, or by vLLM's kernels in Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import torch
from common import Step
from shapes import LAYERS
from tuned import remember, write_tuned

RANKS = (8, 16, 32, 64)
ROWS = (7, 33, 256)
SLOTS = (1, 4, 32)
TOLERANCE = 1e-2
"""Relative, of the whole result; bf16's rounding is about 3e-3."""


class Case(NamedTuple):
    """One layer's shrink and expand."""

    model: str
    layer: str
    rank: int
    rows: int
    slots: int

    def __str__(self) -> str:
        return f"{self.model} {self.layer} rank {self.rank}, {self.rows} rows, {self.slots} slots"


class Kernels(NamedTuple):
    """What is compared: shrink and expand, and the metadata that both take for a mapping and its slots."""

    shrink: Callable[..., None]
    expand: Callable[..., None]
    metadata: Callable[[torch.Tensor, int], tuple[Any, ...]]


def cases(tiny: bool) -> list[Case]:
    """The suspected layers of the smallest model at the usual rank come first."""
    models = ("tiny",) if tiny else ("0.5b", "8b", "1.5b")
    ranks, rows, slots = ((8, 16), (7,), (4,)) if tiny else (RANKS, ROWS, SLOTS)
    return [
        Case(model, layer, rank, *sizes)
        for model, rank in product(models, ranks)
        for layer in sorted(LAYERS[model], key=lambda name: len(LAYERS[model][name][1]))
        for sizes in product(rows, slots)
    ]


def use_variant(variant: str) -> None:
    """Change what `lora_expand` is compiled with."""
    from vllm.lora.ops.triton_ops import lora_expand_op

    change = {"one-stage": {"num_stages": 1}, "narrow": {"block_n": 64}}.get(variant, {})
    original = lora_expand_op.get_lora_op_configs
    lora_expand_op.get_lora_op_configs = lambda **asked: {**original(**asked), **change}


def forget_pointers() -> None:
    """Empty vLLM's record of strides by address: here an address comes back with another shape."""
    from vllm.lora.ops.triton_ops import utils

    utils._LORA_A_PTR_DICT.clear()
    utils._LORA_B_PTR_DICT.clear()


def vllm_kernels(step: Step) -> Kernels:
    """vLLM's own, compiled for the step's variant."""
    from vllm.lora.ops.triton_ops import utils
    from vllm.lora.ops.triton_ops.lora_expand_op import _lora_expand
    from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
    from vllm.lora.ops.triton_ops.lora_shrink_op import _lora_shrink

    def metadata(mapping: torch.Tensor, slots: int) -> tuple[Any, ...]:
        made = LoRAKernelMeta.make(slots, len(mapping), mapping.device)
        made.prepare_tensors(mapping)
        return made.meta_args(len(mapping), False)

    use_variant(step.options.variant)
    if step.device == "cpu":  # the interpreter: no memory to pin
        utils.async_tensor_h2d = lambda data, dtype, device: torch.tensor(data, dtype=dtype)
    return Kernels(_lora_shrink, _lora_expand, metadata)


def compare(step: Step, kernels: Kernels, case: Case) -> dict[str, Any]:
    """Relative errors of shrink and expand (of the worst slice), NaNs, and changed rows without an adapter."""
    width, outs = LAYERS[case.model][case.layer]
    # Triton's interpreter has no products of bf16.
    half = {"device": step.device, "dtype": torch.bfloat16 if step.device == "cuda" else torch.float16}
    mapping = torch.randint(-1, case.slots, (case.rows,), device=step.device)
    mapping[0] = case.slots - 1  # at least one row with an adapter
    x = torch.randn(case.rows, width, **half)
    a = [torch.randn(case.slots, 1, case.rank, width, **half) / width**0.5 for _ in outs]
    b = [torch.randn(case.slots, 1, out, case.rank, **half) for out in outs]
    metadata = kernels.metadata(mapping, case.slots)
    low = torch.full((len(outs), case.rows, case.rank), float("nan"), device=step.device)
    kernels.shrink(x, a, low, *metadata, 1.0)
    before = torch.randn(case.rows, sum(outs), **half)
    y = before.clone()
    kernels.expand(low.nan_to_num(0.0), b, y, *metadata, offset_start=0, add_inputs=True)
    step.synchronize()

    on = mapping >= 0
    index = mapping.clamp(min=0)
    shrunk, expanded = [], []
    for part, found, old in zip(range(len(outs)), y.split(outs, 1), before.split(outs, 1), strict=True):
        exact_low = torch.einsum("td,trd->tr", x.double(), a[part][index, 0].double())
        shrunk.append(_error(low[part][on], exact_low[on]))
        used = low[part].nan_to_num(0.0).to(x.dtype).double()
        exact = old.double() + torch.einsum("tr,tor->to", used, b[part][index, 0].double())
        expanded.append(_error(found[on], exact[on]))
    return {
        "shrink": max(shrunk),
        "expand": max(expanded),
        "nan": int(torch.isnan(y).sum() + torch.isnan(low[:, on]).sum()),
        "base_rows_changed": int((y[~on] != before[~on]).any(-1).sum()),
    }


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative to the whole; a NaN counts as a huge error."""
    return float((found.double().nan_to_num(1e30) - exact).norm() / exact.norm())


def _torch_metadata(mapping: torch.Tensor, slots: int) -> tuple[Any, ...]:
    return (mapping,)


def _torch_shrink(x: Any, a: Any, low: Any, mapping: Any, scale: float) -> None:
    for part, weight in enumerate(a):
        low[part] = scale * torch.einsum("td,trd->tr", x.float(), weight[mapping.clamp(min=0), 0].float())


def _torch_expand(low: Any, b: Any, y: Any, mapping: Any, offset_start: int, add_inputs: bool) -> None:
    assert add_inputs
    for part, weight in enumerate(b):
        end = offset_start + weight.shape[2]
        taken = weight[mapping.clamp(min=0), 0].float()
        delta = torch.einsum("tr,tor->to", low[part].to(y.dtype).float(), taken)
        y[:, offset_start:end] += torch.where((mapping >= 0)[:, None], delta, 0.0).to(y.dtype)
        offset_start = end


def main() -> None:
    step = Step("lora_correct", variant=("default", "one-stage", "narrow", "tuned"))
    variant = step.options.variant
    if variant == "tuned" and step.device == "cuda":
        os.environ.update(write_tuned(step.models))  # before vLLM is imported
    torch.manual_seed(1)
    native = step.device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    kernels = vllm_kernels(step) if native else Kernels(_torch_shrink, _torch_expand, _torch_metadata)
    planned = cases(step.tiny)
    seen = wrong = 0
    worst = {"shrink": 0.0, "expand": 0.0}
    for case in planned:
        if step.left() < 4:
            break
        if native:
            forget_pointers()
        with step.part(str(case)):
            found = compare(step, kernels, case)
            seen += 1
            worst = {key: max(value, found[key]) for key, value in worst.items()}
            if found["nan"] or found["base_rows_changed"] or max(found["shrink"], found["expand"]) > TOLERANCE:
                wrong += 1
                if wrong <= 12:
                    step.record("wrong", variant=variant, case=str(case), **found)
    remember(step.models, variant, wrong if seen else 1)
    step.record("summary", variant=variant, cases=seen, of=len(planned), wrong=wrong, worst=worst)


if __name__ == "__main__":
    main()
