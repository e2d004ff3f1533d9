"""What the original answers in each dialogue: played once, greedily, under the full history.

Guarantees: every variant is measured against the same answers; a dialogue whose trajectory is on disk asks no
engine; a trajectory is written whole or not at all. The files hold conversation text; only their
owner may read them.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import tempfile
import zipfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from soma_vllm.config import Config
from soma_vllm.engines.child_process import ChildServer
from soma_vllm.engines.engine import ChatCall, Engine
from soma_vllm.engines.logprobs import teacher_from_logprobs, teaching_fields
from soma_vllm.engines.original import OriginalEngine
from soma_vllm.engines.supervisor import Patience, Supervisor
from soma_vllm.engines.vllm.arguments import child_command, child_environment, vllm_arguments
from soma_vllm.errors import EngineRefused, EngineUnavailable
from soma_vllm.models.home import soma_home
from soma_vllm.models.hub import local_path
from soma_vllm.tools.command_line import sigterm_cancels
from soma_vllm.types import Teacher

Opening = Callable[[], AbstractAsyncContextManager[Engine]]
Say = Callable[[str], None]
"""Prints a line about progress."""


@dataclass(frozen=True)
class PlayedTurn:
    """One turn of a dialogue and the original's answer."""

    query: str
    answer: str
    cut: bool
    """True when the answer ended at the limit and not by itself: it has no end of turn."""
    teacher: Teacher | None


@dataclass(frozen=True)
class Trajectory:
    """A dialogue as the original went through it."""

    turns: tuple[PlayedTurn, ...]
    ended: str | None = None
    """Why the original answered fewer turns than were asked; None where it answered all."""


@dataclass(frozen=True)
class Recipe:
    """What a trajectory depends on, besides the dialogue's own turns."""

    original: str
    """The model's name, with its URL where it is someone else's endpoint."""
    max_new_tokens: int
    top_logprobs: int
    """0 where the original shows only words."""


async def play(engine: Engine, queries: Sequence[str], recipe: Recipe) -> Trajectory:
    """Put a dialogue's turns to the original, one after the other.

    A turn that it refuses (a history beyond its context) ends the trajectory; earlier turns stand.

    Raises:
        EngineUnavailable: it did not answer, or not as an OpenAI endpoint does.
        EngineError: log-probabilities were asked for and are not in the answer.
    """
    messages: list[dict[str, str]] = []
    turns: list[PlayedTurn] = []
    for query in queries:
        messages.append({"role": "user", "content": query})
        body = {"messages": messages, "max_tokens": recipe.max_new_tokens, "temperature": 0.0}
        try:
            reply = await engine.chat(ChatCall(body | teaching_fields(recipe.top_logprobs)))
        except EngineRefused as refusal:
            return Trajectory(tuple(turns), f"turn {len(turns) + 1} was refused with status {refusal.status}")
        assert reply.body is not None, "a request without stream=true is answered whole"
        turns.append(_parse(query, reply.body, recipe))
        messages.append({"role": "assistant", "content": turns[-1].answer})
    return Trajectory(tuple(turns))


async def play_all(
    engine: Engine,
    dialogues: Mapping[str, Sequence[str]],
    recipe: Recipe,
    cache: TrajectoryCache,
    at_once: int,
    say: Say,
) -> dict[str, Trajectory]:
    """Play several dialogues at once; each is stored once it is complete.

    Raises:
        EngineError: as `play` does; what was complete by then is stored.
    """
    room = asyncio.Semaphore(at_once)

    async def one(name: str, queries: Sequence[str]) -> tuple[str, Trajectory]:
        async with room:
            played = await play(engine, queries, recipe)
        if played.ended is None:
            cache.store(recipe, queries, played)
        say(f"{name}: {len(played.turns)} turns played" + (f"; {played.ended}" if played.ended else ""))
        return name, played

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(name, queries)) for name, queries in dialogues.items()]
    except* EngineUnavailable as errors:
        raise errors.exceptions[0] from None
    return dict(task.result() for task in tasks)


class TrajectoryCache:
    """Trajectories on disk, one file each, named by a digest of all they depend on."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, recipe: Recipe, queries: Sequence[str]) -> Trajectory | None:
        """The whole trajectory of these turns, or None where it has yet to be played."""
        try:
            # Opened here: numpy leaves a damaged file open.
            with self._path(recipe, queries).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                return _unpack(arrays)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return None  # missing, or not a file this version wrote: played and written again

    def store(self, recipe: Recipe, queries: Sequence[str], played: Trajectory) -> None:
        """Write a whole trajectory."""
        assert played.ended is None, "a larger context would change what is written"
        path = self._path(recipe, queries)
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(prefix=".draft-", dir=self._folder, delete=False) as file:
            try:
                np.savez_compressed(file, allow_pickle=False, **_pack(played))
                file.flush()
                Path(file.name).replace(path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise

    def _path(self, recipe: Recipe, queries: Sequence[str]) -> Path:
        named = json.dumps([_FORMAT, asdict(recipe), list(queries)], sort_keys=True)
        return self._folder / f"{hashlib.sha256(named.encode()).hexdigest()[:32]}.npz"


_FORMAT = 1
_WORDS = "turns"


def _parse(query: str, body: Mapping[str, Any], recipe: Recipe) -> PlayedTurn:
    try:
        choice = body["choices"][0]
        answer = choice["message"].get("content") or ""
        content = choice["logprobs"]["content"] if recipe.top_logprobs else None
    except (KeyError, IndexError, TypeError) as error:
        raise EngineUnavailable(
            f"the original's answer is not what was asked for: {type(error).__name__} at {error}; "
            "expected choices, message" + (" and logprobs" if recipe.top_logprobs else "")
        ) from error
    teacher = teacher_from_logprobs(content) if content else None
    return PlayedTurn(query, answer, choice.get("finish_reason") == "length", teacher)


def _pack(played: Trajectory) -> dict[str, Any]:
    """Words as JSON bytes, teachers as arrays."""
    words = [{"query": t.query, "answer": t.answer, "cut": t.cut} for t in played.turns]
    arrays: dict[str, Any] = {_WORDS: np.frombuffer(json.dumps(words).encode(), dtype=np.uint8)}
    for number, turn in enumerate(played.turns):
        if turn.teacher is not None:
            arrays[f"tokens{number}"] = np.asarray(turn.teacher.tokens, dtype=np.int64)
            arrays[f"top{number}"] = turn.teacher.top
            arrays[f"logprobs{number}"] = turn.teacher.logprobs
    return arrays


def _unpack(arrays: Mapping[str, Any]) -> Trajectory:
    turns = []
    for number, words in enumerate(json.loads(arrays[_WORDS].tobytes())):
        teacher = None
        if f"tokens{number}" in arrays:
            tokens = tuple(int(token) for token in arrays[f"tokens{number}"])
            teacher = Teacher(tokens, arrays[f"top{number}"], arrays[f"logprobs{number}"])
        turns.append(PlayedTurn(words["query"], words["answer"], words["cut"], teacher))
    return Trajectory(tuple(turns))


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
