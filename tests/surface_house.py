"""vLLM's own application with every route and check of ours, before engines that answer at once.

What a request meets is what it meets in soma-serve, from the access control to the database; only the engines
are not: no real one answers thousands of requests in a minute.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from scheduler_house import SETTINGS, House  # type: ignore[import-not-found]

from soma_vllm.api.allowances import Allowances
from soma_vllm.api.plugin import HOST
from soma_vllm.config import parse_config
from soma_vllm.scheduler.custody import Custody
from soma_vllm.scheduler.dispatcher import Dispatcher
from soma_vllm.storage.keys import KeyStore
from soma_vllm.storage.sessions import SessionStore

ADMIN = "the-admin-of-this-house"


class FakeHost:
    """soma-serve, as the plugin sees it, around a house of fakes."""

    def __init__(self, house: House, allowances: Allowances) -> None:
        self.allowances = allowances
        self.extra_routes: bool = house.config.server.extra_routes
        self._house = house

    async def begin(self, engine_client: Any, state: Any) -> tuple[Dispatcher, Custody]:
        await self._house.book.start()
        await self._house.custody.start()
        return self._house.dispatcher, self._house.custody

    def models(self) -> list[str]:
        return ["soma", self._house.original.name, self._house.surrogate.name]


class SurfaceHouse:
    """The application, and the house behind it. Its keys are tenants of their own; `ADMIN` is the admin's."""

    def __init__(self, app: FastAPI, house: House, store: SessionStore) -> None:
        self.app = app
        self.house = house
        self.store = store

    @classmethod
    async def built(cls, folder: Path, **changes: Any) -> SurfaceHouse:
        config = parse_config({**SETTINGS, **changes}, "test")
        store = SessionStore(f"sqlite+aiosqlite:///{folder}/s.db")
        await store.open()
        house = House(config, store)
        keys = KeyStore.at(f"sqlite+aiosqlite:///{folder}/s.db")
        environment = {config.access.admin_key_env: ADMIN}
        allowances = Allowances.configured(config, keys, environment, CollectorRegistry())
        app = vllm_application(FakeHost(house, allowances))
        for plugin in app.state.endpoint_plugins:
            await plugin.init_state(None, app.state, app.state.args)
        return cls(app, house, store)

    def client(self, key: str | None = "k") -> httpx.AsyncClient:
        # What the application raises is answered as a server would: it is the answer that is judged.
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.AsyncClient(transport=transport, base_url="http://soma", headers=headers)

    async def close(self) -> None:
        await self.house.custody.stop()
        await self.house.background.stop()
        await self.house.book.stop()
        await self.store.close()


def vllm_application(host: FakeHost) -> FastAPI:
    """The application that vLLM builds around a model that generates, with our plugin attached."""
    from vllm.entrypoints.launchers.app import build_app

    from soma_vllm.engines.vllm_internals import parse_arguments

    arguments = parse_arguments(["--model", "none", "--disable-uvicorn-access-log"])
    setattr(arguments, HOST, host)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_PLUGINS", "soma")
        return build_app(arguments, ("generate",))
