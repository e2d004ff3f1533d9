"""The surrogate: a vLLM engine in this process, with one adapter per session.

Guarantees: an adapter is servable from the moment `load` returns for as long as it is held, and is served as it
was trained; a reply is handed over only after its first event has arrived, so a failure before the first token
is still an exception that another engine can make good. Which adapters lie in the engine's memory is decided by
`adapters/loaded.py`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from typing import Any, Protocol

from soma_vllm.adapters.loaded import LoadedAdapters, Loading
from soma_vllm.engines.adapter_probe import compare, logprobs_read, reading_body
from soma_vllm.engines.engine import ChatCall, Events, Reply, Salts, error_of, refusal
from soma_vllm.engines.prompt_scoring import agreement_from_prompt, scoring_body
from soma_vllm.engines.stream_tap import StreamTap
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
        return Reply(events=await _after_first_event(answer))

    async def prompt(self, call: ChatCall) -> tuple[int, ...]:
        """The token ids of a call's prompt; see `AdapterEngine.prompt`."""
        return tuple(await self._serving.prompt_tokens({**call.body, "model": self.name}))

    async def score(self, call: ChatCall, answer: str) -> Agreement:
        """How likely the surrogate finds an answer to the call's messages; see `ScoringEngine.score`.

        Raises:
            EngineUnavailable, EngineRefused: as in `chat`.
            EngineError: it cannot be told which tokens are the answer's.
        """
        opening = await self.prompt(call)
        reply = await self.chat(replace(call, body=scoring_body(call.body, answer)))
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
        if found.agrees:
            logger.info("adapter %s is served as it was trained: %s", ref.name, found)
            return ""
        logger.warning("adapter %s is not served as it was trained, and will not serve: %s", ref.name, found)
        self._loaded.meter.rejected()
        numbers = ", ".join(f"{name} {value:g}" for name, value in found.numbers().items())
        return f"the engine does not serve what was trained: found {numbers} (nats per token)"

    async def _read(self, model: str, signature: Signature) -> tuple[float, ...]:
        body = await self._serving.complete_text(reading_body(model, signature), None)
        if not isinstance(body, Mapping):
            raise EngineUnavailable("the engine streamed what was to come whole")
        return logprobs_read(body, signature)


async def _after_first_event(events: AsyncGenerator[str, None]) -> Events:
    """The same stream, once its first event has arrived.

    Raises:
        EngineRefused: the stream began with a refusal.
        EngineUnavailable: the stream ended, or began with another error.
    """
    try:
        first = await anext(events, None)
        if first is None:
            raise EngineUnavailable("the surrogate's stream ended before its first token")
        if (refused := refusal(first)) is not None:
            raise refused
        if (failure := _failure(first)) is not None:
            raise EngineUnavailable(f"the surrogate failed before its first token: {failure}")
    except BaseException:
        await events.aclose()
        raise
    return StreamTap(events, on_event=_require_no_failure, first=first)


def _require_no_failure(event: str) -> str:
    if (failure := _failure(event)) is not None:
        raise EngineUnavailable(f"the surrogate failed in the middle of an answer: {failure}")
    return event


def _failure(event: str) -> str | None:
    """The type of error an event reports, if it reports one."""
    error = error_of(event)
    return None if error is None else str(error.get("type", "unknown"))
