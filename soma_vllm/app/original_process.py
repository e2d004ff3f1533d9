"""The original as a server has it: a vLLM child that is watched and restarted, or an external endpoint.

Guarantees: a child is started before anything else loads, and stopped with the server; each state that it
enters is announced, and logged with its consequence.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

from soma_vllm.config import Config
from soma_vllm.engines.child_process import ChildServer
from soma_vllm.engines.engine import Salts
from soma_vllm.engines.original import OriginalEngine
from soma_vllm.engines.supervisor import Patience, State, Supervisor
from soma_vllm.engines.vllm.arguments import child_command, child_environment, original_arguments
from soma_vllm.private import masked

logger = logging.getLogger(__name__)


class OriginalProcess:
    """Starts the original, and connects to it."""

    def __init__(self, config: Config, name: str, run_dir: Path, say: Callable[[str], None]) -> None:
        self._config = config
        self._name = name
        self._run_dir = run_dir
        self._say = say
        self._supervisor: Supervisor | None = None
        self._was_ready = False

    @property
    def state(self) -> State | None:
        """The child's state; None for an external endpoint."""
        return None if self._supervisor is None else self._supervisor.state

    @property
    def restarts(self) -> int:
        """Restarts of the child so far."""
        return 0 if self._supervisor is None else self._supervisor.restarts

    @property
    def replaceable(self) -> bool:
        """Whether the surrogate answers while the original is down."""
        return self._config.original.when_down == "surrogate"

    def start(self, model: Path | None, surrogate: Path, cleanup: AsyncExitStack) -> None:
        """Start the child: it loads beside the surrogate, whose weights may draft for it.

        `model` is None for an external endpoint.

        Raises:
            PreflightError: the run folder's path is too long for a socket.
        """
        settings = self._config.original
        if model is None:
            self._say(f"original   is {masked(str(settings.url))}")
            return
        socket = self._run_dir / "original.sock"
        arguments = original_arguments(self._config, str(model), self._name, str(surrogate))
        child = ChildServer(
            child_command(arguments, socket),
            child_environment(settings, str(model)),
            self._run_dir / "original.log",
            socket,
        )
        self._supervisor = Supervisor(child, patience=Patience(start=settings.start_timeout_s))
        self._supervisor.on_change(self._changed)
        self._supervisor.start()
        cleanup.push_async_callback(self._supervisor.stop)
        self._say(f"original   loads {self._name}; its log is {child.log_path}")

    async def connect(self, salts: Salts, cleanup: AsyncExitStack) -> OriginalEngine:
        """The engine, once it can answer.

        Raises:
            EngineUnavailable: the child did not become ready; with the end of its log.
        """
        settings = self._config.original
        if self._supervisor is None:
            assert settings.url is not None, "for_serving has checked"
            engine = OriginalEngine(
                self._name,
                settings.url,
                api_key_env=settings.api_key_env,
                connect_timeout_s=settings.connect_timeout_s,
                speaks_vllm=settings.api == "vllm",
            )
        else:
            await self._supervisor.wait_ready(settings.start_timeout_s)
            engine = OriginalEngine.of_child(self._name, self._supervisor, settings.connect_timeout_s, salts)
        cleanup.push_async_callback(engine.close)
        return engine

    def _changed(self, state: State) -> None:
        self._say(f"original   {state}")
        log = self._run_dir / "original.log"
        if state is State.READY:
            self._was_ready = True
        elif state is State.DOWN and self._was_ready:  # else it is given up at once
            logger.warning(
                "the original ended and is restarted; until it is ready, original.when_down says who answers; "
                "its log is %s",
                log,
            )
        elif state is State.FAILED:
            logger.error(
                "the original ended too often; it is started again every few minutes, and until it is ready "
                "original.when_down says who answers; its log is %s",
                log,
            )
