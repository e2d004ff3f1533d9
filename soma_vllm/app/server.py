"""The composition root: builds every room's part from the configuration, in a visible order, and takes them
down again in the reverse order.

Guarantees: nothing heavy starts before every check has passed; each step says when it is ready; whatever was
started is stopped again, however the server ends.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from soma_vllm.adaptation.teacher_logprobs import TeacherLogprobs, why_text
from soma_vllm.adaptation.threaded_encoder import ThreadedEncoder
from soma_vllm.adaptation.threaded_judge import ThreadedJudge
from soma_vllm.adapters.file_provider import AdapterFileProvider
from soma_vllm.adapters.store.opening import open_root
from soma_vllm.adapters.store.protocol import AdapterStore
from soma_vllm.adapters.store.verify import Demands
from soma_vllm.api.auth.quotas import Quotas
from soma_vllm.api.draining import Draining
from soma_vllm.api.readiness import Readiness
from soma_vllm.app.build import Parts, SomaServices, build
from soma_vllm.app.original_process import OriginalProcess
from soma_vllm.app.record import entered, leased
from soma_vllm.app.surrogate_parts import open_surrogate, shared_vocabulary
from soma_vllm.app.watching import watch
from soma_vllm.config import Config, exposed
from soma_vllm.engines.engine import Salts
from soma_vllm.engines.original import OriginalEngine
from soma_vllm.engines.vllm.arguments import (
    slot_rank,
    surrogate_arguments,
    vllm_environment,
)
from soma_vllm.errors import EngineUnavailable, PolicyUnavailable, PreflightError, TrainingError, Unprocessable
from soma_vllm.maintenance.sweep_trigger import SweepTrigger
from soma_vllm.method.gap.gap_judge import open_judge
from soma_vllm.models.home import filled
from soma_vllm.scheduler.dispatcher import DISPATCH_NAME
from soma_vllm.scheduler.policies.base import Policies
from soma_vllm.sessions.sql.api_keys import KeyStore
from soma_vllm.sessions.sql.store import SessionStore
from soma_vllm.telemetry.adapter_store_metrics import AdapterStoreMetrics
from soma_vllm.telemetry.event_log import EventLog
from soma_vllm.telemetry.original_metrics import OriginalMetrics
from soma_vllm.telemetry.session_metrics import SessionMetrics
from soma_vllm.training.pair import ANYONE, owner_of

logger = logging.getLogger(__name__)

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

    def __init__(
        self,
        config: Config,
        paths: ModelPaths,
        policies: Policies,
        run_dir: Path,
        say: Say,
        take_over: bool = False,
    ) -> None:
        """`take_over` waits for another server of this record to end."""
        self._config = config
        self._paths = paths
        self._policies = policies
        self._say = say
        self._started = time.monotonic()
        self._state: Any = None
        """vLLM's application state, once the services have started."""
        self._wait = (lambda why: say(f"waiting    {why}")) if take_over else None
        self._cleanup = AsyncExitStack()
        self._run_dir = run_dir
        self._salts = Salts()
        self.draining = Draining(config.server.drain_s, say)
        self.readiness = Readiness()
        self._original = OriginalProcess(config, config.original_name, run_dir, say)
        self._keys = KeyStore.at(filled(config.storage.location, self._run_dir))
        self._cleanup.push_async_callback(self._keys.close)
        self.quotas = Quotas.configured(config, self._keys)
        self.server = config.server
        self.started_at = time.time()
        self._original_engine: OriginalEngine | None = None

    # -- life -------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until SIGINT or SIGTERM; returns with every part stopped.

        Raises:
            PreflightError: a part did not start.
        """
        async with self._cleanup:
            for line in exposed(self._config):
                logger.warning("%s", line)
            self._check_pair_adapter()
            store = await self._open_sessions()
            adapter_store = await self._open_adapter_store(await store.record_id())
            self._stores = store, adapter_store
            self._original.start(self._paths.original, self._paths.surrogate, self._cleanup)
            self._say(f"surrogate  starting {self._config.surrogate_name} (vLLM takes 20-60 s to load)")
            os.environ.update(vllm_environment(self._config.surrogate, str(self._paths.surrogate), PLUGINS))
            # Only now: vLLM reads its environment when it is imported.
            from soma_vllm.api.plugin import HOST
            from soma_vllm.engines.vllm.internals import parse_arguments, run_server

            arguments = parse_arguments(
                [
                    *surrogate_arguments(self._config, str(self._paths.surrogate), self._config.surrogate_name),
                    *("--host", self._config.server.host, "--port", str(self._config.server.port)),
                ]
            )
            setattr(arguments, HOST, self)
            announced = asyncio.create_task(self._announce(), name="soma-announce")
            try:
                # The server drains by itself; uvicorn's own wait is for what that left.
                await run_server(arguments, timeout_graceful_shutdown=math.ceil(self._config.server.drain_s))
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

    def models(self) -> dict[str, int | None]:
        """Names that may be asked for, and the longest prompt and answer of each."""
        original, surrogate = self._config.original, self._config.surrogate
        known = original.url is None or "max_model_len" in original.model_fields_set
        longest = original.max_model_len if known else None
        # A dialogue is the original's first, and again where it outgrows the surrogate.
        own = {DISPATCH_NAME: longest, self._config.original_name: longest}
        return {**own, self._config.surrogate_name: surrogate.max_model_len}

    async def original_tokenizer(
        self, path: str, body: Mapping[str, Any], required: bool
    ) -> Mapping[str, Any] | None:
        """What the original's tokenizer answers; see `api.plugin.Host`."""
        engine = self._original_engine
        if engine is None or not engine.speaks_vllm:
            if required:
                raise Unprocessable(
                    f"the original shows no tokenizer; expected {self._config.surrogate_name}", "model"
                )
            return None
        limit_s = self._config.original.first_token_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                return await engine.tokenizer(path, body)
        except TimeoutError:
            raise EngineUnavailable(f"the original did not answer within {limit_s:g} s") from None

    async def begin(self, engine_client: Any, state: Any) -> SomaServices:
        """Called by the plugin once vLLM's engine is ready: start the rest, hand out what its routes need."""
        from soma_vllm.engines.vllm.internals import PrivateChat, keep_adapters_out_of_metrics

        keep_adapters_out_of_metrics(engine_client)
        self._say("surrogate  ready")
        store, adapter_store = self._stores
        encoder, judge = await self._load_encoder()
        trainer = await self._start_trainers()
        original = await self._original.connect(self._salts, self._cleanup)
        self._original_engine = original
        await self._open_policy()
        stock, sweep_trigger = AdapterStoreMetrics(), SweepTrigger()
        engine_takes = Demands(slot_rank(self._config.lora.rank), str(self._paths.surrogate))
        files = AdapterFileProvider(adapter_store, sweep_trigger, stock, engine_takes)
        serving = PrivateChat(engine_client, state)
        leases, surrogate = open_surrogate(self._config, serving, files, self._salts)
        services = build(
            Parts(
                config=self._config,
                policies=self._policies,
                original=original,
                surrogate=surrogate,
                encoder=encoder,
                judge=judge,
                trainer=trainer,
                store=store,
                adapter_store=adapter_store,
                leases=leases,
                teacher_logprobs=await self._engage_teachers(original.speaks_vllm),
                meter=self.quotas,
                stock=stock,
                salts=self._salts,
                sweep_trigger=sweep_trigger,
                observers=(SessionMetrics(), EventLog(), stock),
                original_meter=OriginalMetrics(),
            )
        )
        self._cleanup.push_async_callback(services.stop)
        await services.start()
        watch(self.readiness, services, self._original, trainer, engine_client, self.draining)
        self._state = state
        return services

    # -- parts ------------------------------------------------------------------------------------------

    async def _engage_teachers(self, speaks_vllm: bool) -> TeacherLogprobs:
        """Teach by log-probabilities where the original shows them in the surrogate's vocabulary."""
        why = why_text(self._config, speaks_vllm, same_vocabulary=True)
        vocabulary = None
        if why is None:
            folders = self._paths.original_vocabulary, self._paths.surrogate
            vocabulary = await asyncio.to_thread(shared_vocabulary, *folders)
        if vocabulary is not None:
            self._say("teachers   log-probabilities")
            return TeacherLogprobs(self._config, None, vocabulary.spelt)
        why = why_text(self._config, speaks_vllm, same_vocabulary=False)
        self._say(f"teachers   {why}: answers teach as text")
        return TeacherLogprobs(self._config, why)

    async def _open_sessions(self) -> SessionStore:
        url = filled(self._config.storage.location, self._run_dir)
        await self._cleanup.enter_async_context(leased(url, self._wait, self._lost))
        store = SessionStore(url)
        await store.open()
        self._cleanup.push_async_callback(store.close)
        if self.quotas.needs_keys:
            self.quotas.learn(await self._keys.readable())
        self._say(f"sessions   {await store.count()} on record")
        return store

    def _lost(self) -> None:
        """End at once: the record is another server's now, and nothing more may be written to it."""
        if self._state is None:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            self._state.server.should_exit = self._state.server.force_exit = True

    async def _open_adapter_store(self, record_id: str) -> AdapterStore:
        store = open_root(
            filled(self._config.adapters.root, self._run_dir),
            filled(self._config.adapters.cache, self._run_dir),
            demands=Demands.of_model(self._paths.surrogate, self._config.lora.rank),
            owner=record_id,
        )
        # Told to `soma adapters` as well, which deletes nothing under a running server.
        await entered(self._cleanup, store.in_service, self._wait)
        return store

    async def _load_encoder(self) -> tuple[ThreadedEncoder, ThreadedJudge]:
        """The encoder, and the gate's judge beside it."""
        from soma_vllm.method.encoder import SentenceEncoder

        settings = self._config.encoder
        encoder = await asyncio.to_thread(
            SentenceEncoder, self._paths.encoder, self._config.gate.encoder_max_tokens, settings.threads
        )
        threaded = ThreadedEncoder(encoder.encode)
        judge = ThreadedJudge(open_judge(self._config, encoder))
        for opened in (threaded, judge):
            self._cleanup.callback(opened.close)
        self._say(f"encoder    {settings.model} ready")
        return threaded, judge

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
        url = self._config.server.url
        async with aiohttp.ClientSession() as client:
            while not await _answers(client, f"{url}/health"):
                await asyncio.sleep(0.2)
        if self._state is None:
            self._say("failed     vLLM did not load the soma endpoint plugin; is soma-vllm installed here?")
            os.kill(os.getpid(), signal.SIGTERM)
            return
        self.draining.handle_signals(self._state.server)
        seconds = time.monotonic() - self._started
        self._say(f"listening  {url}/v1  (models: {', '.join(self.models())}; ready in {seconds:.0f} s)")


async def _answers(client: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with client.get(url, timeout=aiohttp.ClientTimeout(total=2)) as response:
            return response.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False
