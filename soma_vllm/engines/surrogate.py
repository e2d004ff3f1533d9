"""The surrogate: a vLLM engine in this process, with one adapter per session.

Guarantees: an adapter is servable from the moment `load` returns until `unload`; both are idempotent, and
two loads of one adapter are one load; a reply is handed over only after its first event has arrived, so a
failure before the first token is still an exception that another engine can make good.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any, Protocol

from soma_vllm.engines.base import ChatCall, Reply, Salts
from soma_vllm.errors import EngineUnavailable
from soma_vllm.types import AdapterRef


class ChatServing(Protocol):
    """What this engine needs of vLLM: `vllm_internals.PrivateChat`."""

    async def complete(
        self, body: Mapping[str, Any], http: Any
    ) -> Mapping[str, Any] | AsyncGenerator[str, None]: ...
    async def complete_text(
        self, body: Mapping[str, Any], http: Any
    ) -> Mapping[str, Any] | AsyncGenerator[str, None]: ...
    async def add(self, ref: AdapterRef) -> None: ...
    async def remove(self, ref: AdapterRef) -> None: ...


class AdapterFiles(Protocol):
    """Where adapters' files come from."""

    async def at_hand(self, ref: AdapterRef) -> AdapterRef:
        """An adapter whose files lie on this machine, whole. Raises EngineUnavailable."""
        ...


class FilesInPlace:
    """Adapters whose files lie where their references say."""

    async def at_hand(self, ref: AdapterRef) -> AdapterRef:
        """The same adapter, if its files are there. Raises EngineUnavailable."""
        if not await asyncio.to_thread(Path(ref.path, "adapter_config.json").is_file):
            raise EngineUnavailable(f"adapter {ref.name} has no files")
        return ref


class SurrogateEngine:
    """Chat completions of the small model, plain or under an adapter."""

    def __init__(
        self,
        name: str,
        serving: ChatServing,
        salts: Salts | None = None,
        files: AdapterFiles | None = None,
    ) -> None:
        self.name = name
        self._files = files or FilesInPlace()
        self._salts = salts or Salts()
        self._serving = serving
        self._loaded: dict[str, AdapterRef] = {}
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def chat(self, call: ChatCall) -> Reply:
        """Answer one chat completion; the call's adapter must be loaded.

        Raises:
            EngineUnavailable: the adapter is not loaded, or the engine broke before its first token.
            EngineRefused: vLLM found the request wrong.
        """
        if call.adapter is not None and call.adapter.name not in self._loaded:
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

    async def load(self, ref: AdapterRef) -> None:
        """Make an adapter servable.

        Raises:
            EngineUnavailable: the engine could not load it.
        """
        async with self._locks[ref.name]:
            if ref.name not in self._loaded:
                # Looked at here: vLLM would find out in its engine process, and take everybody's requests down.
                here = await self._files.at_hand(ref)
                await self._serving.add(here)
                self._loaded[ref.name] = here

    async def unload(self, ref: AdapterRef) -> None:
        """Free an adapter's memory. The caller sees to it that no request uses it."""
        async with self._locks[ref.name]:
            if self._loaded.pop(ref.name, None) is not None:
                await self._serving.remove(ref)
        self._locks.pop(ref.name, None)

    def loaded(self) -> tuple[AdapterRef, ...]:
        """Adapters in service."""
        return tuple(self._loaded.values())


async def _begun(events: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    """The same stream, once its first event has arrived.

    Raises:
        EngineUnavailable: the stream ended, or began with an error.
    """
    try:
        first = await anext(events, None)
    except asyncio.CancelledError:
        await events.aclose()
        raise
    if first is None:
        raise EngineUnavailable("the surrogate's stream ended before its first token")
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
    if not event.startswith('data: {"error"'):
        return None
    error = json.loads(event.removeprefix("data: ")).get("error", {})
    return str(error.get("type", "unknown"))
