"""The way of a turn through the package's files: short, and hardly ever turning back.

A turn is played as a client sends it, through vLLM's application with our routes, the real wiring and a real
database, before fake engines. Of every function of the package that is entered it is known from where it was
called (`sys.setprofile`, and the task factory for what starts a task). Five moments are looked at:

* found: the session is held for the turn (`SessionRegistry.hold`);
* routed: the policy chooses (`SomaPolicy.route`);
* asked: the engine is called (`FakeEngine.chat`);
* heard: the engine's last event, or its whole reply, leaves it (`FakeEngine._stream`, `parse_body`);
* recorded: the turn is folded into its session (`SessionRegistry.record`).

The *walk* is made of the calls that lead from the route in `api/chat.py`, or from the response that it
returned, to these moments, in this order, each call once. A *stop* is a call that enters another file than the
caller's; returning to the caller is none. Calls that lead to no moment, such as those of value types, of
accessors, of meters and of the log, are not on the walk. The engine is one stop more.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
from support.api_services import SurfaceHouse, marker
from support.fake_engine import FakeEngine

import soma_vllm
from soma_vllm.api.chat import create_chat_completion
from soma_vllm.api.dialogue_stream import DialogueStream
from soma_vllm.engines.reply_parser import parse_body
from soma_vllm.scheduler.dispatcher import Dispatcher
from soma_vllm.scheduler.policies.soma import SomaPolicy
from soma_vllm.sessions.registry import SessionRegistry

PACKAGE = Path(soma_vllm.__file__).parent
HEADERS = {"X-Session-ID": "s", "X-SOMA-Force": "plain"}
MOST_STOPS = 16
MOST_VISITS = 2

MOMENTS: dict[CodeType, str] = {
    SessionRegistry.hold.__code__: "found",
    SomaPolicy.route.__code__: "routed",
    FakeEngine.chat.__code__: "asked",
    FakeEngine._stream.__code__: "heard",
    parse_body.__code__: "heard",
    SessionRegistry.record.__code__: "recorded",
}
BEGINNINGS = (inspect.unwrap(create_chat_completion).__code__, DialogueStream.__call__.__code__)
"""The route, and the response that it returns where a stream was asked for: the server calls it afterwards."""
ORDER = ("found", "routed", "asked", "heard", "recorded")

Chain = list[FrameType]
"""Frames of the package, the caller first."""


class Walk:
    """Notes how the moments of one turn are come to."""

    def __init__(self) -> None:
        self._started: dict[asyncio.Task[Any], Chain] = {}
        self._chains: dict[str, Chain] = {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note what is called while the block runs."""
        loop = asyncio.get_running_loop()

        def started(loop: asyncio.AbstractEventLoop, coroutine: Any, **more: Any) -> asyncio.Task[Any]:
            task = asyncio.Task(coroutine, loop=loop, **more)
            self._started[task] = self._chain(sys._getframe(1))
            return task

        loop.set_task_factory(started)
        sys.setprofile(self._called)
        try:
            yield
        finally:
            sys.setprofile(None)
            loop.set_task_factory(None)

    def stops(self) -> list[str]:
        """The files of the walk, in its order."""
        walked: set[FrameType] = set()
        found = []
        for moment in ORDER:
            chain = self._chains[moment]
            begins = next(index for index, frame in enumerate(chain) if frame.f_code in BEGINNINGS)
            for caller, called in pairwise([None, *chain[begins:]]):
                assert called is not None
                if called in walked:
                    continue
                walked.add(called)
                file = called.f_code.co_filename
                if caller is None or caller.f_code.co_filename != file:
                    found.append(str(Path(file).relative_to(PACKAGE)))
        return found

    def _called(self, frame: FrameType, event: str, _: object) -> None:
        moment = MOMENTS.get(frame.f_code) if event == "call" else None
        if moment is None or "recorded" in self._chains:
            return  # what follows from a recorded turn is no part of its way
        if moment == "found" and "routed" in self._chains:
            return
        if moment in ("found", "heard") or moment not in self._chains:
            self._chains[moment] = self._chain(frame)

    def _chain(self, frame: FrameType | None) -> Chain:
        found: Chain = []
        while frame is not None:
            if frame.f_code.co_filename.startswith(f"{PACKAGE}/"):
                found.insert(0, frame)
            frame = frame.f_back
        task = asyncio.current_task()
        return [*self._started.get(task, []), *found] if task is not None else found


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[SurfaceHouse]:
    house = await SurfaceHouse.built(tmp_path)
    yield house
    await house.close()


async def walk_of(house: SurfaceHouse, engine: str, stream: bool) -> list[str]:
    """The walk of the first turn that this engine answers."""
    messages: list[dict[str, str]] = []
    for number in range(1, 8):
        messages.append({"role": "user", "content": f"question {number}: {marker('walk')}"})
        body = {"model": "soma", "messages": messages, "stream": stream}
        walk = Walk()
        with walk.watched():
            answer = await house.send("POST", "/v1/chat/completions", json=body, headers=HEADERS)
        assert answer.status_code == 200, answer.text
        if answer.headers["x-soma-engine"] == engine:
            return walk.stops()
        messages.append({"role": "assistant", "content": f"heard {marker('walk')}"})
        await house.settled()
    raise AssertionError(f"no turn was answered by the {engine}")


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize("engine", ["original", "surrogate"])
async def test_a_turn_makes_few_stops_and_comes_to_no_file_three_times(
    house: SurfaceHouse, engine: str, stream: bool
) -> None:
    stops = await walk_of(house, engine, stream)
    assert stops[0] == "api/chat.py"
    assert len(stops) + 1 <= MOST_STOPS, stops
    assert max(Counter(stops).values()) <= MOST_VISITS, stops


def test_the_dispatchers_first_method_tells_the_story() -> None:
    methods = [one for one in vars(Dispatcher).values() if inspect.isfunction(one)]
    first = next(method for method in methods if method.__name__ != "__init__")
    tree = ast.parse(inspect.getsource(first).lstrip().replace("\n    ", "\n"))
    told = [
        node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name)
    ]
    assert first.__name__ == "chat"
    story = ["resolve", "begin_turn", "decide", "_serve", "observe"]
    assert [name for name in story if name in told] == story
