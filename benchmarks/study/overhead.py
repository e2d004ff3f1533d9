"""What dispatch adds to the first token: the same prompts through soma-serve and to a vLLM without us.

The plain server is started with the same arguments, environment, cores and LoRA kernels; only the endpoint
plugin is missing. One request is under way at a time; in every round each way is asked once, in an order
drawn anew, so that a slow moment hits all alike. Between two requests the servers come to rest: vLLM's
processes poll for a second after each, and would take the core that both share from each other. Prompts are
new each time: no cache helps anyone. Three ways:

* `plain`: the vLLM server;
* `by_name`: soma-serve, by the surrogate's own name (routes, access control, no session);
* `session`: soma-serve, policy `surrogate` (besides: the session is found, routed and recorded).
"""

from __future__ import annotations

import asyncio
import random
import secrets
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np

from soma_vllm.cli.child_server import started_server
from soma_vllm.config import Config
from soma_vllm.engines.command import child_environment, surrogate_arguments
from soma_vllm.models.hub import local_path
from study.plan import SYLLABLES
from study.ports import free_port

WAYS = ("plain", "by_name", "session")
RESAMPLES = 2000
WORDS = 24
WARM_UP = 2
"""Rounds not counted."""
REST_S = 1.2
"""Longer than `busy_loop_s` of vLLM's message queues."""


@asynccontextmanager
async def plain_server(config: Config, say: Callable[[str], None]) -> AsyncIterator[str]:
    """A vLLM server of the surrogate without soma_vllm's endpoint plugin; its address."""
    assert config.surrogate_model is not None, "for_serving has checked"
    path, port = str(local_path(config.surrogate_model)), free_port()
    root = f"http://127.0.0.1:{port}"
    module = ["-m", "vllm.entrypoints.launchers.api_server.entry"]
    place = ["--host", "127.0.0.1", "--port", str(port)]
    settings = child_environment(config.surrogate, path)
    assignments = [f"{name}={value}" for name, value in settings.items()]
    command = [
        "env",
        *assignments,
        sys.executable,
        *module,
        *place,
        *surrogate_arguments(config, path, "plain"),
    ]
    async with started_server(command, root, config.original.start_timeout_s, say):
        yield root


async def overhead(soma: str, plain: str, surrogate: str, rounds: int, seed: int) -> dict[str, Any]:
    """Median first tokens, and the paired differences to the plain server, milliseconds.

    Args:
        soma, plain: addresses of the two servers.
        surrogate: the surrogate's name at `soma`.
    """
    draw = random.Random(f"{seed}/overhead")
    run = secrets.token_hex(3)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    async with httpx.AsyncClient(trust_env=False, timeout=120) as http:
        for number in range(rounds + WARM_UP):
            prompt = " ".join("".join(draw.choices(SYLLABLES, k=3)) for _ in range(WORDS))
            session = f"overhead-{run}-{number}"
            for way in draw.sample(WAYS, len(WAYS)):
                root = plain if way == "plain" else soma
                model = {"plain": "plain", "by_name": surrogate, "session": "soma:surrogate"}[way]
                await asyncio.sleep(REST_S)
                taken = await _first_token(http, root, model, prompt, session)
                if number >= WARM_UP:
                    seconds[way].append(taken)
            await http.delete(f"{soma}/soma/sessions/{session}", headers=_headers(session))
    return {
        "requests": rounds,
        "ttft_ms": {way: round(1e3 * statistics.median(values), 3) for way, values in seconds.items()},
        "added_ms": {way: _paired(seconds[way], seconds["plain"], seed) for way in WAYS[1:]},
    }


async def _first_token(http: httpx.AsyncClient, root: str, model: str, prompt: str, session: str) -> float:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": 2,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    start = time.perf_counter()
    first = None
    async with http.stream(
        "POST", f"{root}/v1/chat/completions", json=body, headers=_headers(session)
    ) as answer:
        if answer.status_code != 200:
            await answer.aread()
            answer.raise_for_status()
        async for line in answer.aiter_lines():
            # The first event carries the role alone, and comes as early as the first token does.
            if first is None and line.startswith("data:"):
                first = time.perf_counter() - start
    assert first is not None, "a stream of status 200 has events"
    return first


def _headers(session: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {session}", "X-Session-ID": session}


def _paired(these: Sequence[float], those: Sequence[float], seed: int) -> dict[str, Any]:
    """The median of paired differences, with its 95 % bootstrap interval over rounds."""
    differences = 1e3 * (np.asarray(these) - np.asarray(those))
    draws = np.random.default_rng(seed).integers(len(differences), size=(RESAMPLES, len(differences)))
    low, high = np.percentile(np.median(differences[draws], axis=1), [2.5, 97.5])
    return {
        "median": round(float(np.median(differences)), 3),
        "ci95": [round(float(low), 3), round(float(high), 3)],
    }
