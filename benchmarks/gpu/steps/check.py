"""Does vLLM work on this card? The answer is `go.json` beside the models, which later steps read.

Imports, versions, the two ceilings (copy bandwidth, product in bf16), vLLM's compiled operations against
torch in fp64, and FlashAttention 3 over a paged cache against exact attention, for heads of 64 and 128.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from common import Step

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "numpy",
    "vllm",
    "ray",
    "soma-vllm",
    "pydantic",
    "fastapi",
)
IMPORTS = (
    "vllm",
    "vllm.v1.worker.gpu.model_runner",
    "vllm.v1.worker.gpu_worker",
    "vllm.lora.punica_wrapper.punica_gpu",
    "vllm.model_executor.models.qwen2",
    "vllm.v1.engine.async_llm",
    "soma_vllm.engines.vllm.internals",
    "soma_vllm.engines.vllm.worker_extension",
    "soma_vllm.api.plugin",
    "soma_vllm.method.recipe",
    "ray",
)


def machine(step: Step) -> None:
    """What ran: card, driver's view of it, versions."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    card: dict[str, Any] = {}
    if step.device == "cuda":
        of = torch.cuda.get_device_properties(0)
        free, total = torch.cuda.mem_get_info()
        card = {
            "gpu": of.name,
            "capability": f"{of.major}.{of.minor}",
            "multiprocessors": of.multi_processor_count,
            "memory_gib": total / 2**30,
            "free_gib": free / 2**30,
            "cuda": torch.version.cuda,
        }
    step.record(
        "machine",
        python=platform.python_version(),
        kernel=platform.release(),
        cores=os.cpu_count(),
        models_free_gib=shutil.disk_usage(step.models).free / 2**30,
        packages=found,
        **card,
    )


def ceilings(step: Step) -> None:
    """The largest copy bandwidth and product in bf16 that torch reaches."""
    size = 2**20 if step.tiny else 2**31
    source = torch.empty(size, dtype=torch.uint8, device=step.device).random_(0, 255)
    target = torch.empty_like(source)
    copy_us = step.microseconds(lambda: target.copy_(source), repeats=8)
    n = 128 if step.tiny else 8192
    a, b = (torch.randn(n, n, device=step.device, dtype=torch.bfloat16) for _ in range(2))
    product_us = step.microseconds(lambda: a @ b, repeats=8)
    step.record("ceilings", copy_tb_s=2 * size / copy_us / 1e6, bf16_tflop_s=2 * n**3 / product_us / 1e6)


def imports(step: Step) -> bool:
    """Whether all of the path imports; a line for each module that does not."""
    good = True
    for name in IMPORTS:
        try:
            importlib.import_module(name)
        except Exception as error:
            good = False
            step.record("import", module=name, error=f"{type(error).__name__}: {str(error)[:300]}")
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    step.record("imports", good=good, platform=type(current_platform).__name__, triton=HAS_TRITON)
    return good


def operations(step: Step) -> bool:
    """Whether silu_and_mul and rms_norm of `vllm._C_stable_libtorch` are right."""
    importlib.import_module("vllm._C_stable_libtorch")
    x = torch.randn(33, 2 * 4864, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(33, 4864, device="cuda", dtype=torch.bfloat16)
    torch.ops._C.silu_and_mul(out, x)
    exact = torch.nn.functional.silu(x[:, :4864].double()) * x[:, 4864:].double()
    silu = float((out.double() - exact).norm() / exact.norm())
    hidden, weight = (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((33, 896), (896,)))
    normed = torch.empty_like(hidden)
    torch.ops._C.rms_norm(normed, hidden, weight, 1e-6)
    wide = hidden.double()
    exact = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) * weight.double()
    norm = float((normed.double() - exact).norm() / exact.norm())
    good = silu < 1e-2 and norm < 1e-2
    step.record("compiled operations", good=good, silu_and_mul=silu, rms_norm=norm)
    return good


def flash_attention(step: Step, heads: int, kv_heads: int, width: int) -> bool:
    """Whether FlashAttention 3 is right: three requests of different lengths, one decoding, in blocks of 16."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    block, queries, known = 16, (1, 40, 128), (300, 40, 200)
    blocks = [math.ceil(length / block) for length in known]
    table = torch.zeros(3, max(blocks), dtype=torch.int32, device="cuda")
    taken = iter(torch.randperm(sum(blocks)).tolist())
    for row, count in enumerate(blocks):
        for column in range(count):
            table[row, column] = next(taken)
    shape = (sum(blocks), block, kv_heads, width)
    keys, values = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    query = torch.randn(sum(queries), heads, width, device="cuda", dtype=torch.bfloat16)
    starts = torch.tensor([0, 1, 41, 169], dtype=torch.int32, device="cuda")
    out = flash_attn_varlen_func(
        query,
        keys,
        values,
        max_seqlen_q=max(queries),
        cu_seqlens_q=starts,
        max_seqlen_k=max(known),
        seqused_k=torch.tensor(known, dtype=torch.int32, device="cuda"),
        causal=True,
        block_table=table,
        fa_version=3,
    )
    exact = torch.empty_like(out, dtype=torch.float64)
    for row, (asked, length) in enumerate(zip(queries, known, strict=True)):
        where = table[row, : blocks[row]].long()
        k, v = (part[where].flatten(0, 1)[:length].double() for part in (keys, values))
        q = query[int(starts[row]) : int(starts[row + 1])].double()
        k, v = (part.repeat_interleave(heads // kv_heads, dim=1) for part in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / width**0.5
        later = torch.ones(asked, length, device="cuda").triu(length - asked + 1).bool()
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        exact[int(starts[row]) : int(starts[row + 1])] = torch.einsum("hqk,khd->qhd", weights, v)
    error = float((out.double() - exact).norm() / exact.norm())
    good = error < 2e-2
    step.record("flash attention 3", good=good, width=width, heads=heads, kv_heads=kv_heads, error=error)
    return good


def main() -> None:
    step = Step("check")
    go = {"vllm": False, "operations": False, "fa3": False}

    def save() -> None:
        (step.models / "go.json").write_text(json.dumps(go))

    save()
    with step.part("machine"):
        machine(step)
    with step.part("imports"):
        go["vllm"] = imports(step)
    if step.device == "cuda":
        with step.part("compiled operations"):
            go["operations"] = operations(step)
        with step.part("flash attention 3"):
            go["fa3"] = flash_attention(step, 14, 2, 64) and flash_attention(step, 12, 2, 128)
    save()
    with step.part("ceilings"):
        ceilings(step)
    step.record("go", **go)


if __name__ == "__main__":
    main()
