"""The surrogate: a vLLM engine in this process, with one adapter per session.

Guarantees: an adapter is servable from the moment `load` returns for as long as it is held, and is served as it
was trained; a reply is handed over only after its first event has arrived, so a failure before the first token
is still an exception that another engine can make good. `adapters.loaded` decides what lies in its memory.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from typing import Any, Protocol

from soma_vllm.adapters.loaded import LoadedAdapters, Loading
from soma_vllm.engines.adapter_probe import compare, logprobs_read, reading_body
from soma_vllm.engines.engine import ChatCall, Reply, Salts, error_of, refusal
from soma_vllm.engines.prompt_scoring import agreement_from_prompt, question_body, scoring_body
from soma_vllm.errors import AdapterRejected, EngineUnavailable
from soma_vllm.types import AdapterRef, Agreement, Signature

logger = logging.getLogger(__name__)


class ChatServing(Loading, Protocol):
    """What this engine needs of vLLM: `vllm_internals.PrivateChat`."""

    async def complete(
        self, body: Mapping[str, Any], http: Any
    ) -> Mapping[str, Any] | AsyncGenerator[str, None]: ...
    async def complete_text(
        self, body: Mapping[str, Any], http: Any
    ) -> Mapping[str, Any] | AsyncGenerator[str, None]: ...
    async def prompt_tokens(self, body: Mapping[str, Any]) -> list[int]: ...


class SurrogateEngine:
    """Chat completions of the small model, plain or under an adapter."""

    def __init__(
        self, name: str, serving: ChatServing, salts: Salts | None = None, loaded: LoadedAdapters | None = None
    ) -> None:
        self.name = name
        self._salts = salts or Salts()
        self._serving = serving
        self._loaded = loaded or LoadedAdapters(serving, room=64)
        self._proven: dict[str, str] = {}
        """By adapter, since this process began: empty where it is served as trained, else what is wrong."""
        self._proving = asyncio.Lock()
        self._plain: dict[tuple[int, ...], tuple[float, ...]] = {}

    async def chat(self, call: ChatCall) -> Reply:
        """Answer one chat completion; the call's adapter must be loaded.

        Raises:
            EngineUnavailable: the adapter is not loaded, or the engine broke before its first token.
            EngineRefused: vLLM found the request wrong.
        """
        if call.adapter is not None and not self._loaded.has(call.adapter.name):
            raise EngineUnavailable(f"adapter {call.adapter.name} is not loaded")
        body = dict(call.body)
        body["model"] = self.name if call.adapter is None else call.adapter.name
        body["cache_salt"] = self._salts.of(call.tenant)
        body["priority"] = call.priority
        serve = self._serving.complete_text if call.text else self._serving.complete
        answer = await serve(body, call.http)
        if isinstance(answer, Mapping):
            return Reply(body={**answer, "model": self.name})
        return Reply(events=await _begun(answer))

    async def score(self, call: ChatCall, answer: str) -> Agreement:
        """How likely the surrogate finds an answer to the call's messages; see `ScoringEngine.score`.

        Raises:
            EngineUnavailable, EngineRefused: as in `chat`.
            EngineError: it cannot be told which tokens are the answer's.
        """
        messages = call.body["messages"]
        opening = await self._serving.prompt_tokens({**question_body(messages), "model": self.name})
        reply = await self.chat(replace(call, body=scoring_body(messages, answer)))
        assert reply.body is not None, "a request without stream=true is answered whole"
        return agreement_from_prompt(reply.body, opening)

    async def load(self, ref: AdapterRef) -> None:
        """Make an adapter servable; the caller holds it. Its first load since the process began is proven.

        Raises:
            EngineUnavailable: it is not fit to be loaded, or the engine could not load it.
            AdapterRejected: the engine does not serve it as it was trained.
        """
        await self._loaded.load(ref)
        signature = self._loaded.signature(ref.name)
        if signature is None:
            return
        if ref.name not in self._proven:
            async with self._proving:
                if ref.name not in self._proven:
                    self._proven[ref.name] = await self._prove(ref, signature)
        if self._proven[ref.name]:
            raise AdapterRejected(ref.name, [self._proven[ref.name]])

    def prefetch(self, ref: AdapterRef) -> None:
        """Begin to load an adapter, without waiting for it."""
        self._loaded.prefetch(ref)

    async def unload(self, ref: AdapterRef) -> None:
        """Free an adapter's memory. The caller sees to it that no request uses it, now or later.

        Raises:
            EngineUnavailable: the engine did not answer.
        """
        await self._loaded.unload(ref)
        self._proven.pop(ref.name, None)

    def loaded(self) -> tuple[AdapterRef, ...]:
        """Adapters in service."""
        return self._loaded.resident()

    async def _prove(self, ref: AdapterRef, signature: Signature) -> str:
        """What is wrong with how the engine serves an adapter; empty where nothing is."""
        if signature.tokens not in self._plain:
            self._plain[signature.tokens] = await self._read(self.name, signature)
        adapted = await self._read(ref.name, signature)
        found = compare(signature, self._plain[signature.tokens], adapted)
        logger.info("adapter %s: %s", ref.name, found)
        if found.agrees:
            return ""
        self._loaded.meter.rejected()
        numbers = ", ".join(f"{name} {value:g}" for name, value in found.numbers().items())
        return f"the engine does not serve what was trained: found {numbers} (nats per token)"

    async def _read(self, model: str, signature: Signature) -> tuple[float, ...]:
        body = await self._serving.complete_text(reading_body(model, signature), None)
        if not isinstance(body, Mapping):
            raise EngineUnavailable("the engine streamed what was to come whole")
        return logprobs_read(body, signature)


async def _begun(events: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    """The same stream, once its first event has arrived.

    Raises:
        EngineRefused: the stream began with a refusal.
        EngineUnavailable: the stream ended, or began with another error.
    """
    try:
        first = await anext(events, None)
    except asyncio.CancelledError:
        await events.aclose()
        raise
    if first is None:
        raise EngineUnavailable("the surrogate's stream ended before its first token")
    if (refused := refusal(first)) is not None:
        await events.aclose()
        raise refused
    if (failure := _failure(first)) is not None:
        await events.aclose()
        raise EngineUnavailable(f"the surrogate failed before its first token: {failure}")
    return _from(first, events)


async def _from(first: str, events: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    try:
        yield first
        async for event in events:
            if (failure := _failure(event)) is not None:
                raise EngineUnavailable(f"the surrogate failed in the middle of an answer: {failure}")
            yield event
    finally:
        await events.aclose()


def _failure(event: str) -> str | None:
    """The type of error an event reports, if it reports one."""
    error = error_of(event)
    return None if error is None else str(error.get("type", "unknown"))
