"""OpenAI's client in both of its kinds, the synchronous and the asynchronous one, asked alike."""

from __future__ import annotations

import asyncio
from typing import Any

from openai import AsyncOpenAI

from support.guard import GUARD_S
from support.server import Running

QUERY = [{"role": "user", "content": "tell me something"}]


class Client:
    """One kind of the client, asked alike."""

    def __init__(self, running: Running, kind: str, key: str) -> None:
        self._sync = running.client(key)
        self._async = AsyncOpenAI(base_url=f"{running.root}/v1", api_key=key, max_retries=0, timeout=GUARD_S)
        self._kind = kind

    async def chat(self, **request: Any) -> tuple[Any, Any]:
        """(headers, the completion)."""
        request = {"model": "soma", "messages": QUERY, "max_tokens": 8, "temperature": 0, **request}
        if self._kind == "sync":
            raw = await asyncio.to_thread(self._sync.chat.completions.with_raw_response.create, **request)
            return raw.headers, raw.parse()
        raw = await self._async.chat.completions.with_raw_response.create(**request)
        return raw.headers, raw.parse()

    async def chunks(self, **request: Any) -> list[Any]:
        """The chunks of a stream."""
        request = {"model": "soma", "messages": QUERY, "max_tokens": 8, "temperature": 0, **request}
        if self._kind == "sync":
            return await asyncio.to_thread(
                lambda: list(self._sync.chat.completions.create(**request, stream=True))
            )
        return [chunk async for chunk in await self._async.chat.completions.create(**request, stream=True)]

    async def call(self, resource: str, **request: Any) -> Any:
        """Any other call, such as `models.retrieve`; a stream comes as a list."""
        client = self._sync if self._kind == "sync" else self._async
        for name in resource.split("."):
            client = getattr(client, name)
        if self._kind == "sync":
            found = await asyncio.to_thread(client, **request)
            return list(found) if request.get("stream") else found
        found = await client(**request)
        return [event async for event in found] if request.get("stream") else found

    async def close(self) -> None:
        await self._async.close()
