"""The original over HTTP: any OpenAI-compatible endpoint, or the vLLM server we started as a child.

Guarantees: the port's own (`engines/engine.py`); the client's body goes out as it came, but for the model's
name and, towards our own child, the `priority` and the `cache_salt` that keeps tenants' prefix caches apart (no
client chooses its priority at a vLLM); the client's API key is never sent on, and ours never logged; a
generation may take as long as it takes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp

from soma_vllm.engines.engine import ChatCall, Events, Reply, Salts, refusal
from soma_vllm.engines.prompt_scoring import agreement_from_prompt, scoring_body
from soma_vllm.engines.sse import DONE, SSEParser
from soma_vllm.engines.stream_tap import StreamTap
from soma_vllm.engines.supervisor import State, Supervisor
from soma_vllm.errors import EngineError, EngineRefused, EngineUnavailable, PreflightError
from soma_vllm.types import Agreement

_GATEWAY_ERRORS = (502, 503, 504)
_OUR_KEY_ERRORS = (401, 403)
_BROKEN = (aiohttp.ClientError, TimeoutError, OSError)

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
            key = os.environ.get(api_key_env)
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
        return Reply(body=await self._read(self._post(call)))

    async def score(self, call: ChatCall, answer: str) -> Agreement:
        """How likely the original finds an answer to the call's messages; see `ScoringEngine.score`.

        Raises:
            EngineUnavailable, EngineRefused: as in `chat`.
            EngineError: the endpoint is no vLLM, or it cannot be told which tokens are the answer's.
        """
        if not self.speaks_vllm:
            raise EngineError("found an original that does not speak vLLM; expected one, to score an answer")
        self._require_child()
        question = {"model": self.name, **call.body}
        url = f"{self._url.removesuffix('/v1')}/tokenize"
        opening = await self._read(self._client().post(url, json=question))
        tokens = opening.get("tokens")
        if not isinstance(tokens, list):
            raise EngineError("found no tokens in the original's /tokenize; expected a list")
        scored = await self._read(self._post(replace(call, body=scoring_body(call.body, answer))))
        return agreement_from_prompt(scored, tokens)

    async def close(self) -> None:
        """Close all connections. Idempotent."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _read(self, posted: Any) -> dict[str, Any]:
        """The JSON object that a request is answered with."""
        with _failures_as_unavailable():
            async with posted as response:
                await self._refuse_errors(response)
                try:
                    body = await response.json(content_type=None)
                except ValueError as error:
                    raise EngineUnavailable("the original answered 200 with a body that is not JSON") from error
        if not isinstance(body, dict):
            raise EngineUnavailable(f"the original answered a {type(body).__name__}; expected an object")
        return body

    async def _stream(self, call: ChatCall) -> Events:
        """The events of a reply, once the first has arrived."""
        with _failures_as_unavailable():
            response: aiohttp.ClientResponse = await self._post(call)

        async def hang_up() -> None:
            # Unread events remain when the client has left: the closed connection stops the generation.
            response.close()

        events = _events(response.content)
        try:
            with _failures_as_unavailable():
                await self._refuse_errors(response)
            first = await anext(events)
            if (refused := refusal(first)) is not None:
                raise refused
        except BaseException:
            await events.aclose()
            response.close()
            raise
        return StreamTap(events, on_end=hang_up, first=first)

    def _post(self, call: ChatCall) -> Any:
        body = {**call.body, "model": self.name}
        if self.speaks_vllm:
            # Never the client's own. Someone else's vLLM may not schedule by priority, and would refuse it.
            body.pop("priority", None)
        if self._socket is not None:
            body["priority"] = call.priority
            body["cache_salt"] = _salt(self._salts.of(call.tenant), body.get("cache_salt"))
        path = "completions" if call.text else "chat/completions"
        return self._client().post(f"{self._url}/{path}", json=body)

    async def _refuse_errors(self, response: aiohttp.ClientResponse) -> None:
        status = response.status
        if status < 400:
            return
        if status in _GATEWAY_ERRORS:
            retry_after = response.headers.get("Retry-After", "")
            wait = float(retry_after) if retry_after.isdecimal() else 5.0
            raise EngineUnavailable(f"the original answered with status {status}", retry_after=wait)
        if status in _OUR_KEY_ERRORS:
            # The client cannot correct it, and the body may quote a part of our key.
            where = f"the key in {self._key_source}" if self._key_source else "requests without a key"
            raise EngineUnavailable(f"the original answered with status {status} to {where}")
        try:
            body = json.loads(await response.read())
        except ValueError:
            body = None
        if not isinstance(body, dict):
            message = f"the original answered with status {status} and no JSON object"
            body = {"error": {"message": message, "type": "upstream_error", "param": None, "code": status}}
        raise EngineRefused(status, body)

    def _require_child(self) -> None:
        if self._supervisor is not None and self._supervisor.state is not State.READY:
            raise EngineUnavailable(f"the original is {self._supervisor.state}")

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


@contextlib.contextmanager
def _failures_as_unavailable() -> Iterator[None]:
    """Raises EngineUnavailable where the connection fails."""
    try:
        yield
    except _BROKEN as error:
        # The class alone: a message of aiohttp may quote what was sent.
        why = type(error).__name__
        raise EngineUnavailable(f"the original cannot be reached or broke off: {why}") from error


async def _events(content: aiohttp.StreamReader) -> AsyncGenerator[str, None]:
    """The events of a reply up to its end mark, each as it is sent on: its data and type, no comments or ids.

    Raises:
        EngineUnavailable: the connection fails, or ends before `data: [DONE]`.
    """
    parser = SSEParser()
    with _failures_as_unavailable():
        async for piece in content.iter_any():
            for event in parser.feed(piece):
                yield str(event)
                if event.data.strip() == DONE:
                    return
    raise EngineUnavailable("the original's stream ended without data: [DONE]")
