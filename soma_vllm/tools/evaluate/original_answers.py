"""The original for the length of a block: a child server started for it, or an external endpoint.

Guarantees: a server started here is stopped here, whatever happens in between; nothing is started where every
trajectory is on disk.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path

from soma_vllm.config import Config
from soma_vllm.engines.child_process import ChildServer
from soma_vllm.engines.engine import Engine
from soma_vllm.engines.original import OriginalEngine
from soma_vllm.engines.supervisor import Patience, Supervisor
from soma_vllm.engines.vllm.arguments import child_command, child_environment, vllm_arguments
from soma_vllm.models.home import soma_home
from soma_vllm.models.hub import local_path
from soma_vllm.tools.command_line import sigterm_cancels
from soma_vllm.tools.evaluate.trajectory import Recipe, Say, Trajectory, TrajectoryCache, play_all

Opening = Callable[[], AbstractAsyncContextManager[Engine]]


def recipe_of(config: Config) -> Recipe:
    """What the trajectories of a configuration depend on."""
    original = config.original
    name = original.name or config.original_model or ""
    if original.url is None:
        # The model, not the name it is served under, decides what it says.
        return Recipe(config.original_model or "", config.max_new_tokens, original.top_logprobs)
    shows = original.top_logprobs if original.api == "vllm" else 0
    return Recipe(f"{name} at {original.url}", config.max_new_tokens, shows)


async def load_trajectories(
    config: Config, dialogues: Mapping[str, Sequence[str]], at_once: int, say: Say
) -> dict[str, Trajectory]:
    """The trajectories of the configured original, remembered under $SOMA_HOME; `at_once` dialogues at a time.

    Raises:
        ModelError: the original's folder is needed and not there.
        EngineError: the original did not start, or did not answer.
        PreflightError: an endpoint's key is not in the environment.
        asyncio.CancelledError: the process got SIGTERM; what was started is stopped.
    """
    cache = TrajectoryCache(soma_home() / "trajectories")
    with sigterm_cancels():
        return await trajectories(
            dialogues, recipe_of(config), cache, lambda: open_original(config, say), at_once, say
        )


async def trajectories(
    dialogues: Mapping[str, Sequence[str]],
    recipe: Recipe,
    cache: TrajectoryCache,
    opening: Opening,
    at_once: int,
    say: Say,
) -> dict[str, Trajectory]:
    """Every dialogue's trajectory, in the order of `dialogues`; what is not on disk is played.

    Raises:
        EngineError: the original did not start, or did not answer.
    """
    found = {name: cache.find(recipe, queries) for name, queries in dialogues.items()}
    missing = {name: dialogues[name] for name, kept in found.items() if kept is None}
    played: dict[str, Trajectory] = {}
    if missing:
        say(f"{len(missing)} of {len(dialogues)} dialogues have to be played to the original")
        async with opening() as engine:
            played = await play_all(engine, missing, recipe, cache, at_once, say)
    else:
        say(f"all {len(dialogues)} dialogues were played to the original before: it is not started")
    return {name: kept or played[name] for name, kept in found.items()}


@asynccontextmanager
async def open_original(config: Config, say: Say) -> AsyncIterator[Engine]:
    """The configured original, ready: an endpoint, or a vLLM server of our own.

    Raises:
        ModelError: a child's model is not there.
        EngineUnavailable: the child did not get ready; with the end of its log.
        PreflightError: the endpoint's key is not in the environment.
    """
    original = config.original
    name = original.name or config.original_model or ""
    async with AsyncExitStack() as stack:
        if original.url is not None:
            key, timeout_s = original.api_key_env, original.connect_timeout_s
            engine = OriginalEngine(name, original.url, api_key_env=key, connect_timeout_s=timeout_s)
            stack.push_async_callback(engine.close)
            yield engine
            return
        assert config.original_model is not None, "for_serving has checked"
        model = str(local_path(config.original_model))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soma-original-")))
        socket, log = folder / "original.sock", folder / "original.log"
        command = child_command(vllm_arguments(original, model, name), socket)
        child = ChildServer(command, child_environment(original, model), log, socket)
        supervisor = Supervisor(child, patience=Patience(start=original.start_timeout_s))
        stack.push_async_callback(supervisor.stop)
        engine = OriginalEngine.of_child(name, supervisor, original.connect_timeout_s)
        stack.push_async_callback(engine.close)
        say(f"starting the original {name} (20-60 s); its log is {log}")
        supervisor.start()
        await supervisor.wait_ready(original.start_timeout_s)
        yield engine
