"""What products of bf16 weights cost on a CPU: vLLM's own against our kernels, by layer and by engine.

Layers: each side is what vLLM's loader gives a linear layer (`cpu_linear`), without our plugin and with it, for
the shapes of the embedded pair and 1 to 512 rows, on one core. Engines (`--engine MODEL`): two vLLM engines on
the same model and cores, one with the plugin's products and blocks of 32 tokens, one as vLLM comes, answer the
same seeded prompts: prefill of 256 tokens, decode of one request alone, decode of 16 at once.

Fair because both sides are in one run on the same cores and take turns round by round; a ratio is the geometric
mean of the rounds' own ratios, with a 95 % bootstrap interval over rounds (six or more). Above 1: ours takes
less.

A machine with AVX-512 is measured twice, the second time with AVX-512 switched off by
`machine.lowered_environment`: torch, oneDNN and this package then use AVX2. vLLM's own attention kernels do
not; they are chosen by the processor.

    python benchmarks/cpu_products.py [--rounds 7] [--engine MODEL] [--cores 0] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from lowered import once_more

from soma_vllm.machine import describe
from soma_vllm.tools.evaluate.statistics import interval
from soma_vllm.versions import installed_vllm

SHAPES = {
    "1.5B gate_up": (17920, 1536),
    "1.5B down": (1536, 8960),
    "0.5B gate_up": (9728, 896),
    "0.5B down": (896, 4864),
}
ROWS = (1, 4, 16, 64, 512)
PREFILL, TOKENS, TOGETHER = 256, 24, 16

Ratio = dict[str, Any]


def ratio(stock: Sequence[float], ours: Sequence[float]) -> Ratio:
    """How many times less ours takes, by rounds. Both in seconds (or any cost)."""
    logs = [math.log(a / b) for a, b in zip(stock, ours, strict=True)]
    bounds = interval(logs)
    return {
        "stock": statistics.median(stock),
        "ours": statistics.median(ours),
        "ratio": math.exp(statistics.fmean(logs)),
        "interval": None if bounds is None else [math.exp(bound) for bound in bounds],
    }


def line(name: str, found: Ratio, more: str = "") -> None:
    """One row of the table."""
    bounds = found["interval"]
    spread = "" if bounds is None else f" [{bounds[0]:.2f}, {bounds[1]:.2f}]"
    times = f"{found['stock'] * 1e3:9.2f} {found['ours'] * 1e3:9.2f} ms"
    print(f"{name:28} {times} {found['ratio']:6.2f}x{spread} {more}".rstrip(), flush=True)


def layers(rounds: int) -> dict[str, Ratio]:
    """Seconds of one call by shape and rows."""
    import torch
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    from soma_vllm.engines.vllm.kernels.linear import dispatching

    torch.set_num_threads(1)
    found = {}
    for name, (out, width) in SHAPES.items():
        weight = (torch.randn(out, width) / 30).bfloat16()
        sides = [_layer(weight, d) for d in (dispatch_cpu_unquantized_gemm, dispatching(_unreachable))]
        for rows in ROWS:
            x = torch.randn(rows, width).bfloat16()
            times: list[list[float]] = [[], []]
            # Long enough for the clock, and the first round warms up.
            repeats = max(1, 16 // rows)
            for turn in range(rounds + 1):
                for side, record in zip(sides, times, strict=True):
                    began = time.perf_counter()
                    for _ in range(repeats):
                        side(x, weight, None)
                    if turn:
                        record.append((time.perf_counter() - began) / repeats)
            result = ratio(*times) | {"gflops": 2e-9 * rows * out * width / statistics.median(times[1])}
            found[f"{name}, {rows} rows"] = result
            line(f"{name}, {rows} rows", result, f"{result['gflops']:6.1f} GFLOP/s")
    return found


def _layer(weight: Any, dispatch: Callable[..., None]) -> Any:
    import torch

    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    dispatch(layer, remove_weight=False)
    return layer.cpu_linear


def _unreachable(layer: Any, remove_weight: bool) -> None:
    raise AssertionError("every weight here is one that the kernel takes")


@asynccontextmanager
async def engine(model: str, cores: str, ours: bool) -> AsyncIterator[Any]:
    """A vLLM engine; ours as soma-serve starts it, or stock."""
    from vllm import AsyncEngineArgs, AsyncLLMEngine

    from soma_vllm.config import Surrogate
    from soma_vllm.engines.vllm.kernels.linear import LINEAR_ENV

    os.environ[LINEAR_ENV] = "ours" if ours else "stock"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = cores
    made = AsyncLLMEngine.from_engine_args(
        AsyncEngineArgs(
            model=model,
            dtype="bfloat16",
            enforce_eager=True,
            max_model_len=1024,
            max_num_seqs=TOGETHER,
            kv_cache_memory_bytes=1 << 29,
            enable_prefix_caching=False,
            **({"block_size": Surrogate().block_size} if ours else {}),
        )
    )
    try:
        yield made
    finally:
        made.shutdown()


async def came(made: Any, prompt: Sequence[int], tokens: int, name: str) -> list[float]:
    """When the request was sent, and when each token came, seconds."""
    from vllm import SamplingParams, TokensPrompt

    sent = time.perf_counter()
    settings = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0.0)
    stream = made.generate(TokensPrompt(prompt_token_ids=list(prompt)), settings, name)
    return [sent] + [time.perf_counter() async for _ in stream]


async def one_round(made: Any, seed: int) -> dict[str, float]:
    """Seconds of a prefill, and between tokens, alone and at once."""
    import numpy as np

    draw = np.random.default_rng(seed)

    def prompt(length: int) -> list[int]:
        return draw.integers(100, 5000, length).tolist()

    sent, first = await came(made, prompt(PREFILL), 1, f"prefill-{seed}")
    alone = await came(made, prompt(16), TOKENS, f"alone-{seed}")
    requests = [came(made, prompt(16), TOKENS, f"together-{seed}-{n}") for n in range(TOGETHER)]
    last = await asyncio.gather(*requests)
    # Once all have their first token and before the first is done, every step decodes all of them.
    begins, ends = max(times[1] for times in last), min(times[-1] for times in last)
    steps = [t for t in last[0] if begins <= t <= ends]
    if len(steps) < 3:
        raise RuntimeError(f"found {len(steps)} steps with all {TOGETHER} requests in them; expected 3 or more")
    return {
        f"prefill of {PREFILL} tokens": first - sent,
        "decode, 1 row": statistics.median(b - a for a, b in pairwise(alone[1:])),
        f"decode, {TOGETHER} rows": (steps[-1] - steps[0]) / (len(steps) - 1),
    }


async def engines(model: str, cores: str, rounds: int) -> dict[str, Ratio]:
    """Seconds of a prefill and of a decode step."""
    found: dict[str, list[list[float]]] = {}
    async with AsyncExitStack() as stack:
        sides = [await stack.enter_async_context(engine(model, cores, ours)) for ours in (False, True)]
        for turn in range(rounds + 1):
            for number in (0, 1) if turn % 2 else (1, 0):
                for name, seconds in (await one_round(sides[number], turn)).items():
                    if turn:
                        found.setdefault(name, [[], []])[number].append(seconds)
            print(f"[cpu_products] round {turn} of {rounds}", file=sys.stderr, flush=True)
    results = {name: ratio(*times) for name, times in found.items()}
    for name, result in results.items():
        line(name, result)
    return results


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """This process's instruction set."""
    import torch

    from soma_vllm.models.hub import local_path

    print(f"\n{describe()}\n{'':28} {'stock':>9} {'ours':>9}", flush=True)
    document: dict[str, Any] = {
        "machine": describe(),
        "vllm": installed_vllm(),
        "torch": torch.__version__,
        "rounds": options.rounds,
        "cores": options.cores,
        "layers": {} if options.no_layers else layers(options.rounds),
        "engines": {},
    }
    for model in options.engine:
        print(f"\n{model}, cores {options.cores}", flush=True)
        path = str(local_path(model))
        document["engines"][model] = asyncio.run(engines(path, options.cores, options.rounds))
    return document


def main(arguments: Sequence[str]) -> None:
    """Measure, and once more with AVX2 only where the machine has more."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--engine", action="append", default=[], metavar="MODEL", help="engines too; repeatable"
    )
    parser.add_argument("--no-layers", action="store_true", help="leave the layers out")
    parser.add_argument("--cores", default="0", help="of both engines, such as 0 or 0-1")
    parser.add_argument("--json", type=Path, help="write the results here as well")
    options = parser.parse_args(arguments)
    os.environ.update(
        VLLM_PLUGINS="soma_engine", VLLM_LOGGING_LEVEL="ERROR", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1"
    )
    document = measure(options)
    same = [
        f"--rounds={options.rounds}",
        f"--cores={options.cores}",
        *(f"--engine={m}" for m in options.engine),
    ]
    document["lowered"] = once_more(__file__, same + ["--no-layers"] * options.no_layers)
    if options.json:
        options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
