"""vLLM's engine over the small model, and the requests that are timed against it.

Prompts are random ids, never twice the same; answers are greedy and of exact length.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

from common import Step
from tuned import remedy

EXTENSION = "soma_vllm.engines.vllm.worker_extension.ReadsAdaptersAside"
OLD_RUNNER = "runner.json"
"""Beside the models where model runner V2 does not start on this machine: engines then take V1."""


class Engine:
    """An AsyncLLM, with or without LoRA, eager or with CUDA graphs for decoding."""

    def __init__(self, step: Step, lora: bool, graphs: bool) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._models = step.models
        self._numbers = itertools.count()
        self._random = random.Random(7)
        self.max_loras = 2 if step.tiny else 32
        arguments = _arguments(step, graphs)
        if lora:
            arguments |= {
                "enable_lora": True,
                "max_loras": self.max_loras,
                "max_cpu_loras": 4 if step.tiny else 64,
                "max_lora_rank": 8,
                "worker_extension_cls": EXTENSION,
            }
        self.llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))

    def prompt(self, tokens: int) -> dict[str, list[int]]:
        """A prompt of so many random ids."""
        return {"prompt_token_ids": [self._random.randrange(300, 2000) for _ in range(tokens)]}

    def adapter(self, number: int) -> Any:
        """The request for an adapter of the models' folder; number 0 is none."""
        from vllm.lora.request import LoRARequest

        if number == 0:
            return None
        return LoRARequest(f"a{number}", number, str(self._models / "adapters" / str(number)))

    async def one(self, prompt: Any, tokens: int, adapter: int = 0, times: list[float] | None = None) -> None:
        """One request of exactly `tokens`; `times` gets the moment of each, in seconds."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        kind = RequestOutputKind.FINAL_ONLY if times is None else RequestOutputKind.DELTA
        how = SamplingParams(
            max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False, output_kind=kind
        )
        name = f"r{next(self._numbers)}"
        async for output in self.llm.generate(prompt, how, name, lora_request=self.adapter(adapter)):
            if times is not None:
                times.extend([time.perf_counter()] * len(output.outputs[0].token_ids))

    async def many(self, rows: int, tokens: int, adapters: int, prompt_tokens: int) -> float:
        """Seconds that `rows` requests take together, spread over `adapters`."""
        prompts = [self.prompt(prompt_tokens) for _ in range(rows)]
        requests = [
            self.one(prompt, tokens, 1 + row % adapters if adapters else 0)
            for row, prompt in enumerate(prompts)
        ]
        began = time.perf_counter()
        await asyncio.gather(*requests)
        return time.perf_counter() - began

    async def gaps(
        self, streams: int, tokens: int, adapters: int, work: Callable[[], Awaitable[Any]]
    ) -> tuple[list[float], Any]:
        """(milliseconds between tokens of `streams` while `work` runs, its result); [nan] if there are none."""
        moments: list[list[float]] = [[] for _ in range(streams)]
        running = [
            asyncio.create_task(self.one(self.prompt(32), tokens, 1 + row % adapters, times))
            for row, times in enumerate(moments)
        ]
        await asyncio.sleep(0.2)
        result = await work()
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        found = [1e3 * (b - a) for times in moments for a, b in itertools.pairwise(times[2:])]
        return found or [float("nan")], result


def _arguments(step: Step, graphs: bool) -> dict[str, Any]:
    """The engine's arguments without LoRA; `remedy` goes into the environment."""
    rows = 8 if step.tiny else 128
    arguments: dict[str, Any] = {
        "model": str(step.models / "small"),
        "max_model_len": 512 if step.tiny else 4096,
        "max_num_seqs": rows,
        "max_num_batched_tokens": 512 if step.tiny else 8192,
        "enforce_eager": not graphs or step.device == "cpu",  # a CPU would compile instead
        "enable_prefix_caching": True,
        "kv_cache_memory_bytes": 2**26 if step.tiny else 8 * 2**30,
        "generation_config": "vllm",
    }
    if step.device == "cuda":
        os.environ.update(remedy(step.models))
        arguments["gpu_memory_utilization"] = 0.3
        if not json.loads((step.models / "go.json").read_text())["fa3"]:
            arguments["attention_backend"] = "TRITON_ATTN"
        if graphs:
            arguments["compilation_config"] = {
                "mode": 0,  # without the compiler, so that it starts in seconds
                "cudagraph_mode": "FULL_DECODE_ONLY",
                "cudagraph_capture_sizes": [1, 8, 32, rows],
            }
    return arguments


def started(step: Step, lora: bool, graphs: bool) -> Engine:
    """An engine with model runner V2, or with V1 where that one does not start on this machine's Triton."""
    old_runner = step.models / OLD_RUNNER
    if old_runner.exists():
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    try:
        return Engine(step, lora, graphs)
    except Exception as error:
        if step.device != "cuda" or old_runner.exists():
            raise
        step.record("start", error=f"{type(error).__name__}: {str(error)[:300]}", then="model runner V1")
        old_runner.write_text("{}")
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
        return Engine(step, lora, graphs)
