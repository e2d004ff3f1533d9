"""The composition root: builds every room's part from the configuration, in a visible order, and takes them
down again in the reverse order.

Guarantees: nothing heavy starts before every check has passed; each step says when it is ready; whatever was
started is stopped again, however the server ends.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from soma_vllm.adaptation.teacher_logprobs import TeacherLogprobs, why_text
from soma_vllm.adaptation.threaded_encoder import ThreadedEncoder
from soma_vllm.adapters.file_provider import AdapterFileProvider
from soma_vllm.adapters.leases import AdapterLeases
from soma_vllm.adapters.loaded import LoadedAdapters, room_for
from soma_vllm.adapters.store.opening import open_root
from soma_vllm.adapters.store.protocol import AdapterStore
from soma_vllm.adapters.store.verify import Demands
from soma_vllm.api.auth.quotas import Quotas
from soma_vllm.app.build import Parts, SomaServices, build
from soma_vllm.config import Config
from soma_vllm.engines.child_process import ChildServer
from soma_vllm.engines.engine import Salts
from soma_vllm.engines.original import OriginalEngine
from soma_vllm.engines.supervisor import Patience, Supervisor
from soma_vllm.engines.surrogate import ChatServing, SurrogateEngine
from soma_vllm.engines.vllm.arguments import (
    child_command,
    child_environment,
    original_arguments,
    slot_rank,
    surrogate_arguments,
    vllm_environment,
)
from soma_vllm.errors import PolicyUnavailable, PreflightError, TrainingError
from soma_vllm.maintenance.sweep_trigger import SweepTrigger
from soma_vllm.models.home import soma_home
from soma_vllm.models.vocabulary import Vocabulary, read_vocabulary
from soma_vllm.scheduler.dispatcher import DISPATCH_NAME
from soma_vllm.scheduler.policies.base import Policies
from soma_vllm.sessions.sql.api_keys import KeyStore
from soma_vllm.sessions.sql.connections import identity
from soma_vllm.sessions.sql.store import SessionStore
from soma_vllm.telemetry.adapter_metrics import AdapterMetrics
from soma_vllm.telemetry.adapter_store_metrics import AdapterStoreMetrics
from soma_vllm.telemetry.session_metrics import SessionMetrics
from soma_vllm.training.pair import ANYONE, owner_of

PLUGINS = ("soma", "soma_engine")
"""vLLM's allow-list: our endpoint plugin and our engine plugin."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class ModelPaths:
    """Where the models of a configuration lie."""

    original: Path | None
    """None for an external endpoint."""
    surrogate: Path
    encoder: Path
    original_vocabulary: Path | None
    """Where the original's tokenizer lies; None where that is unknown."""


class SomaServer:
    """soma-serve: the surrogate's vLLM server, and everything around it."""

    def __init__(self, config: Config, paths: ModelPaths, policies: Policies, run_dir: Path, say: Say) -> None:
        self._config = config
        self._paths = paths
        self._policies = policies
        self._say = say
        self._started = time.monotonic()
        self._begun = False
        self._cleanup = AsyncExitStack()
        self._run_dir = run_dir
        self._supervisor: Supervisor | None = None
        self._salts = Salts()
        keys = KeyStore.at(self._filled(config.storage.url))
        self._cleanup.push_async_callback(keys.close)
        self.quotas = Quotas.configured(config, keys)
        self.extra_routes = config.server.extra_routes

    # -- life -------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until SIGINT or SIGTERM; returns with every part stopped.

        Raises:
            PreflightError: a part did not start.
        """
        async with self._cleanup:
            self._check_pair_adapter()
            self._start_original()
            self._say(f"surrogate  starting {self._surrogate_name} (vLLM takes 20-60 s to load)")
            os.environ.update(vllm_environment(self._config.surrogate, str(self._paths.surrogate), PLUGINS))
            # Only now: vLLM reads its environment when it is imported.
            from soma_vllm.api.plugin import HOST
            from soma_vllm.engines.vllm.internals import parse_arguments, run_server

            arguments = parse_arguments(
                [
                    *surrogate_arguments(self._config, str(self._paths.surrogate), self._surrogate_name),
                    *("--host", self._config.server.host, "--port", str(self._config.server.port)),
                ]
            )
            setattr(arguments, HOST, self)
            announced = asyncio.create_task(self._announce(), name="soma-announce")
            try:
                await run_server(arguments)
            finally:
                announced.cancel()
                self._say("stopping   the trainers, the original and the session store")
        self._say("stopped")

    def _check_pair_adapter(self) -> None:
        """Fail early where sessions could not tell whether they may start from the configured adapter."""
        directory = self._config.lora.init_from
        if directory is None:
            return
        try:
            owner = owner_of(directory)
        except TrainingError as error:
            raise PreflightError(str(error)) from error
        self._say(f"adapters   sessions of {'any tenant' if owner == ANYONE else owner} start from {directory}")

    def models(self) -> list[str]:
        """Names that may be asked for."""
        return [DISPATCH_NAME, self._original_name, self._surrogate_name]

    async def begin(self, engine_client: Any, state: Any) -> SomaServices:
        """Called by the plugin once vLLM's engine is ready: start the rest, hand out what its routes need."""
        from soma_vllm.engines.vllm.internals import PrivateChat, keep_adapters_out_of_metrics

        keep_adapters_out_of_metrics(engine_client)
        self._say("surrogate  ready")
        store = await self._open_sessions()
        encoder = await self._load_encoder()
        trainer = await self._start_trainers()
        original = await self._reach_original()
        await self._open_policy()
        stock, sweep_trigger = AdapterStoreMetrics(), SweepTrigger()
        adapter_store = self._open_adapter_store()
        engine_takes = Demands(slot_rank(self._config.lora.rank), str(self._paths.surrogate))
        files = AdapterFileProvider(adapter_store, sweep_trigger, stock, engine_takes)
        leases, surrogate = self._engage_surrogate(PrivateChat(engine_client, state), files)
        services = build(
            Parts(
                config=self._config,
                policies=self._policies,
                original=original,
                surrogate=surrogate,
                encoder=encoder,
                trainer=trainer,
                store=store,
                adapter_store=adapter_store,
                leases=leases,
                teacher_logprobs=await self._engage_teachers(original.speaks_vllm),
                meter=self.quotas,
                stock=stock,
                salts=self._salts,
                sweep_trigger=sweep_trigger,
                observers=(SessionMetrics(), stock),
            )
        )
        self._cleanup.push_async_callback(services.stop)
        await services.start()
        self._begun = True
        return services

    # -- parts ------------------------------------------------------------------------------------------

    @property
    def _surrogate_name(self) -> str:
        return self._config.surrogate.name or _served_name(self._config.surrogate_model)

    @property
    def _original_name(self) -> str:
        return self._config.original.name or _served_name(self._config.original_model)

    def _start_original(self) -> None:
        """Start the child first: it loads beside the surrogate."""
        if self._paths.original is None:
            self._say(f"original   is {self._config.original.url}")
            return
        original = self._config.original
        child = ChildServer(
            child_command(
                original_arguments(
                    self._config, str(self._paths.original), self._original_name, str(self._paths.surrogate)
                ),
                self._run_dir / "original.sock",
            ),
            child_environment(original, str(self._paths.original)),
            self._run_dir / "original.log",
            self._run_dir / "original.sock",
        )
        self._supervisor = Supervisor(child, patience=Patience(start=original.start_timeout_s))
        self._supervisor.on_change(lambda state: self._say(f"original   {state}"))
        self._supervisor.start()
        self._cleanup.push_async_callback(self._supervisor.stop)
        self._say(f"original   loads {self._original_name}; its log is {child.log_path}")

    def _engage_surrogate(
        self, serving: ChatServing, files: AdapterFileProvider
    ) -> tuple[AdapterLeases, SurrogateEngine]:
        """The engine, and the holds that keep adapters in it."""
        settings = self._config.surrogate
        metrics = AdapterMetrics()
        limit = settings.queue_limit if settings.overflow == "wait" else 0
        leases = AdapterLeases(settings.max_loras, limit, settings.queue_wait_s, metrics)
        room = room_for(settings.max_loras, settings.max_cpu_loras)
        loaded = LoadedAdapters(serving, room, files=files, in_use=leases.in_use, meter=metrics)
        metrics.watch(
            resident=lambda: len(loaded.resident()),
            leases=leases.count,
            distinct=leases.distinct,
            waiting=leases.waiting,
        )
        return leases, SurrogateEngine(self._surrogate_name, serving, self._salts, loaded)

    async def _reach_original(self) -> OriginalEngine:
        original = self._config.original
        if self._supervisor is None:
            assert original.url is not None, "for_serving has checked"
            engine = OriginalEngine(
                self._original_name,
                original.url,
                api_key_env=original.api_key_env,
                connect_timeout_s=original.connect_timeout_s,
                speaks_vllm=original.api == "vllm",
            )
        else:
            await self._supervisor.wait_ready(original.start_timeout_s)
            engine = OriginalEngine.of_child(
                self._original_name, self._supervisor, original.connect_timeout_s, self._salts
            )
        self._cleanup.push_async_callback(engine.close)
        return engine

    async def _engage_teachers(self, speaks_vllm: bool) -> TeacherLogprobs:
        """Teach by log-probabilities where the original shows them in the surrogate's vocabulary."""
        why = why_text(self._config, speaks_vllm, same_vocabulary=True)
        vocabulary = await asyncio.to_thread(self._one_vocabulary) if why is None else None
        if vocabulary is not None:
            self._say("teachers   log-probabilities")
            return TeacherLogprobs(self._config, None, vocabulary.spelt)
        why = why_text(self._config, speaks_vllm, same_vocabulary=False)
        self._say(f"teachers   {why}: answers teach as text")
        return TeacherLogprobs(self._config, why)

    def _one_vocabulary(self) -> Vocabulary | None:
        """The vocabulary of both models; None where it is not one, as far as their folders say."""
        if self._paths.original_vocabulary is None:
            return None
        original = read_vocabulary(self._paths.original_vocabulary)
        surrogate = read_vocabulary(self._paths.surrogate)
        if original is None or surrogate is None or original.digest() != surrogate.digest():
            return None
        return surrogate

    async def _open_sessions(self) -> SessionStore:
        store = SessionStore(self._filled(self._config.storage.url))
        await store.open()
        self._cleanup.push_async_callback(store.close)
        self._say(f"sessions   {await store.count()} on record")
        return store

    def _open_adapter_store(self) -> AdapterStore:
        store = open_root(
            self._filled(self._config.adapters.root),
            self._filled(self._config.adapters.cache),
            demands=Demands.of_model(self._paths.surrogate, self._config.lora.rank),
            owner=identity(self._filled(self._config.storage.url)),
        )
        # Told to `soma adapters`, which deletes nothing under a running server.
        self._cleanup.enter_context(store.in_service())
        return store

    async def _load_encoder(self) -> ThreadedEncoder:
        from soma_vllm.method.encoder import SentenceEncoder

        settings = self._config.encoder
        encoder = await asyncio.to_thread(
            SentenceEncoder, self._paths.encoder, self._config.gate.encoder_max_tokens, settings.threads
        )
        threaded = ThreadedEncoder(encoder.encode)
        self._cleanup.callback(threaded.close)
        self._say(f"encoder    {settings.model} ready")
        return threaded

    async def _open_policy(self) -> None:
        """Load what the configured policy needs; what others need is loaded when they are first asked for."""
        self._cleanup.push_async_callback(self._policies.close)
        try:
            await self._policies.open()
        except PolicyUnavailable as error:
            raise PreflightError(f"policy {self._config.policy}: {error}") from error
        self._say(f"policy     {self._config.policy}")

    async def _start_trainers(self) -> Any:
        from soma_vllm.training.pool import TrainerPool

        training = self._config.training
        pool = TrainerPool(training, str(self._paths.surrogate), self._config.adaptation.train_timeout_s)
        self._cleanup.push_async_callback(pool.stop)
        ready = await pool.start()
        pids = ", ".join(str(item.pid) for item in ready)
        self._say(f"trainers   {len(ready)} ready on {training.device} (process {pids})")
        return pool

    async def _announce(self) -> None:
        """Say where the server listens, once it does; stop it if our routes are not in it."""
        url = f"http://{self._config.server.host}:{self._config.server.port}"
        async with aiohttp.ClientSession() as client:
            while not await _answers(client, f"{url}/health"):
                await asyncio.sleep(0.2)
        if not self._begun:
            self._say("failed     vLLM did not load the soma endpoint plugin; is soma-vllm installed here?")
            os.kill(os.getpid(), signal.SIGTERM)
            return
        seconds = time.monotonic() - self._started
        self._say(f"listening  {url}/v1  (models: {', '.join(self.models())}; ready in {seconds:.0f} s)")

    def _filled(self, template: str) -> str:
        return template.format(soma_home=soma_home(), run_dir=self._run_dir)


def _served_name(model: str | None) -> str:
    """The name a model is served under: its last path component."""
    assert model is not None, "for_serving has checked"
    return model.rstrip("/").rsplit("/", 1)[-1].lower()


async def _answers(client: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with client.get(url, timeout=aiohttp.ClientTimeout(total=2)) as response:
            return response.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False
