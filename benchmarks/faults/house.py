"""The whole application in this process, with engines that answer at once and adapters that say whose they are.

Real: routes, dispatcher, recorder, adaptation, the session store and the adapter store with its files. A
trainer writes the number of its session's marker into the weights, and the surrogate says what the files that
it loaded hold: an answer comes from the files, and not from a name.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from safetensors.numpy import load_file
from support.adapter_files import BASE_MODEL, tensors, write_adapter
from support.api_services import SurfaceHouse
from support.fakes import FakeOriginal, FakeSurrogate, FakeTrainer
from support.guard import GUARD_S

from faults.row import Row
from faults.talk import FORCED, Canaries, Talk
from soma_vllm.adapters.store.filesystem import FilesystemAdapterStore
from soma_vllm.adapters.store.verify import Demands
from soma_vllm.engines.engine import ChatCall, Reply
from soma_vllm.training.messages import TrainRequest, TrainResult
from soma_vllm.types import WEIGHTS, AdapterRef

MARKERS = Canaries(re.compile(r"canary-\d+"))


class CanaryOriginal(FakeOriginal):
    """Answers with the marker that ends the dialogue's first message."""

    async def chat(self, call: ChatCall) -> Reply:
        messages = call.body.get("messages") or [{"content": "none"}]
        self.answers = [" ".join([str(messages[0]["content"]).split()[-1]] * 4)]
        self.calls.clear()
        reply: Reply = await super().chat(call)
        return reply


class CanarySurrogate(FakeSurrogate):
    """Says what the adapter's files say; nothing of a session where it has none."""

    def __init__(self) -> None:
        super().__init__()
        self.says: dict[str, str] = {}

    async def load(self, ref: AdapterRef) -> None:
        weights = load_file(Path(ref.path) / WEIGHTS)
        self.says[ref.name] = f"canary-{int(next(iter(weights.values())).flat[0])}"
        await super().load(ref)

    async def unload(self, ref: AdapterRef) -> None:
        self.says.pop(ref.name, None)
        await super().unload(ref)

    async def chat(self, call: ChatCall) -> Reply:
        self.answers = ["plain" if call.adapter is None else " ".join([self.says[call.adapter.name]] * 4)]
        self.calls.clear()
        self.log.clear()
        reply: Reply = await super().chat(call)
        return reply


class CanaryTrainer(FakeTrainer):
    """Writes a real adapter whose weights are the number of the marker in the answers that it learns from."""

    async def train(self, request: TrainRequest) -> TrainResult:
        self.requests.clear()
        (number,) = {found.split("-")[1] for found in MARKERS.words(request.examples[0].answer)}
        write_adapter(Path(request.out_dir), tensors(float(number)))
        result: TrainResult = await super().train(request)
        return result


class House:
    """The application and the ways to look behind it."""

    def __init__(self, inner: SurfaceHouse) -> None:
        self.inner = inner
        self.services = inner.services
        transport = httpx.ASGITransport(inner.app, raise_app_exceptions=False)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://soma", timeout=GUARD_S)

    def talk(self, row: Row, number: int, adapted: bool = False, name: str = "") -> Talk:
        """A dialogue with a marker of its own; only one that is adapted is trained."""
        headers = FORCED if adapted else {"X-SOMA-Policy": "original"}
        return Talk(self.http, row, name or f"session {number}", f"canary-{number}", MARKERS, **headers)

    async def settled(self) -> None:
        """Return when no background work is left, and everything is on record."""
        await self.inner.settled()

    async def check_leaks(self, row: Row) -> None:
        """Count what is still held although nothing is under way."""
        await self.settled()
        services = self.services
        held = {
            "sessions held": sum(entry.holds for entry in services.registry._entries.values()),
            "adapter leases": services.leases.count(),
            "places at the original": services.built.original._in_flight,
            "token reservations": len(services.meter.reservations),
        }
        for what, count in held.items():
            if count:
                row.count("leaks", what, count)

    async def on_record(self) -> dict[str, int]:
        """Turns of every session, as the database has them."""
        await self.settled()
        found = await self.services.store.summaries(None, 1_000_000)
        return {summary.key.session: summary.turns for summary in found}

    def forget(self) -> None:
        """Drop what the fakes keep of the past: a server has none of it."""
        self.services.events.clear()
        self.services.meter.spendings.clear()


@asynccontextmanager
async def house(
    folder: Path, parts: Mapping[str, Any] | None = None, url: str | None = None, **changes: Any
) -> AsyncIterator[House]:
    """The application over a folder's database and adapters, started; `parts` replace some of it."""
    store = FilesystemAdapterStore(
        folder / "adapters", demands=Demands(8, BASE_MODEL), owner="the suite's record"
    )
    built = {
        "original": CanaryOriginal(),
        "surrogate": CanarySurrogate(),
        "trainer": CanaryTrainer(),
        "adapter_store": store,
    }
    slots = {"surrogate": {"max_loras": 4}}
    inner = await SurfaceHouse.built(folder, {**built, **(parts or {})}, url, **{**slots, **changes})
    opened = House(inner)
    try:
        yield opened
    finally:
        await opened.http.aclose()
        await inner.close()
