"""vLLM's own application with every route and check of ours, before engines that answer at once.

What a request meets is what it meets in soma-serve, from the access control to the database; only the engines
are not: no real one answers thousands of requests in a minute. They say which markers they heard, so that a
word of one tenant in another's answer is found.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from soma_vllm.api.auth.quotas import Quotas
from soma_vllm.api.draining import Draining
from soma_vllm.api.plugin import HOST
from soma_vllm.api.readiness import Readiness
from soma_vllm.config import parse_config
from soma_vllm.engines.engine import ChatCall, Reply
from soma_vllm.sessions.sql.api_keys import KeyStore
from soma_vllm.sessions.sql.store import SessionStore
from support.fakes import FakeOriginal, FakeSurrogate
from support.guard import GUARD_S
from support.services import SETTINGS, Services

ADMIN = "the-admin-of-this-house"

MARKER = re.compile(r"marker-(\w+)-of-a-tenant")
"""What tenants say, so that it is known whose words they are."""


def marker(tenant: str) -> str:
    return f"marker-{tenant}-of-a-tenant"


def tenant_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def heard(call: ChatCall) -> set[str]:
    """Whose markers an engine is told."""
    return set(MARKER.findall(json.dumps([call.body.get("messages"), call.body.get("prompt")])))


class EchoingOriginal(FakeOriginal):
    """Answers with the markers it was told."""

    async def chat(self, call: ChatCall) -> Reply:
        self.answers = ["heard " + " ".join(marker(found) for found in sorted(heard(call)))]
        reply: Reply = await super().chat(call)
        return reply


class EchoingSurrogate(FakeSurrogate):
    """The same."""

    async def chat(self, call: ChatCall) -> Reply:
        self.answers = ["also heard " + " ".join(marker(found) for found in sorted(heard(call)))]
        reply: Reply = await super().chat(call)
        return reply


class FakeHost:
    """soma-serve, as the plugin sees it, around a house of fakes."""

    def __init__(self, services: Services, quotas: Quotas) -> None:
        self.quotas = quotas
        self.draining = Draining(1.0, lambda line: None)
        self.readiness = Readiness()
        self.server = services.config.server
        self.started_at = 1_700_000_000.0
        self._house = services

    async def begin(self, engine_client: Any, state: Any) -> Services:
        await self._house.start()
        return self._house

    def models(self) -> dict[str, int | None]:
        return {"soma": 2048, self._house.original.name: 2048, self._house.surrogate.name: 1024}

    async def original_tokenizer(self, path: str, body: Any, required: bool) -> Any:
        return {"tokens": [1, 2, 3], "count": 3, "max_model_len": 2048}


class SurfaceHouse:
    """The application, and the house behind it. Any key is a tenant of its own; `ADMIN` is the admin's."""

    def __init__(self, app: FastAPI, services: Services, store: SessionStore, keys: KeyStore) -> None:
        self.app = app
        self.services = services
        self._store = store
        self._keys = keys
        # What the application raises is answered as a server would answer: the answer is judged.
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        self._client = httpx.AsyncClient(transport=transport, base_url="http://soma")
        self.sent: Counter[str] = Counter()
        """Requests by path."""

    @classmethod
    async def built(
        cls, folder: Path, parts: Mapping[str, Any] | None = None, url: str | None = None, **changes: Any
    ) -> SurfaceHouse:
        """`parts` replace some of what `Services` takes, `changes` sections of the configuration."""
        config = parse_config({**SETTINGS, **changes}, "test")
        url = url or f"sqlite+aiosqlite:///{folder}/s.db"
        store = SessionStore(url)
        await store.open()
        engines = {"original": EchoingOriginal(), "surrogate": EchoingSurrogate()}
        services = Services(config, store, **{**engines, **(parts or {})})
        keys = KeyStore.at(url)
        environment = {config.access.admin_key_env: ADMIN}
        quotas = Quotas.configured(config, keys, environment, CollectorRegistry())
        app = vllm_application(FakeHost(services, quotas))
        for plugin in app.state.endpoint_plugins:
            await plugin.init_state(None, app.state, app.state.args)
        return cls(app, services, store, keys)

    async def send(self, method: str, path: str, key: str | None = "k", **more: Any) -> httpx.Response:
        """The answer to a request; `json` may hold what UTF-8 cannot.

        Raises:
            TimeoutError: there is none.
        """
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        if "json" in more:
            more["content"] = json.dumps(more.pop("json"))
            headers["Content-Type"] = "application/json"
        headers |= more.pop("headers", {})
        self.sent[path] += 1
        async with asyncio.timeout(GUARD_S):
            return await self._client.request(method, path, headers=headers, **more)

    async def settled(self) -> None:
        """Return when no background work is left, and everything is on record."""
        await self.services.settled()
        await self.services.registry.written()

    async def close(self) -> None:
        await self._client.aclose()
        await self.services.stop()
        await self._store.close()
        await self._keys.close()


def vllm_application(host: FakeHost) -> FastAPI:
    """The application that vLLM builds around a model that generates, with our plugin attached."""
    from vllm.entrypoints.launchers.app import build_app

    from soma_vllm.engines.vllm.internals import parse_arguments

    arguments = parse_arguments(["--model", "none", "--disable-uvicorn-access-log"])
    setattr(arguments, HOST, host)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_PLUGINS", "soma")
        return build_app(arguments, ("generate",))
