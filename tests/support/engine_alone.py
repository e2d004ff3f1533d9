"""A real vLLM engine with LoRA in this process, without a server: what faults are tried on."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import warnings
from collections.abc import Coroutine
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self, TypeVar

from soma_vllm.config import Config
from soma_vllm.engines.vllm.arguments import surrogate_arguments, vllm_environment
from support.guard import GUARD_S

T = TypeVar("T")


class EngineAlone:
    """An engine and vLLM's serving objects over it, on a loop of its own; `run` runs coroutines there."""

    def __init__(self, config: Config, model: Path) -> None:
        self._config = config
        self._model = model
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._stop = asyncio.Event()
        self.name = model.name
        self.client: Any = None
        self.state = SimpleNamespace()

    def run(self, work: Coroutine[Any, Any, T], limit_s: float = GUARD_S) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(limit_s)

    def __enter__(self) -> Self:
        before = dict(os.environ)
        os.environ.update(vllm_environment(self._config.surrogate, str(self._model)))
        os.environ["VLLM_WORKER_MULTIPROCESSING_METHOD"] = "spawn"
        # The engine's process ends with the thread that started it; this one lives as long as the loop.
        self._thread.start()
        started: Future[None] = Future()
        self._life = asyncio.run_coroutine_threadsafe(self._live(started), self._loop)
        try:
            started.result(GUARD_S)
        finally:
            os.environ.clear()
            os.environ.update(before)
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._life.result(GUARD_S)
        self.client = self.state = None
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(GUARD_S)
        self._loop.close()
        del self._life
        with warnings.catch_warnings():
            # vLLM leaves its zmq context to the collector.
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()

    async def _live(self, started: Future[None]) -> None:
        try:
            from vllm.entrypoints.launchers.api_server.app_state import init_app_state
            from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client

            from soma_vllm.engines.vllm.internals import parse_arguments

            arguments = parse_arguments(surrogate_arguments(self._config, str(self._model), self.name))
            async with build_async_engine_client(arguments) as client:
                self.client = client
                await init_app_state(client, self.state, arguments, ("generate",))
                started.set_result(None)
                await self._stop.wait()
        except BaseException as error:
            if not started.done():
                started.set_exception(error)
            raise
