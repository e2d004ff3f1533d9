"""One engine of the comparison: started, asked, given adapters, stopped."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from many_adapters.workload import ADAPTERS, PROJECTIONS, RANK
from soma_vllm.adapters.leases import AdapterLeases
from soma_vllm.engines.vllm.arguments import WORKER_EXTENSION
from soma_vllm.engines.vllm.general_plugin import KERNELS_ENV

WAIT_S = 3600.0


@dataclass
class Heard:
    """When a request was sent and when each of its tokens came, seconds."""

    sent: float
    came: list[float] = field(default_factory=list)

    @property
    def ttft(self) -> float:
        return self.came[0] - self.sent

    @property
    def took(self) -> float:
        return self.came[-1] - self.sent

    @property
    def pauses(self) -> list[tuple[float, float]]:
        """(when it ended, seconds) between neighbouring tokens."""
        return [(b, b - a) for a, b in zip(self.came, self.came[1:], strict=False)]


class Arm:
    """One engine."""

    def __init__(self, name: str, slots: int, adapters: Sequence[Path]) -> None:
        self.name = name
        self.slots = slots
        self._adapters = adapters
        self._leases = AdapterLeases(slots, queue_limit=1000, wait_s=WAIT_S) if name == "ours" else None
        self._engine: Any = None
        self._sent = 0
        self.pids: set[int] = set()

    @asynccontextmanager
    async def running(self, model: str, cores: str) -> AsyncIterator[Arm]:
        """The same, with its engine up."""
        from vllm import AsyncEngineArgs, AsyncLLMEngine

        lora: dict[str, Any] = {
            "enable_lora": True,
            "max_loras": self.slots,
            "max_cpu_loras": ADAPTERS,
            "max_lora_rank": RANK,
            "lora_target_modules": list(PROJECTIONS),
        }
        if self.name == "ours":
            lora["worker_extension_cls"] = WORKER_EXTENSION
        os.environ[KERNELS_ENV] = "stock" if self.name == "stock" else "ours"
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = cores
        before = _children()
        self._engine = AsyncLLMEngine.from_engine_args(
            AsyncEngineArgs(
                model=model,
                enforce_eager=True,
                max_model_len=2048,
                max_num_seqs=64,
                kv_cache_memory_bytes=1 << 29,
                enable_prefix_caching=False,
                **({} if self.name == "base" else lora),
            )
        )
        self.pids = _children() - before
        try:
            yield self
        finally:
            self._engine.shutdown()

    async def ask(self, prompt: Sequence[int], tokens: int, adapter: int | None = None) -> Heard:
        """One request, through the queue for slots where there is one. The base engine takes no adapter."""
        heard = Heard(time.perf_counter())
        if adapter is None or self._engine is None or self.name == "base":
            await self._generate(prompt, tokens, None, heard)
        elif self._leases is None:
            await self._generate(prompt, tokens, adapter, heard)
        else:
            ticket = await self._leases.acquire(str(adapter))
            try:
                await self._generate(prompt, tokens, adapter, heard)
            finally:
                await self._leases.release(ticket)
        return heard

    async def _generate(self, prompt: Sequence[int], tokens: int, adapter: int | None, heard: Heard) -> None:
        from vllm import SamplingParams, TokensPrompt

        self._sent += 1
        outputs = self._engine.generate(
            TokensPrompt(prompt_token_ids=list(prompt)),
            SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0.0),
            f"{self.name}-{self._sent}",
            lora_request=None if adapter is None else self._lora(adapter),
        )
        async for _ in outputs:
            heard.came.append(time.perf_counter())

    async def load(self, adapter: int) -> float:
        """Seconds to make an adapter servable, as soma-serve (ours) or vLLM's own route (stock) does it."""
        from soma_vllm.engines.vllm.internals import add_adapter

        began = time.perf_counter()
        if self.name == "ours":
            await add_adapter(self._engine, self._lora(adapter))
        else:
            await self._engine.add_lora(self._lora(adapter))
        return time.perf_counter() - began

    async def forget(self, adapter: int) -> None:
        """Take an adapter out of the engine."""
        await self._engine.remove_lora(adapter + 1)

    def memory(self) -> int:
        """Bytes that the engine's processes have resident."""
        return sum(psutil.Process(pid).memory_info().rss for pid in self.pids if psutil.pid_exists(pid))

    def _lora(self, adapter: int) -> Any:
        from vllm.lora.request import LoRARequest

        return LoRARequest(f"adapter-{adapter}", adapter + 1, str(self._adapters[adapter]))


def _children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}
