"""The port to an engine: one verb, `chat`, and a reply that is either whole or a stream.

The dispatcher sees nothing else of an engine; an audit may also ask the original to `score`. Guarantees every
implementation keeps:

* `chat` raises `EngineUnavailable` or `EngineRefused` before it yields anything, or returns a `Reply`.
* Closing a stream early (`aclose`) or cancelling `chat` stops the generation on the engine.
* A stream that breaks after its first event raises `EngineUnavailable` from the iterator.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from soma_vllm.adapters.lifecycle import AdapterLifecycle
from soma_vllm.engines.sse import data_of
from soma_vllm.errors import EngineRefused
from soma_vllm.types import AdapterRef, Agreement, Role


@dataclass(frozen=True)
class ChatCall:
    """One OpenAI completion to run."""

    body: Mapping[str, Any]
    """The client's JSON body with `messages` already routed. The engine puts its own model name in."""
    adapter: AdapterRef | None = None
    """Adapter to serve with; only the surrogate takes one."""
    tenant: str = "public"
    """Isolates prefix caches: becomes vLLM's `cache_salt` where the engine is a vLLM."""
    http: Any = None
    """The client's HTTP request, where there is one, for its headers and disconnects."""
    background: bool = False
    """No user waits for it; a vLLM engine schedules users' requests first."""
    text: bool = False
    """It is a text completion (`/v1/completions`): `prompt` and no messages."""

    @property
    def priority(self) -> int:
        """vLLM's, lower is earlier. Never the client's own, which could overtake other clients."""
        return int(self.background)


def error_of(event: str) -> Mapping[str, Any] | None:
    """The error that an event of a stream reports, if it reports one."""
    data = data_of(event) if '"error"' in event else None
    try:
        found = json.loads(data or "null")
    except (ValueError, RecursionError):
        return None
    error = found.get("error") if isinstance(found, dict) else None
    if not error:
        return None  # some endpoints write "error": null into every event
    return error if isinstance(error, dict) else {"message": str(error)}


def refusal(event: str) -> EngineRefused | None:
    """What a stream's first event refuses: vLLM finds some requests wrong only once their stream is open."""
    error = error_of(event) or {}
    status = error.get("code")
    # Not 5xx: that is a failure, and another engine may make it good.
    if not isinstance(status, int) or status not in CLIENTS_ERRORS:
        return None
    return EngineRefused(status, {"error": error})


CLIENTS_ERRORS = range(400, 500)
"""Statuses that say that the request was wrong."""


class Salts:
    """What keeps tenants' prefix caches apart in a vLLM: each tenant's `cache_salt`, until it is renewed.

    An engine's cache dies with its process, so nothing needs to be remembered longer than that.
    """

    def __init__(self) -> None:
        self._renewed: dict[str, str] = {}

    def of(self, tenant: str) -> str:
        """The salt of a tenant's requests now."""
        return self._renewed.get(tenant, tenant)

    def renew(self, tenant: str) -> None:
        """Make everything that is cached for a tenant unreachable."""
        self._renewed[tenant] = f"{tenant}-{secrets.token_hex(8)}"


class Events(Protocol):
    """Server-sent events as text, each `data: …\\n\\n`, the last `data: [DONE]`. Async generators are such."""

    def __aiter__(self) -> AsyncIterator[str]: ...
    async def __anext__(self) -> str: ...
    async def aclose(self) -> None:
        """Stop the generation; harmless when it is over."""
        ...


@dataclass(frozen=True)
class Reply:
    """What an engine answered. Exactly one of `body` and `events` is set."""

    body: Mapping[str, Any] | None = None
    """A whole `chat.completion` object."""
    events: Events | None = None
    """A stream of events; the receiver closes it."""


class Engine(Protocol):
    """Something that answers OpenAI chat completions."""

    name: str
    """Model name as served; a request may ask for it directly."""

    async def chat(self, call: ChatCall) -> Reply:
        """Answer one chat completion.

        Raises:
            EngineUnavailable: the engine is not running, or broke before its first token.
            EngineRefused: the engine answered with an OpenAI error of its own.
        """
        ...


class ScoringEngine(Engine, Protocol):
    """An engine that can also score an answer that it did not give."""

    async def score(self, call: ChatCall, answer: str) -> Agreement:
        """How the engine itself would have answered, measured on `answer`: one prefill, no decoding.

        Raises:
            EngineError: it could not.
        """
        ...


class AdapterEngine(ScoringEngine, Protocol):
    """An engine that serves adapters and scores answers. An adapter is leased before it is loaded, so that it
    is not evicted."""

    async def prompt(self, call: ChatCall) -> tuple[int, ...]:
        """The token ids that the engine reads for a call; nothing is generated.

        Raises:
            EngineRefused: it would refuse the call; `cause` says why.
            EngineUnavailable: it is not running.
        """
        ...

    def prefetch(self, ref: AdapterRef) -> None: ...
    async def load(self, ref: AdapterRef) -> None: ...
    async def unload(self, ref: AdapterRef) -> None: ...


@dataclass(frozen=True)
class Engines:
    """The pair, as users are served by it."""

    original: Engine
    surrogate: AdapterEngine
    adapters: AdapterLifecycle
    """The surrogate's."""

    def named(self, role: Role) -> str:
        """The name of an engine's model."""
        return self.original.name if role is Role.ORIGINAL else self.surrogate.name
