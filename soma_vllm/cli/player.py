"""The client of a replay: plays a script against a server as an ordinary chat program would.

Guarantees: knows nothing of the server but its public interface; one dialogue's failure does not end the
others; the records are whole at any moment, also when the play is cut short.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from soma_vllm.cli.dialogues import Script
from soma_vllm.cli.replay_view import SessionRecord, TurnRecord
from soma_vllm.errors import EngineError, EngineUnavailable
from soma_vllm.types import Role

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from openai.types.chat import ChatCompletionMessageParam
    from openai.types.completion_usage import CompletionUsage

SETTLE_S = 30.0
"""Longest wait for a session's background audits after its last turn."""


class Player:
    """Plays a script; `sessions` holds every dialogue's record at any moment, in the script's order."""

    def __init__(
        self, client: AsyncOpenAI, root: str, script: Script, changed: Callable[[SessionRecord], None]
    ) -> None:
        """`root` is the server's address without `/v1`; `changed` is called after every change of a record."""
        self._client = client
        self._root = root
        self._script = script
        self._changed = changed
        run = secrets.token_hex(3)
        self.sessions = {
            name: SessionRecord(name, f"{name}-{run}", len(turns), forced=name in script.forced)
            for name, turns in script.dialogues.items()
        }

    async def play(self) -> None:
        """Play all dialogues; one that fails keeps its turns and says why it ended."""
        lanes = asyncio.Semaphore(self._script.concurrency)

        async def one(name: str) -> None:
            async with lanes:
                await self._play_one(name)

        async with asyncio.TaskGroup() as group:
            for name in self._script.dialogues:
                group.create_task(one(name))

    async def _play_one(self, name: str) -> None:
        from openai import OpenAIError

        try:
            await self._turns(name)
        except (OpenAIError, EngineError) as error:
            self._update(name, error=f"{type(error).__name__}: {error}")
        try:
            await self._settle(name)
        except (OpenAIError, EngineError) as error:
            reason = self.sessions[name].error or f"no report of the session: {type(error).__name__}: {error}"
            self._update(name, error=reason)

    async def _turns(self, name: str) -> None:
        script = self._script
        messages: list[ChatCompletionMessageParam] = []
        for number, query in enumerate(script.dialogues[name], start=1):
            if number > 1:
                await asyncio.sleep(script.think_s)
            messages.append({"role": "user", "content": query})
            turn = await self._ask(name, number, query, messages)
            messages.append({"role": "assistant", "content": turn.answer})
            record = self.sessions[name]
            self._update(name, turns=(*record.turns, turn), phase=turn.phase)
            if script.pause_s and number == script.warm_window < len(script.dialogues[name]):
                await self._read(name)

    async def _ask(
        self, name: str, number: int, query: str, messages: Sequence[ChatCompletionMessageParam]
    ) -> TurnRecord:
        """Send one turn and take its answer as it streams."""
        headers = {"X-Session-ID": self.sessions[name].session}
        if name in self._script.forced:
            headers["X-SOMA-Force"] = "adapter"
        at, start = time.time(), time.perf_counter()
        reply = await self._client.chat.completions.with_raw_response.create(
            model="soma",
            messages=list(messages),
            max_tokens=self._script.max_tokens,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_headers=headers,
        )
        engine = reply.headers.get("x-soma-engine", "")
        if engine not in set(Role):
            raise EngineError(
                f"found X-SOMA-Engine {engine!r}; expected original or surrogate, from soma-serve"
            )
        pieces: list[str] = []
        first: float | None = None
        usage: CompletionUsage | None = None
        finished = False
        async for chunk in reply.parse():
            usage = chunk.usage or usage
            for choice in chunk.choices:
                if choice.delta.content:
                    first = first or time.perf_counter() - start
                    pieces.append(choice.delta.content)
                finished = finished or choice.finish_reason is not None
        if not finished:
            raise EngineUnavailable(f"the stream of turn {number} ended before its finish_reason")
        details = usage.prompt_tokens_details if usage else None
        return TurnRecord(
            turn=number,
            query=query,
            answer="".join(pieces),
            engine=engine,
            adapter=reply.headers.get("x-soma-adapter") or None,
            phase=reply.headers.get("x-soma-phase", ""),
            reason=reply.headers.get("x-soma-reason", ""),
            at=at,
            ttft_s=first,
            latency_s=time.perf_counter() - start,
            prompt_tokens=usage.prompt_tokens if usage else None,
            cached_tokens=details.cached_tokens if details else None,
            completion_tokens=usage.completion_tokens if usage else None,
        )

    async def _read(self, name: str) -> None:
        """Let the user read until the session is no longer adapting, or the pause is over."""

        def adapted(report: Mapping[str, Any]) -> bool:
            return report.get("phase") not in ("WARM_START", "ADAPTING")

        await self._poll(name, adapted, self._script.pause_s)

    async def _settle(self, name: str) -> None:
        """Wait for background audits, then take over what the server knows of the session."""
        report = await self._poll(name, lambda report: bool(report.get("idle")), SETTLE_S)
        if report is None:
            return
        told = {turn.get("turn"): turn for turn in report.get("turns") or ()}
        self._update(
            name,
            phase=report.get("phase") or self.sessions[name].phase,
            turns=tuple(_completed(turn, told.get(turn.turn, {})) for turn in self.sessions[name].turns),
            events=tuple(report.get("events") or ()),
            training=report.get("training"),
        )

    async def _poll(
        self, name: str, done: Callable[[Mapping[str, Any]], bool], limit_s: float
    ) -> Mapping[str, Any] | None:
        """The session's report, once `done` holds or `limit_s` seconds are over; None if there is none."""
        from openai import NotFoundError

        end = time.monotonic() + limit_s
        url = f"{self._root}/soma/sessions/{self.sessions[name].session}"
        while True:
            try:
                report = await self._client.get(url, cast_to=object)
            except NotFoundError:
                return None
            if not isinstance(report, dict):
                raise EngineError(
                    f"GET /soma/sessions: found a {type(report).__name__}; expected a JSON object"
                )
            self._update(name, phase=report.get("phase") or self.sessions[name].phase)
            remaining = end - time.monotonic()
            if done(report) or remaining <= 0:
                return report
            await asyncio.sleep(min(self._script.poll_s, remaining))

    def _update(self, name: str, **changes: Any) -> None:
        self.sessions[name] = replace(self.sessions[name], **changes)
        self._changed(self.sessions[name])


def _completed(turn: TurnRecord, told: Mapping[str, Any]) -> TurnRecord:
    """A turn with what only the server knows: its gap, phase and tokens. Times stay the client's."""
    keys = ("gap", "phase", "prompt_tokens", "cached_tokens", "completion_tokens")
    return replace(turn, **{key: told[key] for key in keys if told.get(key) is not None})
