"""The study's users: sessions that arrive when planned, and ask their turns one after the other.

Guarantees: arrivals do not wait for the server; a turn counts only when its stream ended with a finish
reason; a session that breaks off says why and does not end the others.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import httpx
from openai import AsyncOpenAI, OpenAIError
from openai.types.chat import ChatCompletionMessageParam

from soma_vllm.tools.replay.client import stream_answer
from study.connections import fresh_client
from study.plan import Block, Visit


@dataclass(frozen=True)
class Answered:
    """One turn as its user saw it. Times in seconds, measured by the client."""

    turn: int
    """1-based index in its session."""
    engine: str
    adapter: str | None
    phase: str
    at: float
    """After the block's begin."""
    ttft_s: float
    latency_s: float
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None
    """Of the prompt, from the engine's prefix cache; None where the server does not say."""
    answer: str
    """Never written to the report."""
    correct: bool | None = None
    """By the turn's check; None where it has none."""

    @property
    def token_s(self) -> float | None:
        """Mean time from one token to the next; None for answers of one."""
        if self.completion_tokens < 2:
            return None
        return (self.latency_s - self.ttft_s) / (self.completion_tokens - 1)


@dataclass(frozen=True)
class Played:
    """One session's course."""

    visit: Visit
    turns: tuple[Answered, ...] = ()
    events: tuple[Mapping[str, Any], ...] = ()
    """What the server decided, from its own report of the session."""
    error: str | None = None


Told = Callable[[Played], None]


class Users:
    """Plays blocks against one server."""

    def __init__(
        self, root: str, max_tokens: int, settle_s: float, told: Told, ignore_eos: bool = False
    ) -> None:
        """`settle_s`: longest wait for what a session left to the background; `told` hears of every turn;
        `ignore_eos`: answers have `max_tokens` whatever they say."""
        self._client = AsyncOpenAI(
            base_url=f"{root}/v1",
            api_key="none",
            max_retries=0,
            timeout=1800,
            http_client=fresh_client(timeout=1800),
        )
        self._root = root
        self._max_tokens = max_tokens
        self._extra = {"ignore_eos": True} if ignore_eos else None
        self._settle_s = settle_s
        self._told = told

    async def close(self) -> None:
        """Close all connections."""
        await self._client.close()

    async def play(self, block: Block) -> tuple[list[Played], float]:
        """(every session in the block's order, seconds until the last answer).

        Returns once nothing of it runs in the background any more.
        """
        begun = time.perf_counter()
        played = await asyncio.gather(*(self._visit(block.arm, visit, begun) for visit in block.visits))
        seconds = time.perf_counter() - begun
        return [await self._settled(one) for one in played], seconds

    async def remove(self, played: list[Played]) -> None:
        """Have the server forget sessions, with their adapters."""
        for one in played:
            await self._session("DELETE", one.visit)

    async def _visit(self, arm: str, visit: Visit, begun: float) -> Played:
        await asyncio.sleep(max(0.0, visit.arrives_s - (time.perf_counter() - begun)))
        played = Played(visit)
        messages: list[ChatCompletionMessageParam] = []
        try:
            for number, query in enumerate(visit.turns, start=1):
                if number > 1:
                    await asyncio.sleep(visit.thinks_s[number - 2])
                messages.append({"role": "user", "content": query})
                turn = await self._ask(visit.policy(number, arm), visit, number, messages, begun)
                messages.append({"role": "assistant", "content": turn.answer})
                played = replace(played, turns=(*played.turns, turn))
                self._told(played)
        except (OpenAIError, httpx.HTTPError, BrokenOff) as error:
            return replace(played, error=f"{type(error).__name__}: {error}")
        return played

    async def _ask(
        self, policy: str, visit: Visit, number: int, messages: list[ChatCompletionMessageParam], begun: float
    ) -> Answered:
        at = time.perf_counter() - begun
        reply = await stream_answer(
            self._client.with_options(api_key=visit.session),
            model=f"soma:{policy}",
            messages=messages,
            max_tokens=self._max_tokens,
            extra_headers={"X-Session-ID": visit.session},
            extra_body=self._extra,
        )
        if not reply.finished or reply.usage is None:
            raise BrokenOff(f"the stream of turn {number} ended without a finish reason and its usage")
        return Answered(
            turn=number,
            engine=reply.headers.get("x-soma-engine", ""),
            adapter=reply.headers.get("x-soma-adapter") or None,
            phase=reply.headers.get("x-soma-phase", ""),
            at=at,
            ttft_s=reply.ttft_s or reply.latency_s,
            latency_s=reply.latency_s,
            prompt_tokens=reply.usage.prompt_tokens,
            completion_tokens=reply.usage.completion_tokens,
            cached_tokens=reply.cached_tokens,
            answer=reply.answer,
        )

    async def _settled(self, played: Played) -> Played:
        """The session with what the server knows of it, once it is idle."""
        end = time.monotonic() + self._settle_s
        while True:
            report = await self._session("GET", played.visit)
            if report is None:
                return played if played.error else replace(played, error="the server has no such session")
            if report["idle"]:
                return replace(played, events=tuple(report["events"]))
            if time.monotonic() > end:
                why = f"still busy in the background after {self._settle_s:g} s"
                return replace(played, events=tuple(report["events"]), error=played.error or why)
            await asyncio.sleep(0.5)

    async def _session(self, method: str, visit: Visit) -> dict[str, Any] | None:
        """The server's report of a session; None where there is none."""
        async with fresh_client(timeout=120) as http:
            answer = await http.request(
                method,
                f"{self._root}/soma/sessions/{visit.session}",
                headers={"Authorization": f"Bearer {visit.session}"},
            )
        if answer.status_code == 404:
            return None
        answer.raise_for_status()
        found: dict[str, Any] | None = answer.json() if answer.content else None
        return found


class BrokenOff(Exception):
    """An answer that did not come to its end."""
