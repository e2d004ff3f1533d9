"""What LoRA costs per step on a CPU: vLLM's stock products, the grouped ones in torch, and the compiled kernel.

One step is what a 0.5B Qwen2 surrogate asks of its LoRA wrapper: per layer a fused qkv, an output, a fused
gate_up and a down projection, here for `--layers` layers with weights of their own, so that caches are as
cold as in the model. Attention and the base products are left out; what remains is what the kernels decide.

Fair because all sides get the same weights, inputs and metadata in one process on the same core, take turns
round by round (a slow moment hits all), include the metadata of the step, and report the median round. Each
batch has LoRA tokens only: beside base-model tokens the stock kernels compute something else (wrongly). A
processor with AVX-512 is measured once more with AVX2 only (torch, oneDNN and ours), in a process of its own.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/lora_kernels.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from lowered import once_more
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from soma_vllm import machine
from soma_vllm.engines.vllm.kernels.fused import KERNEL_ENV, compiled_kernel
from soma_vllm.engines.vllm.kernels.lora_kernels import GroupedPunicaWrapperCPU
from soma_vllm.versions import installed_vllm

HIDDEN, INNER, KEYS = 896, 4864, 128
MODULES = ((HIDDEN, (HIDDEN, KEYS, KEYS)), (HIDDEN, (HIDDEN,)), (HIDDEN, (INNER, INNER)), (INNER, (HIDDEN,)))
"""Input width and output slices of qkv, o, gate_up and down."""

Module = tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Workload:
    name: str
    adapters: int
    """Also the number of slots."""
    tokens_each: int

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(number for number in range(1, self.adapters + 1) for _ in range(self.tokens_each))


WORKLOADS = (
    Workload("prefill, 512 tokens, 1 adapter", 1, 512),
    Workload("prefill, 4 x 128 tokens, 4 adapters", 4, 128),
    Workload("decode, 1 token, 1 adapter", 1, 1),
    Workload("decode, 16 tokens, 1 adapter", 1, 16),
    Workload("decode, 16 tokens, 4 adapters", 4, 4),
    Workload("decode, 16 tokens, 16 adapters", 16, 1),
)


@dataclass(frozen=True)
class Result:
    workload: str
    stock_ms: float
    grouped_ms: float
    compiled_ms: float | None
    """Median milliseconds per layer, the step's metadata shared among them; None where it was not built."""

    @property
    def ratio(self) -> float:
        """How much less the best of ours takes than stock."""
        return self.stock_ms / (self.compiled_ms or self.grouped_ms)


def model(slots: int, layers: int, rank: int, seed: int) -> list[Module]:
    """Stacked weights of every LoRA module, in call order."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=random) / 30).bfloat16()

    return [
        (
            tuple(draw(slots, 1, rank, width) for _ in outs),
            tuple(draw(slots, 1, out, rank) for out in outs),
            outs,
        )
        for _ in range(layers)
        for width, outs in MODULES
    ]


def run_step(wrapper: PunicaWrapperCPU, work: Workload, modules: Sequence[Module]) -> float:
    """Seconds for one step."""
    inputs = {width: torch.ones(len(work.ids), width).bfloat16() for width in (HIDDEN, INNER)}
    outputs = {sum(outs): torch.zeros(len(work.ids), sum(outs), dtype=torch.bfloat16) for _, _, outs in modules}
    mapping = LoRAMapping(work.ids, work.ids, is_prefill=True)
    start = time.perf_counter()
    wrapper.update_metadata(mapping, list(range(1, work.adapters + 1)), work.adapters + 1, 151936)
    for a, b, outs in modules:
        wrapper.add_lora_linear(outputs[sum(outs)], inputs[a[0].shape[-1]], a, b, 1.0, outs)
    return time.perf_counter() - start


def compare(work: Workload, layers: int, rank: int, rounds: int) -> Result:
    modules = model(work.adapters, layers, rank, seed=0)
    wrappers = [PunicaWrapperCPU(2048, 256, device="cpu"), in_torch()]
    if compiled_kernel() is not None:
        wrappers.append(GroupedPunicaWrapperCPU(2048, 256, device="cpu"))
    times: list[list[float]] = [[] for _ in wrappers]
    for _ in range(rounds + 1):
        for wrapper, record in zip(wrappers, times, strict=True):
            record.append(run_step(wrapper, work, modules))
    stock, grouped, *compiled = (statistics.median(t[1:]) / layers * 1e3 for t in times)  # round 0 warms up
    return Result(work.name, stock, grouped, compiled[0] if compiled else None)


def in_torch() -> GroupedPunicaWrapperCPU:
    """The grouped wrapper as it is where the kernel was not compiled."""
    os.environ[KERNEL_ENV] = "torch"
    try:
        return GroupedPunicaWrapperCPU(2048, 256, device="cpu")
    finally:
        del os.environ[KERNEL_ENV]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--layers", type=int, default=8, help="with fewer, weights stay in the caches")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the results here as well")
    options = parser.parse_args(arguments)
    results = []
    print(machine.describe())
    print(f"{'ms per layer':38} {'stock':>9} {'grouped':>9} {'compiled':>9} {'ratio':>7}")
    for work in WORKLOADS:
        result = compare(work, options.layers, options.rank, options.rounds)
        results.append(result)
        compiled = "-" if result.compiled_ms is None else f"{result.compiled_ms:.3f}"
        print(
            f"{result.workload:38} {result.stock_ms:9.3f} {result.grouped_ms:9.3f} {compiled:>9} "
            f"{result.ratio:6.1f}x",
            flush=True,
        )
    sizes = [part for n in ("layers", "rank", "rounds") for part in (f"--{n}", str(getattr(options, n)))]
    lowered = once_more(__file__, sizes)
    if options.json:
        document = {
            "machine": machine.describe(),
            "vllm": installed_vllm(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "layers": options.layers,
            "rank": options.rank,
            "rounds": options.rounds,
            "results": [asdict(result) | {"ratio": result.ratio} for result in results],
            "lowered": lowered,
        }
        options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
