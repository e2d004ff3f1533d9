"""The client of a replay: plays a script against a server as an ordinary chat program would.

Guarantees: uses the server's public interface alone; one dialogue's failure does not end others; the records
are complete at any moment, also when the play is cut short. It waits for what sessions report and never for a
fixed time: a wait is given up only when nothing has happened in any session for much longer than the longest
thing measured in this run.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from soma_vllm.errors import EngineError, EngineUnavailable
from soma_vllm.tools.replay.dialogues import Script
from soma_vllm.tools.replay.pace import Lanes, Rules, Timekeeper
from soma_vllm.tools.replay.replay_view import SessionRecord, TurnRecord
from soma_vllm.types import Role

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from openai.types.chat import ChatCompletionMessageParam
    from openai.types.completion_usage import CompletionUsage


@dataclass(frozen=True)
class StreamedAnswer:
    """An answer as its client saw it. Times in seconds."""

    headers: Mapping[str, str]
    answer: str
    finished: bool
    """Whether it ended with a finish reason."""
    ttft_s: float | None
    """To the first text; None where there was none."""
    latency_s: float
    usage: CompletionUsage | None

    @property
    def cached_tokens(self) -> int | None:
        """Prompt tokens from the engine's prefix cache; None where the server does not report them."""
        details = self.usage.prompt_tokens_details if self.usage else None
        return details.cached_tokens if details else None


async def stream_answer(client: AsyncOpenAI, **request: Any) -> StreamedAnswer:
    """Send a chat request, greedy and streaming with usage, and read its answer to the end.

    Raises:
        OpenAIError: the server refused it or did not answer.
    """
    start = time.perf_counter()
    reply = await client.chat.completions.with_raw_response.create(
        temperature=0, stream=True, stream_options={"include_usage": True}, **request
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
    latency = time.perf_counter() - start
    return StreamedAnswer(reply.headers, "".join(pieces), finished, first, latency, usage)


class Player:
    """Plays a script; `sessions` holds every dialogue's record at any moment, in the script's order."""

    def __init__(
        self,
        client: AsyncOpenAI,
        root: str,
        script: Script,
        changed: Callable[[SessionRecord], None],
        timekeeper: Timekeeper | None = None,
    ) -> None:
        """`root` is the server's address without `/v1`; `changed` is called after every change of a record."""
        self._client = client
        self._root = root
        self._script = script
        self._changed = changed
        rules = Rules(script.warm_window, script.think_s, script.concurrency)
        self._time = timekeeper or Timekeeper(rules)
        self._lanes = Lanes(script.concurrency)
        self._started: set[str] = set()
        self._waiting: set[str] = set()
        self._step = asyncio.Event()
        run = secrets.token_hex(3)
        self.sessions = {
            name: SessionRecord(
                name, f"{name}-{run}", len(turns), forced=name in script.forced, left_out=name in script.spare
            )
            for name, turns in script.dialogues.items()
        }

    def left_s(self) -> float | None:
        """Estimated seconds until all dialogues are over; None before anything is known."""
        return self._time.left_s(list(self.sessions.values()))

    async def play(self) -> None:
        """Play all dialogues for which there is time; one that fails keeps its turns and says why it ended."""
        async with asyncio.TaskGroup() as group:
            for rank, name in enumerate(self._script.dialogues):
                group.create_task(self._play_one(name, rank))

    async def _play_one(self, name: str, rank: int) -> None:
        from openai import OpenAIError

        try:
            await self._play_turns(name, rank)
        except (OpenAIError, EngineError) as error:
            self._update(name, error=f"{type(error).__name__}: {error}")
        if self.sessions[name].left_out:
            return
        try:
            await self._settle(name)
        except (OpenAIError, EngineError) as error:
            reason = self.sessions[name].error or f"no report of the session: {type(error).__name__}: {error}"
            self._update(name, error=reason)

    async def _play_turns(self, name: str, rank: int) -> None:
        """Play one dialogue on a lane, which others may have while its user reads."""
        script = self._script
        turns = script.dialogues[name]
        messages: list[ChatCompletionMessageParam] = []
        if not await self._enter_in_time(name, rank):
            return
        warm = script.warm_window if script.awaits_verdicts and script.warm_window < len(turns) else 0
        try:
            for number in range(1, (warm or len(turns)) + 1):
                await self._play_turn(name, number, messages)
        finally:
            self._lanes.leave()
        if warm:
            await self._read(name, warm)
            async with self._lanes.lane(rank):
                for number in range(warm + 1, len(turns) + 1):
                    await self._play_turn(name, number, messages)

    async def _enter_in_time(self, name: str, rank: int) -> bool:
        """Take a lane as soon as the dialogue would be over in time; False once nothing can change that."""
        while True:
            await self._lanes.enter(rank)
            if self._time.may_begin(name, self.sessions, self._started):
                self._started.add(name)
                self._update(name, left_out=False)
                return True
            self._lanes.leave()
            if not self.sessions[name].left_out:
                self._update(name, left_out=True)
            # With each turn of another dialogue the pace is known better.
            if all(session.over for session in self.sessions.values()):
                return False
            await self._step.wait()

    async def _play_turn(self, name: str, number: int, messages: list[ChatCompletionMessageParam]) -> None:
        """Think, ask, and take the answer into the history."""
        if number > 1:
            await asyncio.sleep(self._script.think_s)
        query = self._script.dialogues[name][number - 1]
        messages.append({"role": "user", "content": query})
        turn = await self._ask(name, number, query, messages)
        messages.append({"role": "assistant", "content": turn.answer})
        self._time.turn(turn.engine, turn.latency_s, opening=number == 1)
        self._update(name, turns=(*self.sessions[name].turns, turn), phase=turn.phase)

    async def _ask(
        self, name: str, number: int, query: str, messages: Sequence[ChatCompletionMessageParam]
    ) -> TurnRecord:
        """Send one turn and take its answer as it streams."""
        headers = {"X-Session-ID": self.sessions[name].session}
        if name in self._script.forced:
            headers["X-SOMA-Force"] = "adapter"
        at = time.time()
        reply = await stream_answer(
            self._client,
            model="soma",
            messages=list(messages),
            max_tokens=self._script.max_tokens,
            extra_headers=headers,
        )
        engine = reply.headers.get("x-soma-engine", "")
        if engine not in set(Role):
            raise EngineError(
                f"found X-SOMA-Engine {engine!r}; expected original or surrogate, from soma-serve"
            )
        if not reply.finished:
            raise EngineUnavailable(f"the stream of turn {number} ended before its finish_reason")
        usage = reply.usage
        return TurnRecord(
            turn=number,
            query=query,
            answer=reply.answer,
            engine=engine,
            adapter=reply.headers.get("x-soma-adapter") or None,
            phase=reply.headers.get("x-soma-phase", ""),
            reason=reply.headers.get("x-soma-reason", ""),
            at=at,
            ttft_s=reply.ttft_s,
            latency_s=reply.latency_s,
            prompt_tokens=usage.prompt_tokens if usage else None,
            cached_tokens=reply.cached_tokens,
            completion_tokens=usage.completion_tokens if usage else None,
        )

    async def _read(self, name: str, number: int) -> None:
        """Let the user read until the session has a verdict on its first `number` turns."""

        def judged(report: Mapping[str, Any]) -> bool:
            recorded = max((turn.get("turn", 0) for turn in report.get("turns") or ()), default=0)
            return recorded >= number and report.get("phase") != "ADAPTING"

        await self._until(name, judged, "its verdict")

    async def _settle(self, name: str) -> None:
        """Wait until nothing is under way for a session, then take over what the server knows of it."""
        report = await self._until(name, lambda report: bool(report.get("idle")), "its audits")
        if report is None:
            return
        reported = {turn.get("turn"): turn for turn in report.get("turns") or ()}
        self._update(
            name,
            phase=report.get("phase") or self.sessions[name].phase,
            turns=tuple(_complete(turn, reported.get(turn.turn, {})) for turn in self.sessions[name].turns),
            events=tuple(report.get("events") or ()),
            training=report.get("training"),
        )

    async def _until(
        self, name: str, done: Callable[[Mapping[str, Any]], bool], what: str
    ) -> Mapping[str, Any] | None:
        """The session's report, once `done` holds or the wait for `what` is given up; None if there is none."""
        seen = None
        self._waiting.add(name)
        try:
            while True:
                report = await self._report(name)
                if report is None or done(report):
                    return report
                news = (report.get("phase"), len(report.get("turns") or ()), len(report.get("events") or ()))
                if news != seen:
                    self._time.news()
                    seen = news
                nothing_for_s = self._time.nothing_for_s()
                if nothing_for_s > self._time.patience_s(len(self._waiting)):
                    given_up = f"gave up waiting for {what}: nothing happened for {nothing_for_s:.0f} s"
                    self._update(name, given_up=given_up)
                    return report
                await asyncio.sleep(self._script.poll_s)
        finally:
            self._waiting.discard(name)

    async def _report(self, name: str) -> Mapping[str, Any] | None:
        """The server's report of a session; None if it has no such session."""
        from openai import NotFoundError

        try:
            report = await self._client.get(
                f"{self._root}/soma/sessions/{self.sessions[name].session}", cast_to=object
            )
        except NotFoundError:
            return None
        if not isinstance(report, dict):
            raise EngineError(f"GET /soma/sessions: found a {type(report).__name__}; expected a JSON object")
        costs = report.get("training") or {}
        if costs.get("finetune_s") is not None:
            self._time.training(name, sum(costs.get(part) or 0.0 for part in ("mining_s", "finetune_s")))
        self._update(name, phase=report.get("phase") or self.sessions[name].phase)
        return report

    def _update(self, name: str, **changes: Any) -> None:
        self.sessions[name] = replace(self.sessions[name], **changes)
        self._changed(self.sessions[name])
        self._step.set()  # wakes all that wait now
        self._step.clear()


def _complete(turn: TurnRecord, reported: Mapping[str, Any]) -> TurnRecord:
    """A turn with what only the server knows: its gap, phase and tokens. Times stay the client's."""
    keys = ("gap", "phase", "prompt_tokens", "cached_tokens", "completion_tokens")
    return replace(turn, **{key: reported[key] for key in keys if reported.get(key) is not None})
