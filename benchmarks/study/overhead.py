"""What dispatch adds to the first token: the same prompts through soma-serve and to a vLLM without us.

The plain server is started with the same arguments, environment, cores and LoRA kernels; only the endpoint
plugin is missing. One request is under way at a time; every turn is asked each way, in an order drawn anew, so
that a slow moment hits all alike. Between two requests the servers come to rest: vLLM's processes poll for a
second after each, and would take the core that both share from each other. Each way has its own dialogue of
the same queries, whose history its own prefix cache knows. Three ways:

* `plain`: the vLLM server;
* `by_name`: soma-serve, by the surrogate's own name (routes, access control, no session);
* `session`: soma-serve, policy `surrogate` (besides: the session is found, routed and recorded). The first turn
  of a dialogue asks the session store whether it is known, and is reported by itself as well.
"""

from __future__ import annotations

import asyncio
import json
import math
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

from soma_vllm.config import Config
from soma_vllm.engines.vllm.arguments import child_environment, surrogate_arguments
from soma_vllm.models.hub import local_path
from soma_vllm.tools.replay.child_server import run_server
from study.connections import fresh_client
from study.plan import SYLLABLES
from study.ports import free_port

WAYS = ("plain", "by_name", "session")
RESAMPLES = 2000
WORDS = 24
WARM_UP = 1
"""Dialogues not counted."""
TURNS = 10
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
    async with run_server(command, root, config.original.start_timeout_s, say):
        yield root


async def overhead(soma: str, plain: str, surrogate: str, rounds: int, seed: int) -> dict[str, Any]:
    """Median first tokens, and the paired differences to the plain server, milliseconds.

    Args:
        soma, plain: addresses of the two servers.
        surrogate: the surrogate's name at `soma`.
        rounds: turns that are asked every way, in dialogues of `TURNS`.
    """
    draw = random.Random(f"{seed}/overhead")
    roots = {way: plain if way == "plain" else soma for way in WAYS}
    models = {"plain": "plain", "by_name": surrogate, "session": "soma:surrogate"}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    async with fresh_client(timeout=120) as http:
        for dialogue in range(-WARM_UP, math.ceil(rounds / TURNS)):
            run = secrets.token_hex(6)
            told = {way: Told(http, roots[way], models[way], f"overhead-{run}-{way}") for way in WAYS}
            for _ in range(min(TURNS, rounds - max(dialogue, 0) * TURNS)):
                query = " ".join("".join(draw.choices(SYLLABLES, k=3)) for _ in range(WORDS))
                for way in draw.sample(WAYS, len(WAYS)):
                    await asyncio.sleep(REST_S)
                    taken = await told[way].ask(query)
                    if dialogue >= 0:
                        seconds[way].append(taken)
            await http.delete(f"{soma}/soma/sessions/{told['session'].name}", headers=told["session"].headers)
    opening = range(0, rounds, TURNS)
    return {
        "requests": rounds,
        "turns_per_dialogue": TURNS,
        "ttft_ms": {way: round(1e3 * statistics.median(values), 3) for way, values in seconds.items()},
        "added_ms": {way: _paired(seconds[way], seconds["plain"], seed) for way in WAYS[1:]},
        "added_ms_first_turns": {
            way: _paired([seconds[way][n] for n in opening], [seconds["plain"][n] for n in opening], seed)
            for way in WAYS[1:]
        },
    }


class Told:
    """One way of asking, and the dialogue that it has had."""

    def __init__(self, http: httpx.AsyncClient, root: str, model: str, name: str) -> None:
        self._http = http
        self._url = f"{root}/v1/chat/completions"
        self._model = model
        self._messages: list[dict[str, str]] = []
        self.name = name
        # A tenant of its own: no way finds in a prefix cache what another has left there.
        self.headers = {"Authorization": f"Bearer {name}", "X-Session-ID": name}

    async def ask(self, query: str) -> float:
        """Seconds to the first event of the answer to one more turn."""
        self._messages.append({"role": "user", "content": query})
        body = {
            "model": self._model,
            "messages": self._messages,
            "max_tokens": 2,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
        }
        start = time.perf_counter()
        first = None
        pieces: list[str] = []
        async with self._http.stream("POST", self._url, json=body, headers=self.headers) as answer:
            if answer.status_code != 200:
                await answer.aread()
                answer.raise_for_status()
            async for line in answer.aiter_lines():
                # The first event carries the role alone, and comes as early as the first token does.
                if first is None and line.startswith("data:"):
                    first = time.perf_counter() - start
                if line.startswith("data: {"):
                    choices = json.loads(line.removeprefix("data: "))["choices"]
                    pieces += [choice["delta"].get("content") or "" for choice in choices]
        assert first is not None, "a stream of status 200 has events"
        self._messages.append({"role": "assistant", "content": "".join(pieces)})
        return first


def _paired(these: Sequence[float], those: Sequence[float], seed: int) -> dict[str, Any]:
    """The median of paired differences, with its 95 % bootstrap interval over rounds."""
    differences = 1e3 * (np.asarray(these) - np.asarray(those))
    draws = np.random.default_rng(seed).integers(len(differences), size=(RESAMPLES, len(differences)))
    low, high = np.percentile(np.median(differences[draws], axis=1), [2.5, 97.5])
    return {
        "median": round(float(np.median(differences)), 3),
        "ci95": [round(float(low), 3), round(float(high), 3)],
    }
