"""The original over HTTP: any OpenAI-compatible endpoint, or the vLLM server we started as a child.

Guarantees: the port's own (`engines/engine.py`); the client's body goes out as it came, but for the model's
name, the fields that are meant for this server (`OWN_FIELDS`) and, towards our own child, the `priority` and
the `cache_salt` that keeps tenants' prefix caches apart (no client chooses its priority at a vLLM). Of headers
the request's id and its trace go on; the client's API key is never sent on, and ours never logged. Whatever
dialect an endpoint speaks, its answers and errors come out in OpenAI's shape: a stream where one was asked for,
a whole completion otherwise. How long they may take is bounded in `guarded_original.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp

from soma_vllm import logs
from soma_vllm.engines.dialect import completion_from, completion_of, event_of
from soma_vllm.engines.engine import ChatCall, Events, Reply, Salts
from soma_vllm.engines.prompt_scoring import agreement_from_prompt, scoring_body
from soma_vllm.engines.sse import DONE, SSEParser
from soma_vllm.engines.stream_tap import StreamTap
from soma_vllm.engines.supervisor import State, Supervisor
from soma_vllm.engines.upstream_errors import failure
from soma_vllm.engines.upstream_http import events_in, head_of, passed_on, whole
from soma_vllm.errors import (
    EngineError,
    EngineNotReady,
    EngineUnavailable,
    PreflightError,
)
from soma_vllm.private import secret
from soma_vllm.types import Agreement

OWN_FIELDS = ("session_id", "litellm_session_id", "workload")
"""Fields of a body, and of its `metadata`, that are meant for this server."""

TRACE_HEADERS = ("traceparent", "tracestate")
MAX_TRACE_CHARS = 512

_IDLE_SECONDS = 4.0
"""Idle connections close before a server's keep-alive does (5 s in uvicorn): none is reused half-closed."""


class OriginalEngine:
    """`Engine` behind an HTTP base URL (".../v1"), reached over TCP or over a Unix socket."""

    def __init__(
        self,
        name: str,
        base_url: str,
        *,
        api_key_env: str | None = None,
        connect_timeout_s: float = 5.0,
        speaks_vllm: bool = False,
        socket: Path | None = None,
    ) -> None:
        """`api_key_env` names the environment variable that holds the endpoint's key.

        `speaks_vllm` says that the endpoint takes vLLM's own extensions, as our child always does; `socket`
        marks that child.

        Raises:
            PreflightError: the environment variable is not set.
        """
        self.name = name
        self.speaks_vllm = speaks_vllm
        self._url = base_url.rstrip("/")
        self._headers = {"Accept-Encoding": "identity"}
        self._key_source = api_key_env
        if api_key_env is not None:
            key = secret(api_key_env)
            if not key:
                raise PreflightError(f"original.api_key_env: the environment variable {api_key_env} is not set")
            self._headers["Authorization"] = f"Bearer {key}"
        self._connect_timeout = connect_timeout_s
        self._socket = socket
        self._supervisor: Supervisor | None = None
        self._salts = Salts()
        self._session: aiohttp.ClientSession | None = None

    @classmethod
    def of_child(
        cls, name: str, supervisor: Supervisor, connect_timeout_s: float = 5.0, salts: Salts | None = None
    ) -> OriginalEngine:
        """The engine of a supervised child server; it is asked only while its supervisor says it is ready."""
        url, socket = "http://original/v1", supervisor.child.socket
        engine = cls(name, url, connect_timeout_s=connect_timeout_s, speaks_vllm=True, socket=socket)
        engine._supervisor = supervisor
        engine._salts = salts or engine._salts
        return engine

    async def chat(self, call: ChatCall) -> Reply:
        """Answer one chat completion; see `Engine.chat`."""
        assert call.adapter is None, "only the surrogate serves adapters"
        self._require_child()
        if call.body.get("stream"):
            return Reply(events=await self._stream(call))
        return Reply(body=await self._complete(call))

    async def score(self, call: ChatCall, answer: str) -> Agreement:
        """How likely the original finds an answer to the call's messages; see `ScoringEngine.score`.

        Raises:
            EngineUnavailable, EngineRefused: as in `chat`.
            EngineError: the endpoint is no vLLM, or it cannot be told which tokens are the answer's.
        """
        if not self.speaks_vllm:
            raise EngineError("found an original that does not speak vLLM; expected one, to score an answer")
        self._require_child()
        opening = await self.tokenizer("tokenize", _tokenize_body(call.body))
        tokens = opening.get("tokens")
        if not isinstance(tokens, list):
            raise EngineError("found no tokens in the original's /tokenize; expected a list")
        scored = await self._read(self._post(replace(call, body=scoring_body(call.body, answer))))
        return agreement_from_prompt(scored, tokens)

    async def tokenizer(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """What the original's vLLM answers at `tokenize` or `detokenize`, beside the base URL.

        Raises:
            EngineUnavailable, EngineRefused: as in `chat`.
        """
        self._require_child()
        url = f"{self._url.removesuffix('/v1')}/{path}"
        return await self._read(self._client().post(url, json={**body, "model": self.name}))

    async def close(self) -> None:
        """Close all connections. Idempotent."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _read(self, posted: Any) -> dict[str, Any]:
        """The JSON object that a request is answered with."""
        async with await head_of(posted) as response:
            await self._refuse_errors(response)
            raw = await whole(response.content)
        try:
            found = json.loads(raw)
        except (ValueError, RecursionError):
            raise EngineUnavailable("the original answered 200 with a body that is not JSON") from None
        if not isinstance(found, dict):
            raise EngineUnavailable(f"the original answered a {type(found).__name__}; expected an object")
        return found

    async def _complete(self, call: ChatCall) -> dict[str, Any]:
        """The whole completion that a call is answered with, also by an endpoint that streams it."""
        async with await head_of(self._post(call)) as response:
            await self._refuse_errors(response)
            raw = await whole(response.content)
        if not raw.startswith((b"{", b"[")):
            events = SSEParser().feed(raw + b"\n\n")
            try:
                shaped = [event_of(event) for event in events if event.data.strip() != DONE]
                found = completion_from(event for event in shaped if event is not None)
            except (TypeError, ValueError):
                found = {}
            if found.get("choices"):
                return found
        try:
            return completion_of(json.loads(raw))
        except (ValueError, RecursionError):
            raise EngineUnavailable("the original answered 200 with a body that is not JSON") from None

    async def _stream(self, call: ChatCall) -> Events:
        """The events of a reply, once the first has arrived."""
        response = await head_of(self._post(call))

        async def hang_up() -> None:
            # Unread events remain when the client has left: the closed connection stops the generation.
            response.close()

        n = call.body.get("n")
        choices = n if isinstance(n, int) and n > 1 else 1
        events = events_in(response.content, passed_on if self.speaks_vllm else event_of, choices)
        try:
            await self._refuse_errors(response)
            first = await anext(events)
        except BaseException:
            await events.aclose()
            response.close()
            raise
        return StreamTap(events, on_end=hang_up, first=first)

    def _post(self, call: ChatCall) -> Any:
        body = {**_without_own(call.body), "model": self.name}
        if self.speaks_vllm:
            # Never the client's own. Someone else's vLLM may not schedule by priority, and would refuse it.
            body.pop("priority", None)
        if self._socket is not None:
            body["priority"] = call.priority
            body["cache_salt"] = _salt(self._salts.of(call.tenant), body.get("cache_salt"))
        path = "completions" if call.text else "chat/completions"
        return self._client().post(f"{self._url}/{path}", json=body, headers=_passed_headers(call))

    async def _refuse_errors(self, response: aiohttp.ClientResponse) -> None:
        if response.status < 400:
            return
        source = f"the key in {self._key_source}" if self._key_source else "requests without a key"
        try:
            found = json.loads(await whole(response.content))
        except (ValueError, RecursionError, EngineUnavailable):
            found = None
        raise failure(response.status, found, response.headers, source)

    def _require_child(self) -> None:
        if self._supervisor is not None and self._supervisor.state is not State.READY:
            raise EngineNotReady(f"the original is {self._supervisor.state}")

    def _client(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = (
                # A fresh connection to a socket costs microseconds and is never a stale one.
                aiohttp.UnixConnector(str(self._socket), limit=0, force_close=True)
                if self._socket is not None
                else aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_SECONDS)
            )
            self._session = aiohttp.ClientSession(
                connector=connector,
                headers=self._headers,
                timeout=aiohttp.ClientTimeout(total=None, connect=self._connect_timeout),
            )
        return self._session


def _salt(tenant: str, own: object) -> object:
    """A cache salt no other tenant can name. One that is not a string passes through, for vLLM to refuse."""
    if own is None:
        return tenant
    if not isinstance(own, str):
        return own
    return hashlib.sha256(f"{tenant}\0{own}".encode()).hexdigest()


def _without_own(body: Mapping[str, Any]) -> dict[str, Any]:
    """A body without the fields that are meant for this server: OpenAI refuses what it does not know."""
    sent = {name: value for name, value in body.items() if name not in OWN_FIELDS}
    metadata = body.get("metadata")
    if isinstance(metadata, Mapping) and not metadata.keys().isdisjoint(OWN_FIELDS):
        sent["metadata"] = {name: value for name, value in metadata.items() if name not in OWN_FIELDS}
        if not sent["metadata"]:
            del sent["metadata"]
    return sent


def _passed_headers(call: ChatCall) -> dict[str, str]:
    """The request's id and its place in a trace."""
    client = getattr(call.http, "headers", None) or {}
    found = {name: client.get(name) for name in TRACE_HEADERS} | {"X-Request-Id": logs.request_id.get()}
    return {
        name: value
        for name, value in found.items()
        if value and len(value) <= MAX_TRACE_CHARS and value.isascii() and value.isprintable()
    }


def _tokenize_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """A chat request for vLLM's tokenize, which hands these two to the template only among its arguments."""
    apart = {name: body[name] for name in ("documents", "reasoning_effort") if body.get(name)}
    arguments = {**apart, **(body.get("chat_template_kwargs") or {})}
    return {**body, "chat_template_kwargs": arguments} if arguments else dict(body)
