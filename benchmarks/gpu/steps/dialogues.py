"""Dialogues with a running soma-serve as an ordinary chat client has them, and what is recorded of them."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
from common import Step

DIALOGUES, AT_ONCE, TURNS, WARM = 6, 3, 7, 3
VERDICT_S = 25.0
"""How long a user reads after the warm start, at most, while the session is judged."""

Message = dict[str, str]


class Client:
    """Streams chat completions from a server's root, e.g. `http://127.0.0.1:8000`."""

    def __init__(self, http: aiohttp.ClientSession, root: str) -> None:
        self._http = http
        self._root = root

    async def ask(self, messages: list[Message], model: str, tokens: int, **headers: str) -> dict[str, Any]:
        """`status`; with 200 also `answer`, `first_s`, `seconds` and the `X-SOMA-` headers, else the `body`."""
        body = {"model": model, "messages": messages, "max_tokens": tokens, "temperature": 0, "stream": True}
        began = time.perf_counter()
        first, pieces = None, []
        async with self._http.post(f"{self._root}/v1/chat/completions", json=body, headers=headers) as reply:
            if reply.status != 200:
                return {"status": reply.status, "body": (await reply.text())[:200]}
            async for line in reply.content:
                text = line.decode().strip()
                if not text.startswith("data: ") or text == "data: [DONE]":
                    continue
                for choice in json.loads(text[6:]).get("choices", ()):
                    if said := choice["delta"].get("content"):
                        first = first or time.perf_counter() - began
                        pieces.append(said)
            named = {key.lower(): value for key, value in reply.headers.items()}
        told = {key[7:]: value for key, value in named.items() if key.startswith("x-soma-")}
        seconds = time.perf_counter() - began
        return {"status": 200, "answer": "".join(pieces), "first_s": first, "seconds": seconds, **told}

    async def session(self, name: str) -> dict[str, Any]:
        """The server's report of a session; empty where there is none."""
        async with self._http.get(f"{self._root}/soma/sessions/{name}") as reply:
            return await reply.json() if reply.status == 200 else {}

    async def answers(self) -> bool:
        """Whether the server is ready."""
        try:
            async with self._http.get(f"{self._root}/health") as reply:
                return reply.status == 200
        except aiohttp.ClientError:
            return False


async def dialogue(client: Client, name: str, queries: list[str], tokens: int, forced: bool) -> dict[str, Any]:
    """Seven turns; after the warm start the user reads until the session was judged."""
    messages: list[Message] = []
    turns = []
    for turn in range(1, TURNS + 1):
        messages.append({"role": "user", "content": queries[(turn - 1) % len(queries)]})
        headers = {"X-Session-ID": name} | ({"X-SOMA-Force": "adapter"} if forced else {})
        found = await client.ask(messages, "soma", tokens, **headers)
        turns.append(found)
        messages.append({"role": "assistant", "content": found.get("answer") or "."})
        if turn == WARM:
            await _judged(client, name)
    return {"forced": forced, "turns": turns, "report": await client.session(name)}


async def _judged(client: Client, name: str) -> None:
    end = time.monotonic() + VERDICT_S
    while time.monotonic() < end:
        if (await client.session(name)).get("phase") not in ("WARM_START", "ADAPTING"):
            return
        await asyncio.sleep(0.2)


async def play(step: Step, client: Client) -> None:
    """Six dialogues, three at once; every other one asks for its adapter."""
    scripts = list(json.loads(Path("dialogues/demo.json").read_text(encoding="utf-8")).values())
    lanes = asyncio.Semaphore(AT_ONCE)
    tokens = 12 if step.tiny else 48

    async def one(number: int) -> dict[str, Any]:
        queries = [str(query) for query in scripts[number % len(scripts)]]
        async with lanes:
            return await dialogue(client, f"kit-{number}", queries, tokens, number % 2 == 0)

    for found in await asyncio.gather(*(one(number) for number in range(DIALOGUES))):
        report, turns = found["report"], found["turns"]
        step.record(
            "dialogue",
            forced=found["forced"],
            phase=report.get("phase"),
            engines=[turn.get("engine", turn["status"]) for turn in turns],
            with_adapter=sum(bool(turn.get("adapter")) for turn in turns),
            reasons=[turn.get("reason") for turn in turns][-2:],
            first_ms=[round(1e3 * (turn.get("first_s") or 0)) for turn in turns],
            training=_short(report.get("training") or {}),
            events=dict(Counter(event.get("kind") for event in report.get("events") or ())),
            failed=[turn.get("body") for turn in turns if turn["status"] != 200][:2],
        )


def _short(training: dict[str, Any]) -> dict[str, Any]:
    """What a session's report says of its training, without the numbers of every candidate."""
    acceptance = training.get("acceptance") or {}
    kept = {key: training.get(key) for key in ("mining_s", "finetune_s", "steps")}
    return {**kept, "candidate": acceptance.get("candidate"), "reason": acceptance.get("reason")}


async def dispatch_cost(step: Step, client: Client) -> None:
    """First tokens of the surrogate through dispatch and past it, with the prompt in the prefix cache."""
    messages = [{"role": "user", "content": "Please say something short about rivers."}]
    first: dict[str, list[float]] = {"small": [], "soma:surrogate": []}
    for _ in range(3 if step.tiny else 20):
        for model, times in first.items():
            found = await client.ask(messages, model, 4)
            if found["status"] == 200 and found["first_s"]:
                times.append(1e3 * found["first_s"])
    medians = {name.replace(":", "_"): median(times) if times else None for name, times in first.items()}
    step.record("first token, ms", **medians)
